"""How much an error behind a layer's matrices is worth, token by token.

The squared error of a layer's outputs counts all tokens alike, but the model's predictions do not:
some tokens' outputs move them a hundred times as much as others', and the first token of a text,
whose activations are the largest of all, hardly moves them. So each token is weighed by the
gradient of the model's own labels with regard to what the matrices give there: with the squares,
the weighted error would be the expected divergence if all outputs of a token mattered alike (as in
GuidedQuant, arXiv:2505.07004). One draw of labels says little of a single token, though; the square
roots of the squares lose less on text that was held out (benchmarks/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dus_edge.calibrate.engine import ComputeSettings
from dus_edge.calibrate.fisher.descent import Descent, DownwardState, drawn_labels
from dus_edge.calibrate.streams import KeptStates
from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.errors import CheckpointError

#: By site, ``(n_chunks, n_ctx)`` float32 with a mean of 1.
TokenWeights = Mapping[str, np.ndarray]


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
) -> list[TokenWeights]:
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
        by layer.

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
            advance(tokens.size)
        elif step == 0:
            way.go_through_head()
            state.done(step, lambda path: path.touch())
        else:
            found = way.squares_of_layer(step, n_layers - step)
            state.done(step, lambda path, found=found: _keep(found, path))
    squares = (_kept(state.found(n_layers - i)) for i in range(n_layers))
    return [{site: weights_of(s, languages) for site, s in found.items()} for found in squares]


def _keep(found: Mapping[str, np.ndarray], path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **found)


def _kept(path: Path) -> Mapping[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


@dataclass(frozen=True)
class _Weighing(Descent):
    def go_through_head(self) -> None:
        shares = self.shares()
        for _ in self.head(*self.head_weights()):
            shares(self.tokens.shape[1], 1)

    def squares_of_layer(self, step: int, index: int) -> Mapping[str, np.ndarray]:
        layer, shares = self.traced(index), self.shares()
        sites = {r.role: site for site, rules in layer.config.family.sites.items() for r in rules}
        squares = {site: np.zeros(self.tokens.shape, np.float64) for site in sites.values()}
        for batch, found in self.layer(layer, step, index, range(len(self.tokens))):
            for role, gradient in found.outputs.items():
                squares[sites[role]][batch] += gradient.float().square().sum(-1).cpu().numpy()
            shares((batch.stop - batch.start) * self.tokens.shape[1], 1)
        for site, s in squares.items():
            if not np.isfinite(s).all():
                raise CheckpointError(
                    f"gradients behind {site} of layer {index} are not finite; its weights or "
                    "those above are damaged, or need --dtype float32."
                )
        return squares


def weights_of(squares: np.ndarray, languages: Sequence[str]) -> np.ndarray:
    """Weights of tokens from the squared sizes of their gradients; all alike where there are none.

    Args:
        squares: ``(n_chunks, n_ctx)`` float64, not negative.
        languages: one a chunk; the weights of each add up to the same.

    Returns:
        the same shape, float32, with a mean of 1.
    """
    # No token is left out, not even one that no label has told anything of.
    found = np.sqrt(squares + (1e-3 * squares.mean() or 1.0))
    for language in set(languages):
        own = [i for i, other in enumerate(languages) if other == language]
        found[own] /= found[own].sum()
    return (found / found.mean()).astype(np.float32)
