"""The plans that a sweep compares, from what is asked for: pure lists."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from dus_edge.errors import UsageError
from dus_edge.upscale.methods import COPY, Method
from dus_edge.upscale.plan import DepthPlan, check_pattern, from_block, from_drop
from dus_edge.upscale.planfile import INTERLEAVED, PLACES, STACKED, PlanChoice, with_files


@dataclass(frozen=True)
class Candidate:
    """A plan and what tables call it, such as ``m 8``, ``8:22`` or ``8:22 in place × 0.5``."""

    label: str
    plan: DepthPlan


@dataclass(frozen=True)
class SweepChoice:
    """Which plans are asked for.

    Attributes:
        drops: SOLAR's m; None for all that a base allows.
        sizes: layers of blocks that run twice; every start is taken.
        blocks: every block of the sizes that the m's add.
        every: of the starts of blocks take each so-manieth.
        plans: ranges, or files, as `--plan` takes them.
        scales: of branches; each plan with each.
        places: where copies stand; each plan with each.
        methods: how copies are made; each plan with each.
    """

    drops: tuple[int, ...] | None = None
    sizes: tuple[int, ...] = ()
    blocks: bool = False
    every: int = 1
    plans: tuple[str, ...] = ()
    scales: tuple[float, ...] = (1.0,)
    places: tuple[str, ...] = (STACKED,)
    methods: tuple[str, ...] = (COPY,)

    def __post_init__(self) -> None:
        if bad := [place for place in self.places if place not in PLACES]:
            raise UsageError(f"--place {bad[0]!r}: choose {' or '.join(PLACES)}.")
        for method in self.methods:
            Method(method)

    @property
    def takes_drops(self) -> bool:
        """Whether plans of SOLAR's form are among them."""
        return self.drops is not None or self.blocks or not (self.sizes or self.plans)


def sweep_candidates(n: int, asked: SweepChoice, period: int, name: str) -> tuple[Candidate, ...]:
    """Plans for a base of n layers, each once: those of SOLAR's form, then blocks, then others.

    Args:
        n: layers of the base.
        asked: which.
        period: layers after which the family's pattern repeats; 1 for none. What would break it is
            left out, unless it was asked for by itself.
        name: of the family, for messages.

    Raises:
        UsageError: an m, size or plan that does not fit the base, or nothing is left.
    """
    drops = tuple(_drops(n, asked)) if asked.takes_drops else ()
    plain = [Candidate(f"m {m}", from_drop(n, m)) for m in drops]
    sizes = {*asked.sizes, *((n - 2 * m for m in drops) if asked.blocks else ())}
    if bad := [size for size in sorted(sizes) if not 1 <= size <= n]:
        raise UsageError(
            f"--sizes {bad[0]}: no block of a base of {n} layers has that size; 1 to {n} can be."
        )
    for size in sorted(sizes):
        starts = range(0, n - size + 1, asked.every)
        named = [f"{start}:{start + size}" for start in starts]
        plain += [Candidate(text, from_block(n, text)) for text in named]
    found: dict[DepthPlan, Candidate] = {}
    for candidate in _varied(plain, asked):
        if _keeps_pattern(candidate.plan, period):
            found.setdefault(candidate.plan, candidate)
    for candidate in _varied(_asked_plans(n, asked.plans), asked):
        check_pattern(candidate.plan, period, name)
        found.setdefault(candidate.plan, candidate)
    if not found:
        raise UsageError(
            f"none of these plans keeps the pattern of {period} layers that {name} has; choose "
            f"sizes that are multiples of {period}."
        )
    return tuple(found.values())


def _drops(n: int, asked: SweepChoice) -> Iterable[int]:
    if asked.drops is None:
        if n < 3:
            raise UsageError(f"a base of {n} layers has no m to choose; name --plan or --sizes.")
        return range(1, (n - 1) // 2 + 1)
    for m in asked.drops:
        from_drop(n, m)
    return asked.drops


def _asked_plans(n: int, texts: Sequence[str]) -> Iterator[Candidate]:
    for text in texts:
        plan = with_files(PlanChoice(plan=(text,))).depth_plan(n, upscale=True)
        yield Candidate(plan.spelled, plan)


def _varied(plain: Iterable[Candidate], asked: SweepChoice) -> Iterator[Candidate]:
    """Each plan in all ways; a plan without copies as it is."""
    for candidate in plain:
        if not candidate.plan.copies:
            yield candidate
            continue
        for place in asked.places:
            inside = place == INTERLEAVED
            plan = candidate.plan.interleaved() if inside else candidate.plan
            label = candidate.label + (" in place" if inside else "")
            for kind in asked.methods:
                for scale in asked.scales:
                    # What a plan's file says of its copies goes before the sweep's own defaults.
                    own = plan.method
                    method = own if (kind, scale) == (COPY, 1.0) else Method(kind, scale)
                    words = [label, "averaged"] if method.kind != COPY else [label]
                    if method.branch_scale != 1:
                        words.append(f"× {method.branch_scale:g}")
                    yield Candidate(" ".join(words), plan.with_method(method))


def _keeps_pattern(plan: DepthPlan, period: int) -> bool:
    try:
        check_pattern(plan, period, "")
    except UsageError:
        return False
    return True


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """Read ``1,2,8:15``: whole numbers, and ranges whose end is not included.

    Raises:
        UsageError: not of that form, or empty.
    """
    found: list[int] = []
    for part in text.split(","):
        first, colon, last = part.strip().partition(":")
        try:
            low = int(first)
            high = int(last) if colon else low + 1
        except ValueError:
            raise UsageError(
                f"{option} {text}: whole numbers with commas between are needed, or ranges such "
                "as 2:9 (the end not included)."
            ) from None
        if not 0 <= low < high <= 10_000:
            raise UsageError(f"{option} {part.strip()}: this range has no number that can be.")
        found += range(low, high)
    return tuple(dict.fromkeys(found))
