"""Models as sources of next-token log-probabilities, whatever format their weights have."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np

from dus_edge.checkpoint.config import parse_config, tensor_shapes
from dus_edge.checkpoint.gguf_header import GGUF_MAGIC
from dus_edge.checkpoint.names import CONFIG, INDEX, SINGLE
from dus_edge.checkpoint.safetensors import shard_files
from dus_edge.errors import CheckpointError, UnsupportedError, UsageError

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
    """

    path: Path
    name: str
    kind: Kind
    vocab_size: int
    n_bytes: int
    n_parameters: int
    context_length: int

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


def inspect_source(path: Path, name: str | None = None) -> SourceInfo:
    """Look at a model without loading its weights; a truncated GGUF file is found here.

    Args:
        path: a GGUF file or a folder.
        name: what people call it; None for the file's name without its ending, or the folder's.

    Raises:
        UsageError: nothing is there, or it is neither a GGUF file nor a checkpoint folder.
        CheckpointError: it is damaged.
        UnsupportedError: no Llama-form model, or weights of a kind that is not known.
        DependencyError: a GGUF file, and llama-cpp-python is not installed.
    """
    if path.is_dir():
        return _inspect_folder(path, name or path.absolute().name)
    if not path.is_file():
        raise UsageError(f"{path} does not exist; name a GGUF file or a checkpoint folder.")
    try:
        with path.open("rb") as f:
            magic = f.read(len(GGUF_MAGIC))
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read ({e.strerror}).") from None
    if magic != GGUF_MAGIC:
        raise UsageError(f"{path} is no GGUF file; name one, or a checkpoint's folder.")
    from dus_edge.run.llama_logits import inspect_gguf

    n_bytes = sum(file.stat().st_size for file in split_files(path))
    return inspect_gguf(path, name or path.stem, n_bytes)


def open_source(info: SourceInfo, device: str = "cpu", n_threads: int | None = None) -> LogitSource:
    """Load a model.

    Args:
        info: of `inspect_source`.
        device: where transformers runs folders: ``cpu``, ``cuda``, ``mps``, …; for anything but
            ``cpu`` llama.cpp puts all layers on its GPU, if it was built for one.
        n_threads: of the CPU; None for all cores.

    Raises:
        CheckpointError: the weights are damaged or incomplete.
        DependencyError: a package that reads this kind is not installed.
        UsageError: there is no such device.
    """
    if info.kind == "gguf":
        from dus_edge.run.llama_logits import GGUFSource

        return GGUFSource(info, device, n_threads)
    from dus_edge.run.torch_logits import FolderSource

    return FolderSource(info, device, n_threads)


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
    path = folder / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"{folder} has no {CONFIG}; name a checkpoint's folder or a GGUF file."
        ) from None
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} cannot be read as JSON ({e}); fetch it again.") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is not a JSON object; fetch it again.")
    return raw


def _inspect_folder(folder: Path, name: str) -> SourceInfo:
    raw = read_config(folder)
    kind = _kind(raw, folder / CONFIG)
    plain = {k: v for k, v in raw.items() if k != "quantization_config"}
    config = parse_config(plain, str(folder / CONFIG))
    return SourceInfo(
        path=folder,
        name=name,
        kind=kind,
        vocab_size=config.vocab_size,
        n_bytes=sum(file.stat().st_size for file in weight_files(folder, kind)),
        n_parameters=sum(int(np.prod(shape)) for shape in tensor_shapes(config).values()),
        context_length=config.context_length,
    )


def _kind(raw: Mapping[str, Any], where: Path) -> Kind:
    details = raw.get("quantization_config")
    if not details:
        return "hf"
    method = details.get("quant_method") if isinstance(details, dict) else details
    if method not in ("gptq", "bitsandbytes"):
        raise UnsupportedError(
            f"{where}: the weights are quantized by {method!r}; plain, gptq and bitsandbytes "
            "folders can be measured."
        )
    return method
