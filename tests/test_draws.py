"""The suite draws the same cases whenever it runs; `make fuzz` draws others, and more of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from . import fuzz
from .draws import examples

ROOT = Path(__file__).parents[1]


@pytest.fixture
def drawn(tmp_path):
    """What a test of 60 examples draws in a process of its own."""

    def run(*options: str, modules: str = "", **env: str) -> list[str]:
        file = tmp_path / "drawn"
        file.write_text("")
        left_out = ("HYPOTHESIS_PROFILE", "PYTEST_ADDOPTS")
        inherited = {k: v for k, v in os.environ.items() if k not in left_out}
        here = {"DRAWS_FILE": str(file), "DRAWS_IMPORT": modules}
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-p",
                "no:cacheprovider",
                *options,
                "tests/drawing.py",
            ],
            cwd=ROOT,
            env=inherited | here | env,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout
        return file.read_text().splitlines()

    return run


def test_every_run_draws_the_same(drawn):
    """Also where other modules were imported before, as the tests before do in any order."""
    first = drawn()
    assert 55 <= len(first) <= 60  # hypothesis leaves out what it drew before
    assert len(set(first)) > 50
    assert drawn(modules="dus_edge.words dus_edge.measure.workload", CI="true") == first


def test_fuzzing_draws_anew_and_more(drawn):
    first = drawn("--hypothesis-profile=fuzz", modules="dus_edge.words")
    second = drawn(modules="dus_edge.words", HYPOTHESIS_PROFILE="fuzz")
    assert 280 <= min(len(first), len(second)) <= max(len(first), len(second)) <= 300
    assert len(set(first) & set(second)) < 100


def test_settings_of_a_test_keep_those_of_the_profile():
    for name in ("default", "fuzz"):
        profile, mine = settings.get_profile(name), examples(30)
        assert profile.database is mine.database is None
        assert profile.deadline is mine.deadline is None
    assert settings.get_profile("default").derandomize
    assert not settings.get_profile("fuzz").derandomize
    assert examples(30).max_examples * 100 == 30 * settings().max_examples
    assert examples(30).derandomize == settings().derandomize


# `make fuzz`


PROFILE = "from hypothesis import settings\nsettings.register_profile('fuzz', database=None)\n"
BROKEN = """
from hypothesis import given, strategies as st

@given(st.integers())
def test_broken(n):
    assert n < 1000

def test_that_draws_nothing():
    assert False
"""


@pytest.fixture
def fuzzed(tmp_path):
    """The exit code of fuzzing one file of tests."""

    def run(tests: str, seconds: float) -> int:
        (tmp_path / "conftest.py").write_text(PROFILE)
        (tmp_path / "test_it.py").write_text(tests)
        return fuzz.fuzz(seconds, tmp_path, "-p", "no:cacheprovider")

    return run


def test_fuzzing_ends_at_the_first_failure_and_says_how_to_keep_it(fuzzed, capfd):
    assert fuzzed(BROKEN, 60) == 1
    said = capfd.readouterr().out
    assert "n=1000" in said
    assert "@example(" in said


def test_fuzzing_ends_in_time(fuzzed, capfd):
    slow = BROKEN.replace("assert n < 1000", "import time; time.sleep(0.1)")
    assert fuzzed(slow, 3) == 0
    assert "no failure" in capfd.readouterr().out


def test_fuzzing_nothing_is_an_error(fuzzed, capfd):
    assert fuzzed("def test_nothing(): pass\n", 60) == 1
    assert "pytest ended with 5" in capfd.readouterr().out
