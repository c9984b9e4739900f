"""The job `gguf`: base to GGUF files and their Modelfiles, in one pass over the weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dus_edge.checkpoint.config import ModelConfig
from dus_edge.checkpoint.names import CONFIG
from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.errors import CheckpointError, UsageError
from dus_edge.export.gguf import sink
from dus_edge.export.gguf.format import KeyValue, TensorInfo
from dus_edge.export.gguf.imatrix import quantize_metadata
from dus_edge.export.gguf.metadata import build_metadata, check_layers
from dus_edge.export.gguf.sink import GGUFFile
from dus_edge.export.vocab.vocab import Vocab, read_vocab
from dus_edge.files import check_absent, point_to, write_text
from dus_edge.jobs.export.feedback import FedBlocks, FeedbackChoice, fed_blocks
from dus_edge.jobs.job import Job, Result, Writing, Written, quiet, run_job
from dus_edge.ollama.facts import model_facts, render_facts
from dus_edge.progress import progress
from dus_edge.quant import choose
from dus_edge.quant.imatrix import Importance, match, needs_importance
from dus_edge.quant.mix.file import mix_path, write_mix
from dus_edge.quant.recipe import Preset
from dus_edge.text.chunks import Chunks
from dus_edge.upscale.model import ChoosePlan, Model, Say
from dus_edge.words import counts_text, wrap


@dataclass(frozen=True)
class ImatrixSource:
    """An importance matrix to come: read from a file, or collected from the model itself.

    Attributes:
        label: what it is called in messages and in the GGUF file.
        get: gives it, once the model is open.
    """

    label: str
    get: Callable[[Model, Checkpoint], Importance]


def export_gguf(
    base: str,
    choose: ChoosePlan,
    presets: Sequence[Preset],
    folder: Path,
    *,
    quantizer: str = choose.DEFAULT,
    imatrix: ImatrixSource | None = None,
    feedback: FeedbackChoice | None = None,
    alias: str | None = None,
    adapter: Path | None = None,
    n_threads: int | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    say: Say = quiet,
) -> Result:
    """Base to GGUF files and their Modelfiles, in one pass over the weights.

    Args:
        base: folder, hub id or the built-in base's name.
        choose: gives the plan for a base's depth.
        presets: one output each.
        folder: where the files go, under names of the GGUF convention.
        quantizer: name of the one that makes the blocks, see `choose.QUANTIZERS`.
        imatrix: how much an error in each column of a matrix counts; nothing known if None.
        feedback: whether errors are fed forward into the blocks, and on which text.
        alias: also link ``<alias>.gguf`` to the last and ``<alias>-<preset>.gguf`` to each.
        adapter: folder of a LoRA adapter to merge on the way; of the base, or of the result.
        n_threads: worker threads; all cores by default.
        overwrite: replace files of these names.
        allow_nonfinite: go on although a weight is NaN or infinite.
        say: takes lines for the user.
    """
    writing = Writing(n_threads, overwrite, allow_nonfinite)
    job = GGUFJob(tuple(presets), folder, quantizer, imatrix, alias, writing, feedback)
    return run_job(job, base, choose, say, adapter)


@dataclass(frozen=True)
class GGUFPlan:
    """Outputs laid out to the byte.

    Attributes:
        vocab: the tokenizer as GGUF has it.
        metadata: what every file says, whatever its preset.
        files: the outputs; with an importance matrix to come, without what they will say of it.
        chunks: the text for error feedback.
    """

    vocab: Vocab
    metadata: list[KeyValue]
    files: list[GGUFFile]
    chunks: Chunks | None


@dataclass(frozen=True)
class GGUFJob(Job[GGUFPlan]):
    """See `export_gguf` for the fields."""

    presets: tuple[Preset, ...]
    folder: Path
    quantizer: str
    imatrix: ImatrixSource | None
    alias: str | None
    writing: Writing
    feedback: FeedbackChoice | None = None
    #: What `early` read; a vocabulary of 128,000 tokens is read once.
    _vocabs: list[Vocab] = field(default_factory=list, init=False, repr=False, compare=False)

    def need(self, say: Say) -> None:
        """A missing library is met before any work."""
        choose.find_quantizer(self.quantizer).prepare((), say)
        if self.feedback is not None:
            self.feedback.need()

    def early(self, folder: Path, config: ModelConfig) -> None:
        """What GGUF cannot hold is met before the weights are fetched."""
        check_layers(config, str(folder / CONFIG))
        self._vocabs.append(read_vocab(folder, config.vocab_size))

    def outputs(self, model: Model) -> list[Path]:
        """A file for each preset."""
        return [self.folder / model.name.file_name(preset) for preset in self.presets]

    def check(self, model: Model, checkpoint: Checkpoint) -> GGUFPlan:
        """Lay the files out; names, folder and disk must do."""
        vocab = self._vocabs[-1]
        trained = model.adapter.name if model.adapter and model.on_result else None
        metadata = build_metadata(
            model.config, model.source, model.name, model.plan, vocab, trained
        )
        weighted = self.imatrix is not None or self.feedback is not None
        files = self._files(model, metadata, (lambda path: []) if weighted else None)
        if not weighted:
            _refuse_without_importance(files)
        sink.check_outputs(files, self.writing.overwrite)
        mixes = [mix_path(f.path) for f in files if f.preset.chosen]
        check_absent([*map(_modelfile, files), *mixes], self.writing.overwrite)
        chunks = self.feedback.check(model, files) if self.feedback else None
        return GGUFPlan(vocab, metadata, files, chunks)

    def write(
        self, model: Model, checkpoint: Checkpoint, planned: GGUFPlan, say: Say
    ) -> tuple[tuple[Written, ...], tuple[str, ...]]:
        """Quantize and write; Modelfiles and links follow when all files are whole."""
        weights, said, notes = None, None, []
        shapes = sink.gguf_shapes(model.config.family, model.shapes)
        _say_requantized(model, say)
        if self.imatrix is not None:
            weights, said, notes = _importance(model, checkpoint, shapes, self.imatrix)
            _refuse_incomplete(planned.files, weights, self.imatrix.label)
        with self._fed(model, checkpoint, planned, weights, say) as fed:
            files = planned.files
            if fed is not None:
                if weights is None:
                    weights = match(fed.importance, shapes).weights
                said = said or quantize_metadata("the importance matrix", fed.importance)
                notes += fed.notes()
            if said is not None:
                more = fed.said if fed is not None else lambda path: []
                files = self._files(model, planned.metadata, lambda path: [*said, *more(path)])
            self._write(model, checkpoint, planned, files, weights, fed, say)
        return tuple(map(_written, files)), (*planned.vocab.notes, *notes)

    def _write(
        self,
        model: Model,
        checkpoint: Checkpoint,
        planned: GGUFPlan,
        files: list[GGUFFile],
        weights: Mapping[str, np.ndarray] | None,
        fed: FedBlocks | None,
        say: Say,
    ) -> None:
        """Quantize what is not there already; Modelfiles and links when all files are whole."""
        facts = model_facts(model, planned.vocab, ours=True)
        texts = [render_facts(facts, f"./{f.path.name}") for f in files]
        made = fed.made if fed is not None else None
        chosen = choose.find_quantizer(self.quantizer)
        chosen.prepare(sink.conversions(checkpoint, files, weights, made), say)
        total = sink.total_work(checkpoint, files, weights, made)
        with progress("Quantizing", total, unit="weights") as tick:
            sink.write_files(
                checkpoint,
                files,
                chosen,
                importance=weights,
                made=made,
                n_threads=self.writing.threads,
                allow_nonfinite=self.writing.allow_nonfinite,
                advance=tick,
            )
        for file, text in zip(files, texts, strict=True):
            write_text(_modelfile(file), text)
            if file.preset.chosen:
                write_mix(mix_path(file.path), file.preset)
        if self.alias:
            _link(self.alias, files)

    def _fed(
        self,
        model: Model,
        checkpoint: Checkpoint,
        planned: GGUFPlan,
        weights: Mapping[str, np.ndarray] | None,
        say: Say,
    ) -> AbstractContextManager[FedBlocks | None]:
        """The blocks with feedback, while they are needed; None without."""
        if self.feedback is None or planned.chunks is None:
            return nullcontext()
        return fed_blocks(
            self.feedback,
            model,
            checkpoint,
            planned.files,
            planned.chunks,
            choose.find_quantizer(self.quantizer),
            weights,
            self.writing.threads,
            say,
        )

    def _files(
        self,
        model: Model,
        metadata: list[KeyValue],
        said: Callable[[Path], list[KeyValue]] | None,
    ) -> list[GGUFFile]:
        """The outputs, which say what `said` gives of an importance matrix; None without one."""
        return [
            sink.plan_file(
                model.config,
                model.shapes,
                metadata,
                preset,
                path,
                None if said is None else said(path),
            )
            for preset, path in zip(self.presets, self.outputs(model), strict=True)
        ]


def _say_requantized(model: Model, say: Say) -> None:
    """What quantizing a quantized GGUF costs."""
    gguf = model.source.gguf
    if gguf is not None and gguf.is_quantized:
        say(
            wrap(
                f"{gguf.label} is quantized already ({counts_text(gguf.types)}): quantizing again "
                "adds its own error to the one that is there. Without -q tensors are copied as "
                "they are."
            )
        )


def _dependent(file: GGUFFile) -> list[TensorInfo]:
    """Tensors that are quantized with importance or not at all."""
    return [info for info in file.tensors if needs_importance(info.name, info.kind)]


def _refuse_without_importance(files: Sequence[GGUFFile]) -> None:
    """A type of about two bits needs importance.

    Raises:
        UsageError: a file has such a type.
    """
    for file in files:
        for info in _dependent(file):
            raise UsageError(
                f"{file.preset.name} stores {info.name} as {info.kind.name}, which is no use "
                "without an importance matrix: add --imatrix auto (of make: IMATRIX=auto), "
                "or a file."
            )


def _refuse_incomplete(
    files: Sequence[GGUFFile], weights: Mapping[str, np.ndarray], label: str
) -> None:
    """Every tensor of such a type needs an entry.

    Raises:
        CheckpointError: there is none of one.
    """
    for file in files:
        for info in _dependent(file):
            if info.name not in weights:
                raise CheckpointError(
                    f"{label} knows nothing of {info.name}, which {file.preset.name} stores as "
                    f"{info.kind.name}: take one of the whole model, such as --imatrix auto."
                )


def _modelfile(file: GGUFFile) -> Path:
    return file.path.with_suffix(".Modelfile")


def _written(file: GGUFFile) -> Written:
    types = Counter(t.kind.name for t in file.tensors)
    return Written(file.path, file.nbytes, file.preset.name, _modelfile(file), types)


def _importance(
    model: Model,
    checkpoint: Checkpoint,
    shapes: Mapping[str, tuple[int, ...]],
    imatrix: ImatrixSource,
) -> tuple[Mapping[str, np.ndarray], list[KeyValue], list[str]]:
    """Importance by tensor, what the file says of it, and what the user should know."""
    found = imatrix.get(model, checkpoint)
    matched = match(found, shapes, imatrix.label)
    notes = []
    if matched.missing:
        named = ", ".join(matched.missing[:3]) + (", …" if len(matched.missing) > 3 else "")
        notes.append(
            f"{imatrix.label} knows nothing of {len(matched.missing)} matrices ({named}); "
            "they were quantized without importance."
        )
    if matched.unused:
        notes.append(
            f"{imatrix.label} also has {len(matched.unused)} entries of matrices that are not in "
            f"this model ({matched.unused[0]}); was it made for another depth?"
        )
    return matched.weights, quantize_metadata(imatrix.label, found), notes


def _link(alias: str, files: Sequence[GGUFFile]) -> None:
    """Names that do not depend on the base, for Modelfiles that are the same for every base."""
    point_to(files[-1].path.with_name(f"{alias}.gguf"), files[-1].path)
    for f in files:
        point_to(f.path.with_name(f"{alias}-{f.preset.name}.gguf"), f.path)
