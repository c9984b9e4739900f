"""What was measured, as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dus_edge.measure.measurement import Measurement, speed
from dus_edge.words import WIDTH, format_bytes


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
    lines = [[line[i] for i in kept] for line in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(kept))]
    room = WIDTH - sum(widths[1:]) - 3 * len(widths) - 1
    widths[0] = max(8, min(widths[0], room))
    rule = "|".join("-" * (w + 1) + ("-" if i < 2 else ":") for i, w in enumerate(widths))
    out = []
    for line in lines:
        cells = [_shortened(line[0], widths[0]).ljust(widths[0]), line[1].ljust(widths[1])]
        cells += [cell.rjust(w) for cell, w in zip(line[2:], widths[2:], strict=True)]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join([out[0], f"|{rule}|", *out[1:]])


def _shortened(text: str, width: int) -> str:
    """The beginning and the end, which names the format."""
    if len(text) <= width:
        return text
    tail = (width - 1) * 2 // 3
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"
