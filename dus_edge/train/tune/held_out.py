"""How well a model answers what it was not tuned on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dus_edge.progress import Advance
from dus_edge.train.tune.examples import Example, Pair


@dataclass(frozen=True)
class PairScores:
    """Pairs of answers under a model and its reference.

    Attributes:
        margin: mean of beta times how much further the chosen answer has gained on the reference
            than the rejected one, in nats; DPO's reward margin.
        accuracy: share of pairs whose margin is above zero.
        likelier: share of pairs whose chosen answer is the likelier one, reference left aside.
    """

    margin: float
    accuracy: float
    likelier: float


def answer_loss(model: Any, examples: Sequence[Example], advance: Advance) -> float:
    """Mean loss of a learnt token, in nats, over all examples together.

    One example at a time, so that no padding is in it.
    """
    total, n = 0.0, 0
    with _still(model):
        for example in examples:
            learnt = torch.tensor(example.learnt[1:])
            total -= float(_log_probs(model, example.ids)[learnt].sum())
            n += int(learnt.sum())
            advance(1)
    return total / n


def pair_log_probs(model: Any, pairs: Sequence[Pair], advance: Advance) -> torch.Tensor:
    """Log-probabilities of the answers: ``(n, 2)`` float64, chosen and rejected."""
    found = torch.zeros((len(pairs), 2), dtype=torch.float64)
    with _still(model):
        for i, pair in enumerate(pairs):
            for j, answer in enumerate((pair.chosen, pair.rejected)):
                log_probs = _log_probs(model, (*pair.prompt, *answer))
                found[i, j] = log_probs[-len(answer) :].sum()
            advance(1)
    return found


def pair_scores(log_probs: torch.Tensor, reference: torch.Tensor, beta: float) -> PairScores:
    """What `pair_log_probs` of a model and of its reference say of it."""
    gained = log_probs - reference
    margins = beta * (gained[:, 0] - gained[:, 1])
    return PairScores(
        float(margins.mean()),
        float((margins > 0).double().mean()),
        float((log_probs[:, 0] > log_probs[:, 1]).double().mean()),
    )


def _log_probs(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Of every token but the first: ``(n - 1,)`` float64 on the CPU."""
    tokens = torch.tensor([ids], device=model.device)
    logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
    chosen = logits.gather(1, tokens[0, 1:, None])[:, 0]
    return (chosen - logits.logsumexp(1)).double().cpu()


@contextmanager
def _still(model: Any) -> Iterator[None]:
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)
