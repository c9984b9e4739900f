"""Outputs: one run at a time, whole or not there, nothing of anybody else touched."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dus_edge.errors import OutputError
from dus_edge.files import (
    MARKER,
    check_replaceable,
    output_files,
    output_folder,
    point_to,
    pwrite_all,
    write_text,
)
from dus_edge.locks import lock_path, output_lock

CLI = [sys.executable, "-c", "from dus_edge.cli.main import main; main()"]
HOLD = """
import sys, time
from pathlib import Path
from dus_edge.locks import output_lock
with output_lock([Path(sys.argv[1])]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of ``tmp_path / 'out'``."""
    started = []

    def start(name: str = "out") -> subprocess.Popen:
        child = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / name)], stdout=subprocess.PIPE, text=True
        )
        started.append(child)
        assert child.stdout.readline() == "held\n"
        return child

    yield start
    for child in started:
        child.kill()
        child.wait()


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_another_run_that_writes_is_named(tmp_path, holder):
    child = holder()
    with pytest.raises(OutputError, match="another run is writing this"):
        write_text(tmp_path / "out", "x")
    with (
        pytest.raises(OutputError, match="another run is writing this"),
        output_folder(tmp_path / "out", True, ()),
    ):
        pass
    write_text(tmp_path / "other", "x")
    child.kill()
    child.wait()
    write_text(tmp_path / "out", "x")  # a dead run holds nothing
    assert names(tmp_path) == ["other", "out"]


def test_a_lock_is_this_process_own_more_than_once(tmp_path):
    path = tmp_path / "out"
    with output_lock([path]), output_lock([path, tmp_path / "more"]):
        assert lock_path(path).exists()
        write_text(path, "x")
        assert lock_path(path).exists()
    assert names(tmp_path) == ["out"]


def test_waiting_for_a_lock(tmp_path, holder):
    child = holder()
    program = HOLD.replace("[Path(sys.argv[1])]", "[Path(sys.argv[1])], wait=True")
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    waiting = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    time.sleep(0.3)
    assert waiting.poll() is None
    child.kill()
    assert waiting.stdout.readline() == "held\n"
    waiting.kill()
    waiting.wait()


def test_a_file_of_the_users_that_looks_like_a_partial_one_stays(tmp_path):
    mine = tmp_path / "out.partial"
    mine.write_text("mine")
    folder = tmp_path / "checkpoint.partial"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    write_text(tmp_path / "out", "x")
    with output_folder(tmp_path / "checkpoint", False, ()) as partial:
        (partial / "config.json").write_text("{}")
    assert mine.read_text() == "mine"
    assert (folder / "notes.txt").read_text() == "mine"
    assert names(tmp_path / "checkpoint") == ["config.json"]


def test_nothing_is_written_through_a_link(tmp_path):
    """A partial file is made anew: what stands under its name is never opened."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    out = tmp_path / "results"
    out.mkdir()
    for token in range(16):
        (out / f"out.{token:016x}.partial").symlink_to(precious)
    (out / "out.partial").symlink_to(precious)
    write_text(out / "out", "x")
    assert precious.read_text() == "precious"
    assert (out / "out").read_text() == "x"
    assert names(out) == ["out", "out.partial"]  # links under our kind of name are leftovers


def test_what_a_killed_run_left_goes_with_the_next_one(tmp_path):
    (tmp_path / "out.0123456789abcdef.partial").write_text("half")
    left = tmp_path / "folder.0123456789abcdef.partial"
    left.mkdir()
    (left / MARKER).touch()
    (left / "half").touch()
    other = tmp_path / "folder.fedcba9876543210.partial"
    other.mkdir()
    (other / "notes").touch()  # no marker: not ours
    (tmp_path / "folder.0000000000000000.partial").mkdir()  # killed right after it was made
    write_text(tmp_path / "out", "x")
    with output_folder(tmp_path / "folder", False, ()):
        pass
    assert names(tmp_path) == ["folder", other.name, "out"]


def test_a_folder_put_aside_by_a_killed_run_comes_back(tmp_path):
    aside = tmp_path / "model.0123456789abcdef.replaced.partial"
    aside.mkdir()
    (aside / "config.json").write_text("old")
    with pytest.raises(ZeroDivisionError), output_folder(tmp_path / "model", True, ("*.json",)):
        assert (tmp_path / "model" / "config.json").read_text() == "old"
        raise ZeroDivisionError
    assert (tmp_path / "model" / "config.json").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_a_folder_filled_meanwhile_is_not_replaced(tmp_path):
    folder = tmp_path / "model"
    with (
        pytest.raises(OutputError, match="holds thesis"),
        output_folder(folder, True, ("*.json",)) as partial,
    ):
        (partial / "config.json").touch()
        folder.mkdir()
        (folder / "thesis").touch()
    assert names(folder) == ["thesis"]
    assert names(tmp_path) == ["model"]
    check_replaceable(tmp_path / "new", False, ())


def test_folders_that_were_made_go_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), output_files([(tmp_path / "a" / "b" / "out", 4)]):
        raise ZeroDivisionError
    assert names(tmp_path) == []
    with output_files([(tmp_path / "a" / "b" / "out", 4)]) as (fd,):
        pwrite_all(fd, b"four", 0)
    assert names(tmp_path / "a" / "b") == ["out"]


def test_long_names_have_partial_ones(tmp_path):
    path = tmp_path / ("x" * 240)
    write_text(path, "x")
    point_to(tmp_path / ("y" * 240), path)
    assert names(tmp_path) == ["x" * 240, "y" * 240]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM])
def test_a_dropped_connection_leaves_nothing(tmp_path, make_checkpoint, number):
    base = make_checkpoint(hidden_size=256, intermediate_size=1024, num_hidden_layers=24)
    out = tmp_path / "out"
    child = subprocess.Popen(
        [*CLI, "upscale", str(base), "-o", str(out / "up")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/*.partial")) and child.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    if child.returncode == 0:
        pytest.skip("it was faster than the signal")
    assert child.returncode == 130
    assert "nothing half-written" in err
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob(".*.lock"))


def test_eight_runs_at_once_are_whole_or_refused(tmp_path, pico):
    """One folder, two presets: every file is what a run alone writes."""
    alone = tmp_path / "alone"
    for preset in ("q8_0", "q4_0"):
        subprocess.run([*CLI, "gguf", "pico", "-q", preset, "-o", str(alone)], check=True)
    out = tmp_path / "out"
    runs = [
        subprocess.Popen(
            [*CLI, "gguf", "pico", "-q", preset, "-o", str(out), "--overwrite"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for preset in ("q8_0", "q4_0") * 4
    ]
    said = [run.communicate(timeout=120)[1] for run in runs]
    codes = [run.returncode for run in runs]
    assert 0 in codes
    for code, err in zip(codes, said, strict=True):
        assert code == 0 or "another run is writing this" in err
    for path in out.glob("*.gguf"):
        assert path.read_bytes() == (alone / path.name).read_bytes()
    assert names(out) == names(alone)


def test_records_appended_at_once_are_all_kept(tmp_path):
    """`bench run -o` reads, adds and writes: under a lock, so that no line is lost."""
    program = (
        "import sys; from pathlib import Path; from dus_edge.files import append_text\n"
        "for i in range(20): append_text(Path(sys.argv[1]), f'line {sys.argv[2]} {i}\\n')"
    )
    path = tmp_path / "r.jsonl"
    runs = [subprocess.Popen([sys.executable, "-c", program, str(path), str(i)]) for i in range(4)]
    assert [run.wait(timeout=120) for run in runs] == [0] * 4
    assert len(set(path.read_text().splitlines())) == 80
