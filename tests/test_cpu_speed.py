"""Processors alone: their spelling, the rules, and the published rows that they come from."""

from __future__ import annotations

import json
import math
import re
import tomllib
from dataclasses import replace
from types import ModuleType

import pytest

from dus_edge import data
from dus_edge.errors import UsageError
from dus_edge.predict.devices import find_device
from dus_edge.predict.prediction import (
    StorableModel,
    choose_device,
    memory_settings,
    predict_on,
)
from dus_edge.predict.processors import find_processor, memory_gbps
from dus_edge.predict.report import prediction_text
from dus_edge.predict.speed.cpu import host_gbps, predict_cpu
from dus_edge.predict.speed.work import Work, bytes_per_weight
from dus_edge.tables.predicted import PRESET_COLUMNS, solar_config

from .cases import check_each
from .scripts import BENCHMARKS, load_script, read_published
from .shapes import LLAMA3_8B, dense_work

ROWS = read_published("cpu")["rows"]


@pytest.fixture(scope="module")
def fit_cpu() -> ModuleType:
    return load_script("fit_cpu_speed")


def solar(preset: str = "q4_k_m") -> StorableModel:
    column = next(c for c in PRESET_COLUMNS if c.key == preset)
    return StorableModel(column.store(solar_config(), "SOLAR"), {})


def test_spellings():
    def check(case):
        name, expected = case
        d = choose_device(name)
        assert (d.bandwidth_gbps, d.cpu_cores, d.simd, d.family) == expected
        assert d.backend == "CPU"

    check_each(
        check,
        [
            ("cpu-ddr4-3200", (51.2, None, None, "cpu-desktop")),
            ("CPU-DDR5-5600-8c", (89.6, 8, None, "cpu-desktop")),
            ("cpu-ddr5-5600-16c-avx512", (89.6, 16, "avx512", "cpu-desktop")),
            ("cpu-ddr4-2400-4c-avx2-laptop", (38.4, 4, "avx2", "cpu-laptop")),
        ],
    )


def test_bad_spellings():
    def check(name):
        with pytest.raises(UsageError, match=r"cpu-ddr5-5600-8c-avx512"):
            choose_device(name)

    check_each(check, ["cpu-ddr9-3200", "cpu-3200", "cpu-ddr4-3200-0c", "cpu-ddr4-3200-8c-sse"])
    with pytest.raises(UsageError, match="named like ddr4-3200"):
        memory_gbps("HBM")


def test_more_memory_bandwidth_and_cores_are_faster():
    work = dense_work("q4_k_m", LLAMA3_8B)
    names = ("cpu-ddr4-2400-4c", "cpu-ddr4-3200-6c", "cpu-ddr5-5600-8c", "cpu-ddr5-8000-16c")
    speeds = [predict_cpu(find_processor(n), work) for n in names]
    assert [s.tg_tokens_per_s for s in speeds] == sorted(s.tg_tokens_per_s for s in speeds)
    assert [s.pp_tokens_per_s for s in speeds] == sorted(s.pp_tokens_per_s for s in speeds)
    # No token is faster than its bytes through the memory.
    for name, s in zip(names, speeds, strict=True):
        assert s.tg_tokens_per_s < find_processor(name).bandwidth_gbps * 1e9 / work.weight_bytes
        assert s.tg_tokens_per_s_low < s.tg_tokens_per_s < s.tg_tokens_per_s_high
        assert s.pp_tokens_per_s_low < s.pp_tokens_per_s < s.pp_tokens_per_s_high
    deep = predict_cpu(find_processor(names[0]), work, depth=8192)
    assert deep.tg_tokens_per_s < speeds[0].tg_tokens_per_s
    assert deep.pp_tokens_per_s < speeds[0].pp_tokens_per_s
    smaller = dense_work("q4_0", LLAMA3_8B)
    assert (
        predict_cpu(find_processor(names[0]), smaller).tg_tokens_per_s > speeds[0].tg_tokens_per_s
    )


@pytest.mark.parametrize("pair", [("Q3_K", "IQ3_S"), ("Q2_K", "IQ2_S"), ("Q2_K", "IQ2_XS")])
def test_a_type_that_keeps_cores_busy_may_be_slower(pair):
    """As many bytes in IQ3_S as in Q3_K: the same at best, and a lower low end."""
    plain, busy = pair
    n = 2e9 * bytes_per_weight(plain) / bytes_per_weight(busy)
    processor = find_processor("cpu-ddr4-3200")
    shape = dense_work("q4_k_m", LLAMA3_8B).shape
    mixes = ({plain: 2e9}, {plain: 1e9, busy: n / 2}, {busy: n})
    known, half, whole = (predict_cpu(processor, Work(shape, mix)) for mix in mixes)
    assert known.tg_tokens_per_s == half.tg_tokens_per_s == whole.tg_tokens_per_s
    assert known.tg_tokens_per_s_high == whole.tg_tokens_per_s_high
    lows = [x.tg_tokens_per_s_low for x in (known, half, whole)]
    assert lows[0] / lows[2] > 2 and lows[1] == pytest.approx(2 / (1 / lows[0] + 1 / lows[2]))


def test_without_cores_only_generation_is_predicted():
    speed = predict_cpu(find_processor("cpu-ddr4-3200"), dense_work("q4_k_m", LLAMA3_8B))
    assert speed.pp_tokens_per_s is None


def test_a_processor_is_a_device():
    model = solar()
    found = predict_on(model, find_processor("cpu-ddr5-5600-8c"), memory_settings(model.model))
    assert found.verdict.fits
    assert found.verdict.usable_bytes == 16 * 2**30
    text = prediction_text(found)
    assert "Processor, 8 cores, DDR5-5600, two channels, 16 GB\n" in text
    assert "not subtracted" in text
    small = solar("f16")
    found = predict_on(small, find_processor("cpu-ddr5-5600-8c"), memory_settings(small.model))
    assert not found.verdict.fits
    assert found.speed is None


def test_the_present_processor_has_no_known_bandwidth():
    here = replace(find_processor("cpu-ddr4-3200"), id="cpu", bandwidth_gbps=None)
    with pytest.raises(UsageError, match="cpu-ddr4-3200"):
        predict_cpu(here, dense_work("q4_k_m", LLAMA3_8B))


def test_layers_left_to_a_faster_host_are_faster():
    model, card = solar("q8_0"), find_device("rtx-3060-12gb")
    settings = memory_settings(model.model, context=8192)
    slow, fast = (
        predict_on(model, card, settings, host=find_processor(name)).speed.tg_tokens_per_s
        for name in ("cpu-ddr4-2400", "cpu-ddr5-6000")
    )
    assert slow < fast
    assert host_gbps(find_processor("cpu-ddr4-2400")) < 38.4


# --- constants and the rows that they come from --------------------------------------------------


def test_stored_rates_are_those_of_the_fit(fit_cpu):
    stored = tomllib.loads(data.read_text("cpu_speed.toml"))
    for which, name in (("tg", "efficiency"), ("pp", "core_gflops")):
        known = [(c[0], r["cpu"], c[1]) for r in ROWS if (c := fit_cpu.constant(r, which))]
        assert stored[name] == pytest.approx(fit_cpu.means(known), rel=1e-4)
        half = fit_cpu.half_width(fit_cpu.left_out(ROWS, which))
        assert stored["interval"][which] == pytest.approx(half, rel=1e-4)


def test_published_rows_are_predicted(fit_cpu):
    """Of nine rows at most one generation and one prompt rate may be outside its interval."""
    text = (BENCHMARKS / "results" / "cpu_speed.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    stored = tomllib.loads(data.read_text("cpu_speed.toml"))
    for which, column in (("tg", "tg128_tps"), ("pp", "pp512_tps")):
        own = [x for x in lines if x["kind"] == which]
        assert len(own) == sum(column in r for r in ROWS)
        half = stored["interval"][which]
        off = [x for x in own if abs(math.log(x["predicted"] / x["measured"])) > half]
        assert len(off) <= 1


def test_every_row_names_its_source():
    for row in ROWS:
        assert re.fullmatch(
            r"https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+", row["source_url"]
        )
        assert "pp512_tps" in row or {"tg128_tps", "memory", "channels"} <= row.keys()
