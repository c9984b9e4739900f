"""`dus-edge serve`: a model is checked, loaded and served until Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from dus_edge.chat.engine import context_of
from dus_edge.chat.open import context_notes, inspect_chat
from dus_edge.chat.serve.guard import LOOPBACK, Access, Guard
from dus_edge.chat.serve.request import Served
from dus_edge.chat.template import no_template
from dus_edge.errors import UsageError
from dus_edge.packages import EXTRAS, cannot_import, require

#: Seconds that answers have to come to an end when the server ends.
_LAST_S = 3


@dataclass(frozen=True)
class Serving:
    """How a model is served.

    Attributes:
        host: address to listen on.
        port: 0 for any that is free.
        key: what clients must know; None: nothing.
        alias: the model's name in the API; None for the file's.
        n_ctx: tokens of context; None for the model's own up to `DEFAULT_CONTEXT`.
        n_threads: of the CPU; None for all cores.
        device: see `dus_edge.run.open.open_source`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    alias: str | None = None
    n_ctx: int | None = None
    n_threads: int | None = None
    device: str = "cpu"


def serve(path: Path, how: Serving, say: Callable[[str], None]) -> None:
    """Serve a model until the process is told to end.

    Args:
        path: a GGUF file or a folder: plain, GPTQ or bitsandbytes.
        how: where and to whom.
        say: takes the lines for people.

    Raises:
        UsageError: the port cannot be had.
        DependencyError: a package is not installed.
        DusEdgeError: the model cannot be found, read or loaded.
    """
    require("serve", "dus-edge serve needs", *_packages(path))
    # Before transformers is imported, which reads it then.
    os.environ["HF_HUB_OFFLINE"] = "1"
    info, template = inspect_chat(path)
    with _bound(how.host, how.port) as place:
        n_ctx = context_of(how.n_ctx, info.context_length)
        for note in context_notes(n_ctx, info):
            say(f"note: {note}")
        if info.kind == "gguf":
            from dus_edge.chat.serve.gguf import gguf_app as make
        else:
            from dus_edge.chat.serve.folder import folder_app as make
        try:
            app, served = make(info, how.alias or info.name, n_ctx, how.n_threads, how.device)
        except ImportError as e:
            whose = "llama-cpp-python's" if info.kind == "gguf" else "transformers'"
            raise cannot_import("serve", f"{path} is served by {whose} server", e) from None
        if template is None:
            say(f"note: {no_template(path)} Completions are served, chats are not.")
        if how.host not in LOOPBACK and how.key is None:
            say(
                f"warning: anybody who reaches {how.host} can use the model; --api-key KEY asks "
                "for a key."
            )
        place.listen(128)
        for line in introduction(how.host, place.getsockname()[1], served, how.key is not None):
            say(line)
        hosts = LOOPBACK if how.host in LOOPBACK else None
        _run(Guard(app, served, Access(how.key, hosts)), place)


def introduction(host: str, port: int, served: Served, keyed: bool) -> list[str]:
    """What is said when a server is ready."""
    name = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    url = f"http://{name}:{port}/v1"
    key = "KEY" if keyed else "none"
    curl = f"curl {url}/models" + (' -H "Authorization: Bearer KEY"' if keyed else "")
    return [
        f"{served.alias}, a context of {served.n_ctx:,} tokens: {url}",
        f'  OpenAI(base_url="{url}", api_key="{key}")',
        f"  {curl}",
        "Ctrl-C ends it.",
    ]


def _packages(path: Path) -> tuple[str, ...]:
    """What of the extra is needed: transformers' server imports less, but OpenAI's types."""
    if path.is_dir():
        return ("fastapi", "uvicorn", "openai")
    return tuple(name for name in EXTRAS["serve"] if name != "openai")


@contextlib.contextmanager
def _bound(host: str, port: int) -> Any:
    """A socket at an address, which nobody is answered on yet: checked before a model is loaded."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as e:
        raise UsageError(f"--host {host} is no address of this machine ({e.strerror}).") from None
    with socket.socket(family, socket.SOCK_STREAM) as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            place.bind(address)
        except OSError as e:
            raise UsageError(
                f"port {port} of {host} cannot be had ({e.strerror}); take another --port, or 0 "
                "for any that is free."
            ) from None
        yield place


def _run(guard: Guard, place: socket.socket) -> None:
    import uvicorn

    config = uvicorn.Config(
        guard,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_LAST_S,
    )
    server = uvicorn.Server(config)
    leave = server.handle_exit

    def handle_exit(signum: int, frame: FrameType | None) -> None:
        guard.end_all()
        leave(signum, frame)

    server.handle_exit = handle_exit
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[place])
