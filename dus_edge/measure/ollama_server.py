"""Ollama's API for one model: answers of bounded size and time, errors as sentences."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from dus_edge.errors import DusEdgeError, UsageError
from dus_edge.machine import deadline
from dus_edge.measure.prompts import Timings
from dus_edge.measure.resources import MeasuredMemory
from dus_edge.words import format_bytes, printable

_DEFAULT_PORT = 11434
#: Loading a large model from a slow disk takes minutes, in which Ollama says nothing.
_SILENCE_S = 900.0
#: A whole answer, with a byte now and then: to a question, and to a prompt.
_ANSWER_S = 120.0
_GENERATE_S = 7200.0
#: An answer to a prompt has some 100 bytes a token.
_ANSWER_BYTES = 64 << 20
_PART_BYTES = 1 << 20


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


def count_of(value: object) -> int:
    """A count or a duration of an answer; 0 where it has none that can be."""
    return value if type(value) is int and 0 <= value < 1 << 63 else 0


def fields_of(value: object) -> dict[str, Any]:
    """An object within an answer; empty where it is none."""
    return value if isinstance(value, dict) else {}


class OllamaServer:
    """Ollama's API for one model, its errors as sentences."""

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name = url, name

    def get(self, path: str) -> dict[str, Any]:
        """The answer to a question without a body."""
        with self._request(path, None, _ANSWER_S) as response:
            return self._checked(_read(response, _ANSWER_BYTES))

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a question with a body."""
        with self._request(path, body, _ANSWER_S) as response:
            return self._checked(_read(response, _ANSWER_BYTES))

    def generate(self, prompt: str, options: dict[str, Any]) -> Timings:
        """Run a prompt as it is; timings by the server's own account."""
        body = {
            "model": self.name,
            "prompt": prompt,
            "raw": True,
            "stream": True,
            "options": options,
        }
        start = time.perf_counter()
        first_s, last = 0.0, {}
        with self._request("/api/generate", body, _GENERATE_S) as response:
            for line in filter(bytes.strip, _lines(response, _ANSWER_BYTES)):
                last = self._checked(line)
                first_s = first_s or time.perf_counter() - start
        if not last.get("done"):
            raise DusEdgeError(f"Ollama at {self.url} broke off its answer; see its log.")
        return Timings(
            prompt_tokens=count_of(last.get("prompt_eval_count")),
            prompt_ns=count_of(last.get("prompt_eval_duration")),
            tokens=count_of(last.get("eval_count")),
            ns=count_of(last.get("eval_duration")),
            load_ns=count_of(last.get("load_duration")),
            first_s=first_s,
        )

    def running(self) -> dict[str, Any] | None:
        """What ``/api/ps`` says of the model; None while it is not loaded."""
        wanted = self.name if ":" in self.name.rpartition("/")[2] else f"{self.name}:latest"
        models = self.get("/api/ps").get("models")
        for model in map(fields_of, models if isinstance(models, list) else ()):
            if wanted.lower() in (str(model.get(k, "")).lower() for k in ("name", "model")):
                return model
        return None

    def memory(self) -> MeasuredMemory | None:
        """Ollama's own account: of the GPU if the model is there, else of the machine."""
        model = self.running()
        if model is None:
            return None
        if vram := count_of(model.get("size_vram")):
            return MeasuredMemory(0, vram, "ollama-vram")
        return MeasuredMemory(0, count_of(model.get("size")), "ollama")

    @contextlib.contextmanager
    def _request(self, path: str, body: dict[str, Any] | None, seconds: float) -> Iterator[Any]:
        """An open answer; what goes wrong with it in the block too is told as a sentence."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, headers={"Content-Type": "application/json"}
        )
        try:
            with (
                _limited(self.url, seconds),
                urllib.request.urlopen(request, timeout=_SILENCE_S) as response,
            ):
                yield response
        except urllib.error.HTTPError as e:
            raise self._refused(e) from None
        except TimeoutError:
            raise DusEdgeError(
                f"Ollama at {self.url} says nothing for {_SILENCE_S:.0f} s; see its log."
            ) from None
        except (ConnectionError, http.client.HTTPException) as e:  # while it answered
            raise DusEdgeError(
                f"Ollama at {self.url} broke off ({short_text(e)}); see its log."
            ) from None
        except urllib.error.URLError as e:
            raise DusEdgeError(
                f"Ollama does not answer at {self.url} ({_reason(e)}); start it with "
                "`ollama serve`, or set OLLAMA_HOST."
            ) from None
        except (OSError, ValueError, RecursionError) as e:
            raise DusEdgeError(
                f"{self.url} does not answer as Ollama does ({short_text(e)}); set OLLAMA_HOST."
            ) from None

    def _checked(self, text: bytes) -> dict[str, Any]:
        answer = json.loads(text)
        if not isinstance(answer, dict):
            raise ValueError("no JSON object")
        if "error" in answer:
            raise DusEdgeError(f"Ollama cannot run {self.name} ({short_text(answer['error'])}).")
        return answer

    def _refused(self, e: urllib.error.HTTPError) -> DusEdgeError:
        try:
            with _limited(self.url, _ANSWER_S):
                said = short_text(json.loads(_read(e, _ANSWER_BYTES))["error"])
        except (
            ValueError,
            KeyError,
            TypeError,
            OSError,
            RecursionError,
            http.client.HTTPException,
        ):
            return DusEdgeError(
                f"{self.url} does not answer as Ollama does (status {e.code}); set OLLAMA_HOST."
            )
        if e.code == 404:
            return UsageError(
                f"Ollama has no model {self.name}; `ollama list` shows those it has, "
                "`ollama create` and `ollama pull` add one."
            )
        return DusEdgeError(f"Ollama cannot run {self.name} ({said}).")


@contextlib.contextmanager
def _limited(url: str, seconds: float) -> Iterator[None]:
    """Within it an answer must come to its end.

    Raises:
        DusEdgeError: it did not.
    """
    started = time.monotonic()
    try:
        with deadline(seconds):
            yield
    except TimeoutError:
        if time.monotonic() - started < seconds:
            raise  # the socket's own
        raise DusEdgeError(
            f"Ollama at {url} does not come to an end within {seconds:.0f} s; see its log."
        ) from None


def _read(response: Any, most: int) -> bytes:
    """A whole body of at most so many bytes."""
    data = response.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it sends more than {format_bytes(most)}")
    return data


def _lines(response: Any, most: int) -> Iterator[bytes]:
    """Lines as they come; at most so many bytes in all."""
    taken = 0
    while line := response.readline(_PART_BYTES):
        taken += len(line)
        if taken > most or (len(line) == _PART_BYTES and not line.endswith(b"\n")):
            raise ValueError(f"it sends more than {format_bytes(min(most, _PART_BYTES))}")
        yield line


def short_text(said: object) -> str:
    """What a server says, at most some lines' worth of it, in one line."""
    return printable(" ".join(str(said)[:1000].split()))[:300]


def _reason(e: urllib.error.URLError) -> str:
    return getattr(e.reason, "strerror", None) or str(e.reason)
