"""The files of ``--data``: JSONL with the hub's fields, a folder a data set, found before work."""

from __future__ import annotations

import fnmatch
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dus_edge.errors import UsageError
from dus_edge.eval.suites import SuiteTask, TaskData


@dataclass(frozen=True)
class TaskFiles:
    """Where a task's rows are.

    Attributes:
        questions: the file that holds those that are asked.
        examples: that of the solved examples; None where none are shown.
        by: field and value of the rows that are the task's, where the files hold others too.
    """

    questions: Path
    examples: Path | None
    by: tuple[str, str] | None


def find_task_files(folder: Path, tasks: Iterable[SuiteTask]) -> dict[str, TaskFiles]:
    """The files of each task, by its name.

    In a data set's folder, the rows of a split are in ``<split>.jsonl`` or
    ``<config>.<split>.jsonl``; a word after the split's name says what was drawn:
    ``test.sample500.jsonl``. A whole split goes before a sample.

    Args:
        folder: ``--data``.
        tasks: those with `TaskData`; of the others nothing is known here.

    Raises:
        UsageError: files are missing, all of them named; or two could be meant.
    """
    if not folder.is_dir():
        raise UsageError(f"--data {folder} is no folder; give one that holds a folder a data set.")
    found: dict[str, TaskFiles] = {}
    missing: list[str] = []
    for task in tasks:
        if task.data is None:
            continue
        needed = {"questions": task.data.questions}
        if task.n_shots and task.data.examples:
            needed["examples"] = task.data.examples
        paths: dict[str, Path] = {}
        by = None
        for what, split in needed.items():
            more = task.data.more if what == "examples" else ()
            path, shared = _find_split(folder / task.data.folder, task.data, split, more)
            if path is None:
                missing.append(_wanted(task.data, split))
                continue
            paths[what] = path
            if shared and task.data.by:
                by = (task.data.by, task.data.config or "")
        if "questions" in paths:
            found[task.task] = TaskFiles(paths["questions"], paths.get("examples"), by)
    if missing:
        names = list(dict.fromkeys(missing))
        rest = f", and {len(names) - 6} more" if len(names) > 6 else ""
        raise UsageError(
            f"--data {folder} lacks {', '.join(names[:6])}{rest}; add them, or leave --data out "
            "to take the data sets from the hub."
        )
    return found


def read_rows(
    path: Path, task: TaskData, by: tuple[str, str] | None = None
) -> tuple[list[dict[str, Any]], bool]:
    """Rows of a file in order.

    Args:
        path: JSONL.
        task: whose they are.
        by: of `TaskFiles`; only rows with that value are returned.

    Returns:
        the rows, and whether they are already as the harness makes them.

    Raises:
        UsageError: a line is no JSON object, lacks a field, or there are no rows.
    """
    rows = []
    ready: set[int] = set()
    for i, row in _all_rows(path):
        if by and str(row.get(by[0], "")) != by[1]:
            continue
        ready.add(_form(path, i, row, task.fields))
        if len(ready) > 1:
            raise UsageError(f"{path}, line {i} has other fields than the lines before it.")
        rows.append(row)
    if not rows:
        which = f" whose {by[0]} is {by[1]!r}" if by else ""
        raise UsageError(f"{path} holds no rows{which}; add them.")
    return rows, ready == {1}


def _all_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """All rows of a file with the numbers of their lines."""
    try:
        return _parsed(path, path.stat().st_mtime_ns)
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} cannot be read as UTF-8 text ({e}); write it again.") from None


# 57 subjects are rows of the same file.
@functools.lru_cache(maxsize=2)
def _parsed(path: Path, mtime_ns: int) -> list[tuple[int, dict[str, Any]]]:
    # Not `splitlines`: JSON may hold other characters that end a line.
    lines = enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
    return [(i, _row(path, i, line)) for i, line in lines if line.strip()]


def _row(path: Path, i: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise UsageError(f"{path}, line {i} is no JSON object; every line must be one row.")
    return row


def _form(path: Path, i: int, row: Mapping[str, Any], forms: Sequence[Sequence[str]]) -> int:
    """Which list of fields a row has all of; 0 where none is known."""
    for k, fields in enumerate(forms):
        if all(name in row for name in fields):
            return k
    if not forms:
        return 0
    lacking = min(([f for f in fields if f not in row] for fields in forms), key=len)
    raise UsageError(f"{path}, line {i} lacks the field {lacking[0]}; add it as the hub has it.")


def _find_split(
    folder: Path, task: TaskData, split: str, more: Sequence[str]
) -> tuple[Path | None, bool]:
    """The file of a split, and whether it may hold other configs' rows too.

    Raises:
        UsageError: two files could be meant.
    """
    names = sorted(p.name for p in folder.glob("*.jsonl")) if folder.is_dir() else []
    own = [f"{task.config}.{split}.jsonl", f"{task.config}.{split}.*.jsonl"] if task.config else []
    # A file of all configs serves only where its rows say which one they are of, or there is one.
    common = [f"{split}.jsonl", f"{split}.*.jsonl", *more] if _may_share(task) else []
    for pattern in (*own, *common):
        matching = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if len(matching) > 1:
            raise UsageError(
                f"{folder} holds {' and '.join(matching[:2])}, which both could be the split "
                f"{split}; keep one."
            )
        if matching:
            return folder / matching[0], pattern in common
    return None, False


def _may_share(task: TaskData) -> bool:
    return task.alone or task.by is not None


def _wanted(task: TaskData, split: str) -> str:
    name = split if _may_share(task) else f"{task.config}.{split}"
    return f"{task.folder}/{name}.jsonl"
