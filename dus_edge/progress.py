"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from dus_edge.words import format_rate, format_time

#: Seconds between plain lines, where there is no terminal.
LINE_INTERVAL_S = 10.0

Advance = Callable[[int], None]


@contextlib.contextmanager
def progress(title: str, total: int, *, unit: str = "B") -> Iterator[Advance]:
    """Show progress on stderr while the block runs.

    Args:
        title: what is being done, a few words.
        total: amount of work.
        unit: of the amount: ``B`` for bytes, or a plural such as ``weights``.

    Yields:
        A function to be told of every amount done.
    """
    if sys.stderr.isatty():
        with _bar(title, total, unit) as advance:
            yield advance
    else:
        yield _Lines(title, total, unit)


def count_resumed(advance: Advance, n: int) -> None:
    """Tell of an amount that an earlier run did: it is done, but says nothing of the rate."""
    getattr(advance, "resumed", advance)(n)


class _Lines:
    """One line now and then, for logs."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = self.earlier = 0
        self.start = self.last = time.monotonic()

    def resumed(self, n: int) -> None:
        self.done += n
        self.earlier += n

    def __call__(self, n: int) -> None:
        self.done += n
        now = time.monotonic()
        finished = self.done >= self.total
        if now - self.last < LINE_INTERVAL_S and not finished:
            return
        self.last, spent = now, now - self.start
        here = self.done - self.earlier
        left = spent * (self.total - self.done) / here if here else 0.0
        tail = f"took {format_time(spent)}" if finished else f"{format_time(left)} left"
        print(
            f"{self.title}: {self.done / max(self.total, 1):4.0%}  "
            f"{format_rate(here, spent, self.unit)}  {tail}",
            file=sys.stderr,
            flush=True,
        )


@contextlib.contextmanager
def _bar(title: str, total: int, unit: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    earlier = 0

    class Rate(ProgressColumn):
        def render(self, task):  # type: ignore[no-untyped-def]
            return Text(format_rate(task.completed - earlier, task.elapsed or 0.0, unit))

    class Told:
        def __call__(self, n: int) -> None:
            bar.advance(task, n)

        def resumed(self, n: int) -> None:
            nonlocal earlier
            earlier += n
            # Which forgets the times that rich takes the rate of.
            bar.reset(task, completed=int(bar.tasks[task].completed) + n)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        Rate(),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield Told()
