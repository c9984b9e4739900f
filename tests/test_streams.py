"""What is said never decides whether a file is made: pipes that end, full disks, closed streams."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

CLI = f"{shlex.quote(sys.executable)} -c 'from dus_edge.cli.main import main; main()'"
COMMAND = f"{CLI} gguf pico -q q8_0 -o out --overwrite"


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("alone")
    subprocess.run(COMMAND, shell=True, cwd=folder, check=True, capture_output=True)
    return next((folder / "out").glob("*.gguf")).read_bytes()


@pytest.mark.parametrize(
    "where",
    ["| head -0", "| head -1", "> /dev/full", "2> /dev/full", "> /dev/full 2>&1", ">&-", "2>&-",
     ">&- 2>&-", "<&- >&- 2>&-", "--json | head -0", "--json > /dev/full"],
)  # fmt: skip
def test_the_file_is_made_wherever_the_words_go(tmp_path: Path, expected: bytes, where: str):
    if "/dev/full" in where and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    words, _, rest = where.partition("|")
    pipe = f" | {rest}" if rest else ""
    line = f"set -o pipefail; {COMMAND} {words}{pipe}"
    run = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert next((tmp_path / "out").glob("*.gguf")).read_bytes() == expected
    assert list((tmp_path / "out").glob("*.Modelfile"))
    assert "Traceback" not in run.stderr and "Exception ignored" not in run.stderr


def test_errors_are_errors_still(tmp_path: Path):
    for where in ("> /dev/null", "2>&-", "> /dev/full 2>&1"):
        line = f"{CLI} gguf {tmp_path}/gone -o out {where}"
        assert (
            subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True).returncode == 2
        )
