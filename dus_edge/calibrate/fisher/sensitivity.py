"""How much each tensor of a model minds each storage type, layer by layer.

On the way down that `descent` goes, each tensor that is met is tried in all types. One layer's
weights are in memory, and what its matrices take in and give. `gradients` and `costs` say what is
computed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from dus_edge.adapter.numbers import as_floats
from dus_edge.calibrate.engine import DTYPES, ComputeSettings, Shares
from dus_edge.calibrate.fisher.costs import (
    Storing,
    embedding_kl,
    head_kl,
    matrix_kl,
    rows_at_once,
)
from dus_edge.calibrate.fisher.descent import Descent, DownwardState, drawn_labels, first_labelled
from dus_edge.calibrate.fisher.gradients import TracedLayer
from dus_edge.calibrate.layer import head_input
from dus_edge.calibrate.streams import KeptStates
from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.errors import CheckpointError
from dus_edge.progress import count_resumed
from dus_edge.quant.quantizer import Conversion
from dus_edge.quant.sensitivity.candidates import candidate_types
from dus_edge.quant.types import QuantType

#: Bytes of what a layer's matrices take in, and of gradients of what they give, kept at once.
_KEPT_BYTES = 4 << 30
#: Tokens that the head's own costs are averaged over.
_HEAD_TOKENS = 2048

#: By GGUF tensor name and type name, nats per token.
Costs = Mapping[str, Mapping[str, float]]


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
    first = first_labelled(tokens.shape[1])
    own, drawn = tokens[world.share], drawn_labels(tokens, first, seed)
    way = _Measuring(
        checkpoint, own, drawn[world.share], drawn.size, states, settings, world, advance, storing
    )
    found: dict[str, dict[str, float]] = {}
    done = state.n_done
    for step in range(checkpoint.config.n_layers + 2):
        if step < done:
            costs = json.loads(state.found(step).read_text(encoding="utf-8"))
            count_resumed(advance, own.size)
        else:
            costs = way.take(step)
            _check(costs)
            state.done(step, partial(_keep, costs))
        for name, by_kind in costs.items():
            # A tied embedding is met twice: as the head and as itself.
            kept = found.setdefault(name, dict.fromkeys(by_kind, 0.0))
            for kind, cost in by_kind.items():
                kept[kind] += cost
    return found


def _keep(costs: Costs, path: Path) -> None:
    path.write_text(json.dumps(costs), encoding="utf-8")


def _check(costs: Costs) -> None:
    for name, by_kind in costs.items():
        if not all(map(np.isfinite, by_kind.values())):
            raise CheckpointError(
                f"gradients at {name} are not finite; its weights or those above are damaged, or "
                "need --dtype float32."
            )


@dataclass(frozen=True)
class _Measuring(Descent):
    """The costs of what each step meets.

    Attributes:
        storing: how weights would be stored.
    """

    storing: Storing

    def take(self, step: int) -> dict[str, dict[str, float]]:
        """Do a step; its costs by GGUF name and type."""
        n_layers = self.checkpoint.config.n_layers
        if step == 0:
            return self._head_step()
        if step == n_layers + 1:
            return self._embedding(step)
        return self._layer_step(step, n_layers - step)

    @cached_property
    def _kinds(self) -> Mapping[str, tuple[QuantType, ...]]:
        return tensors_of(self.checkpoint)

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

    def _head_step(self) -> dict[str, dict[str, float]]:
        config = self.checkpoint.config
        name = config.family.name("embedding" if config.tied_head else "head")
        norm, head = self.head_weights()
        n_ctx, n_labels = self.tokens.shape[1], self.drawn.shape[1]
        shares = self.shares()
        every = -(-self.n_labelled // _HEAD_TOKENS)
        taken: list[torch.Tensor] = []
        for chunk, h, _ in self.head(norm, head):
            place = chunk * self.world.size + self.world.rank
            offset = -place * n_labels % every
            taken.append(head_input(h[n_ctx - n_labels + offset :: every], norm, config).float())
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

    def _layer_step(self, step: int, index: int) -> dict[str, dict[str, float]]:
        config, n_ctx = self.checkpoint.config, self.tokens.shape[1]
        layer, shares = self.traced(index), self.shares()
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
        inputs: dict[str, list[torch.Tensor]] = {}
        outputs: dict[str, list[torch.Tensor]] = {}
        for batch, found in self.layer(layer, step, index, group):
            for kept, new in ((inputs, found.inputs), (outputs, found.outputs)):
                for key, value in new.items():
                    kept.setdefault(key, []).append(value.cpu())
            shares((batch.stop - batch.start) * self.tokens.shape[1], 0.5)
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
        d = self.states.load(self.slot(step - 1), slice(None)) * config.embedding_scale
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
