"""Measurements that files keep: the machine beside them, whole or not at all, read with checks."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dus_edge.errors import UsageError
from dus_edge.jobs.export.gguf import export_gguf
from dus_edge.measure import record
from dus_edge.measure.measurement import About, Measurement, measurement_json
from dus_edge.measure.workload import Workload
from dus_edge.quant.recipe import PRESETS
from dus_edge.upscale.model import plan_chooser

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
ABOUT = About(
    engine="llama-cpp-python 0.3.36",
    build_commit="0c1e570",
    cpu_info="A CPU",
    gpu_info="",
    backends="CPU",
    model_filename="solar-q4_k_m.gguf",
    model_type="llama 34B Q4_K - Medium",
    model_size=6_461_000_000,
    model_n_params=10_731_524_096,
    n_threads=8,
)
MEASURED = [
    Measurement(ABOUT, Workload(512, 0), (10**9, 2 * 10**9), (512, 512), "2026-01-01T10:00:00Z"),
    Measurement(ABOUT, Workload(0, 128), (10**9,), (128,), "2026-01-01T10:01:00Z"),
]
GOOD = measurement_json(MEASURED[0]) | record.machine()


def git(folder: Path, *args: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    command = ["git", "-C", str(folder), *who, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


# The machine


def test_the_machine_is_this_one():
    here = record.machine()
    assert here["cores"] == len(os.sched_getaffinity(0))
    info = Path("/proc/cpuinfo").read_text()
    assert f": {here['cpu']}\n" in info
    kib = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0])
    assert here["memory_bytes"] == pytest.approx(kib * 1024, rel=0.01)
    assert here["os"] and here["python"] and here["dus_edge"]


def test_the_commit_is_of_the_programs_own_checkout(tmp_path):
    package = tmp_path / "checkout" / "dus_edge"
    package.mkdir(parents=True)
    (package / "a.py").write_text("1\n")
    assert record._commit(package) is None
    git(package.parent, "init", "-q")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-qm", "one")
    commit = git(package.parent, "rev-parse", "--short", "HEAD")
    assert record._commit(package) == commit
    # Results that change are no change of the program.
    (package.parent / "results.jsonl").write_text("{}\n")
    assert record._commit(package) == commit
    (package / "a.py").write_text("2\n")
    assert record._commit(package) == f"{commit}-dirty"
    # Installed inside somebody's checkout, it is not theirs.
    inner = package.parent / ".venv" / "dus_edge"
    inner.mkdir(parents=True)
    assert record._commit(inner) is None


# Writing


def test_lines_are_added(tmp_path):
    path = tmp_path / "new" / "measured.jsonl"
    record.append_record(path, MEASURED)
    path.write_text(path.read_text().removesuffix("\n"))  # as an editor may leave it
    record.append_record(path, MEASURED[:1])
    lines = record.read_lines(path)
    assert [x["test"] for x in lines] == ["pp512", "tg128", "pp512"]
    for line in lines:
        assert line["cpu"] == record.machine()["cpu"]
        assert line["model_size"] == ABOUT.model_size
    assert lines[0]["avg_ts"] == pytest.approx((512 + 256) / 2)


def test_somebodys_file_is_not_added_to(tmp_path, run):
    for name, data in (("model.gguf", b"GGUF\xff\x00"), ("notes.txt", b"my notes\n")):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(UsageError, match=name):
            record.append_record(path, MEASURED)
        code, _, err = run("bench", "run", "no-such.gguf", "-o", path)
        assert code == 2
        assert name in err
        assert path.read_bytes() == data


def test_bench_run_keeps_what_it_shows(run, tmp_path):
    choose = plan_chooser(None, None, (), False)
    model = export_gguf("pico", choose, [PRESETS["q4_0"]], tmp_path).outputs[0].path
    path = tmp_path / "measured.jsonl"
    args = ("bench", "run", model, "-p", "16", "-n", "4", "-r", "1", "-t", "1", "-o", path)
    code, out, err = run(*args)
    assert code == 0, err
    assert "pp16" in out and "tg4" in out
    lines = record.read_lines(path)
    assert [x["test"] for x in lines] == ["pp16", "tg4"]
    assert lines[0]["cores"] == record.machine()["cores"]
    code, out, _ = run(*args, "--json")
    assert [json.loads(x)["test"] for x in out.splitlines()] == ["pp16", "tg4"]
    assert len(record.read_lines(path)) == 4

    # A run that fails adds nothing, whichever model is the damaged one.
    before = path.read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(model.read_bytes()[:-100_000])
    code, _, err = run("bench", "run", model, broken, *args[3:])
    assert code != 0
    assert "broken.gguf" in err
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


def test_another_machines_ollama_is_not_kept(run, tmp_path, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "gpu-box:11434")
    path = tmp_path / "measured.jsonl"
    code, _, err = run("bench", "run", "--ollama", "solar-dus", "-o", path)
    assert code == 2
    assert "gpu-box" in err
    assert not path.exists()
    for host in ("127.0.0.1:1", "localhost", "0.0.0.0", "[::1]:11434"):
        monkeypatch.setenv("OLLAMA_HOST", host)
        record.check_record(path, ollama=True)


# Reading


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is no JSON"),
        ("[1]", "line 2 is JSON, but no object"),
        ('{"avg_ts": NaN}', "line 2 is no JSON"),
        ("{}", "line 2 lacks 'model_filename'"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "cpu"}), "line 2 lacks 'cpu'"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "commit"}), "line 2 lacks 'commit'"),
        (json.dumps(GOOD | {"avg_ts": "fast"}), "'avg_ts' is \"fast\"; it must be a number"),
        (json.dumps(GOOD | {"avg_ts": -1}), "'avg_ts' is -1"),
        (json.dumps(GOOD | {"avg_ts": None}), "'avg_ts' is null"),
        (json.dumps(GOOD | {"cores": 2.5}), "'cores' is 2.5; it must be a whole number"),
        (json.dumps(GOOD | {"model_size": True}), "'model_size' is true"),
        (json.dumps(GOOD).replace('"avg_ts": 384.0', '"avg_ts": 1e999'), "'avg_ts'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, run, line, said):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    code, _, err = run("bench", "tables", "-o", tmp_path / "out", "--measured", path)
    assert code == 2
    assert f"{path}, line 2" in err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_named(tmp_path, run):
    for option in ("--measured", "--quality", "--divergence"):
        path = tmp_path / "none.json"
        code, _, err = run("bench", "tables", "-o", tmp_path / "out", option, path)
        assert code == 2
        assert f"{path} does not exist" in err
        assert not (tmp_path / "out").exists()


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key of a nest of objects and lists."""
    if not isinstance(value, dict | list):
        return []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [p for k, v in items for p in ((*at, k), *(places(v, (*at, k))))]


QUALITY = json.loads((RESULTS / "quality.json").read_text())


@given(st.sampled_from(places(QUALITY)), st.sampled_from(["gone", 3, -1, "x", None, [], {}, True]))
def test_quality_of_another_shape_is_an_error_or_can_be_shown(place, junk):
    from dus_edge.tables.measured import quality_markdown
    from dus_edge.tables.write import as_csv, as_json

    damaged = copy.deepcopy(QUALITY)
    inner = damaged
    for key in place[:-1]:
        inner = inner[key]
    if junk == "gone":
        del inner[place[-1]]
    else:
        inner[place[-1]] = junk
    try:
        found = record.parse_quality(json.dumps(damaged), "q.json")
    except UsageError as e:
        assert str(e).startswith("q.json")
        return
    assert quality_markdown([found])
    assert as_csv(as_json([], [], [found])).count("\n") >= 1 + len(found["candidates"])


@given(st.sampled_from(sorted(GOOD)), st.sampled_from(["gone", 3, -1, "x", None, [], {}, True]))
def test_measured_lines_of_another_shape_are_an_error_or_can_be_shown(key, junk):
    from dus_edge.tables.measured import measured_markdown
    from dus_edge.tables.write import as_csv, as_json

    damaged = {k: v for k, v in GOOD.items() if k != key}
    if junk != "gone":
        damaged[key] = junk
    try:
        found = record.parse_lines(json.dumps(damaged), "m.jsonl")
    except UsageError as e:
        assert str(e).startswith("m.jsonl, line 1")
        return
    assert measured_markdown(found)
    assert as_csv(as_json([], found)).count("\n") == 2


RUN = json.loads((RESULTS / "divergence.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is no JSON"),
        ("[]", "line 2 is JSON, but no object"),
        (json.dumps({k: v for k, v in RUN.items() if k != "way"}), "line 2 lacks 'way'"),
        (json.dumps(RUN | {"kl": -1}), "'kl' is -1; it must be a number"),
        (json.dumps(RUN | {"kl": None}), "'kl' is null"),
        (json.dumps(RUN | {"bytes": 0}), "'bytes' is 0"),
        (json.dumps(RUN | {"seed": "a"}), "'seed' is \"a\"; it must be a whole number"),
        (json.dumps(RUN | {"by_chunk": [1, "x"]}), "'by_chunk' is no list of numbers"),
        (json.dumps(RUN | {"by_chunk": 3}), "'by_chunk' is no list of numbers"),
    ],
)
def test_a_bad_line_of_divergence_is_named(tmp_path, run, line, said):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(RUN) + "\n" + line + "\n")
    code, _, err = run("bench", "tables", "-o", tmp_path / "out", "--divergence", path)
    assert code == 2
    assert f"{path}, line 2" in err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_quality_of_another_shape_writes_nothing(tmp_path, run):
    path = tmp_path / "q.json"
    for text in ("{}", "[]", "nothing", json.dumps(QUALITY | {"candidates": []})):
        path.write_text(text)
        code, _, err = run("bench", "tables", "-o", tmp_path / "out", "--quality", path)
        assert code == 2
        assert str(path) in err
        assert err.count("\n") == 1
        assert not (tmp_path / "out").exists()
