"""Gradients of a model's own predictions carried down through its layers, a layer at a time.

Text goes forward once, and the states before all layers are kept in a file. From labels that the
model itself draws, gradients go back through the layers, each computed again from its states: so
one layer's weights are in memory. What is made of the gradients is others' business: `sensitivity`
and `token_weights`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from dus_edge.calibrate.engine import DTYPES, ComputeSettings, Shares
from dus_edge.calibrate.fisher.gradients import (
    LayerGradients,
    TracedLayer,
    label_gradients,
    layer_gradients,
)
from dus_edge.calibrate.layer import Positions, as_tensor, positions, read_layer
from dus_edge.calibrate.streams import KeptStates
from dus_edge.calibrate.world import ALONE, World
from dus_edge.checkpoint.spec import Checkpoint

#: Bytes of logits that are in memory at once.
_LOGITS_BYTES = 64 << 20


def first_labelled(n_ctx: int) -> int:
    """The first position of a chunk that labels are drawn at: its first half is context alone.

    So does `quality` count divergence, and llama.cpp's perplexity tool.
    """
    return n_ctx // 2


def drawn_labels(tokens: np.ndarray, first: int, seed: int) -> np.ndarray:
    """Of each token that gets a label, a number in [0, 1) that says which, float32.

    Args:
        tokens: ``(n_chunks, n_ctx)`` of all processes.
        first: position of a chunk that labels begin at.
        seed: of the draw.
    """
    n_chunks, n_ctx = tokens.shape
    return np.random.default_rng(seed).random((n_chunks, n_ctx - first), "f4")


class DownwardState:
    """How far the way down is, in a folder: a file of what each step that is done has found.

    Steps are the head, the layers from the last to the first, and what comes behind them.

    Args:
        folder: of the run; it is there.
        identity: of all inputs, hex.
        world: processes that share the run and the folder, each with a file of its own states.
    """

    def __init__(self, folder: Path, identity: str, world: World = ALONE) -> None:
        self.folder, self.identity, self.world = folder, identity, world

    @property
    def n_done(self) -> int:
        """Steps that are done."""
        try:
            kept = json.loads(self._index.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return 0
        return int(kept["n_done"]) if kept.get("identity") == self.identity else 0

    @property
    def has_states(self) -> bool:
        """Whether the file of hidden states is there, without which nothing can go on."""
        return self._states.exists()

    @contextmanager
    def states(self) -> Iterator[int]:
        """The file of hidden states and gradients, open while the block runs."""
        fd = os.open(self._states, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            yield fd
        finally:
            os.close(fd)

    def done(self, step: int, write: Callable[[Path], None]) -> None:
        """Keep what a step has found, and say that it and all before it are done.

        Args:
            step: which.
            write: writes it to a path that is given; `found` is where it lies then.
        """
        # The gradient of the step before may be written over only when this one lies whole.
        self.world.wait()
        if self.world.first:
            _replaced(self.found(step), write)
            index = json.dumps({"identity": self.identity, "n_done": step + 1})
            _replaced(self._index, lambda path: _write_text(path, index))
        self.world.wait()

    def found(self, step: int) -> Path:
        """What a step that is done has found."""
        return self.folder / f"step-{step:04}"

    @property
    def _states(self) -> Path:
        return self.folder / (f"states-{self.world.rank}" if self.world.many else "states")

    @property
    def _index(self) -> Path:
        return self.folder / "downward.json"


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _replaced(path: Path, write: Callable[[Path], None]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    write(partial)
    partial.replace(path)


def n_slots(n_layers: int) -> int:
    """Slots that the file needs: states before and behind all layers, and gradients in two."""
    return n_layers + 3


@dataclass(frozen=True)
class Descent:
    """The way down, one step at a time: the head is step 0, layer i is step n_layers - i.

    The gradient that a step leaves lies in the slot of its parity.

    Attributes:
        checkpoint: the model.
        tokens: ``(n_chunks, n_ctx)`` int32, this process's.
        drawn: what `drawn_labels` gives for them.
        n_labelled: how many tokens get a label in all processes.
        states: in slot i those before layer i, in slot n those behind the last; see `n_slots`.
        settings: device and precision.
        world: all processes.
        advance: told of work done.
    """

    checkpoint: Checkpoint
    tokens: np.ndarray
    drawn: np.ndarray
    n_labelled: int
    states: KeptStates
    settings: ComputeSettings
    world: World
    advance: Callable[[int], None]

    @cached_property
    def _where(self) -> tuple[Positions, ...]:
        n_ctx, settings = self.tokens.shape[1], self.settings
        return positions(self.checkpoint.config, n_ctx, settings.device, DTYPES[settings.dtype])

    def slot(self, step: int) -> int:
        """Where the gradient of a step lies."""
        return self.checkpoint.config.n_layers + 1 + step % 2

    def shares(self) -> Shares:
        """Of one step's work."""
        return Shares(self.advance, self.tokens.size)

    def head_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The final norm and the head."""
        config, settings = self.checkpoint.config, self.settings
        roles = "final_norm", "embedding" if config.tied_head else "head"
        read = (as_tensor(self.checkpoint.read(config.family.name(role))) for role in roles)
        norm, head = (w.to(settings.device, DTYPES[settings.dtype]) for w in read)
        return norm, head

    def head(
        self, norm: torch.Tensor, head: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Step 0: gradients of labels with regard to final states, chunk by chunk.

        Yields:
            the chunk, its states behind the last layer ``(n_ctx, hidden)``, and the second of
            `label_gradients` where labels are, ``(n_labels,)``.
        """
        config, device = self.checkpoint.config, self.settings.device
        n_chunks, n_ctx = self.tokens.shape
        first = n_ctx - self.drawn.shape[1]
        at_once = max(1, _LOGITS_BYTES // (4 * config.vocab_size))
        for chunk in range(n_chunks):
            h = self.states.load(config.n_layers, slice(chunk, chunk + 1)).to(device)
            gradient = torch.zeros_like(h)
            u = torch.from_numpy(self.drawn[chunk]).to(device)
            spread = []
            for i in range(first, n_ctx, at_once):
                some = slice(i, min(i + at_once, n_ctx))
                gradient[0, some], found = label_gradients(
                    h[0, some], norm, head, config, u[i - first : i - first + at_once]
                )
                spread.append(found)
            self.states.put(self.slot(0), gradient.cpu(), chunk)
            yield chunk, h[0], torch.cat(spread)

    def traced(self, index: int) -> TracedLayer:
        """A layer's weights, ready to go down through."""
        config, settings = self.checkpoint.config, self.settings
        stored = read_layer(self.checkpoint, index)
        dtype = DTYPES[settings.dtype]
        weights = {role: stored.pop(role).to(settings.device, dtype) for role in tuple(stored)}
        return TracedLayer(config, weights, self._where[index])

    def layer(
        self, layer: TracedLayer, step: int, index: int, group: range
    ) -> Iterator[tuple[slice, LayerGradients]]:
        """Carry the gradients of some chunks down through a layer, batch by batch.

        Yields:
            the batch's chunks, and its gradients.
        """
        device = self.settings.device
        at_once = max(1, self.settings.batch_tokens // self.tokens.shape[1])
        for i in range(group.start, group.stop, at_once):
            batch = slice(i, min(i + at_once, group.stop))
            h = self.states.load(index, batch).to(device)
            behind = self.states.load(self.slot(step - 1), batch).to(device)
            found = layer_gradients(layer, h, behind)
            self.states.put(self.slot(step), found.below.cpu(), batch.start)
            yield batch, found
