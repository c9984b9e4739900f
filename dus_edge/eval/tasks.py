"""A suite's tasks as the harness makes them, with rows of ours or the hub's; what is asked."""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dus_edge.errors import CheckpointError, DusEdgeError, UnsupportedError, UsageError
from dus_edge.eval.data_files import TaskFiles, find_task_files, read_rows
from dus_edge.eval.suites import Suite, SuiteTask, TaskData, harness_folder
from dus_edge.progress import progress
from dus_edge.text.chunks import shares

#: Of the examples, as the harness's command line has it.
EXAMPLES_SEED = 1234


@dataclass(frozen=True)
class LoadedTask:
    """A task that is ready to be asked.

    Attributes:
        spec: what the suite says of it.
        task: of the harness.
        asked: numbers of the documents, ascending.
        n_documents: that it has.
        metric: that counts.
        filter: that makes answers of texts.
        n_shots: solved examples before each question.
    """

    spec: SuiteTask
    task: Any
    asked: tuple[int, ...]
    n_documents: int
    metric: str
    filter: str
    n_shots: int


def load_tasks(
    suite: Suite, data: Path | None, n_docs: int | None, seed: int
) -> tuple[LoadedTask, ...]:
    """All tasks of a suite, before any model is loaded.

    Args:
        suite: of `find_suite`.
        data: a folder of JSONL; None for the hub's data sets or their cache.
        n_docs: documents of each group, see `draw_documents`; None for all.
        seed: of their draw, which is the same for all models.

    Raises:
        UsageError: rows are missing or damaged; a task that the harness cannot ask.
        UnsupportedError: a task that runs what models write, or needs pictures.
        DependencyError: the harness is not installed.
    """
    files = {} if data is None else find_task_files(data, suite.tasks)
    folders = [str(harness_folder() / folder) for folder in suite.folders]
    loaded = []
    with quiet_harness():
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=folders, include_defaults=False)
        with progress("Reading tasks", len(suite.tasks), unit="tasks") as told:
            for spec in suite.tasks:
                loaded.append(_load(manager, spec, files.get(spec.task)))
                told(1)
    return tuple(loaded) if n_docs is None else draw_documents(loaded, n_docs, seed)


def draw_documents(tasks: Sequence[LoadedTask], n_docs: int, seed: int) -> tuple[LoadedTask, ...]:
    """The same tasks with part of their documents.

    A group's documents are spread over its tasks by what they have, such as MMLU's over its
    subjects, at least one of each. Fewer documents are part of more.

    Args:
        tasks: with all of their documents.
        n_docs: of each group at most.
        seed: of the draw.
    """
    wanted: dict[str, int] = {}
    for group in dict.fromkeys(task.spec.group for task in tasks):
        own = [task for task in tasks if task.spec.group == group]
        sizes = [task.n_documents for task in own]
        most = min(max(n_docs, len(own)), sum(sizes))
        given = shares(sizes, most)
        wanted |= {task.spec.task: n for task, n in zip(own, given, strict=True)}

    def some(task: LoadedTask) -> tuple[int, ...]:
        order = random.Random(f"{seed} {task.spec.task}").sample(
            range(task.n_documents), task.n_documents
        )
        return tuple(sorted(order[: wanted[task.spec.task]]))

    return tuple(replace(task, asked=some(task)) for task in tasks)


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """No bars, notes and warnings of the harness and of `datasets` while the block runs.

    Nor does the harness ask git for the commit of the folder that a person happens to be in, which
    says nothing of the results, and has git complain where there is no repository.
    """
    import datasets
    from lm_eval import evaluator
    from lm_eval.api import task

    names = ("lm_eval", "datasets", "huggingface_hub", "httpx")
    levels = {name: logging.getLogger(name).level for name in names}
    bars, bar = datasets.are_progress_bars_disabled(), task.tqdm
    commit = evaluator.get_git_commit_hash
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    task.tqdm = functools.partial(bar, disable=True)
    evaluator.get_git_commit_hash = lambda: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        task.tqdm = bar
        evaluator.get_git_commit_hash = commit
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def _load(manager: Any, spec: SuiteTask, files: TaskFiles | None) -> LoadedTask:
    entry = manager.task_index.get(spec.task)
    if entry is not None and (entry.cfg or {}).get("unsafe_code"):
        raise UnsupportedError(
            f"the task {spec.task} runs programs that the model writes, which is not done here; "
            "leave it out."
        )
    changes: dict[str, Any] = {"task": spec.task}
    if spec.n_shots is not None:
        changes["num_fewshot"] = spec.n_shots
    if files is not None:
        assert spec.data is not None
        changes |= _local(files, spec.data, bool(spec.n_shots))
    elif spec.data is not None and spec.n_shots and spec.data.examples:
        changes["fewshot_split"] = spec.data.examples
    try:
        found = manager.load([{"group": "suite", "task": [changes]}])["tasks"]
    except DusEdgeError:
        raise
    except Exception as e:  # of datasets, the hub, and each task's own code
        raise _explained(spec, e) from None
    task = found[spec.task]
    if getattr(task, "MULTIMODAL", False):
        raise UnsupportedError(f"the task {spec.task} shows pictures or sound; leave it out.")
    n = len(task.eval_docs)
    shots = task.get_config("num_fewshot") or 0
    metric = spec.metric or next(iter(task.aggregation()))
    return LoadedTask(
        spec, task, tuple(range(n)), n, metric, spec.filter or _first_filter(task), shots
    )


def _first_filter(task: Any) -> str:
    """The name of the filter whose scores the harness lists first."""
    return str(task._filters[0].name)


def _local(files: TaskFiles, data: TaskData, examples: bool) -> dict[str, Any]:
    """What a task's configuration has to say where its rows are ours."""
    rows, ready = read_rows(files.questions, data, files.by)
    splits = {data.questions: rows}
    if examples and files.examples is not None and data.examples is not None:
        shown, shown_ready = read_rows(files.examples, data, files.by)
        if shown_ready != ready:
            raise UsageError(
                f"{files.questions} and {files.examples} have different fields; write both as "
                "the hub has them."
            )
        splits[data.examples] = shown
    changes: dict[str, Any] = {
        "custom_dataset": _dataset(splits),
        "training_split": None,
        "validation_split": None,
        "test_split": data.questions,
        "fewshot_split": data.examples if data.examples in splits and examples else None,
    }
    if ready:
        changes["process_docs"] = None
    return changes


def _dataset(splits: dict[str, list[dict[str, Any]]]) -> Callable[..., Any]:
    def make(**_: Any) -> Any:
        import datasets

        return datasets.DatasetDict(
            {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
        )

    return make


def _explained(spec: SuiteTask, error: Exception) -> DusEdgeError:
    """Why a task could not be made, as one sentence."""
    what = spec.data.dataset if spec.data is not None else "its data set"
    kind = type(error).__name__
    reason = str(error).strip().partition("\n")[0] or kind
    if isinstance(error, ConnectionError | OSError) or "Offline" in kind or "NotFound" in kind:
        return UsageError(
            f"the task {spec.task} needs {what} of the hub, which cannot be had ({reason}); "
            "connect, or give the rows with --data."
        )
    if isinstance(error, ImportError):
        return UsageError(
            f"the task {spec.task} needs a package that is not installed ({reason}); install it."
        )
    return CheckpointError(
        f"the task {spec.task} cannot be made by lm-evaluation-harness ({kind}: {reason}); leave "
        "it out."
    )
