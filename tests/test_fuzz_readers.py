"""The fuzz of the readers: its seeds are sound, it sees what it is for, and a slice of it holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .cases import check_each
from .fuzzing.mutate import json_marks, mutated
from .fuzzing.readers import READERS, Reader
from .fuzzing.seeds import CONFIG

TESTS = Path(__file__).parent
#: A reader with each fault that a batch must find, and what is said of it.
FAULTY = {
    "KeyError: 'x'": "{}['x']",
    "MemoryError": "bytes(400 << 20)",
    "s of CPU": "exec('while time.process_time() < start + 0.5: pass')",
    "more than 1.0 s": "exec('while True: pass')",
    "opened": "open(folder / 'made', 'w')",
    "os.remove": "os.remove(folder / 'Modelfile')",
    "subprocess.Popen": "subprocess.run(['true'])",
    "the process died (status 1792)": "os._exit(7)",
    "of 3,000 characters": "exec('raise Long()')",
}
SCRIPT = """
import json, os, subprocess, sys, time
from dus_edge.errors import DusEdgeError
from fuzzing.readers import Reader
from fuzzing.seeds import modelfile
from fuzzing import watched
class Long(DusEdgeError):
    def __str__(self): return 'x' * 3000
def read(folder):
    start = time.process_time()
    if (folder / 'Modelfile').read_bytes() != modelfile().files['Modelfile']:
        return {fault}
watched.MOST_CPU_S, watched.INTERRUPTED_S = 0.4, 1.0
outcome = watched.run_batch(Reader('r', read, (modelfile,)), 0, 0, 2)
print(json.dumps([f['what'] for f in outcome.findings]))
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=TESTS, capture_output=True, text=True, timeout=300
    )


def lay(files, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_every_reader_takes_its_seeds(tmp_path):
    def check(reader: Reader) -> None:
        for seed in reader.seeds:
            reader.read(lay(seed.files, tmp_path / f"{reader.name} {seed.name}"))

    check_each(check, READERS.values())


def test_inputs_are_drawn_by_their_number_alone():
    for reader in READERS.values():
        for index in range(20):
            (seed, rng), (_, again) = reader.draw(7, index), reader.draw(7, index)
            assert mutated(seed, rng) == mutated(seed, again)
        assert reader.draw(7, 0)[1].random() != reader.draw(8, 0)[1].random()


def test_marks_lie_where_things_are():
    text = json.dumps({"a": [1, {"b": "c, d"}], "e": {}})
    found = {text[m.start : m.end] for m in json_marks(text)}
    assert found == {
        *('"a"', '"b"', '"e"', "1", '"c, d"', "{}", '{"b": "c, d"}', '[1, {"b": "c, d"}]'),
        *('"b": "c, d"', '"e": {}', '"a": [1, {"b": "c, d"}]', text),
    }
    for mark in json_marks(json.dumps(CONFIG)):
        if mark.kind == "json-value":
            json.loads(json.dumps(CONFIG)[mark.start : mark.end])


@pytest.mark.parametrize("what", FAULTY)
def test_a_reader_that_breaks_the_contract_is_found(what):
    done = run("-c", SCRIPT.replace("{fault}", FAULTY[what]))
    assert done.returncode == 0, done.stderr
    assert what in done.stdout


def test_a_slice_of_the_run(tmp_path):
    """The same inputs every time; `make fuzz` has others."""
    done = run(
        "-m", "fuzzing.campaign", "--inputs", "9000", "--seed", "1", "--state", str(tmp_path)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads((tmp_path / "state.json").read_text())["readers"]
    assert counts.keys() == READERS.keys()
    for name, found in counts.items():
        # Not all is refused, nor taken: mutations reach what lies behind the first check.
        assert found["n"] >= 200 and 0.02 * found["n"] < found["accepted"], name


def test_a_run_goes_on_where_it_was_and_its_failures_are_read_again(tmp_path):
    words = ("-m", "fuzzing.campaign", "--seed", "3", "--state", str(tmp_path))
    run(*words, "--inputs", "100")
    done = run(*words, "--inputs", "200")
    counts = json.loads((tmp_path / "state.json").read_text())["readers"].values()
    n = sum(found["n"] for found in counts)
    assert 195 <= n <= 205 and f"{n} inputs of seed 3" in done.stdout
    saved = tmp_path / "x.json"
    saved.write_text(json.dumps({"reader": "digests", "files": {"SHA256SUMS": "eA=="}}))
    again = run("-m", "fuzzing.campaign", "--replay", str(saved))
    assert again.returncode == 1 and "line 1 is no line of sha256sum" in again.stderr


def test_the_table_of_the_runs_is_that_of_their_results():
    benchmarks = TESTS.parent / "benchmarks"
    page = (benchmarks / "README.md").read_text()
    found = [
        json.loads(x) for x in (benchmarks / "results" / "fuzz.jsonl").read_text().splitlines()
    ]
    for name in READERS:
        mine = [x for x in found if x["reader"] == name]
        broken = sum(sum(x["findings"].values()) for x in mine)
        cells = (
            name,
            f"{sum(x['n'] for x in mine):,}",
            f"{sum(x['accepted'] for x in mine):,}",
            str(broken),
            f"{max(x['slowest_s'] for x in mine):.3f}",
            f"{max(x['extra_bytes'] for x in mine) / 1e6:.1f}",
        )
        assert f"| {' | '.join(cells)} |" in page
    for seed in {x["seed"] for x in found}:
        n = sum(x["n"] for x in found if x["seed"] == seed)
        assert f"{n:,}" in page and str(seed) in page
