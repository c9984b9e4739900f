"""What a checkpoint is: typed configuration, named tensors, and rows read on demand."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from dus_edge.checkpoint.config import ModelConfig
    from dus_edge.checkpoint.gguf.file import GGUFModel

#: Bytes per weight of the safetensors dtypes we read (names as the format spells them).
DTYPE_BYTES: Mapping[str, int] = {"BF16": 2, "F16": 2, "F32": 4}
#: Bytes per item of the dtypes that we only write: codes and indices of quantized checkpoints.
INTEGER_BYTES: Mapping[str, int] = {"U8": 1, "I8": 1, "I32": 4, "U32": 4, "I64": 8}
_ITEM_BYTES = {**DTYPE_BYTES, **INTEGER_BYTES}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of one tensor, known without reading a byte of it.

    Attributes:
        name: the Hugging Face name, e.g. ``model.layers.0.self_attn.q_proj.weight``.
        dtype: ``BF16``, ``F16`` or ``F32`` for weights; a quantized checkpoint that is written
            also has those of `INTEGER_BYTES`.
        shape: outermost dimension first, as PyTorch has it: ``(out_features, in_features)``.
        source: the name under which the bytes are stored at the root of all views;
            two tensors with the same source hold the same weights.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: str

    @property
    def n_elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the stored tensor in bytes."""
        return self.n_elements * self.item_bytes

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return _ITEM_BYTES[self.dtype]

    @property
    def n_rows(self) -> int:
        """Length of the first dimension."""
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of one slice along the first dimension."""
        return self.nbytes // self.n_rows if self.n_rows else 0


@dataclass(frozen=True)
class Source:
    """Where a checkpoint came from and what it says of itself.

    Attributes:
        folder: the local folder with ``config.json`` and the tokenizer's files.
        label: what the user called it: a path, ``org/name@rev`` or the built-in's name.
        name: a human name for titles and file names, e.g. ``Mistral-7B-v0.1``.
        repo_id: ``org/name`` on the hub, if it is known.
        revision: the commit that was asked for, if one was.
        licence: an SPDX-like identifier from the model card, or None when it is unknown.
        weights: the folder of the safetensors, where that is another one.
        gguf: the GGUF model that has the weights in place of safetensors.
    """

    folder: Path
    label: str
    name: str
    repo_id: str | None = None
    revision: str | None = None
    licence: str | None = None
    weights: Path | None = None
    gguf: GGUFModel | None = None

    @property
    def weights_folder(self) -> Path:
        """Where the weights lie."""
        return self.weights or self.folder

    @property
    def weight_files(self) -> list[Path]:
        """The files of the weights, as far as they are there."""
        if self.gguf is not None:
            return list(self.gguf.files)
        return sorted(self.weights_folder.glob("*.safetensors"))


class Checkpoint(ABC):
    """A lazy source of named tensors: specs first, bytes by rows when they are asked for."""

    config: ModelConfig
    source: Source

    @abstractmethod
    def specs(self) -> Mapping[str, TensorSpec]:
        """All tensors by name, in model order. No weight is read."""

    @abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows ``[start, stop)`` of a tensor, as a read-only array in its stored dtype.

        BF16 comes as ``uint16`` (its bit pattern), F16 as ``float16``, F32 as ``float32``.
        """

    def check_unchanged(self) -> None:  # noqa: B027 - nothing can change under most
        """See that what was read is still what stands there; to be called before a result is named.

        Raises:
            CheckpointError: a file was written to, or replaced, since its header was read.
        """
