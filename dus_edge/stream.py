"""Run many small pieces of work on several threads, in order, with few in flight.

The work is reading, converting, quantizing and writing rows; all of it releases the GIL, so
threads use all cores, and memory is bounded by the pieces in flight. A checkpoint may lie in more
files than a process may have open, so few of them are.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

#: Files of one kind that are open at a time, where the system allows that many.
MOST_OPEN = 64


def run_tasks(
    tasks: Iterable[Callable[[], int]],
    *,
    n_threads: int,
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Run every task; the first error stops the rest and is raised.

    Args:
        tasks: callables returning how much they did, in the progress bar's unit. Taken lazily.
        n_threads: worker threads.
        advance: called in this thread with each task's result, in order.
    """
    pending: deque[Future[int]] = deque()
    with ThreadPoolExecutor(n_threads, thread_name_prefix="stream") as pool:
        try:
            for task in tasks:
                pending.append(pool.submit(task))
                # One waiting task per thread keeps every core busy; more would only hold memory.
                if len(pending) > 2 * n_threads:
                    advance(pending.popleft().result())
            while pending:
                advance(pending.popleft().result())
        except BaseException:
            for future in pending:
                future.cancel()
            raise


class OpenFiles:
    """Descriptors of many files, few of them open at a time; threads share them.

    Args:
        flags: for `os.open`.
        most: files that stay open; those in use come on top.
    """

    def __init__(self, flags: int, most: int | None = None) -> None:
        self._flags = flags | os.O_CLOEXEC
        self._most = most if most is not None else _fair_share()
        self._open: OrderedDict[Path, tuple[int, list[None]]] = OrderedDict()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def use(self, path: Path) -> Iterator[int]:
        """A descriptor of a file, open at least while the block runs.

        Raises:
            OSError: it cannot be opened.
        """
        with self._lock:
            fd, users = self._open[path] if path in self._open else self._opened(path)
            self._open.move_to_end(path)
            users.append(None)
        try:
            yield fd
        finally:
            with self._lock:
                users.pop()

    def close(self) -> None:
        """Close all; using one again opens it again."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1][0])

    def _opened(self, path: Path) -> tuple[int, list[None]]:
        self._make_room(self._most - 1)
        try:
            fd = os.open(path, self._flags)
        except OSError as e:
            if e.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            self._make_room(0)
            fd = os.open(path, self._flags)
        self._open[path] = fd, []
        return self._open[path]

    def _make_room(self, stay: int) -> None:
        """Close files that nobody uses, the longest unused first, until so many are open."""
        for path, (fd, users) in list(self._open.items()):
            if len(self._open) <= stay:
                return
            if not users:
                os.close(fd)
                del self._open[path]


def _fair_share() -> int:
    """A quarter of what the process may have open: input, output and the rest share it."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except (ImportError, OSError, ValueError):
        return MOST_OPEN
    return max(2, min(MOST_OPEN, limit // 4)) if limit > 0 else MOST_OPEN
