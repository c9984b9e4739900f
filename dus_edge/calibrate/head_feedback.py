"""Error feedback into the head, which is the embedding as well where the two are tied.

The head's rows do not see each other, and the states that they meet are the same, so it is done as
a layer's matrix is, some rows at a time. An embedding's rows are looked up one by one: there an
error is worth the same in all columns, which damping stands for. A row is met as a label about as
often as it is looked up, so one share holds for all rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from dus_edge.adapter.numbers import as_floats
from dus_edge.calibrate.feedback import FedMatrix, WantedBlocks, held_out_chunks, output_loss
from dus_edge.calibrate.fisher.token_weights import HeadWeights
from dus_edge.calibrate.layer import as_tensor, head_input
from dus_edge.checkpoint.spec import Checkpoint
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

#: Rows that are in memory at once, as float32.
_ROWS = 8192


@dataclass(frozen=True)
class HeadInputs:
    """What the head meets on a text.

    Attributes:
        gram: XᵀWX ``(hidden, hidden)`` float32 of the chunks that feedback is fitted to, with what
            looking up is worth on its diagonal.
        held: inputs of the others ``(n_tokens, hidden)`` float32, times √w.
        looked_up: what an error of looked-up rows counts on the others.
    """

    gram: torch.Tensor
    held: torch.Tensor
    looked_up: float


def head_inputs(
    checkpoint: Checkpoint, h: torch.Tensor, weights: HeadWeights, tied: bool
) -> HeadInputs:
    """Sum up what the head meets.

    Args:
        checkpoint: the model.
        h: states behind the last layer ``(n_chunks, n_ctx, hidden)``, on the CPU.
        weights: of all tokens.
        tied: whether the head's rows are looked up as well.
    """
    config = checkpoint.config
    norm = as_tensor(checkpoint.read(config.family.name("final_norm"))).to(h.dtype)
    held_out = held_out_chunks(*h.shape[:2])
    gram = torch.zeros(h.shape[-1], h.shape[-1])
    held = []
    for i, chunk in enumerate(h):
        root = torch.from_numpy(weights.tokens[i]).sqrt()[:, None]
        x = head_input(chunk, norm, config).float() * root
        if i in held_out:
            held.append(x)
        else:
            add_gram(gram, x)
    mirror(gram)
    looked_up = 0.0
    if tied:
        looked_up = float(weights.lookups[sorted(held_out)].sum())
        gram.diagonal().add_(float(weights.lookups.sum()) - looked_up)
    return HeadInputs(gram, torch.cat(held), looked_up)


def feed_head(
    checkpoint: Checkpoint,
    name: str,
    wanted: WantedBlocks,
    inputs: HeadInputs,
    quantizer: Quantizer,
    settings: FeedbackSettings,
    *,
    importance: np.ndarray | None = None,
    n_threads: int = 1,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[FedMatrix, np.ndarray]:
    """The head's blocks, with feedback if they come out better on what was held out.

    Args:
        checkpoint: the model.
        name: Hugging Face name of the head, or of the embedding that is it.
        wanted: what is made of it.
        inputs: of `head_inputs`.
        quantizer: finds scales, and makes the blocks that feedback must beat.
        settings: see `FeedbackSettings`.
        importance: ``(hidden,)`` float32 of those blocks; None for none.
        n_threads: worker threads.
        advance: told of rows that are done.

    Returns:
        how it came out, and its blocks ``(vocab, row_bytes)`` uint8.
    """
    kind = wanted.kind
    factor = prepare_blocks(inputs.gram, kind.block_weights, settings)
    n_rows, n_cols = checkpoint.specs()[name].shape
    plain = np.empty((n_rows, kind.row_bytes(n_cols)), np.uint8)
    fed = np.empty_like(plain) if factor.fallback is None else None
    losses = np.zeros(2)
    for start in range(0, n_rows, _ROWS):
        rows = slice(start, min(start + _ROWS, n_rows))
        weight = torch.from_numpy(as_floats(checkpoint.read(name, rows.start, rows.stop)))
        weight = weight * wanted.scale
        plain[rows] = quantize_rows(weight, kind, quantizer, importance, n_threads)
        losses[0] += _loss(inputs, weight, plain[rows], wanted)
        if fed is not None:
            fed[rows] = feed(weight, factor, kind, quantizer, settings, n_threads)
            losses[1] += _loss(inputs, weight, fed[rows], wanted)
        advance(rows.stop - start)
    return _better(name, factor, wanted, plain, fed, losses)


def _loss(
    inputs: HeadInputs, weight: torch.Tensor, data: np.ndarray, wanted: WantedBlocks
) -> float:
    delta = weight - torch.from_numpy(stored_values(data, wanted.kind))
    looked_up = inputs.looked_up * float(delta.square().sum(dtype=torch.float64))
    return output_loss(inputs.held, delta) + looked_up


def _better(
    name: str,
    factor: BlockFactor,
    wanted: WantedBlocks,
    plain: np.ndarray,
    fed: np.ndarray | None,
    losses: np.ndarray,
) -> tuple[FedMatrix, np.ndarray]:
    plain_loss, loss = map(float, losses)
    kind = wanted.kind.name
    if fed is None:
        return FedMatrix(name, kind, None, plain_loss, factor.fallback), plain
    if loss < plain_loss:
        return FedMatrix(name, kind, loss, plain_loss, None), fed
    return FedMatrix(name, kind, loss, plain_loss, LOSES_MORE), plain


def write_head(path: Path, outcome: FedMatrix, data: np.ndarray) -> None:
    """Keep a head's blocks, whole or not at all."""
    from safetensors.numpy import save_file

    partial = path.with_name(f"{path.name}.partial")
    save_file({outcome.name: data}, partial, metadata={"outcome": json.dumps(asdict(outcome))})
    partial.replace(path)


def read_head(path: Path) -> tuple[FedMatrix, np.ndarray]:
    """What `write_head` wrote."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        outcome = FedMatrix(**json.loads(file.metadata()["outcome"]))
        return outcome, file.get_tensor(outcome.name)
