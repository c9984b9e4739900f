"""The tables of what fits and how fast: SOLAR's shape on every device that is known."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dus_edge import data
from dus_edge.bench.devices import load_devices
from dus_edge.bench.memory import Settings, model_of_config
from dus_edge.checkpoint.config import ModelConfig, parse_config
from dus_edge.files import check_absent, check_writable, write_text
from dus_edge.prediction import Candidate, Prediction, memory_settings, predict_on
from dus_edge.prediction_report import prediction_json
from dus_edge.quant.recipe import find_preset

PRESETS = ("f16", "q8_0", "q4_k_m", "q4_0")
SOLAR = "solar-10.7b.json"
#: What public guides say of SOLAR 10.7B: file and VRAM in GB, and where Q4_K_M runs.
GUIDES: Mapping[str, tuple[float, float]] = {
    "f16": (21, 24),
    "q8_0": (11, 13),
    "q4_k_m": (6, 7),
    "q4_0": (5.5, 6.5),
}
GUIDED_DEVICES = (("rtx-3060-12gb", 12.0), ("rtx-4060", 8.0), ("m1-8c", 8.0))
_FAMILIES = {
    "nvidia-30-desktop": "RTX 30, desktop",
    "nvidia-40-desktop": "RTX 40, desktop",
    "nvidia-50-desktop": "RTX 50, desktop",
    "nvidia-20-desktop": "RTX 20, desktop",
    "nvidia-laptop": "RTX, laptop",
    "nvidia-pro": "RTX, workstation",
    "nvidia-datacenter": "Datacenter",
    "apple-m1": "Apple M1",
    "apple-m2": "Apple M2",
    "apple-m3": "Apple M3",
    "apple-m4": "Apple M4",
    "apple-m5": "Apple M5",
}


@dataclass(frozen=True)
class Row:
    """One device in one memory size: a prediction for every preset."""

    device_id: str
    name: str
    family: str
    memory_gb: float
    cells: Mapping[str, Prediction]


def solar_config() -> ModelConfig:
    """The configuration of SOLAR 10.7B."""
    raw = json.loads(data.read_text(SOLAR))
    return parse_config({k: v for k, v in raw.items() if not k.startswith("_")}, SOLAR)


def predict_all(config: ModelConfig, name: str) -> tuple[Settings, list[Row]]:
    """Every device with every memory size, at 4,096 tokens of context with flash attention."""
    models = {p: model_of_config(config, find_preset(p), f"{name}-{p.upper()}") for p in PRESETS}
    settings = memory_settings(models[PRESETS[0]])
    rows = []
    for device in load_devices():
        for gb in device.memory_gb_options:
            cells = {
                p: predict_on(Candidate(m, {}), device, settings, memory_gb=gb)
                for p, m in models.items()
            }
            rows.append(Row(device.id, device.name, device.family, gb, cells))
    return settings, rows


def write_tables(folder: Path, *, overwrite: bool) -> list[Path]:
    """Write TABLES.md, tables.csv and tables.json; returns their paths.

    Raises:
        OutputError: one exists and is not to be replaced, or the folder cannot be written.
    """
    paths = [folder / name for name in ("TABLES.md", "tables.csv", "tables.json")]
    check_absent(paths, overwrite)
    check_writable(folder)
    config = solar_config()
    settings, rows = predict_all(config, "SOLAR-DUS-10.7B")
    texts = (markdown(settings, rows), as_csv(rows), json.dumps(as_json(rows)) + "\n")
    for path, text in zip(paths, texts, strict=True):
        write_text(path, text)
    return paths


def markdown(settings: Settings, rows: Sequence[Row]) -> str:
    """One table per family, then what public guides say beside ours."""
    parts = [
        "# What fits, and how fast: SOLAR-DUS 10.7B\n",
        "**Predicted**, none of it measured: `dus-edge bench tables` wrote this page. "
        f"Context {settings.context:,}, cache {settings.type_k}, flash attention "
        f"{'on' if settings.flash_attn else 'off'}, llama.cpp of {settings.era}, nothing else on "
        "the device but what its system takes (Windows for GeForce cards, macOS 26 for Macs).\n",
        "A cell: memory in GiB of what is usable; then generation in tok/s with its 80 % interval. "
        "*-ngl n* means that the whole does not fit and n layers do; **?** that the verdict is "
        "within 3 % of the usable memory. Method, errors and limits: [README.md](README.md).\n",
        f"Files: {', '.join(_file_size(p) for p in PRESETS)}.\n",
    ]
    for family in dict.fromkeys(r.family for r in rows):
        mine = [r for r in rows if r.family == family]
        parts.append(f"## {_FAMILIES.get(family, family)}\n")
        head = ["device", "GB", *(p.upper() for p in PRESETS)]
        parts.append(_table(head, ([_short(r), f"{r.memory_gb:g}", *_cells(r)] for r in mine)))
    parts.append(_guides(rows))
    return "\n".join(parts)


def as_csv(rows: Sequence[Row]) -> str:
    """One line for each device, memory size and preset."""
    out = io.StringIO()
    lines = as_json(rows)
    flat = [{**{k: v for k, v in x.items() if k != "memory"}, **x["memory"]} for x in lines]
    writer = csv.DictWriter(out, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One object for each device, memory size and preset; keys of `bench predict --json`."""
    return [
        {"preset": preset, **prediction_json(p)} for row in rows for preset, p in row.cells.items()
    ]


def _guides(rows: Sequence[Row]) -> str:
    big = next(r for r in rows if r.device_id == "rtx-4090")
    lines = []
    for preset, (file_gb, vram_gb) in GUIDES.items():
        use = big.cells[preset].verdict.use
        file_bytes, total = _file_bytes(preset), use.total_bytes
        lines.append(
            [
                preset.upper(),
                f"{file_gb:g} GB",
                f"{file_bytes / 1e9:.1f} GB",
                f"{vram_gb:g} GB",
                f"{total / 1e9:.1f} GB",
            ]
        )
    text = [
        "## Beside public guides\n",
        "What guides to SOLAR 10.7B state, and ours at 4,096 tokens of context (decimal GB, on an "
        "RTX 4090):\n",
        _table(["preset", "file, guides", "file, ours", "VRAM, guides", "VRAM, ours"], lines),
        "They also say that Q4_K_M runs on these:\n",
    ]
    found = []
    for device, gb in GUIDED_DEVICES:
        row = next(r for r in rows if r.device_id == device and r.memory_gb == gb)
        v = row.cells["q4_k_m"].verdict
        spare = (v.usable_bytes - v.use.total_bytes) / 2**20
        longest = f"{v.longest_context:,}" if v.longest_context else "none"
        found.append(
            [_short(row), f"{gb:g}", "yes" if v.fits else "no", f"{spare:,.0f} MiB", longest]
        )
    head = ["device", "GB", "whole at 4,096", "to spare", "longest context whole"]
    text.append(_table(head, found))
    text.append(
        "So at this context the guides are wrong about the 8 GB Mac, and about 8 GB cards they are "
        "right by a hair, if at all. macOS lets the GPU use about three quarters of the memory: "
        "some layers stay on the CPU, or the limit is raised with "
        "`sudo sysctl iogpu.wired_limit_mb=…`.\n"
    )
    return "\n".join(text)


def _cells(row: Row) -> Iterable[str]:
    for p in row.cells.values():
        v = p.verdict
        total, usable = v.use.total_bytes / 2**30, v.usable_bytes / 2**30
        unsure = " **?**" if abs(total - usable) < 0.03 * usable else ""
        where = "" if v.fits else f", -ngl {v.offloaded_layers}"
        speed = "–"
        if p.speed is not None:
            s = p.speed
            speed = (
                f"{_rate(s.tg_tokens_per_s)} "
                f"({_rate(s.tg_tokens_per_s_low)}–{_rate(s.tg_tokens_per_s_high)})"
            )
        yield f"{total:.1f} of {usable:.1f}{where}{unsure}; {speed}"


def _file_bytes(preset: str) -> int:
    return model_of_config(solar_config(), find_preset(preset)).weights_bytes


def _file_size(preset: str) -> str:
    return f"{preset.upper()} {_file_bytes(preset) / 2**30:.2f} GiB"


def _short(row: Row) -> str:
    return row.name.removeprefix("NVIDIA ").removeprefix("GeForce ").removeprefix("Apple ")


def _rate(x: float) -> str:
    return f"{x:.0f}" if x >= 20 else f"{x:.1f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, marks, *rows)) + "\n"
