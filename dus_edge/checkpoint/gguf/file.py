"""A GGUF model as it lies on the disk: one file or the parts of a split one, headers checked.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; how split files are named and
what they say: llama.cpp's ``tools/gguf-split``.
"""

from __future__ import annotations

import math
import mmap
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dus_edge.checkpoint.gguf.origin import type_label
from dus_edge.checkpoint.gguf.types import StoredType, stored_type
from dus_edge.checkpoint.gguf_header import (
    GGUF_MAGIC,
    GGUFLayout,
    GGUFTensor,
    array_items,
    read_layout,
)
from dus_edge.errors import CheckpointError, UnsupportedError
from dus_edge.families.family import Family, find_gguf_family, gguf_architectures
from dus_edge.stream import OpenFiles

_PART = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")
#: More parts than any model has.
_MOST_PARTS = 4096


@dataclass(frozen=True)
class PlacedTensor:
    """Where a tensor's bytes lie.

    Attributes:
        name: GGUF name.
        file: the file.
        shape: outermost dimension first.
        kind: how weights are stored.
        offset: of the first byte, from the file's start.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    kind: StoredType
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, the last dimension."""
        return self.kind.row_bytes(self.shape[-1])

    @property
    def n_rows(self) -> int:
        """Rows of blocks: all dimensions but the last."""
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes without padding."""
        return self.n_rows * self.row_bytes

    @property
    def n_elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


class GGUFModel:
    """The metadata and the tensors of a GGUF model; opening it reads headers only.

    Attributes:
        label: what the user called it.
        files: one, or the parts in order; the first has the metadata.
        values: metadata by key; arrays of numbers are None, see `array`.
        tensors: by GGUF name, in the files' order.

    Raises:
        CheckpointError: a file is missing, damaged or truncated.
        UnsupportedError: a tensor is of a type that is not known.
    """

    def __init__(self, path: Path, label: str | None = None) -> None:
        self.label = label or str(path)
        self.files = all_parts(path)
        self._identities = {file: _identity(file) for file in self.files}
        layouts = [_read_layout(file) for file in self.files]
        _check_parts(self.files, layouts)
        self.values: Mapping[str, Any] = layouts[0].values
        self._layout = layouts[0]
        self.tensors: dict[str, PlacedTensor] = {}
        for file, layout in zip(self.files, layouts, strict=True):
            for tensor in _placed(file, layout):
                if tensor.name in self.tensors:
                    raise CheckpointError(
                        f"{file}: tensor {tensor.name} stands twice; fetch the file again."
                    )
                self.tensors[tensor.name] = tensor
        self._open = OpenFiles(os.O_RDONLY)

    @cached_property
    def family(self) -> Family:
        """The family of its ``general.architecture``.

        Raises:
            UnsupportedError: it is none of ours, or a kind of it that is not.
        """
        name = self.values.get("general.architecture")
        family = find_gguf_family(name)
        if family is None:
            known = ", ".join(gguf_architectures())
            raise UnsupportedError(
                f"{self.label}: the architecture is {name!r}, which is not supported; known are "
                f"{known}."
            )
        if self.values.get(f"{name}.expert_count"):
            raise UnsupportedError(
                f"{self.label}: a mixture of experts; only dense models can be up-scaled."
            )
        return family

    @cached_property
    def n_layers(self) -> int:
        """Its layers.

        Raises:
            CheckpointError: the metadata does not say, or not what the tensors do.
        """
        key = f"{self.values.get('general.architecture')}.block_count"
        n = self.values.get(key)
        there = {layer for name in self.tensors if (layer := layer_of(name)) is not None}
        if type(n) is not int or n < 1 or there != set(range(n)):
            raise CheckpointError(
                f"{self.label}: {key} is {n!r}, and there are tensors of {len(there)} layers; "
                "fetch the file again."
            )
        return n

    @property
    def n_bytes(self) -> int:
        """Size of all files."""
        return sum(size for _, _, size, _ in self._identities.values())

    @property
    def types(self) -> Counter[str]:
        """Number of tensors by type."""
        return Counter(t.kind.name for t in self.tensors.values())

    @property
    def is_quantized(self) -> bool:
        """Whether any weights are stored in blocks, so that they were rounded before."""
        return any(t.kind.is_quantized for t in self.tensors.values())

    @property
    def type_label(self) -> str:
        """What a file's name says of its types: ``Q4_K_M``."""
        weights: Counter[str] = Counter()
        for tensor in self.tensors.values():
            weights[tensor.kind.name] += tensor.n_elements
        return type_label(self.values, weights)

    def text(self, key: str) -> str | None:
        """A value that is text; None where there is none."""
        value = self.values.get(key)
        return value if isinstance(value, str) else None

    def entry(self, key: str) -> bytes:
        """An entry's bytes as they stand: the number of its type, then the value."""
        start, stop = self._layout.spans[key]
        return self.read(self.files[0], start, stop - start)

    def array(self, key: str) -> list[Any] | None:
        """The items of an array; None where there is none."""
        value = self.values.get(key)
        if isinstance(value, list):
            return value
        return array_items(self.entry(key)) if key in self._layout.spans else None

    def read(self, file: Path, offset: int, n_bytes: int) -> bytes:
        """Bytes of a file.

        Raises:
            CheckpointError: it ends early, or cannot be read.
        """
        try:
            with self._open.use(file) as fd:
                parts, done = [], 0
                while done < n_bytes and (part := os.pread(fd, n_bytes - done, offset + done)):
                    parts.append(part)
                    done += len(part)
        except OSError as e:
            raise CheckpointError(
                f"{file} cannot be read ({e.strerror or e}); check the disk, or fetch it again."
            ) from None
        if done < n_bytes:
            raise CheckpointError(f"{file} ended early; the file changed while it was read.")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def check_unchanged(self) -> None:
        """See that the files are those whose headers were read.

        Raises:
            CheckpointError: one was written to, or replaced.
        """
        for file, before in self._identities.items():
            if _identity(file) != before:
                raise CheckpointError(
                    f"{file} changed while it was read; start again when nothing writes to it."
                )

    def close(self) -> None:
        """Close the files; reading again opens them again."""
        self._open.close()

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()


def is_gguf(path: Path) -> bool:
    """Whether a file is a GGUF by its ending, or begins as one does."""
    if path.suffix == ".gguf":
        return True
    try:
        with path.open("rb") as f:
            return f.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError:
        return False


def all_parts(path: Path) -> tuple[Path, ...]:
    """A model's files: the one itself, or all of a split one, of which any was named.

    Raises:
        CheckpointError: a part is missing.
    """
    found = _PART.match(path.name)
    if found is None:
        return (path,)
    stem, n = found[1], int(found[3])
    if not 0 < n <= _MOST_PARTS:
        raise CheckpointError(f"{path}: no model has {n} parts; rename the file.")
    parts = [path.with_name(f"{stem}-{i:05}-of-{n:05}.gguf") for i in range(1, n + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{path} is one of {n} parts, and {missing[0]}{more} is not beside it; fetch all parts."
        )
    return tuple(parts)


def without_part(stem: str) -> str:
    """A file's name without ``-00001-of-00003``, its ending gone already."""
    found = _PART.match(f"{stem}.gguf")
    return found[1] if found else stem


def layer_of(name: str) -> int | None:
    """The layer in a GGUF name; None outside layers."""
    head, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    known = head == "blk" and number.isascii() and number.isdecimal() and len(number) < 9
    return int(number) if known else None


def in_layer(name: str, layer: int) -> str:
    """The GGUF name of the same tensor in another layer."""
    return f"blk.{layer}.{name.split('.', 2)[2]}"


def _identity(file: Path) -> tuple[int, ...]:
    try:
        found = file.stat()
    except OSError as e:
        raise CheckpointError(f"{file} cannot be read ({e.strerror or e}).") from None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _read_layout(file: Path) -> GGUFLayout:
    try:
        with file.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return read_layout(view)
    except (ValueError, OSError) as e:
        raise CheckpointError(f"{file} is no GGUF file of a model ({e}); fetch it again.") from None


def _check_parts(files: Sequence[Path], layouts: Sequence[GGUFLayout]) -> None:
    """See that parts are those of one model, in their places."""
    for i, (file, layout) in enumerate(zip(files, layouts, strict=True)):
        said, n = layout.values.get("split.no", 0), layout.values.get("split.count", 1)
        if said != i or n not in ((0, 1) if len(files) == 1 else (len(files),)):
            raise CheckpointError(
                f"{file} says that it is part {said!r} of {n!r} (from 0 on), and its name that it "
                f"is {i} of {len(files)}; give the parts back their names."
            )


def _placed(file: Path, layout: GGUFLayout) -> list[PlacedTensor]:
    size = file.stat().st_size
    return [_checked(file, tensor, size) for tensor in layout.tensors]


def _checked(file: Path, tensor: GGUFTensor, size: int) -> PlacedTensor:
    where = f"{file}: tensor {tensor.name}"
    kind = stored_type(tensor.kind)
    if kind is None:
        raise UnsupportedError(f"{where} is of the unknown type {tensor.kind}.")
    shape = tensor.dims[::-1] or (1,)
    if min(shape) < 1 or shape[-1] % kind.block_weights:
        raise CheckpointError(
            f"{where} has the shape {list(shape)}, which is no whole number of {kind.name} "
            "blocks a row; fetch the file again."
        )
    placed = PlacedTensor(tensor.name, file, shape, kind, tensor.offset)
    if placed.offset + placed.nbytes > size:
        raise CheckpointError(
            f"{where} is said to end at byte {placed.offset + placed.nbytes:,} of {size:,}; the "
            "file is truncated or its header lies, fetch it again."
        )
    return placed
