"""Measuring through Ollama's API, against a server that answers as Ollama does."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dus_edge.errors import DusEdgeError, UsageError
from dus_edge.measure.measurement import json_lines, measurement_json
from dus_edge.measure.ollama import host_url, measure_ollama
from dus_edge.measure.speed_table import speed_table
from dus_edge.measure.workload import BenchSettings

NAME = "solar-dus:latest"
PROMPT_NS, GEN_NS, LOAD_NS = 2_000_000, 50_000_000, 3_210_000_000
SIZE, VRAM = 7_500_000_000, 3_900_000_000
#: The stand-in's tokenizer: three tokens a word and a start token.
PER_WORD, START = 3, 1


class Ollama(ThreadingHTTPServer):
    """Keeps what it was asked; loads the model with the first prompt, as Ollama does."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.loaded = False
        self.vram = VRAM
        self.broken: str | None = None
        self.gives = 10**9  # tokens after which the model ends
        self.tokens = lambda word: PER_WORD
        self.limit = SHOWN["model_info"]["llama.context_length"]
        self.context = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Ollama

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        model = {"name": NAME, "model": NAME, "size": SIZE, "size_vram": self.server.vram}
        model["context_length"] = self.server.context
        answers = {
            "/api/version": {"version": "0.15.2"},
            "/api/ps": {"models": [model] if self.server.loaded else []},
        }
        self.reply(200, answers[self.path])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["model"] not in (NAME, NAME.partition(":")[0]):
            self.reply(404, {"error": f"model '{body['model']}' not found"})
        elif self.path == "/api/show":
            facts = SHOWN["model_info"] | {"llama.context_length": self.server.limit}
            self.reply(200, SHOWN | {"model_info": facts})
        elif self.server.broken == "status":
            self.reply(500, {"error": "model requires more system memory (9.1 GiB)"})
        else:
            self.generate(body)

    def generate(self, body: dict[str, Any]) -> None:
        server = self.server
        server.asked.append(body)
        server.context = min(body["options"]["num_ctx"], server.limit)
        n_prompt = sum(map(server.tokens, body["prompt"].split())) + START
        if n_prompt >= server.context:  # half of it is dropped, as llama.cpp's server does
            n_prompt -= (
                (n_prompt - server.context // 2) // (server.context // 2) * (server.context // 2)
            )
        n = min(body["options"]["num_predict"], server.gives)
        load, server.loaded = (0 if server.loaded else LOAD_NS), True
        last = {
            "model": body["model"],
            "done": True,
            "done_reason": "length",
            "load_duration": load + 40_000,
            "prompt_eval_count": n_prompt,
            "prompt_eval_duration": PROMPT_NS * n_prompt,
            "eval_count": n,
            "eval_duration": GEN_NS * n,
        }
        lines = [{"model": body["model"], "response": "x", "done": False}] * min(n, 3)
        if server.broken == "midway":
            last = {"error": "an error was encountered while running the model"}
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in [*lines, last][: 1 if server.broken == "short" else None]:
            data = json.dumps(line).encode() + b"\n"
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        if server.broken == "cut":
            self.wfile.write(b"40\r\nabc")
            self.close_connection = True
            return
        self.wfile.write(b"0\r\n\r\n")

    def reply(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


SHOWN = {
    "details": {"family": "llama", "parameter_size": "10.7B", "quantization_level": "Q4_K_M"},
    "model_info": {
        "general.architecture": "llama",
        "general.parameter_count": 10_731_524_096,
        "llama.context_length": 4096,
    },
}


@pytest.fixture
def ollama() -> Iterator[Ollama]:
    server = Ollama()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def run(ollama: Ollama, name: str = NAME, **settings: Any) -> list[Any]:
    return measure_ollama(name, BenchSettings(**({"repetitions": 3} | settings)), url=ollama.url)


def test_rates_are_ollamas_counts_over_its_durations(ollama):
    prompt, generation = run(ollama)
    line = measurement_json(prompt)
    assert line["avg_ts"] == pytest.approx(1e9 / PROMPT_NS)
    assert line["n_prompt"] == pytest.approx(512, abs=PER_WORD)
    assert line["samples_ns"] == [PROMPT_NS * line["n_prompt"]] * 3
    line = measurement_json(generation)
    assert line["avg_ts"] == pytest.approx(1e9 / GEN_NS)
    assert (line["n_prompt"], line["n_gen"], line["n_depth"]) == (0, 128, 0)
    assert line["engine"] == "ollama 0.15.2"
    assert line["model_type"] == "llama 10.7B Q4_K_M"
    assert line["model_n_params"] == 10_731_524_096
    assert (line["peak_memory_bytes"], line["memory_source"]) == (VRAM, "ollama-vram")
    assert line["backends"] == "52% GPU"
    assert all(len(row) <= 80 for row in speed_table([prompt, generation]).splitlines())
    assert len(json_lines([prompt, generation]).splitlines()) == 2


def test_prompts_are_raw_and_begin_differently(ollama):
    run(ollama, n_threads=3, n_gpu_layers=7)
    prompts = [body["prompt"] for body in ollama.asked]
    assert len({prompt.split()[0] for prompt in prompts}) == len(prompts) == 2 + 1 + 3 + 3
    assert all(body["raw"] is True for body in ollama.asked)
    # One context for all of them: Ollama loads a model anew for another one.
    contexts = {body["options"]["num_ctx"] for body in ollama.asked}
    assert len(contexts) == 1 and contexts.pop() >= 512 + PER_WORD
    options = ollama.asked[-1]["options"]
    assert (options["num_predict"], options["num_thread"], options["num_gpu"]) == (128, 3, 7)


def test_loading_is_timed_only_where_it_happened(ollama):
    first = run(ollama, n_prompt=0)
    again = run(ollama, n_prompt=0)
    assert first[0].load_s == pytest.approx(LOAD_NS / 1e9, rel=1e-3)
    assert again[0].load_s is None


def test_generation_at_a_depth_follows_a_prompt_of_that_length(ollama):
    *_, deep = run(ollama, depths=(0, 1000), n_gen=16)
    assert deep.test.n_depth == pytest.approx(1000, abs=PER_WORD)
    assert deep.test.name == f"tg16 @ d{deep.test.n_depth}"
    with pytest.raises(UsageError, match="give -n"):
        run(ollama, depths=(1000,), n_gen=0)


def of_letters(word: str) -> int:
    """Tokens of a word as tokenizers have them: more or fewer by the word, digits each alone."""
    return sum(c.isdigit() for c in word) + -(-sum(c.isalpha() for c in word) // 4)


@pytest.mark.parametrize("n_prompt", [16, 32, 200, 512])
def test_prompts_are_as_long_as_asked_for_by_ollamas_count(ollama, n_prompt):
    ollama.tokens = of_letters
    warned: list[str] = []
    settings = BenchSettings(n_prompt=n_prompt, n_gen=16, depths=(0, 300), repetitions=3)
    found = measure_ollama(NAME, settings, url=ollama.url, warn=warned.append, seed=5)
    prompt, _, deep = found
    assert prompt.test.n_prompt == pytest.approx(n_prompt, rel=0.01)
    assert deep.test.n_depth == pytest.approx(300, rel=0.01)
    assert not warned


def test_a_length_that_cannot_be_had_is_told_with_what_was_measured(ollama):
    warned: list[str] = []
    settings = BenchSettings(n_prompt=32, n_gen=0, repetitions=1)
    (prompt,) = measure_ollama(NAME, settings, url=ollama.url, warn=warned.append)
    counted = prompt.test.n_prompt
    assert counted in (31, 34)  # three tokens a word and a start
    assert warned == [f"pp32: Ollama counts {counted} tokens where 32 were asked for."]


def test_a_test_that_the_context_does_not_hold_is_told(ollama):
    ollama.tokens, ollama.limit = of_letters, 512
    warned: list[str] = []
    settings = BenchSettings(n_prompt=512, n_gen=0, repetitions=1)
    (prompt,) = measure_ollama(NAME, settings, url=ollama.url, warn=warned.append, seed=1)
    assert "more than the context of 512" in warned[0]
    assert prompt.test.n_prompt == 512 or f"counts {prompt.test.n_prompt} tokens" in warned[1]
    # A shorter one is measured as it is: the samples before it fit the context.
    settings = BenchSettings(n_prompt=256, n_gen=0, repetitions=1)
    (prompt,) = measure_ollama(NAME, settings, url=ollama.url, warn=warned.append, seed=1)
    assert prompt.test.n_prompt == pytest.approx(256, rel=0.01)


def test_an_answer_that_ends_early_counts_as_long_as_it_is(ollama):
    ollama.gives = 5
    (generation,) = run(ollama, n_prompt=0)
    assert generation.test.n_gen == 5
    assert measurement_json(generation)["avg_ts"] == pytest.approx(1e9 / GEN_NS)
    ollama.gives = 0
    with pytest.raises(DusEdgeError, match="ended at once"):
        run(ollama, n_prompt=0)


def test_a_model_on_the_cpu(ollama):
    ollama.vram = 0
    line = measurement_json(run(ollama, n_prompt=0)[0])
    assert (line["peak_memory_bytes"], line["memory_source"]) == (SIZE, "ollama")
    assert line["backends"] == "CPU"


def test_a_name_without_its_tag_is_the_same_model(ollama):
    assert run(ollama, "solar-dus", n_prompt=0)[0].memory.peak_bytes == VRAM


def test_ollama_that_does_not_run_is_told_with_its_command():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}"
        with pytest.raises(DusEdgeError, match="`ollama serve`") as e:
            measure_ollama(NAME, BenchSettings(), url=url)
    assert url in str(e.value)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("status", "more system memory"),
        ("midway", "an error was encountered"),
        ("short", "broke off"),
        ("cut", "broke off"),
    ],
)
def test_what_ollama_refuses_is_one_sentence(ollama, broken, said):
    ollama.broken = broken
    with pytest.raises(DusEdgeError, match=said) as e:
        run(ollama)
    assert "\n" not in str(e.value)


def test_a_model_that_is_not_there_and_a_context_that_is_too_long(ollama):
    with pytest.raises(UsageError, match=r"no model mistral.*ollama list"):
        run(ollama, "mistral")
    with pytest.raises(UsageError, match=r"context of 4224 tokens.*ends at 4096"):
        run(ollama, depths=(0, 4096), n_prompt=64)
    assert not ollama.asked


def test_a_server_that_is_no_ollama_is_told():
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"<html")

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(DusEdgeError, match="does not answer as Ollama does"):
            measure_ollama(NAME, BenchSettings(), url=f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("setting", "url"),
    # The cases of envconfig/config_test.go of Ollama that are addresses of clients.
    [
        (None, "http://127.0.0.1:11434"),
        ("", "http://127.0.0.1:11434"),
        ("1.2.3.4", "http://1.2.3.4:11434"),
        (":1234", "http://127.0.0.1:1234"),
        ("1.2.3.4:1234", "http://1.2.3.4:1234"),
        ("http://1.2.3.4", "http://1.2.3.4:80"),
        ("https://1.2.3.4", "https://1.2.3.4:443"),
        ("https://1.2.3.4:1234", "https://1.2.3.4:1234"),
        ("example.com/ollama/", "http://example.com:11434/ollama"),
        ("[::1]", "http://[::1]:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ('"1.2.3.4"', "http://1.2.3.4:11434"),
    ],
)
def test_the_address_is_read_as_ollama_reads_it(setting, url):
    assert host_url(setting) == url


@given(st.text(max_size=30))
def test_any_setting_is_an_address_or_refused(text):
    try:
        assert host_url(text).startswith("http")
    except UsageError as e:
        assert "OLLAMA_HOST" in str(e)
