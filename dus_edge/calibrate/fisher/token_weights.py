"""How much an error behind a layer's matrices is worth, token by token.

The squared error of a layer's outputs counts all tokens alike, but the model's predictions do not:
some tokens' outputs move them a hundred times as much as others', and the first token of a text,
whose activations are the largest of all, hardly moves them. So each token is weighed by the
gradient of the model's own labels with regard to what the matrices give there: with the squares,
the weighted error would be the expected divergence if all outputs of a token mattered alike (as in
GuidedQuant, arXiv:2505.07004). One draw of labels says little of a single token, though; the square
roots of the squares lose less on text that was held out (benchmarks/LOG.md).

At the head the squares of the gradient of the logits are known without a draw, and are taken as
they are. Rows of an embedding are looked up, so there it is the gradient at what they give that
counts; an embedding that is the head as well is weighed by both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dus_edge.calibrate.engine import ComputeSettings
from dus_edge.calibrate.fisher.descent import Descent, DownwardState, drawn_labels
from dus_edge.calibrate.streams import KeptStates
from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.errors import CheckpointError
from dus_edge.progress import count_resumed

#: By site, ``(n_chunks, n_ctx)`` float32 with a mean of 1.
TokenWeights = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class HeadWeights:
    """What errors at the model's two ends are worth, in one unit.

    Attributes:
        tokens: ``(n_chunks, n_ctx)`` float32 with a mean of 1, of errors of the logits.
        lookups: ``(n_chunks,)`` float32, of errors of looked-up rows, summed over a chunk and
            averaged over columns.
    """

    tokens: np.ndarray
    lookups: np.ndarray


#: Names of arrays that are kept of the ends, beside those of sites.
_HEAD, _LOOKUPS = "head", "lookups"
#: What every token counts, as a share of the mean.
_LEAST = 0.03


def weighing_work(checkpoint: Checkpoint, tokens: np.ndarray) -> int:
    """Tokens times steps: what `weigh_tokens` tells of as it goes."""
    return tokens.size * (checkpoint.config.n_layers + 1)


def weigh_tokens(
    checkpoint: Checkpoint,
    tokens: np.ndarray,
    states: KeptStates,
    settings: ComputeSettings,
    state: DownwardState,
    *,
    languages: Sequence[str],
    seed: int = 0,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[list[TokenWeights], HeadWeights]:
    """Weights of all tokens at all sites, found on the way from the head to the first layer.

    Args:
        checkpoint: the model.
        tokens: ``(n_chunks, n_ctx)`` int32.
        states: in slot i those before layer i, in slot n those behind the last; see `n_slots`.
        settings: device and precision.
        state: what an earlier run of the same has done is not done again.
        languages: one a chunk; all count alike, however many tokens a tokenizer makes of one.
        seed: of the labels.
        advance: told of work done, out of `weighing_work`.

    Returns:
        those of each layer, and those of the head and the embedding.

    Raises:
        CheckpointError: a gradient is no finite number.
        OutputError: the disk is full.
    """
    # Every token with a label says something of itself and of all that it sees.
    drawn = drawn_labels(tokens, 0, seed)
    way = _Weighing(checkpoint, tokens, drawn, drawn.size, states, settings, state.world, advance)
    done, n_layers = state.n_done, checkpoint.config.n_layers
    for step in range(n_layers + 1):
        if step < done:
            count_resumed(advance, tokens.size)
        else:
            found = way.squares_of_layer(step) if step else way.squares_of_head()
            state.done(step, partial(_keep, found))
    squares = [_kept(state.found(step)) for step in range(n_layers + 1)]
    head, lookups = squares[0][_HEAD], squares[n_layers].pop(_LOOKUPS)
    layers = [
        {site: weights_of(np.sqrt(s), languages) for site, s in found.items()}
        for found in reversed(squares[1:])
    ]
    config = checkpoint.config
    # A logit moves by what the head gives over the divisor.
    unit = lookups.sum() / head.sum() * config.logit_divisor**2 / config.hidden_size
    looked_up = (weights_of(lookups, languages).sum(1) * unit).astype(np.float32)
    return layers, HeadWeights(weights_of(head, languages), looked_up)


def _keep(found: Mapping[str, np.ndarray], path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **found)


def _kept(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


@dataclass(frozen=True)
class _Weighing(Descent):
    def squares_of_head(self) -> Mapping[str, np.ndarray]:
        shares = self.shares()
        found = np.zeros(self.tokens.shape)
        for chunk, _, spread in self.head(*self.head_weights()):
            found[chunk] = spread.cpu().numpy()
            shares(self.tokens.shape[1], 1)
        return {_HEAD: found}

    def squares_of_layer(self, step: int) -> Mapping[str, np.ndarray]:
        index = self.checkpoint.config.n_layers - step
        layer, shares = self.traced(index), self.shares()
        sites = {r.role: site for site, rules in layer.config.family.sites.items() for r in rules}
        places = {*sites.values()} | ({_LOOKUPS} if index == 0 else set())
        squares = {place: np.zeros(self.tokens.shape) for place in places}
        for batch, found in self.layer(layer, step, index, range(len(self.tokens))):
            for role, gradient in found.outputs.items():
                squares[sites[role]][batch] += _squares(gradient)
            if index == 0:
                scale = self.checkpoint.config.embedding_scale
                squares[_LOOKUPS][batch] = _squares(found.below) * scale**2
            shares((batch.stop - batch.start) * self.tokens.shape[1], 1)
        for place, s in squares.items():
            if not np.isfinite(s).all():
                raise CheckpointError(
                    f"gradients at {place} of layer {index} are not finite; its weights or "
                    "those above are damaged, or need --dtype float32."
                )
        return squares


def _squares(gradient: torch.Tensor) -> np.ndarray:
    return gradient.float().square().sum(-1).cpu().numpy()


def weights_of(counts: np.ndarray, languages: Sequence[str]) -> np.ndarray:
    """Weights of tokens; all alike where none counts.

    Args:
        counts: ``(n_chunks, n_ctx)`` float64, not negative: what each counts within its language.
        languages: one a chunk; the weights of each add up to the same.

    Returns:
        the same shape, float32, with a mean of 1.
    """
    # No token is left out, not even one that no label has told anything of.
    found = counts + (_LEAST * counts.mean() or 1.0)
    for language in set(languages):
        own = [i for i, other in enumerate(languages) if other == language]
        found[own] /= found[own].sum()
    return (found / found.mean()).astype(np.float32)
