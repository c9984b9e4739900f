"""The tasks of real models in the tables: what `dus-edge eval -o` wrote, to Markdown and rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dus_edge.errors import UsageError
from dus_edge.words import format_bytes, markdown_table

_WRITER = "dus-edge eval -o"


def read_evaluation(path: Path) -> dict[str, Any]:
    """An ``eval.json``; see `evaluation_json.evaluation_json`.

    Raises:
        UsageError: there is no such file, or it is of another shape.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; `{_WRITER}` writes such a file.") from None
    except (OSError, ValueError, RecursionError) as e:
        raise UsageError(f"{path} cannot be read as JSON ({e}).") from None
    try:
        _rows_of(found)
        _table(found)
        _about(found)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
        reason = f"{type(e).__name__}: {e}"
        raise UsageError(f"{path} is not what `{_WRITER}` writes ({reason}).") from None
    return found


def task_rows(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of tables.json: one for each model and group, and ``average`` of all groups."""
    return [row for found in results for row in _rows_of(found)]


def _rows_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    about = {
        "suite": found["suite"],
        "harness": found["harness"],
        "n_docs": found["documents"]["most_of_each_task"],
        "seed": found["documents"]["seed"],
    }
    rows = []
    for model in found["models"]:
        names = ("name", "kind", "file_bytes", "n_parameters", "bits_per_weight")
        own = {k: model[k] for k in names}
        scores = {"average": (model["average"], model["average_difference"])}
        differences = model["differences"] or {}
        scores |= {k: (s, differences.get(k)) for k, s in model["groups"].items()}
        for group, (score, difference) in scores.items():
            difference = difference or {}
            rows.append(
                {
                    "source": "measured",
                    **own,
                    "group": group,
                    "score": score["score"],
                    "standard_error": score["standard_error"],
                    "n_documents": score["n_documents"],
                    **{k: difference.get(k) for k in ("difference", "low", "high", "p", "p_holm")},
                    **about,
                }
            )
    return rows


def tasks_markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """The section of the tables: a table for each evaluation."""
    parts = ["## Tasks\n"]
    if not results:
        parts.append("Nothing yet. `make eval` asks its base.\n")
        return "\n".join(parts)
    parts.append(
        "What files score on the tasks that people quote, asked by `dus-edge eval`. Per cent ± one "
        "standard error; below each score its difference to the first file's in points, with the "
        "95 % interval of the paired difference, **bold** where that is clear.\n"
    )
    for found in results:
        parts += [_about(found), _table(found)]
    return "\n".join(parts)


def _about(found: Mapping[str, Any]) -> str:
    documents = found["documents"]
    n = documents["most_of_each_task"]
    asked = "All documents of each task" if n is None else f"At most {n:,} documents of each task"
    drawn = "" if n is None else f", drawn with seed {documents['seed']}"
    first = found["models"][0]
    groups = ", ".join(
        f"{g['title']} {first['groups'][g['name']]['n_documents']:,}" for g in found["groups"]
    )
    return (
        f"{asked}{drawn} ({groups}); tasks, prompts and metrics of {found['harness']}. The first "
        f"file is {first['name']}.\n"
    )


def _table(found: Mapping[str, Any]) -> str:
    groups = [(g["name"], g["title"]) for g in found["groups"]]
    head = ["file", "size", "average", *(title for _, title in groups)]
    rows = []
    for model in found["models"]:
        differences = model["differences"] or {}
        cells = [(model["average"], model["average_difference"])]
        cells += [(model["groups"][name], differences.get(name)) for name, _ in groups]
        size = format_bytes(model["file_bytes"])
        rows.append([model["short_name"], size, *(_cell(s, d) for s, d in cells)])
    return markdown_table(head, rows) + "\n"


def _cell(score: Mapping[str, Any], difference: Mapping[str, Any] | None) -> str:
    if score["score"] is None:
        return "none"
    text = f"{100 * score['score']:.1f}"
    if score["standard_error"] is not None:
        text += f" ± {100 * score['standard_error']:.1f}"
    if difference is None or difference["difference"] is None:
        return text
    points = _points(difference["difference"])
    if difference["low"] is not None and difference["high"] is not None:
        points += f" ({_points(difference['low'])} to {_points(difference['high'])})"
        clear = difference["low"] > 0 or difference["high"] < 0
        points = f"**{points}**" if clear and (difference["p"] or 0) < 0.05 else points
    return f"{text}<br>{points}"


def _points(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:+.1f}".replace("-", "−")
