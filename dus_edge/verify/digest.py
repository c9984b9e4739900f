"""SHA-256 digests of finished files, in the format of `sha256sum`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from dus_edge.checkpoint.names import DIGESTS
from dus_edge.errors import CheckpointError
from dus_edge.files import output_lock, write_text

_LINE = re.compile(r"^([0-9a-f]{64}) [ *](.+)$")
_PIECE = 1 << 22


def sha256(path: Path, advance: Callable[[int], None] = lambda n: None) -> str:
    """The digest of a file, in hexadecimal.

    Args:
        path: the file.
        advance: told of bytes read.

    Raises:
        CheckpointError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as f:
            while piece := f.read(_PIECE):
                digest.update(piece)
                advance(len(piece))
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read ({e.strerror or e}).") from None
    return digest.hexdigest()


def read_digests(path: Path) -> dict[str, str]:
    """Digests by file name; empty if there is no such file.

    Raises:
        CheckpointError: a line is none of `sha256sum`'s.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as e:
        raise CheckpointError(f"{path} cannot be read ({e}).") from None
    found = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not (match := _LINE.match(line)):
            raise CheckpointError(f"{path}: line {number} is no line of sha256sum.")
        found[match[2]] = match[1]
    return found


def write_digests(
    paths: Iterable[Path], advance: Callable[[int], None] = lambda n: None
) -> list[Path]:
    """Add the digests of some files to the `DIGESTS` beside each; others there stay.

    Returns:
        the files written.
    """
    by_folder: dict[Path, dict[str, str]] = {}
    for path in paths:
        by_folder.setdefault(path.parent, {})[path.name] = sha256(path, advance)
    for folder, digests in by_folder.items():
        target = folder / DIGESTS
        with output_lock([target], wait=True):
            write_text(target, digest_lines(read_digests(target) | digests))
    return [folder / DIGESTS for folder in by_folder]


def files_of(outputs: Iterable[Path]) -> list[Path]:
    """The files of some outputs: a file itself, of a folder all that are directly in it."""
    found: list[Path] = []
    for output in outputs:
        found += sorted(f for f in output.iterdir() if f.is_file()) if output.is_dir() else [output]
    return [path for path in found if path.name != DIGESTS]


def digest_lines(digests: Mapping[str, str]) -> str:
    """The file's text, which `sha256sum -c` reads."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
