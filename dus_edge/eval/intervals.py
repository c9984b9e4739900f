"""Tests and intervals of paired differences, from counts and moments alone.

Signs are those of candidate minus reference. Every interval is two-sided, with the error `alpha`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol

_HALVINGS = 200
_TINY = 1e-300


class Difference(Protocol):
    """A difference of two models' scores.

    Attributes:
        value: the difference.
        error: its standard error.
        p: two-sided, of no difference; None where nothing can be said.
    """

    @property
    def value(self) -> float: ...

    @property
    def error(self) -> float: ...

    @property
    def p(self) -> float | None: ...

    def limits(self, alpha: float) -> tuple[float, float] | None:
        """The interval; None where nothing can be said."""
        ...


@dataclass(frozen=True)
class PairedCounts:
    """The difference of two shares of right answers to the same questions.

    The test is McNemar's, exact: of the questions that one model alone gets right, each is as
    likely to be one's as the other's. The interval is Tango's, which inverts the score test and
    holds for few questions, and where none is answered otherwise (T. Tango, Statistics in Medicine
    17, 1998, 891-908; recommended by Fagerland, Lydersen and Laake, ibid. 33, 2014, 2850-2875).
    The exact test is the stricter one: near the border, p may be above `alpha` where the interval
    is without 0.

    Attributes:
        n: questions.
        gained: right for the candidate alone.
        lost: right for the reference alone.
    """

    n: int
    gained: int
    lost: int

    @property
    def value(self) -> float:
        return (self.gained - self.lost) / self.n

    @property
    def error(self) -> float:
        """That of the mean of n differences of −1, 0 and 1; 0 of a single one."""
        if self.n < 2:
            return 0.0
        squares = self.gained + self.lost - self.n * self.value**2
        return math.sqrt(max(squares, 0.0) / (self.n - 1) / self.n)

    @property
    def p(self) -> float:
        return mcnemar(self.gained, self.lost)

    def limits(self, alpha: float) -> tuple[float, float]:
        return tango_interval(self.n, self.gained, self.lost, alpha)


@dataclass(frozen=True)
class PairedMean:
    """The mean of differences that take any value; Student's t with n − 1 degrees of freedom.

    Attributes:
        n: documents, at least 2.
        value: mean of the differences.
        error: its standard error; 0 where all differences are equal, and then nothing is said.
    """

    n: int
    value: float
    error: float

    @property
    def p(self) -> float | None:
        return t_two_sided(self.value / self.error, self.n - 1) if self.error > 0 else None

    def limits(self, alpha: float) -> tuple[float, float] | None:
        if self.error <= 0:
            return None
        reach = t_quantile(alpha, self.n - 1) * self.error
        return self.value - reach, self.value + reach


@dataclass(frozen=True)
class WeightedSum:
    """A sum of independent differences, as a suite's average is.

    Variances add. The interval is put together from the parts' own, so that it is as honest as
    they are for few documents: the distance to its end is the root of the sum of the squares of
    theirs (MOVER; Zou and Donner, Statistics in Medicine 27, 2008, 1693-1702). p is the `alpha` at
    which it meets 0.

    Attributes:
        parts: the differences. One whose documents all differ by the same counts as known exactly.
        weights: of each.
    """

    parts: tuple[Difference, ...]
    weights: tuple[float, ...]

    @property
    def value(self) -> float:
        return sum(w * part.value for w, part in self._pairs())

    @property
    def error(self) -> float:
        return math.sqrt(sum((w * part.error) ** 2 for w, part in self._pairs()))

    @property
    def p(self) -> float | None:
        if all(part.limits(0.5) is None for part in self.parts):
            return None

        def excludes_zero(alpha: float) -> bool:
            low, high = self.limits(alpha) or (0.0, 0.0)
            return low > 0 or high < 0

        if self.value == 0:
            return 1.0
        # Halved in logarithms: a p of 1e-12 counts as much as one of 0.5.
        return math.exp(_border(lambda x: excludes_zero(math.exp(x)), 0.0, math.log(1e-16)))

    def limits(self, alpha: float) -> tuple[float, float] | None:
        down = up = 0.0
        known = False
        for w, part in self._pairs():
            if (ends := part.limits(alpha)) is None:
                continue
            known = True
            down += (w * (part.value - ends[0])) ** 2
            up += (w * (ends[1] - part.value)) ** 2
        if not known:
            return None
        return self.value - math.sqrt(down), self.value + math.sqrt(up)

    def _pairs(self) -> list[tuple[float, Difference]]:
        return list(zip(self.weights, self.parts, strict=True))


# -- shares ---------------------------------------------------------------------------------------


def mcnemar(gained: int, lost: int) -> float:
    """p of McNemar's exact test, two-sided: a binomial of the discordant with one half."""
    n, few = gained + lost, min(gained, lost)
    total, term = 0, 1
    for k in range(few + 1):
        total += term
        term = term * (n - k) // (k + 1)
    # Whole numbers divide exactly, whatever their length.
    return min(1.0, 2 * total / 2**n)


def tango_interval(n: int, gained: int, lost: int, alpha: float) -> tuple[float, float]:
    """Tango's score interval of (gained − lost) / n; see `PairedCounts`."""
    z = -NormalDist().inv_cdf(alpha / 2)

    def upper(more: int, less: int) -> float:
        """The largest difference that the score test does not refuse."""
        here = (more - less) / n
        return _border(lambda delta: _tango(n, more, less, delta) >= -z, here, 1.0)

    return -upper(lost, gained), upper(gained, lost)


def _tango(n: int, more: int, less: int, delta: float) -> float:
    """The score statistic of a difference delta, with the other share at its most likely value."""
    # That share solves a x² + b x + c = 0.
    a, b = 2 * n, (2 * n - more + less) * delta - more - less
    c = -less * delta * (1 - delta)
    share = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = n * (2 * share + delta * (1 - delta))
    gap = more - less - n * delta
    return gap / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, gap or 1.0)


def _border(holds: Callable[[float], bool], inside: float, outside: float) -> float:
    """Where a condition that holds at one end, and not at the other, ends; or the other end."""
    if holds(outside):
        return outside
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        if middle in (inside, outside):
            break
        if holds(middle):
            inside = middle
        else:
            outside = middle
    return inside


# -- Student's t ----------------------------------------------------------------------------------


def t_two_sided(t: float, df: float) -> float:
    """The probability of Student's t beyond ±t.

    Args:
        t: finite.
        df: degrees of freedom, above 0.
    """
    if t == 0:
        return 1.0
    square = t * t
    # Far out, and near the middle, what is small is computed and not a difference of what is large.
    if square > 1:
        return _incomplete_beta(df / 2, 0.5, df / (df + square), square / (df + square))
    return 1.0 - _incomplete_beta(0.5, df / 2, square / (df + square), df / (df + square))


def t_quantile(alpha: float, df: float) -> float:
    """The t beyond which, on both sides together, Student's t is with probability `alpha`."""
    high = 1.0
    while t_two_sided(high, df) > alpha:
        high *= 2
    return _border(lambda t: t_two_sided(t, df) >= alpha, 0.0, high)


def _incomplete_beta(a: float, b: float, x: float, rest: float) -> float:
    """The regularized incomplete beta function I_x(a, b); `rest` is 1 − x."""
    if x <= 0 or rest <= 0:
        return 0.0 if x <= 0 else 1.0
    log_front = (
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)
    )
    front = math.exp(log_front)
    if x < (a + 1) / (a + b + 2):
        return front * _beta_fraction(a, b, x) / a
    return 1.0 - front * _beta_fraction(b, a, rest) / b


def _beta_fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of I_x(a, b), by Lentz's method (DLMF 8.17.22)."""
    value = c = 1.0
    d = 1.0 / (1.0 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 100_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1.0 / (1.0 + term * d or _TINY)
            c = 1.0 + term / c or _TINY
            value *= c * d
        if abs(c * d - 1.0) < 1e-16 * 4:
            break
    return value


# -- several comparisons --------------------------------------------------------------------------


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's p values: below 5 % with them, and the chance of one false claim among all is too.

    What has no p was not compared and does not count (S. Holm, Scandinavian Journal of Statistics
    6, 1979, 65-70).
    """
    known = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    found: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        found[i] = largest
    return found
