"""A GGUF's metadata as the `config.json` that llama.cpp's converter would have made it from."""

from __future__ import annotations

from typing import Any

from dus_edge.checkpoint.config import parse_config
from dus_edge.checkpoint.gguf.file import GGUFModel
from dus_edge.checkpoint.gguf.rope import exact, rope_of
from dus_edge.errors import CheckpointError, UnsupportedError
from dus_edge.families.family import Family

_OF_HEADS = ("rope.dimension_count", "attention.key_length", "attention.value_length")
_OF_EXPERTS = ("expert_count", "expert_used_count")
#: Written by llama.cpp's converter also where its graph has no window.
_WINDOW = "attention.sliding_window"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
#: GGUF's names of special tokens, and config.json's.
_TOKENS = {"bos": "bos", "eos": "eos", "padding": "pad"}


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
    raw: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        family.activation_key: family.activations[0],
        **_sizes(gguf, family),
        **_flags(gguf, family),
        **_layers(gguf, family),
    }
    raw[family.fields["n_layers"].key] = gguf.n_layers
    raw[family.fields["vocab_size"].key] = _vocab_size(gguf, family)
    _set_scale(raw, family, gguf.label)
    if not copied:
        raw |= rope_of(gguf, family, parse_config(raw, gguf.label).head_dim)
    for name, key in _TOKENS.items():
        token = gguf.values.get(f"tokenizer.ggml.{name}_token_id")
        # Said where there is none, too: transformers has other families' numbers as defaults.
        raw[f"{key}_token_id"] = token if type(token) is int else None
    stored = {t.kind.name for t in gguf.tensors.values() if len(t.shape) > 1}
    raw["dtype"] = _DTYPES.get(stored.pop(), dtype) if len(stored) == 1 else dtype
    return raw


def unread_keys(gguf: GGUFModel, head_dim: int) -> list[str]:
    """Keys of the architecture that `config_of` does not look at: the model may be another one.

    Args:
        gguf: the model.
        head_dim: width of its heads, which some converters repeat under further keys.
    """
    family = gguf.family
    known = {entry.key for entry in family.gguf_keys} | {"vocab_size"}
    known |= {_WINDOW} if _window_key(family) else set()
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
    _take_defaults(found, family)
    window = gguf.values.get(f"{family.gguf_architecture}.{_WINDOW}")
    if (name := _window_key(family)) and type(window) is int and window > 0:
        found[name] = window
    return found


def _window_key(family: Family) -> str | None:
    """config.json's key of the window, where that alone says that there is one."""
    rule = family.fields.get("sliding_window")
    return None if rule is None or rule.only_if else rule.key


def _take_defaults(found: dict[str, Any], family: Family) -> None:
    """Say what llama.cpp takes for granted where config.json has other defaults."""
    rules = family.fields
    hidden, heads = (found.get(str(rules[name].key)) for name in ("hidden_size", "n_heads"))
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
        return
    for name, value in (("n_kv_heads", heads), ("head_dim", hidden // heads)):
        rule = rules[name]
        if rule.key is not None and not isinstance(rule.default, str):
            found.setdefault(rule.key, value)


def _layers(gguf: GGUFModel, family: Family) -> dict[str, Any]:
    """Which layers are of a kind of their own, where the file says it."""
    found: dict[str, Any] = {}
    entries = [entry for entry in family.gguf_keys if entry.value == "sliding_layers"]
    for entry in entries:
        key, pattern = f"{family.gguf_architecture}.{entry.key}", family.patterns["full"]
        every = gguf.values.get(key)
        if type(every) is int and pattern.every_key:
            found[pattern.every_key] = every
        windows = gguf.array(key) if every is None else None
        if windows is None:
            continue
        if len(windows) != gguf.n_layers:
            raise CheckpointError(
                f"{gguf.label}: {key} has {len(windows)} entries for {gguf.n_layers} layers; fetch "
                "the file again."
            )
        members = tuple(not window for window in windows)
        if members != pattern.derived({}, gguf.n_layers):
            found[pattern.list] = pattern.as_list(members)
    return found


def _set_scale(raw: dict[str, Any], family: Family, where: str) -> None:
    """Say the scale of attention that llama.cpp chooses by itself: weights were made to fit it."""
    rule = family.fields.get("attention_scale")
    if family.scale_role is not None and rule is not None and rule.key is not None:
        raw[rule.key] = family.query_width(parse_config(raw, where))


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
