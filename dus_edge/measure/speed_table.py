"""What was measured, as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dus_edge.measure.measurement import Measurement, speed
from dus_edge.words import aligned_table, format_bytes


def speed_table(measurements: Sequence[Measurement]) -> str:
    """For people: a Markdown table, no line over 80 columns; memory includes the process's own."""
    head = ["model", "test", "tokens/s", "memory", "load s", "J/token"]
    rows = []
    for m in measurements:
        s = speed(m.samples_ns, m.samples_tokens)
        rows.append(
            [
                Path(m.about.model_filename).name,
                m.test.name,
                " ± ".join(_figure(x, 2 if s.avg_ts < 1e4 else 0) for x in (s.avg_ts, s.stddev_ts)),
                _size(m.memory.peak_bytes) if m.memory else "",
                "" if m.load_s is None else _figure(m.load_s, 2),
                "" if m.joules_per_token is None else _figure(m.joules_per_token),
            ]
        )
    # Columns that say nothing are left out.
    kept = [i for i in range(len(head)) if i < 3 or any(row[i] for row in rows)]
    return aligned_table(
        [head[i] for i in kept], [[row[i] for i in kept] for row in rows], left=(0, 1), least=6
    )


def _figure(x: float, digits: int | None = None) -> str:
    """With that many decimals, or three digits that count; at most 9 characters."""
    text = f"{x:.3g}" if digits is None else f"{x:.{digits}f}"
    return text if len(text) <= 8 else f"{x:.1e}"


def _size(n: float) -> str:
    """As `format_bytes` writes it; at most 12 characters."""
    text = format_bytes(n)
    return text if len(text) <= 12 else f"{n / 2**30:.1e} GiB"
