"""What each command does, without the command line: one function per job.

The order is always the same: resolve the base, check its configuration and the plan, check every
tensor's header, plan the outputs to the byte, check names and disk, and only then write.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dus_edge.checkpoint.config import ModelConfig, load_config, tensor_shapes, with_layers
from dus_edge.checkpoint.resolve import resolve_base
from dus_edge.checkpoint.safetensors import SafetensorsCheckpoint
from dus_edge.checkpoint.spec import Checkpoint, Source
from dus_edge.export.naming import ModelName, name_model
from dus_edge.progress import progress
from dus_edge.quant.recipe import Preset
from dus_edge.stream import default_threads
from dus_edge.upscale import plan as plans
from dus_edge.upscale.plan import DepthPlan
from dus_edge.upscale.view import UpscaledCheckpoint

if TYPE_CHECKING:
    from dus_edge.export.gguf import GGUFFile
    from dus_edge.export.gguf_vocab import Vocab

ChoosePlan = Callable[[int], DepthPlan]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Model:
    """A base and the plan applied to it, known by its configuration alone."""

    source: Source
    base_config: ModelConfig
    plan: DepthPlan

    @property
    def config(self) -> ModelConfig:
        """Configuration of the result."""
        return with_layers(self.base_config, self.plan.sources)

    @property
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
        return name_model(
            self.source.name, self.n_parameters, upscaled=not self.plan.is_identity
        )

    def open(self) -> Checkpoint:
        """Open the weights: headers are read and checked, nothing else."""
        base = SafetensorsCheckpoint(self.source, self.base_config)
        return base if self.plan.is_identity else UpscaledCheckpoint(base, self.plan)


@dataclass(frozen=True)
class Written:
    """One finished output."""

    path: Path
    nbytes: int
    preset: str | None = None
    modelfile: Path | None = None


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


def find_model(base: str, choose: ChoosePlan, *, weights: bool, say: Say) -> Model:
    """Resolve a base and its plan; a hub base's weights are fetched only if both are sound."""

    def check(folder: Path) -> None:
        choose(load_config(folder / "config.json").n_layers)

    source = resolve_base(base, weights=weights, on_config=check, progress=say)
    config = load_config(source.folder / "config.json")
    return Model(source, config, choose(config.n_layers))


def export_gguf(
    base: str,
    choose: ChoosePlan,
    presets: Sequence[Preset],
    folder: Path,
    *,
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
        alias: also link ``<alias>.gguf`` to the first and ``<alias>-<preset>.gguf`` to each.
        n_threads: worker threads; all cores by default.
        overwrite: replace files of these names.
        allow_nonfinite: go on although a weight is NaN or infinite.
        say: takes lines for the user.
    """
    from dus_edge.export import gguf
    from dus_edge.export.gguf_metadata import build_metadata
    from dus_edge.export.gguf_vocab import read_vocab
    from dus_edge.files import check_absent, write_text
    from dus_edge.quant import ggml

    start = time.monotonic()
    ggml.library()  # a missing library is met before any work
    model = find_model(base, choose, weights=True, say=say)
    checkpoint = model.open()
    vocab = read_vocab(model.source.folder, model.config.vocab_size)
    metadata = build_metadata(model.config, model.source, model.name, model.plan, vocab)
    files = [
        gguf.plan_file(model.config, model.shapes, metadata, p, folder / model.name.file_name(p))
        for p in presets
    ]
    modelfiles = [f.path.with_suffix(".Modelfile") for f in files]
    gguf.check_outputs(files, overwrite)
    check_absent(modelfiles, overwrite)
    texts = [modelfile_text(model, f.path.name, vocab) for f in files]
    say(describe(model))
    with progress("Quantizing", gguf.total_work(checkpoint, files), unit="W") as tick:
        gguf.write_files(
            checkpoint,
            files,
            n_threads=n_threads or default_threads(),
            allow_nonfinite=allow_nonfinite,
            advance=tick,
        )
    for path, text in zip(modelfiles, texts, strict=True):
        write_text(path, text)
    if alias:
        _link(alias, files)
    outputs = tuple(
        Written(f.path, f.nbytes, f.preset.name, m) for f, m in zip(files, modelfiles, strict=True)
    )
    return Result(model, outputs, time.monotonic() - start, vocab.notes)


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
    return Result(model, (Written(folder, total),), time.monotonic() - start)


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
    from dus_edge.export import gguf
    from dus_edge.export.gguf_metadata import build_metadata
    from dus_edge.export.gguf_vocab import read_vocab

    metadata: list[Any] = []
    exact = True
    try:
        vocab = read_vocab(model.source.folder, model.config.vocab_size)
        metadata = build_metadata(model.config, model.source, model.name, model.plan, vocab)
    except CheckpointError:
        exact = False
    sizes = {
        name: gguf.plan_file(model.config, model.shapes, metadata, preset, Path(name)).nbytes
        for name, preset in presets.items()
    }
    return sizes, exact


def modelfile_text(model: Model, gguf_name: str, vocab: Vocab) -> str:
    """The Modelfile that stands beside a GGUF file of this model."""
    from dus_edge.ollama import chat
    from dus_edge.ollama.modelfile import for_model, render_modelfile

    special = {f"{kind}_token": vocab.tokens[i] for kind, i in vocab.special_ids.items()}
    config = model.config
    spec = for_model(
        from_path=f"./{gguf_name}",
        # llama.cpp's llama graph has no sliding window, so past it the model is on its own.
        context_length=min(config.context_length, config.sliding_window or config.context_length),
        family=chat.identify(vocab.chat_template, special),
        chat_template_present=vocab.chat_template is not None,
        licence=model.source.licence,
        title=f"{model.name.title}, made by dus-edge from {model.source.name}.",
        eos_token=special.get("eos_token", "</s>"),
    )
    return render_modelfile(spec)


def _link(alias: str, files: Sequence[GGUFFile]) -> None:
    """Names that do not depend on the base, for Modelfiles that are the same for every base."""
    from dus_edge.files import point_to

    first = files[0].path
    point_to(first.with_name(f"{alias}.gguf"), first)
    for f in files:
        point_to(f.path.with_name(f"{alias}-{f.preset.name}.gguf"), f.path)
