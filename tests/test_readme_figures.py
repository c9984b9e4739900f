"""The figures of README.md and docs/ are those of the files they come from, rounded."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import pytest

from dus_edge import data
from dus_edge.checkpoint.config import tensor_shapes
from dus_edge.predict.devices import find_device, load_devices, load_rules
from dus_edge.predict.memory.cuda import cuda_overhead_bytes, multiprocessors
from dus_edge.predict.memory.llama import model_of_config
from dus_edge.predict.stored_model import MIB
from dus_edge.quant.recipe import PRESETS, find_preset
from dus_edge.tables.predicted import solar_config

from .scripts import read_published

ROOT = Path(__file__).parent.parent
#: A figure may stand on any page, and on several.
PAGES = "\n".join(
    path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
)
#: Without line breaks, which move.
FLOWING = re.sub(r"\s+", " ", PAGES)
NUMBER = r"(\d+(?:,\d{3})*(?:\.\d+)?)"


def results(name: str) -> list[dict[str, Any]]:
    path = ROOT / "benchmarks" / "results" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def said(pattern: str, text: str = FLOWING) -> list[str]:
    """The numbers of the place that reads so, or of all that do; `#` stands for a number."""
    found = set(re.findall(pattern.replace("#", NUMBER), text))
    assert found, f"no place reads {pattern!r}"
    assert len(found) == 1, f"places that read {pattern!r} differ: {found}"
    (numbers,) = found
    return list(numbers) if isinstance(numbers, tuple) else [numbers]


def agree(text: str, value: float) -> None:
    """A figure as it is printed, with as many decimals as it has."""
    decimals = len(text.partition(".")[2])
    assert text.replace(",", "") == f"{value:.{decimals}f}", f"{text} for {value}"


def error(lines: list[dict[str, Any]], key: str = "predicted", factor: float = 1.0) -> float:
    """Mean |predicted / measured − 1|, percent."""
    return 100 * mean(abs(factor * x[key] / x["measured"] - 1) for x in lines)


@pytest.fixture(scope="module")
def speed() -> dict[str, Any]:
    return tomllib.loads(data.read_text("speed.toml"))


@pytest.fixture(scope="module")
def speed_lines() -> dict[str, list[dict[str, Any]]]:
    """Cross-validated predictions of the rows that were fitted to."""
    lines = [x for x in results("speed") if x["decides"]]
    return {kind: [x for x in lines if x["kind"] == kind] for kind in ("tg", "pp")}


# Will it fit, and how fast


def test_devices_are_counted():
    for pattern in ("lists the # cards and Macs", "# cards and Macs"):
        (n,) = said(pattern)
        assert int(n) == len(load_devices())


def test_memory_errors_are_those_of_the_check():
    lines = [x for x in results("memory") if x["kind"] == "published"]
    n, worst = said("all # published readings that state their inputs are reproduced to within # %")
    assert int(n) == len(lines)
    largest = max(100 * abs(x["error"]) for x in lines if x["error"] is not None)
    # "within": rounded up, not further than to the last digit printed.
    assert largest <= float(worst) < largest + 0.1


def test_speed_errors_are_those_of_the_fit(speed):
    (n,) = said("fitted to # published rates of llama-bench")
    assert int(n) == sum(speed[k]["cross_validation"]["rows"] for k in ("tg", "pp"))
    figures = said("the mean error is # % for generation and # % for prompts")
    for text, kind in zip(figures, ("tg", "pp"), strict=True):
        agree(text, 100 * speed[kind]["cross_validation"]["mean_absolute_error"])


def test_shares_in_the_intervals_are_those_of_the_fit(speed):
    (text,) = said("# % of the rates lie in their intervals")
    for kind in ("tg", "pp"):
        agree(text, 100 * speed[kind]["cross_validation"]["coverage"])
    (n,) = said(r"Other tools' rates \(#,")
    assert int(n) == sum(speed[k]["other_tools"]["rows"] for k in ("tg", "pp"))
    figures = said("kept apart: # and # %, of which # and # % lie in the intervals")
    keys = [("tg", "mean_absolute_error"), ("pp", "mean_absolute_error")]
    keys += [("tg", "coverage"), ("pp", "coverage")]
    for text, (kind, key) in zip(figures, keys, strict=True):
        agree(text, 100 * speed[kind]["other_tools"][key])


def test_partly_offloaded_runs_are_those_of_the_check():
    lines = results("offload")
    (text,) = said("not stated, are off by up to # %")
    agree(text, max(100 * abs(x["predicted"] / x["measured"] - 1) for x in lines))
    assert len(lines) == 6
    assert sum(x["low"] <= x["measured"] <= x["high"] for x in lines) == 5


def test_processors_are_those_of_the_fit():
    table = tomllib.loads(data.read_text("cpu_speed.toml"))
    figures = said(r"rate \(# on desktops, # on laptops\), a prompt # \(AVX2\) or # \(AVX-512\)")
    values = [*map(table["efficiency"].get, ("desktop", "laptop"))]
    values += map(table["core_gflops"].get, ("avx2", "avx512"))
    for text, value in zip(figures, values, strict=True):
        agree(text, value)
    for text, kind in zip(said("left out the mean error is # and # %"), ("tg", "pp"), strict=True):
        agree(text, 100 * table["left_out"][f"{kind}_mean_absolute_error"])


def test_speed_results_are_of_the_same_fit(speed, speed_lines):
    for kind, lines in speed_lines.items():
        expected = speed[kind]["cross_validation"]
        assert len(lines) == expected["rows"]
        assert error(lines) == pytest.approx(100 * expected["mean_absolute_error"], abs=0.001)


def test_the_yardstick_is_that_of_the_rows(speed_lines):
    (text,) = said("0.55 × bandwidth ÷ bytes is off by # %")
    agree(text, error(speed_lines["tg"], "bandwidth_over_bytes", 0.55))


def test_the_least_certain_family_is_named(speed_lines):
    name, text = re.findall(
        rf"Generation on ([\w ]+) is the least certain \({NUMBER} % mean error\)", FLOWING
    )[0]
    families = {x["family"] for x in speed_lines["tg"]}
    errors = {f: error([x for x in speed_lines["tg"] if x["family"] == f]) for f in families}
    worst = max(errors, key=errors.__getitem__)
    assert load_rules().families[worst].replace(",", "") == name
    agree(text, errors[worst])


def test_the_table_in_short_is_that_of_the_tables():
    rows = [x for x in PAGES.splitlines() if re.match(r"\| \d+ GB (cards|Macs) \|", x)]
    tables = (ROOT / "benchmarks" / "TABLES.md").read_text().splitlines()
    assert len(rows) >= 8
    assert [x for x in tables if re.match(r"\| \d+ GB (cards|Macs) \|", x)] == rows


def test_cuda_takes_what_the_rule_says():
    small, big, n = said(
        "# MiB on an RTX 4060, # MiB on an RTX 4090, a rule from # published readings"
    )
    for text, name in ((small, "rtx-4060"), (big, "rtx-4090")):
        card = find_device(name)
        n_sm = multiprocessors(card.cuda_cores, card.compute_capability)
        agree(text, cuda_overhead_bytes(n_sm, card.compute_capability) / MIB)
    assert int(n) == len(read_published("overhead")["rows"])


def test_gptq_is_as_certain_as_its_rows():
    rate, n = said("constant of its own is off by # % on # published runs")
    kernel = tomllib.loads(data.read_text("gptq_speed.toml"))["exllamav2"]
    agree(rate, 100 * kernel["tried"]["none"])
    assert int(n) == kernel["interval"]["rows"]


# Presets


def test_the_table_of_presets_is_what_they_make():
    config = solar_config()
    n_parameters = sum(math.prod(shape) for shape in tensor_shapes(config).values())
    cells = re.findall(r"\| ([a-z0-9_, ]+?) \| ([\d.]+) GiB \| ([\d.]+) ", PAGES)
    seen = []
    for names, size, bits in cells:
        for name in names.split(", "):
            n_bytes = model_of_config(config, find_preset(name)).weights_bytes
            agree(size, n_bytes / 2**30)
            agree(bits, 8 * n_bytes / n_parameters)
            seen.append(name)
    assert sorted(seen) == sorted(PRESETS)
    agree(*said(r"32 → 48 layers, # B parameters\), as `inspect` computes"), n_parameters / 1e9)


def test_the_tour_shows_the_same_sizes():
    config = solar_config()
    n_parameters = sum(math.prod(shape) for shape in tensor_shapes(config).values())
    rows = re.findall(r"^(\w+) +([\d.]+) GiB +([\d.]+)$", PAGES, re.MULTILINE)
    assert len(rows) >= 3
    for name, size, bits in rows:
        n_bytes = model_of_config(config, find_preset(name)).weights_bytes
        agree(size, n_bytes / 2**30)
        agree(bits, 8 * n_bytes / n_parameters)


# Measured


def newest(lines: list[dict[str, Any]], what: str, value: Callable[[dict], float]) -> float:
    """The median of the runs of a name that were made at the newest commit it was run at."""
    mine = [x for x in lines if x["what"] == what]
    return median(value(x) for x in mine if x["commit"] == mine[-1]["commit"])


def test_the_table_of_the_export_is_its_newest_runs():
    lines = [x for x in results("export") if x["layers"] == 8]
    for label, ours, theirs in (
        ("base → Q4_K_M", "base to q4_k_m", "llama_model_quantize q4_k_m"),
        ("base → Q8_0", "base to q8_0", "llama_model_quantize q8_0"),
        ("up-scale to safetensors", "upscale to safetensors", "cp of the checkpoint"),
    ):
        figures = said(
            rf"\| {label} \| # s \| # GB \| # GB \| [^|]+ \| # s \| # \|",
        )
        time, memory, written, other, ratio = figures
        own = newest(lines, ours, lambda x: x["wall_s"])
        beside = newest(lines, theirs, lambda x: x["wall_s"])
        agree(time, own)
        agree(memory, newest(lines, ours, lambda x: x["peak_rss_bytes"]) / 1e9)
        agree(written, newest(lines, ours, lambda x: x["written_bytes"]) / 1e9)
        agree(other, beside)
        assert float(ratio) == pytest.approx(own / beside, abs=0.006)
    whole = [x for x in results("export") if x["layers"] == 32]
    agree(*said("B parameters, takes # s to Q4_K_M"), newest(whole, "base to q4_k_m", wall))


def wall(line: dict[str, Any]) -> float:
    return line["wall_s"]


def test_gptq_is_what_was_measured():
    lines = [x for x in results("gptq") if x["model"] == "pico" and x["bits"] == 4]
    rises = {
        x["side"]: 100 * math.expm1(x["log_ratio"]) for x in lines if x.get("log_ratio") is not None
    }
    ours, nearest, theirs = said(
        "rises by # %, where rounding to nearest costs # % and GPTQModel on the same text # %"
    )
    agree(ours, rises["dus-edge"])
    agree(nearest, rises["nearest"])
    agree(theirs, rises["GPTQModel"])
    timed = [x for x in lines if "wall_s" in x]
    newest = [x for x in timed if x["commit"] == timed[-1]["commit"]]
    times = {
        side: float(np.median([x["wall_s"] for x in newest if x["side"] == side]))
        for side in ("dus-edge", "GPTQModel")
    }
    for text, side in zip(
        said(r"it took # s on two cores, GPTQModel # s"), ("dus-edge", "GPTQModel"), strict=True
    ):
        agree(text, times[side])


def test_importance_matrices_are_what_was_measured():
    lines = results("imatrix")
    last = {
        (x["preset"], x["imatrix"]): x["kl"] for x in lines if x["digest"] == lines[-1]["digest"]
    }
    presets = list(dict.fromkeys(p for p, _ in last))
    falls = [100 * (1 - last[p, k] / last[p, "none"]) for p in presets for k in ("built-in mix",)]
    falls += [100 * (1 - last[p, "Python sources"] / last[p, "none"]) for p in presets]
    low, high = said("the divergence from F16 falls by # to # % with q4_k_m, q3_k_m and q2_k")
    assert presets == ["q4_k_m", "q3_k_m", "q2_k"]
    agree(low, min(falls))
    agree(high, max(falls))


def test_quantizers_are_as_fast_as_was_measured():
    newest_of: dict[tuple[str, bool], dict[str, Any]] = {}
    for x in results("quantizers"):
        if x["data"] == "gaussian":
            newest_of[x["type"], x["importance"]] = x
    ratio = {
        key: np.median(x["seconds"]["ggml"]) / np.median(x["seconds"]["native"])
        for key, x in newest_of.items()
    }
    times, low, high = said(
        "that is # times ggml's speed for Q4_K, Q5_K and Q6_K, # to # for Q3_K and Q8_0"
    )
    for name in ("Q4_K", "Q5_K", "Q6_K"):
        assert ratio[name, False] >= float(times)
    assert int(low) <= min(ratio["Q3_K", False], ratio["Q8_0", False])
    assert max(ratio["Q3_K", False], ratio["Q8_0", False]) <= int(high)


def test_no_error_of_a_quantizer_is_higher_than_ggmls():
    assert len(re.findall(r"no higher than ggml's (?:for any type )?on any tensor", FLOWING)) == 2
    lines = results("quantizer_errors")
    newest_of = {(x["type"], x["importance"], x["data"], x["tensor"]): x for x in lines}
    for x in newest_of.values():
        by = "importance" if x["importance"] else "plain"
        assert x["native_rmse"][by] <= x["ggml_rmse"][by], x


def test_the_built_in_base_is_what_its_card_says():
    card = (ROOT / "dus_edge" / "data" / "pico" / "README.md").read_text()
    rows = re.findall(
        r"^\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGES, re.MULTILINE
    )
    assert len(rows) == 1
    for figure in rows[0]:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}", card), figure
