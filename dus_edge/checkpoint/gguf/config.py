"""A GGUF's metadata as the `config.json` that llama.cpp's converter would have made it from."""

from __future__ import annotations

from typing import Any

import numpy as np

from dus_edge.checkpoint.gguf.file import GGUFModel
from dus_edge.checkpoint.gguf.rope import DIVISORS, llama3_factors
from dus_edge.errors import CheckpointError, UnsupportedError
from dus_edge.families.family import Family

#: Factor of the rotary embeddings of Llama 3.1 and 3.2; the other numbers are those of both. A GGUF
#: has what they amount to, one divisor a frequency.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT = 8192
_OF_HEADS = ("rope.dimension_count", "attention.key_length", "attention.value_length")
_OF_EXPERTS = ("expert_count", "expert_used_count")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
#: GGUF's names of special tokens, and config.json's.
_TOKENS = {"bos": "bos", "eos": "eos", "padding": "pad"}
_YARN = {
    "yarn_ext_factor": "extrapolation_factor",
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}


def config_of(gguf: GGUFModel, dtype: str = "float16", *, copied: bool = False) -> dict[str, Any]:
    """config.json of a model.

    Args:
        gguf: the model; its weights are not read, but for a rotary embedding's divisors.
        dtype: of the checkpoint, as transformers spells it; that of the weights where they are not
            quantized.
        copied: the layers are only copied: its rotary embedding is left out.

    Raises:
        CheckpointError: a value is missing, or two contradict each other.
        UnsupportedError: another family, or a rotary embedding that is not known.
    """
    family = gguf.family
    if not copied:
        _check_told(gguf, family)
    raw: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        family.activation_key: family.activations[0],
        **_sizes(gguf, family),
        **_flags(gguf, family),
    }
    raw[family.fields["n_layers"].key] = gguf.n_layers
    raw[family.fields["vocab_size"].key] = _vocab_size(gguf, family)
    raw |= {} if copied else _rope(gguf, family)
    for name, key in _TOKENS.items():
        token = gguf.values.get(f"tokenizer.ggml.{name}_token_id")
        if type(token) is int:
            raw[f"{key}_token_id"] = token
    stored = {t.kind.name for t in gguf.tensors.values() if len(t.shape) > 1}
    raw["dtype"] = _DTYPES.get(stored.pop(), dtype) if len(stored) == 1 else dtype
    return raw


def _check_told(gguf: GGUFModel, family: Family) -> None:
    """See that the metadata of a family's models says all of config.json.

    Raises:
        UnsupportedError: llama.cpp knows something by itself, such as a scale or a pattern.
    """
    told = [family.fields[e.value] for e in family.gguf_keys if e.value in family.fields]
    kinds = [e.type for e in family.gguf_keys]
    if (
        family.scale_role
        or family.rope_local
        or "bools" in kinds
        or any(rule.power != 1 for rule in told)
    ):
        raise UnsupportedError(
            f"{gguf.label}: a {family.architecture} cannot be made of its GGUF; `dus-edge gguf` "
            "without -q up-scales it as it is."
        )


def unread_keys(gguf: GGUFModel, head_dim: int) -> list[str]:
    """Keys of the architecture that `config_of` does not look at: the model may be another one.

    Args:
        gguf: the model.
        head_dim: width of its heads, which some converters repeat under further keys.
    """
    family = gguf.family
    known = {entry.key for entry in family.gguf_keys} | {"vocab_size"}
    idle = dict.fromkeys(_OF_HEADS, head_dim) | dict.fromkeys(_OF_EXPERTS, 0)
    prefix = f"{family.gguf_architecture}."
    return [
        key
        for key, value in gguf.values.items()
        if key.startswith(prefix)
        and (rest := key.removeprefix(prefix)) not in known
        and not rest.startswith("rope.scaling.")
        and (rest not in idle or idle[rest] != value)
    ]


def exact(value: float) -> float:
    """The shortest number that is the same float32: 1e-05 of 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _sizes(gguf: GGUFModel, family: Family) -> dict[str, Any]:
    """Fields that have a key of their own."""
    found: dict[str, Any] = {}
    for entry in family.gguf_keys:
        key = f"{family.gguf_architecture}.{entry.key}"
        rule = family.fields.get(entry.value)
        if rule is None or rule.key is None or key not in gguf.values:
            continue
        field = rule.key
        value = _one(gguf, key)
        value = exact(value) if isinstance(value, float) else value
        if found.setdefault(field, value) != value:
            raise UnsupportedError(
                f"{gguf.label}: {key} is {value!r}, and another key means {found[field]!r} for "
                f"{field}; such a model is not supported."
            )
    return found


def _one(gguf: GGUFModel, key: str) -> Any:
    """A value, or of an array that has one for each layer the value that all of them share."""
    value = gguf.values[key]
    if value is not None:
        return value
    items = set(gguf.array(key) or ())
    if len(items) != 1:
        raise UnsupportedError(
            f"{gguf.label}: {key} differs from layer to layer; such a model is not supported."
        )
    return items.pop()


def _flags(gguf: GGUFModel, family: Family) -> dict[str, bool]:
    """What the tensors that are there tell: biases, a head of its own."""
    flags: dict[str, bool] = {}
    for rule in family.tensors:
        name = rule.gguf.format(i=0)
        if rule.bias:
            there = f"{name}.bias" in gguf.tensors
            flags[rule.bias] = flags.get(rule.bias, False) or there
        if rule.unless:
            flags[rule.unless] = f"{name}.weight" not in gguf.tensors
    rules = family.fields
    return {key: value for flag, value in flags.items() if (key := rules[flag].key) is not None}


def _vocab_size(gguf: GGUFModel, family: Family) -> int:
    name = family.gguf_name(family.name("embedding"))
    tensor = gguf.tensors.get(name)
    if tensor is None or len(tensor.shape) != 2:
        raise CheckpointError(f"{gguf.label}: tensor {name} is missing; fetch the file again.")
    return tensor.shape[0]


def _rope(gguf: GGUFModel, family: Family) -> dict[str, Any]:
    """Rotary embedding, in the spelling that every transformers reads."""
    values, a = gguf.values, f"{family.gguf_architecture}.rope"
    theta = values.get(f"{a}.freq_base")
    theta = exact(theta) if isinstance(theta, float) else 10000.0
    found: dict[str, Any] = {"rope_theta": theta}
    kind = values.get(f"{a}.scaling.type", "none")
    if DIVISORS in gguf.tensors:
        return found | {"rope_scaling": _llama3(gguf, theta)}
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
