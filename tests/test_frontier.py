"""The frontier of size and divergence: who is on it, what a file says of itself, the picture."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st

from dus_edge import data
from dus_edge.checkpoint.gguf.origin import Origin, file_origin, origin_of
from dus_edge.measure.record import read_quality
from dus_edge.quality.frontier import SAME_SIZE, on_frontier
from dus_edge.quality.label_layout import boxes_along
from dus_edge.tables.frontier.medians import WAYS, divergence_rows, median_runs
from dus_edge.tables.frontier.panels import FrontierPanel, PlottedFile, quality_panels, run_panels
from dus_edge.tables.frontier.section import frontier_section
from dus_edge.tables.frontier.svg import HEIGHT_PX, WIDTH_PX, frontier_svg
from dus_edge.tables.frontier.text import divergence_markdown
from dus_edge.tables.measured import quality_markdown, quality_rows

from .draws import examples

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
LINES = [json.loads(x) for x in (RESULTS / "divergence.jsonl").read_text().splitlines()]
QUALITY = json.loads((RESULTS / "quality.json").read_text())
TEXTS = Path(data.__file__).parent / "texts"
SVG = "{http://www.w3.org/2000/svg}"

# Few values, so that many are equal; sizes 100 and 101 are 1 % apart.
FILES = st.lists(
    st.tuples(
        st.sampled_from([50, 100, 101, 200, 400]),
        st.sampled_from([0.0, 0.1, 0.2, 0.5, math.inf, math.nan, None]),
    ),
    max_size=9,
)


# The frontier


@given(FILES, st.sampled_from([0.0, SAME_SIZE, 0.02]))
def test_a_file_is_off_the_frontier_if_and_only_if_another_beats_it(files, slack):
    sizes, losses = [s for s, _ in files], [x for _, x in files]
    marks = on_frontier(sizes, losses, slack)
    real = [(s, x) for s, x in files if x is not None and math.isfinite(x)]
    for (size, loss), on in zip(files, marks, strict=True):
        if loss is None or not math.isfinite(loss):
            assert not on
            continue
        less = [s for s, x in real if x < loss]
        same = [s for s, x in real if x == loss]
        beaten = min(less, default=math.inf) <= size * (1 + slack) or min(same) < size
        assert on == (not beaten)
    kept = sorted({f for f, on in zip(files, marks, strict=True) if on})
    assert [x for _, x in kept] == sorted({x for _, x in kept}, reverse=True)
    assert len({s for s, _ in kept}) == len(kept), "larger ones lose less"
    assert bool(kept) == bool(real), "the least loss is always on it"


@given(FILES, st.integers(0, 99))
def test_the_order_of_files_is_nothing_to_the_frontier(files, seed):
    order = random.Random(seed).sample(range(len(files)), len(files))
    marks = on_frontier([s for s, _ in files], [x for _, x in files])
    mixed = on_frontier([files[i][0] for i in order], [files[i][1] for i in order])
    assert mixed == [marks[i] for i in order]


def test_a_header_with_fewer_words_is_no_smaller_file():
    """Of the real files: 64 bytes of keys stood between a mix and a better one."""
    sizes, losses = [124165152, 124165216, 106859040], [0.0578, 0.0550, 0.1494]
    assert on_frontier(sizes, losses) == [False, True, True]
    assert on_frontier(sizes, losses, slack=0) == [True, True, True]


# What a file says


@pytest.mark.parametrize(
    ("values", "spelled", "way"),
    [
        ({"general.file_type": 15}, "Q4_K_M", "preset"),
        ({"general.file_type": 0}, "F32", "preset"),
        ({}, "Q6_K", "preset"),
        ({"general.file_type": 1024}, "Q6_K", "preset"),
        ({"general.file_type": "15"}, "Q6_K", "preset"),
        (
            {"general.file_type": 15, "quantize.imatrix.file": "m"},
            "Q4_K_M + imatrix",
            "preset + imatrix",
        ),
        (
            {
                "general.file_type": 15,
                "quantize.imatrix.file": "m",
                "dus.feedback.kept": 3,
                "dus.feedback.tried": 4,
            },
            "Q4_K_M + feedback",
            "preset + feedback",
        ),
        (
            {"general.file_type": 15, "dus.feedback.kept": 0, "dus.feedback.tried": 4},
            "Q4_K_M",
            "preset",
        ),
        (
            {"general.file_type": 15, "dus.mix.goal": "like q4_k_m"},
            "mix like q4_k_m",
            "mix",
        ),
        (
            {
                "general.file_type": 15,
                "dus.mix.goal": "4.5 bits per weight",
                "dus.mix.expected_kl": 0.25,
                "dus.feedback.kept": 1,
                "dus.feedback.tried": 1,
            },
            "mix, 4.5 bits per weight + feedback",
            "mix + feedback",
        ),
        (
            {"general.file_type": 15, "dus.mix.goal": "q4_k_m, --keep head=Q8_0"},
            "q4_k_m, --keep head=Q8_0",
            "mix",
        ),
        ({"general.file_type": 15, "dus.mix.goal": 7}, "Q4_K_M", "preset"),
        ({"general.file_type": 15, "dus.mix.goal": "a\n\x1b[31mb"}, "mix, a [31mb", "mix"),
    ],
)
def test_keys_say_how_types_were_chosen(values, spelled, way):
    origin = origin_of(values, {"Q4_K": 5, "Q6_K": 9})
    assert (origin.spelled, origin.way) == (spelled, way)
    expected = values.get("dus.mix.expected_kl")
    assert origin.expected_kl == expected


def test_no_header_has_no_origin(tmp_path):
    for name, content in (("empty", b""), ("text", b"no model"), ("cut", b"GGUF\x03\0\0\0\x05")):
        (tmp_path / name).write_bytes(content)
        assert file_origin(tmp_path / name) is None
    assert file_origin(tmp_path / "none") is None


# On files


def command(*args: object) -> None:
    """A command in this process, for what several tests look at."""
    from dus_edge.cli.main import main

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as done:
        patch.setattr("sys.argv", ["dus-edge", *map(str, args)])
        main()
    assert not done.value.code


@pytest.fixture(scope="module")
def files(compiled, tmp_path_factory) -> dict[str, Path]:
    """A preset, the same with feedback under the same name, and another's types as a mix."""
    folder = tmp_path_factory.mktemp("files")
    text = ("--text", TEXTS / "calibration" / "code-python-web.txt", "--ctx", 64, "--chunks", 8)
    asked = {
        "whole": ("-q", "f16"),
        "plain": ("-q", "q3_k_m"),
        "fed": ("-q", "q3_k_m", "--feedback", *text, "--device", "cpu"),
        "small": ("-q", "q2_k"),
        "mix": ("--mix", folder / "small.gguf"),
    }
    found = {}
    for name, options in asked.items():
        command("gguf", "pico", "--plan", "0:2", "--threads", 1, *options, "-o", folder / name)
        (found[name],) = (folder / name).glob("*.gguf")
        (folder / f"{name}.gguf").symlink_to(found[name])
    return found


@pytest.fixture(scope="module")
def measured(files, tmp_path_factory) -> tuple[str, dict[str, Any], Path]:
    """What `quality` says of them, its JSON, and the folder that it wrote to."""
    out = tmp_path_factory.mktemp("quality")
    named = [files[n] for n in ("plain", "fed", "mix", "small")]
    text = ("--text", TEXTS / "evaluation" / "code-python.txt", "--ctx", 64, "--chunks", 6)
    command("quality", files["whole"], *named, *text, "--threads", 1, "-o", out)
    return (out / "quality.md").read_text(), json.loads((out / "quality.json").read_text()), out


def test_a_line_says_what_the_file_is_how_large_and_how_far(files, measured):
    said, found, _ = measured
    assert files["plain"].name == files["fed"].name
    stored = [c["stored_as"] for c in found["candidates"]]
    goal = "the types of small.gguf"
    assert stored == ["Q3_K_M", "Q3_K_M + feedback", f"mix, {goal}", "Q2_K"]
    assert found["reference"]["stored_as"] == "F16"
    ways = [c["way"] for c in found["candidates"]]
    assert ways == ["preset", "preset + feedback", "mix", "preset"]
    rows = [x for x in said.splitlines() if x.startswith("|")][2:6]
    for row, c in zip(rows, found["candidates"], strict=True):
        name, size, bits, kl, star = [cell.strip() for cell in row.split("|")[1:-1]]
        head, _, tail = name.partition("…")
        assert c["stored_as"].startswith(head) and c["stored_as"].endswith(tail)
        assert size == f"{c['file_bytes'] / 2**20:.2f} MiB"
        assert float(bits) == pytest.approx(c["bits_per_weight"], abs=0.006)
        value, error = map(float, re.findall(r"[\d.]+", kl)[:2])
        assert value == pytest.approx(c["total"]["kl_nats"], rel=0.1)
        assert error == pytest.approx(c["total"]["kl_nats_error"], rel=0.1)
        assert (star == "*") == c["total"]["on_frontier"]
    lines = said.splitlines()
    assert f"- Q3_K_M + feedback: fed/{files['fed'].stem}" in lines
    assert f"- Q2_K: {files['small'].stem}" in lines
    assert max(len(x) for x in lines if not x.startswith("/")) <= 80


def test_the_origin_in_json_is_the_files_keys(files, measured):
    _, found, _ = measured
    for name, c in zip(("plain", "fed", "mix", "small"), found["candidates"], strict=True):
        fields = GGUFReader(files[name]).fields
        kept = fields["dus.feedback.kept"].contents() if name == "fed" else None
        assert c["origin"]["feedback_kept"] == kept
        assert c["origin"]["imatrix"] == ("quantize.imatrix.file" in fields)
        said = fields["dus.mix.goal"].contents() if "dus.mix.goal" in fields else None
        assert c["origin"]["mix_goal"] == said


def test_the_mix_of_a_preset_is_as_far_as_the_preset(measured):
    """The same types are the same weights: both are on the frontier, or neither."""
    _, found, _ = measured
    plain, fed, mix, small = (c["total"] for c in found["candidates"])
    assert mix["kl_nats"] == small["kl_nats"]
    assert small["on_frontier"] and not (plain["on_frontier"] and fed["on_frontier"])
    sizes = [c["file_bytes"] for c in found["candidates"]]
    for language in found["text"]["chunks"]:
        kl = [c["languages"][language]["kl_nats"] for c in found["candidates"]]
        marks = [c["languages"][language]["on_frontier"] for c in found["candidates"]]
        assert marks == on_frontier(sizes, kl)


def test_the_plot_has_the_line_and_the_ways(measured):
    _, _, out = measured
    # matplotlib writes words as glyphs, and in a comment as they are.
    comments = (out / "quality.svg").read_text().split("<!-- ")[1:]
    said = {x.split(" -->")[0] for x in comments}
    assert {"frontier", "preset", "preset + feedback", "mix", "Q2_K"} <= said


def test_tables_take_what_quality_wrote(measured):
    _, found, out = measured
    read = read_quality(out / "quality.json")
    assert read == found
    text = quality_markdown([read])
    for c in found["candidates"]:
        row = next(x for x in text.splitlines() if f"| {c['stored_as']} |" in x)
        assert row.endswith(f"| {'yes' if c['total']['on_frontier'] else ''} |")
    whole = [r for r in quality_rows([read]) if r["language"] is None]
    for row, c in zip(whole, found["candidates"], strict=True):
        assert (row["stored_as"], row["way"]) == (c["stored_as"], c["way"])
        assert row["on_frontier"] == c["total"]["on_frontier"]
    (panel,) = quality_panels([read])
    assert [f.way for f in panel.files] == [c["way"] for c in found["candidates"]]
    assert [f.name for f in panel.files] == [c["stored_as"] for c in found["candidates"]]


# Medians over seeds


def line(kl: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    found = {"model": "m", "preset": "q4_k_m", "way": "mix", "seed": seed, "text": "en"}
    found |= {"n_tokens": 512, "kl": kl, "bytes": 1000 + seed, "by_chunk": [kl - 0.1, kl + 0.1]}
    return found | more


def test_runs_are_medians_over_seeds_and_the_last_line_counts():
    lines = [line(9.0), line(0.5, 1), line(0.4, 2), line(0.3), line(0.2, way="native")]
    ((native, mix),) = median_runs(lines)
    assert (mix.kl_nats, mix.kl_nats_low, mix.kl_nats_high) == (0.4, 0.3, 0.5)
    assert (mix.n_seeds, mix.file_bytes, mix.way) == (3, 1001, "mix + imatrix")
    assert mix.kl_nats_error == pytest.approx(0.1)
    assert (native.n_seeds, native.way) == (1, "preset")
    assert native.on_frontier and not mix.on_frontier
    ((uneven,),) = median_runs([line(0.5), line(0.4, 1, by_chunk=[0.4])])
    assert uneven.kl_nats_error is None


def test_the_rows_are_those_of_the_benchmark():
    rows = divergence_rows(LINES)
    seeds: dict[tuple[str, ...], dict[int, float]] = {}
    for x in LINES:
        key = (x["model"], x["text"], x["preset"], WAYS.get(x["way"], x["way"]))
        seeds.setdefault(key, {})[x["seed"]] = x["kl"]
    found = {(r["model"], r["text"], r["preset"], r["way"]): r["kl_nats"] for r in rows}
    assert found == {key: statistics.median(kl.values()) for key, kl in seeds.items()}
    assert len(rows) == len(found)
    for model, text in {(r["model"], r["text"]) for r in rows}:
        same = [r for r in rows if (r["model"], r["text"]) == (model, text)]
        assert min(same, key=lambda r: r["kl_nats"])["on_frontier"]


def test_the_table_marks_the_frontier():
    text = divergence_markdown(LINES)
    marked = re.findall(r"\*\*([\d.]+) ± [\d.]+\*\*", text)
    on = [r["kl_nats"] for r in divergence_rows(LINES) if r["on_frontier"]]
    assert len(marked) == len(on)
    assert all(any(math.isclose(float(m), kl, rel_tol=0.05) for kl in on) for m in marked)
    assert divergence_markdown([]) == ""


# The picture


def drawn(panel: FrontierPanel) -> ET.Element:
    return ET.fromstring(
        frontier_svg(panel).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    )


@pytest.mark.parametrize("panel", [*run_panels(LINES), *quality_panels([QUALITY])])
def test_every_file_has_a_mark_and_the_frontier_a_line(panel):
    svg = drawn(panel)
    marks = [e for e in svg.iter() if e.get("class", "").startswith("mark ")]
    assert len(marks) == len(panel.files)
    titles = {e.text.split(":")[0] for e in svg.iter(f"{SVG}title")}
    assert titles == {f.name for f in panel.files}
    lines = svg.findall(f"{SVG}polyline")
    assert len(lines) == (len(panel.frontier) > 1)
    if lines:
        points = [tuple(map(float, p.split(","))) for p in lines[0].get("points").split()]
        assert len(points) == len(panel.frontier)
        # The larger the file the lower it stands: y grows downwards.
        assert points == sorted(points) == sorted(points, key=lambda p: p[1])
    said = svg.get("aria-label")
    assert all(f.name in said for f in panel.frontier)
    assert frontier_svg(panel) == frontier_svg(panel)


POINT = st.builds(
    PlottedFile,
    name=st.sampled_from(["a", "b<i>&", 'c" onload="x']),
    label=st.sampled_from(["", "q4_k_m", "mix like q4_k_m + feedback", '<b>&"']),
    way=st.sampled_from(["preset", "mix + feedback", "GPTQ", "another way"]),
    n_bytes=st.sampled_from([0, 1, 1000, 5_000_000, 5_000_001, 7 * 2**30]),
    kl=st.sampled_from([None, 0.0, 1e-9, 0.01, 0.0101, 3.0, 1e6]),
    error=st.sampled_from([None, 0.0, 1e-3, 5.0]),
    on_frontier=st.booleans(),
)


@examples(15)
@given(st.lists(POINT, min_size=1, max_size=8))
def test_whatever_is_measured_can_be_drawn(files):
    panel = FrontierPanel("<title>&", 'about "this"', tuple(files))
    svg = drawn(panel)
    shown = [f for f in files if f.kl]
    marks = [e for e in svg.iter() if e.get("class", "").startswith("mark ")]
    assert len(marks) == len(shown)
    for e in svg.iter():
        for x in ("x", "x1", "x2", "cx"):
            assert 0 <= float(e.get(x, 0)) <= WIDTH_PX
        for y in ("y", "y1", "y2", "cy"):
            assert 0 <= float(e.get(y, 0)) <= HEIGHT_PX
    html = frontier_section([panel])
    assert "<b>" not in html and "<i>" not in html and 'onload="' not in html
    assert ("Not drawn" in html) == (len(shown) < len(files))


def test_a_line_is_an_obstacle_all_along():
    boxes = boxes_along([(0, 0), (30, 40), (30, 60)])
    centres = [((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in boxes]
    for k in range(51):
        x, y = (30 * k / 50, 40 * k / 50)
        assert min(math.hypot(x - a, y - b) for a, b in centres) <= 1.01
    assert boxes_along([]) == []


def test_the_section_is_there_only_with_results():
    assert frontier_section([]) == ""
    panels = [*run_panels(LINES), *quality_panels([QUALITY])]
    html = frontier_section(panels)
    assert html.count('<svg viewBox="0 0 400') == len(panels)
    assert "style=" not in html and "<script" not in html
    assert html.count("<table") == html.count('role="img"')
    on = sum(
        f.on_frontier for p in [*run_panels(LINES), *quality_panels([QUALITY])] for f in p.files
    )
    assert html.count("<td>yes</td>") == on


def test_feedback_counts_only_where_it_was_kept():
    assert Origin("Q4_K_M", fed=(0, 9)).spelled == "Q4_K_M"
    assert Origin("Q4_K_M", fed=(1, 9)).has_feedback
