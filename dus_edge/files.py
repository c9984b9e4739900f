"""Outputs that appear under their name only when they are whole.

A file is written beside its final name, under a name of its own with the ending `.partial`, and
renamed when all of it is on the disk; after an error or Ctrl-C the partial one is removed and what
was there before is untouched. One run writes an output at a time (`locks`), so what a killed run
left behind is known to be nobody's, and the next run to the same output removes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dus_edge.errors import OutputError
from dus_edge.locks import output_lock
from dus_edge.machine import start_writing
from dus_edge.stream import OpenFiles
from dus_edge.words import format_bytes

PARTIAL = ".partial"
#: A file in a folder that is not whole yet, by which a folder of ours is known.
MARKER = ".dus-edge-partial"
#: Seconds between two requests to write back.
WRITE_BACK_S = 0.3
_LONGEST_NAME = 200


def check_writable(folder: Path) -> None:
    """See that files can be made in a folder, or that the folder can be made.

    Raises:
        OutputError: neither is so.
    """
    nearest = _nearest(folder)
    try:
        # Without a name where the system can: Ctrl-C leaves nothing.
        with tempfile.TemporaryFile(dir=nearest, prefix=".dus-edge-"):
            pass
    except OSError as e:
        raise _refused(folder, e) from None


def check_free_space(folder: Path, needed: int) -> None:
    """See that `needed` bytes fit on the folder's disk, before the first one is written.

    Raises:
        OutputError: they do not.
    """
    free = shutil.disk_usage(_nearest(folder)).free
    if needed > free:
        raise OutputError(
            f"{folder}: {format_bytes(needed)} are needed and {format_bytes(free)} are free; "
            "make room or choose another folder with -o."
        )


def check_absent(paths: Sequence[Path], overwrite: bool) -> None:
    """See that no output exists yet, unless it may be replaced.

    Raises:
        OutputError: one exists.
    """
    for path in paths:
        if path.is_dir() and not path.is_symlink() and overwrite:
            raise OutputError(f"{path} is a folder; it is not replaced by a file.")
        if os.path.lexists(path) and not overwrite:
            raise OutputError(f"{path} exists; add --overwrite to replace it.")


@contextlib.contextmanager
def held_outputs(paths: Sequence[Path]) -> Iterator[None]:
    """Keep other runs from some outputs while the block runs; leftovers of killed ones go.

    Raises:
        OutputError: another run is writing one of them, or a folder cannot be made.
    """
    with _made_folders(paths), output_lock(paths):
        for path in paths:
            remove_leftovers(path)
        yield


@contextlib.contextmanager
def output_files(sizes: Sequence[tuple[Path, int]]) -> Iterator[list[int]]:
    """Open one file per path, each with all its bytes reserved; rename all when the block ends.

    Args:
        sizes: final paths and their exact sizes in bytes.

    Yields:
        Descriptors for `os.pwrite`, in the order of `sizes`.

    Raises:
        OutputError: a file cannot be made, the disk is full, or another run writes one of them.
            Nothing is left behind.
    """
    paths = [path for path, _ in sizes]
    with held_outputs(paths):
        partials = [_partial(path) for path in paths]
        fds: list[int] = []
        try:
            for partial, (_, size) in zip(partials, sizes, strict=True):
                fds.append(open_new(partial, size))
            with _written_back(lambda: [start_writing(fd) for fd in fds]):
                yield fds
            while fds:
                os.fsync(fds[0])
                os.close(fds.pop(0))
            for partial, path in zip(partials, paths, strict=True):
                partial.replace(path)
            for folder in {path.parent for path in paths}:
                _sync(folder)
        except BaseException as e:
            for fd in fds:
                with contextlib.suppress(OSError):
                    os.close(fd)
            for partial in partials:
                with contextlib.suppress(OSError):
                    partial.unlink()
            if isinstance(e, OSError):
                raise _refused(paths[0], e) from None
            raise


@contextlib.contextmanager
def _written_back(start: Callable[[], object]) -> Iterator[None]:
    """Have the disk take what was written while the block goes on, so that little is left for sync.

    Raises:
        OSError: the disk refused; it says so only once, so it is kept for the end of the block.
    """
    ended, refused = threading.Event(), []

    def write_back() -> None:
        while not ended.wait(WRITE_BACK_S) and not refused:
            try:
                start()
            except OSError as e:
                refused.append(e)

    thread = threading.Thread(target=write_back, name="write-back", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if refused:
        raise refused[0]


def open_new(path: Path, size: int) -> int:
    """A descriptor of a file that was not there before, with all its bytes reserved.

    Raises:
        OSError: it is there, be it as a link, or the disk is full.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        _reserve(fd, size)
    except BaseException:
        os.close(fd)
        path.unlink(missing_ok=True)
        raise
    return fd


#: Writes bytes at an offset of one file.
Write = Callable[[bytes | memoryview, int], None]


@contextlib.contextmanager
def new_files(sizes: Sequence[tuple[Path, int]]) -> Iterator[list[Write]]:
    """Writers of new files in a folder that is not whole yet; see `output_files`.

    There may be more files than a process may have open.
    """
    for path, size in sizes:
        os.close(open_new(path, size))
    files = OpenFiles(os.O_RDWR | os.O_NOFOLLOW)

    def writer(path: Path) -> Write:
        def write(data: bytes | memoryview, offset: int) -> None:
            with files.use(path) as fd:
                pwrite_all(fd, data, offset)

        return write

    def start() -> None:
        for path, _ in sizes:
            with files.use(path) as fd:
                start_writing(fd)

    try:
        with _written_back(start):
            yield [writer(path) for path, _ in sizes]
    finally:
        files.close()


def remove_leftovers(output: Path) -> list[str]:
    """Remove what killed runs left of an output; its lock must be held.

    A folder is ours if `MARKER` is in it. One that a run had put aside to replace it goes back to
    its name if the new one never took it.

    Returns:
        names of what was removed or put back.
    """
    found = []
    for entry in _leftovers(output):
        with contextlib.suppress(OSError):
            if entry.name.endswith(_ASIDE):
                if os.path.lexists(output):
                    shutil.rmtree(entry)
                else:
                    entry.rename(output)
            elif entry.is_dir() and not entry.is_symlink():
                if (entry / MARKER).is_file():
                    shutil.rmtree(entry)
                else:
                    entry.rmdir()  # killed right after it was made, or not ours and not empty
            else:
                entry.unlink()
            found.append(entry.name)
    return found


def write_text(path: Path, text: str) -> None:
    """Write a small text file whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    data = text.encode()
    with output_files([(path, len(data))]) as (fd,):
        pwrite_all(fd, data, 0)


def append_text(
    path: Path, text: str, check: Callable[[str], object] = lambda before: None
) -> None:
    """Add text to a file, all or nothing; runs that add at once wait for each other.

    Args:
        path: the file, there or not.
        text: whole lines.
        check: told of what is there before; what it raises stops everything.

    Raises:
        OutputError: it cannot be written.
    """
    with _made_folders([path]), output_lock([path], wait=True):
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        check(before)
        gap = "" if not before or before.endswith("\n") else "\n"
        write_text(path, before + gap + text)


def pwrite_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`; a short write goes on until it is done."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def point_to(link: Path, target: Path) -> None:
    """Make `link` a relative symbolic link to `target` beside it, replacing an older link.

    Where the file system has no symbolic links it becomes a hard link. A file that is not a link
    of ours is left alone.

    Raises:
        OutputError: `link` is a real file, or neither kind of link can be made.
    """
    if link.exists() and not link.is_symlink() and link.stat().st_nlink < 2:
        raise OutputError(f"{link} is a file of its own, not a link; move it away.")
    temporary = _partial(link)
    try:
        try:
            temporary.symlink_to(target.name)
        except OSError:
            os.link(target, temporary)
        temporary.replace(link)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise _refused(link, e) from None


@contextlib.contextmanager
def output_folder(folder: Path, overwrite: bool, replaceable: Sequence[str]) -> Iterator[Path]:
    """Yield an empty folder beside `folder` that takes its name when the block ends.

    Args:
        folder: the final name.
        overwrite: whether a folder of that name may be replaced.
        replaceable: glob patterns; only a folder whose every entry matches one is replaced, so
            that a slip of `-o` cannot remove somebody's files.

    Raises:
        OutputError: it exists, holds other things, or cannot be written. Nothing is left behind.
    """
    check_replaceable(folder, overwrite, replaceable)
    with held_outputs([folder]):
        partial = _partial(folder)
        aside = partial.with_name(partial.name.removesuffix(PARTIAL) + _ASIDE)
        try:
            partial.mkdir()
            (partial / MARKER).touch()
            yield partial
            _sync_all(partial)
            # Again: it may have been filled while this one was made.
            check_replaceable(folder, overwrite, replaceable)
            if folder.is_dir():
                folder.rename(aside)
            partial.rename(folder)
            # Only now: a run killed before leaves a folder that is known to be ours.
            (folder / MARKER).unlink()
            _sync(folder)
            _sync(folder.parent)
            shutil.rmtree(aside, ignore_errors=True)
        except BaseException as e:
            shutil.rmtree(partial, ignore_errors=True)
            if aside.is_dir() and not folder.exists():
                aside.rename(folder)
            if isinstance(e, OSError):
                raise _refused(folder, e) from None
            raise


def check_replaceable(folder: Path, overwrite: bool, replaceable: Sequence[str]) -> None:
    """See that a folder of this name may be written; see `output_folder` for the rules."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise OutputError(f"{folder} exists and is no folder; choose another name with -o.")
    entries = sorted(folder.iterdir())
    if [e for e in entries if e.name != MARKER] and not overwrite:
        raise OutputError(f"{folder} exists; add --overwrite to replace it.")
    for entry in entries:
        if entry.name != MARKER and not any(entry.match(pattern) for pattern in replaceable):
            raise OutputError(
                f"{folder} holds {entry.name}, which is no part of a checkpoint; "
                "it is not replaced, choose another folder with -o."
            )


_ASIDE = ".replaced" + PARTIAL
_TOKEN = re.compile(r"\.[0-9a-f]{16}(\.replaced)?\.partial$")


def _partial(path: Path) -> Path:
    """A name beside `path` that no other run has."""
    return path.with_name(f"{path.name[:_LONGEST_NAME]}.{secrets.token_hex(8)}{PARTIAL}")


def _leftovers(output: Path) -> list[Path]:
    """Entries beside an output that are named as its partial ones are."""
    stem = output.name[:_LONGEST_NAME]
    try:
        entries = sorted(output.parent.iterdir())
    except OSError:
        return []
    return [e for e in entries if e.name.startswith(stem) and _TOKEN.fullmatch(e.name[len(stem) :])]


def _sync(path: Path) -> None:
    """Have the disk hold a file or a folder's entries; where it cannot be asked, go on."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
    finally:
        os.close(fd)


def _sync_all(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync(Path(parent, name))
        _sync(Path(parent))


@contextlib.contextmanager
def _made_folders(paths: Sequence[Path]) -> Iterator[None]:
    """Make the parents of some outputs; those that were not there go again after an error."""
    made: list[Path] = []
    try:
        try:
            for path in paths:
                made += _make_folder(path.parent)
        except OSError as e:
            raise _refused(paths[0], e) from None
        yield
    except BaseException:
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _nearest(folder: Path) -> Path:
    """The folder itself or the closest of its parents that exists."""
    folder = folder.absolute()
    return next(p for p in (folder, *folder.parents) if os.path.lexists(p))


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder and its parents; the ones that were not there, outermost first."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _reserve(fd: int, size: int) -> None:
    """Take the bytes from the disk at once, so that a full one is met before hours of work."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(fd, size)


def _refused(path: Path, e: OSError) -> OutputError:
    if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError(f"{path} cannot be written: the disk is full; make room and try again.")
    return OutputError(f"{path} cannot be written ({e.strerror or e}); choose another with -o.")
