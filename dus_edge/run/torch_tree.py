"""Trees of shared prefixes through transformers: one forward pass a step.

The tokens of a step lie side by side in one row; a mask of four dimensions lets each see the common
prefix and its own ancestors, and its position is that in its own sequence. The head runs where
a logit is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dus_edge.errors import DusEdgeError
from dus_edge.run.folders import hushed
from dus_edge.run.tree import FlatTree, TreeStep


class TorchTree:
    """An engine for steps of `dus_edge.run.tree.tree_steps`."""

    def __init__(self, model: Any, path: Path) -> None:
        """
        Args:
            model: of transformers, with causal attention in all layers.
            path: of its folder, for messages.
        """
        from transformers import DynamicCache

        self._model, self._path = model, path
        # Without the config, which would have it forget what a sliding window leaves behind.
        self._cache = DynamicCache()
        self._kept = np.empty(0, np.int64)
        self._window: int | None = getattr(model.config, "sliding_window", None)

    def compute(self, step: TreeStep) -> np.ndarray:
        """Logits of the rows that the step reads, float32, ``(n_read, vocab)``.

        Raises:
            DusEdgeError: the device's memory is too small.
        """
        import torch

        tree, device = step.tree, self._model.device
        self._forget(len(self._kept) - step.base)
        self._kept = self._kept[: step.base]
        mask = torch.from_numpy(visible(self._kept, tree, self._window)).to(device)
        read = tree.read if len(tree.read) else np.zeros(1, np.int64)
        try:
            with torch.inference_mode(), hushed():
                out = self._model(
                    input_ids=torch.from_numpy(tree.tokens)[None].to(device),
                    position_ids=torch.from_numpy(tree.positions)[None].to(device),
                    attention_mask=mask[None, None],
                    past_key_values=self._cache,
                    use_cache=True,
                    logits_to_keep=torch.from_numpy(read).to(device),
                )
        except torch.OutOfMemoryError:
            raise DusEdgeError(
                f"{self._path}: {device} has too little memory for the model; take --device cpu."
            ) from None
        if step.keep:
            self._kept = np.concatenate([self._kept, tree.positions])
        else:
            self._forget(len(tree.tokens))
        return out.logits[0, : len(tree.read)].float().cpu().numpy()

    def _forget(self, n: int) -> None:
        """Drop the last tokens of the cache."""
        if n > 0:
            self._cache.crop(-n)


def visible(prefix: np.ndarray, tree: FlatTree, window: int | None) -> np.ndarray:
    """Which tokens each token of a tree sees.

    Args:
        prefix: positions of the common prefix, ``(m,)``.
        tree: of n tokens.
        window: of sliding attention; None for all.

    Returns:
        bool, ``(n, m + n)``.
    """
    n = len(tree.tokens)
    first, last = tree.leaves[:, 0], tree.leaves[:, 1]
    own = (first[None] <= first[:, None]) & (last[None] >= last[:, None])
    own &= np.tri(n, dtype=bool)
    seen = np.concatenate([np.ones((n, len(prefix)), bool), own], axis=1)
    if window is not None:
        positions = np.concatenate([prefix, tree.positions])
        seen &= tree.positions[:, None] - positions[None] < window
    return seen
