"""A finished model read whole, its digest against what was kept of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dus_edge.checkpoint.names import DIGESTS
from dus_edge.errors import CheckpointError, DusEdgeError, UsageError
from dus_edge.progress import progress
from dus_edge.verify.digest import read_digests, sha256
from dus_edge.verify.folder import folder_bytes, verify_folder
from dus_edge.verify.gguf import data_bytes, verify_gguf


@dataclass(frozen=True)
class Verified:
    """What came of one file or folder.

    Attributes:
        path: as it was named.
        problem: one sentence; None for a sound one.
        facts: what was found in a sound one.
        n_digests: files whose digest was compared, and agreed.
    """

    path: Path
    problem: str | None
    facts: dict[str, Any] = field(default_factory=dict)
    n_digests: int = 0


def verify(paths: list[Path], digests: Path | None = None) -> list[Verified]:
    """Read models whole.

    Args:
        paths: GGUF files and checkpoint folders.
        digests: file of `sha256sum`; None for the one beside or in each, if it is there.

    Raises:
        UsageError: nothing is at a path.
    """
    for path in paths:
        if not path.exists():
            raise UsageError(f"{path} does not exist; name a GGUF file or a checkpoint's folder.")
    total = sum(_work(path) for path in paths)
    with progress("Verifying", total) as tick:
        return [_verify(path, digests, tick) for path in paths]


def _work(path: Path) -> int:
    return folder_bytes(path) if path.is_dir() else data_bytes(path)


def _verify(path: Path, digests: Path | None, tick: Any) -> Verified:
    try:
        facts = verify_folder(path, tick) if path.is_dir() else verify_gguf(path, tick)
        n = _compare(path, digests)
    except DusEdgeError as e:
        return Verified(path, str(e))
    return Verified(path, None, facts, n)


def _compare(path: Path, digests: Path | None) -> int:
    """Files whose digests agree with those that were kept."""
    folder = path if path.is_dir() else path.parent
    source = digests or folder / DIGESTS
    kept = read_digests(source)
    if digests is not None and not kept:
        raise CheckpointError(f"{digests} has no digests.")
    names = [path.name] if not path.is_dir() else sorted(kept)
    n = 0
    for name in names:
        if name not in kept:
            continue
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing; {source} has its digest.")
        if sha256(folder / name) != kept[name]:
            raise CheckpointError(
                f"{folder / name} is not the file whose digest is in {source}; fetch it again."
            )
        n += 1
    return n
