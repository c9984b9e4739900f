"""What was measured, as Markdown and rows: which line counts, and what a reader is told."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dus_edge.measure.record import read_lines, read_quality
from dus_edge.tables.measured import (
    machine_names,
    markdown_table,
    measured_markdown,
    measured_rows,
    newest,
    quality_markdown,
    quality_rows,
)

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
LINE: dict[str, Any] = {
    "engine": "llama-cpp-python 0.3.36",
    "build_commit": "0c1e570",
    "gpu_info": "",
    "backends": "CPU",
    "model_filename": "build/solar-q4_k_m.gguf",
    "model_type": "llama 34B Q4_K - Medium",
    "model_size": 6 * 2**30,
    "model_n_params": 10_731_524_096,
    "n_threads": 8,
    "n_gpu_layers": -1,
    "flash_attn": -1,
    "type_k": "f16",
    "type_v": "f16",
    "test": "tg128",
    "test_time": "2026-01-02T00:00:00Z",
    "avg_ts": 10.5,
    "stddev_ts": 0.25,
    "load_s": 1.5,
    "time_to_first_token_s": None,
    "peak_memory_bytes": 7 * 2**30,
    "baseline_memory_bytes": 2**26,
    "joules_per_token": None,
    "cpu": "Some CPU",
    "cores": 8,
    "memory_bytes": 32 * 2**30,
    "os": "Debian 13",
    "python": "3.13.1",
    "dus_edge": "0.1.0",
    "commit": "abc1234",
}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def tables(text: str) -> list[list[dict[str, str]]]:
    """The tables of a page as a reader of Markdown sees them; all rows as wide as their head."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append(cells(line))
        elif rows:
            head, marks, *body = rows
            assert all(mark.strip("-:") == "" for mark in marks)
            assert {len(row) for row in rows} == {len(head)}
            found.append([dict(zip(head, row, strict=True)) for row in body])
            rows = []
    return found


# Which line counts


def test_the_newest_line_of_a_test_counts():
    old = LINE | {"test_time": "2026-01-01T00:00:00Z", "avg_ts": 1.0}
    assert newest([LINE, old]) == [LINE]
    assert newest([old, LINE]) == [LINE]
    again = LINE | {"avg_ts": 2.0}
    assert newest([LINE, again]) == [again], "the later of two of the same second"


def test_what_is_compared_and_what_is_not():
    for same in (
        {"engine": "llama-cpp-python 0.4.0", "build_commit": "fff"},
        {"model_filename": "/elsewhere/solar-q4_k_m.gguf"},
        {"os": "Debian 14", "python": "3.14", "commit": None},
        {"memory_bytes": 32 * 2**30 - 2**20},
    ):
        assert len(newest([LINE, LINE | same])) == 1, same
    for other in (
        {"engine": "transformers 5.0, torch 2.6"},
        {"model_filename": "build/solar-q8_0.gguf"},
        {"model_n_params": 8_000_000},
        {"test": "pp512"},
        {"n_threads": 4},
        {"backends": "CUDA"},
        {"n_gpu_layers": 10},
        {"type_k": "q8_0"},
        {"cpu": "Another"},
        {"gpu_info": "NVIDIA H100"},
    ):
        assert len(newest([LINE, LINE | other])) == 2, other


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9)), max_size=20))
def test_newest_is_the_latest_of_each(found):
    lines = [LINE | {"test": t, "test_time": f"2026-01-0{day}"} for t, day in found]
    latest = {t: max(day for name, day in found if name == t) for t, _ in found}
    kept = newest(lines)
    assert {x["test"]: x["test_time"] for x in kept} == {
        t: f"2026-01-0{day}" for t, day in latest.items()
    }
    shuffled = random.Random(0).sample(lines, len(lines))
    assert sorted(x["test_time"] for x in newest(shuffled)) == sorted(x["test_time"] for x in kept)


# Speed


def test_a_line_is_shown_with_its_machine_engine_and_settings():
    prompt = LINE | {"test": "pp512", "avg_ts": 1234.5, "time_to_first_token_s": 0.4147}
    text = measured_markdown([LINE, prompt])
    assert "### Some CPU, 8 cores, 32 GiB, Debian 13\n" in text
    assert "llama-cpp-python 0.3.36, build 0c1e570, CPU, 8 threads, cache f16, 10.73 B" in text
    assert "64.0 MiB in use before the model was loaded" in text
    assert "dus-edge 0.1.0 (abc1234), 2026-01-02:" in text
    ((first, second),) = tables(text)
    assert first == {
        "model": "solar-q4_k_m",
        "stored as": "Q4_K - Medium",
        "size": "6.00 GiB",
        "test": "tg128",
        "tok/s": "10.50 ± 0.25",
        "peak memory": "7.00 GiB",
        "load": "1.5 s",
        "first token": "",
    }
    assert (second["tok/s"], second["first token"]) == ("1,234 ± 0", "415 ms")
    small = LINE | {"model_filename": "pico.gguf", "model_n_params": 8_132_864}
    ((first, second),) = tables(measured_markdown([LINE, small]))
    assert (first["parameters"], second["parameters"]) == ("10.73 B", "8.13 M")
    # Joules that no driver counted make no column.
    assert "J/token" not in text
    assert "J/token" in measured_markdown([LINE | {"joules_per_token": 1.25}])


def test_machines_and_engines_have_tables_of_their_own():
    gpu = LINE | {"gpu_info": "NVIDIA H100", "backends": "CUDA", "n_gpu_layers": 20}
    torch = LINE | {"engine": "transformers 5.0, torch 2.6", "build_commit": None}
    text = measured_markdown([LINE, gpu, torch])
    assert len(tables(text)) == 3
    assert text.count("\n### ") == 2
    assert "### NVIDIA H100, Some CPU" in text
    assert "-ngl 20" in text
    assert machine_names([LINE, gpu, torch]) == [
        "Some CPU, 8 cores, 32 GiB, Debian 13",
        "NVIDIA H100, Some CPU, 8 cores, 32 GiB, Debian 13",
    ]


def test_other_models_than_the_pages_are_said_to_be():
    said = "None of these models is SOLAR"
    assert said not in measured_markdown([LINE], "SOLAR", 10_731_524_096)
    assert said in measured_markdown([LINE | {"model_n_params": 8_000_000}], "SOLAR", 10**10)


def test_rows_keep_every_key():
    (row,) = measured_rows([LINE])
    assert row == {"source": "measured", **LINE}


def test_nothing_measured_says_how():
    assert "make bench" in measured_markdown([])
    assert "make bench" in quality_markdown([])


def test_bars_in_names_do_not_break_a_table():
    assert tables(markdown_table(["a", "b"], [["x|y", "1"]])) == [[{"a": "x/y", "b": "1"}]]


# Quality


def test_quality_is_what_the_file_says():
    result = read_quality(RESULTS / "quality.json")
    text = quality_markdown([result], "SOLAR-DUS 10.7B", 10_731_524_096)
    first = tables(text)[0]
    reference, *rows = first
    assert reference["file"] == f"{result['reference']['name']} (reference)"
    for row, c in zip(rows, result["candidates"], strict=True):
        total = c["total"]
        assert row["file"] == c["name"]
        assert math.isclose(float(row["bits/weight"]), c["bits_per_weight"], abs_tol=0.01)
        for head, key in (("perplexity", "perplexity"), ("KL", "kl_nats")):
            value, error = map(float, row[head].split(" ± "))
            assert math.isclose(value, total[key], rel_tol=0.1, abs_tol=error)
        assert math.isclose(float(row["KL, 99 %"]), total["kl_p99_nats"], rel_tol=1e-3)
        assert row["same top-1"] == f"{100 * total['same_top_share']:.2f} %"
        change = 100 * (total["perplexity"] / total["perplexity_reference"] - 1)
        said = float(row["change"].split(" %")[0].replace("−", "-"))
        assert math.isclose(said, change, abs_tol=0.006)
    assert "**not SOLAR-DUS 10.7B**" in text
    assert result["text"]["sha256"][:12] in text


def test_the_pages_own_model_is_not_denied():
    result = read_quality(RESULTS / "quality.json")
    n = result["reference"]["n_parameters"]
    assert "**not" not in quality_markdown([result], "pico", n)


def test_languages_have_columns_where_there_are_several():
    result = read_quality(RESULTS / "quality.json")
    one = result["candidates"][0]["total"]
    several = json.loads(json.dumps(result))
    several["text"]["chunks"] = {"en": 3, "ko": 4}
    for c in several["candidates"]:
        c["languages"] = {"en": one, "ko": one | {"kl_nats": None, "perplexity": None}}
    by_language = tables(quality_markdown([several]))[1]
    assert [row["file"] for row in by_language] == [c["name"] for c in several["candidates"]]
    assert by_language[0]["ko: KL"] == "∞"
    assert by_language[0]["en: same top-1"] == f"{100 * one['same_top_share']:.2f} %"
    rows = quality_rows([several])
    assert {row["language"] for row in rows} == {None, "en", "ko"}
    assert {row["source"] for row in rows} == {"measured"}
    assert len(rows) == 3 * len(several["candidates"])
    assert len({tuple(row) for row in rows}) == 1, "all rows have the same keys"


def test_what_is_tracked_can_be_read():
    lines = read_lines(RESULTS / "measured.jsonl")
    shown = [row for found in tables(measured_markdown(lines)) for row in found]
    assert len(shown) == len(newest(lines)) > 0
    for row, line in zip(shown, newest(lines), strict=True):
        assert math.isclose(
            float(row["tok/s"].split(" ±")[0].replace(",", "")), line["avg_ts"], rel_tol=0.005
        )
