"""Repetitions of a test, timed as llama-bench times them."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from dus_edge.measure.measurement import About, Measurement
from dus_edge.measure.resources import Meter, joules_per_token
from dus_edge.measure.workload import Workload
from dus_edge.progress import Advance


@dataclass(frozen=True)
class Timing:
    """Repetitions of one test: nanoseconds of each, and joules of all if they were counted."""

    samples_ns: tuple[int, ...]
    joules: float | None


def repeat(
    run: Callable[[], None],
    prepare: Callable[[], None],
    n: int,
    meter: Meter,
    advance: Advance,
) -> Timing:
    """Time `run` `n` times, each after an untimed `prepare`."""
    samples: list[int] = []
    joules: list[float | None] = []
    for _ in range(n):
        prepare()
        before = meter.counters()
        start = time.perf_counter_ns()
        run()
        samples.append(time.perf_counter_ns() - start)
        joules.append(meter.joules(before, meter.counters()))
        meter.poll()
        advance(1)
    counted = [j for j in joules if j is not None]
    return Timing(tuple(samples), math.fsum(counted) if len(counted) == n else None)


def measurement(
    about: About, test: Workload, timing: Timing, load_s: float, meter: Meter
) -> Measurement:
    """A finished test of this process, as a `Measurement`."""
    n, seconds = len(timing.samples_ns), sum(timing.samples_ns) / 1e9
    return Measurement(
        about=about,
        test=test,
        samples_ns=timing.samples_ns,
        samples_tokens=(test.n_tokens,) * n,
        time=now(),
        load_s=load_s,
        time_to_first_token_s=seconds / n if test.n_prompt and not test.n_gen else None,
        memory=meter.memory(),
        joules_per_token=joules_per_token(timing.joules, seconds, n * test.n_tokens),
        energy_source=meter.energy_source,
    )


def now() -> str:
    """This second, RFC 3339, UTC."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
