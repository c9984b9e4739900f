"""A GGUF's rotary embedding as config.json says it, and the divisors that a file keeps of some."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dus_edge.checkpoint.gguf.file import GGUFModel
from dus_edge.errors import UnsupportedError
from dus_edge.families.family import Family

#: GGUF's name of the tensor with Llama 3's divisors, one a frequency.
DIVISORS = "rope_freqs.weight"
#: Those of longrope, and config.json's names of them.
LONGROPE_DIVISORS = {
    "rope_factors_long.weight": "long_factor",
    "rope_factors_short.weight": "short_factor",
}
#: Factor of the rotary embeddings of Llama 3.1 and 3.2; the other numbers are those of both. A GGUF
#: has what they amount to, one divisor a frequency.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT = 8192
_YARN = {
    "yarn_ext_factor": "extrapolation_factor",
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}


def exact(value: float) -> float:
    """The shortest number that is the same float32: 1e-05 of 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def rope_of(gguf: GGUFModel, family: Family, head_dim: int) -> dict[str, Any]:
    """Rotary embedding, in the spelling that every transformers reads.

    Args:
        gguf: the model; of its weights the divisors are read.
        family: its family.
        head_dim: width of its heads.

    Raises:
        UnsupportedError: a kind that is not known.
    """
    values, a = gguf.values, f"{family.gguf_architecture}.rope"
    theta = values.get(f"{a}.freq_base")
    theta = exact(theta) if isinstance(theta, float) else 10000.0
    found: dict[str, Any] = {"rope_theta": theta, **_local(gguf, family)}
    if family.rope_share is not None:
        found |= _share(values.get(f"{a}.dimension_count"), head_dim, family.rope_share)
    kind = values.get(f"{a}.scaling.type", "none")
    if DIVISORS in gguf.tensors:
        return found | {"rope_scaling": _llama3(gguf, theta)}
    if set(LONGROPE_DIVISORS) <= set(gguf.tensors) and "longrope" in family.rope_kinds:
        return found | _longrope(gguf, family)
    if kind == "none":
        return found
    if kind not in ("linear", "yarn"):
        raise UnsupportedError(f"{gguf.label}: {a}.scaling.type is {kind!r}, which is not known.")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": values.get(f"{a}.scaling.factor")}
    original = values.get(f"{a}.scaling.original_context_length")
    if kind == "yarn" and original is not None:
        scaling["original_max_position_embeddings"] = original
    for key, name in _YARN.items():
        if isinstance(value := values.get(f"{a}.scaling.{key}"), float):
            scaling[name] = exact(value)
    return found | {"rope_scaling": scaling}


def _local(gguf: GGUFModel, family: Family) -> dict[str, float]:
    """Base of the frequencies in layers that have a window, where the family has another one."""
    rule = family.rope_local
    key = next((k.key for k in family.gguf_keys if k.value == "rope_theta_local"), None)
    value = gguf.values.get(f"{family.gguf_architecture}.{key}")
    if rule is None or rule.key is None or not isinstance(value, float):
        return {}
    return {rule.key: exact(value)}


def _share(n_channels: Any, head_dim: int, usual: float) -> dict[str, float]:
    """The part of a head that is turned, where it is not the family's usual one."""
    n = n_channels if type(n_channels) is int and 0 < n_channels <= head_dim else head_dim
    share = n / head_dim
    if int(head_dim * share) != n:
        share = math.nextafter(share, 2)
    return {} if share == usual else {"partial_rotary_factor": share}


def _longrope(gguf: GGUFModel, family: Family) -> dict[str, Any]:
    """Longrope: both lists of divisors, and the context that the short one is for."""
    lists = {name: _divisors(gguf, tensor) for tensor, name in LONGROPE_DIVISORS.items()}
    a = f"{family.gguf_architecture}.rope.scaling"
    context = gguf.values.get(family.gguf_key("context_length"))
    original = gguf.values.get(f"{a}.original_context_length", context)
    scaling: dict[str, Any] = {"type": "longrope", **lists}
    said = gguf.values.get(f"{a}.attn_factor", 1.0)
    if type(context) is not int or type(original) is not int or not isinstance(said, float):
        raise UnsupportedError(f"{gguf.label}: {a} of longrope are no numbers.")
    if not math.isclose(said, longrope_scale(context / original, original), rel_tol=1e-6):
        scaling["attention_factor"] = exact(said)
    return {"rope_scaling": scaling, "original_max_position_embeddings": original}


def longrope_scale(factor: float, original: int) -> float:
    """What longrope multiplies cosines and sines by where config.json does not say.

    transformers `modeling_rope_utils._compute_longrope_parameters`.

    Args:
        factor: of the context, over the one that the model was first made for.
        original: that context.
    """
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _divisors(gguf: GGUFModel, name: str) -> list[float]:
    tensor = gguf.tensors[name]
    if tensor.kind.name != "F32":
        raise UnsupportedError(f"{gguf.label}: {name} is of the type {tensor.kind.name}, not F32.")
    data = gguf.read(tensor.file, tensor.offset, tensor.nbytes)
    return [exact(value) for value in np.frombuffer(data, np.float32).tolist()]


def _llama3(gguf: GGUFModel, theta: float) -> dict[str, Any]:
    """Llama 3's scaling, from the divisors that it amounts to."""
    tensor = gguf.tensors[DIVISORS]
    data = gguf.read(tensor.file, tensor.offset, tensor.nbytes)
    stored = np.frombuffer(data, np.float32) if tensor.kind.name == "F32" else np.zeros(1)
    params = {
        "factor": exact(float(stored.max())),
        **_LLAMA3,
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }
    made = llama3_factors(2 * len(stored), theta, params)
    if not np.allclose(made, stored, rtol=1e-4, atol=0):
        raise UnsupportedError(
            f"{gguf.label}: {DIVISORS} has divisors of no rotary embedding that is known; the "
            "file can be up-scaled as it is, by `dus-edge gguf` without -q."
        )
    return {"rope_type": "llama3", **params}


def llama3_factors(head_dim: int, theta: float, params: Mapping[str, Any]) -> np.ndarray:
    """Llama 3's per-frequency divisors, ``(head_dim / 2,)`` float32.

    Formula: transformers `modeling_rope_utils._compute_llama3_parameters`; stored as llama.cpp's
    converter does. The steps are in float32 as they are there.

    Args:
        head_dim: width of a head.
        theta: base of the frequencies.
        params: numbers of the scaling, under transformers' names.
    """
    factor, low, high = (
        float(params[k]) for k in ("factor", "low_freq_factor", "high_freq_factor")
    )
    original = float(params["original_max_position_embeddings"])
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelengths = 2 * math.pi * np.power(np.float32(theta), exponents)
    factors = np.empty_like(exponents)
    for i, wavelength in enumerate(wavelengths):
        if wavelength < original / high:
            factors[i] = 1
        elif wavelength > original / low:
            factors[i] = factor
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors[i] = 1 / ((1 - smooth) / factor + smooth)
    return factors
