"""`dus-edge serve`: OpenAI's own client against both servers, with only the URL changed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import llama_cpp
import openai
import pytest
import torch
from starlette.exceptions import HTTPException

from dus_edge.chat.engine import Sampling
from dus_edge.chat.folder import FolderEngine
from dus_edge.chat.open import open_chat
from dus_edge.chat.serve.call import CURRENT, Call
from dus_edge.chat.serve.folder import _make_attentive as attend
from dus_edge.chat.serve.gguf import gguf_app
from dus_edge.chat.serve.guard import LOOPBACK, Access, Guard
from dus_edge.chat.serve.guard import _with_usage as with_usage
from dus_edge.chat.serve.request import CHAT, COMPLETION, ApiError, Served
from dus_edge.chat.serve.request import prepare_request as prepare
from dus_edge.chat.serve.run import Serving, introduction
from dus_edge.chat.session import Conversation
from dus_edge.chat.template import ChatTemplate
from dus_edge.errors import DependencyError
from dus_edge.run.open import inspect_source

from .cases import ONE_THREAD, check_each
from .chat_models import SOLAR_TEMPLATE, STRICT_TEMPLATE, chat_folder, chat_gguf, ending_in

KEY = "a key of many words"
N_CTX = 256
QUESTION = [{"role": "user", "content": "def add(a, b):"}]
CLI = [sys.executable, "-c", "from dus_edge.cli.main import main; main()"]


@dataclass(frozen=True)
class Running:
    """A server that runs, and the client that knows its key."""

    name: str
    url: str
    path: Path
    said: tuple[str, ...]
    client: openai.OpenAI
    process: subprocess.Popen


@contextlib.contextmanager
def running(path: Path, *options: str, **env: str) -> Iterator[Running]:
    """Serve a model on any free port."""
    words = ["serve", str(path), "--port", "0", "--ctx", str(N_CTX), "--threads", "1", *options]
    # Names that llama-cpp-python's server would read its settings from.
    traps = {"CONFIG_FILE": "/nowhere", "MODEL": "/nowhere", "CHAT_FORMAT": "alpaca", "SEED": "x"}
    process = subprocess.Popen(
        [*CLI, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **traps, **env},
    )
    try:
        said: list[str] = []
        while "Ctrl-C" not in (said[-1] if said else ""):
            line = process.stdout.readline()
            assert line, f"it ended: {said}"
            said.append(line.rstrip())
        (url,) = set(re.findall(r"http://[\w.:]+/v1", " ".join(said)))
        client = openai.OpenAI(base_url=url, api_key=env.get("DUS_EDGE_API_KEY", "none"))
        client = client.with_options(max_retries=0, timeout=120)
        yield Running(path.name, url, path, tuple(said), client, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert "Traceback" not in process.stdout.read()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("serve") / "chatty", STRICT_TEMPLATE)


@pytest.fixture(scope="module")
def servers(folder) -> Iterator[tuple[Running, Running]]:
    """One of a GGUF file, which asks for a key, and one of the folder that it was made from."""
    with (
        running(chat_gguf(folder), "--alias", "chatty.gguf", DUS_EDGE_API_KEY=KEY) as gguf,
        running(folder) as plain,
    ):
        yield gguf, plain


def ask(server: Running, **request) -> openai.types.chat.ChatCompletion:
    request = {"messages": QUESTION, "temperature": 0, "max_tokens": 12, **request}
    return server.client.chat.completions.create(model="solar", **request)


# Answers


def test_the_models_own_answer_comes_whole_and_in_pieces(servers):
    def check(server: Running) -> None:
        whole = ask(server)
        with open_chat(server.path, N_CTX, 1)[0] as engine:
            own = Conversation(engine, Sampling(0), n_most=12).ask(QUESTION[0]["content"], print)
        (choice,) = whole.choices
        assert choice.message.content == own.text
        assert choice.finish_reason == own.why
        assert whole.usage.prompt_tokens == own.n_prompt
        assert whole.usage.completion_tokens == own.ran.n_tokens == 12
        pieces, usage, reasons = [], None, []
        for chunk in ask(server, stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage or usage
            for part in chunk.choices:
                pieces.append(part.delta.content or "")
                reasons.append(part.finish_reason)
        assert len(pieces) > 6
        assert "".join(pieces) == own.text
        assert usage.total_tokens == whole.usage.total_tokens
        assert [r for r in reasons if r] == ["length"]

    check_each(check, servers)


def test_completions_add_nothing_but_the_begin_token(servers):
    def check(server: Running) -> None:
        create, prompt = server.client.completions.create, "def add(a, b):\n"
        found = create(model="x", prompt=prompt, temperature=0, max_tokens=10)
        assert found.usage.prompt_tokens == len(known.tokenize(prompt.encode()))
        assert found.choices[0].text.strip() == expected.strip()
        chunks = create(model="x", prompt=[prompt], temperature=0, max_tokens=10, stream=True)
        assert "".join(c.choices[0].text for c in chunks if c.choices) == found.choices[0].text
        assert create(model="x", prompt=prompt, temperature=0).usage.completion_tokens == 16

    known = llama_cpp.Llama(str(servers[0].path), n_ctx=N_CTX, verbose=False, **ONE_THREAD)
    expected = known.create_completion(
        "def add(a, b):\n", temperature=0, max_tokens=10, repeat_penalty=1.0
    )["choices"][0]["text"]
    check_each(check, servers)


def test_the_one_model_is_listed_and_answers_to_any_name(servers):
    def check(server: Running) -> None:
        (model,) = server.client.models.list().data
        assert model.id == ("chatty.gguf" if "gguf" in server.name else "chatty")
        assert ask(server, max_tokens=1).model == model.id

    check_each(check, servers)


def test_fields_of_newer_clients(servers):
    def check(server: Running) -> None:
        assert ask(server, max_tokens=None, max_completion_tokens=3).usage.completion_tokens == 3
        parts = [{"type": "text", "text": "def add"}, {"type": "text", "text": "(a, b):"}]
        told = ask(server, messages=[{"role": "user", "content": parts}])
        assert told.choices[0].message.content == ask(server).choices[0].message.content
        long = ask(server, max_tokens=10**6)
        assert long.usage.total_tokens <= N_CTX

    check_each(check, servers)


def test_stops_of_a_request_end_an_answer(servers):
    def check(server: Running) -> None:
        whole = ask(server, max_tokens=24).choices[0].message.content
        stop = whole[8:11]
        found = ask(server, max_tokens=24, stop=[stop]).choices[0]
        assert found.finish_reason == "stop"
        assert found.message.content.startswith(whole[: whole.index(stop)].strip())
        assert len(found.message.content) < len(whole)

    check_each(check, servers)


def test_three_at_once_are_all_answered(servers):
    def check(server: Running, stream: bool) -> None:
        prompts = [f"def f{i}(x):" for i in range(3)]

        def answer(prompt: str) -> str:
            talk = [{"role": "user", "content": prompt}]
            found = ask(server, messages=talk, stream=stream)
            if not stream:
                return found.choices[0].message.content
            return "".join(c.choices[0].delta.content or "" for c in found if c.choices)

        alone = [answer(prompt) for prompt in prompts]
        together: dict[str, str] = {}
        threads = [
            threading.Thread(target=lambda p=p: together.update({p: answer(p)})) for p in prompts
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [together.get(p) for p in prompts] == alone
        assert all(alone)

    check_each(check, servers, (False, True))


# Errors


def test_a_prompt_beyond_the_context_is_a_clear_error(servers):
    def check(server: Running, stream: bool) -> None:
        with pytest.raises(openai.BadRequestError) as refused:
            ask(server, messages=[{"role": "user", "content": "word " * 400}], stream=stream)
        assert refused.value.code == "context_length_exceeded"
        assert re.search(
            r"the prompt has \d+ tokens, and the context 256; shorten it, or start the server with "
            r"a larger --ctx\.",
            refused.value.message,
        )
        with pytest.raises(openai.BadRequestError, match="and the context 256"):
            server.client.completions.create(model="x", prompt="word " * 400, stream=stream)

    check_each(check, servers, (False, True))


def test_what_cannot_be_answered_is_told(servers):
    def check(server: Running) -> None:
        for request, said in (
            ({"messages": []}, "messages: there are none"),
            ({"messages": [{"role": "system", "content": "x"}]}, "System role not supported"),
            ({"n": 3}, "one answer"),
            ({"max_tokens": 0}, "max_tokens is 0"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
                "a part that is no text",
            ),
        ):
            with pytest.raises(openai.BadRequestError, match=re.escape(said)):
                ask(server, **request)

    check_each(check, servers)


def test_a_client_that_goes_away_holds_nobody_up(servers):
    endless = [{"role": "user", "content": "def f(x):"}]

    def check(server: Running, stream: bool) -> None:
        for _ in range(4):
            if stream:
                chunks = ask(server, messages=endless, max_tokens=200, stream=True)
                next(iter(chunks))
                chunks.close()
                continue
            with pytest.raises(openai.APITimeoutError):
                server.client.with_options(timeout=0.05).chat.completions.create(
                    model="x", messages=endless, max_tokens=200, temperature=0
                )
        assert ask(server, max_tokens=2).usage.completion_tokens == 2

    check_each(check, servers, (True, False))


def test_who_has_gone_is_computed_for_no_more(folder, servers):
    """What the servers run, in this process: it ends at the next token, or part of a prompt."""
    gguf_app(inspect_source(servers[0].path), "it", N_CTX, 1, "cpu")
    model, call = llama_cpp.server.app._llama_proxy("any"), Call()
    token = CURRENT.set(call)
    try:
        ids = model.tokenize(b"def add(a, b):\n")
        tokens = model.generate(ids, temp=0)
        first = [next(tokens) for _ in range(3)]
        call.gone.set()
        assert list(tokens) == [model.token_eos()]
        assert call.n_tokens == 3 and model.token_eos() not in first
        model.reset()
        with pytest.raises(HTTPException):
            next(model.generate(ids, temp=0))
        engine = FolderEngine(inspect_source(folder), N_CTX, 1)
        attend(engine.network)
        inputs = {"input_ids": torch.tensor([ids]), "do_sample": False, "pad_token_id": 2}
        assert engine.network.generate(**inputs, max_new_tokens=9).shape[1] == len(ids) + 1
        call.gone.clear()
        assert engine.network.generate(**inputs, max_new_tokens=9).shape[1] == len(ids) + 9
    finally:
        CURRENT.reset(token)


def test_the_guard_tells_the_server_behind_that_a_client_has_gone():
    sent, seen = [], []
    arrived = asyncio.Event()

    async def behind(scope, receive, send):
        seen.append(await receive())
        call = CURRENT.get()
        assert not call.gone.is_set()
        arrived.set()
        seen.append(await receive())
        assert call.gone.is_set()

    async def client():
        inbox = asyncio.Queue()
        body = b'{"prompt": "1234"}'
        inbox.put_nowait({"type": "http.request", "body": body[:5], "more_body": True})
        inbox.put_nowait({"type": "http.request", "body": body[5:], "more_body": False})

        async def send(message):
            sent.append(message)

        guard = Guard(behind, served(), Access(None, None))
        scope = {"type": "http", "path": COMPLETION, "method": "POST", "headers": []}
        task = asyncio.create_task(guard(scope, inbox.get, send))
        await arrived.wait()
        inbox.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(task, 10)

    asyncio.run(client())
    assert [m["type"] for m in seen] == ["http.request", "http.disconnect"]
    assert b'"max_tokens": 16' in seen[0]["body"] and not sent


def test_a_wrong_key_and_none_are_refused(servers):
    gguf = servers[0]
    for key in ("wrong", KEY + "x", "none"):
        stranger = openai.OpenAI(base_url=gguf.url, api_key=key, max_retries=0)
        for call in (
            stranger.models.list,
            lambda s=stranger: s.chat.completions.create(model="x", messages=QUESTION),
            lambda s=stranger: s.completions.create(model="x", prompt="x"),
        ):
            with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
                call()
    assert httpx2.get(f"{gguf.url}/models").status_code == 401
    assert KEY not in " ".join(gguf.said)


def test_pages_of_other_origins_and_other_names_are_refused(servers):
    def check(server: Running, headers: dict, status: int) -> None:
        headers = {"Authorization": f"Bearer {KEY}", **headers}
        found = httpx2.get(f"{server.url}/models", headers=headers)
        assert found.status_code == status
        assert "access-control-allow-origin" not in found.headers

    own = servers[1].url.removeprefix("http://").removesuffix("/v1")
    check(servers[1], {"Origin": f"http://{own}"}, 200)
    check(servers[1], {"Host": "localhost:1"}, 200)
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Host": "evil.example"},
    ):
        check_each(lambda s, h=headers: check(s, h, 403), servers)


def test_nothing_else_is_served(servers):
    def check(server: Running, path: str) -> None:
        url, key = server.url.removesuffix("/v1"), {"Authorization": f"Bearer {KEY}"}
        for method in ("GET", "POST"):
            assert httpx2.request(method, url + path, headers=key).status_code == 404

    paths = ("/docs", "/openapi.json", "/extras/tokenize", "/v1/embeddings", "/reset", "/")
    check_each(check, servers, (*paths, "/load_model", "/v1/responses"))


# The command


def test_what_is_said_fits_and_is_enough(servers):
    gguf, plain = servers
    assert plain.said == (
        f"chatty, a context of 256 tokens: {plain.url}",
        f'  OpenAI(base_url="{plain.url}", api_key="none")',
        f"  curl {plain.url}/models",
        "Ctrl-C ends it.",
    )
    assert gguf.said[1].endswith('api_key="KEY")') and "Bearer KEY" in gguf.said[2]
    assert all(len(line) <= 80 for s in servers for line in s.said)


def test_a_base_model_completes_and_does_not_chat(tmp_path):
    base = chat_gguf(chat_folder(tmp_path / "base", None))
    with running(base) as server:
        assert "has no chat template" in server.said[0]
        with pytest.raises(openai.BadRequestError, match="has no chat template") as refused:
            ask(server)
        assert refused.value.code == "no_chat_template"
        found = server.client.completions.create(model="x", prompt="def f(x):", max_tokens=3)
        assert found.usage.completion_tokens <= 3


def test_a_format_without_an_end_token_stops(tmp_path):
    """By what its template ends answers in, which llama-cpp-python's own server goes past."""
    probe = chat_gguf(chat_folder(tmp_path / "probe", SOLAR_TEMPLATE))
    with open_chat(probe, N_CTX, 1)[0] as engine:
        text = Conversation(engine, Sampling(0), n_most=24).ask("def add(a, b):", print).text
    end = text[6:9]
    with running(chat_gguf(chat_folder(tmp_path / "plain", ending_in(end)))) as server:
        found = ask(server, max_tokens=64).choices[0]
    assert found.finish_reason == "stop"
    assert found.message.content == text[: text.index(end)]


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(run, folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = run("serve", folder, "--port", port)
    assert code == 2 and not out
    assert err.startswith(f"dus-edge: port {port} of 127.0.0.1 cannot be had (")
    assert err.count("\n") == 1
    code, _, err = run("serve", folder, "--host", "nowhere.invalid")
    assert code == 2 and "is no address of this machine" in err


def test_a_package_that_lacks_is_named(run, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = run("serve", folder)
    assert code == DependencyError.exit_code
    assert err == (
        "dus-edge: dus-edge serve needs uvicorn, which is not installed; "
        "pip install 'dus-edge[serve]'.\n"
    )


def test_a_server_that_cannot_be_imported_is_told(run, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.cli.serving.server", None)
    code, _, err = run("serve", folder, "--port", "0")
    assert code == DependencyError.exit_code
    assert err.startswith(f"dus-edge: {folder} is served by transformers' server, which cannot ")
    assert err.count("\n") == 1


# Parts


def served(**changes) -> Served:
    """A model with a token for each character."""
    template = ChatTemplate("{{ messages[0]['content'] }}{{ tools }}{{ x }}", {}, "here")
    usual = {
        "alias": "it", "n_ctx": 20, "template": template, "stops": (), "encode": list,
        "encode_text": list, "defaults": {"repeat_penalty": 1.0},
    }  # fmt: skip
    return Served(**{**usual, **changes})


def test_requests_are_made_what_servers_take():
    body = {"model": "any", "messages": [{"role": "developer", "content": "12345"}]}
    ready, call = prepare(CHAT, {**body, "stream_options": {"include_usage": True}}, served())
    assert ready == {
        "model": "it", "repeat_penalty": 1.0, "max_tokens": 11,
        "messages": [{"role": "system", "content": "12345"}],
    }  # fmt: skip
    assert call.wants_usage and call.n_prompt == 9 and call.prompt == "12345None"
    more = {**body, "stop": "a", "chat_template_kwargs": {"x": 7}, "repeat_penalty": 1.2}
    ready, call = prepare(CHAT, more, served(stops=("b",)))
    assert ready["stop"] == ["a", "b"] and ready["repeat_penalty"] == 1.2
    assert call.prompt == "12345None7"
    ready, _ = prepare(COMPLETION, {"prompt": "1234", "max_completion_tokens": 99}, served())
    assert ready["max_tokens"] == 16 and ready["prompt"] == "1234"


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n"], ids=["lf", "crlf"])
def test_a_count_is_added_however_events_come(end):
    """One to a message, as llama-cpp-python's server sends them, or several."""
    events = [f'data: {{"id": "a", "choices": [{i}]}}{end}'.encode() for i in range(4)]
    done = f"data: [DONE]{end}".encode()
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    count = f"data: {json.dumps({'id': 'a', 'choices': [], 'usage': usage})}\n\n".encode()
    for n in (1, 2, 3, 5):
        sent = []

        async def send(message, sent=sent):
            sent.append(message)

        through = with_usage(send, Call(n_prompt=5, n_tokens=7))
        asyncio.run(through({"type": "http.response.start", "status": 200}))
        for i in range(0, 5, n):
            body = b"".join([*events, done][i : i + n])
            asyncio.run(through({"type": "http.response.body", "body": body, "more_body": True}))
        assert sent[0] == {"type": "http.response.start", "status": 200}
        assert b"".join(x["body"] for x in sent[1:]) == b"".join([*events, count, done])


def test_requests_that_are_none():
    def check(path: str, body: object) -> None:
        with pytest.raises(ApiError) as refused:
            prepare(path, body, served())
        assert refused.value.status == 400
        assert refused.value.body()["error"]["type"] == "invalid_request_error"

    for body in (
        [], "x", None, {}, {"messages": "x"}, {"messages": [1]}, {"messages": [{"content": "x"}]},
        {"messages": [{"role": "user", "content": 3}]},
        {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": 3},
        {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"messages": 3}},
        {"messages": [{"role": "user", "content": "x"}], "max_tokens": True},
        {"messages": [{"role": "user", "content": "x"}], "max_tokens": "9"},
        {"messages": [{"role": "user", "content": "x" * 20}]},
    ):  # fmt: skip
        check(CHAT, body)
    for prompt in (None, "", [], ["a", "b"], [1, 2], 3, "x" * 20):
        check(COMPLETION, {"prompt": prompt})


def test_who_may_ask():
    def passes(access: Access, **headers: str) -> bool:
        try:
            access.check({k.replace("_", "-"): v for k, v in headers.items()})
        except ApiError:
            return False
        return True

    local = Access(None, LOOPBACK)
    for host in ("127.0.0.1:8000", "localhost", "[::1]:8000", "LOCALHOST:1"):
        assert passes(local, host=host)
    for host in ("", "evil.example", "127.0.0.1.evil.example", "localhost@evil.example", "[::2]"):
        assert not passes(local, host=host)
    assert passes(local, host="localhost:1", origin="http://localhost:1")
    assert not passes(local, host="localhost:1", origin="http://localhost:2")
    open_to_all = Access("k", None)
    assert passes(open_to_all, host="box:1", authorization="Bearer k")
    for given in ("", "k2", "Bearer ", "Bearer K", "Bearer ké"):
        assert not passes(open_to_all, host="box:1", authorization=given)


def test_what_is_said_of_addresses():
    assert Serving().host == "127.0.0.1"
    for host, name in (("0.0.0.0", "127.0.0.1"), ("::1", "[::1]"), ("box", "box")):
        assert f"http://{name}:80/v1" in introduction(host, 80, served(), False)[0]
