"""A server that lies: whatever it answers is one sentence, within a size and a time."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dus_edge.errors import DusEdgeError
from dus_edge.measure import ollama_server
from dus_edge.measure.ollama import measure_ollama
from dus_edge.measure.workload import BenchSettings

from .cases import check_each

Answer = Callable[[socket.socket, bytes], None]


@contextlib.contextmanager
def served(answer: Answer) -> Iterator[str]:
    """The address of a server that answers each connection's first request as `answer` does."""
    done = threading.Event()

    def one(peer: socket.socket) -> None:
        with peer, contextlib.suppress(OSError):
            asked = b""
            while b"\r\n\r\n" not in asked:
                asked += peer.recv(65536) or b"\r\n\r\n"
            sizes = asked.lower().split(b"content-length: ")[1:]
            want = int(sizes[0].split(b"\r\n")[0]) if sizes else 0
            while len(asked.partition(b"\r\n\r\n")[2]) < want:
                asked += peer.recv(65536) or b" " * want
            answer(peer, asked)

    def run(listening: socket.socket) -> None:
        while not done.is_set():
            with contextlib.suppress(OSError):
                threading.Thread(target=one, args=(listening.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        thread = threading.Thread(target=run, args=(listening,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        done.set()
        thread.join()


def head(*lines: str) -> bytes:
    return "\r\n".join(("HTTP/1.1 200 OK", *lines, "Connection: close", "", "")).encode()


def body(data: bytes) -> Answer:
    return lambda peer, asked: peer.sendall(head(f"Content-Length: {len(data)}") + data)


def reply(value: Any) -> Answer:
    return body(json.dumps(value).encode())


def endless(peer: socket.socket, asked: bytes) -> None:
    peer.sendall(head())
    while True:
        peer.sendall(b" " * (1 << 20))


def dripping(peer: socket.socket, asked: bytes) -> None:
    peer.sendall(head())
    while True:
        peer.sendall(b" ")
        time.sleep(0.05)


def dripping_head(peer: socket.socket, asked: bytes) -> None:
    while True:
        peer.sendall(b"H")
        time.sleep(0.05)


def redirecting(peer: socket.socket, asked: bytes) -> None:
    peer.sendall(b"HTTP/1.1 302 Found\r\nLocation: /again\r\nContent-Length: 0\r\n\r\n")


def to_a_file(peer: socket.socket, asked: bytes) -> None:
    peer.sendall(b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n")


def refusing(peer: socket.socket, asked: bytes) -> None:
    said = b'{"error": "\\u001b[2Jgone\\nand more"}'
    peer.sendall(b"HTTP/1.1 500 No\r\nContent-Length: %d\r\n\r\n" % len(said) + said)


#: Clients that run side by side: most of them wait.
AT_ONCE = 4
#: Answers that either server may give to anything.
LIES: dict[str, Answer] = {
    "nothing": lambda peer, asked: None,
    "no HTTP": lambda peer, asked: peer.sendall(b"\x00\xff" * 5000),
    "no JSON": body(b"<html>"),
    "no UTF-8": body(b'{"version": "\xff\xfe"}'),
    "a list": reply([1, 2]),
    "a number": reply(7),
    "null": reply(None),
    "deep": body(b"[" * 200_000),
    "digits": body(b'{"version": ' + b"9" * 6000 + b"}"),
    "a long line": body(b'{"version": "' + b"x" * (3 << 20)),
    "chunks that are none": lambda peer, asked: peer.sendall(
        head("Transfer-Encoding: chunked") + b"zz\r\nabc"
    ),
    "a length that is none": lambda peer, asked: peer.sendall(head("Content-Length: -5") + b"{}"),
    "a longer length": lambda peer, asked: peer.sendall(head("Content-Length: 99999") + b"{}"),
    "endless": endless,
    "dripping": dripping,
    "dripping head": dripping_head,
    "redirecting": redirecting,
    "to a file": to_a_file,
    "refusing": refusing,
}


def ollama_saying(**changed: Any) -> Answer:
    """Ollama's answers by path, some of them other ones; bytes are sent as they are."""
    model = {"name": "m:latest", "model": "m:latest", "size": 5, "size_vram": 0}
    timings = {"load_duration": 1, "prompt_eval_duration": 5, "eval_count": 1, "eval_duration": 5}
    answers = {
        "version": {"version": "0.15"},
        "show": {"details": {}, "model_info": {}},
        "ps": {"models": [model]},
        "generate": {"done": True, "prompt_eval_count": 9, **timings},
    } | changed

    def answer(peer: socket.socket, asked: bytes) -> None:
        path = asked.split(b" ", 2)[1].decode().rpartition("/")[2]
        value = answers[path]
        if callable(value):
            value = value(json.loads(asked.partition(b"\r\n\r\n")[2]))
        body(value if isinstance(value, bytes) else json.dumps(value).encode())(peer, asked)

    return answer


#: Answers of Ollama's form with something else in them.
OLLAMA_LIES: dict[str, Answer] = {
    "no done": ollama_saying(generate={"done": False}),
    "counts as words": ollama_saying(generate={"done": True, "eval_count": "5"}),
    "negative": ollama_saying(generate={"done": True, "eval_count": -5, "eval_duration": -1}),
    "huge": ollama_saying(generate=b'{"done": true, "eval_count": 1' + b"0" * 400 + b"}"),
    "infinite": ollama_saying(generate=b'{"done": true, "eval_count": Infinity}'),
    "a line without end": ollama_saying(generate=b'{"response": "' + b"x" * (5 << 20)),
    "error as an object": ollama_saying(generate={"error": {"a": ["\x1b[2J", "\n"]}}),
    "facts as a list": ollama_saying(show={"model_info": [1], "details": "x", "error": "no"}),
    "models as words": ollama_saying(ps={"models": "all"}, generate={"done": True}),
    "models as numbers": ollama_saying(ps={"models": [1, None]}, generate={"done": True}),
}


def test_whatever_ollama_answers_is_one_sentence(monkeypatch):
    monkeypatch.setattr(ollama_server, "_ANSWER_S", 1.0)
    monkeypatch.setattr(ollama_server, "_GENERATE_S", 1.0)
    monkeypatch.setattr(ollama_server, "_ANSWER_BYTES", 4 << 20)

    def check(name: str) -> None:
        with served((LIES | OLLAMA_LIES)[name]) as url:
            started = time.monotonic()
            with pytest.raises(DusEdgeError) as e:
                measure_ollama("m", BenchSettings(repetitions=1), url=url)
            assert time.monotonic() - started < 8
        said = str(e.value)
        assert "\n" not in said and len(said) < 600, said
        assert url in said or "Ollama" in said

    check_each(check, LIES | OLLAMA_LIES)


def test_words_and_wrong_types_beside_sound_timings_do_no_harm():
    timings = {"done": True, "prompt_eval_duration": 5, "eval_count": 1, "eval_duration": 5}
    sound = ollama_saying(
        generate=lambda asked: timings | {"prompt_eval_count": len(asked["prompt"].split())},
        version={"version": ["\x1b[2J" + "x" * 9999]},
        show={"details": [], "model_info": {"general.architecture": 3, "3.context_length": "9"}},
        ps={"models": [{"name": 5}, {"name": "m:latest", "size": "x", "size_vram": []}]},
    )
    with served(sound) as url:
        found = measure_ollama("m", BenchSettings(repetitions=1, n_prompt=0, n_gen=1), url=url)
    assert len(found[0].about.engine) < 400
    assert found[0].samples_tokens == (1,)


COMMIT = "a" * 40
CLIENT = """
import sys
from pathlib import Path
from dus_edge.checkpoint.hub import fetch, limits
from dus_edge.errors import DusEdgeError
from dus_edge.checkpoint.resolve import resolve_base
import huggingface_hub.constants as c
for module in (fetch, limits):
    for name, value in (("ANSWER_SECONDS", 2), ("SMALL_FILE_SECONDS", 2),
                        ("ANSWER_BYTES", 4 << 20), ("MAX_BYTES", 4 << 20)):
        if hasattr(module, name):
            setattr(module, name, value)
try:
    resolve_base("org/name", weights=True, cache_dir=Path(sys.argv[1]))
except DusEdgeError as e:
    print(e)
    sys.exit(3)
"""


def ask_hub(url: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """What a new process says of a hub; its memory is held to 2 GiB beside the interpreter's."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
    return subprocess.run(
        [sys.executable, "-c", CLIENT, str(cache)],
        env=clean | {"HF_HOME": str(cache), "HF_ENDPOINT": url, "no_proxy": "*"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def hub_saying(info: Any = None, file: Answer | None = None, size: Any = 2) -> Answer:
    """A hub whose one repository has a config; `file` answers for what is downloaded."""
    listing = {"id": "org/name", "sha": COMMIT} | {
        "siblings": [
            {"rfilename": "config.json", "size": size},
            {"rfilename": "model.safetensors", "size": 10},
        ]
    }

    def answer(peer: socket.socket, asked: bytes) -> None:
        method, path = asked.decode().split(" ", 2)[:2]
        if path.startswith("/api/"):
            data = info if isinstance(info, bytes) else json.dumps(info or listing).encode()
            return body(data)(peer, asked)
        if method == "HEAD" or file is None:
            tag = ('ETag: "abc"', f"X-Repo-Commit: {COMMIT}", "Content-Length: 2")
            return peer.sendall(head(*tag) + (b"" if method == "HEAD" else b"{}"))
        return file(peer, asked)

    return answer


def packed(peer: socket.socket, asked: bytes) -> None:
    peer.sendall(head("Content-Encoding: gzip", "Content-Length: 2") + b"{}")


#: Answers of the hub's form with something else in them.
HUB_LIES: dict[str, Answer] = {
    "commit as a number": hub_saying({"id": "x", "sha": 5, "siblings": []}),
    "commit as a path": hub_saying({"id": "x", "sha": "../../..", "siblings": []}),
    "files as words": hub_saying({"id": "x", "sha": COMMIT, "siblings": "config.json"}),
    "a file as a number": hub_saying({"id": "x", "sha": COMMIT, "siblings": [{"rfilename": 5}]}),
    "a size as a word": hub_saying(size="2"),
    "a negative size": hub_saying(size=-1),
    "a longer file": hub_saying(file=endless),
    "a longer file of unknown size": hub_saying(file=endless, size=None),
    "a dripping file": hub_saying(file=dripping),
    "a packed file": hub_saying(file=packed),
    "a file that is none": hub_saying(file=LIES["no HTTP"]),
}


def test_whatever_the_hub_answers_is_one_sentence(tmp_path):
    def ask(name: str) -> subprocess.CompletedProcess[str]:
        with served((LIES | HUB_LIES)[name]) as url:
            return ask_hub(url, cache_of(name))

    def cache_of(name: str) -> Path:
        return tmp_path / name.replace(" ", "-")

    def check(name: str) -> None:
        done = answers[name].result()
        assert done.returncode == 3, done.stderr or done.stdout
        assert done.stderr == ""
        assert len(done.stdout.strip().splitlines()) == 1
        assert len(done.stdout) < 600
        large = [f for f in cache_of(name).rglob("*") if f.is_file() and f.stat().st_size > 8 << 20]
        assert not large

    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = {name: pool.submit(ask, name) for name in LIES | HUB_LIES}
        check_each(check, answers)
