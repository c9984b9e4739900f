"""How far a model's next-token distributions are from a reference's: pure functions on arrays.

The measures are those of llama.cpp's ``tools/perplexity/perplexity.cpp`` with
``--kl-divergence``: perplexity, Kullback–Leibler divergence KL(reference || candidate), its 99th
percentile, and how often both put the same token first. As there, the first half of every chunk
is only context; its tokens would be judged with little to go by. Two things are better than
there: log-probabilities are float32 instead of 16-bit steps below the largest, and standard
errors are taken over chunks, because tokens of one chunk lean on each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Rows that are float64 at once: with a vocabulary of 32,000 they are 8 MB.
_ROWS = 32


@dataclass(frozen=True)
class PerToken:
    """One number per scored token, float64 unless said otherwise; any shape, the same for all.

    Attributes:
        kl: KL(reference || candidate) of the next-token distribution, nats.
        same_top: bool, whether both models' most likely tokens are the same.
        nll_reference: −log of the reference's probability of the token that came, nats.
        nll_candidate: the same of the candidate.
    """

    kl: np.ndarray
    same_top: np.ndarray
    nll_reference: np.ndarray
    nll_candidate: np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error over chunks; the error is None for a single chunk."""

    value: float
    error: float | None


@dataclass(frozen=True)
class Scores:
    """A candidate on one language, or on all text.

    Attributes:
        n_chunks: chunks of text.
        n_tokens: tokens that were scored.
        perplexity: exp of the mean negative log-likelihood.
        perplexity_reference: the reference's on the same tokens.
        log_ratio: ln(perplexity / perplexity_reference); its error is that of paired
            differences, far smaller than either perplexity's.
        kl: mean divergence, nats.
        kl_p99: its 99th percentile over tokens, nats, interpolated linearly.
        same_top: share of tokens where both put the same token first, 0 to 1.
    """

    n_chunks: int
    n_tokens: int
    perplexity: Estimate
    perplexity_reference: Estimate
    log_ratio: Estimate
    kl: Estimate
    kl_p99: float
    same_top: Estimate


def first_scored(n_ctx: int, all_positions: bool = False) -> int:
    """The first position of a chunk whose next token is scored.

    The positions scored are ``first_scored(n_ctx) … n_ctx - 2``; the last one's next token is in
    no chunk. By default half of the chunk is context, ``first = n_ctx / 2`` in perplexity.cpp.
    """
    return 0 if all_positions else n_ctx // 2


def compare(reference: np.ndarray, candidate: np.ndarray, targets: np.ndarray) -> PerToken:
    """Score a candidate's distributions against the reference's.

    The sum over the vocabulary is of ``p (ln p − ln q) − p + q``, whose terms are never negative.
    For distributions the last two cancel; for float32 log-probabilities, whose sums are 1 up to
    1e-6, they take away what rounding would add. Equal arrays give exactly 0.

    Args:
        reference: ``(n, vocab)`` float32, natural log-probabilities, finite.
        candidate: the same of the candidate.
        targets: ``(n,)`` integers, the tokens that came.

    Returns:
        Arrays of shape ``(n,)``.
    """
    n = len(targets)
    if reference.shape != candidate.shape or len(reference) != n:
        raise ValueError(f"{reference.shape} and {candidate.shape} for {n} tokens")
    kl = np.empty(n)
    for i in range(0, n, _ROWS):
        log_p = reference[i : i + _ROWS].astype(np.float64)
        log_q = candidate[i : i + _ROWS].astype(np.float64)
        p = np.exp(log_p)
        log_p -= log_q
        log_p *= p
        log_p -= p
        log_p += np.exp(log_q, out=log_q)
        kl[i : i + _ROWS] = log_p.sum(axis=1)
    at = np.arange(n)
    return PerToken(
        kl=np.maximum(kl, 0),
        same_top=reference.argmax(axis=1) == candidate.argmax(axis=1),
        nll_reference=-reference[at, targets].astype(np.float64),
        nll_candidate=-candidate[at, targets].astype(np.float64),
    )


def summarize(scored: PerToken, languages: Sequence[str]) -> tuple[Scores, dict[str, Scores]]:
    """All tokens' scores, and those of each language in order of first appearance.

    Args:
        scored: arrays of shape ``(n_chunks, n_scored)``.
        languages: one per chunk.
    """
    names = list(dict.fromkeys(languages))
    strata = np.array([names.index(name) for name in languages])
    total = _scores(scored, strata)
    return total, {name: _scores(scored, strata, only=k) for k, name in enumerate(names)}


def _scores(scored: PerToken, strata: np.ndarray, only: int | None = None) -> Scores:
    chosen = np.ones(len(strata), bool) if only is None else strata == only
    strata = strata[chosen]
    kl, same_top = scored.kl[chosen], scored.same_top[chosen]
    candidate, reference = scored.nll_candidate[chosen], scored.nll_reference[chosen]
    return Scores(
        n_chunks=len(kl),
        n_tokens=kl.size,
        perplexity=_exp(estimate(candidate, strata)),
        perplexity_reference=_exp(estimate(reference, strata)),
        log_ratio=estimate(candidate - reference, strata),
        kl=estimate(kl, strata),
        kl_p99=float(np.percentile(kl, 99)),
        same_top=estimate(same_top.astype(np.float64), strata),
    )


def estimate(values: np.ndarray, strata: np.ndarray) -> Estimate:
    """Mean over tokens, and its standard error over chunks.

    Chunks are drawn within each language, so that what sets languages apart is no error of
    sampling (stratified mean: Cochran, Sampling Techniques, 3rd edition, 5.3). Where a language
    has a single chunk, the spread over all chunks stands in, which is on the safe side.

    Args:
        values: ``(n_chunks, n_scored)``.
        strata: ``(n_chunks,)`` integers, the language of each chunk.
    """
    means = values.mean(axis=1)
    n = len(means)
    groups = [means[strata == k] for k in np.unique(strata)]
    if n < 2:
        error = None
    elif min(map(len, groups)) < 2:
        error = float(means.std(ddof=1) / np.sqrt(n))
    else:
        error = float(np.sqrt(sum(len(g) * g.var(ddof=1) for g in groups)) / n)
    return Estimate(float(means.mean()), error)


def _exp(nats: Estimate) -> Estimate:
    """exp of an estimate; the error to first order. Infinite where float64 ends."""
    with np.errstate(over="ignore"):
        value = float(np.exp(nats.value))
    return Estimate(value, None if nats.error is None else value * nats.error)
