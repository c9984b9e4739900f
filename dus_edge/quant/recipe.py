"""Which type every tensor of a preset gets: llama.cpp's rules as one pure function.

Transcribed from the rules of `src/llama-quant.cpp` (`llama_tensor_get_type_impl`,
`tensor_type_fallback`, `tensor_allows_quantization`) of the llama.cpp at `LLAMA_CPP_COMMIT`, for
dense models. Tests compare every preset with `llama_model_quantize` itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dus_edge.errors import UsageError
from dus_edge.quant import types as t
from dus_edge.quant.types import QuantType

#: The llama.cpp whose rules these are, and the llama-cpp-python release that carries it.
LLAMA_CPP_COMMIT = "0c1e57098"
LLAMA_CPP_PYTHON = "0.3.36"


@dataclass(frozen=True, slots=True)
class Preset:
    """A mix of types under llama.cpp's ftype name.

    Attributes:
        name: lower-case name, e.g. ``q4_k_m``.
        file_type: its number in ``enum llama_ftype`` (`general.file_type`).
        default: the type of every tensor that no rule speaks of.
        chosen: of a mix that was made for one model, the type of each matrix by GGUF name; no
            rule is asked of these.
        said: what a file says of such a choice, by key (`dus.mix.` stands before it): texts,
            whole numbers and floats.
    """

    name: str
    file_type: int
    default: QuantType
    chosen: Mapping[str, QuantType] = field(default_factory=dict, hash=False, repr=False)
    said: Mapping[str, str | int | float] = field(default_factory=dict, hash=False, repr=False)

    @property
    def label(self) -> str:
        """The name as file names spell it, e.g. ``Q4_K_M``."""
        return self.name.upper()


PRESETS: Mapping[str, Preset] = {
    p.name: p
    for p in (
        Preset("f32", 0, t.F32),
        Preset("f16", 1, t.F16),
        Preset("bf16", 32, t.BF16),
        Preset("q8_0", 7, t.Q8_0),
        Preset("q6_k", 18, t.Q6_K),
        Preset("q5_k_m", 17, t.Q5_K),
        Preset("q5_k_s", 16, t.Q5_K),
        Preset("q5_1", 9, t.Q5_1),
        Preset("q5_0", 8, t.Q5_0),
        Preset("q4_k_m", 15, t.Q4_K),
        Preset("q4_k_s", 14, t.Q4_K),
        Preset("q4_1", 3, t.Q4_1),
        Preset("q4_0", 2, t.Q4_0),
        Preset("iq4_nl", 25, t.IQ4_NL),
        Preset("iq4_xs", 30, t.IQ4_XS),
        Preset("q3_k_m", 12, t.Q3_K),
        Preset("iq3_m", 27, t.IQ3_S),
        Preset("iq3_s", 26, t.IQ3_S),
        Preset("q2_k", 10, t.Q2_K),
        Preset("iq2_m", 29, t.IQ2_S),
        Preset("iq2_s", 28, t.IQ2_XS),
    )
}
#: Mixes that have rules of their own.
_TWO_BITS = ("iq2_m", "iq2_s")
#: Other spellings that people type.
_ALIASES = {"q4_k": "q4_k_m", "q5_k": "q5_k_m", "q3_k": "q3_k_m", "fp16": "f16", "fp32": "f32"}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the rules look at besides the tensor itself.

    Attributes:
        llama_cpp_type: what llama.cpp takes a model of that depth for (`Family.llama_cpp_type`).
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    tied_head: bool
    has_imatrix: bool = False
    llama_cpp_type: str | None = None

    @property
    def n_gqa(self) -> int:
        """Query heads per KV head."""
        return self.n_heads // self.n_kv_heads


def find_preset(name: str) -> Preset:
    """The preset of that name, in any case.

    Raises:
        UsageError: no such preset; the nearest one is suggested.
    """
    key = name.strip().lower().replace("-", "_")
    key = _ALIASES.get(key, key)
    if key in PRESETS:
        return PRESETS[key]
    near = difflib.get_close_matches(key, PRESETS, n=1, cutoff=0.0)
    raise UsageError(
        f"There is no preset {name!r}; did you mean {near[0]}? Presets: {', '.join(PRESETS)}."
    )


def tensor_type(preset: Preset, name: str, shape: Sequence[int], model: ModelShape) -> QuantType:
    """The type of one tensor.

    Args:
        preset: the mix.
        name: the tensor's GGUF name, e.g. ``blk.3.ffn_down.weight``. The layer in it counts: the
            mixes depend on the depth at which a layer stands in the *result*.
        shape: outermost first; the last dimension is the row that blocks divide.
        model: the resulting model's shape.
    """
    if not is_matrix(name, shape):
        return t.F32
    if name in preset.chosen:
        return preset.chosen[name]
    if preset.default.block_weights == 1:
        return preset.default
    n_cols = shape[-1]
    return fitting_type(_mixed(preset, name, n_cols, model), n_cols)


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of that GGUF name is one that presets quantize; all others stay F32."""
    return len(shape) > 1 and name.endswith("weight") and not name.endswith("_norm.weight")


def _mixed(preset: Preset, name: str, n_cols: int, model: ModelShape) -> QuantType:
    """The mix's choice, before a row's width has its say."""
    default = preset.default
    if name == "output.weight" or (name == "token_embd.weight" and model.tied_head):
        if n_cols % default.block_weights:
            return t.Q8_0
        if preset.name in _TWO_BITS:
            return t.Q5_K
        return default if default is t.Q8_0 else t.Q6_K
    if name == "token_embd.weight":
        return t.IQ3_S if preset.name in _TWO_BITS else default
    layer, part = _layer_and_part(name)
    rule = {
        "attn_v": _attn_v,
        "attn_qkv": _attn_v,  # `category_is_attn_v`
        "ffn_down": _ffn_down,
        "attn_output": _attn_output,
    }.get(part)
    return rule(preset, layer, model) if rule else default


def _layer_and_part(name: str) -> tuple[int, str]:
    """``blk.3.ffn_down.weight`` → (3, ``ffn_down``)."""
    _, layer, part, *_ = name.split(".")
    return int(layer), part


def _uses_more_bits(layer: int, n_layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def _attn_v(preset: Preset, layer: int, model: ModelShape) -> QuantType:
    chosen = preset.default
    if preset.name in _TWO_BITS:
        # No word of 70B there.
        return t.Q4_K if model.n_gqa >= 4 else t.IQ3_S
    match preset.name:
        case "q2_k":
            chosen = t.Q4_K if model.n_gqa >= 4 else t.Q3_K
        case "q3_k_m":
            chosen = t.Q5_K if layer < 2 else t.Q4_K
        case "iq3_m":
            chosen = t.Q4_K
        case "iq3_s" if model.n_gqa >= 4:
            chosen = t.Q4_K
        case "q4_k_m" | "q5_k_m" if _uses_more_bits(layer, model.n_layers):
            chosen = t.Q6_K
        case "q4_k_s" if layer < 4:
            chosen = t.Q5_K
        case "iq4_nl" | "iq4_xs" if model.n_gqa >= 4:
            chosen = t.Q5_K
    if model.llama_cpp_type == "70B" and chosen in (t.Q3_K, t.Q4_K):
        # Eight heads share attn_v there, so a better type costs next to nothing.
        chosen = t.Q5_K
    return chosen


def _ffn_down(preset: Preset, layer: int, model: ModelShape) -> QuantType:
    n = model.n_layers
    match preset.name:
        case "q2_k":
            return t.Q3_K
        case "q3_k_m":
            return t.Q5_K if layer < n // 16 else t.Q4_K
        case "iq3_m" if layer < n // 8:
            return t.Q4_K
        case "iq2_m" | "iq2_s" if layer < n // 8:
            return t.IQ3_S
        case "q4_k_m" | "q5_k_m" if _uses_more_bits(layer, n):
            return t.Q6_K
        case "q4_k_s" if layer < n // 8:
            return t.Q5_K
        case "iq4_nl" | "iq4_xs" if not model.has_imatrix and layer < n // 8:
            return t.Q5_K
        case "q4_0" if model.has_imatrix and layer < n // 8:
            return t.Q4_1
        case "q5_0" if model.has_imatrix and layer < n // 8:
            return t.Q5_1
    return preset.default


def _attn_output(preset: Preset, layer: int, model: ModelShape) -> QuantType:
    wider = {"q2_k": t.Q3_K, "q3_k_m": t.Q4_K, "iq3_m": t.Q4_K}
    wider |= dict.fromkeys(_TWO_BITS, t.IQ3_S)
    return wider.get(preset.name, preset.default)


#: What stands in for a 256-weight block type when a row is no whole number of such blocks.
_NARROWER = {
    t.Q2_K: t.Q4_0, t.Q3_K: t.Q4_0, t.Q4_K: t.Q5_0, t.Q5_K: t.Q5_1, t.Q6_K: t.Q8_0,
    **dict.fromkeys((t.IQ2_XS, t.IQ2_S, t.IQ3_S, t.IQ4_XS), t.IQ4_NL),
}  # fmt: skip


def fitting_type(chosen: QuantType, n_cols: int) -> QuantType:
    """A type whose blocks divide the row: a 32-weight one, or F16 where not even 32 does."""
    if n_cols % chosen.block_weights == 0:
        return chosen
    narrower = _NARROWER.get(chosen, chosen)
    return narrower if n_cols % narrower.block_weights == 0 else t.F16
