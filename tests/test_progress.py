"""Progress: what an earlier run did is done, but tells nothing of the rate."""

from __future__ import annotations

import io
import re
import sys

import pytest

from dus_edge import progress as module
from dus_edge.progress import count_resumed, progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only the test moves."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_leave_out_what_was_done_before(clock, capsys):
    with progress("Working", 1000, unit="tokens") as advance:
        count_resumed(advance, 600)
        clock[0] += 20
        advance(100)  # 5 a second, 300 left
        clock[0] += 60
        advance(300)
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("Working:  70%") and "5.0 tokens/s  1:00 left" in first
    assert last.startswith("Working: 100%") and "took 1:20" in last


def test_a_bar_too(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with progress("Working", 10**9, unit="tokens") as advance:
        count_resumed(advance, 9 * 10**8)
        advance(1)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue()).splitlines()[-1]
    assert " 90%" in shown
    assert not re.search(r"[MG] ?tokens/s", shown)


def test_any_function_will_do():
    told = []
    count_resumed(told.append, 5)
    assert told == [5]
