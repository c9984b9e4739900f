"""The tables of what fits and how fast: SOLAR's shape on every device, and what was measured.

``TABLES.md`` is for people. ``tables.json`` is one object of five lists, so that nobody takes one
kind for another: ``{"predicted": […], "measured": […], "quality": […], "divergence": […],
"tasks": […]}``. Every row has ``"source"``, ``"predicted"`` or ``"measured"``. Rows of
``predicted`` have the keys of `bench predict --json` and their ``preset``; of ``measured``, those
of a line of `bench run -o`; of ``quality``, those of `measured.quality_rows`; of ``divergence``,
those of `frontier.medians.MedianRun`; of ``tasks``, those of `tasks.task_rows`. ``tables.csv`` has
the rows of all five, told apart by its columns ``source`` and ``table`` (the list's name). Every
other column belongs to one of the five and is empty in the rest; those of the last four begin with
the list's name and ``_``.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dus_edge.files import check_absent, check_writable, output_files, pwrite_all
from dus_edge.measure.record import read_divergence, read_lines, read_quality
from dus_edge.predict.report import prediction_json
from dus_edge.progress import Advance
from dus_edge.tables.frontier.medians import divergence_rows
from dus_edge.tables.measured import (
    CSV_KEYS,
    Line,
    measured_rows,
    quality_rows,
)
from dus_edge.tables.predicted import (
    MODEL,
    Row,
    predict_all,
    solar_config,
)
from dus_edge.tables.predicted_markdown import tables_markdown
from dus_edge.tables.tasks import read_evaluation, task_rows

#: Files below the tables' folder that are read where no others are named.
MEASURED = Path("results") / "measured.jsonl"
QUALITY = Path("results") / "quality.json"
EVALUATION = Path("results") / "eval.json"
DIVERGENCE = Path("results") / "divergence.jsonl"


@dataclass(frozen=True)
class MeasuredResults:
    """What was measured, read from files.

    Attributes:
        lines: of `bench run -o`.
        quality: results of `dus-edge quality -o`, as JSON.
        tasks: of `dus-edge eval -o`, as JSON.
        divergence: lines of the divergence benchmark.
    """

    lines: Sequence[Line] = ()
    quality: Sequence[Mapping[str, Any]] = ()
    tasks: Sequence[Mapping[str, Any]] = ()
    divergence: Sequence[Mapping[str, Any]] = ()


def write_tables(
    folder: Path,
    *,
    overwrite: bool,
    measured: Sequence[Path] = (),
    quality: Sequence[Path] = (),
    evaluations: Sequence[Path] = (),
    divergence: Sequence[Path] = (),
    also: Mapping[str, Callable[[MeasuredResults], str]] | None = None,
    advance: Advance = lambda n: None,
) -> list[Path]:
    """Write TABLES.md, tables.csv and tables.json, all or none; returns their paths.

    Args:
        folder: for them.
        overwrite: whether they may be replaced.
        measured: files of `bench run -o`; none means `MEASURED` of the folder, if it is there.
        quality: files of `dus-edge quality -o`; none means `QUALITY` of the folder, if it is there.
        evaluations: files of `dus-edge eval -o`; none means `EVALUATION` of the folder, if it is
            there.
        divergence: files of ``bench_divergence.py``; none means `DIVERGENCE` of the folder, if it
            is there.
        also: other files that are written with them, by name, and what makes their text.
        advance: is told of every device and size of memory that is done.

    Raises:
        OutputError: one exists and is not to be replaced, or the folder cannot be written.
        UsageError: a file of what was measured is missing or damaged.
    """
    also = also or {}
    paths = [folder / name for name in ("TABLES.md", "tables.csv", "tables.json", *also)]
    check_absent(paths, overwrite)
    check_writable(folder)
    runs = divergence or _there(folder / DIVERGENCE)
    there = MeasuredResults(
        [line for path in measured or _there(folder / MEASURED) for line in read_lines(path)],
        [read_quality(path) for path in quality or _there(folder / QUALITY)],
        [read_evaluation(path) for path in evaluations or _there(folder / EVALUATION)],
        [line for path in runs for line in read_divergence(path)],
    )
    settings, rows = predict_all(solar_config(), MODEL.replace(" ", "-"), advance)
    measurements = (there.lines, there.quality, there.tasks, there.divergence)
    found = as_json(rows, *measurements)
    texts = (
        tables_markdown(settings, rows, *measurements),
        as_csv(found),
        json.dumps(found) + "\n",
    )
    texts += tuple(make(there) for make in also.values())
    blobs = [text.encode() for text in texts]
    sizes = [(path, len(blob)) for path, blob in zip(paths, blobs, strict=True)]
    with output_files(sizes) as fds:
        for fd, blob in zip(fds, blobs, strict=True):
            pwrite_all(fd, blob, 0)
    return paths


def _there(path: Path) -> tuple[Path, ...]:
    return (path,) if path.exists() else ()


# For programs


def as_json(
    rows: Sequence[Row],
    lines: Iterable[Line] = (),
    results: Iterable[Mapping[str, Any]] = (),
    evaluations: Iterable[Mapping[str, Any]] = (),
    divergence: Iterable[Mapping[str, Any]] = (),
) -> dict[str, list[dict[str, Any]]]:
    """The object of tables.json; see the module."""
    predicted = [
        {"source": "predicted", "preset": preset, **prediction_json(p)}
        for row in rows
        for preset, p in row.cells.items()
    ]
    return {
        "predicted": predicted,
        "measured": measured_rows(lines),
        "quality": quality_rows(results),
        "divergence": divergence_rows(divergence),
        "tasks": task_rows(evaluations),
    }


def as_csv(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The rows of `as_json`, flat."""
    columns: dict[str, Mapping[str, str]] = {}
    flat: list[dict[str, Any]] = []
    for name, rows in tables.items():
        for row in rows:
            cells = {k: v for k, v in row.items() if k not in ("source", "memory")}
            cells |= row.get("memory", {})
            if name == "measured":
                cells = {k: row[k] for k in CSV_KEYS}
            prefix = "" if name == "predicted" else f"{name}_"
            columns.setdefault(name, {k: prefix + k for k in cells})
            flat.append(
                {"source": row["source"], "table": name}
                | {columns[name][k]: v for k, v in cells.items()}
            )
    head = ["source", "table", *(k for names in columns.values() for k in names.values())]
    out = io.StringIO()
    writer = csv.DictWriter(out, head, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()
