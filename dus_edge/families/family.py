"""A model family: what its configuration, tensors and GGUF metadata are called, read from TOML.

One TOML for each architecture of transformers. Its entries:

- ``architecture``, ``spellings``, ``model_type``: how config.json names the family;
- ``like``: another family whose entries hold where this one has none. Tensors go by role and GGUF
  keys by key: what is named again is changed, what is new comes last, and what ``without`` names
  is left out;
- ``arithmetic``: which of the forward passes that the program knows is this family's;
- ``activations``: what ``hidden_act`` (or ``activation_key``) may be; all of them are one function;
- ``norm_shift``: what is added to a norm's stored weights to get its factors;
- ``[fields]``: config.json's key of each field, and its default: a value, the name of another
  field, or the quotient ``a / b`` of two. With ``null = "none"`` a null means that there is none;
  see `FieldRule`;
- ``[rope]``: kinds of rotary embedding; ``theta`` and ``share`` of a head where config.json has
  none; ``local``, with key and default, of the layers that have a window; ``style``; and how rows
  of q and k are reordered for llama.cpp;
- ``[layers]``: the prefix of a layer's tensors, what in config.json is indexed by layer, the
  ``period`` of a pattern over layers, ``depths`` that llama.cpp takes for a model of its own, and
  ``patterns``: ``full`` are layers without the window, ``no_rope`` those without positions;
- ``[[tensors]]``: see `TensorRule`;
- ``[gguf]``: architecture and keys, see `GGUFKey`; whether llama.cpp's graph has the ``window``;
  and ``scale_into``, the role of the tensor that takes what llama.cpp's own scale of attention is
  short of;
- ``[mlx]``: fields that mlx-lm's code of the family ``ignores``, and whether it has the ``window``,
  in the layers that the pattern without a list gives it to.
"""

from __future__ import annotations

import functools
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from importlib.resources import files
from typing import Any

from dus_edge.families.entries import (
    FamilyError,
    check_entry,
    layer_entries,
    merged_entries,
    parse_field,
    parse_tensor,
    rope_entries,
)
from dus_edge.families.rules import DepthRule, FieldRule, GGUFKey, LayerPattern, TensorRule
from dus_edge.families.shape import Shape
from dus_edge.words import whole_number

#: Fields of the configuration beside those of `Shape`.
_FLAGS = ("tied_head", "attention_bias", "mlp_bias")
_NUMBERS = (
    *("rms_norm_eps", "attention_scale", "embedding_scale", "residual_scale", "logit_divisor"),
    *("attention_softcap", "logit_softcap"),
)
#: What else a tensor's shape, or an entry of GGUF's metadata, may name.
_WIDTHS = ("q_width", "kv_width", "qkv_width", "gate_up_width")
_DERIVED = ("rope_theta", "rope_theta_local", "rope_scaling", "rotary_dim", "sliding_layers")
_ARITHMETIC = ("llama",)
_REORDER = ("none", "interleave")
_STYLES = ("halves", "pairs")
_PATTERNS = ("full", "no_rope")
_TYPES = ("u32", "f32", "bools")
#: Sites in the order in which a layer computes.
SITES = ("attn_input", "attn_output", "ffn_input", "ffn_output")
_INDEXED = re.compile(r"^(.*?\.)(\d{1,18})(\..+)$")


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
    rope_theta: float = 10000.0
    rope_share: float | None = None
    rope_local: FieldRule | None = None
    rope_style: str = "halves"
    reorder: str = "none"
    spellings: tuple[str, ...] = ()
    activations: tuple[str, ...] = ("silu",)
    activation_key: str = "hidden_act"
    norm_shift: float = 0.0
    layer_lists: tuple[str, ...] = ()
    layer_caps: tuple[str, ...] = ()
    patterns: Mapping[str, LayerPattern] = field(default_factory=dict)
    period: int = 1
    depths: tuple[DepthRule, ...] = ()
    gguf_window: bool = False
    scale_role: str | None = None
    mlx_ignores: tuple[str, ...] = ()
    mlx_window: bool = False

    @functools.cached_property
    def _by_hf(self) -> dict[str, TensorRule]:
        return {rule.hf: rule for rule in self.tensors}

    @functools.cached_property
    def _by_role(self) -> dict[str, TensorRule]:
        return {rule.role: rule for rule in self.tensors}

    @functools.cached_property
    def sites(self) -> dict[str, tuple[TensorRule, ...]]:
        """Linear layers by the site that feeds them, in the order in which a layer computes."""
        return {site: tuple(r for r in self.tensors if r.site == site) for site in SITES}

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

    @property
    def branch_roles(self) -> tuple[str, ...]:
        """Roles of the last tensors of a layer's two branches: what they multiply, the branch adds.

        A norm behind a branch takes away what the matrix before it was scaled by.
        """
        there = {rule.role for rule in self.tensors}
        pairs = (("o", "attn_post_norm"), ("down", "ffn_post_norm"))
        return tuple(norm if norm in there else matrix for matrix, norm in pairs)

    def shift(self, name: str) -> float:
        """What is added to a tensor's stored values to get what llama.cpp multiplies by."""
        rule, _, part = self.find(name)
        return self.norm_shift if part == "weight" and rule.role.endswith("norm") else 0.0

    def folded_scale(self, name: str, shape: Shape, attention_scale: float) -> float:
        """What a tensor's values are multiplied by for llama.cpp.

        Where llama.cpp divides attention's scores by a root of its own choice, the family names a
        tensor that makes up for it.

        Args:
            name: transformers' name.
            shape: of the model to be written; the choice depends on its depth.
            attention_scale: what the model multiplies its scores by.
        """
        if self.scale_role is None or self.find(name)[0].role != self.scale_role:
            return 1.0
        scale = attention_scale * math.sqrt(self.query_width(shape))
        return 1.0 if math.isclose(scale, 1.0) else scale

    def query_width(self, shape: Shape) -> int:
        """The number whose root llama.cpp divides attention's scores by, where it chooses one."""
        width = next((r.query_width for r in self.depths if r.holds(shape)), None) or "head_dim"
        above, _, below = width.partition(" / ")
        return int(getattr(shape, above) // (getattr(shape, below) if below else 1))

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
    tables = merged_entries(tables, bases)
    known = {
        *("architecture", "spellings", "model_type", "arithmetic", "activations", "norm_shift"),
        *("activation_key", "fields", "rope", "layers", "tensors", "gguf", "mlx"),
    }
    check_entry(not set(tables) - known, f"unknown entries {sorted(set(tables) - known)}")
    try:
        family = Family(
            architecture=tables["architecture"],
            spellings=tuple(tables.get("spellings", ())),
            model_type=tables["model_type"],
            arithmetic=tables["arithmetic"],
            activations=tuple(tables["activations"]),
            activation_key=tables.get("activation_key", "hidden_act"),
            norm_shift=float(tables.get("norm_shift", 0.0)),
            fields={name: parse_field(rule) for name, rule in tables["fields"].items()},
            **rope_entries(tables["rope"]),
            **layer_entries(tables["layers"]),
            tensors=tuple(map(parse_tensor, tables["tensors"])),
            gguf_architecture=tables["gguf"]["architecture"],
            gguf_keys=tuple(GGUFKey(**key) for key in tables["gguf"]["keys"]),
            gguf_window=tables["gguf"].get("window", False),
            scale_role=tables["gguf"].get("scale_into"),
            mlx_ignores=tuple(tables.get("mlx", {}).get("ignores", ())),
            mlx_window=tables.get("mlx", {}).get("window", False),
        )
    except (KeyError, TypeError) as e:
        raise FamilyError(f"{tables.get('architecture')}: {e}") from None
    _check_family(family)
    return family


def _check_family(family: Family) -> None:
    """See that what a family names is there."""
    where = family.architecture
    sizes = {f.name for f in fields(Shape)}
    missing = sizes - set(family.fields)
    check_entry(not missing, f"{where}: no rule for {sorted(missing)}")
    known = sizes | {"sliding_window", *_FLAGS, *_NUMBERS}
    check_entry(
        set(family.fields) <= known, f"{where}: unknown {sorted(set(family.fields) - known)}"
    )
    check_entry(family.arithmetic in _ARITHMETIC, f"{where}: arithmetic {family.arithmetic!r}")
    check_entry(family.reorder in _REORDER, f"{where}: reorder {family.reorder!r}")
    check_entry(family.rope_style in _STYLES, f"{where}: style {family.rope_style!r}")
    check_entry(set(family.patterns) <= set(_PATTERNS), f"{where}: patterns {set(family.patterns)}")
    for pattern in family.patterns.values():
        check_entry(pattern.list in family.layer_lists, f"{where}: {pattern.list} in no lists")
    roles = {rule.role for rule in family.tensors}
    check_entry(family.scale_role in {None, *roles}, f"{where}: scale into {family.scale_role}")
    ignored = set(family.mlx_ignores) - set(family.fields)
    check_entry(not ignored, f"{where}: mlx-lm ignores {sorted(ignored)}, which is no field")
    check_entry(family.period >= 1, f"{where}: period {family.period}")
    for rule in family.tensors:
        flags = {rule.bias, rule.unless} - {None}
        check_entry(flags <= set(family.fields), f"{where}: {rule.role} looks at {sorted(flags)}")
        named = (*rule.shape, *filter(None, (rule.rope_heads,)))
        unknown = [size for size in named if size not in sizes | set(_WIDTHS)]
        check_entry(not unknown, f"{where}: {rule.role} has sizes {unknown}")
        inside = rule.hf.startswith(family.layer_prefix + "{i}.")
        check_entry(rule.per_layer == inside, f"{where}: {rule.hf} and {family.layer_prefix}")
        check_entry(rule.per_layer == ("{i}" in rule.gguf), f"{where}: {rule.hf}, {rule.gguf}")
    for key in family.gguf_keys:
        known = set(family.fields) | set(_DERIVED)
        check_entry(key.value in known and key.type in _TYPES, f"{where}: {key}")


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
