"""Loss on text that is held out, by language."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dus_edge.calibrate.world import World
from dus_edge.train.heal.network import Network
from dus_edge.train.packing.batches import NO_LABEL, Batch


@dataclass(frozen=True)
class HeldoutLoss:
    """Cross-entropy in nats a token.

    Attributes:
        by_language: mean over each language's tokens.
        mean: over all tokens.
        n_tokens: that were predicted.
    """

    by_language: dict[str, float]
    mean: float
    n_tokens: int


def heldout_loss(
    network: Network, batches: Sequence[tuple[str, Batch]], world: World
) -> HeldoutLoss:
    """Loss of a network on batches with their languages; processes share the work."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    network.eval()
    with torch.no_grad():
        # Every process runs as often as the others, for their layers are gathered together.
        for first in range(0, len(batches), world.size):
            place = first + world.rank
            language, batch = batches[min(place, len(batches) - 1)]
            labels = torch.from_numpy(batch.labels).to(world.device)
            _, plain = network(
                torch.from_numpy(batch.ids).to(world.device),
                torch.from_numpy(batch.positions).to(world.device),
                labels,
            )
            counted = place < len(batches)
            sums[language][0] += plain.item() * counted
            sums[language][1] += int((labels != NO_LABEL).sum()) * counted
    network.train()
    languages = sorted({language for language, _ in batches})
    flat = world.sum(*(x for language in languages for x in sums[language]))
    pairs = dict(zip(languages, zip(flat[::2], flat[1::2], strict=True), strict=True))
    total, count = (sum(column) for column in zip(*pairs.values(), strict=True))
    return HeldoutLoss(
        {language: loss / n for language, (loss, n) in pairs.items() if n},
        total / count,
        int(count),
    )
