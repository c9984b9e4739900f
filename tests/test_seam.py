"""`seam`: its numbers against a plain forward of transformers, and what it concludes from them."""

from __future__ import annotations

import json
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dus_edge.calibrate import engine, streams
from dus_edge.families.family import load_families
from dus_edge.jobs.export.calibration import Machine, TextChoice, read_chunks
from dus_edge.jobs.export.checkpoint import export_checkpoint
from dus_edge.jobs.grow.outputs import GrowOutputs
from dus_edge.jobs.grow.seam import find_seams
from dus_edge.tables.grow.seam import SeamResults, seam_page
from dus_edge.tables.grow.seam_plot import draw_seams, render_seams
from dus_edge.text.chunks import Chunks
from dus_edge.upscale.blocks import best_blocks, measure_seams, repeated_outliers
from dus_edge.upscale.geometry import StreamGeometry, measure_streams, modified_z
from dus_edge.upscale.model import find_model, plan_chooser
from dus_edge.upscale.plan import DepthPlan, from_block, from_drop, identity, parse

from .cases import check_each
from .draws import examples
from .forms import FORMS, load

TEXT = "The stream of a model runs through all of its layers.\n" * 40
AS_IT_IS = plan_chooser(None, None, (), False)
SOLAR = plan_chooser(None, None, (), True)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def short(path, n_chunks: int = 3) -> TextChoice:
    return TextChoice((path,), None, 24, n_chunks)


def measured(base, text, choose=AS_IT_IS, dtype=None) -> SeamResults:
    return find_seams(str(base), choose, text, Machine("cpu", dtype), GrowOutputs("seam"))[0]


# Numbers


def layer_inputs(base, tokens: np.ndarray) -> list[torch.Tensor]:
    """By transformers, float64 in the end: inputs of all layers, and what the last one gives."""
    model, last = load(base), []
    # The last of transformers' hidden states is behind the final norm.
    model.model.norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    with torch.no_grad():
        out = model(
            torch.from_numpy(tokens).long(), output_hidden_states=True, use_cache=False
        ).hidden_states
    return [h[:, 1:].double() for h in (*out[:-1], *last)]


def check_numbers(geometry: StreamGeometry, states: list[torch.Tensor]) -> None:
    n = len(states)
    assert geometry.angles.shape == (n, n)
    assert geometry.n_tokens == states[0][..., 0].numel()
    for i, h in enumerate(states):
        assert geometry.rms[i] == pytest.approx(h.square().mean(-1).sqrt().mean().item(), rel=1e-5)
    for i, j in combinations(range(n), 2):
        cosine = torch.cosine_similarity(states[i], states[j], dim=-1)
        angle = torch.arccos(cosine).mean().item() / math.pi
        assert geometry.angles[i, j] == pytest.approx(angle, abs=1e-5)
        assert geometry.angles[j, i] == geometry.angles[i, j]
        if j == i + 1:
            influence = 1 - cosine.mean().item()
            assert geometry.influence[i] == pytest.approx(influence, abs=1e-5)
    assert not np.diagonal(geometry.angles).any()


@pytest.mark.parametrize("form", ["llama-gqa", "llama-biases", "mistral-head-dim"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_numbers_are_those_of_a_plain_forward(make_checkpoint, text, form, dtype):
    base = make_checkpoint(dtype=dtype, **FORMS[form])
    found = measured(base, short(text))
    check_numbers(found.geometry, layer_inputs(base, found.chunks.tokens))


def test_numbers_of_pico_and_of_an_upscaled_base(pico, text, tmp_path):
    found = measured("pico", short(text))
    check_numbers(found.geometry, layer_inputs(pico, found.chunks.tokens))
    deep = tmp_path / "deep"
    export_checkpoint("pico", SOLAR, deep)
    found = measured(deep, short(text))
    assert found.geometry.n_layers == 12
    check_numbers(found.geometry, layer_inputs(deep, found.chunks.tokens))


def test_a_plan_changes_no_number_of_the_base(make_checkpoint, text):
    base = make_checkpoint(dtype="F32")
    alone, planned = (measured(base, short(text), c).geometry for c in (AS_IT_IS, SOLAR))
    np.testing.assert_array_equal(alone.angles, planned.angles)
    assert planned.n_layers == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_is_what_was_computed(make_checkpoint, text, tmp_path, dtype, monkeypatch):
    # So few bytes that a chunk comes in several pieces.
    monkeypatch.setattr(streams, "_BLOCK_BYTES", 7 * 8 * 5 * 64)
    model = find_model(str(make_checkpoint()), AS_IT_IS, weights=True, say=print)
    tokens = read_chunks(model, short(text)).tokens
    settings = engine.ComputeSettings("cpu", dtype, 48)
    shown = {}

    def keep(layer, h):
        assert h.dtype == engine.DTYPES[dtype]
        shown[layer] = h.float().numpy().copy()

    visitor = streams.NullVisitor()
    last = engine.run_layers(model.open(), tokens, visitor, settings, between=keep)
    assert sorted(shown) == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(shown[4], last.float().numpy())
    folder, told = tmp_path / "new" / "folder", []
    with streams.kept_streams(model.open(), tokens, settings, folder) as kept:
        for i, expected in shown.items():
            for c in range(3):
                np.testing.assert_array_equal(kept.read(i, c), expected[c])
        assert not list(folder.iterdir()), "the file has no name"
        chunks = [list(blocks) for blocks in kept.by_chunk(range(5), told.append)]
        some = kept.load(2, slice(1, 3))
        np.testing.assert_array_equal(some.float().numpy(), shown[2][1:3])
    pieces = [piece for blocks in chunks for piece in blocks]
    assert len(pieces) == 3 * 4 and sum(told) == 3 * 23
    whole = np.stack(list(shown.values()))[:, :, 1:].reshape(5, -1, 64)
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)
    # How tokens are cut into pieces does not matter.
    together, cut = measure_streams([[whole]]), measure_streams(chunks)
    np.testing.assert_allclose(cut.angles, together.angles, atol=1e-12)
    np.testing.assert_allclose(cut.rms, together.rms, rtol=1e-12)
    # The error is that of the mean of three chunks.
    each = [measure_streams([blocks]) for blocks in chunks]
    assert together.angle_errors is None and each[0].angle_errors is None
    expected = np.std([g.angles for g in each], axis=0, ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(cut.angle_errors, expected, atol=1e-12)


def test_angles_of_streams_that_are_known():
    east, north = np.array([2.0, 0, 0]), np.array([0, 3.0, 0])
    rows = [east, north, east + 2 / 3 * north, -east, 0 * east]
    g = measure_streams([[np.stack(rows)[:, None]]])
    assert g.angles[0].tolist() == pytest.approx([0, 0.5, 0.25, 1, 0.5])
    assert g.influence.tolist() == pytest.approx([1, 1 - 2**-0.5, 1 + 2**-0.5, 1])
    assert g.rms.tolist() == pytest.approx(np.sqrt([4 / 3, 3, 8 / 3, 4 / 3, 0]).tolist())


# Outliers


def test_z_scores_are_those_of_the_median_deviation():
    values = np.array([0.03, 0.05, 0.04, 0.06, 0.3])
    # Median 0.05; deviations 0.02, 0, 0.01, 0.01, 0.25, whose median is 0.01.
    assert modified_z(values).tolist() == pytest.approx((0.6745 * (values - 0.05) / 0.01), rel=1e-4)


def test_equal_layers_are_no_outliers_and_one_among_them_is():
    assert not modified_z(np.full(6, 0.1)).any()
    found = modified_z(np.array([0.1] * 9 + [0.9]))
    # Mean deviation 0.08, which is 0.1003 of a standard deviation's unit.
    assert found[-1] == pytest.approx(0.8 / (1.253314 * 0.08))
    assert not found[:-1].any()


@given(
    st.lists(st.floats(0, 2), min_size=1, max_size=40),
    st.floats(0.01, 100),
    st.floats(-1, 1),
)
@examples(60)
def test_z_scores_do_not_depend_on_the_scale(values, factor, shift):
    z = modified_z(np.array(values))
    assert np.isfinite(z).all()
    spread = np.ptp(values)
    if spread > 1e-3:
        moved = modified_z(np.array(values) * factor + shift)
        if np.median(np.abs(values - np.median(values))) > 1e-3:
            np.testing.assert_allclose(moved, z, rtol=1e-6, atol=1e-6)


# Blocks and seams


@st.composite
def bases(draw):
    """Angles of a base, its outliers, and the period of its pattern."""
    n = draw(st.integers(1, 12))
    values = draw(st.lists(st.integers(0, 9), min_size=(n + 1) ** 2, max_size=(n + 1) ** 2))
    angles = np.reshape(values, (n + 1, n + 1)) / 10
    angles = np.triu(angles, 1) + np.triu(angles, 1).T
    return angles, draw(st.sets(st.integers(0, n - 1))), draw(st.integers(1, 4))


@given(bases())
@examples(150)
def test_the_best_block_is_the_best_that_repeats_no_outlier(drawn):
    angles, outliers, period = drawn
    n = len(angles) - 1
    found = best_blocks(angles, outliers, period)
    assert [b.size for b in found] == [k for k in range(1, n + 1) if k % period == 0]
    for b in found:
        blocks = {(i, i + b.size): angles[i + b.size, i] for i in range(n - b.size + 1)}
        clean = {k: a for k, a in blocks.items() if not outliers & set(range(*k))}
        assert b.n_allowed == len(clean)
        assert "outlier" in b.reason
        if b.block is None:
            assert not clean and b.angle is None
            continue
        assert b.angle == clean[b.block] == min(clean.values())
        assert (b.smaller is not None) == (min(blocks.values()) < b.angle)
        if b.smaller is not None:
            assert b.smaller_angle == min(blocks.values())
            assert set(b.repeats) == outliers & set(range(*b.smaller)) != set()
        plan = from_block(n, "{}:{}".format(*b.block))
        assert not repeated_outliers(plan, outliers)
        # The angle is that of the plan's one seam, which keeps the pattern.
        if plan.seams:
            ones = np.ones(n + 1)
            (crossing,) = measure_seams(plan, StreamGeometry(ones, ones[1:], angles, 1), period)
            assert crossing.angle == b.angle and crossing.aligned


def test_a_seam_is_between_what_arrives_and_what_was_there():
    n = 6
    angles = np.add.outer(10 * np.arange(n + 1), np.arange(n + 1)) / 100
    rms = 2.0 ** np.arange(n + 1)
    g = StreamGeometry(rms, np.ones(n), angles, 1)
    # Layer 4 gives stream 5; layer 1 had stream 1.
    (c,) = measure_seams(from_drop(n, 1), g, 1)
    assert (c.seam.left, c.seam.right, c.angle, c.rms_ratio) == (4, 1, 0.51, 16)
    # Layers are left out: layer 1 gives stream 2, and layer 4 had stream 4.
    (c,) = measure_seams(parse(n, "0:2,4:6"), g, 1)
    assert (c.angle, c.rms_ratio) == (0.24, 0.25)
    assert measure_seams(identity(n), g, 1) == ()
    assert [c.aligned for c in measure_seams(from_drop(n, 1), g, 2)] == [True]
    assert [c.aligned for c in measure_seams(from_drop(n, 1), g, 3)] == [False]


def test_outliers_that_a_plan_repeats():
    assert repeated_outliers(from_drop(8, 2), {0, 2, 5, 7}) == (2, 5)
    assert repeated_outliers(identity(8), {0, 2}) == ()


# The command


def test_json(run, text):
    words = ("seam", "pico", "--text", text, "--ctx", "24", "--chunks", "3", "--device", "cpu")
    code, out, err = run(*words, "--drop", "2", "--json")
    assert code == 0, err
    found, again = json.loads(out), json.loads(out)
    assert (found["plan"], found["n_base_layers"], found["n_layers"]) == ("0:6,2:8", 8, 12)
    assert np.array(found["angles"]).shape == (9, 9)
    assert found["text"] | {"sha256": ""} == {
        "label": "text.txt",
        "n_ctx": 24,
        "chunks": {"text": 3},
        "n_tokens": 3 * 23,
        "sha256": "",
    }
    layers = found["layers"]
    assert [x["layer"] for x in layers] == list(range(8))
    assert [x["runs"] for x in layers] == [1, 1, 2, 2, 2, 2, 1, 1]
    assert [x["layer"] for x in layers if x["outlier"]] == found["outliers"]
    assert found["repeated_outliers"] == [i for i in found["outliers"] if 2 <= i < 6]
    (seam,) = found["seams"]
    assert 0 < seam.pop("angle_error") < 0.1
    ratio = layers[6]["rms"] / layers[2]["rms"]
    assert seam.pop("rms_ratio") == pytest.approx(ratio, rel=1e-5)
    angle = found["angles"][6][2]
    assert seam == {"position": 6, "left": 5, "right": 2, "angle": angle, "aligned": True}
    assert found["period"] == 1
    assert [b["size"] for b in found["best_blocks"]] == list(range(1, 9))
    for b in found["best_blocks"]:
        assert b.keys() == {"size", "n_layers", "block", "angle", "reason"}
        assert b["n_layers"] == 8 + b["size"]
        if b["block"]:
            start, end = b["block"]
            assert found["angles"][start][end] == b["angle"]
    assert json.loads(run(*words, "--drop", "2", "--json", "--seed", "0")[1]) == again
    assert json.loads(run(*words, "--json", "--seed", "1")[1])["text"] != again["text"]


def test_files(run, text, tmp_path):
    out = tmp_path / "out"
    words = ("seam", "pico", "--text", text, "--ctx", "24", "--chunks", "1", "--device", "cpu")
    words = (*words, "--place", "interleaved", "--block", "2:6", "-o", out)
    code, printed, err = run(*words)
    assert code == 0, err
    assert sorted(p.name for p in out.iterdir()) == [
        f"seam.{x}" for x in ("json", "md", "png", "svg")
    ]
    # Paths may be longer.
    lines = [line for line in printed.splitlines() if str(tmp_path) not in line]
    assert "2 → 2" in printed and max(map(len, lines)) <= 80
    assert (out / "seam.md").read_text() in printed
    assert len(json.loads((out / "seam.json").read_text())["seams"]) == 4
    code, _, err = run(*words)
    assert code != 0 and "--overwrite" in err
    assert run(*words, "--overwrite", "--no-plots")[0] == 0


def check_refused(case):
    run, said, words = case
    code, out, err = run("seam", "--device", "cpu", *words)
    assert code != 0 and not out.strip()
    (line,) = err.strip().splitlines()
    assert said in line


def test_bad_input_gets_one_sentence(run, text, tmp_path):
    tiny = tmp_path / "tiny.txt"
    tiny.write_text("Too short.")
    read = ("--text", text)
    cases = {
        "too few tokens for one chunk": ("pico", "--text", tiny),
        "does not fit a model of 8 layers": ("pico", *read, "--block", "4:9"),
        "0 to 3": ("pico", *read, "--drop", "4"),
        "--drop and --block say the same thing": ("pico", *read, "--drop", "1", "--block", "2:3"),
        "more than the model's context": ("pico", *read, "--ctx", "999999"),
        "there is no device": ("pico", *read, "--device", "tpu"),
    }
    check_each(check_refused, [(run, said, words) for said, words in cases.items()])


def test_a_plan_that_breaks_a_pattern_is_refused(run, text, monkeypatch):
    monkeypatch.setitem(vars(load_families()["llama"]), "period", 4)
    words = ("seam", "pico", "--text", text, "--ctx", "24", "--chunks", "1", "--device", "cpu")
    code, _, err = run(*words, "--drop", "3")
    assert code != 0 and "follow a pattern of 4" in err and "choose --drop 2, which makes" in err
    code, out, err = run(*words, "--drop", "2")
    assert code == 0, err
    assert "The pattern of 4 layers goes on across every seam." in " ".join(out.split())
    found = json.loads(run(*words, "--drop", "2", "--json")[1])
    assert found["period"] == 4 and [b["size"] for b in found["best_blocks"]] == [4, 8]


# Page and picture


def made(n: int, plan: DepthPlan, outliers=(), period: int = 1, name: str = "base") -> SeamResults:
    """Results of a base whose stream turns a little in each layer, and far in some."""
    turns = np.full(n, 0.02) + 0.001 * np.arange(n)
    turns[list(outliers)] = 0.3
    away = np.concatenate([[0], np.cumsum(turns)])
    angles = np.minimum(np.abs(np.subtract.outer(away, away)), 1)
    g = StreamGeometry(np.geomspace(0.1, 900, n + 1), 1 - np.cos(np.pi * turns), angles, 100)
    assert g.outliers == tuple(outliers)
    assert {i for i in range(n) if g.influence[i] > g.outlier_limit} == set(outliers)
    chunks = Chunks(np.zeros((2, 51), np.int32), ("en", "ko"), 0, "0" * 64)
    return SeamResults(name, plan, period, g, chunks, "a text")


PAGES = {
    "one seam": made(30, from_drop(30, 7), (0, 1, 24, 29)),
    "no seam": made(3, identity(3)),
    "an outlier runs twice": made(12, from_drop(12, 3), (5,)),
    "many seams": made(126, from_block(126, "3:120").interleaved(), (0, 125), name="a-name-" * 20),
    "two blocks": made(40, from_block(40, "2:9").then(from_block(47, "20:31")), (0,)),
    "a pattern": made(32, from_drop(32, 8), (31,), period=4),
}


@pytest.mark.parametrize("case", PAGES)
def test_the_page_fits_a_terminal(case):
    page = seam_page(PAGES[case])
    assert max(map(len, page.splitlines())) <= 80
    assert "…" not in page.replace("…-", "") or case == "many seams"
    assert ("The plan repeats" in page) == (case == "an outlier runs twice")
    assert ("has no seam" in page) == (case == "no seam")


@pytest.mark.parametrize("case", PAGES)
def test_words_of_the_picture_do_not_overlap(case):
    results = PAGES[case]
    figure = draw_seams(results)
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    main, below, scale = figure.axes
    words = []
    for axis in (main.xaxis, main.yaxis, below.xaxis, below.yaxis, scale.yaxis):
        low, high = sorted(axis.get_view_interval())
        # Others are there and not drawn.
        words += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        words += [tick.label2 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    words = [word for word in words if word.get_visible()]
    for axes in figure.axes:
        words += [axes.xaxis.label, axes.yaxis.label, axes._left_title]
    legend = main.get_legend()
    words += legend.get_texts() if legend else []
    boxes = [(w.get_text(), w.get_window_extent(renderer)) for w in words if w.get_text()]
    assert len(boxes) > 15
    for (first, a), (second, b) in combinations(boxes, 2):
        assert not a.padded(-1).overlaps(b.padded(-1)), (first, second)
    for text, b in boxes:
        assert figure.bbox.x0 <= b.x0 and b.x1 <= figure.bbox.x1, text
    if legend:
        # Its upper right corner is in the empty half of the map.
        box = legend.get_window_extent(renderer).transformed(main.transData.inverted())
        assert box.x1 < min(box.y0, box.y1)


def test_equal_results_give_equal_pictures():
    for form, magic in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        first, second = (render_seams(PAGES["one seam"], form) for _ in range(2))
        assert first == second and first.startswith(magic)
