"""`sweep`: its losses against up-scaled models that were really built, and how plans share runs."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dus_edge.calibrate import sweep as engine
from dus_edge.errors import UsageError
from dus_edge.jobs.export.calibration import Machine, TextChoice, read_chunks
from dus_edge.jobs.export.checkpoint import export_checkpoint
from dus_edge.jobs.grow.outputs import GrowOutputs
from dus_edge.jobs.grow.sweep import PlannedUse, sweep_plans
from dus_edge.tables.grow.sweep import brief_sweep_page, sweep_page
from dus_edge.tables.grow.sweep_json import sweep_csv
from dus_edge.upscale.candidates import SweepChoice, parse_numbers, sweep_candidates
from dus_edge.upscale.methods import PLAIN_COPIES, Method
from dus_edge.upscale.model import find_model
from dus_edge.upscale.plan import DepthPlan, from_block, from_drop, identity, parse
from dus_edge.upscale.ranking import pareto, ranks, resampled, spearman, spearman_within
from dus_edge.upscale.shared_run import SharedSchedule, share_layers

from .cases import check_each
from .draws import examples
from .forms import load

TEXT = "A plan is judged before it is trained, and that is not the end of it.\n" * 60


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def swept(base, asked: SweepChoice, text, n_chunks: int = 4, **use):
    choice = TextChoice((text,), None, 24, n_chunks)
    machine, outputs = Machine("cpu"), GrowOutputs("sweep")
    return sweep_plans(str(base), asked, choice, machine, PlannedUse(**use), outputs)[0]


# Numbers


def next_token(model, tokens: np.ndarray) -> torch.Tensor:
    """Log-probabilities by transformers, ``(n_chunks, n_ctx - 1, vocab)`` float64."""
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens.astype(np.int64))).logits[:, :-1]
    return logits.double().log_softmax(-1)


def check_against_built(base, plan, found, text, folder) -> None:
    """A swept plan against the checkpoint that `upscale` writes, in transformers."""
    export_checkpoint(str(base), lambda n: plan, folder, overwrite=True)
    model = find_model(str(base), identity, weights=True, say=print)
    chunks = read_chunks(model, TextChoice((text,), None, 24, 4))
    targets = torch.from_numpy(chunks.tokens[:, 1:].astype(np.int64))[..., None]
    p, q = next_token(load(base), chunks.tokens), next_token(load(folder), chunks.tokens)
    nll = [-x.gather(-1, targets)[..., 0].mean().item() for x in (p, q)]
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    assert found.loss == pytest.approx(nll[1] - nll[0], abs=1e-4)
    assert found.total.perplexity.value == pytest.approx(np.exp(nll[1]), rel=1e-4)
    assert found.total.kl.value == pytest.approx(kl, abs=1e-4)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert found.total.same_top.value == pytest.approx(same, abs=1e-12)
    by_chunk = (q - p).gather(-1, targets)[..., 0].mean(-1)
    np.testing.assert_allclose(found.losses, -by_chunk.numpy(), atol=1e-4)


def test_losses_are_those_of_models_that_were_built(make_checkpoint, text, tmp_path):
    base = make_checkpoint(dtype="F32", num_hidden_layers=5, attention_bias=True)
    asked = SweepChoice(
        drops=(1, 2),
        sizes=(2,),
        plans=("2:5,0:3,1:5", "0:5,4:5,4:5"),
        scales=(0.0, 0.5, 1.0),
        places=("stacked", "interleaved"),
        methods=("copy", "averaged"),
    )
    results = swept(base, asked, text)
    assert len(results.plans) > 60

    def check(found):
        check_against_built(base, found.plan, found, text, tmp_path / "up")

    # Each plan has twelve ways, so that every fifth one is of every plan and in every way.
    some = results.plans[::5]
    check_each(check, some)
    assert len({p.plan.method for p in some}) == 6 and any(
        "place" in p.candidate.label for p in some
    )
    assert {"0:5,4:5,4:5", "2:5,0:3,1:5"} <= {p.candidate.label.split(" ")[0] for p in some}


def test_copies_that_do_nothing_are_the_base_exactly(make_checkpoint, text):
    base = make_checkpoint(dtype="BF16", num_hidden_layers=4)
    found = swept(base, SweepChoice(drops=(1,), blocks=True, scales=(0.0,)), text)
    for p in found.plans:
        assert p.loss == 0 and p.total.kl.value == 0 and p.total.same_top.value == 1
        assert p.total.perplexity == p.total.perplexity_reference


def test_the_builtin_base(pico, text, tmp_path):
    results = swept(pico, SweepChoice(drops=(1, 2)), text)
    for found in results.plans:
        check_against_built(pico, found.plan, found, text, tmp_path / "up")
    model = find_model(str(pico), identity, weights=True, say=print)
    seams = [p.plan.seams for p in results.plans]
    assert all(len(s) == 1 for s in seams) and all(0 < p.angle < 1 for p in results.plans)
    assert results.plans[0].n_parameters > model.n_parameters


# How plans share layers


def ways(n: int):
    """Plans of a base of n layers, any ranges, with any copies."""
    ranges = st.tuples(st.integers(0, n - 1), st.integers(1, n)).filter(lambda r: r[0] < r[1])
    methods = st.sampled_from([PLAIN_COPIES, Method("copy", 0.0), Method("copy", 0.5)])
    kinds = st.one_of(methods, st.just(Method("averaged")))

    def made(drawn):
        parts, method = drawn
        plan = DepthPlan(n, tuple(i for a, b in parts for i in range(a, b)))
        return plan.with_method(method) if plan.copies else plan

    return st.tuples(st.lists(ranges, min_size=1, max_size=4), kinds).map(made)


def played(n: int, plan: DepthPlan) -> tuple:
    """What a plan's final states are made by, one layer behind the other."""
    found: list[tuple] = []
    for i in range(plan.depth):
        scale = plan.method.branch_scale if i in plan.copies else 1.0
        if scale:
            found.append((*plan.parents(i), scale))
    return tuple(found)


def play(n: int, schedule: SharedSchedule) -> list[tuple]:
    """The slots after all steps; a step is only ever cut short, and done again."""
    slots: list = [()] + [None] * (schedule.n_slots - 1)
    for step in schedule.steps:
        assert step.read != step.write
        averaged = step.making.kind == "averaged"
        parents = (step.source, step.source + 1) if averaged else (step.source,)
        assert slots[step.read] is not None
        slots[step.write] = (*slots[step.read], (*parents, step.making.branch_scale))
    return slots


@given(st.integers(2, 6).flatmap(lambda n: st.tuples(st.just(n), st.lists(ways(n), max_size=8))))
@examples(60)
def test_every_plan_ends_with_its_own_layers(drawn):
    n, plans = drawn
    schedule = share_layers(n, plans)
    slots = play(n, schedule)
    for plan, end in zip(plans, schedule.ends, strict=True):
        assert slots[end] == played(n, plan)
    for i, slot in enumerate(schedule.streams):
        assert slots[slot] == tuple((k, 1.0) for k in range(i))
    # A wave goes over the layers once, and nothing runs twice on the same input.
    order = [(s.wave, s.source) for s in schedule.steps]
    assert order == sorted(order)
    whole = {played(n, p)[:k] for p in [*plans, identity(n)] for k in range(1, 99)}
    assert len(schedule.steps) == len(whole - {()})
    assert [i for a, b in schedule.groups for i in range(a, b)] == list(range(len(order)))


def test_solars_plans_need_two_waves_and_half_of_the_layers():
    plans = [from_drop(32, m) for m in range(1, 16)]
    schedule = share_layers(32, plans)
    assert {s.wave for s in schedule.steps} == {0, 1}
    assert len(schedule.steps) == 32 + sum(32 - m for m in range(1, 16))
    assert len(schedule.groups) == 32 + 31
    # The streams of the base, each plan, and one to write to.
    assert schedule.n_slots == 33 + 15 + 1
    in_place = [from_drop(32, m).interleaved() for m in (8, 12)]
    assert {s.wave for s in share_layers(32, in_place).steps} == {0}


# Which plans


def labels(n: int, period: int = 1, **asked) -> list[str]:
    return [c.label for c in sweep_candidates(n, SweepChoice(**asked), period, "M")]


def test_which_plans_are_compared():
    assert labels(8) == ["m 1", "m 2", "m 3"]
    assert labels(8, drops=(2,)) == ["m 2"]
    # A block that is one of SOLAR's is there once.
    assert labels(6, drops=(2,), blocks=True) == ["m 2", "0:2", "1:3", "3:5", "4:6"]
    assert labels(6, sizes=(4,)) == ["0:4", "1:5", "2:6"]
    assert labels(6, sizes=(3,), every=2) == ["0:3", "2:5"]
    assert labels(4, plans=("0:4,2:4",)) == ["0:4,2:4"]
    assert labels(4, plans=("0:3",), scales=(1.0, 0.5)) == ["0:3"]
    assert labels(8, 2, sizes=(2, 3)) == [f"{i}:{i + 2}" for i in range(7)]
    both = labels(6, drops=(1,), scales=(1.0, 0.5), places=("stacked", "interleaved"))
    assert both == ["m 1", "m 1 × 0.5", "m 1 in place", "m 1 in place × 0.5"]
    found = sweep_candidates(6, SweepChoice(drops=(2,), blocks=True), 1, "M")
    assert [c.plan for c in found][:2] == [from_drop(6, 2), from_block(6, "0:2")]
    assert parse_numbers("2, 4,8:11", "--m") == (2, 4, 8, 9, 10)


def test_a_plans_file_keeps_what_it_says_of_copies(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text('block = "1:3"\nbranch_scale = 0.25\n')
    (found,) = sweep_candidates(4, SweepChoice(plans=(str(path),)), 1, "M")
    assert found.plan.method.branch_scale == 0.25 and found.label.endswith("× 0.25")


# Ranking


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
@examples(100)
def test_what_nothing_beats(points):
    costs, losses = [c for c, _ in points], [x for _, x in points]
    found = pareto(costs, losses)
    kept = {points[i] for i in found}
    for cost, loss in points:
        beaten = any(c <= cost and x <= loss and (c, x) != (cost, loss) for c, x in points)
        assert ((cost, loss) in kept) == (not beaten)
    assert len(kept) == len(found)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), max_size=15))
@examples(100)
def test_correlations_are_scipys(pairs):
    scipy = pytest.importorskip("scipy.stats")
    x, y = [a for a, _ in pairs], [b for _, b in pairs]
    if pairs:
        np.testing.assert_array_equal(ranks(x), scipy.rankdata(x))
    found = spearman(x, y)
    if len(pairs) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(scipy.spearmanr(x, y).statistic, abs=1e-12)


def test_with_the_size_held_only_plans_of_one_size_are_compared():
    sizes = [2] * 4 + [4] * 5 + [6] * 3
    x = [1, 2, 3, 4, 1, 2, 3, 4, 5, 9, 9, 9]
    y = [1, 2, 3, 4, 50, 40, 30, 20, 10, 1, 2, 3]
    rho, n = spearman_within(sizes, x, y)
    assert n == 9 and rho == pytest.approx((4 * 1 + 5 * -1) / 9)
    assert spearman_within([1, 2, 3], [1, 2, 3], [1, 2, 3]) == (None, 0)


def test_the_bootstrap_draws_chunks_within_their_language():
    values = np.array([0.0, 2.0, 10.0, 14.0])
    strata = np.array([0, 0, 1, 1])
    low, high = resampled(lambda chunks: float(values[chunks].mean()), strata)
    assert low == 5.0 and high == 8.0, "the ends of all sixteen draws"
    assert resampled(lambda chunks: 1.0, np.array([0, 0, 1])) is None


# The command


def test_pages_and_files(run, make_checkpoint, text, tmp_path):
    base = make_checkpoint(num_hidden_layers=6)
    out = tmp_path / "out"
    command = ["sweep", base, "--blocks", "--branch-scale", "0.5,1", "--device", "rtx-3060-12gb"]
    command += ["--text", text, "--ctx", "24", "--chunks", "4", "-o", out]
    code, shown, _ = run(*command)
    # Paths may be longer.
    lines = [line for line in shown.splitlines() if str(tmp_path) not in line]
    assert code == 0 and max(map(len, lines)) <= 80
    names = sorted(p.name for p in out.iterdir())
    assert names == [f"sweep.{e}" for e in ("csv", "json", "md", "png", "svg")]
    found = json.loads((out / "sweep.json").read_text())
    n = len(found["plans"])
    assert n == 2 * (3 + 5) and found["text"]["n_scored"] == 4 * 23
    rows = list(csv.DictReader(io.StringIO((out / "sweep.csv").read_text())))
    assert [r["label"] for r in rows] == [p["label"] for p in found["plans"]]
    for p, row in zip(found["plans"], rows, strict=True):
        assert p["loss_interval"][0] <= p["loss"] <= p["loss_interval"][1]
        assert float(row["loss"]) == p["loss"] and row["fits"] == "1"
    # Nothing that is as deep, of the same method, loses less than what is called best.
    for p in found["plans"]:
        rivals = [
            q
            for q in found["plans"]
            if q["branch_scale"] == p["branch_scale"]
            and q["n_layers"] >= p["n_layers"]
            and q["loss"] < p["loss"]
        ]
        assert p["best_of_its_depth"] == (not rivals)
    whole = (out / "sweep.md").read_text()
    assert all(p["label"] in whole for p in found["plans"])
    code, _, err = run(*command)
    assert code != 0 and "--overwrite" in err


def test_a_run_that_was_killed_goes_on(make_checkpoint, text, tmp_path, monkeypatch):
    base = make_checkpoint(num_hidden_layers=6)
    choice = TextChoice((text,), None, 24, 4)
    asked = SweepChoice(blocks=True, scales=(0.5, 1.0))
    whole = swept(base, asked, text)
    monkeypatch.chdir(tmp_path)
    code = (
        "import time, dus_edge.calibrate.sweep as s\n"
        "real = s.SweepState.done\n"
        "s.SweepState.done = lambda self, n: (real(self, n), time.sleep(0.05))\n"
        "from dus_edge.cli.main import main; main()"
    )
    arguments = ["--blocks", "--branch-scale", "0.5,1", "--ctx", "24", "--chunks", "4"]
    command = [sys.executable, "-c", code, "sweep", str(base), "--text", str(text), *arguments]
    process = subprocess.Popen([*command, "-o", "out"], stdout=subprocess.DEVNULL, stderr=-3)
    index = tmp_path / "out" / "sweep.state" / "state.json"
    end = time.monotonic() + 60
    while not index.exists() or json.loads(index.read_text())["n_done"] < 7:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    n_done = json.loads(index.read_text())["n_done"]
    started = []
    real = engine.run_schedule
    monkeypatch.setattr(
        "dus_edge.calibrate.sweep.run_schedule",
        lambda *args, **how: (started.append(how["start"]), real(*args, **how)),
    )
    outputs = GrowOutputs("sweep", tmp_path / "out", False, tables=("md", "json", "csv"))
    again = sweep_plans(str(base), asked, choice, Machine("cpu"), PlannedUse(), outputs)[0]
    assert started == [n_done] and n_done >= 7
    assert [p.loss for p in again.plans] == [p.loss for p in whole.plans]
    assert sweep_csv(again) == sweep_csv(whole) and not index.parent.exists()


def test_a_run_that_was_interrupted_while_it_scored_goes_on(
    make_checkpoint, text, tmp_path, monkeypatch
):
    base = make_checkpoint(num_hidden_layers=3)
    choice, asked = TextChoice((text,), None, 24, 4), SweepChoice(drops=(1,))
    outputs = GrowOutputs("sweep", tmp_path / "out", False, tables=("md", "json", "csv"))
    real, scored = engine.NextTokenHead.scores, []

    def scores(self, states, chunk, *more):
        scored.append(chunk)
        if scored == [0, 1, 2]:
            raise KeyboardInterrupt
        return real(self, states, chunk, *more)

    monkeypatch.setattr(engine.NextTokenHead, "scores", scores)
    arguments = (str(base), asked, choice, Machine("cpu"), PlannedUse(), outputs)
    with pytest.raises(KeyboardInterrupt):
        sweep_plans(*arguments)
    results = sweep_plans(*arguments)[0]
    assert scored == [0, 1, 2, 2, 3]  # no step again, and no chunk that was known
    assert [p.loss for p in results.plans] == [p.loss for p in swept(base, asked, text).plans]


def test_plans_that_are_trained_a_little(run, make_checkpoint, tmp_path):
    base = make_checkpoint(num_hidden_layers=5, dtype="F32")
    text = tmp_path / "text.jsonl"
    rows = [{"text": f"Text number {i} is about {i % 7} things, not {i % 5}."} for i in range(80)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["sweep", base, "--m", "1:3", "--sizes", "3,4", "--text", text, "--ctx", "24"]
    command += ["--chunks", "4", "--heal", "3", "--batch", "2", "--seeds", "2", "--lr", "1e-2"]
    command += ["--heldout-tokens", "200", "--compute", "cpu", "-o", tmp_path / "out"]
    code, shown, err = run(*command)
    assert code == 0, err
    assert "After 144 tokens" in shown and "loss before training" in shown
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    for p in found["plans"]:
        healed = p["healed"]
        assert len(healed["after"]) == 2 and healed["n_tokens"] == 144
        assert all(a < b for a, b in zip(healed["after"], healed["before"], strict=True))
    assert len({tuple(p["healed"]["base"]) for p in found["plans"]}) == 1
    # `heal` itself, of the same budget, ends at the same loss.
    plan = found["plans"][0]
    alone = ["heal", base, "--plan", plan["plan"], "--text", text, "--ctx", "24", "--steps", "3"]
    alone += ["--batch", "2", "--lr", "1e-2", "--heldout-tokens", "200", "--eval-every", "3"]
    code, shown, err = run(*alone, "--device", "cpu", "-o", tmp_path / "healed", "--json")
    assert code == 0, err
    same = json.loads(shown)
    assert same["healed_loss"] == pytest.approx(plan["healed"]["after"][0], abs=1e-6)
    # What is known is not trained again.
    code, again, err = run(*command, "--overwrite", "--json")
    assert code == 0 and json.loads(again)["plans"] == found["plans"], err
    code, _, err = run("sweep", base, "--heal", "3", "--text", text, "--ctx", "24")
    assert code != 0 and "-o DIR" in err


def check_refused(case):
    run, arguments, words = case
    code, shown, err = run("sweep", *arguments)
    assert code != 0 and err.count("\n") <= 3 and not shown.strip(), err
    assert words in " ".join(err.split()), err


def test_bad_input_gets_one_sentence(run, make_checkpoint, text, tmp_path):
    base = make_checkpoint(num_hidden_layers=4)
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    cases = [
        (["--m", "2"], "m = 2 is out of range"),
        (["--m", "x"], "whole numbers"),
        (["--m", "3:3"], "no number"),
        (["--sizes", "5"], "no block of a base of 4 layers"),
        (["--plan", "0:9"], "does not fit a base of 4 layers"),
        (["--branch-scale", "0.5,x"], "a number from 0 on"),
        (["--branch-scale", "nan"], "a number from 0 on"),
        (["--place", "beside"], "stacked or interleaved"),
        (["--method", "sum"], "copy or averaged"),
        (["--device", "rtx-9999"], "rtx-9999"),
        (["-q", "q9"], "q9"),
        (["--text", str(short)], "short"),
        (["--text", str(text), "--ctx", "100000"], "context"),
    ]
    check_each(check_refused, [(run, [str(base), *a], words) for a, words in cases])
    with pytest.raises(UsageError, match="multiples of 4"):
        sweep_candidates(8, SweepChoice(sizes=(2,)), 4, "M")
    with pytest.raises(UsageError, match="pattern of 2"):
        sweep_candidates(8, SweepChoice(plans=("0:8,3:8",)), 2, "M")


def test_the_page_of_a_sweep_without_languages_or_seams(make_checkpoint, text):
    base = make_checkpoint(num_hidden_layers=3)
    results = swept(base, SweepChoice(plans=("0:2",)), text, n_chunks=1)
    page = sweep_page(results)
    assert "–" in page and "±" not in page.split("Best")[1]
    assert parse(3, "0:2") == results.plans[0].plan
    assert brief_sweep_page(results) == page
