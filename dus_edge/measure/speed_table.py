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
                " ± ".join(f"{x:.{2 if s.avg_ts < 1e4 else 0}f}" for x in (s.avg_ts, s.stddev_ts)),
                format_bytes(m.memory.peak_bytes) if m.memory else "",
                "" if m.load_s is None else f"{m.load_s:.2f}",
                "" if m.joules_per_token is None else f"{m.joules_per_token:.3g}",
            ]
        )
    # Columns that say nothing are left out.
    kept = [i for i in range(len(head)) if i < 3 or any(row[i] for row in rows)]
    return aligned_table(
        [head[i] for i in kept], [[row[i] for i in kept] for row in rows], left=(0, 1)
    )
