"""The tables of SOLAR 10.7B: what stands in them, and that the tracked ones are today's."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from dus_edge.bench.devices import load_devices
from dus_edge.tables import PRESETS

TRACKED = Path(__file__).parent.parent / "benchmarks"


def test_the_tracked_tables_are_what_is_written(run, tmp_path):
    assert run("bench", "tables", "-o", tmp_path)[0] == 0
    for name in ("TABLES.md", "tables.csv", "tables.json"):
        assert (tmp_path / name).read_text() == (TRACKED / name).read_text(), name
    code, _, err = run("bench", "tables", "-o", tmp_path)
    assert code == 4
    assert "TABLES.md" in err


def test_every_device_preset_and_size_is_there_once():
    lines = json.loads((TRACKED / "tables.json").read_text())
    expected = {
        (d.id, gb, p) for d in load_devices() for gb in d.memory_gb_options for p in PRESETS
    }
    assert {(x["device"], x["memory_gb"], x["preset"]) for x in lines} == expected
    assert len(lines) == len(expected)
    with (TRACKED / "tables.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["device"] for r in rows] == [x["device"] for x in lines]
    page = (TRACKED / "TABLES.md").read_text()
    assert all(d.name.split(" ", 1)[1].removeprefix("GeForce ") in page for d in load_devices())


def test_what_the_guides_get_wrong_is_said():
    page = (TRACKED / "TABLES.md").read_text()
    guided = page[page.index("## Beside public guides") :]
    assert "| M1 (8-core GPU) | 8 | no |" in guided
    assert "| RTX 3060 12GB | 12 | yes |" in guided
