"""A checkpoint folder read whole: plain, GPTQ, bitsandbytes or MLX."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dus_edge.checkpoint.config import quantized_by
from dus_edge.checkpoint.names import CONFIG
from dus_edge.checkpoint.resolve import resolve_base
from dus_edge.checkpoint.safetensors import (
    SafetensorsCheckpoint,
    StoredTensor,
    read_header,
    shard_files,
)
from dus_edge.checkpoint.spec import DTYPE_BYTES
from dus_edge.errors import CheckpointError
from dus_edge.jsonfile import find_object
from dus_edge.machine import default_threads
from dus_edge.predict.memory.folder import is_quantized_folder, read_folder
from dus_edge.stream import run_tasks
from dus_edge.verify.mlx import check_mlx_tensors

_PIECE = 1 << 23
_EXPONENTS = {"BF16": 0x7F80, "F16": 0x7C00}


def verify_folder(folder: Path, advance: Callable[[int], None] = lambda n: None) -> dict[str, Any]:
    """Read a folder whole.

    Args:
        folder: with config.json and safetensors files.
        advance: told of bytes read.

    Returns:
        what was found: ``kind``, ``n_tensors``, ``bytes``.

    Raises:
        CheckpointError: what is wrong, with the tensor's name.
        UnsupportedError: no family that is known.
    """
    raw = find_object(folder / CONFIG) or {}
    if quantized_by(raw) == "MLX":
        kind, files = "MLX", shard_files(folder)[0]
    elif is_quantized_folder(folder):
        kind = (read_folder(folder).torch).method  # type: ignore[union-attr]
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder} has no safetensors file.")
    else:
        kind = "plain"
        SafetensorsCheckpoint(resolve_base(str(folder), weights=True)).specs()
        files = shard_files(folder)[0]
    stored = {name: t for file in files for name, t in read_header(file).items()}
    if kind == "MLX":
        check_mlx_tensors(folder, raw, stored)
    tasks = (task for name, t in stored.items() for task in _tasks(name, t, stored))
    run_tasks(tasks, n_threads=default_threads(), advance=advance)
    return {
        "kind": kind,
        "n_tensors": len(stored),
        "bytes": sum(file.stat().st_size for file in files),
    }


def folder_bytes(folder: Path) -> int:
    """Bytes that `verify_folder` will tell of at most."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _tasks(
    name: str, tensor: StoredTensor, stored: dict[str, StoredTensor]
) -> Iterator[Callable[[], int]]:
    if name.endswith(".g_idx"):
        n_groups = stored[name.removesuffix("g_idx") + "scales"].shape[0]
        yield lambda: _check_groups(name, tensor, n_groups)
        return
    for start in range(0, tensor.nbytes, _PIECE):
        size = min(_PIECE, tensor.nbytes - start)
        yield lambda start=start, size=size: _check_values(name, tensor, start, size)


def _read(tensor: StoredTensor, start: int, size: int) -> bytes:
    try:
        with tensor.file.open("rb", buffering=0) as f:
            f.seek(tensor.offset + start)
            data = f.read(size)
    except OSError as e:
        raise CheckpointError(f"{tensor.file} cannot be read ({e.strerror or e}).") from None
    if len(data) != size:
        raise CheckpointError(f"{tensor.file} is truncated; make or fetch it again.")
    return data


def _check_values(name: str, tensor: StoredTensor, start: int, size: int) -> int:
    data = _read(tensor, start, size)
    if tensor.dtype == "F32":
        bad = ~np.isfinite(np.frombuffer(data, "<f4"))
    elif tensor.dtype in _EXPONENTS:
        exponent = _EXPONENTS[tensor.dtype]
        bad = (np.frombuffer(data, "<u2") & exponent) == exponent
    else:
        return size  # integers are always numbers
    if bad.any():
        index = start // DTYPE_BYTES[tensor.dtype] + int(np.argmax(bad))
        place = ", ".join(str(i) for i in np.unravel_index(index, tensor.shape or (1,)))
        raise CheckpointError(f"{tensor.file}: tensor {name}[{place}] is NaN or infinite.")
    return size


def _check_groups(name: str, tensor: StoredTensor, n_groups: int) -> int:
    """Every column's group is one that has scales."""
    groups = np.frombuffer(_read(tensor, 0, tensor.nbytes), "<i4")
    bad = (groups < 0) | (groups >= n_groups)
    if bad.any():
        column = int(np.argmax(bad))
        raise CheckpointError(
            f"{tensor.file}: tensor {name}[{column}] is {groups[column]}, but there are "
            f"{n_groups} groups."
        )
    return tensor.nbytes
