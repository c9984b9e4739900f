"""A GGUF's weights as a checkpoint: transformers' names, dequantized as rows are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from dus_edge.checkpoint.config import ModelConfig, tensor_shapes
from dus_edge.checkpoint.gguf.config import unread_keys
from dus_edge.checkpoint.gguf.file import PlacedTensor
from dus_edge.checkpoint.gguf.rope import DIVISORS, LONGROPE_DIVISORS
from dus_edge.checkpoint.spec import Checkpoint, Source, TensorSpec
from dus_edge.errors import CheckpointError, UnsupportedError

_NUMPY = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
#: What can be done with a file that cannot be taken apart.
_AS_IT_IS = "`dus-edge gguf` without -q copies its tensors as they are"


class GGUFCheckpoint(Checkpoint):
    """A checkpoint whose weights lie in a GGUF.

    Tensors that are stored weight by weight come as they are. Those in blocks come dequantized, as
    float32, which they are exactly, or rounded to float16. Rows of q and k that were reordered for
    llama.cpp are brought back into transformers' order.

    Args:
        source: with `Source.gguf`.
        config: its configuration.
        dtype: of tensors in blocks, ``F32`` or ``F16``.

    Raises:
        CheckpointError: a tensor is missing or of another shape than the metadata means.
        UnsupportedError: a tensor or a key that has no place in the family, or a type of blocks
            that cannot be dequantized.
    """

    def __init__(self, source: Source, config: ModelConfig, dtype: str = "F32") -> None:
        assert source.gguf is not None
        self.source, self.config, self.gguf = source, config, source.gguf
        if unread := unread_keys(self.gguf, config.head_dim):
            raise UnsupportedError(
                f"{self.gguf.label}: {unread[0]} is not understood, so the model may be of "
                f"another kind; {_AS_IT_IS}."
            )
        self._dtype = dtype
        self._placed: dict[str, PlacedTensor] = {}
        self._specs = dict(self._checked())
        self._check_extra()

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        spec = self._specs[name]
        stop = spec.n_rows if stop is None else stop
        heads = self.config.family.rope_heads(name, self.config)
        if not heads:
            return self._rows(name, start, stop)
        # Rows of a head stand among each other: whole heads are read.
        size = spec.n_rows // heads
        first, last = start // size * size, -(-stop // size) * size
        rows = from_interleaved(self._rows(name, first, last), size)
        return np.ascontiguousarray(rows[start - first : stop - first])

    def check_unchanged(self) -> None:
        self.gguf.check_unchanged()

    def _rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows in the file's order."""
        if start == stop:  # asked for the dtype, which gguf-py's code for blocks has no answer to
            dtype = _NUMPY[self._specs[name].dtype]
            return np.empty((0, *self._specs[name].shape[1:]), dtype)
        spec, placed = self._specs[name], self._placed[name]
        n_bytes = placed.nbytes // spec.n_rows
        data = self.gguf.read(
            placed.file, placed.offset + start * n_bytes, (stop - start) * n_bytes
        )
        shape = (stop - start, *spec.shape[1:])
        dtype = placed.kind.dtype
        if dtype is None:
            blocks = np.frombuffer(data, np.uint8).reshape(-1, placed.row_bytes)
            rows = placed.kind.dequantized(blocks).reshape(shape)
        else:
            rows = np.frombuffer(data, _NUMPY[dtype]).reshape(shape)
        if shift := self.config.family.shift(name):
            return _as_float32(rows) - np.float32(shift)
        return self._halved(name, rows) if dtype is None and spec.dtype == "F16" else rows

    def _halved(self, name: str, rows: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            half = rows.astype(np.float16)
        if not np.isfinite(half).all() and np.isfinite(rows).all():
            raise CheckpointError(
                f"{self.gguf.label}: tensor {name} has weights too large for float16 (the largest "
                f"is {np.abs(rows).max():.3g}); {_AS_IT_IS}, and -q bf16 holds them."
            )
        return half

    def _checked(self) -> Iterator[tuple[str, TensorSpec]]:
        family = self.config.family
        for name, shape in tensor_shapes(self.config).items():
            stored = self.gguf.tensors.get(family.gguf_name(name))
            if stored is None:
                raise CheckpointError(
                    f"{self.gguf.label}: tensor {family.gguf_name(name)} is missing; fetch the "
                    "file again."
                )
            if stored.shape != shape:
                raise CheckpointError(
                    f"{self.gguf.label}: tensor {stored.name} has shape {list(stored.shape)}, but "
                    f"the metadata means {list(shape)}."
                )
            if not stored.kind.is_readable:
                raise UnsupportedError(
                    f"{self.gguf.label}: tensor {stored.name} is of the type {stored.kind.name}, "
                    f"which cannot be dequantized; {_AS_IT_IS}."
                )
            self._placed[name] = stored
            dtype = stored.kind.dtype or self._dtype
            yield name, TensorSpec(name, "F32" if family.shift(name) else dtype, shape, name)

    def _check_extra(self) -> None:
        known = {placed.name for placed in self._placed.values()}
        known |= {DIVISORS, *LONGROPE_DIVISORS}
        extra = [name for name in self.gguf.tensors if name not in known]
        if extra:
            raise UnsupportedError(
                f"{self.gguf.label}: tensor {extra[0]} has no place in a "
                f"{self.config.architecture}; {_AS_IT_IS}."
            )


def from_interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of whole heads from llama.cpp's rope layout to transformers'.

    Args:
        rows: ``(n_heads × head_dim, …)``; the first dimension is whole heads.
        head_dim: rows of a head, even.
    """
    heads = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return heads.swapaxes(1, 2).reshape(rows.shape)


def _as_float32(rows: np.ndarray) -> np.ndarray:
    if rows.dtype == np.uint16:
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float32, copy=False)
