"""What `dus-edge sweep` says: tables for people, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from dus_edge.eval.intervals import t_quantile
from dus_edge.predict.prediction import Prediction
from dus_edge.predict.report import speed_json, verdict_json
from dus_edge.quality.scores import Estimate, Scores
from dus_edge.text.chunks import Chunks
from dus_edge.upscale.blocks import repeated_outliers
from dus_edge.upscale.candidates import Candidate
from dus_edge.upscale.geometry import StreamGeometry
from dus_edge.upscale.plan import DepthPlan
from dus_edge.upscale.ranking import FEWEST, pareto, resampled, spearman, spearman_within
from dus_edge.words import aligned_table, figure, format_bytes, wrap

#: Error of intervals: they are of 95 %.
_ALPHA = 0.05
#: Plans that a terminal is shown; files have them all.
_MOST_SHOWN = 40
#: Plans that a correlation is worth telling of.
_FEWEST_RANKED = 5


@dataclass(frozen=True)
class SweptPlan:
    """A plan, and what it does before any training.

    Attributes:
        candidate: the plan and its label.
        n_parameters: of the result.
        file_bytes: of its tensors in the preset.
        total: scores against the base on all text; `log_ratio` is the loss above the base's.
        languages: the same by language.
        losses: ``(n_chunks,)`` float64: loss above the base's of each chunk, nats a token.
        angle: the largest of its seams', in units of π; None without a seam.
        prediction: memory and speed on a device, where one was named.
    """

    candidate: Candidate
    n_parameters: int
    file_bytes: int
    total: Scores
    languages: dict[str, Scores]
    losses: np.ndarray
    angle: float | None
    prediction: Prediction | None = None

    @property
    def plan(self) -> DepthPlan:
        """Its layers."""
        return self.candidate.plan

    @property
    def loss(self) -> float:
        """Above the base's, nats a token."""
        return self.total.log_ratio.value


@dataclass(frozen=True)
class PlanCorrelation:
    """How a number that needs no run of a plan foretells its loss.

    Attributes:
        of: the number.
        held: whether plans are compared with those of their size alone.
        n_plans: it rests on.
        rho: Spearman's.
        interval: of 95 %, over chunks of text; None where there are too few.
    """

    of: str
    held: bool
    n_plans: int
    rho: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class SweepResults:
    """Plans of one base, compared on the same text.

    Attributes:
        name: of the base.
        preset: that files are in.
        plans: in the order asked for.
        perplexity: the base's.
        geometry: of the base's stream.
        chunks: what was run.
        text_label: what the text is called.
    """

    name: str
    preset: str
    plans: tuple[SweptPlan, ...]
    perplexity: Estimate
    geometry: StreamGeometry
    chunks: Chunks
    text_label: str

    @cached_property
    def best(self) -> tuple[SweptPlan, ...]:
        """Of each way of making copies, plans than which none as deep loses less; by depth."""
        found: list[SweptPlan] = []
        for method in dict.fromkeys(p.plan.method for p in self.plans):
            own = [p for p in self.plans if p.plan.method == method]
            kept = pareto([-p.plan.depth for p in own], [p.loss for p in own])
            found += [own[i] for i in reversed(kept)]
        return tuple(found)

    @cached_property
    def ordered(self) -> tuple[SweptPlan, ...]:
        """All, by depth, and those of one depth by their loss."""
        return tuple(sorted(self.plans, key=lambda p: (p.plan.depth, p.loss)))

    @cached_property
    def correlations(self) -> tuple[PlanCorrelation, ...]:
        """Of plans of plain copies."""
        return tuple(_correlations(self))

    def half_width(self, estimate: Estimate, n_chunks: int, n_languages: int) -> float | None:
        """Of a 95 % interval: Student's t, chunks drawn within each language."""
        if estimate.error is None:
            return None
        return t_quantile(_ALPHA, max(1, n_chunks - n_languages)) * estimate.error

    def loss_width(self, plan: SweptPlan) -> float | None:
        """Half the width of the interval of a plan's loss above the base's."""
        return self.half_width(plan.total.log_ratio, plan.total.n_chunks, len(plan.languages))


def _correlations(results: SweepResults) -> Iterator[PlanCorrelation]:
    own = [p for p in results.plans if p.plan.method.is_plain and p.angle is not None]
    if len(own) < _FEWEST_RANKED:
        return
    strata = np.unique(results.chunks.languages, return_inverse=True)[1]
    losses, sizes = np.stack([p.losses for p in own]), [p.plan.depth for p in own]
    for of, values in (
        ("angle", [p.angle for p in own]),
        ("layers", [float(size) for size in sizes]),
    ):
        numbers = np.array(values, np.float64)

        def all_plans(chunks: np.ndarray, numbers: np.ndarray = numbers) -> float | None:
            return spearman(numbers, losses[:, chunks].mean(1))

        def of_one_size(chunks: np.ndarray, numbers: np.ndarray = numbers) -> float | None:
            return spearman_within(sizes, numbers, losses[:, chunks].mean(1))[0]

        everything = np.arange(losses.shape[1])
        rho = all_plans(everything)
        if rho is not None:
            yield PlanCorrelation(of, False, len(own), rho, resampled(all_plans, strata))
        held, n = spearman_within(sizes, numbers, losses.mean(1))
        if held is not None:
            yield PlanCorrelation(of, True, n, held, resampled(of_one_size, strata))


# -- for people -----------------------------------------------------------------------------------


def sweep_page(results: SweepResults, most: int | None = None) -> str:
    """Tables of plans, no line over 80 columns.

    Args:
        results: of a sweep.
        most: plans in the table of all; None for all.
    """
    parts = [_about(results), "## Best of their depth", *_best(results)]
    if (found := [p for p in results.best if p.prediction]) and found[0].prediction:
        parts += [f"## On {found[0].prediction.verdict.device.name}", *_device(results)]
    if len(results.best[0].languages) > 1:
        parts += ["## By language", _languages(results)]
    if results.correlations:
        parts += ["## What foretells the loss", *_correlation_lines(results)]
    shown = results.ordered if most is None else results.ordered[:most]
    if len(results.plans) > len(results.best):
        parts += ["## All plans", _plans(results, shown)]
        if left := len(results.plans) - len(shown):
            parts.append(f"{left} more plans are in the files that -o writes.")
    return "\n\n".join(parts)


def brief_sweep_page(results: SweepResults) -> str:
    """The same for a terminal."""
    return sweep_page(results, _MOST_SHOWN)


def _about(results: SweepResults) -> str:
    counts = ", ".join(f"{n} {name}" for name, n in Counter(results.chunks.languages).items())
    n_chunks, n_ctx = results.chunks.tokens.shape
    ppl = results.perplexity.value
    return wrap(
        f"{len(results.plans)} plans for {results.name}, untrained, over {n_chunks} chunks of "
        f"{n_ctx} tokens of {results.text_label} ({counts}). Loss: nats a token above the base's, "
        f"whose perplexity is {ppl:.2f}, ± half of a 95 % interval of paired differences over "
        "chunks. KL: of the base's next-token distributions to the plan's. Same top: how often "
        "both put the same token first. Angle: the largest of a plan's seams, in units of π. What "
        "a plan loses before training does not say how well it heals."
    )


def _best(results: SweepResults) -> Iterator[str]:
    yield _plans(results, results.best)
    yield "No other plan that makes its copies alike is as deep and loses less."


def _plans(results: SweepResults, plans: Sequence[SweptPlan]) -> str:
    rows = [
        [
            p.candidate.label,
            str(p.plan.depth),
            format_bytes(p.file_bytes),
            _loss(results, p),
            _three(p.total.kl.value),
            f"{100 * p.total.same_top.value:.1f} %",
            "–" if p.angle is None else f"{p.angle:.3f}",
        ]
        for p in plans
    ]
    head = ["plan", "layers", results.preset, "loss", "KL", "same top", "angle"]
    return aligned_table(head, rows)


def _loss(results: SweepResults, plan: SweptPlan) -> str:
    width = results.loss_width(plan)
    return f"{plan.loss:+.3f}" + ("" if width is None else f" ± {width:.3f}")


def _device(results: SweepResults) -> Iterator[str]:
    rows = []
    for p in results.best:
        assert p.prediction is not None
        v, speed = p.prediction.verdict, p.prediction.speed
        rate = "–" if speed is None else figure(speed.tg_tokens_per_s)
        fits = "yes" if v.fits else f"-ngl {v.offloaded_layers}"
        rows.append(
            [
                p.candidate.label,
                str(p.plan.depth),
                format_bytes(v.use.total_bytes),
                fits,
                rate,
                _loss(results, p),
            ]
        )
    yield aligned_table(["plan", "layers", "memory", "fits", "tok/s", "loss"], rows)
    first = results.best[0].prediction
    assert first is not None
    fitting = [p for p in results.best if p.prediction and p.prediction.verdict.fits]
    said = (
        f"Memory and speed are predicted, as {results.preset} at a context of {first.context:,} "
        f"tokens; {format_bytes(first.verdict.usable_bytes)} are usable. "
    )
    if fitting:
        deepest = max(fitting, key=lambda p: (p.plan.depth, -p.loss))
        said += f"The deepest that fits whole is {deepest.candidate.label}."
    else:
        said += "None fits whole."
    yield wrap(said)


def _languages(results: SweepResults) -> str:
    names = list(results.best[0].languages)
    rows = [
        [
            p.candidate.label,
            str(p.plan.depth),
            *(f"{p.languages[name].log_ratio.value:+.3f}" for name in names),
        ]
        for p in results.best
    ]
    return aligned_table(["plan", "layers", *names], rows)


def _correlation_lines(results: SweepResults) -> Iterator[str]:
    rows = [
        [
            "angle of the seam" if c.of == "angle" else "layers of the plan",
            "one size" if c.held else "all plans",
            str(c.n_plans),
            f"{c.rho:+.2f}",
            "–" if c.interval is None else f"{c.interval[0]:+.2f} to {c.interval[1]:+.2f}",
        ]
        for c in results.correlations
    ]
    head = ["Spearman's correlation of loss with", "among", "plans", "ρ", "95 %"]
    yield aligned_table(head, rows, left=(0, 1))
    if any(c.held for c in results.correlations):
        yield wrap(
            f"Among plans of one size: the mean over sizes of {FEWEST} plans or more. Intervals: "
            "1,000 draws of chunks."
        )


def _three(x: float) -> str:
    return f"{x:.3f}"


# -- for programs ---------------------------------------------------------------------------------


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
        "correlations": [
            {
                "with": c.of,
                "size_held": c.held,
                "n_plans": c.n_plans,
                "spearman": round(c.rho, 6),
                "interval": c.interval and [round(x, 6) for x in c.interval],
            }
            for c in results.correlations
        ],
    }


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
