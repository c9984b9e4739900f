"""Hidden states of the same tokens at many places of a model: kept in a file.

The engine goes layer by layer over all tokens; what compares layers needs all layers of a token.
The file has no name, so that it is gone however a run ends. What it holds is what the engine
computed, bit for bit: a run of the layers behind any of them can start from there.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from dus_edge.adapter.numbers import as_floats
from dus_edge.calibrate.engine import DTYPES, ComputeSettings, run_layers
from dus_edge.checkpoint.config import ModelConfig
from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.errors import OutputError
from dus_edge.files import check_free_space, check_writable, pwrite_all

#: Bytes of all streams' tokens that are compared together, as float64.
_BLOCK_BYTES = 64 << 20
#: How numpy reads the engine's dtypes; bf16 as `Checkpoint.read` gives it.
_STORED = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2")}


class KeptStates:
    """Hidden states of all tokens, many times, in the slots of a file.

    Attributes:
        n_chunks: of the text.
        n_ctx: tokens of a chunk.
        hidden: width.
    """

    def __init__(self, fd: int, config: ModelConfig, tokens: np.ndarray, dtype: str) -> None:
        """
        Args:
            fd: of a file that can be read and written.
            config: of the base.
            tokens: ``(n_chunks, n_ctx)``.
            dtype: one of the engine's.
        """
        self.hidden = config.hidden_size
        self.n_chunks, self.n_ctx = tokens.shape
        self._fd, self._dtype, self._torch = fd, _STORED[dtype], DTYPES[dtype]

    def put(self, slot: int, h: torch.Tensor, first: int = 0) -> None:
        """Keep states ``(n_chunks, n_ctx, hidden)``, in the dtype that was announced.

        Args:
            slot: where.
            h: states of all chunks, or of some.
            first: chunk that they begin with.

        Raises:
            OutputError: the disk is full.
        """
        data = h.contiguous().view(torch.uint8).numpy()
        try:
            pwrite_all(self._fd, data.data.cast("B"), self._offset(slot, first))
        except OSError as e:
            raise OutputError(
                f"the temporary file of layer inputs cannot be written ({e.strerror or e}); make "
                "room, or take fewer --chunks."
            ) from None

    def load(self, slot: int, chunks: slice) -> torch.Tensor:
        """States of some chunks ``(n, n_ctx, hidden)``, in their dtype, on the CPU."""
        first, end, _ = chunks.indices(self.n_chunks)
        shape = (end - first, self.n_ctx, self.hidden)
        data = self._bytes(self._offset(slot, first), math.prod(shape))
        return torch.frombuffer(bytearray(data), dtype=self._torch).reshape(shape)

    def read(self, slot: int, chunk: int, tokens: slice = slice(None)) -> np.ndarray:
        """Tokens of a chunk in one slot ``(n_tokens, hidden)``, as float32."""
        first, end, _ = tokens.indices(self.n_ctx)
        skipped = first * self.hidden * self._dtype.itemsize
        data = self._bytes(self._offset(slot, chunk) + skipped, (end - first) * self.hidden)
        return as_floats(np.frombuffer(data, self._dtype).reshape(-1, self.hidden))

    def by_chunk(
        self, slots: Sequence[int], advance: Callable[[int], None] = lambda n: None
    ) -> Iterator[Iterator[np.ndarray]]:
        """Several slots together, without the first token of each chunk.

        That token sees nothing before it, and in most models its stream is unlike all others.

        Args:
            slots: which, such as all streams of a base.
            advance: told of tokens that were read, `n_chunks` × (`n_ctx` - 1) in all.

        Yields:
            for each chunk its tokens, ``(n_slots, n_tokens, hidden)`` float32, a few at a time.
        """
        step = max(1, _BLOCK_BYTES // (8 * len(slots) * self.hidden))

        def blocks(chunk: int) -> Iterator[np.ndarray]:
            for first in range(1, self.n_ctx, step):
                some = slice(first, min(first + step, self.n_ctx))
                yield np.stack([self.read(i, chunk, some) for i in slots])
                advance(some.stop - some.start)

        return map(blocks, range(self.n_chunks))

    def _offset(self, slot: int, chunk: int) -> int:
        row = (slot * self.n_chunks + chunk) * self.n_ctx
        return row * self.hidden * self._dtype.itemsize

    def _bytes(self, offset: int, n: int) -> bytes:
        """`n` numbers from `offset` on."""
        data = os.pread(self._fd, n * self._dtype.itemsize, offset)
        if len(data) != n * self._dtype.itemsize:
            raise OutputError("the temporary file of layer inputs was cut short; run it again.")
        return data


def states_bytes(config: ModelConfig, tokens: np.ndarray, dtype: str, n_slots: int) -> int:
    """Size of the file: slots × tokens × width, in the engine's dtype."""
    return math.prod((n_slots, tokens.size, config.hidden_size, DTYPES[dtype].itemsize))


@contextmanager
def kept_streams(
    checkpoint: Checkpoint,
    tokens: np.ndarray,
    settings: ComputeSettings,
    folder: Path,
    advance: Callable[[int], None] = lambda n: None,
) -> Iterator[KeptStates]:
    """Run text through a base, and keep the inputs of all its layers while the block runs.

    Slot i has stream i, the input of layer i; slot n what the last layer gives.

    Args:
        checkpoint: the base.
        tokens: ``(n_chunks, n_ctx)`` int32 token ids.
        settings: device and precision.
        folder: of the temporary file, `states_bytes` large; it is made if need be.
        advance: told of work done, out of `engine.total_token_layers`.

    Raises:
        OutputError: the file does not fit.
        CheckpointError: activations became NaN or infinite (the layer is named).
    """
    check_writable(folder)
    config = checkpoint.config
    n_bytes = states_bytes(config, tokens, settings.dtype, config.n_layers + 1)
    check_free_space(folder, n_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder, prefix=".dus-edge-") as file:
        kept = KeptStates(file.fileno(), config, tokens, settings.dtype)
        run_layers(checkpoint, tokens, NullVisitor(), settings, between=kept.put, advance=advance)
        yield kept


class NullVisitor:
    """A visitor that looks at nothing."""

    replaces = False

    def observe(self, layer: int, site: str, x: torch.Tensor) -> None:
        pass

    def finish_site(
        self, layer: int, site: str, weights: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor]:
        return {}

    def save(self, layer: int, path: Path) -> None:
        pass

    def load(self, layer: int, path: Path) -> None:
        pass
