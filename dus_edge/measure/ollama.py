"""Speed of a model in a running Ollama, by the timings of its own API.

``POST /api/generate`` ends with ``prompt_eval_count``, ``prompt_eval_duration``, ``eval_count``,
``eval_duration`` and ``load_duration``, durations in nanoseconds (docs/api.md of Ollama). Its
runner keeps the last prompts: tokens that a prompt shares with one of them are counted but not
computed, so each prompt here starts with a different word. Ollama takes text, not tokens: a
prompt's words are corrected by what Ollama counts of them until it is as long as was asked for,
and what is reported is Ollama's count.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dus_edge.errors import DusEdgeError, UsageError
from dus_edge.measure.measurement import About, Measurement
from dus_edge.measure.ollama_server import OllamaServer, count_of, fields_of, host_url, short_text
from dus_edge.measure.prompts import SAMPLE_TOKENS, Prompts, Timings, near
from dus_edge.measure.resources import MeasuredMemory
from dus_edge.measure.timing import now
from dus_edge.measure.workload import BenchSettings, Workload, check_test_context
from dus_edge.progress import Advance

#: Room for a prompt that comes out longer than was asked for.
_SPARE = 64


def measure_ollama(
    name: str,
    settings: BenchSettings,
    advance: Advance = lambda n: None,
    *,
    warn: Callable[[str], None] = lambda line: None,
    url: str | None = None,
    seed: int | None = None,
) -> list[Measurement]:
    """All tests of a model in Ollama.

    Prompt processing at a depth is left out: what Ollama keeps of a prompt it neither promises
    nor reports. Generation at a depth follows a prompt of that length. `n_prompt`, `n_gen` and
    `n_depth` of the results are what Ollama counted, the median of the repetitions: as asked for
    within 1 %, else `warn` is told.

    Args:
        name: as ``ollama list`` has it.
        settings: sizes, repetitions, `n_threads` (None leaves it to Ollama) and `n_gpu_layers`
            (-1 leaves it to Ollama).
        advance: told of each repetition.
        warn: told, in a sentence, of what was measured otherwise than asked for, and of tests
            that the context does not hold.
        url: of the server; None for that of ``OLLAMA_HOST``.
        seed: of the prompts' words; None for new ones every time, as Ollama's cache needs.

    Raises:
        UsageError: no model of that name, tests longer than its context, or nothing to measure.
        DusEdgeError: Ollama does not run or cannot run the model.
    """
    server = OllamaServer(url or host_url(os.environ.get("OLLAMA_HOST")), name)
    version = short_text(server.get("/api/version").get("version", "?"))
    shown = server.post("/api/show", {"model": name})
    facts = fields_of(shown.get("model_info"))
    architecture = str(facts.get("general.architecture", ""))
    limit = count_of(facts.get(f"{architecture}.context_length"))
    check_test_context(name, limit, settings)
    tests = [t for t in settings.tests() if not (t.n_prompt and t.n_depth)]
    if not tests:
        raise UsageError("prompts at a depth are not measured through Ollama; give -n as well.")
    options = _options(settings, limit)
    was_loaded = server.running() is not None
    ask = functools.partial(_ask, server, options)
    prompts = Prompts(ask, options["num_ctx"], seed)
    load_s = None if was_loaded else prompts.load_ns / 1e9
    context = count_of((server.running() or {}).get("context_length")) or options["num_ctx"]

    found = []
    for test in tests:
        samples = prompts.measure(test, settings.repetitions, context, advance)
        _warn_of(test, samples, context, warn)
        about = _about(name, version, shown, server.running(), settings)
        found.append(_measurement(about, test, samples, load_s, server.memory()))
    return found


def _ask(server: OllamaServer, options: dict[str, Any], prompt: str, n_gen: int) -> Timings:
    return server.generate(prompt, options | {"num_predict": n_gen})


def _warn_of(
    test: Workload, samples: list[Timings], context: int, warn: Callable[[str], None]
) -> None:
    """Say what was measured otherwise than asked for."""
    wanted = test.n_prompt or test.n_depth
    counted = _median([s.prompt_tokens for s in samples])
    n_gen = test.n_gen or 1
    longest = max(wanted, counted)
    if longest + n_gen > context:
        warn(
            f"{test.name}: a prompt of {longest} tokens and {n_gen} generated are more than the "
            f"context of {context}; Ollama cuts the prompt or what is before."
        )
    if wanted and not near(counted, wanted):
        warn(f"{test.name}: Ollama counts {counted} tokens where {wanted} were asked for.")


def _measurement(
    about: About,
    test: Workload,
    samples: list[Timings],
    load_s: float | None,
    memory: MeasuredMemory | None,
) -> Measurement:
    prompt = _median([s.prompt_tokens for s in samples])
    if test.n_gen:
        counted = [(s.tokens, s.ns) for s in samples]
        test = Workload(0, _median([s.tokens for s in samples]), prompt if test.n_depth else 0)
    else:
        counted = [(s.prompt_tokens, s.prompt_ns) for s in samples]
        test = Workload(prompt, 0)
    if any(n < 1 or ns < 1 for n, ns in counted):
        raise DusEdgeError(
            f"Ollama's answers for {about.model_filename} have no {test.name} timings "
            "(the model ended at once, or the server is no Ollama); take another model or update "
            "Ollama."
        )
    return Measurement(
        about=about,
        test=test,
        samples_ns=tuple(ns for _, ns in counted),
        samples_tokens=tuple(n for n, _ in counted),
        time=now(),
        load_s=load_s,
        time_to_first_token_s=(
            sum(s.first_s for s in samples) / len(samples) if test.n_prompt else None
        ),
        memory=memory,
    )


def _options(settings: BenchSettings, limit: int) -> dict[str, Any]:
    """Ollama's names of the settings (api/types.go, Options)."""
    # One context for all requests: another one would load the model anew.
    n_ctx = max(SAMPLE_TOKENS, *(test.n_ctx for test in settings.tests())) + _SPARE
    options: dict[str, Any] = {
        "num_ctx": min(n_ctx, limit) if limit else n_ctx,
        "num_batch": settings.n_ubatch,
        "temperature": 1.0,
    }
    if settings.n_threads is not None:
        options["num_thread"] = settings.n_threads
    if settings.n_gpu_layers >= 0:
        options["num_gpu"] = settings.n_gpu_layers
    return options


def _about(
    name: str,
    version: object,
    shown: dict[str, Any],
    running: dict[str, Any] | None,
    settings: BenchSettings,
) -> About:
    details = fields_of(shown.get("details"))
    facts = fields_of(shown.get("model_info"))
    parts = (details.get(k) for k in ("family", "parameter_size", "quantization_level"))
    about = About(
        engine=f"ollama {version}",
        build_commit=None,
        cpu_info=None,
        gpu_info=None,
        backends=None,
        model_filename=name,
        model_type=" ".join(short_text(p) for p in parts if p),
        model_size=None,
        model_n_params=count_of(facts.get("general.parameter_count")) or None,
        n_ubatch=settings.n_ubatch,
        n_threads=settings.n_threads,
    )
    if running is None:
        return about
    on_gpu = count_of(running.get("size_vram"))
    return replace(about, backends=_placement(on_gpu, count_of(running.get("size"))))


def _placement(vram: int, size: int) -> str:
    """As ``ollama ps`` has it: ``CPU``, ``GPU`` or ``52% GPU``."""
    if not vram:
        return "CPU"
    return "GPU" if vram >= size else f"{100 * vram / size:.0f}% GPU"


def _median(values: list[int]) -> int:
    return sorted(values)[len(values) // 2]
