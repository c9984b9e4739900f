"""Which source layer stands at each place of the up-scaled model: pure lists of numbers.

Depth up-scaling (SOLAR 10.7B, arXiv:2312.15166, section 2): take two copies of an n-layer base,
drop the last m layers of the first and the first m of the second, and stack them:
s = 2 (n − m) layers. SOLAR has n = 32, m = 8, s = 48.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from dus_edge.errors import UsageError
from dus_edge.upscale.methods import AVERAGED, PLAIN_COPIES, Method


@dataclass(frozen=True)
class Seam:
    """Where two neighbours of the result were not neighbours in the base.

    Attributes:
        position: index, in the result, of the first layer after the seam.
        left: source layer before the seam.
        right: source layer after it.
    """

    position: int
    left: int
    right: int


@dataclass(frozen=True)
class DepthPlan:
    """The source layer of every layer of the result, all 0-based.

    Attributes:
        n_base: layers of the base.
        sources: ``sources[i]`` is the base layer that the result's layer i is a copy of.
        method: how `copies` are made.
    """

    n_base: int
    sources: tuple[int, ...]
    method: Method = PLAIN_COPIES

    def __post_init__(self) -> None:
        if not self.sources:
            raise UsageError("The plan has no layers; give at least one range such as 0:24.")
        if bad := [i for i in self.sources if not 0 <= i < self.n_base]:
            raise UsageError(
                f"The plan asks for layer {bad[0]}, but the base has layers 0–{self.n_base - 1}."
            )
        if not self.method.is_plain and not self.copies:
            raise UsageError(
                f"The copies shall be changed ({self.method.spelled}), and the plan {self.spelled} "
                "has none; leave that out, or repeat layers, as --drop does."
            )

    @property
    def depth(self) -> int:
        """Layers of the result."""
        return len(self.sources)

    @property
    def is_identity(self) -> bool:
        """Whether the result is the base itself."""
        return self.sources == tuple(range(self.n_base))

    @property
    def copies(self) -> tuple[int, ...]:
        """Layers of the result whose source stands at an earlier place already, in order.

        In SOLAR's plan 0:24,8:32 the result's layers 24 to 39.
        """
        first: dict[int, int] = {}
        for i, source in enumerate(self.sources):
            first.setdefault(source, i)
        return tuple(i for i, source in enumerate(self.sources) if first[source] != i)

    @property
    def seams(self) -> tuple[Seam, ...]:
        """Every place where consecutive layers do not follow each other in the base."""
        steps = enumerate(pairwise(self.sources), start=1)
        return tuple(Seam(i, a, b) for i, (a, b) in steps if b != a + 1)

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The plan as maximal half-open ranges of source layers."""
        cuts = [0, *(s.position for s in self.seams), self.depth]
        return tuple((self.sources[a], self.sources[b - 1] + 1) for a, b in pairwise(cuts))

    @property
    def spelled(self) -> str:
        """The plan as `--plan` takes it, e.g. ``0:24,8:32``."""
        return ",".join(f"{a}:{b}" for a, b in self.ranges)

    @property
    def drop(self) -> int | None:
        """SOLAR's m if the plan is of that form, else None."""
        n = self.n_base
        m = n - self.depth // 2
        if not 0 <= m < n:
            return None
        return m if self.sources == from_ranges(n, [(0, n - m), (m, n)]).sources else None

    @property
    def block(self) -> tuple[int, int] | None:
        """First and end of the layers that run twice, one copy behind the other, if that is all."""
        if len(self.seams) != 1:
            return None
        end, start = self.seams[0].position, self.seams[0].right
        made = from_ranges(self.n_base, [(0, end), (start, self.n_base)]) if start < end else None
        return (start, end) if made and made.sources == self.sources else None

    def parents(self, layer: int) -> tuple[int, ...]:
        """Base layers that a layer of the result is the mean of: one, or of averaged copies two."""
        source = self.sources[layer]
        if self.method.kind != AVERAGED or layer not in self.copies or source + 1 == self.n_base:
            return (source,)
        return source, source + 1

    def interleaved(self) -> DepthPlan:
        """The same layers, each copy right behind its original."""
        first = {source: i for i, source in reversed(tuple(enumerate(self.sources)))}
        return replace(self, sources=tuple(sorted(self.sources, key=first.__getitem__)))

    def with_method(self, method: Method) -> DepthPlan:
        """The same layers, the copies among them made in another way."""
        return replace(self, method=method)

    def then(self, following: DepthPlan) -> DepthPlan:
        """This plan with another one applied to its result."""
        if following.n_base != self.depth:
            raise UsageError(
                f"A plan for {following.n_base} layers cannot follow one that makes {self.depth}."
            )
        return DepthPlan(self.n_base, tuple(self.sources[i] for i in following.sources))


def check_pattern(plan: DepthPlan, period: int, name: str) -> None:
    """See that every layer stands where it stood in a pattern that repeats over the base's layers.

    Args:
        plan: what is asked for.
        period: layers after which the pattern repeats; 1 for none.
        name: of the family, for the message.

    Raises:
        UsageError: a layer would do another layer's part; the nearest m that is allowed is named.
    """
    if period > 1 and plan.method.kind == AVERAGED:
        raise UsageError(
            f"The layers of {name} follow a pattern of {period}, and averaged copies would mix "
            "layers that stand elsewhere in it; choose --method copy."
        )
    bad = next((i for i, source in enumerate(plan.sources) if (source - i) % period), None)
    if bad is None:
        return
    raise UsageError(
        f"The layers of {name} follow a pattern of {period}, and layer {bad} would be a copy of "
        f"layer {plan.sources[bad]}, which stands elsewhere in it; {_fitting(plan, period)}"
    )


def check_averaged(plan: DepthPlan, kinds: Mapping[str, Sequence[bool]], name: str) -> None:
    """See that averaged copies are means of layers that do the same.

    Args:
        plan: what is asked for.
        kinds: what a layer of the base does or not, ``has a window`` for one, and which do.
        name: of the family, for the message.

    Raises:
        UsageError: a copy would be the mean of two that differ; the method that works is named.
    """
    for i in plan.copies:
        parents = plan.parents(i)
        for what, members in kinds.items():
            if len({members[parent] for parent in parents}) > 1:
                raise UsageError(
                    f"Layer {i} would be the mean of layers {parents[0]} and {parents[1]}, and "
                    f"only one of the two {what} in this {name}; choose --method copy."
                )


def _fitting(plan: DepthPlan, period: int) -> str:
    """What to choose in place of a plan that breaks a pattern."""
    n, m, keep = plan.n_base, plan.drop, "choose ranges that keep the pattern"
    block = plan.block
    if m is not None:
        fitting = [k for k in range((n + 1) // 2) if (n - 2 * k) % period == 0]
        if fitting:
            best = min(fitting, key=lambda k: (abs(k - m), -k))
            return f"choose --drop {best}, which makes {2 * (n - best)} layers."
        block = (m, n - m)
    if block is not None:
        start, end = block
        ends = range(start + period, n + 1, period)
        if ends:
            return f"{keep}, such as --block {start}:{min(ends, key=lambda e: abs(e - end))}."
    elif plan == plan.interleaved():
        return f"{keep}; --place interleaved cannot."
    return f"{keep}."


def identity(n: int) -> DepthPlan:
    """The base as it is."""
    return DepthPlan(n, tuple(range(n)))


def from_ranges(n: int, ranges: list[tuple[int, int]]) -> DepthPlan:
    """Half-open ranges of source layers, one after the other."""
    return DepthPlan(n, tuple(i for a, b in ranges for i in range(a, b)))


def from_block(n: int, text: str) -> DepthPlan:
    """A base whose layers i to j - 1 run twice, one copy behind the other, from ``i:j``.

    Raises:
        UsageError: not of that form, an empty block, or layers that there are not.
    """
    first, _, last = text.partition(":")
    try:
        start, end = int(first), int(last)
    except ValueError:
        raise UsageError(
            f"The block {text!r} is not of the form 8:22 (0-based layers, the end not included)."
        ) from None
    if not 0 <= start < end <= n:
        raise UsageError(
            f"The block {text} does not fit a model of {n} layers (0 ≤ start < end ≤ {n})."
        )
    return from_ranges(n, [(0, end), (start, n)])


def from_drop(n: int, m: int | None = None) -> DepthPlan:
    """SOLAR's plan: n layers, m dropped from each copy; by default a quarter of them (8 of 32).

    Raises:
        UsageError: m is negative, or so large that the result is not deeper than the base.
    """
    m = n // 4 if m is None else m
    highest = (n - 1) // 2
    if not 0 <= m <= highest:
        raise UsageError(
            f"m = {m} is out of range: for a base of {n} layers, --drop takes 0 to {highest} "
            "(the result, 2 × (n − m) layers, must be deeper than the base)."
        )
    return from_ranges(n, [(0, n - m), (m, n)])


def from_layers(n: int, s: int) -> DepthPlan:
    """SOLAR's plan by the result's depth: m = n − s / 2.

    Raises:
        UsageError: s is odd, not above n, or above 2 n.
    """
    if s % 2 or not n < s <= 2 * n:
        low = n + 1 + (n + 1) % 2
        raise UsageError(
            f"{s} layers cannot be made of a base of {n}: --layers takes even numbers "
            f"from {low} to {2 * n} (s = 2 × (n − m))."
        )
    return from_drop(n, n - s // 2)


def parse(n: int, text: str) -> DepthPlan:
    """Read ``0:24,8:32``: half-open ranges of 0-based source layers; ``7`` is ``7:8``.

    Raises:
        UsageError: not of that form, an empty range, or a layer that the base lacks.
    """
    ranges = []
    for part in text.split(","):
        first, colon, last = part.strip().partition(":")
        try:
            a = int(first)
            b = int(last) if colon else a + 1
        except ValueError:
            raise UsageError(
                f"The plan {text!r} is not of the form 0:24,8:32 (ranges of 0-based layers, "
                "the end not included)."
            ) from None
        if not 0 <= a < b <= n:
            raise UsageError(
                f"The plan's range {part.strip()} does not fit a base of {n} layers "
                f"(0 ≤ start < end ≤ {n})."
            )
        ranges.append((a, b))
    return from_ranges(n, ranges)


def choose(
    n: int,
    *,
    drop: int | None = None,
    layers: int | None = None,
    plans: tuple[str, ...] = (),
    blocks: tuple[str, ...] = (),
    upscale: bool = True,
) -> DepthPlan:
    """The plan that a command line asks for; several plans or blocks apply one after the other.

    Raises:
        UsageError: more than one way of saying it, or a value that does not fit the base.
    """
    given = [
        name
        for name, there in (
            ("--drop", drop is not None),
            ("--layers", layers is not None),
            ("--plan", bool(plans)),
            ("--block", bool(blocks)),
            ("--no-upscale", not upscale),
        )
        if there
    ]
    if len(given) > 1:
        raise UsageError(f"{given[0]} and {given[1]} say the same thing; give one of them.")
    if not upscale:
        return identity(n)
    if layers is not None:
        return from_layers(n, layers)
    if not plans and not blocks:
        return from_drop(n, drop)
    plan = identity(n)
    for text in plans:
        plan = plan.then(parse(plan.depth, text))
    for text in blocks:
        plan = plan.then(from_block(plan.depth, text))
    return plan
