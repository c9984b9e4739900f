"""The job `bench all`: a base's usual files made, measured and compared, into the tables."""

from __future__ import annotations

import contextlib
import multiprocessing
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dus_edge.checkpoint.builtin import model_dir
from dus_edge.checkpoint.gguf.source import refuse_gguf
from dus_edge.errors import DusEdgeError
from dus_edge.files import check_absent, check_writable
from dus_edge.jobs.export.calibration import Machine, TextChoice
from dus_edge.jobs.export.gguf import GGUFJob
from dus_edge.jobs.export.gptq import GPTQJob
from dus_edge.jobs.job import Writing, quiet, run_job
from dus_edge.measure import record
from dus_edge.measure.bench import bench_run
from dus_edge.measure.workload import BenchSettings, check_test_context
from dus_edge.quality import report as quality_report
from dus_edge.quality.compare import quality
from dus_edge.quant import choose as quantizers
from dus_edge.quant.gptq_format import GPTQSettings
from dus_edge.quant.recipe import find_preset
from dus_edge.run.llama import llama_library
from dus_edge.tables import page
from dus_edge.train.pico.corpus import write_heldout
from dus_edge.upscale.model import ChoosePlan, Model, Say, describe, find_model
from dus_edge.upscale.plan import DepthPlan

#: What is made of every base; the first is the reference of quality.
PRESETS_MEASURED = ("f16", "q8_0", "q4_k_m", "q4_0")
#: Chunks of text that quality is measured on, the default of `dus-edge quality`.
QUALITY_CHUNKS = 48


@dataclass(frozen=True)
class Benchmarked:
    """What `bench_all` wrote.

    Attributes:
        models: the files and the folder that were measured, the reference first.
        measured: speed and memory, lines added.
        quality: divergence from the reference.
        tables: the pages made of both.
    """

    models: tuple[Path, ...]
    measured: Path
    quality: Path
    tables: tuple[Path, ...]


@dataclass(frozen=True)
class _Order:
    """What is asked for; it pickles."""

    base: str
    folder: Path
    presets: tuple[str, ...]
    gptq: GPTQSettings | None
    text: TextChoice
    writing: Writing


@dataclass(frozen=True)
class _Jobs:
    """What is made, and under which names it is measured."""

    gguf: GGUFJob
    gptq: GPTQJob | None
    models: tuple[Path, ...]


def bench_all(
    base: str,
    choose: ChoosePlan,
    folder: Path,
    results: Path,
    *,
    gptq: GPTQSettings | None,
    text: TextChoice,
    overwrite: bool = False,
    presets: Sequence[str] = PRESETS_MEASURED,
    settings: BenchSettings | None = None,
    n_chunks: int = QUALITY_CHUNKS,
    say: Say = quiet,
) -> Benchmarked:
    """Make a base's usual files, measure each, compare them with the first, and write the tables.

    Args:
        base: folder, hub id or the built-in base's name.
        choose: gives the plan for a base's depth.
        folder: where the models go: GGUF files, and a GPTQ folder.
        results: folder of ``measured.jsonl``, which lines are added to, and ``quality.json``;
            the tables go into the folder that holds it.
        gptq: how the GPTQ folder is made; None for none.
        text: that GPTQ is calibrated on.
        overwrite: replace models, ``quality.json`` and tables that exist.
        presets: of the GGUF files; the first is the reference of quality.
        settings: how speed is measured; None for llama-bench's own.
        n_chunks: of text, that quality is measured on at most.
        say: takes lines for the user.

    Raises:
        DusEdgeError: something cannot be used, of the kind that the step in question raises; the
            message names the step. What earlier steps finished stays.
    """
    order = _Order(base, folder, tuple(presets), gptq, text, Writing(overwrite=overwrite))
    jobs = _jobs(order)
    measured, compared = results / "measured.jsonl", results / "quality.json"
    settings = settings or BenchSettings()
    model = _check(base, choose, jobs, settings, results, overwrite, say)
    say(describe(model))
    steps = _Steps(len(jobs.models) + 3 + (jobs.gptq is not None), say)
    # Each in a process of its own, so that none finds another's memory.
    with steps.step(f"Making {', '.join(presets)}"):
        in_its_own_process(_make_gguf, order, model.plan)
    if jobs.gptq is not None:
        with steps.step(f"Making {jobs.gptq.folder.name}"):
            in_its_own_process(_make_gptq, order, model.plan)
    for path in jobs.models:
        with steps.step(f"Measuring {path.name}"):
            record.append_record(measured, in_its_own_process(bench_run, [path], settings))
    with steps.step(f"Comparing with {presets[0]}"):
        work = folder / "quality"
        first, *others = map(str, jobs.models)
        found = quality(first, others, texts=_texts(model, folder), n_chunks=n_chunks, work=work)
        quality_report.write(found, work, plots=False, overwrite=True)
        shutil.copyfile(work / "quality.json", compared)
    with steps.step("Writing the tables"):
        tables = page.write_bench_tables(
            results.parent, overwrite=overwrite, measured=[measured], quality=[compared]
        )
    return Benchmarked(jobs.models, measured, compared, tuple(tables))


def in_its_own_process(work: Callable[..., Any], *args: Any) -> Any:
    """What `work` returns, or raises of our errors, in a fresh process; all must pickle.

    Raises:
        DusEdgeError: the process ended without an answer.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, work, args))
    process.start()
    theirs.close()
    try:
        value, error = ours.recv()
    except EOFError:
        process.join()
        raise DusEdgeError(
            f"The process ended with {process.exitcode}, most often for want of memory."
        ) from None
    finally:
        process.terminate()  # where this one was interrupted; else it has answered
        process.join()
        ours.close()
    if error is not None:
        raise error
    return value


def _answer(pipe: Any, work: Callable[..., Any], args: Sequence[Any]) -> None:
    # An interruption is the parent's, which passes it on: half-written files go, as ever.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        try:
            answer = (work(*args), None)
        except DusEdgeError as e:
            answer = (None, e)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        pipe.send(answer)


def _interrupted(signum: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: the way out is not interrupted
    raise KeyboardInterrupt


def _make_gguf(order: _Order, plan: DepthPlan) -> None:
    # The jobs are made here: types of quantization are told apart by identity.
    run_job(_jobs(order).gguf, order.base, lambda n: plan, quiet)


def _make_gptq(order: _Order, plan: DepthPlan) -> None:
    job = _jobs(order).gptq
    assert job is not None
    run_job(job, order.base, lambda n: plan, quiet)


def _need_llama() -> None:
    llama_library()


class _Steps:
    """Says which step begins, and which one failed."""

    def __init__(self, n: int, say: Say) -> None:
        self._n, self._say, self._i = n, say, 0

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        self._i += 1
        self._say(f"{self._i}/{self._n} {title}")
        try:
            yield
        except DusEdgeError as e:
            raise type(e)(f"{title}: {e}") from e


def _jobs(order: _Order) -> _Jobs:
    """The models' names do not depend on the base's size; a hub id's revision is part of them."""
    base, folder = order.base, order.folder
    name = f"{Path(base).resolve().name if Path(base).is_dir() else Path(base).name}-DUS"
    name = name.replace("@", "-")
    presets = tuple(find_preset(preset) for preset in order.presets)
    made = GGUFJob(presets, folder, quantizers.DEFAULT, None, name, order.writing)
    models = [folder / f"{name}-{preset.name}.gguf" for preset in presets]
    if order.gptq is None:
        return _Jobs(made, None, tuple(models))
    path = folder / f"{name}-gptq-int{order.gptq.bits}"
    gptq = GPTQJob(path, order.gptq, order.text, Machine(), order.writing)
    return _Jobs(made, gptq, (*models, path))


def _check(
    base: str,
    choose: ChoosePlan,
    jobs: _Jobs,
    settings: BenchSettings,
    results: Path,
    overwrite: bool,
    say: Say,
) -> Model:
    """Refuse what can be refused of all steps, before the first."""
    refuse_gguf(base, "A table of what quantizing costs")
    in_its_own_process(_need_llama)
    everything = [job for job in (jobs.gguf, jobs.gptq) if job is not None]
    for job in everything:
        job.need(say)
    tables = ("TABLES.md", "tables.csv", "tables.json", page.PAGE_FILE)
    check_absent([results / "quality.json", *(results.parent / name for name in tables)], overwrite)
    record.check_record(results / "measured.jsonl")
    check_writable(results.parent)
    model = find_model(base, choose, weights=True, say=say, early=jobs.gguf.early)
    check_test_context(model.source.label, model.config.context_length, settings)
    checkpoint = model.open()
    for job in everything:
        job.check(model, checkpoint)
    return model


def _texts(model: Model, folder: Path) -> list[Path]:
    """pico is judged on the kind of text that it knows, others on the built-in evaluation text."""
    if model.source.folder != model_dir():
        return []
    write_heldout(folder / "heldout")
    return [folder / "heldout"]
