"""A model on loaded tasks: the harness asks, our engines answer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dus_edge.errors import UnsupportedError
from dus_edge.eval.record import AnswerRecord, content_digest
from dus_edge.eval.results import EvaluatedModel, TaskScores
from dus_edge.eval.tasks import EXAMPLES_SEED, LoadedTask, quiet_harness
from dus_edge.run.ggml import Ggml
from dus_edge.run.llama import CacheType
from dus_edge.run.source import SourceInfo, split_files, weight_files

#: Files of a folder that its answers depend on, beside the weights.
_SMALL = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def harness_version() -> str:
    """What asks: package and version."""
    return f"lm-eval {version('lm_eval')}"


def evaluate_model(
    info: SourceInfo,
    tasks: Sequence[LoadedTask],
    answers: Path,
    *,
    device: str = "cpu",
    n_threads: int | None = None,
    cache: CacheType = "f32",
) -> tuple[EvaluatedModel, dict[str, Any]]:
    """Ask one model all tasks; what it has answered before is not computed again.

    Args:
        info: of the model.
        tasks: of `load_tasks`.
        answers: folder of the records.
        device: see `dus_edge.run.open.open_source`.
        n_threads: of the CPU; None for all cores.
        cache: type of keys and values in llama.cpp.

    Returns:
        the scores, and the harness's own results, samples included.

    Raises:
        CheckpointError: the weights are damaged or incomplete.
        UnsupportedError: a task whose metric has no value for each document.
    """
    begun = time.monotonic()
    how = _engine_name(info, device, cache)
    record = AnswerRecord(answers / f"{content_digest(_files(info), how)[:32]}.jsonl")
    scores: list[TaskScores] = []
    raw: dict[str, Any] = {}
    with _lm(info, record, device, n_threads, cache) as lm:
        for group in dict.fromkeys(task.spec.group for task in tasks):
            own = [task for task in tasks if task.spec.group == group]
            lm.title = f"{info.name}: {group}"
            found = _ask(lm, own)
            scores += [_scores(task, found["samples"][task.spec.task]) for task in own]
            for key in ("results", "configs", "versions", "n-shot", "samples"):
                raw.setdefault(key, {}).update(found.get(key, {}))
        model = EvaluatedModel(
            info=info,
            tasks=tuple(scores),
            tokens=lm.n_computed,
            seconds=time.monotonic() - begun,
            engine=how,
            n_cut=lm.n_cut,
        )
    return model, raw


def _engine_name(info: SourceInfo, device: str, cache: CacheType) -> str:
    where = "" if device == "cpu" else f" on {device}"
    if info.kind == "gguf":
        return f"llama.cpp {Ggml().commit()}, {cache} cache{where}"
    return f"transformers {version('transformers')}, float32{where}"


def _files(info: SourceInfo) -> list[Path]:
    if info.kind == "gguf":
        return list(split_files(info.path))
    small = [info.path / name for name in _SMALL if (info.path / name).is_file()]
    return [*weight_files(info.path, info.kind), *small]


@contextlib.contextmanager
def _lm(
    info: SourceInfo, record: AnswerRecord, device: str, n_threads: int | None, cache: CacheType
) -> Iterator[Any]:
    # The harness and torch take seconds to import.
    from dus_edge.eval.lm import FolderLM, LlamaLM

    with quiet_harness():
        if info.kind == "gguf":
            lm = LlamaLM(info, record, device, n_threads, cache)
            try:
                yield lm
            finally:
                lm.close()
        else:
            yield FolderLM(info, record, device, n_threads)


def _ask(lm: Any, tasks: Sequence[LoadedTask]) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=lm,
        tasks=[task.task for task in tasks],
        task_manager=TaskManager(include_defaults=False),
        samples={task.spec.task: list(task.asked) for task in tasks},
        bootstrap_iters=1000,
        fewshot_random_seed=EXAMPLES_SEED,
    )
    assert found is not None  # one process
    return dict(found)


def _scores(task: LoadedTask, samples: Sequence[dict[str, Any]]) -> TaskScores:
    values, documents = [], []
    for sample in samples:
        if sample["filter"] != task.filter:
            continue
        value = sample.get(task.metric)
        if value is None or isinstance(value, list | tuple | dict | str):
            raise UnsupportedError(
                f"the task {task.spec.task} scores by {task.metric}, which has no value for each "
                "document; leave it out."
            )
        values.append(float(value))
        documents.append(sample["doc_hash"])
    return TaskScores(
        task=task.spec.task,
        group=task.spec.group,
        metric=task.metric,
        n_shots=task.n_shots,
        n_available=task.n_documents,
        language=task.spec.language,
        documents=tuple(documents),
        values=tuple(values),
    )
