"""Typed model configurations, read from `config.json` as the hub really holds them.

Both spellings are understood: transformers 4 (`torch_dtype`, `rope_theta`, `rope_scaling`) and
transformers 5 (`dtype`, `rope_parameters`). Field names and defaults follow
`transformers/models/{llama,mistral}/configuration_*.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dus_edge.errors import CheckpointError, UnsupportedError

#: `architectures[0]` of the checkpoints this program understands.
KNOWN_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
_MODEL_TYPES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}

#: Config entries that are lists with one item per layer.
PER_LAYER_LISTS = ("layer_types",)

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
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
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base frequency and, if any, its scaling.

    Attributes:
        theta: base of the frequencies, ``inv_freq[i] = theta ** (-2 i / head_dim)``.
        kind: one of `ROPE_TYPES`.
        params: the scaling's own numbers under transformers' names (``factor``, …).
    """

    theta: float
    kind: str = "default"
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelConfig:
    """What the program needs to know of a Llama-form model, and the raw JSON it came from."""

    architecture: str
    n_layers: int
    hidden_size: int
    intermediate_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    rope: Rope
    sliding_window: int | None
    tied_head: bool
    attention_bias: bool
    mlp_bias: bool
    dtype: str | None
    raw: Mapping[str, Any] = field(repr=False, compare=False, default_factory=dict)

    @property
    def q_width(self) -> int:
        """Rows of the query projection: heads × head size."""
        return self.n_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Rows of the key and of the value projection: KV heads × head size."""
        return self.n_kv_heads * self.head_dim


def load_config(path: Path) -> ModelConfig:
    """Read and check a `config.json`.

    Raises:
        CheckpointError: the file is missing, not JSON, or a field is absent or absurd.
        UnsupportedError: another architecture, activation, rope or a quantized checkpoint.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing; a checkpoint folder holds config.json beside its safetensors."
        ) from None
    except (OSError, ValueError, RecursionError) as e:  # ValueError: no UTF-8, or no JSON
        raise CheckpointError(f"{path} cannot be read as JSON ({e}); fetch it again.") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is not a JSON object; fetch it again.")
    return parse_config(raw, str(path))


def parse_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Turn the JSON of a `config.json` into a `ModelConfig`; see `load_config` for errors."""
    architecture = _architecture(raw, where)
    if raw.get("quantization_config"):
        details = raw["quantization_config"]
        method = details.get("quant_method") if isinstance(details, dict) else details
        raise UnsupportedError(
            f"{where}: the weights are already quantized ({method}); "
            "start from the bf16, f16 or f32 checkpoint instead."
        )
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedError(
            f"{where}: hidden_act is {activation!r}; Llama-form models use 'silu'."
        )
    read = _Fields(raw, where)
    hidden = read.positive("hidden_size")
    n_heads = read.positive("num_attention_heads")
    n_kv_heads = read.positive("num_key_value_heads", _default_kv_heads(architecture, n_heads))
    if n_heads % n_kv_heads:
        raise CheckpointError(
            f"{where}: num_attention_heads ({n_heads}) is not a multiple of "
            f"num_key_value_heads ({n_kv_heads})."
        )
    if raw.get("head_dim") is None and hidden % n_heads:
        raise CheckpointError(
            f"{where}: hidden_size ({hidden}) is not a multiple of num_attention_heads "
            f"({n_heads}) and head_dim is not given."
        )
    head_dim = read.positive("head_dim", hidden // n_heads)
    if head_dim % 2:
        raise CheckpointError(f"{where}: head_dim is {head_dim}; rotary embeddings need it even.")
    window = None
    if architecture == "MistralForCausalLM" and raw.get("sliding_window", 0) is not None:
        # null means none; left out, it is transformers' default
        window = read.positive("sliding_window", 4096)
    n_layers = read.positive("num_hidden_layers")
    for key in PER_LAYER_LISTS:
        if isinstance(raw.get(key), list) and len(raw[key]) != n_layers:
            raise CheckpointError(
                f"{where}: {key} has {len(raw[key])} entries for {n_layers} layers."
            )
    return ModelConfig(
        architecture=architecture,
        n_layers=n_layers,
        hidden_size=hidden,
        intermediate_size=read.positive("intermediate_size"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab_size=read.positive("vocab_size"),
        context_length=read.positive("max_position_embeddings", 2048),
        rms_norm_eps=read.number("rms_norm_eps", 1e-6),
        rope=_rope(raw, where),
        sliding_window=window,
        tied_head=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=bool(raw.get("attention_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
        dtype=_DTYPES.get(str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch.")),
        raw=dict(raw),
    )


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this configuration holds, in model order.

    Names as transformers writes them; shapes are ``(out_features, in_features)``. A tied head
    is not listed: it is the embedding.
    """
    d, ff = config.hidden_size, config.intermediate_size
    q, kv = config.q_width, config.kv_width
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, d)}
    for i in range(config.n_layers):
        layer = f"model.layers.{i}."
        shapes[layer + "input_layernorm.weight"] = (d,)
        for name, shape in (("q", (q, d)), ("k", (kv, d)), ("v", (kv, d)), ("o", (d, q))):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = shape
            if config.attention_bias:
                shapes[f"{layer}self_attn.{name}_proj.bias"] = shape[:1]
        shapes[layer + "post_attention_layernorm.weight"] = (d,)
        for name, shape in (("gate", (ff, d)), ("up", (ff, d)), ("down", (d, ff))):
            shapes[f"{layer}mlp.{name}_proj.weight"] = shape
            if config.mlp_bias:
                shapes[f"{layer}mlp.{name}_proj.bias"] = shape[:1]
    shapes["model.norm.weight"] = (d,)
    if not config.tied_head:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    return shapes


def with_layers(config: ModelConfig, sources: Sequence[int]) -> ModelConfig:
    """The configuration of a model whose layer i is a copy of this one's layer ``sources[i]``."""
    raw = dict(config.raw)
    raw["num_hidden_layers"] = len(sources)
    for key in PER_LAYER_LISTS:
        if isinstance(raw.get(key), list):
            raw[key] = [raw[key][i] for i in sources]
    if isinstance(raw.get("max_window_layers"), int):
        raw["max_window_layers"] = min(raw["max_window_layers"], len(sources))
    return parse_config(raw)


def _architecture(raw: Mapping[str, Any], where: str) -> str:
    names = raw.get("architectures")
    if isinstance(names, list) and names:
        name = str(names[0])
    else:
        name = _MODEL_TYPES.get(str(raw.get("model_type")), str(raw.get("model_type")))
    # The first Llama conversions spelled it LLaMA.
    name = {"LLaMAForCausalLM": "LlamaForCausalLM"}.get(name, name)
    if name not in KNOWN_ARCHITECTURES:
        raise UnsupportedError(
            f"{where}: the architecture is {name}, which is not supported; "
            f"known are {', '.join(KNOWN_ARCHITECTURES)}."
        )
    return name


def _default_kv_heads(architecture: str, n_heads: int) -> int:
    return 8 if architecture == "MistralForCausalLM" else n_heads


def _rope(raw: Mapping[str, Any], where: str) -> Rope:
    """Rope of either spelling; transformers 5 keeps theta inside `rope_parameters`."""
    params = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(params, dict):
        raise CheckpointError(f"{where}: the rope parameters are {params!r}, not a JSON object.")
    params = dict(params)
    kind = str(params.pop("rope_type", None) or params.pop("type", None) or "default").lower()
    params.pop("type", None)
    theta = params.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    if kind not in ROPE_TYPES:
        raise UnsupportedError(
            f"{where}: rope type {kind!r} is not supported; known are {', '.join(ROPE_TYPES)}."
        )
    for key in _ROPE_NEEDS.get(kind, ()):
        value = params.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise CheckpointError(
                f"{where}: rope type {kind!r} needs a positive number {key!r}, not {value!r}."
            )
    if params.get("partial_rotary_factor", 1) not in (None, 1):
        raise UnsupportedError(f"{where}: partial rotary embeddings are not supported.")
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < 1e30:
        raise CheckpointError(f"{where}: rope_theta is {theta!r}; a positive number is needed.")
    return Rope(float(theta), kind, params)


@dataclass(frozen=True)
class _Fields:
    """Reads checked fields of a JSON object; `where` names the file in messages."""

    raw: Mapping[str, Any]
    where: str

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{self.where}: the field {key} is missing.")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
            raise CheckpointError(
                f"{self.where}: {key} is {value!r}; a positive whole number is needed."
            )
        return value

    def number(self, key: str, default: float) -> float:
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{self.where}: {key} is {value!r}; a number is needed.")
        return float(value)
