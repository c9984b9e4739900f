"""The page of predictions: its figures, that it loads nothing, and how it works in a browser."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dus_edge.measure.record import read_divergence, read_quality
from dus_edge.predict.devices import find_device, load_devices
from dus_edge.predict.prediction import StorableModel, memory_settings, predict_on
from dus_edge.predict.report import prediction_json
from dus_edge.tables.page import (
    CONTEXTS,
    FIRST,
    PAGE_MODEL,
    PAGE_PRESETS,
    render_page,
    solar_choices,
)
from dus_edge.tables.write import MeasuredResults
from dus_edge.words import format_bytes

TRACKED = Path(__file__).parent.parent / "benchmarks" / "index.html"
KEYS = [f"{kind}_tokens_per_s{end}" for kind in ("tg", "pp") for end in ("", "_low", "_high")]
BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
FLAGS = (
    "--no-sandbox",  # it runs as root in containers
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
)
COMMAND = "document.getElementById('command').textContent"
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def html() -> str:
    """What `bench tables -o benchmarks` writes."""
    results = TRACKED.parent / "results"
    quality, divergence = results / "quality.json", results / "divergence.jsonl"
    return render_page(
        MeasuredResults(quality=[read_quality(quality)], divergence=read_divergence(divergence))
    )


@pytest.fixture(scope="module")
def grid(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return json.loads(found[1])


@pytest.fixture(scope="module")
def predicted() -> Callable[..., dict[str, Any]]:
    """What `bench predict --json` says of a device id, its GiB, a preset, a context and a depth."""
    models = {c.key: c.model for c in solar_choices()}

    def ask(device: str, gb: float, preset: str, context: int, depth: int = 0) -> dict[str, Any]:
        model = models[preset]
        settings = memory_settings(model, context=context)
        found = predict_on(
            StorableModel(model, {}), find_device(device), settings, depth=depth, memory_gb=gb
        )
        return prediction_json(found)

    return ask


def cell(grid: dict[str, Any], row: int, preset: int, context: int) -> dict[str, Any]:
    """One cell of the embedded grid, read as its docstring says."""
    at = ((row * len(grid["presets"]) + preset) * len(grid["contexts"]) + context) * 3
    layers, *places = grid["cells"][at : at + 3]
    speeds = [grid["speeds"][p * 6 : p * 6 + 6] if p >= 0 else None for p in places]
    why = [grid["reasons"][-p - 1] if p < 0 else None for p in places]
    device, runtime = grid["devices"][row], grid["presets"][preset]["runtime"]
    parts = grid["memory"][device["backend"]][preset][context]
    memory = [*parts, device["overhead"][runtime]]
    return {"layers": layers, "speeds": speeds, "why": why, "memory": memory}


def sampled_cells() -> list[tuple[int, int, int]]:
    n_rows = sum(len(d.memory_gb_options) for d in load_devices())
    draw = random.Random(7)
    return [
        (draw.randrange(n_rows), draw.randrange(len(PAGE_PRESETS)), draw.randrange(len(CONTEXTS)))
        for _ in range(60)
    ]


def test_the_tracked_page_is_what_is_written(html):
    assert TRACKED.read_text(encoding="utf-8") == html


def test_the_grid_says_what_predict_says(grid, predicted):
    states = set()
    for row, preset, context in sampled_cells():
        device, key = grid["devices"][row], grid["presets"][preset]["key"]
        n = grid["contexts"][context]
        mine = cell(grid, row, preset, context)
        for depth, speed, why in zip((0, n), mine["speeds"], mine["why"], strict=True):
            theirs = predicted(device["id"], device["gb"], key, n, depth)
            memory = theirs["memory"]
            assert mine["memory"] == [
                memory[f"{part}_bytes"]
                for part in ("weights", "kv_cache", "compute_buffer", "overhead")
            ]
            assert device["usable"] == memory["usable_bytes"]
            assert (sum(mine["memory"]) <= device["usable"]) == theirs["fits"]
            assert mine["layers"] == theirs["offloaded_layers"]
            assert (speed or [None] * 6) == [theirs[k] for k in KEYS]
            assert why == theirs["why_no_speed"]
        states.add(theirs["fits"])
    assert states == {True, False}


def test_every_device_size_preset_and_context_is_there_once(grid):
    rows = [(d["id"], d["gb"]) for d in grid["devices"]]
    assert sorted(rows) == sorted((d.id, gb) for d in load_devices() for gb in d.memory_gb_options)
    assert len({d["label"] for d in grid["devices"]}) == len(rows)
    assert {p["key"] for p in grid["presets"]} == set(PAGE_PRESETS)
    assert grid["contexts"] == list(CONTEXTS)
    assert len(grid["cells"]) == 3 * len(rows) * len(PAGE_PRESETS) * len(CONTEXTS)
    assert len(grid["speeds"]) == 6 * (max(grid["cells"]) + 1)


def test_the_command_gives_the_same_figures(grid, run, tmp_path):
    """Mistral 7B's published configuration, up-scaled as the page's command says."""
    hub_id, *plan = PAGE_MODEL.split()
    assert hub_id == "mistralai/Mistral-7B-v0.1"
    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    row = next(i for i, d in enumerate(grid["devices"]) if (d["id"], d["gb"]) == ("m4-10c", 24))
    preset = [p["key"] for p in grid["presets"]].index("q6_k")
    context = CONTEXTS.index(16384)
    mine = cell(grid, row, preset, context)
    command = ["bench", "predict", tmp_path, *plan, "--quant", "q6_k", "--device", "m4-10c"]
    code, out, err = run(*command, "--memory", 24, "--ctx", 16384, "--json")
    assert code == 0, err
    theirs = json.loads(out)
    assert sum(mine["memory"]) == theirs["memory"]["total_bytes"]
    assert mine["layers"] == theirs["offloaded_layers"]
    assert mine["speeds"][0] == [theirs[k] for k in KEYS]


def test_the_file_is_small_and_loads_nothing(html):
    assert len(html.encode()) < 700_000
    bare = html.replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert "http://" not in bare
    assert "https://" not in bare
    assert not re.search(
        r"\bsrc\s*=|@import|\bfetch\(|XMLHttpRequest|import\(|url\(\"?[^#\"]", bare
    )
    assert re.findall(r'<link[^>]+href="([^,"]+)', html) == ["data:image/svg+xml"]
    assert "@@" not in html


def test_the_policy_allows_this_style_and_script_only(html):
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)[1]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for tag, source in (("style", "style-src"), ("script", "script-src")):
        text = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{source} 'sha256-{digest}'" in policy
    assert not re.search(r"<[a-z]+[^>]*\s(style|on[a-z]+)=", html)


def test_without_scripts_the_page_points_to_the_tables(html):
    assert 'href="TABLES.md"' in re.search(r"<noscript>(.*?)</noscript>", html, re.DOTALL)[1]
    assert '<main id="app" hidden>' in html


# In a browser


def browser_path() -> str | None:
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
    )
    path = browser_path()
    if path is None:
        pytest.skip("neither Chromium nor Chrome is installed")
    with playwright.sync_playwright() as p:
        found = p.chromium.launch(executable_path=path, args=list(FLAGS))
        yield found
        found.close()


@pytest.fixture(scope="module")
def file(html: str, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(html, encoding="utf-8")
    return path


@pytest.fixture
def visit(browser, file) -> Iterator[Callable[..., Any]]:
    """Open the page; at the end nothing may have been reported, nor anything else requested."""
    contexts, noise, requests = [], [], []

    def go(
        hash_: str = "",
        where: str = "desktop",
        scheme: str = "light",
        at: Path = file,
        scripts: bool = True,
    ) -> Any:
        width, height = WIDTHS[where]
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            reduced_motion="reduce",
            has_touch=where == "phone",
            java_script_enabled=scripts,
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("request", lambda request: requests.append(request.url.split("#")[0]))
        page.goto(at.as_uri() + hash_)
        return page

    yield go
    for context in contexts:
        context.close()
    assert not noise
    assert all(re.fullmatch(r"file://.*/index\.html|data:image/svg\+xml,.*", r) for r in requests)


def wait_until(page: Any, condition: str, argument: Any = None) -> None:
    """Playwright's own way evaluates in the page, which the page's policy forbids."""
    end = time.monotonic() + 60
    while not page.evaluate(condition, argument):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


def rate(x: float) -> str:
    return f"{int(x + 0.5):,}" if x >= 100 else f"{x:.1f}"


def assert_shows(page: Any, theirs: dict[str, Any], full: dict[str, Any]) -> None:
    """Verdict and speeds of the page are those of two predictions, cache empty and full."""
    verdict = page.inner_text("#verdict")
    assert verdict.startswith("Fits") == theirs["fits"]
    if not theirs["fits"]:
        assert f"-ngl {theirs['offloaded_layers']} of 49" in verdict
    memory = page.inner_text("#memory-legend")
    assert format_bytes(theirs["memory"]["total_bytes"]) in memory
    for kind in ("tg", "pp"):
        text = page.inner_text(f"#speed-{kind}")
        value, low, high = (rate(theirs[f"{kind}_tokens_per_s{e}"]) for e in ("", "_low", "_high"))
        assert f"{value} tok/s" in text
        assert f"{low}–{high}" in text
        value, low, high = (rate(full[f"{kind}_tokens_per_s{e}"]) for e in ("", "_low", "_high"))
        assert f"{value} ({low}–{high})" in text


def test_pickers_work_by_keyboard(visit, predicted):
    page = visit()
    first = (FIRST["device"], FIRST["memory"], FIRST["preset"], FIRST["context"])
    assert_shows(page, predicted(*first), predicted(*first, first[3]))
    focused = "document.activeElement.id"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "skip"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "device"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "preset"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "context"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    chosen = ("rtx-3060-ti", 8, "q4_0", 16384)
    theirs, full = predicted(*chosen), predicted(*chosen, 16384)
    assert not theirs["fits"]
    assert_shows(page, theirs, full)
    assert page.get_attribute("#context", "aria-valuetext") == "16,384 tokens"
    assert page.evaluate("location.hash") == "#device=rtx-3060-ti&preset=q4_0&context=16384"
    assert page.is_visible("#context-note")
    assert "trained for 4,096 tokens" in page.inner_text("#context-note")
    assert page.inner_text("#command") == (
        f"dus-edge bench predict {PAGE_MODEL} --quant q4_0 --device rtx-3060-ti --ctx 16384"
    )


def test_everything_is_reached_by_tab_and_shows_it(visit):
    page = visit()
    seen = []
    for _ in range(24):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => {
              const e = document.activeElement, s = getComputedStyle(e);
              return [e.id || e.tagName, s.outlineStyle !== "none" && parseFloat(s.outlineWidth)];
            }"""
        )
        assert outline >= 2, name
        seen.append(name)
        if seen[-1] == "A" and "filter" in seen:
            break
    wanted = ["skip", "device", "preset", "context", "copy", "SUMMARY", "compare", "filter"]
    assert [name for name in dict.fromkeys(seen) if name in wanted] == wanted
    assert "whole-only" in seen
    assert "BUTTON" in seen  # the heads of the table


def test_the_skip_link_leads_to_the_verdict(visit):
    page = visit("#device=m1-8c&memory=8&preset=q4_k_m&context=4096")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "verdict"
    assert "m1-8c" in page.evaluate("location.hash")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("where", list(WIDTHS))
def test_it_is_legible_and_as_wide_as_the_screen(visit, where, scheme):
    states = {
        "whole": "#device=rtx-4090&preset=q4_k_m&context=4096&compare=all",
        "part": "#device=m2-ultra-60c&memory=64&preset=f16&context=32768&compare=mac",
        "close": "#device=rtx-4060&preset=q4_k_m&context=4096",
        "few": "#device=rtx-3050-laptop&preset=f16&context=32768",
    }
    page = visit(where=where, scheme=scheme)
    for name, hash_ in states.items():
        page.evaluate("hash => { location.hash = hash; }", hash_)
        device = re.search(r"device=([^&]+)", hash_)[1]
        wait_until(page, f"{COMMAND}.includes('{device} ')")
        size = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert size[0] <= size[1], name
        for picker in ("#device", "#preset", "#context"):
            assert page.is_visible(picker)
        found = page.evaluate(CONTRASTS)
        assert len(found) > 500  # the table alone has more
        assert [x for x in found if x[0] < 4.5] == [], name
    if where == "phone":
        assert page.evaluate(SMALL_TARGETS) == []
    icon = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert icon == (scheme == "dark")


#: Contrast (WCAG 2) of every element with text of its own against what is painted behind it.
CONTRASTS = """() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3).map((v) => {
      v /= 255;
      return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.body.querySelectorAll("*")) {
    if (["SCRIPT", "NOSCRIPT", "OPTION", "OPTGROUP", "TITLE"].includes(e.tagName.toUpperCase())) {
      continue;
    }
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !e.getClientRects().length) continue;
    const style = getComputedStyle(e);
    const front = parse(e instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [light(front), light(behind(e))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), `${e.tagName}.${e.className.baseVal ?? e.className}`]);
  }
  return found;
}"""

#: Controls under 40 px that are no links in running text.
SMALL_TARGETS = """() =>
  [...document.querySelectorAll("main :is(select, input, button, summary, .check, a)")]
    .filter((e) => e.getClientRects().length && e.type !== "checkbox")
    .filter((e) => e.getBoundingClientRect().height < 40)
    .map((e) => e.id || e.outerHTML)
"""


#: Each text of a picture and its corners, in the picture's own pixels.
TEXT_BOXES = """svg => [...svg.querySelectorAll("text")].map((e) => {
  const b = e.getBBox();
  return [e.textContent, b.x, b.y, b.x + b.width, b.y + b.height];
})"""


@pytest.mark.parametrize("where", list(WIDTHS))
def test_what_was_measured_is_seen_without_scripts(visit, where):
    page = visit(where=where, scripts=False)
    plots = page.locator(".measured .plot > svg")
    assert plots.count() >= 3
    for i in range(plots.count()):
        plot = plots.nth(i)
        assert plot.is_visible()
        assert plot.bounding_box()["width"] >= 300 and plot.locator(".mark").count() > 1
        texts = plot.evaluate(TEXT_BOXES)
        assert len(texts) > 8
        for k, (name, left, top, right, bottom) in enumerate(texts):
            assert left >= 0 and right <= 400 and top >= 0 and bottom <= 420, name
            for other, x0, y0, x1, y1 in texts[:k]:
                apart = right <= x0 or x1 <= left or bottom <= y0 or y1 <= top
                assert apart, (name, other)
    assert not page.is_visible("#app")


def test_an_address_keeps_the_choice(visit, predicted):
    page = visit("#device=m4-max-40c&memory=64&preset=q8_0&context=8192&compare=mac")
    chosen = ("m4-max-40c", 64, "q8_0", 8192)
    assert_shows(page, predicted(*chosen), predicted(*chosen, 8192))
    assert page.eval_on_selector("#compare", "e => e.value") == "mac"
    label = page.eval_on_selector("#device", "e => e.selectedOptions[0].textContent")
    assert label == "M4 Max (40-core GPU), 64 GB"
    assert page.inner_text("#command").endswith("--device m4-max-40c --memory 64 --ctx 8192")
    page.reload()
    assert_shows(page, predicted(*chosen), predicted(*chosen, 8192))


def test_an_address_that_makes_no_sense_is_the_default(visit, predicted):
    first = (FIRST["device"], FIRST["memory"], FIRST["preset"], FIRST["context"])
    theirs, full = predicted(*first), predicted(*first, first[3])
    page = visit("#device=riva-tnt2&memory=x&preset=q9&context=-1&compare=toString")
    assert_shows(page, theirs, full)
    for nonsense in ("#%E0%A4%A", "#verdict", "#device=&preset=__proto__&context=1e9"):
        page.evaluate("location.hash = '#device=m1-8c&memory=16&preset=q2_k&context=512'")
        wait_until(page, f"{COMMAND}.includes('m1-8c')")
        page.evaluate("hash => { location.hash = hash; }", nonsense)
        wait_until(page, f"!{COMMAND}.includes('m1-8c')")
        assert_shows(page, theirs, full)


def test_the_table_filters_sorts_and_leads_to_a_device(visit, predicted, grid):
    page = visit("#device=rtx-3060-12gb&preset=q8_0&context=4096")
    rows = "#table-body tr"
    assert page.locator(rows).count() == len(grid["devices"])
    page.fill("#filter", "4070 laptop")
    assert page.locator(rows).count() == 1
    page.fill("#filter", "apple m4 24 gb")
    assert page.locator(rows).count() == sum(
        d["family"] == "apple-m4" and d["gb"] == 24 for d in grid["devices"]
    )
    page.fill("#filter", "no such thing")
    assert "No such device" in page.inner_text(rows)
    page.fill("#filter", "m3")
    page.check("#whole-only")
    states = page.locator(f"{rows} .fit").all_inner_texts()
    assert set(states) == {"whole"}
    assert page.inner_text("#count").startswith(f"{len(states)} of")
    page.uncheck("#whole-only")

    def column(n: int) -> list[float]:
        cells = page.locator(f"{rows} td:nth-child({n})").all_inner_texts()
        return [float(c.split("\n")[0].replace(",", "").replace("–", "-1")) for c in cells]

    assert column(4) == sorted(column(4), reverse=True)
    page.click("[data-key=tg] button")
    assert page.get_attribute("[data-key=tg]", "aria-sort") == "ascending"
    assert column(4) == sorted(column(4))
    page.focus("[data-key=usable] button")
    page.keyboard.press("Enter")
    assert page.get_attribute("[data-key=tg]", "aria-sort") is None
    assert column(2) == sorted(column(2), reverse=True)

    page.fill("#filter", "m3 ultra 80 96")
    page.focus(f"{rows} a")
    page.keyboard.press("Enter")
    wait_until(page, "document.activeElement.id === 'verdict'")
    chosen = ("m3-ultra-80c", 96, "q8_0", 4096)
    assert_shows(page, predicted(*chosen), predicted(*chosen, 4096))
    page.go_back()
    wait_until(page, f"{COMMAND}.includes('rtx-3060-12gb')")


def test_charts_have_words_and_figures(visit, predicted):
    page = visit("#device=rtx-3070&preset=q4_0&context=4096")
    for chart in ("#memory-bar", "#presets-chart", "#devices-chart", "#contexts-chart"):
        assert page.get_attribute(f"{chart} > svg", "role") == "img"
        assert len(page.get_attribute(f"{chart} > svg", "aria-label")) > 60
    q2_k = predicted("rtx-3070", 8, "q2_k", 4096)
    words = page.get_attribute("#presets-chart > svg", "aria-label")
    assert f"Q2_K {rate(q2_k['tg_tokens_per_s'])} (" in words
    page.focus("#contexts-chart summary")
    page.keyboard.press("Enter")
    text = page.inner_text("#contexts-chart details table")
    far = predicted("rtx-3070", 8, "q4_0", 32768)
    assert f"-ngl {far['offloaded_layers']} of 49" in text
    page.select_option("#compare", "laptop")
    drawn = page.get_attribute("#devices-chart > svg", "aria-label")
    assert "RTX 4070 Laptop, 8 GB" in drawn
    assert "RTX 3070, 8 GB" in drawn  # the chosen one stays


def test_headings_are_in_order_and_controls_have_names(visit):
    page = visit()
    levels = page.eval_on_selector_all("h1, h2, h3, h4", "all => all.map((e) => +e.tagName[1])")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    unnamed = page.eval_on_selector_all(
        "select, input", "all => all.filter((e) => !e.labels.length).map((e) => e.id)"
    )
    assert unnamed == []
    assert page.get_attribute(":has(> * > #verdict)", "aria-live") == "polite"


def test_the_command_is_copied(visit):
    page = visit()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#copy")
    wait_until(page, "document.getElementById('copied').textContent")
    assert page.inner_text("#copy") == "Copied"
    assert page.evaluate("navigator.clipboard.readText()") == page.inner_text("#command")


def test_what_llama_cpp_does_not_run_says_so(visit, predicted):
    page = visit("#device=rtx-4070&preset=gptq-int4&context=4096")
    theirs = predicted("rtx-4070", 12, "gptq-int4", 4096)
    assert theirs["fits"]
    assert page.inner_text("#verdict").startswith("Fits")
    low, high = rate(theirs["tg_tokens_per_s_low"]), rate(theirs["tg_tokens_per_s_high"])
    assert f"{low}–{high}" in page.inner_text("#speed-tg")
    assert "Not predicted" in page.inner_text("#speed-pp")
    assert "runs under transformers" in page.inner_text("#runtime-note")
    assert "--quant gptq-int4 " in page.inner_text("#command")
    page.select_option("#device", label="M4 (10-core GPU), 32 GB")
    theirs = predicted("m4-10c", 32, "gptq-int4", 4096)
    assert theirs["why_no_speed"] in page.inner_text("#speed-tg")
    chart = page.get_attribute("#presets-chart > svg", "aria-label")
    assert "GPTQ int4 not predicted" in chart
    page.select_option("#device", label="RTX 4050 Laptop, 6 GB")
    assert page.inner_text("#verdict").startswith("Does not fit")
    assert "GGUF files only" in page.inner_text("#verdict-detail")
    chart = page.get_attribute("#presets-chart > svg", "aria-label")
    assert "GPTQ int4 does not fit" in chart
