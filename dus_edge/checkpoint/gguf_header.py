"""What stands before a GGUF file's tensors (`docs/gguf.md` of ggml), read without the tensors.

The `gguf` package's reader wants the whole file to be sound and makes an array of every token of
the vocabulary; this one says in a sentence what is wrong, and takes a moment.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from typing import Any

GGUF_MAGIC = b"GGUF"
#: `struct`'s codes of the numbered types of values; 8 is a string and 9 an array.
_CODES = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMS = 4
#: More values, tensors or strings of a list than any model has. Each takes memory, and a hole in a
#: file, which takes no disk, is a run of empty strings.
_MOST = {"values": 1 << 16, "tensors": 1 << 20, "strings of a list": 1 << 22}


class TruncatedError(ValueError):
    """The file ends within its header."""


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One entry of the header.

    Attributes:
        name: GGUF name.
        dims: dimensions, that of a row first.
        kind: number of the type in ``enum ggml_type``.
        offset: of the data, from the file's start.
    """

    name: str
    dims: tuple[int, ...]
    kind: int
    offset: int


def read_header(view: mmap.mmap | memoryview) -> tuple[dict[str, Any], list[GGUFTensor]]:
    """Metadata and tensors.

    Args:
        view: bytes of the file, from its start.

    Returns:
        values by key, arrays of strings as lists and other arrays as None; and the tensors.

    Raises:
        ValueError: what is wrong, to be put in brackets behind the file's name; `TruncatedError`
            where the file ends too early.
    """
    return _Header(view).read()


@dataclass(frozen=True)
class GGUFLayout:
    """A header, and where in the file its parts stand.

    Attributes:
        values: by key, arrays of strings as lists and other arrays as None.
        tensors: in the file's order.
        spans: by key, the first byte of a value and the end of it: the number of its type, then
            the value.
        n_bytes: of the header, without padding.
    """

    values: dict[str, Any]
    tensors: list[GGUFTensor]
    spans: dict[str, tuple[int, int]]
    n_bytes: int


def read_layout(view: mmap.mmap | memoryview) -> GGUFLayout:
    """The same, for those who copy parts of it; see `read_header` for errors."""
    header = _Header(view)
    values, tensors = header.read()
    return GGUFLayout(values, tensors, header.spans, header.end)


def array_items(data: bytes | memoryview) -> list[Any] | None:
    """The items of an array, from the bytes of a span; None if it holds other arrays, or is none.

    Args:
        data: of an entry of `GGUFLayout.spans`, which `read_layout` has seen to be whole.
    """
    kind, item, n = struct.unpack_from("<IIQ", data) if len(data) >= 16 else (0, 0, 0)
    if kind != _ARRAY or item not in _CODES:
        return None
    return list(struct.unpack_from(f"<{n}{_CODES[item]}", data, 16))


class _Header:
    def __init__(self, view: mmap.mmap | memoryview) -> None:
        self._view = view
        self._at = 0
        self.spans: dict[str, tuple[int, int]] = {}

    @property
    def end(self) -> int:
        """Where reading stands."""
        return self._at

    def read(self) -> tuple[dict[str, Any], list[GGUFTensor]]:
        if self._view[:4] != GGUF_MAGIC:
            raise ValueError("it does not start with GGUF")
        self._at = 4
        (version,) = self._take("I")
        if version not in (2, 3):
            raise ValueError(f"its GGUF version is {version}, not 2 or 3")
        n_tensors, n_values = self._take("QQ")
        if max(n_tensors, n_values) > len(self._view):
            raise ValueError("its counts are larger than the file")
        _check_count("tensors", n_tensors)
        _check_count("values", n_values)
        values = {}
        for _ in range(n_values):
            key = self._string()
            start = self._at
            values[key] = self._value(*self._take("I"))
            self.spans[key] = start, self._at
        found = [self._tensor() for _ in range(n_tensors)]
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its general.alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        return values, [GGUFTensor(*entry, start + offset) for *entry, offset in found]

    def _take(self, codes: str) -> tuple[Any, ...]:
        form = f"<{codes}"
        try:
            found = struct.unpack_from(form, self._view, self._at)
        except struct.error:
            raise TruncatedError("it ends within its header") from None
        self._at += struct.calcsize(form)
        return found

    def _skip(self, n: int) -> None:
        if self._at + n > len(self._view):
            raise TruncatedError("it ends within its header")
        self._at += n

    def _string(self) -> str:
        (length,) = self._take("Q")
        self._skip(length)
        return bytes(self._view[self._at - length : self._at]).decode(errors="replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _CODES:
            return self._take(_CODES[kind])[0]
        if kind != _ARRAY:
            raise ValueError(f"it has a value of the unknown type {kind}")
        item, n = self._take("IQ")
        if item == _STRING:
            _check_count("strings of a list", n)
            return [self._string() for _ in range(n)]
        if item not in _CODES:
            raise ValueError(f"it has an array of the unknown type {item}")
        self._skip(n * struct.calcsize(f"<{_CODES[item]}"))
        return None

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, (n_dims,) = self._string(), self._take("I")
        if n_dims > _MOST_DIMS:
            raise ValueError(f"{name} has {n_dims} dimensions")
        return name, self._take(f"{n_dims}Q"), *self._take("IQ")


def _check_count(what: str, n: int) -> None:
    if n > _MOST[what]:
        raise ValueError(f"it has {n:,} {what}; more than {_MOST[what]:,} are not believed")
