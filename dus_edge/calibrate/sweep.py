"""Many plans of one base at once, layer by layer: `upscale.shared_run` says in which order.

Only one layer's weights are in memory, with those of the next that are being read; hidden states
lie in a file. No up-scaled model is built, yet every layer is the one that a checkpoint of the
plan would have: `UpscaledCheckpoint` makes it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch

from dus_edge.calibrate.engine import DTYPES, ComputeSettings, check_finite, embedded
from dus_edge.calibrate.layer import (
    DecoderLayer,
    as_tensor,
    head_input,
    logits_of,
    positions,
    read_layer,
)
from dus_edge.calibrate.streams import KeptStates
from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.machine import keep_freed_memory
from dus_edge.progress import count_resumed
from dus_edge.upscale.plan import DepthPlan
from dus_edge.upscale.shared_run import LayerStep, SharedSchedule
from dus_edge.upscale.view import UpscaledCheckpoint

#: Entries of the vocabulary whose logits are in memory at once: of 512 tokens 4 MiB.
_COLUMNS = 2048


def run_schedule(
    base: Checkpoint,
    tokens: np.ndarray,
    schedule: SharedSchedule,
    states: KeptStates,
    settings: ComputeSettings,
    *,
    start: int = 0,
    done: Callable[[int], None] = lambda n: None,
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Do a schedule's steps.

    Args:
        base: the base of all plans.
        tokens: ``(n_chunks, n_ctx)`` int32 token ids; every chunk is a context of its own.
        schedule: of `share_layers`.
        states: with `schedule.n_slots` slots; those of the steps before `start` hold what the
            steps wrote.
        settings: device and precision.
        start: steps that are done already.
        done: told how many steps are done, after each.
        advance: told of work done, out of tokens × steps.

    Raises:
        CheckpointError: activations became NaN or infinite (the layer is named).
        OutputError: the disk is full.
    """
    keep_freed_memory()
    dtype, steps = DTYPES[settings.dtype], schedule.steps
    count_resumed(advance, start * tokens.size)
    if start == 0:
        states.put(0, embedded(base, tokens, dtype))
    n_chunks, n_ctx = tokens.shape
    where = positions(base.config, n_ctx, settings.device, dtype)
    width = max(1, settings.batch_tokens // n_ctx)
    batches = [slice(i, min(i + width, n_chunks)) for i in range(0, n_chunks, width)]
    left = [(max(first, start), end) for first, end in schedule.groups if end > start]
    with torch.inference_mode(), ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(_read_step, base, steps[left[0][0]]) if left else None
        for (first, end), following in zip_longest(left, left[1:]):
            assert ahead is not None
            stored = ahead.result()
            if following is not None:
                ahead = reader.submit(_read_step, base, steps[following[0]])
            weights = {name: stored.pop(name).to(settings.device, dtype) for name in tuple(stored)}
            layer = DecoderLayer(base.config, weights, where[steps[first].source])
            for i in range(first, end):
                for batch in batches:
                    h = layer.forward(states.load(steps[i].read, batch).to(settings.device))
                    check_finite(h, steps[i].source, batch.start)
                    states.put(steps[i].write, h.cpu(), batch.start)
                    advance(h.shape[0] * n_ctx)
                done(i + 1)


def _read_step(base: Checkpoint, step: LayerStep) -> dict[str, torch.Tensor]:
    """A step's layer, as a checkpoint of its plan has it."""
    if step.making.is_plain:
        return read_layer(base, step.source)
    twice = DepthPlan(base.config.n_layers, (step.source, step.source), step.making)
    return read_layer(UpscaledCheckpoint(base, twice), 1)


class NextTokenHead:
    """The base's final norm and head, which all plans share."""

    def __init__(self, base: Checkpoint, settings: ComputeSettings) -> None:
        config = base.config
        self._config, self._settings = config, settings
        role = "embedding" if config.tied_head else "head"
        self._norm, self._head = (
            as_tensor(base.read(config.family.name(r))).to(settings.device, DTYPES[settings.dtype])
            for r in ("final_norm", role)
        )

    def scores(
        self,
        states: KeptStates,
        chunk: int,
        reference: int,
        candidates: Sequence[int],
        targets: np.ndarray,
    ) -> np.ndarray:
        """Next-token scores of one chunk, at all its tokens but the last.

        The vocabulary comes a part at a time, so that what is done to logits finds them in a
        processor's cache. KL is Σ p (a − b) − lse(a) + lse(b) of the logits a and b, in the
        engine's precision; of float32 it is good to some 1e-6 nats.

        Args:
            states: that hold final states, before the norm.
            chunk: which.
            reference: slot of the base's.
            candidates: slots of the plans'.
            targets: ``(n_ctx - 1,)`` the tokens that came.

        Returns:
            ``(1 + n_candidates, 3, n_ctx - 1)`` float64, the reference first: the negative
            log-likelihood of the token that came and KL(reference || candidate), both in nats, and
            whether the candidate puts nothing before the reference's first token, 0 or 1.
        """
        n = len(targets)
        wanted = torch.from_numpy(targets.astype(np.int64)).to(self._settings.device)[:, None]
        slots = [reference, *sorted({*candidates} - {reference})]
        with torch.inference_mode():
            inputs = [self._input(states.read(slot, chunk, slice(0, n))) for slot in slots]
            sums = [_LogitSums(wanted) for _ in slots]
            for first in range(0, len(self._head), _COLUMNS):
                head = self._head[first : first + _COLUMNS]
                a = logits_of(inputs[0], head, self._config)
                top, at = a.max(-1, keepdim=True)
                leads = top > sums[0].highest
                weights, fading = sums[0].add(a, first)
                for x, tokens in zip(inputs, sums, strict=True):
                    b = a
                    if tokens is not sums[0]:
                        b = logits_of(x, head, self._config)
                        tokens.add(b, first)
                    tokens.at_top = torch.where(leads, b.gather(1, at), tokens.at_top)
                    gap = torch.linalg.vecdot(weights, a - b)[:, None]
                    tokens.gap = tokens.gap * fading + gap
        known = {slot: found.scores(sums[0]) for slot, found in zip(slots, sums, strict=True)}
        return np.stack([known[slot] for slot in (reference, *candidates)])

    def _input(self, h: np.ndarray) -> torch.Tensor:
        """What the head takes of states ``(n, hidden)`` float32."""
        x = torch.tensor(h).to(self._settings.device, self._head.dtype)
        return head_input(x, self._norm, self._config)


class _LogitSums:
    """Of each token, what its logits come to while the vocabulary comes; all ``(n, 1)`` float32.

    Attributes:
        highest: logit.
        total: of exponentials under the highest.
        target: logit of the token that came.
        at_top: logit at the reference's highest.
        gap: of the reference's exponentials times how far its logits lie above these.
    """

    def __init__(self, wanted: torch.Tensor) -> None:
        """
        Args:
            wanted: ``(n, 1)`` int64, the tokens that came.
        """
        zero = torch.zeros(wanted.shape, dtype=torch.float32, device=wanted.device)
        self._wanted, self.highest = wanted, zero - torch.inf
        self.total = self.target = self.at_top = self.gap = zero

    def add(self, logits: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits ``(n, n_some)`` of the entries from `first` on.

        Returns:
            their exponentials under the highest so far, and by what the earlier ones shrink.
        """
        at = self._wanted - first
        inside = (at >= 0) & (at < logits.shape[1])
        found = logits.gather(1, at.clamp(0, logits.shape[1] - 1))
        self.target = torch.where(inside, found, self.target)
        highest = torch.maximum(self.highest, logits.amax(-1, keepdim=True))
        fading, self.highest = (self.highest - highest).exp(), highest
        weights = (logits - highest).exp_()
        self.total = self.total * fading + weights.sum(-1, keepdim=True)
        return weights, fading

    def scores(self, reference: _LogitSums) -> np.ndarray:
        """``(3, n)`` float64: negative log-likelihood, KL from the reference, equal first token."""
        lse, other = self.highest + self.total.log(), reference.highest + reference.total.log()
        kl = (self.gap / reference.total - other + lse).clamp_(min=0)
        parts = (lse - self.target, kl, self.at_top == self.highest)
        return np.stack([part[:, 0].double().cpu().numpy() for part in parts])


class SweepState:
    """How far a sweep is, in a folder: states of all slots, the steps done, the chunks' scores.

    Args:
        folder: is made; what is there of other inputs is removed.
        identity: of all inputs, hex.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity
        if self._kept().get("identity") != identity:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def n_done(self) -> int:
        """Steps that are done."""
        return int(self._kept().get("n_done", 0)) if (self.folder / "states").exists() else 0

    @contextmanager
    def states(self) -> Iterator[int]:
        """The file of hidden states, open while the block runs."""
        fd = os.open(self.folder / "states", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            yield fd
        finally:
            os.close(fd)

    def done(self, n: int) -> None:
        """Say that so many steps are done."""
        partial = self._index.with_suffix(".partial")
        partial.write_text(json.dumps({"identity": self.identity, "n_done": n}))
        partial.replace(self._index)

    def scores(self, chunk: int) -> np.ndarray | None:
        """Scores of a chunk, where they are known."""
        path = self._scores(chunk)
        return np.load(path, allow_pickle=False) if path.exists() else None

    def keep_scores(self, chunk: int, scores: np.ndarray) -> None:
        """Keep a chunk's scores."""
        partial = self.folder / "scores.partial.npy"
        np.save(partial, scores, allow_pickle=False)
        partial.replace(self._scores(chunk))

    def forget(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _index(self) -> Path:
        return self.folder / "state.json"

    def _scores(self, chunk: int) -> Path:
        return self.folder / f"scores-{chunk:05}.npy"

    def _kept(self) -> dict[str, object]:
        try:
            kept = json.loads(self._index.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return kept if isinstance(kept, dict) else {}
