"""Models as sources of next-token log-probabilities, whatever format their weights have.

`open` makes them; nothing here knows an engine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np

from dus_edge.checkpoint.gguf.origin import Origin
from dus_edge.checkpoint.names import CONFIG, INDEX, SINGLE
from dus_edge.checkpoint.safetensors import shard_files
from dus_edge.errors import UsageError
from dus_edge.jsonfile import find_object

Kind = Literal["gguf", "hf", "gptq", "bitsandbytes"]

_SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
#: Rows of logits that are float64 at once.
_ROWS = 32


@dataclass(frozen=True)
class SourceInfo:
    """What is known of a model before its weights are loaded.

    Attributes:
        path: a GGUF file or a folder.
        name: what people call it.
        kind: what the weights are in.
        vocab_size: rows of the output head.
        n_bytes: size of the weights' files, bytes.
        n_parameters: weights of the model before it was quantized; a tied head counts once.
        context_length: tokens that the model was made for.
        origin: how the weights are stored; None if that is not known.
    """

    path: Path
    name: str
    kind: Kind
    vocab_size: int
    n_bytes: int
    n_parameters: int
    context_length: int
    origin: Origin | None = None

    @property
    def bits_per_weight(self) -> float:
        """File size over parameters, all tensors and metadata included."""
        return 8 * self.n_bytes / self.n_parameters


class LogitSource(Protocol):
    """A loaded model. A context manager: leaving it frees the memory."""

    info: SourceInfo

    def log_probs(self, tokens: np.ndarray, start: int = 0) -> np.ndarray:
        """Next-token log-probabilities of one chunk, from an empty context.

        Args:
            tokens: ``(n_ctx,)`` integers below `info.vocab_size`.
            start: the first position that is wanted.

        Returns:
            ``(n_ctx - start, vocab_size)`` float32, natural logarithms. Not finite where the
            model's logits are not.

        Raises:
            DusEdgeError: the model cannot be run.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None: ...


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural log-probabilities of float32 logits ``(n, vocab)``, as float32.

    The sums are float64. Rows with a NaN or an infinite logit come out not finite.
    """
    out = np.empty(logits.shape, np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for i in range(0, len(logits), _ROWS):
            x = logits[i : i + _ROWS].astype(np.float64)
            x -= x.max(axis=1, keepdims=True)
            x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
            out[i : i + _ROWS] = x
    return out


def split_files(path: Path) -> list[Path]:
    """All files of a GGUF model: itself, or the parts ``-00001-of-0000N`` that are there."""
    found = _SPLIT.search(path.name)
    if found is None:
        return [path]
    stem, n = path.name[: found.start()], int(found[1])
    parts = [path.with_name(f"{stem}-{i:05}-of-{n:05}.gguf") for i in range(1, n + 1)]
    return [part for part in parts if part.is_file()]


def weight_files(folder: Path, kind: Kind) -> list[Path]:
    """A folder's safetensors files; GPTQ tools call theirs what they like."""
    if kind == "gptq" and not (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        named = sorted(folder.glob("*.safetensors"))
        if len(named) == 1:
            return named
    return shard_files(folder)[0]


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json as it is.

    Raises:
        UsageError: there is none.
        CheckpointError: it is not a JSON object.
    """
    raw = find_object(folder / CONFIG)
    if raw is None:
        raise UsageError(f"{folder} has no {CONFIG}; name a checkpoint's folder or a GGUF file.")
    return raw
