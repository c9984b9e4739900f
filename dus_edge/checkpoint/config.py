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

from dus_edge.errors import CheckpointError, UnsupportedError
from dus_edge.families.family import (
    Family,
    FieldRule,
    find_family,
    load_families,
    named_architecture,
)
from dus_edge.families.shape import Shape
from dus_edge.jsonfile import read_object

#: Numbers that a kind of rotary embedding needs.
_ROPE_NEEDS = {
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
#: Sizes beyond these are a mistake or a trap: work and memory follow them before a weight is seen.
_MOST = {
    "n_layers": 4096,
    "vocab_size": 1 << 19,  # the largest in use are of 262,144
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "n_heads": 1 << 14,
    "head_dim": 1 << 16,
}
#: Numbers that a rotary embedding may have beside those that it needs.
_ROPE_NUMBERS = (
    *("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    *("attention_factor", "extrapolation_factor", "beta_fast", "beta_slow", "mscale"),
    "mscale_all_dim",
)
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base frequency and, if any, its scaling.

    Attributes:
        theta: base of the frequencies, ``inv_freq[i] = theta ** (-2 i / head_dim)``.
        kind: one of the family's `rope_kinds`.
        params: the scaling's own numbers under transformers' names (``factor``, …).
    """

    theta: float
    kind: str = "default"
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Shape):
    """What the program needs to know of a model beside its shape, and the JSON it came from."""

    family: Family = field(repr=False)
    rms_norm_eps: float
    rope: Rope
    sliding_window: int | None
    tied_head: bool
    attention_bias: bool
    mlp_bias: bool
    dtype: str | None
    raw: Mapping[str, Any] = field(repr=False, compare=False, default_factory=dict)

    @property
    def architecture(self) -> str:
        """transformers' name of the family."""
        return self.family.architecture


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
    family = _family(raw, where)
    if method := quantized_by(raw):
        raise UnsupportedError(
            f"{where}: the weights are already quantized ({method}); "
            "start from the bf16, f16 or f32 checkpoint instead."
        )
    activation = raw.get("hidden_act", "silu")
    if activation not in family.activations:
        raise UnsupportedError(
            f"{where}: hidden_act is {activation!r}; {family.model_type} models use "
            f"{family.activations[0]!r}."
        )
    read = _Fields(raw, where, family.fields)
    sizes = read.sizes()
    for key in family.layer_lists:
        if isinstance(raw.get(key), list) and len(raw[key]) != sizes["n_layers"]:
            raise CheckpointError(
                f"{where}: {key} has {len(raw[key])} entries for {sizes['n_layers']} layers."
            )
    return ModelConfig(
        **sizes,
        family=family,
        rms_norm_eps=read.number("rms_norm_eps"),
        rope=_rope(raw, where, family),
        sliding_window=read.count("sliding_window") if "sliding_window" in family.fields else None,
        tied_head=read.flag("tied_head"),
        attention_bias=read.flag("attention_bias"),
        mlp_bias=read.flag("mlp_bias"),
        dtype=_DTYPES.get(str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch.")),
        raw=dict(raw),
    )


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
    raw = {rules.fields[name].key: size for name, size in shape.sizes().items()}
    raw[rules.fields["tied_head"].key] = tied_head
    return parse_config({"architectures": [rules.architecture], **raw})


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this configuration holds: `Family.shapes`."""
    return config.family.shapes(config)


def with_layers(config: ModelConfig, sources: Sequence[int]) -> ModelConfig:
    """The configuration of a model whose layer i is a copy of this one's layer ``sources[i]``."""
    family, raw = config.family, dict(config.raw)
    raw[family.fields["n_layers"].key] = len(sources)
    for key in family.layer_lists:
        if isinstance(raw.get(key), list):
            raw[key] = [raw[key][i] for i in sources]
    for key in family.layer_caps:
        if isinstance(raw.get(key), int):
            raw[key] = min(raw[key], len(sources))
    return parse_config(raw)


def _family(raw: Mapping[str, Any], where: str) -> Family:
    family = find_family(raw)
    if family is None:
        known = ", ".join(f.architecture for f in load_families().values())
        raise UnsupportedError(
            f"{where}: the architecture is {named_architecture(raw)}, which is not supported; "
            f"known are {known}."
        )
    kind = raw.get("model_type")
    if kind is not None and kind != family.model_type:
        raise UnsupportedError(
            f"{where}: model_type is {kind!r}, but a {family.architecture} is of "
            f"{family.model_type!r}; correct one of the two."
        )
    return family


def _rope(raw: Mapping[str, Any], where: str, family: Family) -> Rope:
    """Rope of either spelling; transformers 5 keeps theta inside `rope_parameters`."""
    params = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(params, dict):
        raise CheckpointError(f"{where}: the rope parameters are {params!r}, not a JSON object.")
    params = dict(params)
    kind = str(params.pop("rope_type", None) or params.pop("type", None) or "default").lower()
    params.pop("type", None)
    theta = params.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    if kind not in family.rope_kinds:
        raise UnsupportedError(
            f"{where}: rope type {kind!r} is not supported; "
            f"known are {', '.join(family.rope_kinds)}."
        )
    for key in _ROPE_NEEDS.get(kind, ()):
        value = params.get(key)
        if not _is_number(value) or not 0 < value < 1e30:
            raise CheckpointError(
                f"{where}: rope type {kind!r} needs a positive number {key!r}, not {value!r}."
            )
    for key, value in params.items():
        if (
            key in _ROPE_NUMBERS
            and value is not None
            and not (_is_number(value) and abs(value) < 1e30)
        ):
            raise CheckpointError(f"{where}: {key} of rope is {value!r}; a number is needed.")
    if params.get("partial_rotary_factor", 1) not in (None, 1):
        raise UnsupportedError(f"{where}: partial rotary embeddings are not supported.")
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < 1e30:
        raise CheckpointError(f"{where}: rope_theta is {theta!r}; a positive number is needed.")
    return Rope(float(theta), kind, params)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
        if rule.optional and self.raw.get(rule.key, 0) is None:
            return None
        return self._count(name, {})

    def number(self, name: str) -> float:
        rule = self.rules[name]
        value = self.raw.get(rule.key, rule.default)
        if not _is_number(value) or not 0 < value < 1e30:
            raise CheckpointError(
                f"{self.where}: {rule.key} is {value!r}; a positive number is needed."
            )
        return float(value)

    def flag(self, name: str) -> bool:
        rule = self.rules[name]
        value = self.raw.get(rule.key)
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
