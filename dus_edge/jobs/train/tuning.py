"""What `sft` and `dpo` share: from a checkpoint and rows of data to a tuned checkpoint or adapter.

Everything is checked and turned into tokens before the first step: the data, the chat format, the
disk, and whether a run that was cut short is gone on with.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dus_edge import __version__
from dus_edge.checkpoint.config import ModelConfig, refuse_renamed
from dus_edge.checkpoint.contained import carried_files
from dus_edge.checkpoint.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TRAINING_LOG
from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.errors import OutputError, UsageError
from dus_edge.export import hf
from dus_edge.files import check_free_space, check_replaceable, output_folder
from dus_edge.jobs.job import Job, Writing, Written
from dus_edge.jobs.train.card import Tuned, tuned_card
from dus_edge.jobs.train.chat_format import find_format, template_files
from dus_edge.jobs.train.state import begin_run, check_same_run, end_run, work_folder
from dus_edge.packages import require
from dus_edge.progress import progress
from dus_edge.text.dialogues import TuningData, split_held_out
from dus_edge.text.tokenizers import load_tokenizer
from dus_edge.train.tune import settings as defaults
from dus_edge.train.tune.formats import TrainingFormat
from dus_edge.train.tune.settings import TuneSettings
from dus_edge.upscale.model import Model, Say

#: What an adapter may replace: an older one, or a checkpoint.
_REPLACEABLE = (*hf.REPLACEABLE, ADAPTER_CONFIG, ADAPTER_WEIGHTS)
#: Bytes for a weight that learns in a checkpoint of the trainer: itself and AdamW's two moments.
_STATE_BYTES = 12
#: Checkpoints that are there at once: two are kept while the next is written.
_N_KEPT = 3


@dataclass(frozen=True)
class TuneOptions:
    """What a person asked for; None means the default for the model."""

    data: str
    data_licence: str | None = None
    method: str | None = None
    rank: int = defaults.DEFAULT_RANK
    chat_format: str | None = None
    max_tokens: int | None = None
    epochs: float = 3.0
    steps: int | None = None
    batch: int = 8
    micro_batch: int | None = None
    lr: float | None = None
    beta: float = 0.1
    seed: int = 0
    eval_share: float = 0.1
    save_every: int | None = None
    device: str = "auto"
    restart: bool = False


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs but the model.

    Attributes:
        settings: of the run.
        data: the rows as they were read.
        form: chat format.
        tokenizer: transformers' own.
        train: examples or pairs that are trained on.
        held: those that are held out.
        identity: what the result depends on.
        more_files: text files that the result has beside the base's, by name.
        notes: for the user.
    """

    settings: TuneSettings
    data: TuningData
    form: TrainingFormat
    tokenizer: Any
    train: Sequence[Any]
    held: Sequence[Any]
    identity: dict[str, Any]
    more_files: dict[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class TuneJob(Job[Prepared]):
    """The frame; `SftJob` and `DpoJob` say what a row is and what is measured.

    Attributes:
        folder: the result.
        options: what was asked for.
        writing: how the result is written.
        figures: what was measured, for programs; filled at the end.
    """

    folder: Path
    options: TuneOptions
    writing: Writing
    figures: dict[str, Any] = field(default_factory=dict)

    goal = ""
    unit = ""

    @abstractmethod
    def read(self) -> TuningData:
        """The rows."""

    @abstractmethod
    def encode(self, coder: Any, rows: Sequence[Any]) -> tuple[list[Any], int]:
        """Rows as tokens, and how many are too long."""

    @abstractmethod
    def measure(self, model: Any, held: Sequence[Any], advance: Callable[[int], None]) -> Any:
        """What the model makes of rows that it is not trained on."""

    @abstractmethod
    def compare(
        self, before: Any, after: Any, held: Sequence[Any]
    ) -> tuple[str, list[tuple[str, str, str]], dict[str, Any]]:
        """Two measurements: on what, rows of a table, and the same for programs."""

    def need(self, say: Say) -> None:
        """trl and peft must be there, and the output's name must do."""
        require("train", f"{self.goal} needs")
        if self.options.method == "qlora":
            require("bnb", "qlora needs", "bitsandbytes")
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise UsageError(
                f"{self.goal} runs in one process, and torchrun started "
                f"{os.environ['WORLD_SIZE']}; start it without torchrun."
            )
        check_replaceable(self.folder, self.writing.overwrite, _REPLACEABLE)
        if self.options.batch % (self.options.micro_batch or 1):
            raise UsageError(
                f"a batch of {self.options.batch} is no multiple of --micro-batch "
                f"{self.options.micro_batch}; change one of them."
            )

    def early(self, folder: Path, config: ModelConfig) -> None:
        """Data and chat format must do before gigabytes are fetched."""
        refuse_renamed(config, folder)
        self.read()
        find_format(folder, config, self.options.chat_format)

    def outputs(self, model: Model) -> list[Path]:
        """The folder."""
        return [self.folder]

    def check(self, model: Model, checkpoint: Checkpoint) -> Prepared:
        """Turn the data into tokens; see that it can be trained on and the result be written."""
        from dus_edge.train.tune.examples import Coder
        from dus_edge.train.tune.model import open_tokenizer
        from dus_edge.train.tune.quiet import be_quiet

        be_quiet()
        self._check_output(model, checkpoint)
        data, config, source = self.read(), model.config, model.source.folder
        form, vocab = find_format(source, config, self.options.chat_format)
        n_ctx = self._n_ctx(config)
        tokenizer = open_tokenizer(source)
        begin = load_tokenizer(source, config.vocab_size).bos_id
        coder = Coder(form, tokenizer, begin, n_ctx)
        parts = split_held_out(data.rows, self.options.eval_share)
        (train, long), (held, long_held) = (self.encode(coder, part) for part in parts)
        if not train or not held:
            raise UsageError(
                f"{self.options.data}: every example of a part has more than {n_ctx} tokens; "
                "allow more with --max-tokens, or shorten them."
            )
        settings = self._settings(model, n_ctx, len(train))
        identity = _identity(model, data, form, settings)
        check_same_run(work_folder(self.folder), identity, self.options.restart)
        left_out = long + long_held
        notes = (
            (f"{left_out} examples of more than {n_ctx} tokens were left out.",) if left_out else ()
        )
        more = template_files(source, vocab, form, begin is not None)
        return Prepared(settings, data, form, tokenizer, train, held, identity, more, notes)

    def write(
        self, model: Model, checkpoint: Checkpoint, planned: Prepared, say: Say
    ) -> tuple[tuple[Written, ...], tuple[str, ...]]:
        """Measure, tune, measure again, write."""
        from dus_edge.train.tune.run import lacks_explained

        settings, work = planned.settings, work_folder(self.folder)
        say(self._plan_line(planned))
        with lacks_explained(work, settings):
            trained, before, after = self._train(checkpoint, planned, work, say)
        on, table, figures = self.compare(before, after, planned.held)
        self.figures.update(figures, steps=settings.n_steps, method=settings.method)
        for what, first, last in table:
            say(f"{what}: {first} → {last}")
        log = (work / TRAINING_LOG).read_text(encoding="utf-8")
        more = {**planned.more_files, TRAINING_LOG: f"{log}{json.dumps(self.figures)}\n"}
        card = tuned_card(
            model,
            settings,
            Tuned(
                data=planned.data,
                data_licence=self.options.data_licence or planned.data.licence,
                format_name=planned.form.name or "the base's own",
                n_trained=len(planned.train),
                held_out=on,
                figures=table,
            ),
        )
        if settings.is_adapter:
            written = self._write_adapter(trained, model, card, more)
        else:
            written = self._write_whole(trained, checkpoint, card, more)
        end_run(work)
        return (written,), planned.notes

    def _train(
        self, checkpoint: Checkpoint, planned: Prepared, work: Path, say: Say
    ) -> tuple[Any, Any, Any]:
        """The tuned model, and what was measured before and after.

        Raises:
            KeyboardInterrupt: a stop was asked for; a checkpoint was written.
        """
        from dus_edge.train.tune import model as tuned
        from dus_edge.train.tune.run import tune
        from dus_edge.train.tune.watch import whole_checkpoints

        settings = planned.settings
        begin_run(work, planned.identity)
        if kept := whole_checkpoints(work):
            say(f"Going on from {kept[-1].name}: an earlier run of the same was cut short")
        model = tuned.open_trainable(checkpoint, settings)
        before = self._measured(model, planned.held, "before")
        model, finished = tune(model, planned.tokenizer, planned.train, settings, work)
        if not finished:
            say(f"{whole_checkpoints(work)[-1].name} is kept; the same command goes on.")
            raise KeyboardInterrupt
        if not settings.is_adapter:
            tuned.round_to_stored(model, checkpoint)
        return model, before, self._measured(model, planned.held, "after")

    def _write_whole(
        self, trained: Any, checkpoint: Checkpoint, card: str, more: dict[str, str]
    ) -> Written:
        from dus_edge.train.tune.model import tuned_checkpoint

        specs = checkpoint.specs().values()
        hf.write_checkpoint(
            tuned_checkpoint(checkpoint, trained),
            self.folder,
            card,
            n_threads=self.writing.threads,
            overwrite=self.writing.overwrite,
            extra_files=more,
        )
        total = sum(s.nbytes for s in specs)
        return Written(self.folder, total, types=Counter(s.dtype for s in specs))

    def _write_adapter(
        self, trained: Any, model: Model, card: str, more: dict[str, str]
    ) -> Written:
        from dus_edge.train.tune.model import save_adapter

        source = model.source
        with output_folder(self.folder, self.writing.overwrite, _REPLACEABLE) as partial:
            save_adapter(trained, partial, source.repo_id or source.label)
            for name in carried_files(source.folder):
                (partial / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source.folder / name, partial / name)
            for name, text in {**more, "README.md": card}.items():
                (partial / name).write_text(text, encoding="utf-8")
        size = (self.folder / ADAPTER_WEIGHTS).stat().st_size
        return Written(self.folder, size)

    def _measured(self, trained: Any, held: Sequence[Any], when: str) -> Any:
        with progress(f"Held out, {when}", len(held), unit=self.unit) as tick:
            return self.measure(trained, held, tick)

    def _plan_line(self, planned: Prepared) -> str:
        s = planned.settings
        return (
            f"{s.goal.upper()}, {s.method}: {len(planned.train)} {self.unit}, {s.n_steps} steps "
            f"of {s.batch}, {s.device}; {len(planned.held)} held out"
        )

    def _n_ctx(self, config: ModelConfig) -> int:
        asked = self.options.max_tokens
        if asked and asked > config.context_length:
            raise UsageError(
                f"{asked} tokens are more than the model's context of "
                f"{config.context_length:,}; choose a smaller --max-tokens."
            )
        return asked or min(defaults.DEFAULT_MAX_TOKENS, config.context_length)

    def _settings(self, model: Model, n_ctx: int, n_examples: int) -> TuneSettings:
        from dus_edge.calibrate.engine import choose_settings

        o, n = self.options, model.n_parameters
        device = choose_settings(o.device).device
        if device == "mps":
            if o.device != "auto":
                raise UsageError("training on mps is not supported; use --device cpu.")
            device = "cpu"
        method = self._method(model)
        large = n >= defaults.ADAPTER_FROM
        micro = o.micro_batch or (1 if large else o.batch)
        n_steps = o.steps or defaults.step_count(n_examples, o.batch, o.epochs)
        return TuneSettings(
            goal=self.goal,
            method=method,
            device=device,
            n_ctx=n_ctx,
            n_steps=n_steps,
            batch=o.batch,
            micro_batch=micro,
            learning_rate=o.lr or defaults.default_learning_rate(self.goal, method, n),
            rank=o.rank,
            beta=o.beta,
            seed=o.seed,
            save_every=o.save_every or defaults.checkpoint_interval(n_steps),
        )

    def _method(self, model: Model) -> str:
        return self.options.method or defaults.default_method(model.n_parameters)

    def _check_output(self, model: Model, checkpoint: Checkpoint) -> None:
        """The folder's name must do; where all weights are trained, so must the disk.

        Raises:
            OutputError: the folder is the model itself, holds other things, or the disk is small.
        """
        if self._method(model) == "full":
            hf.check_outputs(checkpoint, self.folder, self.writing.overwrite)
            check_free_space(self.folder, _N_KEPT * _STATE_BYTES * model.n_parameters)
        elif self.folder.resolve() == model.source.folder.resolve():
            raise OutputError(f"{self.folder} is the model itself; choose another folder with -o.")


def _identity(
    model: Model, data: TuningData, form: TrainingFormat, settings: TuneSettings
) -> dict[str, Any]:
    weights = []
    with suppress(OSError):
        weights = [
            (p.name, p.stat().st_size, p.stat().st_mtime_ns)
            for p in sorted(model.source.folder.glob("*.safetensors"))
        ]
    said = json.dumps([form.template, form.end, form.system, dict(form.special_tokens)])
    return {
        "version": __version__,
        "model": [dict(model.config.raw), weights],
        "data": data.digest,
        "chat format": hashlib.sha256(said.encode()).hexdigest(),
        "choice of settings": asdict(settings),
    }
