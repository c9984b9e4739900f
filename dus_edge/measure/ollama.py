"""Speed of a model in a running Ollama, by the timings of its own API.

``POST /api/generate`` ends with ``prompt_eval_count``, ``prompt_eval_duration``, ``eval_count``,
``eval_duration`` and ``load_duration``, durations in nanoseconds (docs/api.md of Ollama). Its
runner keeps the last prompts: tokens that a prompt shares with one of them are counted but not
computed, so each prompt here starts with a different word. Ollama takes text, not tokens: a
prompt's words are corrected by what Ollama counts of them until it is as long as was asked for,
and what is reported is Ollama's count.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from dus_edge.errors import DusEdgeError, UsageError
from dus_edge.measure.measurement import About, Measurement
from dus_edge.measure.prompts import SAMPLE_TOKENS, Prompts, Timings, near
from dus_edge.measure.resources import MeasuredMemory
from dus_edge.measure.timing import now
from dus_edge.measure.workload import BenchSettings, Workload, check_test_context
from dus_edge.progress import Advance

_DEFAULT_PORT = 11434
#: Loading a large model from a slow disk takes minutes.
_TIMEOUT_S = 900.0
#: Room for a prompt that comes out longer than was asked for.
_SPARE = 64


def host_url(setting: str | None) -> str:
    """The address that Ollama's own client makes of ``OLLAMA_HOST`` (envconfig/config.go).

    Without a scheme it is http at port 11434; 0.0.0.0, where a server listens, is loopback.
    """
    text = (setting or "").strip().strip("'\"") or "127.0.0.1"
    scheme, found, rest = text.partition("://")
    if not found:
        scheme, rest = "http", text
    try:
        parts = urlsplit(f"{scheme}://{rest}")
        host = parts.hostname or "127.0.0.1"
        default = {"http": 80, "https": 443}[scheme] if found else _DEFAULT_PORT
        port = parts.port or default
    except (ValueError, KeyError):
        raise UsageError(f"OLLAMA_HOST is {setting!r}; it must be like 127.0.0.1:11434.") from None
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{parts.path.rstrip('/')}"


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
    server = _Server(url or host_url(os.environ.get("OLLAMA_HOST")), name)
    version = server.get("/api/version").get("version", "?")
    shown = server.post("/api/show", {"model": name})
    facts = shown.get("model_info") or {}
    architecture = str(facts.get("general.architecture", ""))
    limit = _integer(facts.get(f"{architecture}.context_length"))
    check_test_context(name, limit, settings)
    tests = [t for t in settings.tests() if not (t.n_prompt and t.n_depth)]
    if not tests:
        raise UsageError("prompts at a depth are not measured through Ollama; give -n as well.")
    options = _options(settings, limit)
    was_loaded = server.running() is not None
    ask = functools.partial(_ask, server, options)
    prompts = Prompts(ask, options["num_ctx"], seed)
    load_s = None if was_loaded else prompts.load_ns / 1e9
    context = _integer((server.running() or {}).get("context_length")) or options["num_ctx"]

    found = []
    for test in tests:
        samples = prompts.measure(test, settings.repetitions, context, advance)
        _warn_of(test, samples, context, warn)
        about = _about(name, version, shown, server.running(), settings)
        found.append(_measurement(about, test, samples, load_s, server.memory()))
    return found


def _ask(server: _Server, options: dict[str, Any], prompt: str, n_gen: int) -> Timings:
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


class _Server:
    """Ollama's API for one model, its errors as sentences."""

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name = url, name

    def get(self, path: str) -> dict[str, Any]:
        with self._request(path, None) as response:
            return self._checked(json.loads(response.read()))

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with self._request(path, body) as response:
            return self._checked(json.loads(response.read()))

    def generate(self, prompt: str, options: dict[str, Any]) -> Timings:
        body = {
            "model": self.name,
            "prompt": prompt,
            "raw": True,
            "stream": True,
            "options": options,
        }
        start = time.perf_counter()
        first_s, last = 0.0, {}
        with self._request("/api/generate", body) as response:
            for line in filter(bytes.strip, response):
                last = self._checked(json.loads(line))
                first_s = first_s or time.perf_counter() - start
        if not last.get("done"):
            raise DusEdgeError(f"Ollama at {self.url} broke off its answer; see its log.")
        return Timings(
            prompt_tokens=_integer(last.get("prompt_eval_count")),
            prompt_ns=_integer(last.get("prompt_eval_duration")),
            tokens=_integer(last.get("eval_count")),
            ns=_integer(last.get("eval_duration")),
            load_ns=_integer(last.get("load_duration")),
            first_s=first_s,
        )

    def running(self) -> dict[str, Any] | None:
        """What ``/api/ps`` says of the model; None while it is not loaded."""
        wanted = self.name if ":" in self.name.rpartition("/")[2] else f"{self.name}:latest"
        for model in self.get("/api/ps").get("models") or []:
            if wanted.lower() in (str(model.get(k, "")).lower() for k in ("name", "model")):
                return model
        return None

    def memory(self) -> MeasuredMemory | None:
        """Ollama's own account: of the GPU if the model is there, else of the machine."""
        model = self.running()
        if model is None:
            return None
        if vram := _integer(model.get("size_vram")):
            return MeasuredMemory(0, vram, "ollama-vram")
        return MeasuredMemory(0, _integer(model.get("size")), "ollama")

    @contextlib.contextmanager
    def _request(self, path: str, body: dict[str, Any] | None) -> Iterator[Any]:
        """An open answer; what goes wrong with it in the block too is told as a sentence."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
                yield response
        except urllib.error.HTTPError as e:
            raise self._refused(e) from None
        except TimeoutError:
            raise DusEdgeError(
                f"Ollama at {self.url} says nothing for {_TIMEOUT_S:.0f} s; see its log."
            ) from None
        except (ConnectionError, http.client.HTTPException) as e:  # while it answered
            raise DusEdgeError(f"Ollama at {self.url} broke off ({e}); see its log.") from None
        except urllib.error.URLError as e:
            raise DusEdgeError(
                f"Ollama does not answer at {self.url} ({_reason(e)}); start it with "
                "`ollama serve`, or set OLLAMA_HOST."
            ) from None
        except (OSError, ValueError) as e:
            raise DusEdgeError(
                f"{self.url} does not answer as Ollama does ({e}); set OLLAMA_HOST."
            ) from None

    def _checked(self, answer: Any) -> dict[str, Any]:
        if not isinstance(answer, dict):
            raise ValueError("no JSON object")
        if "error" in answer:
            raise DusEdgeError(f"Ollama cannot run {self.name} ({answer['error']}).")
        return answer

    def _refused(self, e: urllib.error.HTTPError) -> DusEdgeError:
        try:
            said = str(json.loads(e.read())["error"])
        except (ValueError, KeyError, TypeError, OSError):
            return DusEdgeError(
                f"{self.url} does not answer as Ollama does (status {e.code}); set OLLAMA_HOST."
            )
        if e.code == 404:
            return UsageError(
                f"Ollama has no model {self.name}; `ollama list` shows those it has, "
                "`ollama create` and `ollama pull` add one."
            )
        return DusEdgeError(f"Ollama cannot run {self.name} ({said}).")


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
    details = shown.get("details") or {}
    facts = shown.get("model_info") or {}
    parts = (details.get(k) for k in ("family", "parameter_size", "quantization_level"))
    about = About(
        engine=f"ollama {version}",
        build_commit=None,
        cpu_info=None,
        gpu_info=None,
        backends=None,
        model_filename=name,
        model_type=" ".join(str(p) for p in parts if p),
        model_size=None,
        model_n_params=_integer(facts.get("general.parameter_count")) or None,
        n_ubatch=settings.n_ubatch,
        n_threads=settings.n_threads,
    )
    if running is None:
        return about
    on_gpu = _integer(running.get("size_vram"))
    return replace(about, backends=_placement(on_gpu, _integer(running.get("size"))))


def _placement(vram: int, size: int) -> str:
    """As ``ollama ps`` has it: ``CPU``, ``GPU`` or ``52% GPU``."""
    if not vram:
        return "CPU"
    return "GPU" if vram >= size else f"{100 * vram / size:.0f}% GPU"


def _integer(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _median(values: list[int]) -> int:
    return sorted(values)[len(values) // 2]


def _reason(e: urllib.error.URLError) -> str:
    return getattr(e.reason, "strerror", None) or str(e.reason)
