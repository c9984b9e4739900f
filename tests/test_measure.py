"""`bench run`: llama-bench's figures, llama.cpp's and transformers' models, what a run takes."""

from __future__ import annotations

import json
import math
import mmap
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dus_edge.errors import CheckpointError, DependencyError, DusEdgeError, UsageError
from dus_edge.jobs.export.gguf import export_gguf
from dus_edge.machine import physical_cores
from dus_edge.measure import resources
from dus_edge.measure.bench import bench_run
from dus_edge.measure.measurement import About, Measurement, json_lines, measurement_json, speed
from dus_edge.measure.resources import (
    MeasuredMemory,
    Meter,
    high_water_bytes,
    joules_between,
    joules_per_token,
    rapl_counters,
)
from dus_edge.measure.speed_table import speed_table
from dus_edge.measure.workload import BenchSettings, Workload
from dus_edge.quant.recipe import find_preset
from dus_edge.upscale.model import plan_chooser

from .test_quality import gptq_folder

SHORT = BenchSettings(n_prompt=24, n_gen=6, repetitions=2, n_threads=1, device="cpu")

#: Lines of ``llama-bench -o json`` of llama.cpp 0c1e570, its own sums over its own samples.
LLAMA_BENCH = (
    {
        "avg_ns": 14700231,
        "stddev_ns": 1309441,
        "avg_ts": 4371.014161,
        "stddev_ts": 389.353580,
        "samples_ns": [15626146, 13774316],
        "n_prompt": 64,
        "n_gen": 0,
    },
    {
        "avg_ns": 15150807,
        "stddev_ns": 99632,
        "avg_ts": 2112.144385,
        "stddev_ts": 13.889608,
        "samples_ns": [15080356, 15221258],
        "n_prompt": 0,
        "n_gen": 32,
    },
)
LLAMA_BENCH_KEYS = {
    *("build_commit", "cpu_info", "gpu_info", "backends", "model_filename", "model_type"),
    *("model_size", "model_n_params", "n_batch", "n_ubatch", "n_threads", "type_k", "type_v"),
    *("n_gpu_layers", "flash_attn", "n_prompt", "n_gen", "n_depth", "test_time", "avg_ns"),
    *("stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts"),
}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    choose = plan_chooser(None, None, (), False)
    return export_gguf("pico", choose, [find_preset("q4_k_m")], folder).outputs[0].path


# Sums


@pytest.mark.parametrize("line", LLAMA_BENCH)
def test_statistics_are_those_of_llama_bench(line):
    samples = line["samples_ns"]
    found = speed(samples, [line["n_prompt"] + line["n_gen"]] * len(samples))
    assert found.avg_ns == line["avg_ns"]
    # Its integers round inside the sum.
    assert found.stddev_ns == pytest.approx(line["stddev_ns"], abs=5)
    assert found.avg_ts == pytest.approx(line["avg_ts"], abs=1e-6)
    assert found.stddev_ts == pytest.approx(line["stddev_ts"], abs=1e-6)


@given(st.lists(st.tuples(st.integers(1, 10**13), st.integers(1, 10**5)), min_size=1, max_size=9))
def test_statistics_are_numpys(samples):
    ns, tokens = zip(*samples, strict=True)
    found = speed(ns, tokens)
    rates = 1e9 * np.array(tokens) / np.array(ns)
    assert found.avg_ts == pytest.approx(rates.mean())
    expected = rates.std(ddof=1) if len(ns) > 1 else 0.0
    assert found.stddev_ts == pytest.approx(expected, rel=1e-6, abs=1e-6 * rates.max())


def test_tests_are_named_and_ordered_as_llama_bench_does():
    names = [test.name for test in BenchSettings(depths=(0, 4096)).tests()]
    assert names == ["pp512", "tg128", "pp512 @ d4096", "tg128 @ d4096"]
    assert [test.name for test in BenchSettings(n_prompt=0).tests()] == ["tg128"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_prompt": -1},
        {"n_prompt": 0, "n_gen": 0},
        {"repetitions": 0},
        {"depths": (0, -4)},
        {"depths": ()},
        {"n_threads": 0},
        {"n_batch": 0},
        {"n_gpu_layers": -2},
        {"type_k": "q9"},
        {"flash_attn": "maybe"},
    ],
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(UsageError):
        BenchSettings(**wrong)


def measured_once(
    name: str = "m.gguf",
    samples: Sequence[int] = (10**9,),
    n_bytes: int | None = None,
    joules: float | None = None,
    load_s: float | None = 1.0,
    test: Workload = Workload(512, 0, 4096),  # noqa: B008
) -> Measurement:
    memory = None if n_bytes is None else MeasuredMemory(0, n_bytes, "rss")
    about = About("x", None, None, None, None, name, "llama", None, None)
    tokens = (test.n_tokens,) * len(samples)
    return Measurement(about, test, tuple(samples), tokens, "", load_s, None, memory, joules)


#: A name, times, bytes and joules that once made a line of 82 columns.
WIDE = ("a" * 9, [10**5, 2 * 10**5], 10**13, 5e-324)


@given(
    st.text("abcdefgh-_.日本", min_size=1, max_size=90),
    st.lists(st.integers(10**5, 10**12), min_size=1, max_size=3),
    st.none() | st.integers(0, 10**13),
    st.none() | st.floats(0, 1e6),
)
@example(*WIDE)
def test_no_line_of_a_table_is_over_80_columns(name, samples, n_bytes, joules):
    one = measured_once(name, samples, n_bytes, joules)
    assert all(len(line) <= 80 for line in speed_table([one, one]).splitlines())
    assert json.loads(json_lines([one]))["peak_memory_bytes"] == n_bytes


@given(
    st.text("abcdefgh-_.日本", min_size=1, max_size=90),
    st.lists(st.integers(1, 10**300), min_size=1, max_size=3),
    st.none() | st.integers(0, 10**300),
    st.none() | st.floats(),
    st.none() | st.floats(),
    st.builds(
        Workload,
        st.integers(1, 10**30),
        st.just(0) | st.integers(1, 10**30),
        st.just(0) | st.integers(1, 10**30),
    ),
)
@example("m", [1, 10**300], 10**300, -5e-324, -5e-324, Workload(10**30, 10**30, 10**30))
@example("m", [10**300, 10**300 - 1], 10**300, math.inf, math.nan, Workload(1, 0))
def test_the_most_extreme_numbers_keep_a_table_readable(
    name, samples, n_bytes, joules, load_s, test
):
    """Every number whole and its own, every row as wide as the head; names at least begun."""
    lines = speed_table(
        [measured_once(name, samples, n_bytes, joules, load_s, test), measured_once()]
    ).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) <= 80
    head, extreme, plain = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])
    )
    assert len(head) == len(extreme) == len(plain)
    found = dict(zip(head, extreme, strict=True))
    for key, whole in (("model", Path(name).name), ("test", test.name)):
        assert found[key][:1] == whole[:1] and len(found[key]) >= min(len(whole), 6)
    s = speed(samples, [test.n_tokens] * len(samples))
    shown = dict(zip(("avg", "dev"), found["tokens/s"].split(" ± "), strict=True))
    shown |= {"load": found.get("load s"), "joules": found.get("J/token")}
    meant = {"avg": s.avg_ts, "dev": s.stddev_ts, "load": load_s, "joules": joules}
    for key, value in meant.items():
        if value is None:
            assert not shown[key]
        else:
            # Two decimals, or two digits that count: the largest may round to infinity.
            value = float(f"{value:.1e}")
            assert float(shown[key]) == pytest.approx(value, rel=0.051, abs=0.0051, nan_ok=True)
    if n_bytes is not None:
        amount, unit = found["memory"].split()
        size = float(amount) * 1024 ** ("B", "KiB", "MiB", "GiB").index(unit)
        assert size == pytest.approx(n_bytes, rel=0.051)


# llama.cpp


def test_a_gguf_file_is_measured(gguf):
    settings = BenchSettings(
        n_prompt=24, n_gen=6, repetitions=2, n_threads=1, depths=(0, 40), n_batch=16
    )
    found = bench_run([gguf], settings)
    assert [m.test.name for m in found] == ["pp24", "tg6", "pp24 @ d40", "tg6 @ d40"]
    for m in found:
        line = measurement_json(m)
        assert line.keys() >= LLAMA_BENCH_KEYS
        assert len(line["samples_ns"]) == 2 and min(line["samples_ns"]) > 0
        pairs = zip(line["samples_ns"], line["samples_ts"], strict=True)
        assert [ns * ts / 1e9 for ns, ts in pairs] == pytest.approx([m.test.n_tokens] * 2)
        assert min(line["samples_ns"]) <= line["avg_ns"] <= max(line["samples_ns"])
        assert min(line["samples_ts"]) <= line["avg_ts"] <= max(line["samples_ts"])
        assert line["model_n_params"] == 5771520
        # How much the model adds is the next test's: other tests' memory goes meanwhile here.
        assert min(line["peak_memory_bytes"], line["baseline_memory_bytes"]) > 0
        assert line["load_s"] > 0
        timed = m.test.n_prompt > 0
        assert (line["time_to_first_token_s"] is not None) == timed
    assert len(json_lines(found).splitlines()) == 4


def test_memory_in_a_process_of_its_own(gguf, cli):
    """Weights are mapped, so the peak is the baseline, the file and what computing takes."""
    done = cli("bench", "run", gguf, "-p", "24", "-n", "2", "-r", "1", "--json")
    assert done.returncode == 0, done.stderr
    for line in map(json.loads, done.stdout.splitlines()):
        added = line["peak_memory_bytes"] - line["baseline_memory_bytes"]
        assert line["baseline_memory_bytes"] > 0
        assert gguf.stat().st_size / 2 < added < 500e6


def test_the_calls_are_those_of_llama_bench(gguf, monkeypatch):
    """Sizes and order of batches, and what is in the cache before each; by a listening library."""
    import llama_cpp

    calls: list[object] = []
    real = llama_cpp.llama_decode

    def decode(context, batch):
        memory = llama_cpp.llama_get_memory(context)
        calls.append((llama_cpp.llama_memory_seq_pos_max(memory, 0) + 1, batch.n_tokens))
        return real(context, batch)

    monkeypatch.setattr(llama_cpp, "llama_decode", decode)
    settings = BenchSettings(
        n_prompt=20, n_gen=3, repetitions=2, depths=(8,), n_batch=16, n_threads=1
    )
    bench_run([gguf], settings)
    warm_up_prompt = [(0, 16), (16, 4)]
    prompt_at_8 = [(8, 16), (24, 4)]
    generate_at_8 = [(8, 1), (9, 1), (10, 1)]
    # The state of the depth is computed once, for both tests.
    assert calls == [
        *warm_up_prompt, (0, 8), *prompt_at_8, *prompt_at_8,
        (0, 1), *generate_at_8, *generate_at_8,
    ]  # fmt: skip


def test_a_cache_of_another_type_takes_less(gguf):
    """`n_ctx` and the cache's type reach llama.cpp: its own account of the cache's size."""
    import llama_cpp

    from dus_edge.measure.gguf import _context, _Runner
    from dus_edge.run.llama import llama_library, load_model

    sizes = {}
    llama_library()
    with load_model(gguf) as model:
        for kind in ("f16", "q8_0"):
            settings = BenchSettings(type_k=kind, type_v=kind, flash_attn="on", n_threads=1)
            test = Workload(96, 0)
            with _context(gguf, model, test, settings) as context:
                _Runner(gguf, model, context, test, 2048, 1).warm_up()
                assert 96 <= llama_cpp.llama_n_ctx(context) <= 256
                sizes[kind] = llama_cpp.llama_state_seq_get_size(context, 0)
    # 34 bytes for 32 values against 64; the state has little else.
    assert sizes["q8_0"] / sizes["f16"] == pytest.approx(34 / 64, rel=0.05)


def test_threads_are_attached_as_llama_bench_attaches_them(gguf):
    from dus_edge.run.ggml import Ggml
    from dus_edge.run.llama import llama_library

    llama_library()
    params = Ggml()._params(3)
    assert params is not None
    assert (params.n_threads, params.prio, params.poll) == (3, 0, 50)


def test_what_cannot_be_measured_is_one_sentence(gguf, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"pp600 needs a context of 600 tokens.*ends at 512"):
        bench_run([gguf], BenchSettings(n_prompt=600, n_gen=1))
    with pytest.raises(UsageError, match=r"tg8 @ d510 needs"):
        bench_run([gguf], BenchSettings(n_prompt=0, n_gen=8, depths=(0, 510)))
    with pytest.raises(UsageError, match="does not exist"):
        bench_run([tmp_path / "none.gguf"])
    (tmp_path / "no.gguf").write_text("GGML")
    with pytest.raises(UsageError, match="no GGUF"):
        bench_run([tmp_path / "no.gguf"])
    data = gguf.read_bytes()
    for left in (100, len(data) // 2, len(data) - 4096):
        (tmp_path / "cut.gguf").write_bytes(data[:left])
        with pytest.raises(CheckpointError, match=r"cut\.gguf") as e:
            bench_run([tmp_path / "cut.gguf"], SHORT)
        assert "\n" not in str(e.value)
    from dus_edge.run import llama as llama_library

    llama_library.llama_library.cache_clear()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    try:
        with pytest.raises(DependencyError, match=r"dus-edge\[llama\]"):
            bench_run([gguf], SHORT)
    finally:
        llama_library.llama_library.cache_clear()


# transformers


def test_a_plain_folder_is_measured(make_checkpoint):
    folder = make_checkpoint()
    settings = BenchSettings(
        n_prompt=24, n_gen=4, repetitions=2, n_threads=1, depths=(0, 32), device="cpu"
    )
    found = bench_run([folder], settings)
    assert [m.test.name for m in found] == ["pp24", "tg4", "pp24 @ d32", "tg4 @ d32"]
    line = measurement_json(found[0])
    assert line["model_type"] == "llama bfloat16"
    assert line["backends"] == "cpu"
    assert line["engine"].startswith("transformers ")


def test_the_cache_is_as_deep_before_each_repetition(make_checkpoint):
    import torch
    import transformers

    from dus_edge.measure.folder import _Runner

    model = transformers.AutoModelForCausalLM.from_pretrained(make_checkpoint()).eval()
    runner = _Runner(model, torch.device("cpu"), Workload(0, 3, 10), 4)
    with torch.inference_mode():
        runner.warm_up()
        for _ in range(2):
            runner.prepare()
            assert runner._cache.get_seq_length() == 10
            runner.run()
            assert runner._cache.get_seq_length() == 13


def test_folders_that_lack_something_are_one_sentence(make_checkpoint):
    folder = make_checkpoint()
    with pytest.raises(UsageError, match="ends at 128"):
        bench_run([folder], BenchSettings(n_prompt=200, n_gen=1))
    with pytest.raises(UsageError, match="--device nowhere"):
        bench_run([folder], BenchSettings(n_prompt=8, n_gen=1, device="nowhere"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(DusEdgeError) as e:
        bench_run([folder], SHORT)
    assert "\n" not in str(e.value)


def test_bitsandbytes_says_what_it_computes_in(make_checkpoint, tmp_path):
    import torch
    import transformers

    details = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    transformers.AutoModelForCausalLM.from_pretrained(
        make_checkpoint(), quantization_config=details, dtype=torch.bfloat16
    ).save_pretrained(tmp_path / "nf4")
    line = measurement_json(bench_run([tmp_path / "nf4"], SHORT)[-1])
    assert line["model_type"] == "llama NF4 in bfloat16"
    assert line["avg_ts"] > 0


def test_gptq_says_that_it_is_dequantized(tmp_path):
    gptq_folder(tmp_path / "gptq", tmp_path / "plain", 4, 32)
    line = measurement_json(bench_run([tmp_path / "gptq"], SHORT)[0])
    assert line["model_type"] == "llama GPTQ int4 dequantized to float32"
    # Its files are smaller than what they become.
    plain = measurement_json(bench_run([tmp_path / "plain"], SHORT)[0])
    assert line["model_size"] < plain["model_size"]
    assert line["model_n_params"] == plain["model_n_params"]


# Memory and energy


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="a mark of Linux's kernel")
def test_peak_memory_is_what_was_taken_and_given_back():
    meter = Meter(on_gpu=False)
    size = 256 << 20
    # Pages of its own: memory that malloc already holds would not show. The
    # kernel counts pages per CPU and sums them loosely, hence the margins.
    with mmap.mmap(-1, size) as taken:
        for page in range(0, size, mmap.PAGESIZE):
            taken[page] = 1
    use = meter.memory()
    assert use.source == "rss"
    assert 0.75 * size < use.peak_bytes - use.baseline_bytes < 1.25 * size
    meter.restart_peak()
    assert meter.memory().peak_bytes < use.peak_bytes - 0.5 * size


def test_the_high_water_mark_is_found_among_the_rest():
    text = "Name:\tpython\nVmPeak:\t 900 kB\nVmHWM:\t     421 kB\nVmRSS:\t 12 kB\n"
    assert high_water_bytes(text) == 421 * 1024


def rapl(root: Path, name: str, zone: str, energy: int, wrap: int = 262_143_328_850) -> None:
    (root / name).mkdir(parents=True, exist_ok=True)
    for file, text in (("name", zone), ("energy_uj", energy), ("max_energy_range_uj", wrap)):
        (root / name / file).write_text(f"{text}\n")


def test_only_whole_processors_count_and_counters_wrap(tmp_path):
    rapl(tmp_path, "intel-rapl:0", "package-0", 5_000_000, 10_000_000)
    rapl(tmp_path, "intel-rapl:0:0", "core", 4_000_000)
    rapl(tmp_path, "intel-rapl:1", "psys", 9_000_000)
    before = {name: joules for name, joules, _ in rapl_counters(tmp_path)}
    assert before == {"intel-rapl:0": 5.0}
    rapl(tmp_path, "intel-rapl:0", "package-0", 1_000_000, 10_000_000)
    after = {name: joules for name, joules, _ in rapl_counters(tmp_path)}
    assert joules_between(before, after, {"intel-rapl:0": 10.0}) == pytest.approx(6.0)
    assert joules_between({}, {}, {}) is None


def test_energy_is_not_told_of_spans_too_short_for_the_counters():
    assert joules_per_token(30.0, 2.0, 60) == 0.5
    assert joules_per_token(30.0, 0.1, 60) is None
    assert joules_per_token(None, 2.0, 60) is None


class Nvml(types.ModuleType):
    """Two boards; this process is on the second one."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, knows_process: bool = True, counts_energy: bool = True) -> None:
        super().__init__("pynvml")
        self.own, self.used, self.mj = 0, [100, 200], [1000, 5000]
        self.knows_process, self.counts_energy = knows_process, counts_energy

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, i: int) -> int:
        return i

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> object:
        return types.SimpleNamespace(used=self.used[handle] + self.own * (handle == 1))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[object]:
        other = types.SimpleNamespace(pid=1, usedGpuMemory=77)
        ours = types.SimpleNamespace(pid=os.getpid(), usedGpuMemory=self.own)
        return [other, ours] if handle == 1 and self.own and self.knows_process else [other]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        if not self.counts_energy:
            raise self.NVMLError("Not Supported")
        return self.mj[handle]


@pytest.mark.parametrize("knows_process", [True, False])
def test_gpu_memory_and_energy_are_of_the_board_that_is_used(monkeypatch, knows_process):
    nvml = Nvml(knows_process=knows_process)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter = Meter(on_gpu=True)
    nvml.own = 5000
    before = meter.counters()
    meter.poll()
    nvml.own = 4000
    nvml.mj = [9000, 7500]
    assert meter.joules(before, meter.counters()) == pytest.approx(2.5)
    source = "nvml" if knows_process else "nvml-device"
    assert meter.memory() == MeasuredMemory(0, 5000, source)
    assert meter.energy_source == "nvml"


def test_boards_without_a_counter_and_machines_without_boards(monkeypatch):
    nvml = Nvml(counts_energy=False)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter = Meter(on_gpu=True)
    nvml.own = 10
    assert meter.joules(meter.counters(), meter.counters()) is None
    assert meter.energy_source is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(resources, "_RAPL", Path("/nonexistent"))
    assert Meter(on_gpu=True).memory().source in ("rss", "footprint")


def test_cores_are_no_more_than_this_process_may_use():
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)
    assert math.isfinite(physical_cores())
