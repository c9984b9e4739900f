"""What an evaluation found, a value for every document: plain data, with nothing of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dus_edge.run.source import SourceInfo


@dataclass(frozen=True)
class TaskScores:
    """One model on one task of the harness.

    Attributes:
        task: the harness's name, such as ``mmlu_anatomy``.
        group: what the suite reports it under, such as ``mmlu``; its own name where it is alone.
        metric: the harness's name of the one that counts, such as ``acc_norm``.
        n_shots: solved examples before each question.
        language: ``en``, ``ko``, …
        documents: SHA-256 of each document, hex, in the order of `values`; equal documents pair
            two models' values.
        values: of the metric, a document each; 0 or 1 for accuracies and exact matches.
        n_available: documents of the task before any were drawn; None where it is not known.
    """

    task: str
    group: str
    metric: str
    n_shots: int
    language: str
    documents: tuple[str, ...]
    values: tuple[float, ...]
    n_available: int | None = None


@dataclass(frozen=True)
class EvaluatedModel:
    """A model and its scores.

    Attributes:
        info: of the file or folder.
        tasks: in the suite's order.
        tokens: that were computed for it.
        seconds: that took.
        engine: what ran it and in which precision, such as
            ``llama.cpp, float32 cache``; part of the page.
        n_cut: prompts that were longer than its context, and lost their beginning.
    """

    info: SourceInfo
    tasks: tuple[TaskScores, ...]
    tokens: int
    seconds: float
    engine: str
    n_cut: int = 0


@dataclass(frozen=True)
class EvalResults:
    """What `eval` found.

    Attributes:
        suite: ``h6``, ``ko``, or the tasks' names as they were given.
        groups: names of the suite's rows in order, such as ``arc_challenge``, ``mmlu``.
        models: the first is the reference.
        n_docs: of each group of tasks, drawn by `seed`; None for all.
        seed: of that draw.
        harness: package and version, such as ``lm-eval 0.4.13``.
        published: columns of others' figures, per cent: name of the column → group → score.
        published_note: why those are not measured the same way; empty if there are none.
        raw: the harness's own results by model, for its JSON; None where they are not kept.
    """

    suite: str
    groups: tuple[str, ...]
    models: tuple[EvaluatedModel, ...]
    n_docs: int | None
    seed: int
    harness: str
    published: dict[str, dict[str, float]]
    published_note: str
    raw: dict[str, Any] | None = None
