"""The bytes of a GGUF file's header: metadata, tensor directory, padding.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, little-endian. The
whole header is one pure function of its inputs, so a file's size is known before it is written.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGUFValueType as Kind

from dus_edge.checkpoint.gguf.types import StoredType
from dus_edge.checkpoint.gguf_header import GGUF_MAGIC
from dus_edge.quant.types import QuantType

VERSION = 3
#: `general.alignment`'s default: every tensor starts at a multiple of it.
GGUF_ALIGNMENT = 32

_PACK = {
    Kind.UINT8: "<B",
    Kind.INT8: "<b",
    Kind.UINT16: "<H",
    Kind.INT16: "<h",
    Kind.UINT32: "<I",
    Kind.INT32: "<i",
    Kind.FLOAT32: "<f",
    Kind.BOOL: "<?",
    Kind.UINT64: "<Q",
    Kind.INT64: "<q",
    Kind.FLOAT64: "<d",
}


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One metadata entry.

    Attributes:
        key: e.g. ``llama.block_count``.
        value: a number, bool, ``str`` or ``bytes``; for `Kind.ARRAY` a sequence of such.
        kind: the value's type in the file.
        item: the items' type, for arrays.
    """

    key: str
    value: Any
    kind: Kind
    item: Kind | None = None


@dataclass(frozen=True, slots=True)
class RawValue:
    """One metadata entry as it stood in another file.

    Attributes:
        key: its key.
        data: the number of the value's type, then the value.
    """

    key: str
    data: bytes


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One line of the tensor directory.

    Attributes:
        name: GGUF name.
        shape: outermost first (the file holds it reversed).
        kind: storage type.
        offset: from the start of the data section, in bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: QuantType | StoredType
    offset: int

    @property
    def n_weights(self) -> int:
        """Weights of the tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor without padding."""
        rows = int(np.prod(self.shape[:-1], dtype=np.int64))
        return rows * self.kind.row_bytes(self.shape[-1])


def padded(n: int) -> int:
    """`n` rounded up to the alignment."""
    return -(-n // GGUF_ALIGNMENT) * GGUF_ALIGNMENT


def encode_header(metadata: Sequence[KeyValue | RawValue], tensors: Sequence[TensorInfo]) -> bytes:
    """Everything before the tensor data, padded to the alignment."""
    parts = [GGUF_MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for kv in metadata:
        parts += [_string(kv.key), _value(kv)]
    for t in tensors:
        dims = t.shape[::-1]
        parts.append(_string(t.name))
        parts.append(struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
        parts.append(struct.pack("<IQ", t.kind.ggml_id, t.offset))
    header = b"".join(parts)
    return header + bytes(padded(len(header)) - len(header))


def data_size(tensors: Sequence[TensorInfo]) -> int:
    """Bytes of the data section; the last tensor is padded as all others are."""
    return padded(tensors[-1].offset + tensors[-1].nbytes) if tensors else 0


def lay_out(
    entries: Sequence[tuple[str, tuple[int, ...], QuantType | StoredType]],
) -> list[TensorInfo]:
    """Give every tensor its offset: one after the other, each start aligned."""
    infos, offset = [], 0
    for name, shape, kind in entries:
        infos.append(TensorInfo(name, shape, kind, offset))
        offset += padded(infos[-1].nbytes)
    return infos


def _string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else bytes(text)
    return struct.pack("<Q", len(data)) + data


def _scalar(value: Any, kind: Kind) -> bytes:
    if kind is Kind.STRING:
        return _string(value)
    return struct.pack(_PACK[kind], value)


def _value(kv: KeyValue | RawValue) -> bytes:
    if isinstance(kv, RawValue):
        return kv.data
    head = struct.pack("<I", kv.kind)
    if kv.kind is not Kind.ARRAY:
        return head + _scalar(kv.value, kv.kind)
    assert kv.item is not None, kv.key
    head += struct.pack("<IQ", kv.item, len(kv.value))
    return head + b"".join(_scalar(v, kv.item) for v in kv.value)
