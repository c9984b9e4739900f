"""Answers of a model that are known already: kept as they come, found again by their content.

A line is an answer, under a digest of the tokens that were asked. The file's name holds a digest of
the model's content and of how it is run, so that neither a changed file of the same name nor other
prompts are ever answered from it. A process that is killed loses what it was computing and no more:
a line that is cut short is left out, and asked again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dus_edge.errors import OutputError
from dus_edge.run.tree import ScoredTokens


def content_digest(paths: Sequence[Path], how: str) -> str:
    """What answers are kept under, hex.

    Args:
        paths: all files that a model consists of.
        how: the engine and its settings.
    """
    found = hashlib.sha256(how.encode())
    for path in paths:
        with path.open("rb") as f:
            found.update(hashlib.file_digest(f, "sha256").digest())
    return found.hexdigest()


def scored_key(request: ScoredTokens) -> str:
    """The name of a continuation's log-likelihood, hex."""
    data = np.array([request.n_context, *request.tokens], np.int64).tobytes()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def written_key(tokens: Sequence[int], how: dict[str, Any]) -> str:
    """The name of a text that a model wrote behind a prompt, hex."""
    data = np.array(tokens, np.int64).tobytes() + json.dumps(how, sort_keys=True).encode()
    return "t" + hashlib.blake2b(data, digest_size=16).hexdigest()


class AnswerRecord:
    """Answers by key, on the disk at once.

    Args:
        path: of the file, there or not; its folder is made.

    Raises:
        OutputError: it cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, Any] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes() if path.exists() else b""
        except OSError as e:
            raise OutputError(f"{path} cannot be read ({e.strerror}); name another -o.") from None
        for line in data.splitlines(keepends=True):
            try:
                key, answer = json.loads(line)
            except ValueError:
                continue
            self._known[key] = answer
        # A line that was cut short must not swallow the next one.
        self._torn = bool(data) and not data.endswith(b"\n")

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def add(self, answers: Iterable[tuple[str, Any]]) -> None:
        """Keep answers.

        Raises:
            OutputError: the disk is full, or the file cannot be written.
        """
        lines = "\n" if self._torn else ""
        for key, answer in answers:
            self._known[key] = answer
            lines += json.dumps([key, answer], ensure_ascii=False) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as f:
                f.write(lines)
        except OSError as e:
            self._torn = True
            raise OutputError(
                f"{self.path} cannot be written ({e.strerror}); make room and run it again: what "
                "was answered is kept."
            ) from None
        self._torn = False
