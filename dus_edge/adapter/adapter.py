"""An adapter folder: its matrices by module, checked.

peft's file holds, for each module that is adapted, ``…lora_A.weight`` of shape (rank, in_features)
and ``…lora_B.weight`` of shape (out_features, rank), and modules that are replaced whole under
their own names. Whether they belong to a model, `fit` says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from dus_edge.adapter.config import AdapterConfig, load_adapter_config
from dus_edge.adapter.numbers import as_floats
from dus_edge.checkpoint.contained import check_small_files
from dus_edge.checkpoint.names import ADAPTER_WEIGHTS
from dus_edge.checkpoint.safetensors import StoredTensor, file_identity, read_header
from dus_edge.checkpoint.spec import DTYPE_BYTES
from dus_edge.errors import CheckpointError, UnsupportedError, UsageError

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_NUMPY = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


@dataclass(frozen=True)
class LowRank:
    """What is added to one matrix: ``scale * (B @ A)``.

    Attributes:
        a: where A lies, ``(rank, in_features)``.
        b: where B lies, ``(out_features, rank)``.
        scale: alpha / rank, or alpha / √rank.
        digest: of both matrices and the scale: two that agree add the same.
    """

    a: StoredTensor
    b: StoredTensor
    scale: float
    digest: str


class Adapter:
    """A LoRA adapter; opening it reads the two matrices of every module once, to check them."""

    def __init__(self, folder: Path) -> None:
        """Open a folder.

        Raises:
            UsageError: there is no such folder.
            CheckpointError: a file is missing or damaged, or its tensors are not what it says.
            UnsupportedError: another kind of adapter than plain LoRA, or pickled weights.
        """
        if not folder.is_dir():
            raise UsageError(f"There is no adapter folder {folder}.")
        check_small_files(folder)
        self.folder = folder
        self.name = folder.resolve().name
        self.config: AdapterConfig = load_adapter_config(folder)
        self.path = _weights_file(folder)
        self._identity = file_identity(self.path)
        stored = read_header(self.path)
        pairs: dict[str, dict[str, StoredTensor]] = {}
        #: Tensors that are replaced whole, by the model's names.
        self.replaced: dict[str, StoredTensor] = {}
        for name, tensor in stored.items():
            self._sort(name, tensor, pairs)
        if not stored:
            raise CheckpointError(f"{self.path} holds no tensor.")
        #: What is added, by module.
        self.added = {module: self._pair(module, both) for module, both in sorted(pairs.items())}

    @cached_property
    def identity(self) -> list[object]:
        """What tells this adapter from others, for states that are kept."""
        return [*self._identity, [(m, pair.digest) for m, pair in self.added.items()]]

    @property
    def n_tensors(self) -> int:
        """Tensors of a model that it changes."""
        return len(self.added) + len(self.replaced)

    def check_unchanged(self) -> None:
        """CheckpointError if the file was written to, or replaced, since it was opened."""
        if file_identity(self.path) != self._identity:
            raise CheckpointError(
                f"{self.path} changed while it was read; start again when nothing writes to it."
            )

    def _sort(
        self, name: str, tensor: StoredTensor, pairs: dict[str, dict[str, StoredTensor]]
    ) -> None:
        if tensor.dtype not in DTYPE_BYTES:
            raise UnsupportedError(
                f"{self.path}: tensor {name} has dtype {tensor.dtype}; known are "
                f"{', '.join(DTYPE_BYTES)}."
            )
        own = name.removeprefix(_PREFIX)
        for ending in (_A, _B):
            if own != name and own.endswith(ending):
                pairs.setdefault(own.removesuffix(ending), {})[ending] = tensor
                return
        if own == name or "lora_" in own:
            raise UnsupportedError(
                f"{self.path}: tensor {name} is no {_A[1:]} or {_B[1:]} of a module, which is all "
                "that is merged here; merge the adapter with peft's merge_and_unload."
            )
        # Of a head that is adapted peft saves the base's own weights too, and loads them again.
        self.replaced[own.replace(".base_layer.", ".")] = tensor

    def _pair(self, module: str, both: Mapping[str, StoredTensor]) -> LowRank:
        where = f"{self.path}: {module}"
        for ending in (_A, _B):
            if ending not in both:
                raise CheckpointError(
                    f"{where} has no {ending[1:]}, its other half is there; save the adapter again."
                )
        a, b = both[_A], both[_B]
        rank = self.config.rank(module)
        if len(a.shape) != 2 or len(b.shape) != 2 or (a.shape[0], b.shape[1]) != (rank, rank):
            raise CheckpointError(
                f"{where} has shapes {list(a.shape)} and {list(b.shape)}, but the rank is {rank} "
                f"by {self.config.where}."
            )
        scale = self.config.scale(module)
        digest = hashlib.blake2b(repr(scale).encode(), digest_size=8)
        for half, tensor in zip("AB", (a, b), strict=True):
            values = widened_tensor(tensor)
            if not np.isfinite(values).all():
                raise CheckpointError(
                    f"{where} has a lora_{half} with NaN or infinite weights; its training went "
                    "wrong, take an earlier checkpoint of it."
                )
            digest.update(values.tobytes())
        return LowRank(a, b, scale, digest.hexdigest())


def _weights_file(folder: Path) -> Path:
    path = folder / ADAPTER_WEIGHTS
    if path.is_file():
        return path
    if pickled := sorted(folder.glob("adapter_model*.bin")):
        raise UnsupportedError(
            f"{folder} holds only pickled weights ({pickled[0].name}), which can run code when "
            "they are opened; load the adapter once with peft and save_pretrained it."
        )
    raise CheckpointError(f"{path} is missing; save the adapter with peft's save_pretrained.")


def stored_rows(tensor: StoredTensor, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows of a tensor as they are stored; BF16 comes as ``uint16``.

    Raises:
        CheckpointError: the file cannot be read, or is shorter than it was.
    """
    stop = tensor.shape[0] if stop is None else stop
    row = tensor.nbytes // tensor.shape[0] if tensor.shape[0] else 0
    dtype = np.dtype(_NUMPY[tensor.dtype])
    count = (stop - start) * row // dtype.itemsize
    try:
        flat = np.fromfile(tensor.file, dtype, count, offset=tensor.offset + start * row)
    except OSError as e:
        raise CheckpointError(f"{tensor.file} cannot be read ({e.strerror or e}).") from None
    if len(flat) < count:
        raise CheckpointError(f"{tensor.file} ended early; it changed while it was read.")
    return flat.reshape(stop - start, *tensor.shape[1:])


def widened_tensor(tensor: StoredTensor, start: int = 0, stop: int | None = None) -> np.ndarray:
    """The same as float32, which is what peft makes of an adapter's matrices."""
    return as_floats(stored_rows(tensor, start, stop))
