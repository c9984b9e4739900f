"""Standard streams that never decide whether a file is made.

What a command says may go to a pipe that ends early, to a full disk, or nowhere at all. Words are
lost then; the work goes on.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any


class PatientStream:
    """A text stream that goes silent when it cannot be written, instead of raising."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._silent = False

    def write(self, text: str) -> int:
        """Write, or not."""
        if not self._silent:
            try:
                self._stream.write(text)
            except (OSError, ValueError):  # ValueError: closed
                self._fall_silent()
        return len(text)

    def flush(self) -> None:
        """Flush, or not."""
        if not self._silent:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._fall_silent()

    def _fall_silent(self) -> None:
        """Let what is buffered go nowhere, or Python would complain of it at the end."""
        self._silent = True
        with contextlib.suppress(OSError, ValueError):
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, self._stream.fileno())
            os.close(sink)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def make_patient() -> None:
    """Put patient streams in place of standard output and standard error.

    A stream that was closed before the start is opened to nowhere: else the next file that is
    opened would have its number, and what a library says would be written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if isinstance(stream, PatientStream):
            continue
        if stream is None:
            stream = os.fdopen(number, "w", closefd=False)
        setattr(sys, name, PatientStream(stream))
