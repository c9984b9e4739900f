"""A GGUF file read whole: does its header agree with itself, its bytes and its family?

Every block's scales are looked at: a quantized weight is finite exactly if they are, since it is
an integer times a scale, plus a minimum. Offsets of the scales: `ggml/src/ggml-common.h`.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dus_edge.checkpoint.gguf_header import GGUFTensor, read_header
from dus_edge.errors import CheckpointError
from dus_edge.families.family import Family, find_gguf_family
from dus_edge.machine import default_threads
from dus_edge.quant.types import TYPES
from dus_edge.stream import run_tasks
from dus_edge.words import whole_number

#: Bytes of a block at which its float16 scales stand.
SCALES: Mapping[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ4_NL": (0,), "IQ4_XS": (0,), "IQ3_S": (0,),
    "IQ2_XS": (0,), "IQ2_S": (0,),
}  # fmt: skip
_BY_ID = {t.ggml_id: t for t in TYPES.values()}
_HALF, _BRAIN = 0x7C00, 0x7F80
#: Bytes in one piece of work.
_PIECE = 1 << 23
_EMBEDDING = "token_embd.weight"


def verify_gguf(path: Path, advance: Callable[[int], None] = lambda n: None) -> dict[str, Any]:
    """Read a file whole.

    Args:
        path: the file.
        advance: told of bytes of tensors read.

    Returns:
        what was found: ``architecture``, ``n_tensors``, ``n_parameters``, ``bytes``, ``types``.

    Raises:
        CheckpointError: what is wrong, with the tensor's name.
    """
    try:
        with path.open("rb", buffering=0) as f:
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as view:
                values, tensors = read_header(view)
                size = len(view)
            sizes = [_n_bytes(path, t) for t in tensors]
            _check_places(path, tensors, sizes, size, values.get("general.alignment", 32))
            _check_model(path, values, tensors)
            run_tasks(
                (
                    task
                    for tensor, n_bytes in zip(tensors, sizes, strict=True)
                    for task in _tasks(path, f.fileno(), tensor, n_bytes)
                ),
                n_threads=default_threads(),
                advance=advance,
            )
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (OSError, ValueError) as e:
        raise CheckpointError(
            f"{path} is no whole GGUF file ({e}); make or fetch it again."
        ) from None
    types: dict[str, int] = {}
    for tensor in tensors:
        types[_BY_ID[tensor.kind].name] = types.get(_BY_ID[tensor.kind].name, 0) + 1
    return {
        "architecture": values.get("general.architecture"),
        "n_tensors": len(tensors),
        "n_parameters": sum(math.prod(t.dims) for t in tensors if not t.name.startswith("rope_")),
        "bytes": size,
        "types": types,
    }


def data_bytes(path: Path) -> int:
    """Bytes that `verify_gguf` will tell of at most: the file's size, 0 if it is not there."""
    return path.stat().st_size if path.is_file() else 0


def _n_bytes(path: Path, tensor: GGUFTensor) -> int:
    kind = _BY_ID.get(tensor.kind)
    if kind is None:
        raise CheckpointError(
            f"{path}: tensor {tensor.name} is of ggml type {tensor.kind}, which is not known."
        )
    if not tensor.dims or not all(tensor.dims):
        raise CheckpointError(f"{path}: tensor {tensor.name} has a shape of {list(tensor.dims)}.")
    if tensor.dims[0] % kind.block_weights:
        raise CheckpointError(
            f"{path}: tensor {tensor.name} has rows of {tensor.dims[0]}, no whole blocks of "
            f"{kind.name}."
        )
    return math.prod(tensor.dims[1:]) * kind.row_bytes(tensor.dims[0])


def _check_places(
    path: Path, tensors: list[GGUFTensor], sizes: list[int], end: int, alignment: int
) -> None:
    """Tensors follow each other without overlaps, aligned, to the file's end."""
    names: set[str] = set()
    position, previous = None, "the header"
    for tensor, n_bytes in sorted(zip(tensors, sizes, strict=True), key=lambda x: x[0].offset):
        if tensor.name in names:
            raise CheckpointError(f"{path}: there are two tensors {tensor.name}.")
        names.add(tensor.name)
        if position is not None and tensor.offset < position:
            raise CheckpointError(f"{path}: tensors {previous} and {tensor.name} overlap.")
        if tensor.offset + n_bytes > end:
            raise CheckpointError(
                f"{path} is truncated: tensor {tensor.name} ends at byte "
                f"{tensor.offset + n_bytes:,} of {end:,}."
            )
        position, previous = tensor.offset + n_bytes, tensor.name
    if position is not None and not position <= end <= -(-position // alignment) * alignment:
        raise CheckpointError(f"{path} has {end - position:,} bytes behind its last tensor.")


def _check_model(path: Path, values: Mapping[str, Any], tensors: list[GGUFTensor]) -> None:
    """What the metadata says of a model of a known family is what is there."""
    family = find_gguf_family(values.get("general.architecture"))
    shapes = {t.name: tuple(reversed(t.dims)) for t in tensors}
    if family is None or _EMBEDDING not in shapes:
        return
    n_layers = values.get(family.gguf_key("n_layers"))
    if not isinstance(n_layers, int) or n_layers > len(tensors):
        raise CheckpointError(
            f"{path}: {family.gguf_key('n_layers')} is {n_layers!r}, of {len(tensors):,} tensors."
        )
    missing = [name for name in _needed(family, n_layers) if name not in shapes]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{path}: tensor {missing[0]}{more} is missing.")
    beyond = [t.name for t in tensors if _layer(t.name) >= n_layers]
    if beyond:
        raise CheckpointError(f"{path}: tensor {beyond[0]} is of a layer beyond the {n_layers}.")
    tokens = values.get("tokenizer.ggml.tokens")
    rows = shapes[_EMBEDDING][0]
    if isinstance(tokens, list) and len(tokens) != rows:
        raise CheckpointError(
            f"{path}: there are {len(tokens):,} tokens, but {_EMBEDDING} has {rows:,} rows."
        )


def _needed(family: Family, n_layers: int) -> Iterator[str]:
    for rule in family.tensors:
        if rule.unless:
            continue  # a tied head is not there
        for layer in range(n_layers) if rule.per_layer else (None,):
            yield f"{rule.gguf.format(i=layer)}.weight"


def _layer(name: str) -> int:
    first, _, rest = name.partition(".")
    number = whole_number(rest.partition(".")[0])
    return number if first == "blk" and number is not None else -1


def _tasks(path: Path, fd: int, tensor: GGUFTensor, n_bytes: int) -> Iterator[Callable[[], int]]:
    kind = _BY_ID[tensor.kind]
    step = max(1, _PIECE // kind.block_bytes) * kind.block_bytes
    for start in range(0, n_bytes, step):
        size = min(step, n_bytes - start)
        yield lambda start=start, size=size: _check_values(path, fd, tensor, start, size)


def _check_values(path: Path, fd: int, tensor: GGUFTensor, start: int, size: int) -> int:
    kind = _BY_ID[tensor.kind]
    # Read, not mapped: a page that a disk cannot give is an error then, and no signal.
    data = os.pread(fd, size, tensor.offset + start)
    if len(data) != size:
        raise CheckpointError(f"{path} became shorter while it was read.")
    bad: np.ndarray
    if kind.name == "F32":
        bad = ~np.isfinite(np.frombuffer(data, "<f4"))
    elif kind.name in ("F16", "BF16"):
        exponent = _HALF if kind.name == "F16" else _BRAIN
        bad = _all_ones(np.frombuffer(data, "<u2"), exponent)
    else:
        blocks = np.frombuffer(data, np.uint8).reshape(-1, kind.block_bytes)
        scales = [
            _all_ones(np.ascontiguousarray(blocks[:, o : o + 2]).view("<u2")[:, 0], _HALF)
            for o in SCALES[kind.name]
        ]
        bad = np.logical_or.reduce(scales)
    if bad.any():
        first = (start // kind.block_bytes + int(np.argmax(bad))) * kind.block_weights
        row, column = divmod(first, tensor.dims[0])
        raise CheckpointError(
            f"{path}: tensor {tensor.name} has a NaN or infinite value in row {row}, from column "
            f"{column} on."
        )
    return size


def _all_ones(bits: np.ndarray, exponent: int) -> np.ndarray:
    """Where half-precision numbers are NaN or infinite."""
    return (bits & exponent) == exponent
