"""One run writes an output at a time.

A lock is an `flock` on a small hidden file beside the output. The kernel lets go of it when the
process ends, however it ends, so a lock that is held means a run that lives. Where the file system
knows no such locks, outputs are written without.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from dus_edge.errors import OutputError

try:
    import fcntl
except ImportError:  # no POSIX
    fcntl = None  # type: ignore[assignment]

#: What file systems without locks answer.
_UNABLE = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_LONGEST_NAME = 200

#: Locks of this process, by path: how many blocks hold each, and its descriptor.
_held: dict[Path, list[int]] = {}
_guard = threading.RLock()


def lock_path(output: Path) -> Path:
    """The file that is locked while `output` is written."""
    return output.with_name(f".{output.name[:_LONGEST_NAME]}.lock")


@contextlib.contextmanager
def output_lock(outputs: Sequence[Path], *, wait: bool = False) -> Iterator[None]:
    """Hold the locks of some outputs while the block runs; this process may hold them already.

    Args:
        outputs: files or folders, there or not; their parents must be.
        wait: for another run to end, instead of giving up.

    Raises:
        OutputError: another run is writing one of them, or the folder refuses a lock's file.
    """
    with contextlib.ExitStack() as stack:
        # In one order, so that two runs cannot each wait for the other.
        for output in sorted({o.absolute() for o in outputs}):
            stack.enter_context(_one(output, wait))
        yield


@contextlib.contextmanager
def _one(output: Path, wait: bool) -> Iterator[None]:
    path = lock_path(output)
    with _guard:
        if path in _held:
            _held[path][0] += 1
        else:
            fd = _locked(path, output, wait)
            _held[path] = [1, fd]
    try:
        yield
    finally:
        with _guard:
            _held[path][0] -= 1
            if not _held[path][0]:
                _, fd = _held.pop(path)
                if fd >= 0:
                    # Removed while it is locked: whoever opened it meanwhile sees it gone.
                    with contextlib.suppress(OSError):
                        path.unlink()
                    os.close(fd)


def _locked(path: Path, output: Path, wait: bool) -> int:
    """A descriptor that holds the lock; −1 where there are no locks."""
    if fcntl is None:
        return -1
    how = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as e:
            raise OutputError(
                f"{output} cannot be written ({e.strerror or e}); choose another with -o."
            ) from None
        try:
            fcntl.flock(fd, how)
            # Its holder may have removed it between our opening and our lock.
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
            os.close(fd)
        except FileNotFoundError:
            os.close(fd)
        except BlockingIOError:
            os.close(fd)
            raise OutputError(
                f"{output}: another run is writing this; wait for its end, or choose another "
                "name with -o."
            ) from None
        except OSError as e:
            os.close(fd)
            if e.errno in _UNABLE:
                return -1
            raise OutputError(f"{path} cannot be locked ({e.strerror or e}).") from None
        except BaseException:
            os.close(fd)
            raise
