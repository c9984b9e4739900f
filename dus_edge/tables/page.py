"""The page of predictions: one HTML file on which a person picks device, preset and context.

All of it is predicted here and embedded; the page's script looks up and draws. The file loads
nothing: its policy allows no source but the style and the script that stand in it, by their hash.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dus_edge import data
from dus_edge.errors import UsageError
from dus_edge.predict.devices import Device, load_devices, load_rules
from dus_edge.predict.fit import UNSURE, choose_preset, layers_that_fit, settings_on
from dus_edge.predict.memory.folder import TorchPreset, model_of_preset
from dus_edge.predict.memory.llama import memory_use, model_of_config, usable_bytes, usual_platform
from dus_edge.predict.memory.torch import kernel_note
from dus_edge.predict.prediction import StorableModel, memory_settings, predict_on
from dus_edge.predict.report import speed_json
from dus_edge.predict.speed.device import DeviceSpeed, device_speed
from dus_edge.predict.speed.predict import predict
from dus_edge.predict.speed.work import Work, work_of
from dus_edge.predict.stored_model import RunSettings, StoredModel
from dus_edge.progress import Advance, progress
from dus_edge.tables.frontier.panels import FrontierPanel, quality_panels, run_panels
from dus_edge.tables.frontier.section import frontier_section
from dus_edge.tables.predicted import solar_config
from dus_edge.tables.write import MeasuredResults, write_tables

#: A device in one of its memory sizes.
PageRow = tuple[Device, float]

PAGE_FILE = "index.html"
PAGE_PRESETS = (
    *("iq2_m", "q2_k", "iq3_m", "q3_k_m", "iq4_xs", "q4_0", "q4_k_m", "q5_k_m", "q6_k", "q8_0"),
    "f16",
    "gptq-int4",
)
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
#: What `bench predict` is to be given for the same figures: Mistral 7B, up-scaled as SOLAR was.
PAGE_MODEL = "mistralai/Mistral-7B-v0.1 --drop 8"
#: What is chosen when the page is opened.
FIRST = {"device": "rtx-3060-12gb", "memory": 12, "preset": "q4_k_m", "context": 4096}
_SYSTEMS = {
    "windows": "Windows",
    "linux": "a Linux desktop",
    "linux-headless": "a Linux server",
    "macos15": "macOS 15",
    "macos26": "macOS 26",
}
_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">'
    '<rect width="32" height="32" rx="7" fill="#1f5fae"/>'
    '<path d="M7 24V15h4v9zM14 24V8h4v16zM21 24V12h4v12z" fill="#fff"/></svg>'
)


@dataclass(frozen=True)
class Choice:
    """One way to store the model that the page offers.

    Attributes:
        key: in the page's address, and to `--quant`.
        label: what the page calls it.
        model: the model as stored; its context length bounds the page's contexts.
    """

    key: str
    label: str
    model: StoredModel


def solar_choices() -> tuple[Choice, ...]:
    """SOLAR-DUS 10.7B in every preset of the page: GGUF, then others, smallest first."""
    config = replace(solar_config(), context_length=CONTEXTS[-1])
    choices = []
    for key in PAGE_PRESETS:
        preset = choose_preset(key)
        name = f"SOLAR-DUS-10.7B-{preset.label}"
        if isinstance(preset, TorchPreset):
            label = preset.label.replace("-INT", " int")
            choices.append(Choice(key, label, model_of_preset(config, preset, name)))
        else:
            choices.append(Choice(key, preset.label, model_of_config(config, preset, name)))
    return tuple(sorted(choices, key=lambda c: (c.model.torch is not None, c.model.weights_bytes)))


def write_bench_tables(
    folder: Path,
    *,
    overwrite: bool,
    measured: Sequence[Path] = (),
    quality: Sequence[Path] = (),
    evaluations: Sequence[Path] = (),
    divergence: Sequence[Path] = (),
) -> list[Path]:
    """Write the tables and the page, with progress; see `write_tables`."""
    n_rows = sum(len(d.memory_gb_options) for d in load_devices())
    with progress("Predicting", 2 * n_rows, unit="devices") as advance:
        return write_tables(
            folder,
            overwrite=overwrite,
            measured=measured,
            quality=quality,
            evaluations=evaluations,
            divergence=divergence,
            also={PAGE_FILE: functools.partial(render_page, advance=advance)},
            advance=advance,
        )


def render_page(
    measured: MeasuredResults | None = None,
    choices: Sequence[Choice] | None = None,
    devices: Sequence[Device] | None = None,
    advance: Advance = lambda n: None,
) -> str:
    """The page's HTML.

    Args:
        measured: what there is to show beside the predictions; by default nothing.
        choices: what it offers; by default `solar_choices`.
        devices: what it knows; by default all of `load_devices`.
        advance: is told of every device and size of memory that is done.
    """
    grid = page_data(choices or solar_choices(), devices or load_devices(), advance)
    # "<" could end the script element that the data stands in.
    text = json.dumps(grid, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    style, script = data.read_text("page/page.css"), data.read_text("page/page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; "
        f"script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    )
    fields = {
        "POLICY": policy,
        "ICON": f"data:image/svg+xml,{quote(_ICON)}",
        **_errors(),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": text,
        "MEASURED": frontier_section(_panels(measured or MeasuredResults())),
    }
    page = data.read_text("page/page.html")
    for name, value in fields.items():
        page = page.replace(f"@@{name}@@", value)
    return page


def page_data(
    choices: Sequence[Choice], devices: Sequence[Device], advance: Advance = lambda n: None
) -> dict[str, Any]:
    """What the page looks up, as JSON types.

    `memory` has bytes by backend, choice and context: weights, cache, compute; the overhead is by
    runtime in `devices`. `cells` is flat over rows of devices, choices and contexts, three numbers
    each: the largest `-ngl` that fits and the places in `speeds` with an empty cache and with one
    as full as the context; a negative place -n is the n-th of `reasons`. A speed is six rates of
    four digits: generation and prompt, each with the ends of its interval, or null.
    """
    families = load_rules().families
    order = {family: i for i, family in enumerate(families)}
    rows: list[PageRow] = [
        (device, gb)
        for device in sorted(devices, key=lambda d: order[d.family])
        for gb in device.memory_gb_options
    ]
    backends = list(dict.fromkeys(d.backend for d, _ in rows))
    memory = {
        b: [[_parts(c, replace(_settings(c, n), backend=b)) for n in CONTEXTS] for c in choices]
        for b in backends
    }
    speeds = _Speeds()
    layers: dict[tuple[str, RunSettings, int], int] = {}  # cards may be alike in these
    cells: list[int] = []
    for row in rows:
        device, usable = row[0], usable_bytes(row[0], None, row[1])
        for choice in choices:
            for context in CONTEXTS:
                settings = settings_on(device, _settings(choice, context))
                key = (choice.key, settings, usable)
                if key not in layers:
                    layers[key] = layers_that_fit(choice.model, settings, usable)
                places = [
                    speeds.place(row, choice, settings, layers[key], depth)
                    for depth in (0, context)
                ]
                cells += [layers[key], *places]
        advance(1)
    return {
        "model": PAGE_MODEL,
        "layers": choices[0].model.n_layers,
        "trained_context": solar_config().context_length,
        "unsure": UNSURE,
        "first": FIRST,
        "families": {f: families[f] for f in dict.fromkeys(d.family for d, _ in rows)},
        "contexts": list(CONTEXTS),
        "presets": [
            {
                "key": c.key,
                "label": c.label,
                "bytes": c.model.weights_bytes,
                "runtime": c.model.runtime,
                "engine": speeds.engines.get(c.key),
                "notes": {b: kernel_note(c.model, b) for b in backends},
            }
            for c in choices
        ],
        "devices": [_row(device, gb, choices) for device, gb in rows],
        "memory": memory,
        "cells": cells,
        "speeds": speeds.rates,
        "reasons": speeds.reasons,
    }


class _Speeds:
    """Speeds as they are asked for, each kept once."""

    def __init__(self) -> None:
        self.rates: list[float | None] = []
        self.reasons: list[str] = []
        self.engines: dict[str, str] = {}
        self._places: dict[tuple[float | None, ...], int] = {}
        self._known: dict[tuple[DeviceSpeed, str, int | None, int], int] = {}
        self._refused: dict[tuple[str, str, bool, bool], int] = {}
        self._work: dict[str, Work] = {}

    def place(
        self, row: PageRow, choice: Choice, settings: RunSettings, layers: int, depth: int
    ) -> int:
        """Where the speed stands in `rates`, or -n for the n-th reason why there is none."""
        whole = layers > choice.model.n_layers
        if not layers:
            return self._reason(row, choice, settings, whole, layers)
        if choice.key not in self._work:
            self._work[choice.key] = work_of(choice.model, settings)
        try:
            facts = device_speed(row[0])
            key = (facts, choice.key, None if whole else layers, depth)
            if key not in self._known:
                speed = predict(
                    facts,
                    self._work[choice.key],
                    depth=depth,
                    era=settings.era,
                    flash_attn=settings.flash_attn,
                    offloaded_layers=None if whole else layers,
                )
                self.engines[choice.key] = speed.engine
                self._known[key] = self._rates(tuple(speed_json(speed).values()))
            return self._known[key]
        except UsageError:
            return self._reason(row, choice, settings, whole, layers)

    def _rates(self, six: tuple[float | None, ...]) -> int:
        if six not in self._places:
            self._places[six] = len(self._places)
            self.rates += [int(x) if x is not None and x.is_integer() else x for x in six]
        return self._places[six]

    def _reason(
        self, row: PageRow, choice: Choice, settings: RunSettings, whole: bool, layers: int
    ) -> int:
        device, gb = row
        key = (device.id, choice.key, whole, layers > 0)
        if key not in self._refused:
            found = predict_on(StorableModel(choice.model, {}), device, settings, memory_gb=gb)
            why = found.why_no_speed or ""
            if why not in self.reasons:
                self.reasons.append(why)
            self._refused[key] = -1 - self.reasons.index(why)
        return self._refused[key]


def _settings(choice: Choice, context: int) -> RunSettings:
    return memory_settings(choice.model, context=context)


def _parts(choice: Choice, settings: RunSettings) -> list[int]:
    use = memory_use(choice.model, settings)
    return [use.weights_bytes, use.kv_cache_bytes, use.compute_buffer_bytes]


def _overheads(device: Device, choices: Sequence[Choice]) -> dict[str, int]:
    """Bytes by runtime, of one choice each: they depend on the device alone."""
    one_of_each = {c.model.runtime: c for c in choices}
    return {
        runtime: memory_use(c.model, settings_on(device, _settings(c, CONTEXTS[0]))).overhead_bytes
        for runtime, c in one_of_each.items()
    }


def _row(device: Device, gb: float, choices: Sequence[Choice]) -> dict[str, Any]:
    name = device.short_name
    return {
        "id": device.id,
        "name": name,
        "label": name if f"{gb:g}GB" in name else f"{name}, {gb:g} GB",
        "family": device.family,
        "backend": device.backend,
        "system": _SYSTEMS[usual_platform(device)],
        "gb": int(gb) if float(gb).is_integer() else gb,
        "sizes": len(device.memory_gb_options),
        "usable": usable_bytes(device, None, gb),
        "overhead": _overheads(device, choices),
    }


def _errors() -> Mapping[str, str]:
    """What cross-validation by device found, for the text of the page."""
    table = tomllib.loads(data.read_text("speed.toml"))
    found = {}
    for kind in ("tg", "pp"):
        check = table[kind]["cross_validation"]
        found |= {
            f"{kind.upper()}_ERROR": f"{check['mean_absolute_error'] * 100:.1f}\u00a0%",
            f"{kind.upper()}_P90": f"{check['p90_absolute_error'] * 100:.1f}\u00a0%",
            f"{kind.upper()}_COVERAGE": f"{check['coverage'] * 100:.0f}\u00a0%",
            f"{kind.upper()}_ROWS": f"{check['rows']}",
            f"{kind.upper()}_DEVICES": f"{check['devices']}",
        }
    return found


def _panels(measured: MeasuredResults) -> list[FrontierPanel]:
    return [*run_panels(measured.divergence), *quality_panels(measured.quality)]


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
