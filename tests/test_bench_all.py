"""`bench all`: made, measured, compared and tabulated in one go; what fails says which step."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest

from dus_edge.errors import DusEdgeError, OutputError, UsageError
from dus_edge.jobs.bench_all import bench_all, in_its_own_process
from dus_edge.jobs.export.calibration import TextChoice
from dus_edge.measure.workload import BenchSettings
from dus_edge.upscale.model import plan_chooser

CHOOSE = plan_chooser(None, None, (), True)
QUICK = {
    "gptq": None,
    "text": TextChoice(),
    "presets": ("f16", "q4_0"),
    "settings": BenchSettings(n_prompt=8, n_gen=2, repetitions=1),
    "n_chunks": 2,
}


@pytest.mark.slow
def test_a_base_is_made_measured_compared_and_tabulated(tmp_path):
    models, results = tmp_path / "bench", tmp_path / "benchmarks" / "results"
    said: list[str] = []
    done = bench_all("pico", CHOOSE, models, results, say=said.append, **QUICK)
    assert [p.name for p in done.models] == ["pico-DUS-f16.gguf", "pico-DUS-q4_0.gguf"]
    assert all(p.is_file() for p in done.models)
    lines = [json.loads(line) for line in done.measured.read_text().splitlines()]
    assert [line["model_filename"] for line in lines] == [str(p) for p in done.models for _ in "pt"]
    # Each starts from a fresh process, so the second finds nothing of the first.
    assert lines[2]["baseline_memory_bytes"] < 1.2 * lines[0]["baseline_memory_bytes"]
    found = json.loads(done.quality.read_text())
    assert found["reference"]["name"] == "pico-DUS-f16"
    assert set(found["text"]["chunks"]) == {"code"}  # Python is what pico knows
    assert {p.name for p in done.tables} == {"TABLES.md", "tables.csv", "tables.json", "index.html"}
    assert "pico-DUS-q4_0" in (tmp_path / "benchmarks" / "TABLES.md").read_text()
    assert [line.split()[0] for line in said[1:]] == [f"{i}/5" for i in range(1, 6)]
    # Once more: nothing is replaced unasked, and that is seen before anything is made.
    before = done.measured.read_text()
    with pytest.raises(OutputError, match="overwrite"):
        bench_all("pico", CHOOSE, models, results, **QUICK)
    assert done.measured.read_text() == before


def test_everything_is_refused_before_the_first_step(tmp_path, make_checkpoint):
    said: list[str] = []
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "measured.jsonl").write_text("not ours\n")
    for base, folder, error in (
        ("pico", tmp_path / "r", UsageError),
        (str(make_checkpoint(max_position_embeddings=64)), tmp_path / "s", UsageError),
        (str(tmp_path / "none"), tmp_path / "s", UsageError),
    ):
        quick = QUICK | {"settings": BenchSettings(n_prompt=128, n_gen=2, repetitions=1)}
        with pytest.raises(error):
            bench_all(base, CHOOSE, tmp_path / "m", folder, say=said.append, **quick)
    assert not [line for line in said if line.startswith("1/")]
    assert not (tmp_path / "m").exists()


def test_a_step_that_fails_is_named(tmp_path, monkeypatch):
    from dus_edge.jobs import bench_all as module

    def fails(work, *args):
        if work.__name__ == "_make_gguf":
            raise OutputError("the disk is full.")
        return in_its_own_process(work, *args)

    monkeypatch.setattr(module, "in_its_own_process", fails)
    with pytest.raises(OutputError, match=r"^Making f16, q4_0: the disk is full\."):
        bench_all("pico", CHOOSE, tmp_path / "m", tmp_path / "r" / "s", **QUICK)


def test_a_process_of_its_own_answers_raises_and_ends():
    assert in_its_own_process(os.getpid) != os.getpid()
    with pytest.raises(UsageError, match="at least 1"):
        in_its_own_process(_refused)
    with pytest.raises(DusEdgeError, match="ended with 3"):
        in_its_own_process(os._exit, 3)


def _refused() -> None:
    raise UsageError("at least 1 is needed.")


def _work(path: str) -> None:
    try:
        with open(path, "w") as f:  # noqa: PTH123
            f.write("half")
        time.sleep(60)
    finally:
        os.unlink(path)  # noqa: PTH108


def test_an_interruption_is_passed_on_and_cleaned_up_after(tmp_path):
    partial = tmp_path / "partial"

    def interrupt() -> None:
        while not partial.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        in_its_own_process(_work, str(partial))
    thread.join()
    assert not partial.exists()
