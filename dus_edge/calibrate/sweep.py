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
from pathlib import Path

import numpy as np
import torch

from dus_edge.calibrate.engine import DTYPES, ComputeSettings, check_finite, embedded
from dus_edge.calibrate.layer import (
    DecoderLayer,
    as_tensor,
    next_token_logits,
    positions,
    read_layer,
)
from dus_edge.calibrate.streams import KeptStates
from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.upscale.plan import DepthPlan
from dus_edge.upscale.shared_run import LayerStep, SharedSchedule
from dus_edge.upscale.view import UpscaledCheckpoint

#: Tokens whose logits are in memory at once: with a vocabulary of 49,152 they are 24 MiB.
_ROWS = 128


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
    dtype, steps = DTYPES[settings.dtype], schedule.steps
    advance(start * tokens.size)
    if start == 0:
        states.put(0, embedded(base, tokens, dtype))
    n_chunks, n_ctx = tokens.shape
    where = positions(base.config, n_ctx, settings.device, dtype)
    width = max(1, settings.batch_tokens // n_ctx)
    batches = [slice(i, min(i + width, n_chunks)) for i in range(0, n_chunks, width)]
    left = [(max(first, start), end) for first, end in schedule.groups if end > start]
    with torch.inference_mode(), ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(_read_step, base, steps[left[0][0]]) if left else None
        for (first, end), following in zip(left, [*left[1:], None], strict=True):
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

        KL is Σ p (a − b) − lse(a) + lse(b) of the logits a and b, in the engine's precision; of
        float32 it is good to some 1e-6 nats.

        Args:
            states: that hold final states, before the norm.
            chunk: which.
            reference: slot of the base's.
            candidates: slots of the plans'.
            targets: ``(n_ctx - 1,)`` the tokens that came.

        Returns:
            ``(1 + n_candidates, 3, n_ctx - 1)`` float64, the reference first: the negative
            log-likelihood of the token that came and KL(reference || candidate), both in nats, and
            whether both put the same token first, 0 or 1.
        """
        n = len(targets)
        found = np.zeros((1 + len(candidates), 3, n))
        wanted = torch.from_numpy(targets.astype(np.int64)).to(self._settings.device)
        with torch.inference_mode():
            for first in range(0, n, _ROWS):
                rows = slice(first, min(first + _ROWS, n))
                a = self._logits(states.read(reference, chunk, rows))
                lse_a, top = a.logsumexp(-1), a.argmax(-1)
                p, target = (a - lse_a[:, None]).exp_(), wanted[rows, None]
                known = {reference: 0}
                found[0, :, rows] = _rows(lse_a - a.gather(1, target)[:, 0], lse_a * 0, top == top)
                for k, slot in enumerate(candidates, start=1):
                    if slot not in known:
                        b = self._logits(states.read(slot, chunk, rows))
                        lse_b = b.logsumexp(-1)
                        nll, same = lse_b - b.gather(1, target)[:, 0], b.argmax(-1) == top
                        kl = torch.linalg.vecdot(p, torch.sub(a, b, out=b)) - lse_a + lse_b
                        found[k, :, rows] = _rows(nll, kl.clamp_(min=0), same)
                        known[slot] = k
                    found[k, :, rows] = found[known[slot], :, rows]
        return found

    def _logits(self, h: np.ndarray) -> torch.Tensor:
        """Of states ``(n, hidden)`` float32, as float32 ``(n, vocab)``."""
        x = torch.tensor(h).to(self._settings.device, self._head.dtype)
        return next_token_logits(x, self._norm, self._head, self._config)


def _rows(*parts: torch.Tensor) -> np.ndarray:
    return np.stack([part.double().cpu().numpy() for part in parts])


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
