"""Scores of tasks, groups and the suite, and what a model differs by from the reference.

A group's score is the mean over its documents, as the harness weights MMLU's subjects by size; the
suite's is the mean of its groups' scores, as leaderboards quote it. Where a number cannot be given,
the reason stands in its place.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dus_edge.eval.intervals import Difference, PairedCounts, PairedMean, WeightedSum, holm
from dus_edge.eval.results import EvaluatedModel, TaskScores

#: The intervals' error: they are of 95 %.
ALPHA = 0.05


@dataclass(frozen=True)
class MeanScore:
    """A mean over documents.

    Attributes:
        value: from 0 to 1 for accuracies; None where there is none.
        error: its standard error; None where it cannot be told.
        n: documents.
        note: why something is None; empty where nothing is.
    """

    value: float | None
    error: float | None
    n: int
    note: str = ""


@dataclass(frozen=True)
class ComparedScore:
    """A model's score minus the reference's over the documents that both have.

    Attributes:
        value: the difference; None where there is none.
        error: its standard error.
        low, high: of the 95 % interval; None where it cannot be told.
        p: two-sided, of no difference.
        n: documents that both have.
        method: of p and the interval, such as ``exact McNemar``.
        note: why something is None; empty where nothing is.
        p_holm: p among all comparisons that were made, as Holm corrects it.
        detail: what the numbers come from.
    """

    value: float | None
    error: float | None
    low: float | None
    high: float | None
    p: float | None
    n: int
    method: str = ""
    note: str = ""
    p_holm: float | None = None
    detail: Difference | None = field(default=None, repr=False, compare=False)

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0, and the test, which can be stricter, agrees."""
        if self.low is None or self.high is None or self.p is None:
            return False
        return (self.low > 0 or self.high < 0) and self.p < ALPHA


# -- scores ---------------------------------------------------------------------------------------


def task_score(task: TaskScores) -> MeanScore:
    """The mean over a task's documents and its standard error, as the harness computes them."""
    return _mean(task.values)


def group_score(tasks: Sequence[TaskScores]) -> MeanScore:
    """Tasks weighted by their documents.

    The error is the harness's for groups (`lm_eval.api.metrics.pooled_sample_stderr`): from the
    variances within the tasks.
    """
    scores = [_mean(task.values) for task in tasks if task.values]
    if len(scores) < 2:
        return scores[0] if scores else _mean(())
    n = sum(s.n for s in scores)
    if bad := next((s for s in scores if s.value is None), None):
        return MeanScore(None, None, n, bad.note)
    value = sum(s.n * (s.value or 0.0) for s in scores) / n
    if n == len(scores):
        return MeanScore(value, None, n, "one document of each task")
    squares = sum((s.n - 1) * s.n * (s.error or 0.0) ** 2 for s in scores)
    return MeanScore(value, math.sqrt(squares / (n - len(scores)) / n), n)


def suite_score(groups: Sequence[MeanScore]) -> MeanScore:
    """The mean of groups' scores; they are independent, so their variances add."""
    n = sum(g.n for g in groups)
    if not groups or any(g.value is None for g in groups):
        return MeanScore(None, None, n, "a task has no score")
    value = sum(g.value or 0.0 for g in groups) / len(groups)
    if bad := next((g for g in groups if g.error is None), None):
        return MeanScore(value, None, n, bad.note)
    return MeanScore(value, math.sqrt(sum((g.error or 0.0) ** 2 for g in groups)) / len(groups), n)


def _mean(values: Sequence[float]) -> MeanScore:
    n = len(values)
    if not n:
        return MeanScore(None, None, 0, "no documents")
    x = np.asarray(values, np.float64)
    if not np.isfinite(x).all():
        bad = int((~np.isfinite(x)).sum())
        return MeanScore(None, None, n, f"the score of {bad} of {n} documents is no number")
    value = float(x.mean())
    if n == 1:
        return MeanScore(value, None, 1, "one document")
    return MeanScore(value, float(x.std(ddof=1)) / math.sqrt(n), n)


# -- differences ----------------------------------------------------------------------------------


def paired_group(tasks: Sequence[TaskScores], reference: Sequence[TaskScores]) -> ComparedScore:
    """What a group's score differs by from the reference's.

    Right-or-wrong answers of all its tasks are one sample: McNemar's exact test and Tango's
    interval. Other values are compared by a paired t, task by task, and add up by size.

    Args:
        tasks: of one model; a single one is a group too.
        reference: of the reference; those of the same name pair.
    """
    by_name = {task.task: task for task in reference}
    pairs = [matched(t, by_name[t.task]) for t in tasks if t.task in by_name]
    pairs = [pair for pair in pairs if len(pair[0])]
    n = sum(len(ours) for ours, _ in pairs)
    if not n:
        return _nothing(0, "no document in common")
    ours, theirs = (np.concatenate([pair[i] for pair in pairs]) for i in (0, 1))
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return _nothing(n, "a score is no number")
    if _is_right_or_wrong(ours) and _is_right_or_wrong(theirs):
        counts = PairedCounts(n, int((ours > theirs).sum()), int((ours < theirs).sum()))
        return _compared(counts, n, "exact McNemar, Tango's interval")
    differences = [a - b for a, b in pairs]
    if any(len(d) < 2 for d in differences):
        value = float((ours - theirs).mean())
        note = "one document" if n == 1 else "one document of a task"
        return ComparedScore(value, None, None, None, None, n, note=note)
    parts = [_paired_mean(d) for d in differences]
    if len(parts) == 1:
        return _compared(parts[0], n, "paired t")
    weights = tuple(len(d) / n for d in differences)
    return _compared(WeightedSum(tuple(parts), weights), n, "paired t, tasks added by size")


def paired_suite(groups: Sequence[ComparedScore]) -> ComparedScore:
    """What the suite's average differs by: the mean of its groups' differences."""
    n = sum(g.n for g in groups)
    if not groups or any(g.detail is None for g in groups):
        known = [g.value for g in groups if g.value is not None]
        if groups and len(known) == len(groups):
            value = sum(known) / len(known)
            return ComparedScore(value, None, None, None, None, n, note="one document of a task")
        return _nothing(n, "a task has no difference")
    parts = tuple(g.detail for g in groups if g.detail is not None)
    weights = (1 / len(groups),) * len(groups)
    return _compared(WeightedSum(parts, weights), n, "intervals of the tasks, added")


def matched(ours: TaskScores, theirs: TaskScores) -> tuple[np.ndarray, np.ndarray]:
    """The values of the documents that both have, in our order.

    A document that stands in a task twice is paired with its first, then its second.
    """
    places: dict[tuple[str, int], float] = {}
    seen: Counter[str] = Counter()
    for document, value in zip(theirs.documents, theirs.values, strict=True):
        places[document, seen[document]] = value
        seen[document] += 1
    seen = Counter()
    pairs = []
    for document, value in zip(ours.documents, ours.values, strict=True):
        other = places.get((document, seen[document]))
        seen[document] += 1
        if other is not None:
            pairs.append((value, other))
    both = np.asarray(pairs, np.float64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _is_right_or_wrong(values: np.ndarray) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def _paired_mean(differences: np.ndarray) -> PairedMean:
    n = len(differences)
    value, spread = float(differences.mean()), float(differences.std(ddof=1))
    # Equal differences have no spread, but for rounding.
    if np.ptp(differences) == 0:
        value, spread = float(differences[0]), 0.0
    return PairedMean(n, value, spread / math.sqrt(n))


def _compared(d: Difference, n: int, method: str) -> ComparedScore:
    ends = d.limits(ALPHA)
    if ends is None:
        note = "no document differs" if d.value == 0 else "all documents differ by the same"
        return ComparedScore(d.value, d.error, None, None, None, n, note=note, detail=d)
    return ComparedScore(d.value, d.error, *ends, d.p, n, method, detail=d)


def _nothing(n: int, note: str) -> ComparedScore:
    return ComparedScore(None, None, None, None, None, n, note=note)


# -- a whole evaluation ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSummary:
    """A model's scores and its differences to the reference.

    Attributes:
        scores: by group.
        average: of the suite.
        differences: by group; empty for the reference.
        average_difference: of the suite; None for the reference, and for one group.
        by_language: averages of the groups of each language; empty where there is one only.
    """

    scores: Mapping[str, MeanScore]
    average: MeanScore
    differences: Mapping[str, ComparedScore]
    average_difference: ComparedScore | None
    by_language: Mapping[str, MeanScore]


def summarize_models(models: Sequence[EvaluatedModel], groups: Sequence[str]) -> list[ModelSummary]:
    """All scores and differences of an evaluation; the first model is the reference.

    p values are corrected for all comparisons together: models by groups, and averages.
    """
    tables = [_by_group(model, groups) for model in models]
    compared: list[dict[str, ComparedScore]] = [
        {name: paired_group(table[name], tables[0][name]) for name in groups}
        for table in tables[1:]
    ]
    averages = [paired_suite(list(own.values())) if len(groups) > 1 else None for own in compared]
    flat = [c for own, a in zip(compared, averages, strict=True) for c in (*own.values(), a) if c]
    corrected = dict(zip(map(id, flat), holm([c.p for c in flat]), strict=True))

    def with_holm(c: ComparedScore) -> ComparedScore:
        return ComparedScore(**{**vars(c), "p_holm": corrected[id(c)]})

    found = []
    for i, table in enumerate(tables):
        scores = {name: group_score(table[name]) for name in groups}
        own = {name: with_holm(c) for name, c in compared[i - 1].items()} if i else {}
        average = averages[i - 1] if i else None
        found.append(
            ModelSummary(
                scores,
                suite_score(list(scores.values())),
                own,
                with_holm(average) if average else None,
                _by_language(table, scores),
            )
        )
    return found


def n_comparisons(summaries: Sequence[ModelSummary]) -> int:
    """How many p values there are."""
    all_of = [(*s.differences.values(), s.average_difference) for s in summaries]
    return sum(c is not None and c.p is not None for own in all_of for c in own)


def _by_group(model: EvaluatedModel, groups: Sequence[str]) -> dict[str, list[TaskScores]]:
    return {name: [t for t in model.tasks if t.group == name] for name in groups}


def _by_language(
    table: Mapping[str, Sequence[TaskScores]], scores: Mapping[str, MeanScore]
) -> dict[str, MeanScore]:
    languages: dict[str, list[MeanScore]] = {}
    for name, tasks in table.items():
        for language in dict.fromkeys(t.language for t in tasks):
            languages.setdefault(language, []).append(scores[name])
    if len(languages) < 2:
        return {}
    return {language: suite_score(own) for language, own in languages.items()}
