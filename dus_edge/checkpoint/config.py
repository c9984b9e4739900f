"""Typed model configurations, read from `config.json` as the hub really holds them.

Both spellings are understood: transformers 4 (`torch_dtype`, `rope_theta`, `rope_scaling`) and
transformers 5 (`dtype`, `rope_parameters`). Which keys there are, and their defaults, is the
family's to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dus_edge.checkpoint.rope import Rope, is_number, read_rope
from dus_edge.errors import CheckpointError, UnsupportedError
from dus_edge.families.family import Family, find_family, load_families, named_architecture
from dus_edge.families.refused import refusal
from dus_edge.families.renamed import RenamedForm, find_renamed, renamed_forms
from dus_edge.families.rules import FieldRule, each
from dus_edge.families.shape import Shape
from dus_edge.jsonfile import read_object

#: Sizes beyond these are a mistake or a trap: work and memory follow them before a weight is seen.
_MOST = {
    "n_layers": 4096,
    "vocab_size": 1 << 19,  # the largest in use are of 262,144
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "n_heads": 1 << 14,
    "head_dim": 1 << 16,
}
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Shape):
    """What the program needs to know of a model beside its shape, and the JSON it came from.

    Attributes:
        family: which arithmetic, and what tensors and keys are called.
        rms_norm_eps: of the norms.
        rope: rotary embedding.
        sliding_window: tokens that a token attends to in layers that have a window; None without.
        tied_head: whether the embedding is the head too.
        attention_bias: whether attention's matrices have biases.
        mlp_bias: whether the feed-forward network's do.
        dtype: of the weights as safetensors names it; None if it is not said.
        attention_scale: what scores of attention are multiplied by.
        embedding_scale: what embeddings are multiplied by.
        residual_scale: what the outputs of attention and of the feed-forward network are
            multiplied by before they are added.
        logit_divisor: what logits are divided by.
        attention_softcap: scores s become c · tanh(s / c); None for no cap.
        logit_softcap: the same of logits.
        full_layers: of each layer, whether it has no window though others do.
        no_rope_layers: of each layer, whether it knows no positions.
        renamed: the form whose names the stored tensors have, where they are not the family's.
        raw: config.json; of a renamed form, as the family has it.
    """

    family: Family = field(repr=False)
    rms_norm_eps: float
    rope: Rope
    sliding_window: int | None
    tied_head: bool
    attention_bias: bool
    mlp_bias: bool
    dtype: str | None
    attention_scale: float
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    full_layers: tuple[bool, ...] = field(repr=False, default=())
    no_rope_layers: tuple[bool, ...] = field(repr=False, default=())
    renamed: RenamedForm | None = field(repr=False, compare=False, default=None)
    raw: Mapping[str, Any] = field(repr=False, compare=False, default_factory=dict)

    @property
    def architecture(self) -> str:
        """transformers' name of the family."""
        return self.family.architecture

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated."""
        return self.rope.channels(self.head_dim)

    @property
    def sliding_layers(self) -> list[bool] | None:
        """Of each layer, whether it has the window; None of a model without one."""
        if self.sliding_window is None:
            return None
        return [not full for full in self.full_layers]

    @property
    def unheeded_window(self) -> int | None:
        """The window that llama.cpp's graph of this family does not have; None if all is well."""
        if self.family.gguf_window or all(self.full_layers):
            return None
        return self.sliding_window

    def window(self, layer: int) -> int | None:
        """Tokens that a token attends to in a layer; None for all before it."""
        return None if self.full_layers[layer] else self.sliding_window


def load_config(path: Path) -> ModelConfig:
    """Read and check a `config.json`.

    Raises:
        CheckpointError: the file is missing, not JSON, or a field is absent or absurd.
        UnsupportedError: another architecture, activation, rope or a quantized checkpoint.
    """
    remedy = "a checkpoint folder holds config.json beside its safetensors"
    raw = read_object(path, missing=remedy)
    return parse_config(raw, str(path))


def parse_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Turn the JSON of a `config.json` into a `ModelConfig`; see `load_config` for errors."""
    renamed = find_renamed(raw)
    if renamed is not None:
        raw = _of_family(renamed, raw, where)
    family = _family(raw, where)
    if method := quantized_by(raw):
        made = "; mlx_lm.convert --dequantize makes one" if method == "MLX" else ""
        raise UnsupportedError(
            f"{where}: the weights are already quantized ({method}); "
            f"start from the bf16, f16 or f32 checkpoint instead{made}."
        )
    activation = raw.get(family.activation_key, family.activations[0])
    if activation not in family.activations:
        raise UnsupportedError(
            f"{where}: {family.activation_key} is {activation!r}; {family.model_type} models use "
            f"{family.activations[0]!r}."
        )
    read = _Fields(raw, where, family.fields)
    sizes = read.sizes()
    n_layers = sizes["n_layers"]
    for key in family.layer_lists:
        if isinstance(raw.get(key), list) and len(raw[key]) != n_layers:
            raise CheckpointError(
                f"{where}: {key} has {len(raw[key])} entries for {n_layers} layers."
            )
    rope = read_rope(raw, where, family)
    rope.check(sizes["head_dim"], where)
    return ModelConfig(
        **sizes,
        family=family,
        rms_norm_eps=read.number("rms_norm_eps"),
        rope=rope,
        sliding_window=read.count("sliding_window") if "sliding_window" in family.fields else None,
        tied_head=read.flag("tied_head"),
        attention_bias=read.flag("attention_bias"),
        mlp_bias=read.flag("mlp_bias"),
        attention_scale=read.number_or("attention_scale", sizes["head_dim"] ** -0.5, sizes),
        embedding_scale=read.number_or("embedding_scale", 1.0, sizes),
        residual_scale=read.number_or("residual_scale", 1.0, sizes),
        logit_divisor=read.number_or("logit_divisor", 1.0, sizes),
        attention_softcap=read.cap("attention_softcap"),
        logit_softcap=read.cap("logit_softcap"),
        full_layers=_members(raw, where, family, "full", n_layers),
        no_rope_layers=_members(raw, where, family, "no_rope", n_layers),
        dtype=_DTYPES.get(str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch.")),
        renamed=renamed,
        raw=dict(raw),
    )


def refuse_renamed(config: ModelConfig, folder: Path) -> None:
    """See that transformers can load a folder as it is.

    Raises:
        UnsupportedError: its architecture is one that transformers has no code of its own for.
    """
    if config.renamed is not None:
        raise UnsupportedError(
            f"{folder}: transformers has no code for {config.renamed.architecture}; make a "
            f"{config.architecture} of it first: dus-edge upscale --no-upscale {folder} -o FOLDER"
        )


def _of_family(form: RenamedForm, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        return form.config(raw)
    except ValueError as e:
        raise UnsupportedError(f"{where}: {e}") from None


def quantized_by(raw: Mapping[str, Any]) -> str | None:
    """What a `config.json` says its weights are quantized by, such as ``gptq``; None: by nothing.

    mlx-lm names itself nowhere, but its settings stand under a key of their own.
    """
    if isinstance(raw.get("quantization"), dict):
        return "MLX"
    details = raw.get("quantization_config")
    if not details:
        return None
    return str(details.get("quant_method") if isinstance(details, dict) else details)


def config_of_shape(shape: Shape, *, family: str = "llama", tied_head: bool = False) -> ModelConfig:
    """The configuration of a model of which nothing but its shape is known.

    Args:
        shape: the sizes.
        family: name of a family's TOML; what it does not hold is the family's default.
        tied_head: whether the embedding is the head.
    """
    rules = load_families()[family]
    raw: dict[str, Any] = {_key(rules, name): size for name, size in shape.sizes().items()}
    raw[_key(rules, "tied_head")] = tied_head
    return parse_config({"architectures": [rules.architecture], **raw})


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this configuration holds: `Family.shapes`."""
    return config.family.shapes(config)


def with_layers(config: ModelConfig, sources: Sequence[int]) -> ModelConfig:
    """The configuration of a model whose layer i is a copy of this one's layer ``sources[i]``."""
    family, raw = config.family, dict(config.raw)
    raw[_key(family, "n_layers")] = len(sources)
    for kind, pattern in family.patterns.items():
        if kind == "full" and config.sliding_window is None:
            continue
        of_base = _members(raw, "", family, kind, config.n_layers)
        wanted = tuple(of_base[i] for i in sources)
        if not isinstance(raw.get(pattern.list), list) and wanted != pattern.derived(
            raw, len(sources)
        ):
            # The rule that held without a list would make other layers of some.
            raw[pattern.list] = pattern.as_list(of_base)
    for key in family.layer_lists:
        if isinstance(raw.get(key), list):
            raw[key] = [raw[key][i] for i in sources]
    for key in family.layer_caps:
        if isinstance(raw.get(key), int):
            raw[key] = min(raw[key], len(sources))
    return parse_config(raw)


def _key(family: Family, name: str) -> str:
    """config.json's key of a field that every family has one of."""
    return str(family.fields[name].key)


def _members(
    raw: Mapping[str, Any], where: str, family: Family, kind: str, n_layers: int
) -> tuple[bool, ...]:
    """Of each layer, whether it is of a kind that the family has a pattern of."""
    pattern = family.patterns.get(kind)
    if pattern is None:
        return each(None, n_layers)
    for key in (pattern.every_key, pattern.until):
        value = raw.get(key) if key else None
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise CheckpointError(f"{where}: {key} is {value!r}; a whole number is needed.")
    return pattern.of(raw, n_layers)


def _family(raw: Mapping[str, Any], where: str) -> Family:
    family = find_family(raw)
    if family is None:
        named = named_architecture(raw)
        if (kind := refusal(named)) is not None:
            raise UnsupportedError(f"{where}: {named} is {kind}.")
        names = {f.architecture for f in (*load_families().values(), *renamed_forms())}
        known = ", ".join(sorted(names))
        raise UnsupportedError(
            f"{where}: the architecture is {named}, which is not supported; known are {known}."
        )
    kind = raw.get("model_type")
    if kind is not None and kind != family.model_type:
        raise UnsupportedError(
            f"{where}: model_type is {kind!r}, but a {family.architecture} is of "
            f"{family.model_type!r}; correct one of the two."
        )
    return family


@dataclass(frozen=True)
class _Fields:
    """Reads checked fields of a JSON object; `where` names the file in messages."""

    raw: Mapping[str, Any]
    where: str
    rules: Mapping[str, FieldRule]

    def sizes(self) -> dict[str, int]:
        """The fields of `Shape`."""
        found: dict[str, int] = {}
        for f in fields(Shape):
            if f.name != "head_dim":
                found[f.name] = self._count(f.name, found)
        n_heads, n_kv_heads = found["n_heads"], found["n_kv_heads"]
        if n_heads % n_kv_heads:
            raise CheckpointError(
                f"{self.where}: {self.rules['n_heads'].key} ({n_heads}) is not a multiple of "
                f"{self.rules['n_kv_heads'].key} ({n_kv_heads})."
            )
        head_dim = self._count("head_dim", found)
        if head_dim % 2:
            raise CheckpointError(
                f"{self.where}: head_dim is {head_dim}; rotary embeddings need it even."
            )
        return {**found, "head_dim": head_dim}

    def count(self, name: str) -> int | None:
        """A number of its own; None where null says that there is none."""
        rule = self.rules[name]
        if rule.only_if and self.raw.get(rule.only_if) is not True:
            return None
        if rule.optional and self.raw.get(rule.key, rule.default) is None:
            return None
        return self._count(name, {})

    def number(self, name: str, sizes: Mapping[str, int] | None = None) -> float:
        """A positive number, by the family's power of it."""
        rule = self.rules[name]
        default = self._default(rule, sizes or {})
        value = self.raw.get(rule.key, default) if rule.key else default
        if not is_number(value) or not 0 < value < 1e30:
            raise CheckpointError(
                f"{self.where}: {rule.key} is {value!r}; a positive number is needed."
            )
        return float(value) ** rule.power

    def number_or(self, name: str, default: float, sizes: Mapping[str, int]) -> float:
        """A number that not every family has."""
        return self.number(name, sizes) if name in self.rules else default

    def cap(self, name: str) -> float | None:
        """A number that not every family has, and where null says that there is none."""
        rule = self.rules.get(name)
        absent = rule is None or (rule.optional and self.raw.get(rule.key, rule.default) is None)
        return None if absent else self.number(name)

    def flag(self, name: str) -> bool:
        rule = self.rules[name]
        value = self.raw.get(rule.key) if rule.key else None
        if value is None:
            return bool(rule.default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {rule.key} is {value!r}, not true or false.")
        return value

    def _count(self, name: str, found: Mapping[str, int]) -> int:
        rule = self.rules[name]
        value = self.raw.get(rule.key)
        value = self._default(rule, found) if value is None else value
        if value is None:
            raise CheckpointError(f"{self.where}: the field {rule.key} is missing.")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
            raise CheckpointError(
                f"{self.where}: {rule.key} is {value!r}; a positive whole number is needed."
            )
        most = _MOST.get(name)
        if most is not None and value > most:
            raise CheckpointError(
                f"{self.where}: {rule.key} is {value:,}; more than {most:,} are not believed."
            )
        return value

    def _default(self, rule: FieldRule, found: Mapping[str, int]) -> Any:
        """A default: a value, another field, or the quotient of two, which must be whole."""
        if not isinstance(rule.default, str):
            return rule.default
        above, slash, below = rule.default.partition(" / ")
        if not slash:
            return found[above]
        if found[above] % found[below]:
            keys = [self.rules[name].key for name in (above, below)]
            raise CheckpointError(
                f"{self.where}: {keys[0]} ({found[above]}) is not a multiple of {keys[1]} "
                f"({found[below]}) and {rule.key} is not given."
            )
        return found[above] // found[below]
