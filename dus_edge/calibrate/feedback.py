"""The collector of error feedback: blocks of every matrix, solved when its inputs are known.

Some chunks of the text are held out. Feedback is fitted to all others, and a matrix keeps it only
if the layer's outputs on the held-out inputs come out nearer to the original's than with the
importance-weighted blocks that it would have otherwise. In both, an error counts as much as an
error behind that token does: see `token_weights`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from dus_edge.calibrate.fisher.token_weights import TokenWeights
from dus_edge.errors import UsageError
from dus_edge.quant.feedback.gram import add_gram, mirror
from dus_edge.quant.feedback.layouts import LOSES_MORE, stored_values
from dus_edge.quant.feedback.solve import (
    BlockFactor,
    FeedbackSettings,
    feed,
    prepare_blocks,
    quantize_rows,
)
from dus_edge.quant.quantizer import Quantizer
from dus_edge.quant.types import QuantType

#: What a matrix' Σx² is called among the arrays of a layer's file, behind its name.
_SUMS = "sums"
#: One chunk in so many is held out, and at most so many tokens.
_HELD_OUT_EVERY = 8
_HELD_OUT_TOKENS = 2048


@dataclass(frozen=True)
class WantedBlocks:
    """What is made of a matrix.

    Attributes:
        kind: the type that it is stored in.
        scale: what the file's reader wants it multiplied by.
    """

    kind: QuantType
    scale: float = 1.0


@dataclass(frozen=True)
class FedMatrix:
    """How one matrix came out in one type.

    Attributes:
        name: Hugging Face name.
        kind: name of the type.
        loss: weighted squared error of the outputs on held-out inputs, with feedback; None
            without any.
        plain_loss: that of blocks by importance.
        fallback: why the blocks are by importance after all; None where feedback is kept.
    """

    name: str
    kind: str
    loss: float | None
    plain_loss: float
    fallback: str | None


def held_out_chunks(n_chunks: int, n_ctx: int) -> frozenset[int]:
    """Which chunks judge feedback, spread over the text.

    Raises:
        UsageError: there is nothing left to fit it to.
    """
    if n_chunks < 2:
        raise UsageError(
            "--feedback needs at least two chunks of text, for one is held out to judge by; give "
            "more text or a shorter --ctx."
        )
    n = max(1, min(n_chunks // _HELD_OUT_EVERY, _HELD_OUT_TOKENS // n_ctx))
    return frozenset((2 * i + 1) * n_chunks // (2 * n) for i in range(n))


@dataclass
class _Inputs:
    """Of one site.

    Attributes:
        gram: XᵀWX ``(width, width)`` of the chunks that feedback is fitted to, its upper half
            only once it is mirrored.
        squares: Σx² ``(width,)`` float64 of all chunks, without weights.
        held: inputs of the others, ``(n_tokens, width)`` each, times √w.
        n_chunks: chunks seen.
    """

    gram: torch.Tensor
    squares: torch.Tensor
    held: list[torch.Tensor] = field(default_factory=list)
    n_chunks: int = 0


class FeedbackCollector:
    """XᵀWX by site, then blocks; a `Visitor` of the engine."""

    def __init__(
        self,
        wanted: Mapping[str, WantedBlocks],
        quantizer: Quantizer,
        settings: FeedbackSettings,
        token_weights: Sequence[TokenWeights],
        *,
        importance: Mapping[str, np.ndarray] | None = None,
        n_threads: int = 1,
    ) -> None:
        """
        Args:
            wanted: by Hugging Face name; other matrices are passed over.
            quantizer: finds scales, and makes the blocks that feedback must beat.
            settings: see `FeedbackSettings`.
            token_weights: by layer, of all tokens in all chunks.
            importance: by Hugging Face name ``(n_cols,)`` float32, in place of the text's own.
            n_threads: worker threads.
        """
        self.replaces = settings.in_sequence
        self.outcomes: dict[str, FedMatrix] = {}
        #: Σx² ``(n_cols,)`` float32 of each matrix' inputs, over all tokens.
        self.sums: dict[str, np.ndarray] = {}
        self._wanted, self._quantizer, self._settings = wanted, quantizer, settings
        self._token_weights = token_weights
        n_chunks, self._n_ctx = next(iter(token_weights[0].values())).shape
        self._held_out = held_out_chunks(n_chunks, self._n_ctx)
        self._importance, self._n_threads = importance or {}, n_threads
        self._sites: dict[str, _Inputs] = {}
        # Of the layer that is not saved yet.
        self._arrays: dict[str, np.ndarray] = {}
        self._unsaved: list[FedMatrix] = []

    def observe(self, layer: int, site: str, x: torch.Tensor) -> None:
        wide = x.float()
        if site not in self._sites:
            width = wide.shape[-1]
            gram = torch.zeros(width, width, device=x.device)
            self._sites[site] = _Inputs(gram, torch.zeros(width, dtype=torch.float64))
        inputs = self._sites[site]
        inputs.squares += wide.square().sum(0).cpu().double()
        numbers = range(inputs.n_chunks, inputs.n_chunks + len(wide) // self._n_ctx)
        inputs.n_chunks = numbers.stop
        weights = self._token_weights[layer][site][numbers.start : numbers.stop]
        root = torch.from_numpy(weights).to(x.device).sqrt().view(-1, 1)
        wide = wide * root
        chunks = wide.view(len(numbers), self._n_ctx, -1)
        held = [i for i, number in enumerate(numbers) if number in self._held_out]
        inputs.held += [chunks[i].clone().cpu() for i in held]
        if held:
            left = [i for i in range(len(chunks)) if i not in held]
            wide = chunks[left].flatten(0, 1)
        add_gram(inputs.gram, wide)

    def finish_site(
        self, layer: int, site: str, weights: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor]:
        inputs = self._sites.pop(site)
        mirror(inputs.gram)
        gram, held = inputs.gram.cpu(), torch.cat(inputs.held)
        squares = inputs.squares.float().numpy()
        factors: dict[int, BlockFactor] = {}
        replaced = {}
        for name, stored in weights.items():
            self.sums[name] = self._arrays[f"{name} {_SUMS}"] = squares
            wanted = self._wanted.get(name)
            if wanted is None:
                continue
            weight = stored.cpu().float() * wanted.scale
            importance = self._importance.get(name, squares)
            width = wanted.kind.block_weights
            if width not in factors:
                factors[width] = prepare_blocks(gram, width, self._settings)
            values = self._blocks(name, weight, wanted.kind, importance, factors[width], held)
            if self.replaces:
                replaced[name] = values / wanted.scale
        return replaced

    def _blocks(
        self,
        name: str,
        weight: torch.Tensor,
        kind: QuantType,
        importance: np.ndarray,
        factor: BlockFactor,
        held: torch.Tensor,
    ) -> torch.Tensor:
        """Make a matrix' blocks and keep the better ones; their values ``(out, in)`` float32."""
        n_threads = self._n_threads
        data = quantize_rows(weight, kind, self._quantizer, importance, n_threads)
        values = torch.from_numpy(stored_values(data, kind))
        plain_loss, loss, why = output_loss(held, weight - values), None, factor.fallback
        if why is None:
            fed = feed(weight, factor, kind, self._quantizer, self._settings, n_threads)
            found = torch.from_numpy(stored_values(fed, kind))
            loss = output_loss(held, weight - found)
            if loss < plain_loss:
                data, values = fed, found
            else:
                why = LOSES_MORE
        outcome = FedMatrix(name, kind.name, loss, plain_loss, why)
        self.outcomes[name] = outcome
        self._unsaved.append(outcome)
        self._arrays[f"{name} {kind.name}"] = data
        return values

    def save(self, layer: int, path: Path) -> None:
        from safetensors.numpy import save_file

        facts = json.dumps([asdict(outcome) for outcome in self._unsaved])
        save_file(self._arrays, path, metadata={"outcomes": facts})
        self._arrays, self._unsaved = {}, []

    def load(self, layer: int, path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            for facts in json.loads(file.metadata()["outcomes"]):
                outcome = FedMatrix(**facts)
                self.outcomes[outcome.name] = outcome
            for key in file.keys():  # noqa: SIM118
                name, _, what = key.rpartition(" ")
                if what == _SUMS:
                    self.sums[name] = file.get_tensor(key)


def read_blocks(path: Path, name: str, kind: QuantType) -> np.ndarray:
    """A matrix' blocks ``(out, row_bytes)`` uint8 from a layer's file, its rows as transformers'.

    Args:
        path: what `FeedbackCollector.save` wrote.
        name: Hugging Face name.
        kind: one of the types that were wanted.
    """
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return file.get_tensor(f"{name} {kind.name}")


def output_loss(inputs: torch.Tensor, delta: torch.Tensor) -> float:
    """Squared error of outputs over all inputs ``(n, in)`` for errors ``(out, in)``."""
    return float((inputs.float() @ delta.T).square_().sum(dtype=torch.float64))
