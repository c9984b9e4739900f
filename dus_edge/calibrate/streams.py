"""The inputs of all layers, of the same tokens at once: kept in a temporary file.

The engine goes layer by layer over all tokens; what compares layers needs all layers of a token.
The file has no name, so that it is gone however a run ends. What it holds is what the engine
computed, bit for bit: a run of the layers behind any of them can start from there.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
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


class KeptStreams:
    """Streams 0 … n of a base of n layers: stream i is the input of layer i.

    Attributes:
        n_streams: n + 1.
        n_chunks: of the text.
        n_ctx: tokens of a chunk.
        hidden: width.
    """

    def __init__(self, fd: int, config: ModelConfig, tokens: np.ndarray, dtype: str) -> None:
        self.n_streams, self.hidden = config.n_layers + 1, config.hidden_size
        self.n_chunks, self.n_ctx = tokens.shape
        self._fd, self._dtype = fd, _STORED[dtype]

    def put(self, stream: int, h: torch.Tensor) -> None:
        """Keep a stream ``(n_chunks, n_ctx, hidden)``, in the dtype that was announced.

        Raises:
            OutputError: the disk is full.
        """
        data = h.contiguous().view(torch.uint8).numpy()
        try:
            pwrite_all(self._fd, data.data.cast("B"), stream * h.nbytes)
        except OSError as e:
            raise OutputError(
                f"the temporary file of layer inputs cannot be written ({e.strerror or e}); make "
                "room, or take fewer --chunks."
            ) from None

    def read(self, stream: int, chunk: int, tokens: slice = slice(None)) -> np.ndarray:
        """Tokens of a chunk in one stream ``(n_tokens, hidden)``, as float32."""
        first, end, _ = tokens.indices(self.n_ctx)
        row = (stream * self.n_chunks + chunk) * self.n_ctx + first
        n_bytes = (end - first) * self.hidden * self._dtype.itemsize
        data = os.pread(self._fd, n_bytes, row * self.hidden * self._dtype.itemsize)
        if len(data) != n_bytes:
            raise OutputError("the temporary file of layer inputs was cut short; run it again.")
        return as_floats(np.frombuffer(data, self._dtype).reshape(-1, self.hidden))

    def blocks(self, advance: Callable[[int], None] = lambda n: None) -> Iterator[np.ndarray]:
        """All streams together, without the first token of each chunk.

        That token sees nothing before it, and in most models its stream is unlike all others.

        Args:
            advance: told of tokens that were read, `n_chunks` × (`n_ctx` - 1) in all.

        Yields:
            ``(n_streams, n_tokens, hidden)`` float32, a few tokens at a time.
        """
        step = max(1, _BLOCK_BYTES // (8 * self.n_streams * self.hidden))
        for chunk in range(self.n_chunks):
            for first in range(1, self.n_ctx, step):
                some = slice(first, min(first + step, self.n_ctx))
                yield np.stack([self.read(i, chunk, some) for i in range(self.n_streams)])
                advance(some.stop - some.start)


def streams_bytes(config: ModelConfig, tokens: np.ndarray, dtype: str) -> int:
    """Size of the temporary file: streams × tokens × width, in the engine's dtype."""
    return math.prod((config.n_layers + 1, tokens.size, config.hidden_size, DTYPES[dtype].itemsize))


@contextmanager
def kept_streams(
    checkpoint: Checkpoint,
    tokens: np.ndarray,
    settings: ComputeSettings,
    folder: Path,
    advance: Callable[[int], None] = lambda n: None,
) -> Iterator[KeptStreams]:
    """Run text through a base, and keep the inputs of all its layers while the block runs.

    Args:
        checkpoint: the base.
        tokens: ``(n_chunks, n_ctx)`` int32 token ids.
        settings: device and precision.
        folder: of the temporary file, `streams_bytes` large; it is made if need be.
        advance: told of work done, out of `engine.total_token_layers`.

    Raises:
        OutputError: the file does not fit.
        CheckpointError: activations became NaN or infinite (the layer is named).
    """
    check_writable(folder)
    check_free_space(folder, streams_bytes(checkpoint.config, tokens, settings.dtype))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder, prefix=".dus-edge-") as file:
        kept = KeptStreams(file.fileno(), checkpoint.config, tokens, settings.dtype)
        run_layers(checkpoint, tokens, _Nobody(), settings, between=kept.put, advance=advance)
        yield kept


class _Nobody:
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
