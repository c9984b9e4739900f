"""An evaluation as JSON takes it: scores from 0 to 1; what cannot be told is null."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dus_edge.eval.paired import (
    ComparedScore,
    MeanScore,
    ModelSummary,
    n_comparisons,
    task_score,
)
from dus_edge.eval.results import EvalResults, EvaluatedModel


def evaluation_json(
    results: EvalResults,
    summaries: Sequence[ModelSummary],
    names: Sequence[str],
    titles: Mapping[str, str],
) -> dict[str, Any]:
    """The results with all scores and differences.

    Args:
        results: of one model or more; the harness's own are not repeated.
        summaries: of `paired.summarize_models`.
        names: short ones, of the models.
        titles: of the groups.
    """
    return {
        "suite": results.suite,
        "harness": results.harness,
        "documents": {"most_of_each_task": results.n_docs, "seed": results.seed},
        "groups": [{"name": g, "title": titles[g]} for g in results.groups],
        "interval": 0.95,
        "n_comparisons": n_comparisons(summaries),
        "models": [
            _model(m, s, name) for m, s, name in zip(results.models, summaries, names, strict=True)
        ],
        "published": {
            "note": results.published_note,
            "scores_percent": results.published,
        },
    }


def _model(m: EvaluatedModel, s: ModelSummary, name: str) -> dict[str, Any]:
    info = m.info
    average = s.average_difference
    return {
        "name": info.name,
        "short_name": name,
        "kind": info.kind,
        "file_bytes": info.n_bytes,
        "n_parameters": info.n_parameters,
        "bits_per_weight": info.bits_per_weight,
        "engine": m.engine,
        "tokens": m.tokens,
        "seconds": m.seconds,
        "average": _score(s.average),
        "groups": {group: _score(own) for group, own in s.scores.items()},
        "languages": {language: _score(own) for language, own in s.by_language.items()},
        "tasks": [
            {
                "task": t.task,
                "group": t.group,
                "metric": t.metric,
                "n_shots": t.n_shots,
                "language": t.language,
                "n_available": t.n_available,
                **_score(task_score(t)),
            }
            for t in m.tasks
        ],
        "differences": {group: _difference(c) for group, c in s.differences.items()},
        "average_difference": _difference(average) if average else None,
    }


def _score(s: MeanScore) -> dict[str, Any]:
    return {"score": s.value, "standard_error": s.error, "n_documents": s.n, "note": s.note}


def _difference(c: ComparedScore) -> dict[str, Any]:
    return {
        "difference": c.value,
        "standard_error": c.error,
        "low": c.low,
        "high": c.high,
        "p": c.p,
        "p_holm": c.p_holm,
        "n_documents": c.n,
        "method": c.method,
        "note": c.note,
    }
