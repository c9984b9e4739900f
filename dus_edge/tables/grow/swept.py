"""What a sweep finds of each plan, and how well one number foretells another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dus_edge.eval.intervals import t_quantile
from dus_edge.predict.prediction import Prediction
from dus_edge.quality.scores import Estimate, Scores
from dus_edge.text.chunks import Chunks
from dus_edge.upscale.candidates import Candidate
from dus_edge.upscale.geometry import StreamGeometry
from dus_edge.upscale.plan import DepthPlan
from dus_edge.upscale.ranking import pareto, resampled, spearman, spearman_within

#: Error of intervals: they are of 95 %.
_ALPHA = 0.05
#: Plans that a correlation is worth telling of.
_FEWEST_RANKED = 5


@dataclass(frozen=True)
class HealedLosses:
    """Held-out losses of a plan around a short training, nats a token; one of each seed.

    Attributes:
        n_tokens: that it was trained on.
        base: the base's, untrained.
        before: the plan's, untrained.
        after: the plan's, trained.
    """

    n_tokens: int
    base: tuple[float, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]

    def with_seed(self, base: float, before: float, after: float) -> HealedLosses:
        """The same with one seed more."""
        return HealedLosses(
            self.n_tokens, (*self.base, base), (*self.before, before), (*self.after, after)
        )

    @property
    def left(self) -> float:
        """Loss above the base's after training, mean over seeds."""
        return float(np.mean(np.subtract(self.after, self.base)))

    @property
    def left_width(self) -> float | None:
        """Half of its 95 % interval over seeds; None for a single one."""
        n = len(self.after)
        if n < 2:
            return None
        error = np.std(np.subtract(self.after, self.base), ddof=1) / np.sqrt(n)
        return t_quantile(_ALPHA, n - 1) * float(error)


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
        healed: losses around a short training, where one was asked for.
    """

    candidate: Candidate
    n_parameters: int
    file_bytes: int
    total: Scores
    languages: dict[str, Scores]
    losses: np.ndarray
    angle: float | None
    prediction: Prediction | None = None
    healed: HealedLosses | None = None

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

    @cached_property
    def healed(self) -> tuple[tuple[SweptPlan, HealedLosses], ...]:
        """Plans that were trained, the lowest loss first."""
        found = [(p, p.healed) for p in self.plans if p.healed is not None]
        return tuple(sorted(found, key=lambda pair: pair[1].left))

    @cached_property
    def healed_correlations(self) -> tuple[PlanCorrelation, ...]:
        """What foretells the loss that is left after training; intervals are over plans."""
        return tuple(_healed_correlations(self))

    def loss_width(self, plan: SweptPlan) -> float | None:
        """Half of the 95 % interval of a plan's loss above the base's; None for a single chunk.

        Student's t; chunks are drawn within each language.
        """
        error, n_free = plan.total.log_ratio.error, plan.total.n_chunks - len(plan.languages)
        return None if error is None else t_quantile(_ALPHA, max(1, n_free)) * error


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


def _healed_correlations(results: SweepResults) -> Iterator[PlanCorrelation]:
    own = [(p, healed) for p, healed in results.healed if p.angle is not None]
    if len(own) < _FEWEST_RANKED:
        return
    left = np.array([healed.left for _, healed in own])
    for of, values in (
        ("loss", [p.loss for p, _ in own]),
        ("angle", [p.angle or 0.0 for p, _ in own]),
        ("layers", [float(p.plan.depth) for p, _ in own]),
    ):
        numbers = np.array(values)

        def some(plans: np.ndarray, numbers: np.ndarray = numbers) -> float | None:
            return spearman(numbers[plans], left[plans])

        rho = some(np.arange(len(own)))
        if rho is not None:
            interval = resampled(some, np.zeros(len(own), int))
            yield PlanCorrelation(of, False, len(own), rho, interval)
