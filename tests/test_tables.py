"""The tables of SOLAR 10.7B: what stands in them, and that the tracked ones are today's."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from dus_edge.predict.devices import load_devices
from dus_edge.tables.predicted import PRESET_COLUMNS
from dus_edge.tables.predicted_markdown import anchor

TRACKED = Path(__file__).parent.parent / "benchmarks"
PRESET_KEYS = [c.key for c in PRESET_COLUMNS]
PAGE = (TRACKED / "TABLES.md").read_text()


@pytest.fixture(scope="module")
def tables() -> dict[str, list[dict]]:
    return json.loads((TRACKED / "tables.json").read_text())


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with (TRACKED / "tables.csv").open() as file:
        return list(csv.DictReader(file))


def section(title: str) -> str:
    start = PAGE.index(f"# {title}\n")
    end = re.compile(r"^##+ ", re.MULTILINE).search(PAGE, start + 2)
    return PAGE[start : end.start() if end else None]


def body(text: str) -> list[list[str]]:
    lines = [x.strip("| ").split(" | ") for x in text.splitlines() if x.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines[2:]]


@pytest.fixture(autouse=True)
def quick_page(monkeypatch):
    """The page takes seconds, and has tests of its own."""
    monkeypatch.setattr("dus_edge.tables.page.render_page", lambda measured, advance: "a page")


def test_the_tracked_tables_are_what_is_written(run, tmp_path):
    results = TRACKED / "results"
    found = ("--measured", results / "measured.jsonl", "--quality", results / "quality.json")
    found += ("--evaluation", results / "eval.json")
    found += ("--divergence", results / "divergence.jsonl")
    code, out, err = run("bench", "tables", "-o", tmp_path, *found)
    assert code == 0, err
    for name in ("TABLES.md", "tables.csv", "tables.json"):
        assert str(tmp_path / name) in out
        assert (tmp_path / name).read_text() == (TRACKED / name).read_text(), name
    assert (tmp_path / "index.html").read_text() == "a page"
    code, _, err = run("bench", "tables", "-o", tmp_path)
    assert code == 4
    assert "TABLES.md" in err


def test_results_below_the_folder_are_taken_by_themselves(run, tmp_path):
    (tmp_path / "results").mkdir()
    line = (TRACKED / "results" / "measured.jsonl").read_text().splitlines()[0]
    (tmp_path / "results" / "measured.jsonl").write_text(line)
    assert run("bench", "tables", "-o", tmp_path)[0] == 0
    found = json.loads((tmp_path / "tables.json").read_text())
    assert found["measured"] == [{"source": "measured", **json.loads(line)}]
    assert found["quality"] == found["divergence"] == []
    assert "## Divergence" not in (tmp_path / "TABLES.md").read_text()
    assert "Nothing yet. `make bench` compares" in (tmp_path / "TABLES.md").read_text()


def test_every_device_preset_and_size_is_there_once(tables, rows):
    expected = {
        (d.id, gb, p) for d in load_devices() for gb in d.memory_gb_options for p in PRESET_KEYS
    }
    lines = tables["predicted"]
    assert {(x["device"], x["memory_gb"], x["preset"]) for x in lines} == expected
    assert len(lines) == len(expected)
    assert [r["device"] for r in rows if r["table"] == "predicted"] == [x["device"] for x in lines]
    assert all(d.name.split(" ", 1)[1].removeprefix("GeForce ") in PAGE for d in load_devices())


def test_predicted_and_measured_are_told_apart(tables, rows):
    sources = {name: {x["source"] for x in found} for name, found in tables.items()}
    assert sources == {
        "predicted": {"predicted"},
        "measured": {"measured"},
        "quality": {"measured"},
        "divergence": {"measured"},
        "tasks": {"measured"},
    }
    by_table = {name: [r for r in rows if r["table"] == name] for name in tables}
    assert {k: len(v) for k, v in by_table.items()} == {k: len(v) for k, v in tables.items()}
    used = {
        name: {k for r in found for k, v in r.items() if v} - {"source", "table"}
        for name, found in by_table.items()
    }
    assert {r["source"] for r in by_table["quality"]} == {"measured"}
    # No column holds figures of two kinds.
    assert not used["predicted"] & used["measured"]
    assert not used["measured"] & used["quality"]
    assert not used["quality"] & used["predicted"]
    assert all(k.startswith("divergence_") for k in used["divergence"])
    for row, line in zip(by_table["measured"], tables["measured"], strict=True):
        assert float(row["measured_avg_ts"]) == line["avg_ts"]
    for row, line in zip(by_table["predicted"], tables["predicted"], strict=True):
        assert int(row["total_bytes"]) == line["memory"]["total_bytes"]


def test_every_link_of_the_page_leads_somewhere():
    headings = {anchor(x.lstrip("# ")) for x in PAGE.splitlines() if x.startswith("#")}
    links = re.findall(r"\]\(#([^)]+)\)", PAGE)
    assert set(links) <= headings
    families = [x[4:] for x in section_lines("## Predicted", "## Beside") if x.startswith("### ")]
    assert {anchor(f) for f in families} < set(links)
    for name in re.findall(r"\]\(([^#)]+)\)", PAGE):
        assert (TRACKED / name).exists(), name


def section_lines(start: str, end: str) -> list[str]:
    return PAGE[PAGE.index(f"\n{start}") : PAGE.index(f"\n{end}")].splitlines()


def is_close(line: dict) -> bool:
    usable = line["memory"]["usable_bytes"]
    return abs(usable - line["memory"]["total_bytes"]) < 0.03 * usable


def test_a_cell_is_its_prediction(tables):
    found = {(x["device"], x["memory_gb"], x["preset"]): x for x in tables["predicted"]}
    row = next(r for r in body(section("RTX 30, desktop")) if r[0] == "RTX 3060 12GB")
    assert row[1] == "12"
    whole, part = found["rtx-3060-12gb", 12, "q4_k_m"], found["rtx-3060-12gb", 12, "f16"]
    assert row[2] == f"{whole['memory']['usable_bytes'] / 2**30:.1f}"
    ends = [f"{whole[f'tg_tokens_per_s{e}']:.0f}" for e in ("", "_low", "_high")]
    assert row[3 + PRESET_KEYS.index("q4_k_m")] == "**{}** ({}–{})".format(*ends)
    cell = row[3 + PRESET_KEYS.index("f16")]
    assert "**" not in cell
    assert cell.endswith(f"<br>-ngl {part['offloaded_layers']}")
    close = next(r for r in body(section("RTX 40, desktop")) if r[0] == "RTX 4060")
    cell = close[3 + PRESET_KEYS.index("q4_k_m")]
    assert cell.endswith(" ?") == is_close(found["rtx-4060", 8, "q4_k_m"])
    # What a device of any memory does the same stands once.
    ultra = next(r for r in body(section("Apple M2")) if r[0].startswith("M2 Ultra (60"))
    assert ultra[1] == "64, 128, 192"


def test_the_answers_in_short_are_the_tables(tables):
    found = {r[0]: r for r in body(section("In short"))}
    for name, platform, gb in (
        ("8 GB Macs", "macos26", 8),
        ("16 GB Macs", "macos26", 16),
        ("8 GB cards", "windows", 8),
        ("24 GB cards", "windows", 24),
    ):
        lines = [
            x for x in tables["predicted"] if (x["platform"], x["memory_gb"]) == (platform, gb)
        ]
        mine = [x for x in lines if x["preset"] == "q4_k_m"]
        _, n, where, _, speed, sure = found[name]
        assert int(n) == len(mine)
        if all(x["fits"] for x in mine):
            assert where.startswith("whole")
        elif not any(x["fits"] for x in mine):
            assert where.startswith(f"{min(x['offloaded_layers'] for x in mine)}")
            assert where.removesuffix(" ?").endswith("of 49 layers")
        assert where.endswith(" ?") == any(map(is_close, mine))
        low, high = (float(x) for x in speed.split("–"))
        assert low == pytest.approx(min(x["tg_tokens_per_s"] for x in mine), abs=0.5)
        assert high == pytest.approx(max(x["tg_tokens_per_s"] for x in mine), abs=0.5)
        fit = {
            p: all(x["fits"] and not is_close(x) for x in lines if x["preset"] == p)
            for p in ("f16", "q8_0", "q4_k_m", "q4_0")
        }
        assert sure == next((p.upper() for p, fits in fit.items() if fits), "none")


def test_what_the_guides_get_wrong_is_said():
    guided = section("Beside public guides")
    assert "| M1 (8-core GPU) | 8 | no |" in guided
    assert "| RTX 3060 12GB | 12 | yes |" in guided
