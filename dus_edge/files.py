"""Outputs that appear under their name only when they are whole.

A file is written beside its final name with the ending `.partial` and renamed at the end; after
an error or Ctrl-C the partial one is removed and what was there before is untouched.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from dus_edge.errors import OutputError
from dus_edge.words import format_bytes

PARTIAL = ".partial"


def check_writable(folder: Path) -> None:
    """See that files can be made in a folder, or that the folder can be made.

    Raises:
        OutputError: neither is so.
    """
    nearest = _nearest(folder)
    probe = nearest / f".dus-edge-{os.getpid()}{PARTIAL}"
    try:
        probe.touch()
        probe.unlink()
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
def output_files(sizes: Sequence[tuple[Path, int]]) -> Iterator[list[int]]:
    """Open one file per path, each with all its bytes reserved; rename all when the block ends.

    Args:
        sizes: final paths and their exact sizes in bytes.

    Yields:
        Descriptors for `os.pwrite`, in the order of `sizes`.

    Raises:
        OutputError: a file cannot be made or the disk is full. Nothing is left behind.
    """
    partials = [path.with_name(path.name + PARTIAL) for path, _ in sizes]
    fds: list[int] = []
    made: list[Path] = []
    try:
        for partial, (_, size) in zip(partials, sizes, strict=True):
            made += _make_folder(partial.parent)
            fds.append(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644))
            _reserve(fds[-1], size)
        yield fds
        for fd in fds:
            os.close(fd)
        fds.clear()
        for partial, (path, _) in zip(partials, sizes, strict=True):
            partial.replace(path)
    except BaseException as e:
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        for partial in partials:
            with contextlib.suppress(OSError):
                partial.unlink()
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(e, OSError):
            raise _refused(sizes[0][0], e) from None
        raise


def write_text(path: Path, text: str) -> None:
    """Write a small text file whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    data = text.encode()
    with output_files([(path, len(data))]) as (fd,):
        pwrite_all(fd, data, 0)


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
    temporary = link.with_name(link.name + PARTIAL)
    try:
        temporary.unlink(missing_ok=True)
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
    partial = folder.with_name(folder.name + PARTIAL)
    aside = folder.with_name(folder.name + ".replaced" + PARTIAL)
    made: list[Path] = []
    try:
        made = _make_folder(partial.parent)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        if folder.is_dir():
            folder.rename(aside)
        partial.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException as e:
        shutil.rmtree(partial, ignore_errors=True)
        if aside.is_dir() and not folder.exists():
            aside.rename(folder)
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()
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
    if entries and not overwrite:
        raise OutputError(f"{folder} exists; add --overwrite to replace it.")
    for entry in entries:
        if not any(entry.match(pattern) for pattern in replaceable):
            raise OutputError(
                f"{folder} holds {entry.name}, which is no part of a checkpoint; "
                "it is not replaced, choose another folder with -o."
            )


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
