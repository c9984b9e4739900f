"""The text on which ``pico`` is trained: the Python standard library's own sources.

Every function is deterministic for one installed Python, so a reader can list the
training files and the held-out files again from the interpreter alone::

    python -m dus_edge.train.pico.corpus
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Folders that hold other people's code, or nothing worth reading.
SKIPPED_PARTS = frozenset(
    {"site-packages", "dist-packages", "ensurepip", "lib-dynload", "__pycache__"}
)
TEST_PARTS = frozenset({"test", "tests", "idle_test"})
HELDOUT_MODULUS = 8
MIN_HELDOUT_BYTES = 1024
MAX_HELDOUT_BYTES = 64 * 1024  # so that no single file outweighs the others
MAX_SHARED_LINES = 0.4
MIN_LINE_CHARS = 16


@dataclass(frozen=True)
class SourceFile:
    """One source file: its path relative to the standard library, and its text."""

    path: str
    text: str

    @property
    def size(self) -> int:
        """Return the number of UTF-8 bytes of the text."""
        return len(self.text.encode("utf-8"))

    @property
    def sha256(self) -> str:
        """Return the hex SHA-256 of the text's UTF-8 bytes."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()


@dataclass(frozen=True)
class Split:
    """The corpus, split by whole files; no text occurs in two of the parts."""

    library: tuple[SourceFile, ...]
    tests: tuple[SourceFile, ...]
    heldout: tuple[SourceFile, ...]


def stdlib_dir() -> Path:
    """Return the folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_test(path: str) -> bool:
    """Say whether a relative path lies in one of the library's test packages."""
    return not TEST_PARTS.isdisjoint(Path(path).parts)


def is_table(path: str) -> bool:
    """Say whether a file is a generated table or build record rather than written code.

    The ``encodings`` package is mostly character maps; ``_sysconfigdata*`` and ``config-*``
    record the machine on which Python was built and must not be learned.
    """
    parts = Path(path).parts
    return (
        parts[0] == "encodings"
        or parts[0].startswith("config-")
        or parts[-1].startswith("_sysconfigdata")
    )


def read_source(root: Path, path: str) -> SourceFile | None:
    """Read one file as UTF-8 with ``\\n`` line ends; None if it is empty or not UTF-8."""
    try:
        text = (root / path).read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return SourceFile(path, text) if text.strip() and "\0" not in text else None


def list_sources(root: Path) -> list[SourceFile]:
    """Return the usable ``.py`` files below ``root``, sorted by relative path."""
    paths = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if SKIPPED_PARTS.isdisjoint(path.relative_to(root).parts)
    )
    sources = (read_source(root, path) for path in paths if not is_table(path))
    return [source for source in sources if source is not None]


def drop_duplicates(sources: Iterable[SourceFile]) -> list[SourceFile]:
    """Keep the first file of every distinct text, in the order given."""
    seen: dict[str, SourceFile] = {}
    for source in sources:
        seen.setdefault(source.sha256, source)
    return list(seen.values())


def long_lines(text: str) -> set[str]:
    """Return the distinct stripped lines that are long enough to be telling."""
    stripped = (line.strip() for line in text.splitlines())
    return {line for line in stripped if len(line) >= MIN_LINE_CHARS}


def line_counts(sources: Iterable[SourceFile]) -> Counter[str]:
    """Count, for every telling line, the files in which it stands."""
    counts: Counter[str] = Counter()
    for source in sources:
        counts.update(long_lines(source.text))
    return counts


def shared_fraction(source: SourceFile, counts: Mapping[str, int]) -> float:
    """Return the share (0..1) of a file's telling lines that stand in another file too."""
    lines = long_lines(source.text)
    return sum(counts[line] > 1 for line in lines) / max(1, len(lines))


def is_drawn(path: str) -> bool:
    """Draw one path in eight by its own SHA-256, so the choice needs no list."""
    digest = hashlib.sha256(path.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") % HELDOUT_MODULUS == 0


def is_heldout(source: SourceFile, counts: Mapping[str, int]) -> bool:
    """Say whether a file is held out: drawn, not a test, of middling size, no near-copy."""
    return (
        is_drawn(source.path)
        and not is_test(source.path)
        and MIN_HELDOUT_BYTES <= source.size <= MAX_HELDOUT_BYTES
        and shared_fraction(source, counts) <= MAX_SHARED_LINES
    )


def split_sources(sources: Iterable[SourceFile]) -> Split:
    """Split files into library and test training text and held-out text."""
    kept = drop_duplicates(sources)
    counts = line_counts(kept)
    heldout = [source for source in kept if is_heldout(source, counts)]
    held = {source.path for source in heldout}
    rest = [source for source in kept if source.path not in held]
    return Split(
        library=tuple(source for source in rest if not is_test(source.path)),
        tests=tuple(source for source in rest if is_test(source.path)),
        heldout=tuple(heldout),
    )


def load_split(root: Path | None = None) -> Split:
    """Read the running Python's standard library (or ``root``) and split it."""
    return split_sources(list_sources(root or stdlib_dir()))


def total_bytes(sources: Iterable[SourceFile]) -> int:
    """Return the UTF-8 bytes of all the files together."""
    return sum(source.size for source in sources)


def choose_text(files: Sequence[SourceFile], max_bytes: int) -> list[SourceFile]:
    """Whole files up to `max_bytes`, drawn by the hash of their path, in the order given."""
    chosen, left = set(), max_bytes
    for f in sorted(files, key=lambda f: hashlib.sha256(f.path.encode()).digest()):
        if f.size <= left:
            chosen.add(f.path)
            left -= f.size
    return [f for f in files if f.path in chosen]


def write_heldout(folder: Path, max_bytes: int = 250_000) -> list[Path]:
    """Write held-out text as files, whole ones up to `max_bytes`; their names keep the order.

    pico knows Python sources and nothing else: on the built-in evaluation text, which is English,
    Korean and code, it would be judged on what it never learned. No calibration reads these. An
    earlier call's files are removed from the folder first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9][0-9][0-9]-*.py"):
        old.unlink()
    paths = []
    for i, file in enumerate(choose_text(load_split().heldout, max_bytes)):
        paths.append(folder / f"{i:03}-{Path(file.path).name}")
        paths[-1].write_text(file.text, encoding="utf-8")
    return paths


def print_corpus() -> None:
    """Print the held-out files (SHA-256, bytes, path) and the size of every part."""
    split = load_split()
    for source in split.heldout:
        print(f"{source.sha256[:16]} {source.size:7d} {source.path}")
    for name in ("library", "tests", "heldout"):
        part = getattr(split, name)
        print(f"{name}: {len(part)} files, {total_bytes(part)} bytes")


if __name__ == "__main__":
    print_corpus()
