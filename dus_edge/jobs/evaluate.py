"""The jobs of `eval`: models on tasks, and how much of a training text the tasks' questions are."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dus_edge.eval.contamination import TaskOverlap, contaminated
from dus_edge.eval.results import EvalResults, EvaluatedModel
from dus_edge.eval.run import evaluate_model, harness_version
from dus_edge.eval.suites import Suite, find_suite
from dus_edge.eval.tasks import LoadedTask, load_tasks, quiet_harness
from dus_edge.files import check_writable, held_outputs, write_text
from dus_edge.jobs.export.checkpoint import export_checkpoint
from dus_edge.machine import user_cache
from dus_edge.packages import require
from dus_edge.progress import progress
from dus_edge.quality.compare import check_runnable, locate_model
from dus_edge.run.llama import CacheType
from dus_edge.run.open import inspect_source
from dus_edge.run.source import SourceInfo
from dus_edge.tables.evaluation import check_evaluation_outputs, model_names, write_evaluation
from dus_edge.text.documents import read_documents
from dus_edge.upscale.model import ChoosePlan, Say, find_model

#: Folder of the answers, in the output folder or the user's cache.
ANSWERS = "answers"


@dataclass(frozen=True)
class EvalOptions:
    """What a person asks of `eval`.

    Attributes:
        suite: ``h6``, ``ko``, or names of the harness's tasks.
        n_docs: documents of each group of tasks; None for all.
        seed: of their draw.
        data: a folder of JSONL; None for the hub or its cache.
        device: see `dus_edge.run.open.open_source`.
        n_threads: of the CPU; None for all cores.
        cache: type of keys and values in llama.cpp.
        out: folder of the page; None for none.
        plots: whether to draw.
        overwrite: replace a page that is there.
    """

    suite: str = "h6"
    n_docs: int | None = None
    seed: int = 0
    data: Path | None = None
    device: str = "cpu"
    n_threads: int | None = None
    cache: CacheType = "f32"
    out: Path | None = None
    plots: bool = True
    overwrite: bool = False


def evaluate(
    names: Sequence[str], choose: ChoosePlan, options: EvalOptions, say: Say
) -> tuple[EvalResults, list[Path]]:
    """Ask every model the same questions.

    All that can be refused is refused before the first one is loaded. Answers are kept as they
    come, and a run that was cut short goes on where it was.

    Args:
        names: GGUF files, folders, ``pico`` or hub ids; the first is the reference.
        choose: a plan for those that are bases, which are then asked as they are and up-scaled;
            the identity leaves them alone.
        options: see there.
        say: takes lines for the user.

    Returns:
        what was found, and the files that were written.

    Raises:
        UsageError: no such model, task or device; rows are missing.
        CheckpointError: a damaged model.
        OutputError: the page exists, or cannot be written.
        DependencyError: a package is missing.
    """
    check_packages_of_eval()
    if options.out is not None:
        check_evaluation_outputs(options.out, plots=options.plots, overwrite=options.overwrite)
    suite = find_suite(options.suite)
    asked = {name: inspect_source(*locate_model(name)) for name in names}
    check_runnable(list(asked.values()), options.device)
    tasks = load_tasks(suite, options.data, options.n_docs, options.seed)
    with contextlib.ExitStack() as stack:
        infos = [
            info
            for name, given in asked.items()
            for info in stack.enter_context(_depths(name, given, choose, options.out, say))
        ]
        answers = _answers_folder(options.out)
        check_writable(answers)
        found: list[tuple[EvaluatedModel, dict[str, Any]]] = []
        for info in infos:
            found.append(
                evaluate_model(
                    info,
                    tasks,
                    answers,
                    device=options.device,
                    n_threads=options.n_threads,
                    cache=options.cache,
                )
            )
    results = _results(suite, options, [model for model, _ in found])
    written = []
    if options.out is not None:
        written = write_evaluation(
            results, options.out, plots=options.plots, overwrite=options.overwrite
        )
        for name, (_, raw) in zip(model_names(results), found, strict=True):
            written += _write_raw(options.out, name, raw)
    return results, written


def check_packages_of_eval() -> None:
    """See that the harness is installed.

    Raises:
        DependencyError: it is not.
    """
    require("eval", "tasks are asked by", "lm_eval")


def overlap(
    suite: str, data: Path | None, texts: Sequence[Path], field: str | None
) -> dict[str, TaskOverlap]:
    """How many questions of each task stand in training texts; see `contaminated`.

    Args:
        suite: as `EvalOptions.suite`.
        data: as `EvalOptions.data`.
        texts: files and folders.
        field: where rows of JSONL files have their text.
    """
    check_packages_of_eval()
    tasks = load_tasks(find_suite(suite), data, None, 0)
    with quiet_harness():
        questions = {task.spec.task: _questions(task) for task in tasks}
    documents = read_documents(texts, field)
    with progress("Reading text", sum(len(d.text) for d in documents), unit="characters") as told:

        def pieces() -> Iterator[str]:
            for document in documents:
                yield document.text
                told(len(document.text))

        return contaminated(questions, pieces())


def _questions(task: LoadedTask) -> list[str]:
    """What is asked of each document, without solved examples, and what is answered."""
    found = []
    for document in task.task.eval_docs:
        if task.task.config.should_decontaminate:
            text = task.task.doc_to_decontamination_query(document)
        else:
            text = task.task.doc_to_text(document)
        if not isinstance(text, str):
            # The question is a place in the choices, as in Winogrande.
            text = " ".join(task.task.doc_to_choice(document))
        found.append(text)
    return found


@contextlib.contextmanager
def _depths(
    name: str, info: SourceInfo, choose: ChoosePlan, out: Path | None, say: Say
) -> Iterator[list[SourceInfo]]:
    """A model; a base that a plan is for as it is and, for as long as it is needed, up-scaled."""
    if info.kind != "hf":
        yield [info]
        return
    model = find_model(name, choose, weights=True, say=say)
    if model.plan.is_identity:
        yield [info]
        return
    with _built_folder(info, out) as built:
        export_checkpoint(name, choose, built, say=say)
        parts = (info.name, f"{model.plan.depth} layers", model.plan.method.spelled)
        yield [info, inspect_source(built, ", ".join(filter(None, parts)))]


@contextlib.contextmanager
def _built_folder(info: SourceInfo, out: Path | None) -> Iterator[Path]:
    """Where a base is up-scaled to. What a killed run left there goes when the next one comes."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="dus-edge-") as folder:
            yield Path(folder) / "up-scaled"
        return
    built = out / f".dus-edge-{safe_name(info.name)}"
    with held_outputs([built]):
        shutil.rmtree(built, ignore_errors=True)
        try:
            yield built
        finally:
            shutil.rmtree(built, ignore_errors=True)


def _answers_folder(out: Path | None) -> Path:
    if out is not None:
        return out / ANSWERS
    return (user_cache() or Path(tempfile.gettempdir())) / "dus-edge" / "eval"


def _results(suite: Suite, options: EvalOptions, models: Sequence[EvaluatedModel]) -> EvalResults:
    return EvalResults(
        suite=suite.name,
        groups=suite.groups,
        models=tuple(models),
        n_docs=options.n_docs,
        seed=options.seed,
        harness=harness_version(),
        published={entry.name: dict(entry.scores) for entry in suite.published},
        published_note=suite.published_note,
    )


def _write_raw(out: Path, name: str, raw: dict[str, Any]) -> list[Path]:
    """The harness's own results of a model, and its samples, a file a task."""
    safe = safe_name(name)
    path = out / f"results_{safe}.json"
    samples = raw.pop("samples")
    write_text(path, _json(raw, indent=2) + "\n")
    folder = out / "samples" / safe
    folder.mkdir(parents=True, exist_ok=True)
    for task, rows in samples.items():
        write_text(folder / f"{task}.jsonl", "".join(_json(row) + "\n" for row in rows))
    return [path]


def safe_name(name: str) -> str:
    """A model's name as part of a file's."""
    return re.sub(r"[^\w.-]", "_", name)


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, default=_plain, ensure_ascii=False, indent=indent)


def _plain(value: Any) -> Any:
    """What JSON knows in place of numpy's numbers, and the name of anything else."""
    return value.item() if hasattr(value, "item") else getattr(value, "__name__", str(value))
