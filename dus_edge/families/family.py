"""A model family: what its configuration, tensors and GGUF metadata are called, read from TOML.

One TOML for each architecture of transformers. Its entries:

- ``architecture``, ``spellings``, ``model_type``: how config.json names the family;
- ``like``: another family whose entries hold where this one has none;
- ``arithmetic``: which of the forward passes that the program knows is this family's;
- ``activations``: what ``hidden_act`` may be;
- ``norm_shift``: what is added to a norm's stored weights to get its factors;
- ``[fields]``: config.json's key of each field, and its default: a value, the name of another
  field, or the quotient ``a / b`` of two. With ``null = "none"`` a null means that there is none;
- ``[rope]``: kinds of rotary embedding, and how rows of q and k are reordered for llama.cpp;
- ``[layers]``: the prefix of a layer's tensors, what in config.json is indexed by layer, the
  ``period`` of a pattern over layers, and ``depths`` that llama.cpp takes for a model of its own;
- ``[[tensors]]``: see `TensorRule`;
- ``[gguf]``: architecture and keys, see `GGUFKey`.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from importlib.resources import files
from typing import Any

from dus_edge.families.shape import Shape
from dus_edge.words import whole_number

#: Fields of the configuration that are counts, beside those of `Shape`.
_FLAGS = ("tied_head", "attention_bias", "mlp_bias")
_NUMBERS = ("rms_norm_eps",)
_ARITHMETIC = ("llama",)
_REORDER = ("none", "interleave")
_TYPES = ("u32", "f32")
_INDEXED = re.compile(r"^(.*?\.)(\d{1,18})(\..+)$")


class FamilyError(ValueError):
    """A family's TOML is wrong; a mistake of ours, which a test finds."""


@dataclass(frozen=True)
class FieldRule:
    """Where config.json keeps a field.

    Attributes:
        key: config.json's.
        default: where the key is absent or null; None if it may not be. See the module's text.
        optional: whether a null means that there is none (and absence means the default).
    """

    key: str
    default: int | float | bool | str | None = None
    optional: bool = False


@dataclass(frozen=True)
class TensorRule:
    """One tensor, or one of every layer.

    Attributes:
        role: what it does: ``q``, ``down``, ``final_norm``, …
        hf: transformers' name without ``.weight``; ``{i}`` is the layer.
        gguf: llama.cpp's, the same way.
        shape: fields or properties of `Shape`, outermost first.
        bias: flag of the configuration that gives it a bias; None if there never is one.
        unless: flag that leaves it out.
        rope_heads: field with the number of heads whose rows are reordered; None for none.
        site: of a linear layer, the point of the forward pass where its inputs are seen; tensors
            of one site share their inputs. Exactly these matrices are what GPTQ and bitsandbytes
            quantize.
    """

    role: str
    hf: str
    gguf: str
    shape: tuple[str, ...]
    bias: str | None = None
    unless: str | None = None
    rope_heads: str | None = None
    site: str | None = None

    @property
    def per_layer(self) -> bool:
        """Whether every layer has one."""
        return "{i}" in self.hf


@dataclass(frozen=True)
class GGUFKey:
    """One entry of GGUF's metadata.

    Attributes:
        key: without the architecture before it.
        value: field of the configuration, ``rope_theta`` or ``rope_scaling``.
        type: ``u32`` or ``f32``.
        if_given: key of config.json without which the entry is not written.
    """

    key: str
    value: str
    type: str = "u32"
    if_given: str | None = None


@dataclass(frozen=True)
class DepthRule:
    """A depth at which llama.cpp takes the model for one of its own.

    Attributes:
        n_layers: the depth.
        llama_cpp_type: what it is taken for, such as ``70B``.
        grouped_queries: only for models with, or without, grouped queries; None for all.
    """

    n_layers: int
    llama_cpp_type: str
    grouped_queries: bool | None = None

    def holds(self, shape: Shape) -> bool:
        """Whether a model of that shape is taken so."""
        grouped = self.grouped_queries
        return shape.n_layers == self.n_layers and grouped in (None, shape.grouped_queries)


@dataclass(frozen=True, eq=False)
class Family:
    """An architecture; the module's text says what the entries mean."""

    architecture: str
    model_type: str
    arithmetic: str
    fields: Mapping[str, FieldRule] = field(repr=False)
    tensors: tuple[TensorRule, ...] = field(repr=False)
    gguf_architecture: str
    gguf_keys: tuple[GGUFKey, ...] = field(repr=False)
    layer_prefix: str
    rope_kinds: tuple[str, ...]
    reorder: str = "none"
    spellings: tuple[str, ...] = ()
    activations: tuple[str, ...] = ("silu",)
    norm_shift: float = 0.0
    layer_lists: tuple[str, ...] = ()
    layer_caps: tuple[str, ...] = ()
    period: int = 1
    depths: tuple[DepthRule, ...] = ()

    @functools.cached_property
    def _by_hf(self) -> dict[str, TensorRule]:
        return {rule.hf: rule for rule in self.tensors}

    @functools.cached_property
    def _by_role(self) -> dict[str, TensorRule]:
        return {rule.role: rule for rule in self.tensors}

    @functools.cached_property
    def sites(self) -> dict[str, tuple[TensorRule, ...]]:
        """Linear layers by the site that feeds them, in the order in which a layer computes."""
        found: dict[str, tuple[TensorRule, ...]] = {}
        for rule in self.tensors:
            if rule.site is not None:
                found[rule.site] = (*found.get(rule.site, ()), rule)
        return found

    def rule(self, role: str) -> TensorRule:
        """The tensor of a role; KeyError if the family has none."""
        return self._by_role[role]

    def find(self, name: str) -> tuple[TensorRule, int | None, str]:
        """What a tensor is.

        Args:
            name: transformers' name, such as ``model.layers.3.mlp.up_proj.weight``.

        Returns:
            its rule, its layer (None outside layers), and ``weight`` or ``bias``.

        Raises:
            KeyError: the family has no such tensor.
        """
        stem, _, part = name.rpartition(".")
        if part in ("weight", "bias"):
            if (rule := self._by_hf.get(stem)) is not None and not rule.per_layer:
                return rule, None, part
            if match := _INDEXED.match(stem):
                rule = self._by_hf.get(f"{match[1]}{{i}}{match[3]}")
                if rule is not None:
                    return rule, int(match[2]), part
        raise KeyError(name)

    def layer_of(self, name: str) -> tuple[int, str] | None:
        """The layer that a tensor of any name belongs to and its name there; None outside."""
        if not name.startswith(self.layer_prefix):
            return None
        index, dot, rest = name[len(self.layer_prefix) :].partition(".")
        number = whole_number(index)
        return (number, rest) if dot and number is not None else None

    def in_layer(self, name: str, layer: int) -> str:
        """The same tensor's name in another layer; a tensor outside layers keeps its own."""
        place = self.layer_of(name)
        return name if place is None else f"{self.layer_prefix}{layer}.{place[1]}"

    def name(self, role: str, layer: int | None = None, part: str = "weight") -> str:
        """transformers' name of a role's tensor, ``weight`` or ``bias``."""
        return f"{self.rule(role).hf.format(i=layer)}.{part}"

    def gguf_name(self, name: str) -> str:
        """GGUF's name of transformers' tensor; KeyError if the family has none."""
        rule, layer, part = self.find(name)
        return f"{rule.gguf.format(i=layer)}.{part}"

    def is_linear(self, name: str) -> bool:
        """Whether a tensor is the matrix of a layer's linear layer: what quantizers make codes of.

        Embedding, head, norms and biases are not.
        """
        try:
            rule, _, part = self.find(name)
        except KeyError:
            return False
        return rule.site is not None and part == "weight"

    def shift(self, name: str) -> float:
        """What is added to a tensor's stored values to get what llama.cpp multiplies by."""
        rule, _, part = self.find(name)
        return self.norm_shift if part == "weight" and rule.role.endswith("norm") else 0.0

    def rope_heads(self, name: str, shape: Shape) -> int | None:
        """Number of heads whose rows are reordered; None for a tensor that is left as it is."""
        rule, _, _ = self.find(name)
        if rule.rope_heads is None or self.reorder == "none":
            return None
        return getattr(shape, rule.rope_heads)

    def shapes(self, config: Shape) -> dict[str, tuple[int, ...]]:
        """Every tensor of a model, in model order.

        Args:
            config: the shape, with the flags that tensors depend on.

        Returns:
            transformers' names; shapes are ``(out_features, in_features)``. A tied head is not
            among them: it is the embedding.
        """
        layered = [rule for rule in self.tensors if rule.per_layer]
        first = self.tensors.index(layered[0])
        found: dict[str, tuple[int, ...]] = {}
        for rule in self.tensors[:first]:
            found.update(_stored(rule, None, config))
        for i in range(config.n_layers):
            for rule in layered:
                found.update(_stored(rule, i, config))
        for rule in self.tensors[first:]:
            if not rule.per_layer:
                found.update(_stored(rule, None, config))
        return found

    def gguf_key(self, value: str) -> str:
        """GGUF's full key of a field: ``llama.block_count`` of ``n_layers``."""
        found = next(k.key for k in self.gguf_keys if k.value == value)
        return f"{self.gguf_architecture}.{found}"

    def llama_cpp_type(self, shape: Shape) -> str | None:
        """What llama.cpp takes a model of that depth for; None where depth says nothing."""
        return next((rule.llama_cpp_type for rule in self.depths if rule.holds(shape)), None)


def _stored(
    rule: TensorRule, layer: int | None, config: Shape
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A rule's tensors in one layer: the weight, and a bias where the configuration has one."""
    if rule.unless and getattr(config, rule.unless):
        return
    shape = tuple(getattr(config, size) for size in rule.shape)
    stem = rule.hf.format(i=layer)
    yield f"{stem}.weight", shape
    if rule.bias and getattr(config, rule.bias):
        yield f"{stem}.bias", shape[:1]


def parse_family(tables: Mapping[str, Any], bases: Mapping[str, Mapping[str, Any]]) -> Family:
    """A family from its TOML.

    Args:
        tables: the TOML.
        bases: TOMLs by name, for `like`.

    Raises:
        FamilyError: an entry is missing, unknown, or names what there is not.
    """
    tables = _merged(tables, bases)
    known = {
        *("architecture", "spellings", "model_type", "arithmetic", "activations", "norm_shift"),
        *("fields", "rope", "layers", "tensors", "gguf"),
    }
    _check(not set(tables) - known, f"unknown entries {sorted(set(tables) - known)}")
    try:
        family = Family(
            architecture=tables["architecture"],
            spellings=tuple(tables.get("spellings", ())),
            model_type=tables["model_type"],
            arithmetic=tables["arithmetic"],
            activations=tuple(tables["activations"]),
            norm_shift=float(tables.get("norm_shift", 0.0)),
            fields={name: _field(rule) for name, rule in tables["fields"].items()},
            rope_kinds=tuple(tables["rope"]["kinds"]),
            reorder=tables["rope"].get("reorder", "none"),
            layer_prefix=tables["layers"]["prefix"],
            layer_lists=tuple(tables["layers"].get("lists", ())),
            layer_caps=tuple(tables["layers"].get("caps", ())),
            period=tables["layers"].get("period", 1),
            depths=tuple(DepthRule(**rule) for rule in tables["layers"].get("depths", ())),
            tensors=tuple(
                TensorRule(**{**rule, "shape": tuple(rule["shape"])}) for rule in tables["tensors"]
            ),
            gguf_architecture=tables["gguf"]["architecture"],
            gguf_keys=tuple(GGUFKey(**key) for key in tables["gguf"]["keys"]),
        )
    except (KeyError, TypeError) as e:
        raise FamilyError(f"{tables.get('architecture')}: {e}") from None
    _check_family(family)
    return family


def _merged(tables: Mapping[str, Any], bases: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A family's entries over those of the one that it is like; tables one level deep."""
    own = dict(tables)
    like = own.pop("like", None)
    if like is None:
        return own
    _check(like in bases, f"there is no family {like!r}")
    base = _merged(bases[like], bases)
    for key, value in own.items():
        old = base.get(key)
        base[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return base


def _field(rule: Mapping[str, Any]) -> FieldRule:
    _check(rule.get("null", "none") == "none", f"null is {rule.get('null')!r}")
    unknown = set(rule) - {"key", "default", "null"}
    _check(not unknown, f"unknown entries of a field: {sorted(unknown)}")
    return FieldRule(rule["key"], rule.get("default"), optional="null" in rule)


def _check_family(family: Family) -> None:
    """See that what a family names is there."""
    where = family.architecture
    sizes = {f.name for f in fields(Shape)}
    missing = sizes - set(family.fields)
    _check(not missing, f"{where}: no rule for {sorted(missing)}")
    known = sizes | {"sliding_window", *_FLAGS, *_NUMBERS}
    _check(set(family.fields) <= known, f"{where}: unknown {sorted(set(family.fields) - known)}")
    _check(family.arithmetic in _ARITHMETIC, f"{where}: arithmetic {family.arithmetic!r}")
    _check(family.reorder in _REORDER, f"{where}: reorder {family.reorder!r}")
    _check(family.period >= 1, f"{where}: period {family.period}")
    for rule in family.tensors:
        flags = {rule.bias, rule.unless} - {None}
        _check(flags <= set(family.fields), f"{where}: {rule.role} looks at {sorted(flags)}")
        named = (*rule.shape, *filter(None, (rule.rope_heads,)))
        unknown = [size for size in named if size not in sizes | {"q_width", "kv_width"}]
        _check(not unknown, f"{where}: {rule.role} has sizes {unknown}")
        inside = rule.hf.startswith(family.layer_prefix + "{i}.")
        _check(rule.per_layer == inside, f"{where}: {rule.hf} and {family.layer_prefix}")
        _check(rule.per_layer == ("{i}" in rule.gguf), f"{where}: {rule.hf}, {rule.gguf}")
    for key in family.gguf_keys:
        known = set(family.fields) | {"rope_theta", "rope_scaling"}
        _check(key.value in known and key.type in _TYPES, f"{where}: {key}")


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise FamilyError(message)


@functools.cache
def load_families() -> dict[str, Family]:
    """All families by their file's name, from the TOMLs beside this module."""
    found = {
        entry.name.removesuffix(".toml"): tomllib.loads(entry.read_text(encoding="utf-8"))
        for entry in files("dus_edge.families").iterdir()
        if entry.name.endswith(".toml")
    }
    return {name: parse_family(tables, found) for name, tables in sorted(found.items())}


def find_family(raw: Mapping[str, Any]) -> Family | None:
    """The family that a config.json names; None if it is none of ours."""
    name = named_architecture(raw)
    for family in load_families().values():
        if name in (family.architecture, *family.spellings):
            return family
    return None


def named_architecture(raw: Mapping[str, Any]) -> str:
    """The architecture that a config.json names: the first of its list, else by model type."""
    names = raw.get("architectures")
    if isinstance(names, list) and names:
        return str(names[0])
    kind = str(raw.get("model_type"))
    families = load_families().values()
    return next((f.architecture for f in families if f.model_type == kind), kind)


def find_gguf_family(architecture: object) -> Family | None:
    """A family of that ``general.architecture``; None if it is none of ours.

    Families that llama.cpp runs by one graph share an architecture; the first is given, and is
    like the others in all that a GGUF file tells.
    """
    for family in load_families().values():
        if family.gguf_architecture == architecture:
            return family
    return None


def gguf_architectures() -> tuple[str, ...]:
    """Every ``general.architecture`` of a family, each once."""
    return tuple(dict.fromkeys(f.gguf_architecture for f in load_families().values()))
