"""What each command does, without the command line: one function per job.

The order is always the same: resolve the base, check its configuration and the plan, check every
tensor's header, plan the outputs to the byte, check names and disk, and only then write.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dus_edge.checkpoint.config import ModelConfig, load_config, tensor_shapes, with_layers
from dus_edge.checkpoint.names import CONFIG
from dus_edge.checkpoint.resolve import resolve_base
from dus_edge.checkpoint.safetensors import SafetensorsCheckpoint
from dus_edge.checkpoint.spec import Checkpoint, Source
from dus_edge.progress import progress
from dus_edge.quant import quantizer as quantizers
from dus_edge.quant.recipe import PRESETS, Preset
from dus_edge.stream import default_threads
from dus_edge.upscale import plan as plans
from dus_edge.upscale.naming import ModelName, name_model
from dus_edge.upscale.plan import DepthPlan
from dus_edge.upscale.view import UpscaledCheckpoint

if TYPE_CHECKING:
    import numpy as np

    from dus_edge.export.gguf.format import KeyValue
    from dus_edge.export.gguf.sink import GGUFFile
    from dus_edge.export.vocab.vocab import Vocab
    from dus_edge.quant.imatrix import Importance

ChoosePlan = Callable[[int], DepthPlan]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Model:
    """A base and the plan applied to it, known by its configuration alone."""

    source: Source
    base_config: ModelConfig
    plan: DepthPlan

    @cached_property
    def config(self) -> ModelConfig:
        """Configuration of the result."""
        return with_layers(self.base_config, self.plan.sources)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the result's tensors."""
        return tensor_shapes(self.config)

    @property
    def n_parameters(self) -> int:
        """Parameters of the result; a tied head counts once."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def name(self) -> ModelName:
        """What the result is called."""
        return name_model(self.source.name, self.n_parameters, upscaled=not self.plan.is_identity)

    def open(self) -> Checkpoint:
        """Open the weights: headers are read and checked, nothing else."""
        base = SafetensorsCheckpoint(self.source, self.base_config)
        return base if self.plan.is_identity else UpscaledCheckpoint(base, self.plan)


@dataclass(frozen=True)
class ImatrixSource:
    """An importance matrix to come: read from a file, or collected from the model itself.

    Attributes:
        label: what it is called in messages and in the GGUF file.
        get: gives it, once the model is open.
    """

    label: str
    get: Callable[[Model, Checkpoint], Importance]


@dataclass(frozen=True)
class ModelFacts:
    """What a Modelfile says of a model, wherever it was learnt.

    Attributes:
        title: a name for people.
        context_length: tokens that the model was made for.
        licence: identifier or None.
        chat_template: Jinja text or None.
        special_tokens: texts by role: ``bos_token``, ``eos_token``, …
    """

    title: str
    context_length: int
    licence: str | None
    chat_template: str | None
    special_tokens: Mapping[str, str]


@dataclass(frozen=True)
class Written:
    """One finished output.

    Attributes:
        path: the file, or the folder of a checkpoint.
        nbytes: its size; for a checkpoint that of the weights.
        preset: the mix of a GGUF file.
        modelfile: the Modelfile beside it.
        types: number of tensors by storage type or dtype.
    """

    path: Path
    nbytes: int
    preset: str | None = None
    modelfile: Path | None = None
    types: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What a job wrote and how long it took."""

    model: Model
    outputs: tuple[Written, ...]
    seconds: float
    notes: tuple[str, ...] = ()


def plan_chooser(
    drop: int | None, layers: int | None, spelled: Sequence[str], upscale: bool
) -> ChoosePlan:
    """The plan that options ask for, once the base's depth is known."""
    return lambda n: plans.choose(
        n, drop=drop, layers=layers, plans=tuple(spelled), upscale=upscale
    )


def find_model(
    base: str,
    choose: ChoosePlan,
    *,
    weights: bool,
    say: Say,
    early: Callable[[Path, ModelConfig], object] = lambda folder, config: None,
) -> Model:
    """Resolve a base and its plan.

    Args:
        base: folder, hub id or the built-in base's name.
        choose: gives the plan for a base's depth.
        weights: whether the weights are wanted.
        say: takes lines for the user.
        early: a check that the small files are enough for. Like configuration and plan it comes
            before a hub base's gigabytes are fetched.
    """

    def check(folder: Path) -> None:
        config = load_config(folder / CONFIG)
        choose(config.n_layers)
        early(folder, config)

    source = resolve_base(base, weights=weights, on_config=check, progress=say)
    config = load_config(source.folder / CONFIG)
    return Model(source, config, choose(config.n_layers))


def export_gguf(
    base: str,
    choose: ChoosePlan,
    presets: Sequence[Preset],
    folder: Path,
    *,
    quantizer: str = quantizers.DEFAULT,
    imatrix: ImatrixSource | None = None,
    alias: str | None = None,
    n_threads: int | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    say: Say = lambda line: None,
) -> Result:
    """Base to GGUF files and their Modelfiles, in one pass over the weights.

    Args:
        base: folder, hub id or the built-in base's name.
        choose: gives the plan for a base's depth.
        presets: one output each.
        folder: where the files go, under names of the GGUF convention.
        quantizer: name of the one that makes the blocks, see `quantizer.QUANTIZERS`.
        imatrix: how much an error in each column of a matrix counts; nothing known if None.
        alias: also link ``<alias>.gguf`` to the first and ``<alias>-<preset>.gguf`` to each.
        n_threads: worker threads; all cores by default.
        overwrite: replace files of these names.
        allow_nonfinite: go on although a weight is NaN or infinite.
        say: takes lines for the user.
    """
    from dus_edge.export.gguf import sink as gguf
    from dus_edge.export.gguf.metadata import build_metadata
    from dus_edge.export.vocab.vocab import read_vocab
    from dus_edge.files import check_absent, write_text

    start = time.monotonic()
    chosen = quantizers.find_quantizer(quantizer)
    chosen.prepare((), say)  # a missing library is met before any work
    vocabs: list[Vocab] = []
    model = find_model(
        base,
        choose,
        weights=True,
        say=say,
        early=lambda folder, config: vocabs.append(read_vocab(folder, config.vocab_size)),
    )
    checkpoint = model.open()
    vocab = vocabs[-1]
    metadata = build_metadata(model.config, model.source, model.name, model.plan, vocab)
    paths = [folder / model.name.file_name(p) for p in presets]
    modelfiles = [path.with_suffix(".Modelfile") for path in paths]

    def plan(said: list[KeyValue] | None) -> list[GGUFFile]:
        return [
            gguf.plan_file(model.config, model.shapes, metadata, p, path, said)
            for p, path in zip(presets, paths, strict=True)
        ]

    files = plan(None if imatrix is None else [])
    gguf.check_outputs(files, overwrite)
    check_absent(modelfiles, overwrite)
    say(describe(model))
    weights, notes = None, []
    if imatrix is not None:
        weights, said, notes = _importance(model, checkpoint, imatrix)
        files = plan(said)
    facts = model_facts(model, vocab)
    texts = [render_facts(facts, f"./{f.path.name}") for f in files]
    chosen.prepare(gguf.conversions(checkpoint, files, weights), say)
    total = gguf.total_work(checkpoint, files, weights)
    with progress("Quantizing", total, unit="weights") as tick:
        gguf.write_files(
            checkpoint,
            files,
            chosen,
            importance=weights,
            n_threads=n_threads or default_threads(),
            allow_nonfinite=allow_nonfinite,
            advance=tick,
        )
    for path, text in zip(modelfiles, texts, strict=True):
        write_text(path, text)
    if alias:
        _link(alias, files)
    outputs = tuple(
        Written(f.path, f.nbytes, f.preset.name, m, Counter(t.kind.name for t in f.tensors))
        for f, m in zip(files, modelfiles, strict=True)
    )
    return Result(model, outputs, time.monotonic() - start, (*vocab.notes, *notes))


def _importance(
    model: Model, checkpoint: Checkpoint, imatrix: ImatrixSource
) -> tuple[Mapping[str, np.ndarray], list[KeyValue], list[str]]:
    """Importance by tensor, what the file says of it, and what the user should know."""
    from dus_edge.export.gguf.imatrix import quantize_metadata
    from dus_edge.export.gguf.sink import gguf_shapes
    from dus_edge.quant.imatrix import match

    found = imatrix.get(model, checkpoint)
    matched = match(found, gguf_shapes(model.shapes), imatrix.label)
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


def export_checkpoint(
    base: str,
    choose: ChoosePlan,
    folder: Path,
    *,
    n_threads: int | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    say: Say = lambda line: None,
) -> Result:
    """Base to an up-scaled checkpoint folder that transformers loads; see `export_gguf`."""
    from dus_edge.export import hf
    from dus_edge.export.card import model_card

    start = time.monotonic()
    model = find_model(base, choose, weights=True, say=say)
    checkpoint = model.open()
    hf.check_outputs(checkpoint, folder, overwrite)
    card = model_card(model.source, model.config, model.plan, model.name, model.n_parameters)
    say(describe(model))
    total = sum(s.nbytes for s in checkpoint.specs().values())
    with progress("Writing", total) as tick:
        hf.write_checkpoint(
            checkpoint,
            folder,
            card,
            n_threads=n_threads or default_threads(),
            overwrite=overwrite,
            allow_nonfinite=allow_nonfinite,
            advance=tick,
        )
    types = Counter(s.dtype for s in checkpoint.specs().values())
    output = Written(folder, total, types=types)
    return Result(model, (output,), time.monotonic() - start)


def export_bnb(
    base: str,
    choose: ChoosePlan,
    folder: Path,
    scheme_name: str,
    *,
    double_quant: bool = True,
    n_threads: int | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    say: Say = lambda line: None,
) -> Result:
    """Base to an up-scaled checkpoint in one of bitsandbytes' formats; see `export_gguf`.

    Args:
        base: folder, hub id or the built-in base's name.
        choose: gives the plan for a base's depth.
        folder: the result.
        scheme_name: ``nf4`` or ``int8``.
        double_quant: of nf4, whether its scales are quantized too.
        n_threads: worker threads; all cores by default.
        overwrite: replace an older checkpoint folder of that name.
        allow_nonfinite: go on although a weight is NaN or infinite.
        say: takes lines for the user.
    """
    from dus_edge.export import bnb
    from dus_edge.export.card import model_card

    start = time.monotonic()
    bnb.check_available()
    scheme = bnb.Scheme(scheme_name, double_quant)
    model = find_model(base, choose, weights=True, say=say)
    checkpoint = model.open()
    bnb.check_outputs(checkpoint, folder, scheme, overwrite)
    planned = bnb.plan_tensors(checkpoint.specs(), scheme)
    card = model_card(model.source, model.config, model.plan, model.name, model.n_parameters)
    say(describe(model))
    total = sum(s.nbytes for s in planned)
    with progress("Quantizing", total) as tick:
        bnb.write_checkpoint(
            checkpoint,
            folder,
            card,
            scheme,
            n_threads=n_threads or default_threads(),
            overwrite=overwrite,
            allow_nonfinite=allow_nonfinite,
            advance=tick,
        )
    output = Written(folder, total, types=Counter(s.dtype for s in planned))
    return Result(model, (output,), time.monotonic() - start)


def describe(model: Model) -> str:
    """One line: ``Mistral-7B-v0.1: 32 → 48 layers (0:24,8:32), 10.73 B parameters``."""
    plan = model.plan
    depth = (
        f"{plan.depth} layers"
        if plan.is_identity
        else f"{plan.n_base} → {plan.depth} layers ({plan.spelled})"
    )
    return f"{model.source.name}: {depth}, {format_count(model.n_parameters)} parameters"


def format_count(n: int) -> str:
    """``10.73 B``, ``8.14 M``."""
    value, unit = float(n), ""
    for unit in ("", " k", " M", " B", " T"):
        if value < 1000 or unit == " T":
            break
        value /= 1000
    return f"{value:.2f}{unit}" if unit else str(n)


def preset_sizes(model: Model, presets: Mapping[str, Preset]) -> tuple[dict[str, int], bool]:
    """File size in bytes of every preset, without reading a weight.

    Returns:
        sizes by preset, and whether they are exact: without the tokenizer's files the header's
        size is unknown and left out.
    """
    from dus_edge.errors import CheckpointError
    from dus_edge.export.gguf import sink as gguf
    from dus_edge.export.gguf.format import data_size
    from dus_edge.export.gguf.metadata import build_metadata
    from dus_edge.export.vocab.vocab import read_vocab

    metadata: list[Any] = []
    exact = True
    try:
        vocab = read_vocab(model.source.folder, model.config.vocab_size)
        metadata = build_metadata(model.config, model.source, model.name, model.plan, vocab)
    except CheckpointError:
        exact = False
    # The header names every type by a number of one width, so its length is the same for all
    # presets; a vocabulary of 128,000 tokens is encoded once, not fifteen times.
    header = len(
        gguf.plan_file(model.config, model.shapes, metadata, PRESETS["f32"], Path()).header
    )
    sizes = {
        name: header + data_size(gguf.plan_tensors(model.config, model.shapes, preset))
        for name, preset in presets.items()
    }
    return sizes, exact


def render_tracked(folder: Path) -> list[Path]:
    """Render the repository's `modelfiles/`; the same whatever base the GGUFs were made from."""
    from dus_edge.files import check_writable, write_text
    from dus_edge.ollama.tracked import tracked_modelfiles

    check_writable(folder)
    texts = tracked_modelfiles()
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def render_modelfile_of(
    model: str, folder: Path, from_path: str | None, num_ctx: int | None, *, say: Say
) -> str:
    """The Modelfile of a GGUF file or of a checkpoint.

    Args:
        model: a `.gguf` file, or a base as everywhere else.
        folder: where the Modelfile will stand; FROM is relative to it.
        from_path: what FROM names; needed for a checkpoint, which is no file that Ollama runs.
        num_ctx: cap of the context; the module's default if None.
        say: takes lines for the user.

    Raises:
        UsageError: a checkpoint without `from_path`.
    """
    from dus_edge.errors import UsageError

    if model.endswith(".gguf"):
        facts = gguf_facts(Path(model))
        default = os.path.relpath(model, folder)
        return render_facts(facts, from_path or default, num_ctx)
    if from_path is None:
        raise UsageError(
            f"{model} is a checkpoint; name the GGUF file that the Modelfile runs with --from."
        )
    found = find_model(model, plan_chooser(None, None, (), False), weights=False, say=say)
    from dus_edge.export.vocab.vocab import read_vocab

    vocab = read_vocab(found.source.folder, found.config.vocab_size)
    return render_facts(model_facts(found, vocab), from_path, num_ctx)


def model_facts(model: Model, vocab: Vocab) -> ModelFacts:
    """What a Modelfile says of a model that is about to be exported."""
    config = model.config
    return ModelFacts(
        title=model.name.title,
        # llama.cpp's llama graph has no sliding window, so past it the model is on its own.
        context_length=min(config.context_length, config.sliding_window or config.context_length),
        licence=model.source.licence,
        chat_template=vocab.chat_template,
        special_tokens={f"{kind}_token": vocab.tokens[i] for kind, i in vocab.special_ids.items()},
    )


def gguf_facts(path: Path) -> ModelFacts:
    """What a Modelfile says of a GGUF file.

    Raises:
        CheckpointError: no GGUF file, or one without a Llama-form model's keys.
    """
    from gguf import GGUFReader

    from dus_edge.errors import CheckpointError

    try:
        fields = GGUFReader(path).fields
        architecture = fields["general.architecture"].contents()
        context_length = fields[f"{architecture}.context_length"].contents()
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (KeyError, ValueError, IndexError, OSError) as e:
        raise CheckpointError(f"{path} is no GGUF file of a model ({e}).") from None

    def text(key: str) -> str | None:
        return fields[key].contents() if key in fields else None

    special = {}
    for kind in ("bos", "eos"):
        if (field := fields.get(f"tokenizer.ggml.{kind}_token_id")) is not None:
            special[f"{kind}_token"] = fields["tokenizer.ggml.tokens"].contents(field.contents())
    return ModelFacts(
        title=text("general.name") or path.stem,
        context_length=context_length,
        licence=text("general.license"),
        chat_template=text("tokenizer.chat_template"),
        special_tokens=special,
    )


def render_facts(facts: ModelFacts, from_path: str, num_ctx: int | None = None) -> str:
    """A Modelfile's text."""
    from dus_edge.ollama import chat
    from dus_edge.ollama.modelfile import NUM_CTX_CAP, for_model, render_modelfile

    spec = for_model(
        from_path=from_path,
        context_length=facts.context_length,
        family=chat.identify(facts.chat_template, facts.special_tokens),
        chat_template_present=facts.chat_template is not None,
        licence=facts.licence,
        title=f"{facts.title}, made by dus-edge.",
        num_ctx_cap=num_ctx or NUM_CTX_CAP,
        eos_token=facts.special_tokens.get("eos_token", "</s>"),
    )
    return render_modelfile(spec)


def _link(alias: str, files: Sequence[GGUFFile]) -> None:
    """Names that do not depend on the base, for Modelfiles that are the same for every base."""
    from dus_edge.files import point_to

    first = files[0].path
    point_to(first.with_name(f"{alias}.gguf"), first)
    for f in files:
        point_to(f.path.with_name(f"{alias}-{f.preset.name}.gguf"), f.path)
