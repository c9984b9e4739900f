"""Which tasks a suite has and how each is asked: `data/evaluation.toml`, or the harness's files.

Nothing here imports lm-evaluation-harness: its task files are found and read as text, in a second,
where its own index of all of them takes half a minute.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from dus_edge import data
from dus_edge.errors import UsageError
from dus_edge.packages import require

SUITES_FILE = "evaluation.toml"
#: What the tables say of a task whose language nobody stated; ISO 639's "undetermined".
UNKNOWN_LANGUAGE = "und"


@dataclass(frozen=True)
class TaskData:
    """The rows that a task needs.

    Attributes:
        dataset: on the hub.
        config: of that data set; None where it has one only.
        folder: in ``--data``.
        questions: the split that is asked.
        examples: the split that solved examples come from; None where none are shown.
        alone: whether the folder holds no other config's rows.
        by: the field that says which config a row is of, where one file holds several; or None.
        more: patterns of file names that may hold the examples too.
        fields: lists of fields; every row has all of one of them. Those of the second list are
            what the harness makes of the first, and are taken as they are. Empty: not known.
    """

    dataset: str
    config: str | None
    folder: str
    questions: str
    examples: str | None
    alone: bool = True
    by: str | None = None
    more: tuple[str, ...] = ()
    fields: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class SuiteTask:
    """A task and how it is asked.

    Attributes:
        task: the harness's name.
        folder: of ``lm_eval/tasks`` that defines it, such as ``mmlu/default``.
        group: the suite's row that it belongs to.
        n_shots: solved examples before each question; None for the harness's own number.
        metric: that counts; None for the harness's first.
        filter: that makes answers of generated text; None for the harness's first.
        language: ``en``, ``ko``, …; `UNKNOWN_LANGUAGE` where it is not known.
        data: the rows it needs; None where only the harness knows.
    """

    task: str
    folder: str
    group: str
    n_shots: int | None
    metric: str | None
    filter: str | None
    language: str
    data: TaskData | None = None


@dataclass(frozen=True)
class PublishedScores:
    """Somebody's figures for a suite, per cent by group, and where they were read."""

    name: str
    scores: Mapping[str, float]
    source: str


@dataclass(frozen=True)
class Suite:
    """Tasks in order.

    Attributes:
        name: ``h6``, ``ko``, or tasks' names with commas between.
        title: for a page's head.
        tasks: every one of the harness, subjects too.
        titles: of the groups, in order.
        published: others' figures.
        published_note: why those are not measured the same way.
    """

    name: str
    title: str
    tasks: tuple[SuiteTask, ...]
    titles: Mapping[str, str]
    published: tuple[PublishedScores, ...] = ()
    published_note: str = ""
    folders: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        folders = tuple(dict.fromkeys(task.folder for task in self.tasks))
        object.__setattr__(self, "folders", folders)

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the rows, in order."""
        return tuple(dict.fromkeys(task.group for task in self.tasks))


def find_suite(text: str) -> Suite:
    """The suite that ``--suite`` asks for.

    Args:
        text: a suite's name, or names of the harness's tasks, groups and tags with commas between;
            those are asked with the harness's own shots and metrics.

    Raises:
        UsageError: no such suite or task; the nearest is suggested. Or a name stands there twice.
        DependencyError: tasks are named and the harness is not installed.
    """
    known = suite_names()
    if text.strip().lower() in known:
        return load_suite(text.strip().lower())
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(f"--suite names no task; give {' or '.join(known)}, or tasks' names.")
    index = harness_index(harness_folder())
    tasks: dict[str, SuiteTask] = {}
    for name in names:
        for leaf in _leaves(name, index):
            if leaf in tasks:
                raise UsageError(f"--suite: {leaf} is asked twice; {name} and others name it.")
            folder = index.tasks[leaf]
            language = _languages().get(folder.split("/")[0], UNKNOWN_LANGUAGE)
            rows = _known_rows().get(leaf)
            tasks[leaf] = SuiteTask(leaf, folder, name, None, None, None, language, rows)
    title = f"Tasks of lm-evaluation-harness: {', '.join(names)}"
    return Suite(",".join(names), title, tuple(tasks.values()), {name: name for name in names})


def suite_names() -> tuple[str, ...]:
    """The names of all suites."""
    return tuple(_tables()["suite"])


@cache
def load_suite(name: str) -> Suite:
    """A suite of `data/evaluation.toml`.

    Raises:
        KeyError: there is none of that name.
    """
    table = _tables()["suite"][name]
    groups = table["group"]
    return Suite(
        name=name,
        title=table["title"],
        tasks=tuple(task for entry in groups for task in _tasks_of(entry)),
        titles={entry["name"]: entry["title"] for entry in groups},
        published=tuple(PublishedScores(**entry) for entry in table.get("published", ())),
        published_note=table.get("note", ""),
    )


@cache
def _known_rows() -> Mapping[str, TaskData]:
    """What tasks of our suites need, for those who name them one by one."""
    tasks = [task for name in suite_names() for task in load_suite(name).tasks]
    return {task.task: task.data for task in tasks if task.data is not None}


@cache
def _tables() -> dict[str, Any]:
    return tomllib.loads(data.read_text(SUITES_FILE))


def _languages() -> Mapping[str, str]:
    return _tables()["languages"]


def _tasks_of(entry: Mapping[str, Any]) -> Iterator[SuiteTask]:
    """The tasks of an entry of the file, one for each config."""
    names = [(name, entry.get("config")) for name in entry.get("task_names", ())]
    if "task" in entry:
        renamed = entry.get("tasks", {})
        names += [
            (renamed.get(config) or entry["task"].format(_spelled(config or "")), config)
            for config in entry.get("configs", [entry.get("config")])
        ]
    for name, config in names:
        rows = TaskData(
            dataset=entry["dataset"],
            config=config,
            folder=entry["data"],
            questions=entry["questions"],
            examples=entry.get("examples"),
            alone="configs" not in entry,
            by=entry.get("by"),
            more=tuple(entry.get("more", ())),
            fields=tuple(map(tuple, entry["fields"])),
        )
        yield SuiteTask(
            task=name,
            folder=entry["folder"],
            group=entry["name"],
            n_shots=entry["shots"],
            metric=entry["metric"],
            filter=entry.get("filter"),
            language=entry["language"],
            data=rows,
        )


def _spelled(config: str) -> str:
    return config.replace("-", "_").lower()


# -- the harness's own files ----------------------------------------------------------------------


@dataclass(frozen=True)
class HarnessIndex:
    """What the harness's task files define.

    Attributes:
        tasks: folder of each task.
        members: names under each group and each tag: tasks, groups and tags.
    """

    tasks: Mapping[str, str]
    members: Mapping[str, tuple[str, ...]]


def harness_folder() -> Path:
    """``lm_eval/tasks`` of the installed harness, which is not imported.

    Raises:
        DependencyError: it is not installed.
    """
    require("eval", "tasks are read by", "lm_eval")
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    return Path(next(iter(spec.submodule_search_locations or ()))) / "tasks"


_KEY = re.compile(
    r"^[\"']?(task|group|tag|include)[\"']?[ \t]*:[ \t]*(.*?)[ \t]*(?:#.*)?$", re.MULTILINE
)
_ITEM = re.compile(r"^[ \t]*-[ \t]+(?:[\"']?(?:task|group)[\"']?:[ \t]*)?[\"']?([\w.:+/-]+)[\"']?")
_NAME = re.compile(r"[\w.:+/-]+")


@cache
def harness_index(folder: Path) -> HarnessIndex:
    """The names in all task files below a folder.

    The files are looked through line by line: names and lists of names are all that is needed,
    and reading all fourteen thousand as YAML takes half a minute.
    """
    tasks: dict[str, str] = {}
    members: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.yaml")):
        keys = _keys(path)
        group, task = (keys.get(key, [""])[0] for key in ("group", "task"))
        if _NAME.fullmatch(group):
            members.setdefault(group, keys.get("task", []))
        elif _NAME.fullmatch(task):
            tasks.setdefault(task, path.parent.relative_to(folder).as_posix())
            for tag in keys.get("tag", ()):
                members.setdefault(tag, []).append(task)
    return HarnessIndex(tasks, {name: tuple(own) for name, own in members.items()})


def _keys(path: Path, deepest: int = 8) -> dict[str, list[str]]:
    """The names after each key of a task file, those of the files that it includes too."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    own = {m[1]: _listed(text, m[2], m.end()) for m in _KEY.finditer(text)}
    found: dict[str, list[str]] = {}
    if deepest:
        for name in own.pop("include", ()):
            found |= _included(path.parent / name, deepest - 1)
    return found | own


@cache
def _included(path: Path, deepest: int) -> dict[str, list[str]]:
    return _keys(path, deepest)


def _listed(text: str, value: str, end: int) -> list[str]:
    """The names after a key that ends at `end`: one beside it, ``[a, b]``, or one a line below."""
    if value:
        return [name.strip(" \"'") for name in value.strip("[]").split(",") if name.strip(" \"'")]
    found = []
    for line in text[end + 1 :].split("\n"):
        if line.strip() and not line.startswith((" ", "\t", "-", "#")):
            break
        if match := _ITEM.match(line):
            found.append(match[1])
    return found


def _leaves(name: str, index: HarnessIndex, above: tuple[str, ...] = ()) -> list[str]:
    """The tasks that a name stands for.

    Raises:
        UsageError: it stands for none.
    """
    if name in index.tasks:
        return [name]
    if name in index.members and name not in above:
        inner = [_leaves(own, index, (*above, name)) for own in index.members[name]]
        return list(dict.fromkeys(leaf for leaves in inner for leaf in leaves))
    if above:
        raise UsageError(
            f"--suite {above[0]}: its member {name} is defined inside a group of the harness and "
            "cannot be asked alone; name tasks instead."
        )
    near = difflib.get_close_matches(name.lower(), suite_names(), n=1, cutoff=0.5)
    # A low cutoff would have it compare fifteen thousand names in full: half a minute.
    near = near or difflib.get_close_matches(name, [*index.members, *index.tasks], n=1)
    hint = f"did you mean {near[0]}?" if near else f"the suites are {', '.join(suite_names())}."
    raise UsageError(f"There is no suite or task {name!r}; {hint}")
