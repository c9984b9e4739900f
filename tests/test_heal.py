"""Healing as a whole: a run is the same however often it is killed, and by however many made."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dus_edge.calibrate.world import World
from dus_edge.errors import DusEdgeError, UsageError
from dus_edge.jobs.job import Writing
from dus_edge.jobs.train.heal import HealJob, heal
from dus_edge.train.heal.mode import parse_mode
from dus_edge.train.recovery.options import HealOptions, TextPart
from dus_edge.upscale.model import plan_chooser

from .cases import check_each

SCRIPT = Path(sys.executable).with_name("dus-edge")
SOURCES = Path(__file__).parents[1] / "dus_edge" / "checkpoint"
TEXT = Path(tempfile.mkdtemp(prefix="dus-edge-test-")) / "functions.jsonl"
COMMON = [
    *("--text", str(TEXT), "--ctx", "64", "--batch", "2", "--heldout-tokens", "600"),
    *("--eval-every", "4", "--save-every", "2", "--lr", "3e-4", "--threads", "1"),
]
UP = plan_chooser(None, None, (), True)
STEPS = 16
#: How often a run is killed, behind its interrupt.
KILLS = 1


def start(out: Path, *more: str, processes: int = 1) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT)]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command = [sys.executable, *launcher, str(processes), str(SCRIPT)]
    return subprocess.Popen(
        [*command, "heal", "pico", *COMMON, *more, "-o", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module", autouse=True)
def text():
    """The program's own functions, a document each: short ones, so that few are held out."""
    parts = [p for file in sorted(SOURCES.glob("*.py")) for p in file.read_text().split("\n\n\n")]
    rows = [{"text": part, "language": "code"} for part in parts if part.strip()]
    TEXT.write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield
    shutil.rmtree(TEXT.parent)


def kill(run: subprocess.Popen[str], out: Path) -> None:
    """End a run and the workers that its launcher started, at once."""
    run.kill()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if str(out).encode() in words:
                os.kill(int(process.name), signal.SIGKILL)
    run.communicate()


def finish(run: subprocess.Popen[str]) -> str:
    out, err = run.communicate(timeout=400)
    assert run.returncode == 0, out + err
    return out


def wait_for_step(out: Path, step: int, run: subprocess.Popen[str], before: str = "") -> None:
    """Until a run has logged a step; `before` is the log that an earlier one left."""
    while run.poll() is None:
        now = working_log(out)
        if now != before and f'"step": {step},' in now:
            return
        time.sleep(0.01)
    raise AssertionError(run.communicate())


def working_log(out: Path) -> str:
    log = out.with_name(f"{out.name}.training") / "log.jsonl"
    return log.read_text() if log.exists() else ""


def log_of(out: Path) -> list[dict]:
    lines = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in log_of(out) if "loss" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("heal") / "whole"
    finish(start(out, "--train", "copies", "--steps", str(STEPS)))
    return out


def test_interrupted_and_killed_runs_go_on_digit_by_digit(whole, tmp_path):
    """One run: interrupted, killed in a step or while a checkpoint is written, then let be."""
    out = tmp_path / "killed"
    more = ("--train", "copies", "--steps", str(STEPS))
    draw = random.Random(0)
    run = start(out, *more, "--save-every", "1000")
    wait_for_step(out, 2, run)
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=100)
    assert run.returncode == 130 and not out.exists()
    # Only the interrupt has made one.
    assert len(list(out.with_name("killed.training").glob("heal/step-*"))) == 1
    for step in sorted(draw.sample(range(4, STEPS - 2), KILLS)):
        before = working_log(out)
        run = start(out, *more)
        wait_for_step(out, step, run, before)
        time.sleep(draw.uniform(0, 0.1))
        kill(run, out)
        assert run.returncode == -signal.SIGKILL and not out.exists()
    said = finish(start(out, *more))
    assert "Going on behind step" in said
    assert log_of(out) == log_of(whole)
    ours, theirs = (load_file(x / "model.safetensors") for x in (out, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not out.with_name("killed.training").exists()


def test_only_copies_changed_and_the_card_says_so(whole):
    from dus_edge.checkpoint.builtin import model_dir

    base, healed = (load_file(x / "model.safetensors") for x in (model_dir(), whole))
    sources = [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7]
    for name, weight in healed.items():
        parts = name.split(".")
        if parts[1] != "layers":
            assert torch.equal(weight, base[name])
            continue
        place = int(parts[2])
        below = base[".".join([*parts[:2], str(sources[place]), *parts[3:]])]
        if place not in (6, 7, 8, 9):
            assert torch.equal(weight, below), name
        else:  # a norm's bf16 may be too coarse for so few steps
            assert weight.ndim == 1 or not torch.equal(weight, below), name
    card = (whole / "README.md").read_text()
    assert "`copies`" in card and "2,361,344 learned" in card and "](recovery.svg)" in card
    assert (whole / "recovery.svg").read_text().startswith("<?xml")
    config = json.loads((whole / "config.json").read_text())
    assert config["dus_edge"] == {"n_base_layers": 8, "sources": sources}


def test_the_healed_loss_is_that_of_the_written_folder(whole):
    """By transformers alone, document by document, on what the log calls held out."""
    saved = next(line for line in log_of(whole) if line.get("saved"))
    last = next(line for line in log_of(whole) if line.get("step") == STEPS)
    assert abs(saved["heldout_loss"] - last["heldout_loss"]) < 2e-3  # bf16 on the disk
    first = next(line for line in log_of(whole) if line["run"] == "heal")
    assert saved["heldout_loss"] < first["heldout_loss"]


def test_two_processes_make_what_one_makes(tmp_path, whole):
    """A run of two is killed; one of two goes on, and from the same state one alone."""
    more = ("--train", "copies", "--steps", str(STEPS))
    two, one = tmp_path / "two", tmp_path / "one"
    run = start(two, *more, processes=2)
    wait_for_step(two, 5, run)
    kill(run, two)
    shutil.copytree(f"{two}.training", f"{one}.training")
    assert "2 processes" in finish(start(one, *more))
    finish(start(two, *more, processes=2))
    theirs = load_file(whole / "model.safetensors")
    for out in (two, one):
        assert len(losses(out)) == STEPS
        assert max(abs(a - b) for a, b in zip(losses(out), losses(whole), strict=True)) < 1e-5
        ours = load_file(out / "model.safetensors")
        # Stored as bf16: a digit more or less in a few weights.
        assert max((ours[n].float() - theirs[n].float()).abs().max() for n in theirs) < 4e-3


def run_here(out: Path, **more) -> dict:
    defaults = {
        "texts": (TextPart(TEXT),),
        "steps": 2,
        "length": 64,
        "batch": 2,
        "heldout_tokens": 600,
        "rate": 3e-4,
    }
    result, figures = heal("pico", more.pop("choose", UP), out, HealOptions(**defaults | more))
    assert result is not None
    return figures


def test_lora_a_teacher_and_a_control(tmp_path):
    figures = run_here(
        tmp_path / "lora", mode=parse_mode("lora"), teacher=0.5, control=True, rate=1e-3, steps=4
    )
    assert figures["healed_loss"] < figures["upscaled_loss"]
    assert figures["control_loss"] < figures["base_loss"]
    # The healed folder can be healed again: its plan is known from its config.
    again = tmp_path / "again"
    choose = plan_chooser(None, None, (), False)
    result, figures = heal(
        str(tmp_path / "lora"),
        choose,
        again,
        HealOptions(
            texts=(TextPart(TEXT),), mode=parse_mode("seam:2"), steps=1, length=64, batch=2
        ),
    )
    assert result is not None and figures["base_loss"] is None
    changed = {
        name.split(".")[2]
        for name, weight in load_file(again / "model.safetensors").items()
        if not torch.equal(weight, load_file(tmp_path / "lora" / "model.safetensors")[name])
    }
    assert changed == {"5", "6"}


def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("  ")
    (tmp_path / "short.txt").write_text("one document only, " * 40)
    bad = {
        "no text": ({"texts": (TextPart(tmp_path / "none"),)}, UsageError, "does not exist|read"),
        "empty": ({"texts": (TextPart(tmp_path / "empty"),)}, UsageError, "no text"),
        "one document": (
            {"texts": (TextPart(tmp_path / "short.txt"),)},
            UsageError,
            "one document.*--heldout-text",
        ),
        "too short": (
            {"texts": (TextPart(tmp_path / "short.txt"),), "heldout_texts": (TEXT,), "length": 512},
            UsageError,
            "tokens left to train on, and a window has 512",
        ),
        "long window": ({"length": 1024}, UsageError, "context of 512"),
        "no length": ({"steps": None}, UsageError, "--tokens N, or --steps"),
        "both": ({"tokens": 5}, UsageError, "--tokens N, or --steps"),
        "batch": ({"batch": 3, "micro": 2}, UsageError, "multiple of --micro-batch"),
        "replay": (
            {"replay": (TextPart(TEXT, 0.5), TextPart(TEXT, 0.5))},
            UsageError,
            "less than 1",
        ),
        "no copies": (
            {"choose": plan_chooser(None, None, (), False), "mode": parse_mode("copies")},
            UsageError,
            "no layer.*is a copy",
        ),
        "no number": ({"rate": 1e30, "steps": 6}, DusEdgeError, "loss of step . is no number"),
    }

    def check(name: str) -> None:
        more, error, said = bad[name]
        out = tmp_path / f"out-{name}"
        with pytest.raises(error, match=said) as e:
            run_here(out, **more)
        assert "\n" not in str(e.value)
        assert not out.exists()

    check_each(check, bad)


def test_a_checkpoint_that_makes_nan_is_not_kept(tmp_path):
    """The update of step 1 is what breaks the weights: its checkpoint is none to go on from."""
    out, broken = tmp_path / "out", {"rate": 1e30, "steps": 6, "mode": parse_mode("copies")}
    with pytest.raises(DusEdgeError, match="loss of step 2 is no number; there is no checkpoint"):
        run_here(out, evaluate=100, save=1, **broken)
    assert not list(out.with_name("out.training").glob("heal/step-*"))
    with pytest.raises(DusEdgeError, match="The held-out loss of step 1 is no number"):
        run_here(out, evaluate=1, save=1, **broken)
    assert not list(out.with_name("out.training").glob("heal/step-*"))


def test_lora_is_of_one_process(tmp_path):
    options = HealOptions(texts=(TextPart(TEXT),), steps=1, mode=parse_mode("lora"))
    two = World(0, 2, torch.device("cpu"))
    with pytest.raises(UsageError, match="--train lora runs in one process; take copies"):
        HealJob(tmp_path / "out", options, Writing(), two).need(print)


def test_what_cannot_fit_is_refused_before_the_first_step(tmp_path, monkeypatch):
    from dus_edge.jobs.train import heal as module

    monkeypatch.setattr(module, "meminfo_kib", lambda: {"MemAvailable": 300 << 10})
    with pytest.raises(UsageError, match=r"takes about .* of memory and 300.0 MiB are free"):
        run_here(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_checkpointing_changes_no_gradient_and_leaves_frozen_layers_alone():
    from dus_edge.train.heal.network import (
        checkpoint_layers,
        empty_network,
        learned_names,
        load_weights,
    )
    from dus_edge.upscale.model import find_model

    model = find_model("pico", UP, weights=True, say=print)
    ids = torch.arange(100, 164)[None]
    grads = []
    for again in (False, True):
        network = empty_network(model.config)
        names = learned_names(model.config, range(6, 10), False)
        load_weights(network, model.open(), names, torch.float32, torch.device("cpu"))
        if again:
            checkpoint_layers(network)
        flags = [
            bool(getattr(x, "gradient_checkpointing", False)) for x in network.model.model.layers
        ]
        assert flags == [again and i >= 6 for i in range(12)]
        network(ids, torch.arange(64)[None], ids.roll(-1))[0].backward()
        grads.append({n: p.grad for n, p in network.model.named_parameters() if p.requires_grad})
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0]) and len(grads[0]) == 36


def test_changed_text_and_settings_are_refused_on_resume(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i}.txt").write_text(f"Text number {i} of some length. " * 20)
    with pytest.raises(DusEdgeError, match="is no number"):
        run_here(tmp_path / "out", texts=(TextPart(text),), rate=1e30, steps=6)
    with pytest.raises(UsageError, match=r"another --lr"):
        run_here(tmp_path / "out", texts=(TextPart(text),), steps=6)
    (text / "0.txt").write_text("Another text. " * 20)
    with pytest.raises(UsageError, match=r"another text"):
        run_here(tmp_path / "out", texts=(TextPart(text),), rate=1e30, steps=6)
    figures = run_here(tmp_path / "out", texts=(TextPart(text),), restart=True)
    assert figures["tokens"] == 256


def test_the_world_alone_is_one():
    world = World(0, 1, torch.device("cpu"))
    assert world.first and not world.many and world.sum(1.5, 2.0) == [1.5, 2.0]
