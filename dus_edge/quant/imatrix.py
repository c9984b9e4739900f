"""Importance matrices: how strongly each input column of a weight matrix was excited.

llama-imatrix runs a text through a model and adds up, for every weight matrix, the squares of its
inputs by column. Quantizers weigh an error in a column by the mean of those squares. Two formats
are read, told apart by their first bytes: GGUF with the tensors ``<name>.in_sum2`` and
``<name>.counts``, and the older binary one (`tools/imatrix/imatrix.cpp`, `save_imatrix` and
`save_imatrix_legacy`, of the llama.cpp at `recipe.LLAMA_CPP_COMMIT`). What they mean to a quantizer
is as in `common/imatrix-loader.cpp` and `load_imatrix` of `tools/quantize/quantize.cpp`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dus_edge.checkpoint.gguf_header import GGUF_MAGIC, GGUFTensor, TruncatedError, read_header
from dus_edge.errors import CheckpointError
from dus_edge.quant import types as t
from dus_edge.quant.types import QuantType

#: Keys and endings of the GGUF format.
TYPE_KEY, TYPE = "general.type", "imatrix"
DATASETS_KEY = "imatrix.datasets"
CHUNK_COUNT_KEY = "imatrix.chunk_count"
CHUNK_SIZE_KEY = "imatrix.chunk_size"
SUMS, COUNTS = ".in_sum2", ".counts"

#: Types whose values do not depend on importance; the same in ggml and in our quantizers.
UNWEIGHTED = frozenset({t.F32, t.F16, t.BF16, t.Q8_0})
#: Types that are no use to a matrix of a layer without importance: `tensor_requires_imatrix` of
#: src/llama-quant.cpp.
DEPENDENT = frozenset({t.IQ2_XS, t.IQ2_S})
#: Matrices that llama-imatrix leaves out unless it is told otherwise.
_USUALLY_ABSENT = frozenset({"token_embd.weight", "output.weight"})


@dataclass(frozen=True)
class Importance:
    """The statistics of one run over a text.

    Attributes:
        sums: by GGUF tensor name, ``(n_cols,)`` float32: Σx² of each input column.
        counts: by the same names, how many tokens were added up. In files of the older format
            these are chunks, and the sums are means times chunks.
        chunk_size: tokens of a chunk; 0 if unknown, as in files of the older format.
        n_chunks: chunks of text.
        datasets: files that the text came from.
    """

    sums: Mapping[str, np.ndarray]
    counts: Mapping[str, float]
    chunk_size: int
    n_chunks: int
    datasets: tuple[str, ...]

    def means(self, name: str) -> np.ndarray:
        """What a quantizer is given: Σx² over the count, ``(n_cols,)`` float32.

        Without a token nothing is known: every column counts the same, as in llama-quantize.
        """
        sums, count = self.sums[name], np.float32(self.counts[name])
        return sums / count if count > 0 else np.ones_like(sums)


@dataclass(frozen=True)
class Match:
    """An importance matrix laid beside a model.

    Attributes:
        weights: by GGUF tensor name, the means of the model's tensors that have an entry.
        missing: tensors without one, which are quantized as if there were no importance matrix.
            Embedding and head are not named: they normally have none.
        unused: entries that are of no tensor of the model.
    """

    weights: Mapping[str, np.ndarray]
    missing: tuple[str, ...]
    unused: tuple[str, ...]


def takes_importance(kind: QuantType) -> bool:
    """Whether importance changes what a tensor of this type holds."""
    return kind not in UNWEIGHTED


def needs_importance(name: str, kind: QuantType) -> bool:
    """Whether a tensor of that GGUF name and type is quantized with importance or not at all."""
    return kind in DEPENDENT and name not in _USUALLY_ABSENT


def match(
    importance: Importance,
    shapes: Mapping[str, tuple[int, ...]],
    label: str = "the importance matrix",
) -> Match:
    """Find each tensor's importance.

    Args:
        importance: as read or collected.
        shapes: GGUF names and shapes, outermost first, of the model's tensors; only matrices
            count, as all others are never quantized.
        label: what messages call the importance matrix, e.g. its path.

    Raises:
        CheckpointError: it is another model's: a size differs, or no name is the same.
    """
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    weights: dict[str, np.ndarray] = {}
    for name, shape in matrices.items():
        if name not in importance.sums:
            continue
        n_cols = importance.sums[name].size
        if n_cols != shape[-1]:
            raise CheckpointError(
                f"{label} is of another model: {name} has {n_cols} columns there and "
                f"{shape[-1]} here; compute one for this model."
            )
        weights[name] = importance.means(name)
    if not weights:
        raise CheckpointError(
            f"{label} is of another model: none of its entries{_first(importance.sums)} is a "
            f"tensor of this one{_first(matrices)}; compute one for this model."
        )
    absent = [name for name in matrices if name not in weights]
    return Match(
        weights,
        tuple(name for name in absent if name not in _USUALLY_ABSENT),
        tuple(name for name in importance.sums if name not in weights),
    )


def _first(entries: Mapping[str, Any]) -> str:
    """`` (the first: blk.0.attn_k.weight, 4096 columns)`` of arrays or shapes by name."""
    for name, entry in entries.items():
        n_cols = entry.size if isinstance(entry, np.ndarray) else entry[-1]
        return f" (the first: {name}, {n_cols} columns)"
    return ""


def read_imatrix(path: Path) -> Importance:
    """Read an importance matrix of either format.

    Raises:
        CheckpointError: no such file, no importance matrix, a truncated one, or one with values
            that cannot be: not finite, negative, without counts, or of mixture-of-experts layers.
    """
    try:
        # Mapped, so that a model given by mistake is refused without being read.
        data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read ({e.strerror or e}).") from None
    cursor = _Cursor(data, path)
    if bytes(data[:4]) == GGUF_MAGIC:
        return _read_gguf(cursor)
    return _read_legacy(cursor)


class _Cursor:
    """A place in a file's bytes that knows where they end."""

    def __init__(self, data: np.ndarray, path: Path) -> None:
        self.data = data
        self.path = path
        self.at = 0

    def take(self, n: int) -> bytes:
        """The next `n` bytes."""
        if n > self.rest:
            raise self.truncated()
        self.at += n
        return bytes(self.data[self.at - n : self.at])

    @property
    def rest(self) -> int:
        """Bytes that are left."""
        return self.data.size - self.at

    def unpack(self, code: str) -> Any:
        """The next number, little-endian; `code` is `struct`'s."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def floats(self, n: int) -> np.ndarray:
        """The next `n` float32 values."""
        return np.frombuffer(self.take(4 * n), "<f4").astype(np.float32)

    def truncated(self) -> CheckpointError:
        """The error for a file that ends too early."""
        return CheckpointError(f"{self.path} is truncated; copy or compute it again.")

    def no_imatrix(self, why: str) -> CheckpointError:
        """The error for a file that is something else."""
        return CheckpointError(f"{self.path} is no importance matrix ({why}).")


_F32 = t.F32.ggml_id


def _read_gguf(cursor: _Cursor) -> Importance:
    try:
        keys, tensors = read_header(memoryview(cursor.data))
    except TruncatedError:
        raise cursor.truncated() from None
    except ValueError as e:
        raise cursor.no_imatrix(str(e)) from None
    if (kind := keys.get(TYPE_KEY, TYPE)) != TYPE:
        raise cursor.no_imatrix(f"it is a GGUF file of type {kind!r}")
    wanted = [tensor for tensor in tensors if tensor.name.endswith((SUMS, COUNTS))]
    names = {x.name.removesuffix(SUMS).removesuffix(COUNTS) for x in wanted}
    if not names:
        raise cursor.no_imatrix(f"it has no tensor whose name ends in {SUMS}")
    n_chunks, chunk_size = (_number(cursor, keys, key) for key in (CHUNK_COUNT_KEY, CHUNK_SIZE_KEY))
    datasets = keys.get(DATASETS_KEY)
    if not (isinstance(datasets, list) and all(isinstance(d, str) for d in datasets)):
        raise cursor.no_imatrix(f"it has no list {DATASETS_KEY}")
    stored = _tensors(cursor, wanted)
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, float] = {}
    for name in sorted(names, key=str.encode):
        if name + SUMS not in stored or name + COUNTS not in stored:
            lacking = "counts" if name + SUMS in stored else "sums"
            raise CheckpointError(f"{cursor.path}: {name} has no {lacking}; compute it again.")
        count = stored[name + COUNTS]
        if count.size > 1:
            raise CheckpointError(
                f"{cursor.path}: {name} has {count.size} counts, one for each expert; "
                "importance matrices of mixture-of-experts models are not supported."
            )
        sums[name], counts[name] = _checked(cursor.path, name, stored[name + SUMS], count)
    return Importance(sums, counts, chunk_size, n_chunks, tuple(datasets))


def _tensors(cursor: _Cursor, wanted: list[GGUFTensor]) -> dict[str, np.ndarray]:
    """Sums and counts by their names in the file."""
    tensors: dict[str, np.ndarray] = {}
    for tensor in wanted:
        name = tensor.name
        if tensor.kind != _F32:
            raise CheckpointError(f"{cursor.path}: {name} is not of type F32; compute it again.")
        if name in tensors:
            raise CheckpointError(f"{cursor.path}: {name} is there twice; compute it again.")
        cursor.at = tensor.offset
        tensors[name] = cursor.floats(math.prod(tensor.dims))
    return tensors


def _number(cursor: _Cursor, keys: Mapping[str, Any], key: str) -> int:
    value = keys.get(key)
    if not isinstance(value, int) or value < 0:
        raise cursor.no_imatrix(f"it has no number {key}")
    return value


#: Longest name that the older format may have; a file of anything else begins with a longer one.
_LONGEST_NAME = 256


def _read_legacy(cursor: _Cursor) -> Importance:
    """Entries of name, calls and means × calls; the number of chunks and the text's name.

    The format has no magic number, so the first entry must look like one.
    """
    if cursor.rest < 8:
        raise cursor.no_imatrix("it is too short")
    n_entries = cursor.unpack("i")
    if n_entries < 1:
        raise cursor.no_imatrix("it has no entries")
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, float] = {}
    for _ in range(n_entries):
        name = _legacy_name(cursor, n_entries)
        n_calls, n_cols = cursor.unpack("i"), cursor.unpack("i")
        if n_cols < 1:
            raise CheckpointError(f"{cursor.path}: {name} has no values; compute it again.")
        if name in sums:
            raise CheckpointError(f"{cursor.path}: {name} is there twice; compute it again.")
        values, count = _checked(
            cursor.path, name, cursor.floats(n_cols), np.array([n_calls], np.float32)
        )
        # Without calls the values are means as they are.
        sums[name], counts[name] = values, count or 1
    # Chunks and text were added to the format later.
    n_chunks = cursor.unpack("i") if cursor.rest >= 4 else 0
    datasets: tuple[str, ...] = ()
    if cursor.rest >= 4 and 0 < (length := cursor.unpack("i")) <= cursor.rest:
        datasets = (cursor.take(length).decode("utf-8", "replace"),)
    return Importance(sums, counts, 0, max(0, n_chunks), datasets)


def _legacy_name(cursor: _Cursor, n_entries: int) -> str:
    first = cursor.at == 4
    length = cursor.unpack("i")
    # An entry takes at least 16 bytes beside its name.
    if not 0 < length <= _LONGEST_NAME or (first and n_entries > 1 << 24):
        raise cursor.no_imatrix("it is neither GGUF nor of the older format")
    name = cursor.take(length)
    if not (name.isascii() and name.decode("ascii").isprintable()):
        raise cursor.no_imatrix("it is neither GGUF nor of the older format")
    return name.decode("ascii")


def _checked(
    path: Path, name: str, sums: np.ndarray, count: np.ndarray
) -> tuple[np.ndarray, float]:
    """Sums and their count, seen to be possible; the count as a whole number, as llama.cpp does."""
    if not sums.size or not count.size:
        raise CheckpointError(f"{path}: {name} has no values; compute it again.")
    for values, of in ((sums, ""), (count, "the count of ")):
        if not np.isfinite(values).all():
            raise CheckpointError(f"{path}: {of}{name} is not finite; compute it again.")
        if (values < 0).any():
            raise CheckpointError(f"{path}: {of}{name} is negative; compute it again.")
    return sums, math.floor(float(count[0]) + 0.5)
