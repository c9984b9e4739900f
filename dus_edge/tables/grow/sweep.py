"""What `dus-edge sweep` says to people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from dus_edge.tables.grow.swept import PlanCorrelation, SweepResults, SweptPlan
from dus_edge.upscale.ranking import FEWEST
from dus_edge.words import aligned_table, figure, format_bytes, wrap

#: Plans that a terminal is shown; files have them all.
_MOST_SHOWN = 40
#: Characters of a plan's label that fit beside all columns.
_LABEL_WIDTH = 11


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
    if results.healed:
        parts += [f"## After {results.healed[0][1].n_tokens:,} tokens", *_healed(results)]
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
    if max(len(p.candidate.label) for p in plans) > _LABEL_WIDTH:
        for row in (head, *rows):  # the depth tells the size already
            del row[2]
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


def _healed(results: SweepResults) -> Iterator[str]:
    rows = []
    for p, healed in results.healed:
        width = healed.left_width
        before = float(np.mean(np.subtract(healed.before, healed.base)))
        left = f"{healed.left:+.3f}" + ("" if width is None else f" ± {width:.3f}")
        rows.append([p.candidate.label, str(p.plan.depth), f"{before:+.3f}", left])
    yield aligned_table(["plan", "layers", "untrained", "trained"], rows)
    n = len(results.healed[0][1].after)
    yield wrap(
        "Held-out loss above the untrained base's, after the same short training of each plan"
        + (f", mean of {n} seeds ± half of a 95 % interval over them." if n > 1 else ", one seed.")
    )
    if results.healed_correlations:
        yield _correlation_table(results.healed_correlations)
        yield "Correlations with the trained loss; intervals: 1,000 draws of plans."


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


def _correlation_table(correlations: Sequence[PlanCorrelation]) -> str:
    names = {
        "angle": "angle of the seam",
        "layers": "layers of the plan",
        "loss": "loss before training",
    }
    rows = [
        [
            names[c.of],
            "one size" if c.held else "all plans",
            str(c.n_plans),
            f"{c.rho:+.2f}",
            "–" if c.interval is None else f"{c.interval[0]:+.2f} to {c.interval[1]:+.2f}",
        ]
        for c in correlations
    ]
    head = ["Spearman's correlation with", "among", "plans", "ρ", "95 %"]
    return aligned_table(head, rows, left=(0, 1))


def _correlation_lines(results: SweepResults) -> Iterator[str]:
    yield _correlation_table(results.correlations)
    if any(c.held for c in results.correlations):
        yield wrap(
            f"Among plans of one size: the mean over sizes of {FEWEST} plans or more. Intervals: "
            "1,000 draws of chunks."
        )


def _three(x: float) -> str:
    return f"{x:.3f}"
