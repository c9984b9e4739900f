"""Error feedback for `gguf --feedback`: blocks made layer by layer, before files are written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGUFValueType as Kind

from dus_edge.checkpoint.gguf.origin import FEEDBACK_PREFIX
from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.errors import UsageError
from dus_edge.export.gguf.format import KeyValue
from dus_edge.export.gguf.sink import GGUFFile, Made
from dus_edge.files import check_free_space
from dus_edge.jobs.export.calibration import (
    Machine,
    TextChoice,
    forget_state,
    gone_forward,
    kept_state,
    progress_of,
    read_chunks,
    run_collector,
)
from dus_edge.packages import require
from dus_edge.progress import progress
from dus_edge.quant.feedback.layouts import LOSES_MORE, takes_feedback
from dus_edge.quant.imatrix import Importance, takes_importance
from dus_edge.quant.quantizer import Quantizer
from dus_edge.quant.types import QuantType
from dus_edge.text.chunks import Chunks
from dus_edge.upscale.model import Model, Say

if TYPE_CHECKING:  # these import torch
    from dus_edge.calibrate.engine import ComputeSettings, State
    from dus_edge.calibrate.feedback import FedMatrix, WantedBlocks
    from dus_edge.calibrate.fisher.token_weights import HeadWeights, TokenWeights


@dataclass(frozen=True)
class FeedbackChoice:
    """That errors are fed forward, and on which text.

    Attributes:
        text: what is run through the model.
        machine: where.
    """

    text: TextChoice
    machine: Machine

    def need(self) -> None:
        """PyTorch must be there."""
        require("hf", "calibration needs")

    def check(self, model: Model, files: Sequence[GGUFFile]) -> Chunks:
        """Read the text, and refuse what leaves feedback nothing to do.

        Raises:
            UsageError: no tensor of a file takes feedback, or the text is too short.
        """
        from dus_edge.calibrate.feedback import held_out_chunks

        chunks = read_chunks(model, self.text)
        held_out_chunks(*chunks.tokens.shape)
        for file in files:
            if not wanted_blocks(model, file):
                raise UsageError(
                    f"--feedback has nothing to do in {file.preset.name}: no matrix of a layer is "
                    "stored in a type that takes it; leave it out, or choose another preset."
                )
            check_free_space(file.path.parent, file.nbytes)
        return chunks


@dataclass(frozen=True)
class FedBlocks:
    """What came of it.

    Attributes:
        made: by file, the blocks of all matrices that feedback was tried on.
        importance: of the text, by GGUF name.
        outcomes: by file.
    """

    made: Mapping[Path, Made]
    importance: Importance
    outcomes: Mapping[Path, Sequence[FedMatrix]]

    def said(self, file: Path) -> list[KeyValue]:
        """What the file says of it: in how many matrices feedback was kept, and of how many."""
        found = self.outcomes[file]
        kept = sum(o.fallback is None for o in found)
        return [
            KeyValue(f"{FEEDBACK_PREFIX}kept", kept, Kind.UINT32),
            KeyValue(f"{FEEDBACK_PREFIX}tried", len(found), Kind.UINT32),
        ]

    def notes(self) -> list[str]:
        """The same for the user, with what it was worth on the text that was held out."""
        return [_note(file, found) for file, found in self.outcomes.items()]


@contextmanager
def fed_blocks(
    choice: FeedbackChoice,
    model: Model,
    checkpoint: Checkpoint,
    files: Sequence[GGUFFile],
    chunks: Chunks,
    quantizer: Quantizer,
    importance: Mapping[str, np.ndarray] | None,
    n_threads: int,
    say: Say,
) -> Iterator[FedBlocks]:
    """Make the blocks of every file; they are kept beside it until the block ends without error.

    Args:
        choice: as asked for.
        model: what is written.
        checkpoint: its weights.
        files: the outputs.
        chunks: of `FeedbackChoice.check`.
        quantizer: finds scales, and makes the blocks that feedback must beat.
        importance: by GGUF name ``(n_cols,)`` float32, in place of the text's own.
        n_threads: worker threads.
        say: takes lines for the user.
    """
    from dus_edge.calibrate import engine
    from dus_edge.calibrate.feedback import FeedbackCollector, read_blocks
    from dus_edge.calibrate.head_feedback import read_head
    from dus_edge.quant.feedback.solve import FeedbackSettings

    compute = engine.choose_settings(choice.machine.device, choice.machine.dtype)
    settings = FeedbackSettings()
    family = model.config.family
    weighed_beside = files[0].path.with_name(f"{files[0].path.name}.tokens")
    weights, head_weights = _token_weights(
        model, checkpoint, chunks, compute, weighed_beside, choice.text.seed, say
    )
    given = {
        name: importance[family.gguf_name(name)]
        for name in model.shapes
        if importance is not None and family.gguf_name(name) in importance
    }
    made, outcomes, sums = {}, {}, {}
    for file in files:
        wanted = wanted_blocks(model, file)
        collector = FeedbackCollector(
            wanted,
            quantizer,
            settings,
            weights,
            importance=given,
            n_threads=n_threads,
        )
        more = (
            f"feedback {settings} {quantizer.NAME} {wanted} {_digest(given)}, "
            f"labels {choice.text.seed}"
        )
        with kept_state(file.path, model, chunks, compute, more, say) as state:
            head, at_end = wanted_head(model, file), _head_file(state)
            if state.n_done() < model.config.n_layers:
                at_end.unlink(missing_ok=True)  # of other inputs
            h = run_collector(checkpoint, chunks, collector, compute, state, say)
            if head is not None and not at_end.exists():
                made_of = head, h, head_weights
                _feed_head(checkpoint, *made_of, quantizer, given, n_threads, at_end)
        kept = state.layer_files(model.config.n_layers)

        def blocks(name: str, kind: QuantType, kept: list[Path] = kept) -> np.ndarray:
            place = family.layer_of(name)
            assert place is not None
            return read_blocks(kept[place[0]], name, kind)

        made[file.path] = {
            family.gguf_name(name): partial(blocks, name, w.kind) for name, w in wanted.items()
        }
        outcomes[file.path] = tuple(collector.outcomes.values())
        if head is not None:
            made[file.path][family.gguf_name(head[0])] = lambda at_end=at_end: read_head(at_end)[1]
            outcomes[file.path] += (read_head(at_end)[0],)
        sums = {family.gguf_name(name): array for name, array in collector.sums.items()}
    n_chunks, n_ctx = chunks.tokens.shape
    counts = dict.fromkeys(sums, float(chunks.tokens.size))
    found = Importance(sums, counts, n_ctx, n_chunks, (choice.text.label,))
    yield FedBlocks(made, found, outcomes)
    for path in (weighed_beside, *(file.path for file in files)):
        forget_state(path)


def _token_weights(
    model: Model,
    checkpoint: Checkpoint,
    chunks: Chunks,
    compute: ComputeSettings,
    keep: Path,
    seed: int,
    say: Say,
) -> tuple[list[TokenWeights], HeadWeights]:
    """How much errors behind each token count; kept beside `keep`."""
    from dus_edge.calibrate.fisher.token_weights import weigh_tokens, weighing_work
    from dus_edge.calibrate.streams import NullVisitor

    more = f"token weights, labels {seed}"
    with (
        kept_state(keep, model, chunks, compute, more, say) as state,
        gone_forward(checkpoint, chunks, NullVisitor(), compute, state, keep, say) as (kept, down),
    ):
        total = weighing_work(checkpoint, chunks.tokens)
        with progress_of(state.world, "Weighing tokens", total) as tick:
            return weigh_tokens(
                checkpoint,
                chunks.tokens,
                kept,
                compute,
                down,
                languages=chunks.languages,
                seed=seed,
                advance=tick,
            )


def _feed_head(
    checkpoint: Checkpoint,
    head: tuple[str, WantedBlocks],
    h: Any,
    weights: HeadWeights,
    quantizer: Quantizer,
    importance: Mapping[str, np.ndarray],
    n_threads: int,
    path: Path,
) -> None:
    """Make the head's blocks, and keep them at `path`; of `wanted_head`."""
    from dus_edge.calibrate.head_feedback import feed_head, head_inputs, write_head
    from dus_edge.quant.feedback.solve import FeedbackSettings

    (name, wanted), config = head, checkpoint.config
    inputs = head_inputs(checkpoint, h, weights, config.tied_head)
    given = importance.get(name) if takes_importance(wanted.kind) else None
    with progress("Feeding the head", config.vocab_size, unit="rows") as tick:
        outcome, data = feed_head(
            checkpoint,
            name,
            wanted,
            inputs,
            quantizer,
            FeedbackSettings(),
            importance=given,
            n_threads=n_threads,
            advance=tick,
        )
    write_head(path, outcome, data)


def wanted_blocks(model: Model, file: GGUFFile) -> dict[str, WantedBlocks]:
    """What feedback makes of the matrices of a file's layers, by Hugging Face name."""
    from dus_edge.calibrate.feedback import WantedBlocks

    config, kinds = model.config, {info.name: info.kind for info in file.tensors}
    found = {}
    for name, shape in model.shapes.items():
        kind = kinds[config.family.gguf_name(name)]
        if config.family.is_linear(name) and takes_feedback(kind, shape[-1]):
            scale = config.family.folded_scale(name, config, config.attention_scale)
            found[name] = WantedBlocks(kind, scale)
    return found


def wanted_head(model: Model, file: GGUFFile) -> tuple[str, WantedBlocks] | None:
    """What feedback makes of a file's head, and its Hugging Face name."""
    from dus_edge.calibrate.feedback import WantedBlocks

    family = model.config.family
    name = family.name("embedding" if model.config.tied_head else "head")
    kinds = {info.name: info.kind for info in file.tensors}
    kind = kinds[family.gguf_name(name)]
    return (name, WantedBlocks(kind)) if takes_feedback(kind, model.shapes[name][-1]) else None


def _head_file(state: State) -> Path:
    return state.folder / "head.safetensors"


def _digest(importance: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(importance.items()):
        digest.update(name.encode() + np.asarray(array, "<f4").tobytes())
    return digest.hexdigest()


def _note(file: Path, found: Sequence[FedMatrix]) -> str:
    """How many matrices keep feedback, and what it is worth where it was held out."""
    kept = [o for o in found if o.fallback is None]
    text = f"{file.name}: error feedback is kept in {len(kept)} of {len(found)} matrices"
    if kept:
        ratios = [o.loss / o.plain_loss for o in kept if o.loss is not None and o.plain_loss > 0]
        text += (
            f"; there the squared error of outputs on held-out text is {np.median(ratios):.2f} of "
            "what it was, by the median"
        )
    odd = {o.fallback for o in found} - {None, LOSES_MORE}
    return text + "".join(f"; {reason}" for reason in sorted(filter(None, odd))) + "."
