"""JSON files that hold one object, as checkpoints are full of; read, or refused in one sentence."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from dus_edge.errors import CheckpointError

#: No file of JSON that checkpoints hold is larger; Gemma's tokenizer.json has 34 MB.
MAX_BYTES = 128 << 20
#: Nor has more commas and brackets; that one has 4 million. Three bytes of JSON can take 60 of
#: memory.
MAX_ITEMS = 8 << 20
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]", re.ASCII)


def parse_strict(text: str) -> Any:
    """JSON as it is meant: what other readers would take another way is refused.

    Raises:
        ValueError: no JSON; a key that stands twice with different values, NaN or Infinity, a
            number of thousands of digits, or half of a surrogate pair.
    """
    if (n := sum(map(text.count, ",[{"))) > MAX_ITEMS:
        raise ValueError(f"it has {n:,} commas and brackets, more than any such file")
    value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    if _SURROGATE.search(text):
        _check_text(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise ValueError(f"the key {key!r} stands twice with different values")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _check_text(value: Any) -> None:
    """ValueError where a string cannot be written as UTF-8."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError:
                raise ValueError(
                    f"{item[:20]!r} is not valid Unicode: half of a surrogate pair"
                ) from None
        elif isinstance(item, dict):
            waiting += (*item.keys(), *item.values())
        elif isinstance(item, list):
            waiting += item


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a regular file; a pipe or a device does not make the program wait.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read, is no regular file, or has more than `most` bytes.
    """
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    with os.fdopen(fd, "rb") as f:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        if info.st_size > most:
            raise OSError(errno.EFBIG, f"it has {info.st_size:,} bytes, more than any such file")
        # By its size: room for `most` is a lot to ask for a small file.
        return f.read(info.st_size)


def read_object(path: Path, *, what: str = "", missing: str = "fetch it again") -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: the file.
        what: what messages call it; empty for its path.
        missing: the remedy where there is no such file.

    Raises:
        CheckpointError: it is missing, cannot be read, is not UTF-8, not JSON or no object.
    """
    found = find_object(path, what=what)
    if found is None:
        raise CheckpointError(f"{what or path} is missing; {missing}.")
    return found


def find_object(path: Path, *, what: str = "") -> dict[str, Any] | None:
    """The same, or None if there is no such file."""
    what = what or str(path)
    try:
        value = parse_strict(read_regular(path, MAX_BYTES).decode("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        reason = f"byte {e.start} is not UTF-8" if isinstance(e, UnicodeDecodeError) else e
        raise CheckpointError(
            f"{what} cannot be read as JSON ({reason}); fetch it again."
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not a JSON object; fetch it again.")
    return value
