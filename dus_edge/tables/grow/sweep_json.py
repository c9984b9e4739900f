"""What `dus-edge sweep` says to programs: JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dus_edge.predict.report import speed_json, verdict_json
from dus_edge.quality.scores import Estimate
from dus_edge.tables.grow.swept import PlanCorrelation, SweepResults, SweptPlan
from dus_edge.upscale.blocks import repeated_outliers


def sweep_json(results: SweepResults) -> dict[str, Any]:
    """The results as JSON takes them."""
    n_chunks, n_ctx = results.chunks.tokens.shape
    best = frozenset(p.candidate.label for p in results.best)
    return {
        "base": results.name,
        "preset": results.preset,
        "text": {
            "label": results.text_label,
            "n_ctx": n_ctx,
            "chunks": dict(Counter(results.chunks.languages)),
            "n_scored": n_chunks * (n_ctx - 1),
            "sha256": results.chunks.digest,
        },
        "base_perplexity": _estimate(results.perplexity),
        "outliers": list(results.geometry.outliers),
        "plans": [_plan_json(results, p, p.candidate.label in best) for p in results.ordered],
        "correlations": _correlations_json(results.correlations),
        "healed_correlations": _correlations_json(results.healed_correlations),
    }


def _correlations_json(correlations: Sequence[PlanCorrelation]) -> list[dict[str, Any]]:
    return [
        {
            "with": c.of,
            "size_held": c.held,
            "n_plans": c.n_plans,
            "spearman": round(c.rho, 6),
            "interval": c.interval and [round(x, 6) for x in c.interval],
        }
        for c in correlations
    ]


def _plan_json(results: SweepResults, p: SweptPlan, is_best: bool) -> dict[str, Any]:
    width = results.loss_width(p)
    block, seams = p.plan.block, p.plan.seams
    said: dict[str, Any] = {
        "label": p.candidate.label,
        "plan": p.plan.spelled,
        "drop": p.plan.drop,
        "block": block and list(block),
        "method": p.plan.method.kind,
        "branch_scale": p.plan.method.branch_scale,
        "n_layers": p.plan.depth,
        "n_parameters": p.n_parameters,
        "file_bytes": p.file_bytes,
        "best_of_its_depth": is_best,
        "loss": round(p.loss, 7),
        "loss_interval": None
        if width is None
        else [round(p.loss - width, 7), round(p.loss + width, 7)],
        "kl": _estimate(p.total.kl),
        "same_top": _estimate(p.total.same_top),
        "loss_by_language": {name: _estimate(s.log_ratio) for name, s in p.languages.items()},
        "n_seams": len(seams),
        "angle": None if p.angle is None else round(p.angle, 7),
        "repeated_outliers": list(repeated_outliers(p.plan, results.geometry.outliers)),
    }
    if p.prediction is not None:
        said["prediction"] = {
            **verdict_json(p.prediction.verdict),
            **speed_json(p.prediction.speed),
            "context": p.prediction.context,
        }
    if p.healed is not None:
        said["healed"] = {
            "n_tokens": p.healed.n_tokens,
            "base": [round(x, 7) for x in p.healed.base],
            "before": [round(x, 7) for x in p.healed.before],
            "after": [round(x, 7) for x in p.healed.after],
        }
    return said


def _estimate(e: Estimate) -> dict[str, float | None]:
    return {"value": round(e.value, 7), "error": None if e.error is None else round(e.error, 7)}


def sweep_csv(results: SweepResults) -> str:
    """A row a plan, in the order of the page."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    languages = list(results.plans[0].languages)
    device = results.plans[0].prediction is not None
    table.writerow(
        ["label", "plan", "n_layers", "n_parameters", "file_bytes", "method", "branch_scale"]
        + ["loss", "loss_low", "loss_high", "kl", "same_top", "angle", "n_seams", "best"]
        + [f"loss_{name}" for name in languages]
        + (["memory_bytes", "fits", "tokens_per_s"] if device else [])
    )
    for p in sweep_json(results)["plans"]:
        low, high = p["loss_interval"] or ("", "")
        row = [p["label"], p["plan"], p["n_layers"], p["n_parameters"], p["file_bytes"]]
        row += [p["method"], p["branch_scale"], p["loss"], low, high, p["kl"]["value"]]
        row += [p["same_top"]["value"], p["angle"], p["n_seams"], int(p["best_of_its_depth"])]
        row += [p["loss_by_language"][name]["value"] for name in languages]
        if device:
            found = p["prediction"]
            row += [found["memory"]["total_bytes"], int(found["fits"])]
            row += [found["tg_tokens_per_s"]]
        table.writerow(row)
    return out.getvalue()
