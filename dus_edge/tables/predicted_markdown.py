"""The page TABLES.md: predictions in short, by family and beside public guides."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dus_edge.predict.devices import find_device, load_rules
from dus_edge.predict.prediction import StorableModel, memory_settings, predict_on
from dus_edge.predict.stored_model import RunSettings
from dus_edge.tables.frontier.text import divergence_markdown
from dus_edge.tables.measured import (
    Line,
    machine_names,
    measured_markdown,
    quality_markdown,
)
from dus_edge.tables.predicted import (
    MODEL,
    PRESET_COLUMNS,
    USUAL,
    Column,
    Row,
    solar_config,
    solar_parameters,
)
from dus_edge.tables.tasks import tasks_markdown
from dus_edge.words import figure, format_bytes, markdown_table

#: What public guides say of SOLAR 10.7B: file and VRAM in GB, and where Q4_K_M runs.
GUIDES: Mapping[str, tuple[float, float]] = {
    "f16": (21, 24),
    "q8_0": (11, 13),
    "q4_k_m": (6, 7),
    "q4_0": (5.5, 6.5),
}
GUIDED_DEVICES = (("rtx-3060-12gb", 12.0), ("rtx-4060", 8.0), ("m1-8c", 8.0))
#: The classes of the table in short: what, backend, families that begin so, GB.
_CLASSES = (
    ("cards", "nvidia-", ("desktop", "laptop"), (8, 12, 16, 24)),
    ("Macs", "apple-", ("",), (8, 16, 24, 32)),
)
_GPTQ = (
    "GPTQ-int4 has groups of 128. Its memory is what transformers takes while it reads a prompt of "
    "the whole context, its speed ExLlamaV2's (transformers' own is several times less). Nothing "
    "of it goes to the CPU: *no* where it does not fit whole. Macs have no kernel for it: *slow*, "
    "no speed is predicted.\n"
)
_MLX = (
    "MLX, which runs on Macs beside llama.cpp, is **not predicted**: no run of it is among the "
    "published measurements.\n"
)


def tables_markdown(
    settings: RunSettings,
    rows: Sequence[Row],
    lines: Sequence[Line] = (),
    results: Sequence[Mapping[str, Any]] = (),
    evaluations: Sequence[Mapping[str, Any]] = (),
    divergence: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page: in short, a table per family, public guides beside ours, then what was measured."""
    here = {r.device.family for r in rows}
    families = {f: title for f, title in load_rules().families.items() if f in here}
    titles = families.values()
    machines = f": {'; '.join(machine_names(lines))}" if lines else ""
    links = ", ".join(f"[{t}](#{anchor(t)})" for t in titles)
    parts = [
        f"# What fits, and how fast: {MODEL}\n",
        "`dus-edge bench tables` wrote this page; the same figures are in "
        "[tables.csv](tables.csv) and [tables.json](tables.json). What is **predicted** and what "
        "is **measured** stand apart. Method, errors and limits: [README.md](README.md).\n",
        "- [In short](#in-short): the usual file by size of memory, predicted\n"
        f"- [Predicted](#predicted), by family: {links}\n"
        "- [Beside public guides](#beside-public-guides)\n"
        f"- [Measured](#measured){machines}\n"
        "- [Quality](#quality), measured\n"
        f"{'- [Divergence](#divergence), measured' + chr(10) if divergence else ''}"
        "- [Tasks](#tasks), measured\n",
        _in_short(settings, rows),
        "## Predicted\n",
        f"**None of this is measured.** Context {settings.context:,}, cache {settings.type_k}, "
        f"flash attention {'on' if settings.flash_attn else 'off'}, llama.cpp of {settings.era}, "
        "nothing else on the device but what its system takes (Windows for GeForce cards, macOS 26 "
        "for Macs). *Usable* is what that leaves in GiB; *takes* is what the model then needs.\n",
        "A cell is generation in tok/s with its 80 % interval, **bold** where the whole model is "
        "on the GPU. *-ngl n* means that the whole does not fit and n of its "
        f"{_layers()} layers do, the rest running on the CPU; *?* that the verdict is within "
        "3 % of the usable memory.\n",
        _GPTQ,
        _MLX,
        f"Files: {', '.join(_file_size(c) for c in PRESET_COLUMNS)}.\n",
    ]
    for family, title in families.items():
        parts.append(f"### {title}\n")
        parts.append(_family_table([r for r in rows if r.device.family == family]))
    parts.append(_guides(rows))
    parts.append(measured_markdown(lines, MODEL, solar_parameters()))
    parts.append(quality_markdown(results, MODEL, solar_parameters()))
    if divergence:
        parts.append(divergence_markdown(divergence))
    parts.append(tasks_markdown(evaluations))
    return "\n".join(parts)


def anchor(title: str) -> str:
    """What GitHub links a heading by."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _in_short(settings: RunSettings, rows: Sequence[Row]) -> str:
    """One line per size of memory: does the usual file fit, how fast, which is the largest."""
    title = _column(USUAL).title
    split = ", ".join(c.title for c in PRESET_COLUMNS if c.splits)
    found = []
    for what, family, kinds, sizes in _CLASSES:
        for gb in sizes:
            mine = [
                r
                for r in rows
                if r.memory_gb == gb
                and r.device.family.startswith(family)
                and r.device.family.endswith(kinds)
            ]
            if mine:
                found.append([f"{gb:g} GB {what}", *_short_cells(mine)])
    return "\n".join(
        [
            "## In short\n",
            f"{title} at {settings.context:,} tokens of context, **predicted**; *tok/s* of "
            "generation, from the slowest device of the size to the fastest.\n",
            markdown_table(
                ["GPU memory", "devices", f"{title} on the GPU", "spare", "tok/s", "largest sure"],
                found,
                left=(0, 2, 5),
            )
            + "\n",
            f"*Largest sure* is the largest of {split} that is on the GPU whole with more than 3 % "
            "to spare on all of them; *?* marks verdicts that are closer than that.\n",
        ]
    )


def _short_cells(rows: Sequence[Row]) -> list[str]:
    verdicts = [r.cells[USUAL].verdict for r in rows]
    spare = min(v.usable_bytes - v.use.total_bytes for v in verdicts)
    if all(v.fits for v in verdicts):
        whole = "whole"
    elif any(v.fits for v in verdicts):
        whole = "whole on some"
    else:
        layers = {v.offloaded_layers for v in verdicts}
        whole = f"{_span(layers, str)} of {_layers()} layers"
    close = any(r.cells[USUAL].verdict.close for r in rows)
    speeds = [s.tg_tokens_per_s for r in rows if (s := r.cells[USUAL].speed)]
    sure = next(
        (
            c.title
            for c in sorted(
                PRESET_COLUMNS, key=lambda c: -rows[0].cells[c.key].verdict.use.total_bytes
            )
            if c.splits
            and all(r.cells[c.key].verdict.fits and not r.cells[c.key].verdict.close for r in rows)
        ),
        "none",
    )
    return [
        f"{len(rows)}",
        whole + " ?" * close,
        _spare(spare),
        _span(speeds, _speed) if speeds else "–",
        sure,
    ]


def _family_table(rows: Sequence[Row]) -> str:
    """A line for each device; memory sizes that make no difference share one."""
    needs = [
        _span({r.cells[c.key].verdict.use.total_bytes / 2**30 for r in rows}, lambda x: f"{x:.1f}")
        for c in PRESET_COLUMNS
    ]
    lines = [["*takes, GiB*", "", "", *(f"*{need}*" for need in needs)]]
    merged: dict[tuple[str, ...], list[Row]] = {}
    for row in sorted(rows, key=_row_rank):
        merged.setdefault((row.device.id, *map(_cell(row), PRESET_COLUMNS)), []).append(row)
    for (_, *cells), same in merged.items():
        sizes = ", ".join(f"{r.memory_gb:g}" for r in same)
        usable = ", ".join(f"{_usable(r) / 2**30:.1f}" for r in same)
        lines.append([same[0].device.short_name, sizes, usable, *cells])
    head = ["device", "GB", "usable", *(c.title for c in PRESET_COLUMNS)]
    return markdown_table(head, lines) + "\n"


def _cell(row: Row) -> Callable[[Column], str]:
    def cell(column: Column) -> str:
        p = row.cells[column.key]
        s, v = p.speed, p.verdict
        mark = " ?" * p.verdict.close
        if not v.fits and not (column.splits and v.offloaded_layers):
            return f"no{mark}"
        ngl = "" if v.fits else f"<br>-ngl {v.offloaded_layers}"
        if s is None:
            return f"{'slow' if v.note else 'fits' if v.fits else '–'}{ngl}{mark}"
        rate = _speed(s.tg_tokens_per_s)
        interval = f"{_speed(s.tg_tokens_per_s_low)}–{_speed(s.tg_tokens_per_s_high)}"
        return f"{f'**{rate}**' if v.fits else rate} ({interval}){ngl}{mark}"

    return cell


def _guides(rows: Sequence[Row]) -> str:
    big = next(r for r in rows if r.device.id == "rtx-4090")
    lines = []
    for preset, (file_gb, vram_gb) in GUIDES.items():
        total = big.cells[preset].verdict.use.total_bytes
        lines.append(
            [
                _column(preset).title,
                f"{file_gb:g} GB",
                f"{_file_bytes(_column(preset)) / 1e9:.1f} GB",
                f"{vram_gb:g} GB",
                f"{total / 1e9:.1f} GB",
            ]
        )
    text = [
        "## Beside public guides\n",
        "What guides to SOLAR 10.7B state, and ours at 4,096 tokens of context (decimal GB, on an "
        "RTX 4090; VRAM is predicted):\n",
        markdown_table(
            ["preset", "file, guides", "file, ours", "VRAM, guides", "VRAM, ours"], lines
        )
        + "\n",
        "They also say that Q4_K_M runs on these:\n",
    ]
    found = []
    for device, gb in GUIDED_DEVICES:
        row = next(r for r in rows if r.device.id == device and r.memory_gb == gb)
        v = row.cells["q4_k_m"].verdict
        longest = f"{v.longest_context:,}" if v.longest_context else "none"
        found.append(
            [
                row.device.short_name,
                f"{gb:g}",
                "yes" if v.fits else "no",
                _spare(v.usable_bytes - v.use.total_bytes),
                longest,
            ]
        )
    head = ["device", "GB", "whole at 4,096", "to spare", "longest context whole"]
    text.append(markdown_table(head, found) + "\n")
    text.append(_guides_verdict(rows))
    return "\n".join(text)


def _guides_verdict(rows: Sequence[Row]) -> str:
    """What the tables say of the guides' claim about devices of 8 GB."""
    said = []
    for name, what in (("m1-8c", "the 8 GB Mac"), ("rtx-4060", "8 GB cards")):
        row = next(r for r in rows if r.device.id == name and r.memory_gb == 8)
        p = row.cells["q4_k_m"]
        right = "right" if p.verdict.fits else "wrong"
        said.append(f"{right} about {what}{' (by a hair, if at all)' * p.verdict.close}")
    return (
        f"So at this context the guides are {' and '.join(said)}. {_without_flash_attention()}"
        "macOS lets the GPU use about "
        "three quarters of the memory: of what does not fit some layers stay on the CPU, or the "
        "limit is raised with `sudo sysctl iogpu.wired_limit_mb=…`.\n"
    )


def _without_flash_attention() -> str:
    """How the closest of these verdicts turns out otherwise."""
    model = _column(USUAL).store(solar_config(), MODEL)
    settings = memory_settings(model, flash_attn=False)
    v = predict_on(StorableModel(model, {}), find_device("rtx-4060"), settings).verdict
    spare = v.usable_bytes - v.use.total_bytes
    said = f"{format_bytes(spare)} are left" if v.fits else f"{format_bytes(-spare)} are missing"
    return f"Without flash attention, {said} on an RTX 4060. "


def _column(key: str) -> Column:
    return next(c for c in PRESET_COLUMNS if c.key == key)


def _file_bytes(column: Column) -> int:
    return column.store(solar_config(), MODEL).weights_bytes


def _file_size(column: Column) -> str:
    return f"{column.title} {_file_bytes(column) / 2**30:.2f} GiB"


def _layers() -> int:
    """Layers and the output, which `-ngl` counts too."""
    return solar_config().n_layers + 1


def _usable(row: Row) -> int:
    return row.cells[USUAL].verdict.usable_bytes


def _row_rank(row: Row) -> tuple[Any, ...]:
    """Cards by number; Macs as the database has them: Pro before Max."""
    if row.device.family.startswith("apple-"):
        return ()
    parts = re.split(r"(\d+)", row.device.short_name)
    return *(int(p) if p.isdigit() else p for p in parts), row.memory_gb


def _span(values: Iterable[float], spell: Callable[[float], str]) -> str:
    """One value, or the smallest and the largest, as they are spelled."""
    ordered = sorted(values)
    return "–".join(dict.fromkeys(map(spell, (ordered[0], ordered[-1]))))


def _spare(n_bytes: int) -> str:
    return f"{'−' if n_bytes < 0 else ''}{format_bytes(abs(n_bytes))}"


def _speed(x: float) -> str:
    return figure(x, whole_from=20)
