"""Run many small pieces of work on several threads, in order, with few in flight.

The work is reading, converting, quantizing and writing rows; all of it releases the GIL, so
threads use all cores, and memory is bounded by the pieces in flight.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor


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
