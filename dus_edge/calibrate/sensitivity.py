"""How much each tensor of a model minds each storage type, layer by layer.

Text goes forward once, and the states before all layers are kept in a file. From labels that the
model itself draws, gradients go back through the layers, each computed again from its states: so
one layer's weights are in memory, and the states of a layer's matrices. `gradients` and `costs`
say what is computed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from dus_edge.adapter.numbers import as_floats
from dus_edge.calibrate.costs import (
    Storing,
    embedding_kl,
    head_kl,
    matrix_kl,
    rows_at_once,
)
from dus_edge.calibrate.engine import DTYPES, ComputeSettings, Shares
from dus_edge.calibrate.gradients import TracedLayer, label_gradients, layer_gradients
from dus_edge.calibrate.layer import Positions, as_tensor, head_input, positions, read_layer
from dus_edge.calibrate.streams import KeptStates
from dus_edge.calibrate.world import ALONE, World
from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.errors import CheckpointError
from dus_edge.quant.quantizer import Conversion
from dus_edge.quant.sensitivity.candidates import candidate_types
from dus_edge.quant.types import QuantType

#: Bytes of logits that are in memory at once.
_LOGITS_BYTES = 64 << 20
#: Bytes of what a layer's matrices take in, and of gradients of what they give, kept at once.
_KEPT_BYTES = 4 << 30
#: Tokens that the head's own costs are averaged over.
_HEAD_TOKENS = 2048

#: By GGUF tensor name and type name, nats per token.
Costs = Mapping[str, Mapping[str, float]]


def first_labelled(n_ctx: int) -> int:
    """The first position of a chunk that labels are drawn at: its first half is context alone.

    So does `quality` count divergence, and llama.cpp's perplexity tool.
    """
    return n_ctx // 2


def tensors_of(checkpoint: Checkpoint) -> dict[str, tuple[QuantType, ...]]:
    """Hugging Face names of the tensors that are quantized, and the types each is tried in."""
    return {
        s.name: candidate_types(s.shape[-1])
        for s in checkpoint.specs().values()
        if len(s.shape) == 2
    }


def storing_conversions(checkpoint: Checkpoint, importance: Sequence[str]) -> list[Conversion]:
    """What the quantizer will be asked for.

    Args:
        checkpoint: the model.
        importance: GGUF names of the tensors whose importance is known.
    """
    name_of, known = checkpoint.config.family.gguf_name, set(importance)
    return list(
        dict.fromkeys(
            (kind, checkpoint.read(name, 0, 0).dtype, name_of(name) in known)
            for name, kinds in tensors_of(checkpoint).items()
            for kind in kinds
        )
    )


class DownwardState:
    """How far the way down is, in a folder: the costs of each step that is done.

    Steps are the head, the layers from the last to the first, and the embedding.

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

    def done(self, step: int, costs: Costs) -> None:
        """Keep a step's costs, and say that it and all before it are done."""
        # The gradient of the step before may be written over only when this one lies whole.
        self.world.wait()
        if self.world.first:
            self._write(self._costs(step), costs)
            self._write(self._index, {"identity": self.identity, "n_done": step + 1})
        self.world.wait()

    def costs(self, step: int) -> Costs:
        """The costs of a step that is done."""
        return json.loads(self._costs(step).read_text(encoding="utf-8"))

    @property
    def _states(self) -> Path:
        return self.folder / (f"states-{self.world.rank}" if self.world.many else "states")

    @property
    def _index(self) -> Path:
        return self.folder / "downward.json"

    def _costs(self, step: int) -> Path:
        return self.folder / f"costs-{step:04}.json"

    def _write(self, path: Path, value: object) -> None:
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(value), encoding="utf-8")
        partial.replace(path)


def n_slots(n_layers: int) -> int:
    """Slots that the file needs: states before and behind all layers, and gradients in two."""
    return n_layers + 3


def downward_work(checkpoint: Checkpoint, tokens: np.ndarray) -> int:
    """Tokens times steps: what `go_down` tells of as it goes.

    Args:
        checkpoint: the model.
        tokens: this process's.
    """
    return tokens.size * (checkpoint.config.n_layers + 2)


def go_down(
    checkpoint: Checkpoint,
    tokens: np.ndarray,
    states: KeptStates,
    storing: Storing,
    settings: ComputeSettings,
    state: DownwardState,
    *,
    seed: int = 0,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, dict[str, float]]:
    """The costs of all tensors in all types, from the head down to the embedding.

    Args:
        checkpoint: the model.
        tokens: ``(n_chunks, n_ctx)`` int32, of all processes.
        states: of this process's share of the chunks, in slot i those before layer i, in slot n
            those behind the last; see `n_slots`.
        storing: how weights would be stored.
        settings: device and precision.
        state: what an earlier run of the same has done is not done again.
        seed: of the labels.
        advance: told of work done, out of `downward_work`.

    Returns:
        by GGUF tensor name and type name, nats per token in which that tensor alone is stored so.

    Raises:
        CheckpointError: a cost is no finite number.
        OutputError: the disk is full.
    """
    world = state.world
    n_chunks, n_ctx = tokens.shape
    drawn = np.random.default_rng(seed).random((n_chunks, n_ctx - first_labelled(n_ctx)), "f4")
    own = tokens[world.share]
    way = _Downward(
        checkpoint, own, drawn[world.share], drawn.size, states, storing, settings, world, advance
    )
    found: dict[str, dict[str, float]] = {}
    done = state.n_done
    for step in range(checkpoint.config.n_layers + 2):
        if step < done:
            costs = state.costs(step)
            advance(own.size)
        else:
            costs = way.take(step)
            _check(costs)
            state.done(step, costs)
        for name, by_kind in costs.items():
            # A tied embedding is met twice: as the head and as itself.
            kept = found.setdefault(name, dict.fromkeys(by_kind, 0.0))
            for kind, cost in by_kind.items():
                kept[kind] += cost
    return found


def _check(costs: Costs) -> None:
    for name, by_kind in costs.items():
        if not all(map(np.isfinite, by_kind.values())):
            raise CheckpointError(
                f"gradients at {name} are not finite; its weights or those above are damaged, or "
                "need --dtype float32."
            )


@dataclass(frozen=True)
class _Downward:
    """One step at a time. The gradient that a step leaves lies in the slot of its parity.

    Attributes:
        tokens: this process's.
        drawn: of each of them that gets a label, a number in [0, 1) that says which.
        n_labelled: how many get one in all processes.
    """

    checkpoint: Checkpoint
    tokens: np.ndarray
    drawn: np.ndarray
    n_labelled: int
    states: KeptStates
    storing: Storing
    settings: ComputeSettings
    world: World
    advance: Callable[[int], None]

    def take(self, step: int) -> dict[str, dict[str, float]]:
        """Do a step; its costs by GGUF name and type."""
        n_layers = self.checkpoint.config.n_layers
        if step == 0:
            return self._head()
        if step == n_layers + 1:
            return self._embedding(step)
        return self._layer(step, n_layers - step)

    @cached_property
    def _where(self) -> tuple[Positions, ...]:
        n_ctx, settings = self.tokens.shape[1], self.settings
        return positions(self.checkpoint.config, n_ctx, settings.device, DTYPES[settings.dtype])

    @cached_property
    def _kinds(self) -> Mapping[str, tuple[QuantType, ...]]:
        return tensors_of(self.checkpoint)

    def _slot(self, step: int) -> int:
        return self.checkpoint.config.n_layers + 1 + step % 2

    def _batches(self, chunks: range) -> Iterator[slice]:
        step = max(1, self.settings.batch_tokens // self.tokens.shape[1])
        for i in range(chunks.start, chunks.stop, step):
            yield slice(i, min(i + step, chunks.stop))

    def _named(self, name: str, sums: np.ndarray, n_tokens: float) -> dict[str, dict[str, float]]:
        """Costs of a tensor, Hugging Face name, as they are kept.

        Args:
            name: the tensor.
            sums: of this process by type, nats.
            n_tokens: of all processes.
        """
        costs = [c / n_tokens for c in self.world.sum(*sums)]
        by_kind = {kind.name: c for kind, c in zip(self._kinds[name], costs, strict=True)}
        return {self.checkpoint.config.family.gguf_name(name): by_kind}

    # The head

    def _head(self) -> dict[str, dict[str, float]]:
        config, settings = self.checkpoint.config, self.settings
        family, dtype = config.family, DTYPES[settings.dtype]
        name = family.name("embedding" if config.tied_head else "head")
        norm, head = (
            as_tensor(self.checkpoint.read(n)).to(settings.device, dtype)
            for n in (family.name("final_norm"), name)
        )
        n_chunks, n_ctx = self.tokens.shape
        first, at_once = first_labelled(n_ctx), max(1, _LOGITS_BYTES // (4 * config.vocab_size))
        shares = Shares(self.advance, self.tokens.size)
        every = -(-self.n_labelled // _HEAD_TOKENS)
        taken: list[torch.Tensor] = []
        for chunk in range(n_chunks):
            one = slice(chunk, chunk + 1)
            h = self.states.load(config.n_layers, one).to(settings.device)
            gradient = torch.zeros_like(h)
            u = torch.from_numpy(self.drawn[chunk]).to(settings.device)
            for i in range(first, n_ctx, at_once):
                some = slice(i, min(i + at_once, n_ctx))
                gradient[0, some] = label_gradients(
                    h[0, some], norm, head, config, u[i - first : i - first + at_once]
                )
            self.states.put(self._slot(0), gradient.cpu(), chunk)
            place = chunk * self.world.size + self.world.rank
            offset = -place * (n_ctx - first) % every
            taken.append(head_input(h[0, first + offset :: every], norm, config).float())
            shares(n_ctx, 0.5)
        x = torch.cat(taken)
        sums = self._head_costs(name, x, shares) * len(x)
        return self._named(name, sums, self.world.sum(len(x))[0])

    def _head_costs(self, name: str, x: torch.Tensor, shares: Shares) -> np.ndarray:
        config, device = self.checkpoint.config, self.settings.device
        gguf_name, kinds = config.family.gguf_name(name), self._kinds[name]

        def part(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            rows = self.checkpoint.read(name, start, stop)
            errors = self.storing.errors(gguf_name, rows, kinds)
            return torch.from_numpy(as_floats(rows)).to(device), errors.to(device)

        share = self.tokens.size / (4 * config.vocab_size)
        return head_kl(x, part, len(kinds), config, lambda n: shares(n, share))

    # Layers

    def _layer(self, step: int, index: int) -> dict[str, dict[str, float]]:
        config, settings = self.checkpoint.config, self.settings
        n_ctx, dtype = self.tokens.shape[1], DTYPES[settings.dtype]
        stored = read_layer(self.checkpoint, index)
        weights = {role: stored.pop(role).to(settings.device, dtype) for role in tuple(stored)}
        layer = TracedLayer(config, weights, self._where[index])
        shares = Shares(self.advance, self.tokens.size)
        rules = {r.role: site for site, rules in config.family.sites.items() for r in rules}
        names = {role: config.family.name(role, index) for role in rules}
        sums = {role: np.zeros(len(self._kinds[n])) for role, n in names.items()}
        for group in self._groups(names):
            inputs, outputs = self._collected(layer, step, index, group, shares)
            for role, site in rules.items():
                sums[role] += self._matrix(names[role], inputs[site], outputs.pop(role))
                shares(len(group) * n_ctx, 0.5 / len(rules))
        found: dict[str, dict[str, float]] = {}
        for role, name in names.items():
            found |= self._named(name, sums[role], self.n_labelled)
        return found

    def _groups(self, names: Mapping[str, str]) -> Iterator[range]:
        """Chunks that are kept together."""
        n_chunks, n_ctx = self.tokens.shape
        specs = self.checkpoint.specs()
        width = sum(sum(specs[name].shape) for name in names.values())
        step = max(1, _KEPT_BYTES // (width * n_ctx * DTYPES[self.settings.dtype].itemsize))
        for i in range(0, n_chunks, step):
            yield range(i, min(i + step, n_chunks))

    def _collected(
        self, layer: TracedLayer, step: int, index: int, group: range, shares: Shares
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Inputs by site and gradients of outputs by role, of a group of chunks, on the CPU."""
        device, n_ctx = self.settings.device, self.tokens.shape[1]
        inputs: dict[str, list[torch.Tensor]] = {}
        outputs: dict[str, list[torch.Tensor]] = {}
        for batch in self._batches(group):
            h = self.states.load(index, batch).to(device)
            behind = self.states.load(self._slot(step - 1), batch).to(device)
            found = layer_gradients(layer, h, behind)
            self.states.put(self._slot(step), found.below.cpu(), batch.start)
            for kept, new in ((inputs, found.inputs), (outputs, found.outputs)):
                for key, value in new.items():
                    kept.setdefault(key, []).append(value.cpu())
            shares(len(h) * n_ctx, 0.5)
        return _joined(inputs), _joined(outputs)

    def _matrix(self, name: str, x: torch.Tensor, d: torch.Tensor) -> np.ndarray:
        """Costs of a matrix summed over the tokens given, by type."""
        kinds, device = self._kinds[name], self.settings.device
        gguf_name = self.checkpoint.config.family.gguf_name(name)
        n_rows, n_cols = self.checkpoint.specs()[name].shape
        step = rows_at_once(n_cols, len(x), len(kinds))
        x = x.to(device, torch.float32)
        found = np.zeros(len(kinds))
        for start in range(0, n_rows, step):
            stop = min(start + step, n_rows)
            rows = self.checkpoint.read(name, start, stop)
            errors = self.storing.errors(gguf_name, rows, kinds).to(device)
            found += matrix_kl(x, d[..., start:stop].to(device), errors)
        return found

    # The embedding

    def _embedding(self, step: int) -> dict[str, dict[str, float]]:
        config = self.checkpoint.config
        name = config.family.name("embedding")
        kinds = self._kinds[name]
        d = self.states.load(self._slot(step - 1), slice(None)) * config.embedding_scale
        used, at = np.unique(self.tokens, return_inverse=True)
        table = self.checkpoint.read(name)
        rows = np.ascontiguousarray(table[used])
        errors = self.storing.errors(config.family.gguf_name(name), rows, kinds)
        found = embedding_kl(torch.from_numpy(at.reshape(self.tokens.shape)), d, errors)
        self.advance(self.tokens.size)
        return self._named(name, found, self.n_labelled)


def _joined(parts: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Batches in a row; each is let go as soon as it is copied."""
    return {key: torch.cat(parts.pop(key)) for key in tuple(parts)}
