"""What an MLX folder must hold: every tensor of its model, plain or in MLX's three parts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dus_edge.checkpoint.config import ModelConfig, parse_config, tensor_shapes
from dus_edge.checkpoint.names import CONFIG
from dus_edge.checkpoint.safetensors import StoredTensor
from dus_edge.checkpoint.spec import DTYPE_BYTES, INTEGER_BYTES
from dus_edge.errors import CheckpointError, UnsupportedError, UsageError
from dus_edge.quant.mlx.format import MODE, MLXSettings, quantized_shapes

_WIDTHS = {**DTYPE_BYTES, **INTEGER_BYTES}
_KEYS = ("quantization", "quantization_config")


def check_mlx_tensors(
    folder: Path, raw: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> None:
    """See that a folder's tensors are those that its config.json means.

    Args:
        folder: for messages.
        raw: its config.json.
        stored: its tensors by name.

    Raises:
        CheckpointError: one is missing, too many, or of another dtype or shape.
        UnsupportedError: quantized by another mode than affine, or no family that is known.
    """
    where = str(folder / CONFIG)
    config = parse_config({k: v for k, v in raw.items() if k not in _KEYS}, where)
    left = set(stored)
    for name, dtypes, shape in _expected(config, raw["quantization"], stored, where):
        tensor = stored.get(name)
        if tensor is None:
            raise CheckpointError(f"{folder}: tensor {name} is missing; make or fetch it again.")
        if tensor.dtype not in dtypes or tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, but "
                f"config.json means {list(shape)} in {' or '.join(dtypes)}."
            )
        if tensor.nbytes != math.prod(shape) * _WIDTHS[tensor.dtype]:
            raise CheckpointError(f"{tensor.file}: tensor {name} has {tensor.nbytes:,} bytes.")
        left.discard(name)
    if left:
        raise CheckpointError(
            f"{folder}: tensor {min(left)} has no place in a {config.architecture} of "
            f"{config.n_layers} layers."
        )


def _expected(
    config: ModelConfig,
    settings: Mapping[str, Any],
    stored: Mapping[str, StoredTensor],
    where: str,
) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """Name, dtypes and shape of every tensor; what has no scales is not quantized."""
    floats = tuple(DTYPE_BYTES)
    for name, shape in tensor_shapes(config).items():
        layer = name.removesuffix(".weight")
        if f"{layer}.scales" not in stored or len(shape) != 2:
            yield name, floats, shape
            continue
        own = settings.get(layer)
        chosen = _settings(own if isinstance(own, dict) else settings, where)
        if shape[1] % chosen.group_size:
            raise CheckpointError(
                f"{where}: groups of {chosen.group_size} do not divide the {shape[1]} inputs of "
                f"{name}; correct the config, or fetch the folder again."
            )
        packed, groups = quantized_shapes(shape, chosen)
        yield name, ("U32",), packed
        yield f"{layer}.scales", floats, groups
        yield f"{layer}.biases", floats, groups


def _settings(said: Mapping[str, Any], where: str) -> MLXSettings:
    mode, bits, group_size = said.get("mode", MODE), said.get("bits"), said.get("group_size")
    if mode != MODE:
        raise UnsupportedError(f"{where}: MLX's mode {mode!r} is not known; {MODE} is.")
    if type(bits) is not int or type(group_size) is not int:
        raise CheckpointError(
            f"{where}: bits and group_size of quantization are {bits!r} and {group_size!r}; whole "
            "numbers are needed."
        )
    settings = MLXSettings(bits, group_size)
    try:
        settings.check()
    except UsageError as e:
        raise CheckpointError(f"{where}: {e}") from None
    return settings
