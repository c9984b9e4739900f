"""`sft` and `dpo` as a person types them: results, adapters, cut short and gone on, refusals."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from dus_edge.checkpoint.config import load_config
from dus_edge.checkpoint.resolve import resolve_base
from dus_edge.checkpoint.safetensors import SafetensorsCheckpoint
from dus_edge.jobs.train import tuning
from dus_edge.text.dialogues import read_dialogues
from dus_edge.train.tune import watch
from dus_edge.train.tune.model import open_trainable, tuned_checkpoint
from dus_edge.train.tune.settings import TuneSettings

QUICK = ("--batch", "2", "--device", "cpu")


@pytest.fixture
def chat(tmp_path) -> Path:
    return rows(
        tmp_path / "chat.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": f"What comes after {i}?"},
                    {"role": "assistant", "content": f"It is {i + 1}."},
                ],
                "language": "en",
            }
            for i in range(10)
        ],
    )


@pytest.fixture
def pairs(tmp_path) -> Path:
    return rows(
        tmp_path / "pairs.jsonl",
        [
            {"prompt": f"What comes after {i}?", "chosen": f"It is {i + 1}.", "rejected": "Well…"}
            for i in range(10)
        ],
    )


def rows(path: Path, objects: list) -> Path:
    path.write_text("".join(json.dumps(o, ensure_ascii=False) + "\n" for o in objects))
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# Results


def test_sft_writes_a_checkpoint(run, make_checkpoint, chat, tmp_path):
    base, out = make_checkpoint(), tmp_path / "out"
    code, said, err = run(
        "sft", base, "--data", chat, *QUICK, "--data-licence", "cc0-1.0", "-o", out
    )
    assert code == 0, err
    assert "SFT, full: 9 examples, 15 steps of 2, cpu; 1 held out" in said
    assert "Held-out answer loss: " in said
    assert not (tmp_path / "out.training").exists()
    before, after = weights(base), weights(out)
    assert before.keys() == after.keys()
    assert all(after[k].dtype == before[k].dtype for k in after)
    assert not same(before, after)
    # The template that it was trained in, for transformers and, by way of the GGUF, for Ollama.
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Q"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<s>### User:\nQ\n\n### Assistant:\n"
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry.get("step") for entry in log[:-1]] == list(range(1, 16))
    card = (out / "README.md").read_text()
    for text in ("chat.jsonl (cc0-1.0)", "Held-out answer loss", "- en", "15 of 2"):
        assert text in card
    assert f"{log[-1]['held_out_loss_after']:.4f}" in card
    # A result can be replaced by one of the same kind, and by an adapter.
    assert run("sft", base, "--data", chat, "-o", out)[0] == 4
    again = ("--steps", "1", "--lora", "-o", out, "--overwrite")
    assert run("sft", base, "--data", chat, *QUICK, *again)[0] == 0
    assert not (out / "model.safetensors").exists()


def test_the_loss_that_is_told_is_that_of_what_is_written(run, make_checkpoint, chat, tmp_path):
    """transformers, on the folder as it is written, with labels from its own template machinery."""
    base, out = make_checkpoint(), tmp_path / "out"
    args = ("--steps", "4", "--lr", "0.01", "--json")
    code, said, err = run("sft", base, "--data", chat, *QUICK, *args, "-o", out)
    assert code == 0, err
    told = json.loads(said.splitlines()[-1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    held = read_dialogues(str(chat)).rows[9].messages
    prompt = tokenizer.apply_chat_template(
        list(held[:-1]), tokenize=False, add_generation_prompt=True
    )
    n = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    ids = tokenizer(prompt + "It is 10.</s>", add_special_tokens=False, return_tensors="pt")
    ids = ids["input_ids"]
    labels = ids.clone()
    labels[:, :n] = -100
    for folder, name in ((base, "before"), (out, "after")):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            expected = float(model(input_ids=ids, labels=labels).loss)
        assert told[f"held_out_loss_{name}"] == pytest.approx(expected, rel=1e-5)
    assert told["held_out_loss_after"] < told["held_out_loss_before"]


@pytest.mark.parametrize("method", ["--lora", "--qlora"])
def test_an_adapter_is_peft_s(run, make_checkpoint, chat, tmp_path, method):
    base, out = make_checkpoint(), tmp_path / "out"
    args = ("--steps", "4", "--lr", "0.01", "--rank", "4", "--json")
    code, said, err = run("sft", base, "--data", chat, *QUICK, *args, method, "-o", out)
    assert code == 0, err
    told = json.loads(said.splitlines()[-1])
    assert told["held_out_loss_after"] < told["held_out_loss_before"]
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
    assert config["base_model_name_or_path"] == str(base)
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert config["target_modules"] == sorted(layers)
    assert (out / "chat_template.jinja").is_file() and (out / "tokenizer.json").is_file()
    saved = load_file(out / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, out)
    changed = [p for n, p in model.named_parameters() if "lora_B" in n and bool(p.any())]
    assert len(changed) == 4 * 7
    # And the program merges it: the weights are peft's, the template goes with them.
    merged = tmp_path / "merged"
    code, _, err = run("merge", base, out, "-o", merged)
    assert code == 0, err
    stored = transformers.AutoModelForCausalLM.from_pretrained(base)
    expected = peft.PeftModel.from_pretrained(stored, out).merge_and_unload().state_dict()
    assert all(torch.equal(expected[name], t) for name, t in weights(merged).items())
    assert (merged / "chat_template.jinja").read_text() == (out / "chat_template.jinja").read_text()


def test_dpo_learns_to_prefer(run, make_checkpoint, pairs, tmp_path):
    base = make_checkpoint()
    for method in ("--full", "--lora"):
        out = tmp_path / method.strip("-")
        args = ("--steps", "12", "--lr", "0.003", "--json", method)
        code, said, err = run("dpo", base, "--data", pairs, *QUICK, *args, "-o", out)
        assert code == 0, err
        told = json.loads(said.splitlines()[-1])
        assert told["held_out_margin_before"] == 0
        assert told["held_out_margin_after"] > 0.05
        assert told["held_out_accuracy_after"] == 1
        assert "margin" in (out / "README.md").read_text()
        log = (out / "log.jsonl").read_text().splitlines()
        # At first the model is its reference.
        assert json.loads(log[0])["loss"] == pytest.approx(np.log(2), rel=1e-4)


def test_a_tuned_checkpoint_is_read_by_rows(make_checkpoint):
    for dtype in ("BF16", "F16", "F32"):
        folder = make_checkpoint(dtype, dtype=dtype)
        source = resolve_base(str(folder))
        base = SafetensorsCheckpoint(source, load_config(folder / "config.json"))
        settings = TuneSettings("sft", "full", "cpu", 64, 1, 1, 1, 1e-3, 16, 0.1, 0, 1)
        view = tuned_checkpoint(base, open_trainable(base, settings))
        for name, spec in base.specs().items():
            rows = view.read(name, 1, spec.n_rows)
            assert rows.dtype == base.read(name, 1, spec.n_rows).dtype
            np.testing.assert_array_equal(rows, base.read(name, 1, spec.n_rows))


# Cut short


def test_a_killed_run_goes_on_to_the_same_result(run, make_checkpoint, chat, tmp_path):
    base = make_checkpoint()
    args = ("--data", chat, *QUICK, "--steps", "40", "--save-every", "4")
    assert run("sft", base, *args, "-o", tmp_path / "whole")[0] == 0
    out, work = tmp_path / "out", tmp_path / "out.training"
    command = [sys.executable, "-c", "from dus_edge.cli.main import main; main()"]
    command += ["sft", str(base), *map(str, args), "-o", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 240
    while not list(work.glob("checkpoint-8/whole")) and time.monotonic() < end:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not out.exists()
    # As if it had been killed while it wrote one.
    (work / "checkpoint-39").mkdir(exist_ok=True)
    (work / "checkpoint-39" / "model.safetensors").write_bytes(b"half")
    code, said, err = run("sft", base, *args, "-o", out)
    assert code == 0, err
    assert "Going on from checkpoint-" in said
    assert same(weights(out), weights(tmp_path / "whole"))
    assert (out / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()
    assert not work.exists()


@pytest.fixture
def interrupted(run, make_checkpoint, chat, tmp_path, monkeypatch):
    """A run that got Ctrl-C in its third step: base, arguments, output."""
    on_step_end = watch.Watch.on_step_end

    def press(self, args, state, control, **more):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        on_step_end(self, args, state, control, **more)

    base, out = make_checkpoint(), tmp_path / "out"
    args = ("--data", chat, *QUICK, "--save-every", "100")
    with monkeypatch.context() as patched:
        patched.setattr(watch.Watch, "on_step_end", press)
        code, said, _ = run("sft", base, *args, "-o", out)
    assert code == 130
    assert "checkpoint-3 is kept; the same command goes on" in said
    assert not out.exists()
    return base, args, out


def test_ctrl_c_keeps_a_checkpoint(run, interrupted, tmp_path):
    base, args, out = interrupted
    code, said, _ = run("sft", base, *args, "-o", out)
    assert code == 0 and "Going on from checkpoint-3" in said
    assert run("sft", base, *args, "-o", tmp_path / "whole")[0] == 0
    assert same(weights(out), weights(tmp_path / "whole"))


def test_a_run_is_gone_on_with_by_the_same_command_only(run, interrupted, chat):
    base, args, out = interrupted
    code, _, err = run("sft", base, *args, "--lr", "0.5", "-o", out)
    assert code == 2 and "with another choice of settings" in err
    lines = chat.read_text().splitlines()
    chat.write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    code, _, err = run("sft", base, *args, "-o", out)
    assert code == 2 and "with another data; repeat" in err
    code, said, _ = run("sft", base, *args, "--restart", "-o", out)
    assert code == 0 and "Going on" not in said


def test_one_process_tunes(run, make_checkpoint, chat, pairs, tmp_path, monkeypatch):
    base = make_checkpoint()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for goal, data in (("sft", chat), ("dpo", pairs)):
        code, _, err = run(goal, base, "--data", data, "-o", tmp_path / "out")
        assert code == 2 and f"{goal} runs in one process, and torchrun started 2" in err
        assert not (tmp_path / "out").exists()


def test_a_full_disk_at_a_checkpoint_is_one_sentence(
    run, make_checkpoint, chat, tmp_path, monkeypatch
):
    base, out = make_checkpoint(), tmp_path / "out"
    args = ("--data", chat, *QUICK, "--steps", "6", "--save-every", "2")
    save, calls = torch.save, []

    def full(obj, path, *rest, **more):
        calls.append(path)
        if "checkpoint-4" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(obj, path, *rest, **more)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        code, _, err = run("sft", base, *args, "-o", out)
    assert code == 4 and calls
    assert "the checkpoint of step 4 cannot be written (the disk is full)" in err
    assert "goes on from checkpoint-2" in err
    code, said, _ = run("sft", base, *args, "-o", out)
    assert code == 0 and "Going on from checkpoint-2" in said


# Refusals


def test_a_loss_that_is_no_number_stops_the_run(run, make_checkpoint, chat, tmp_path):
    base, out = make_checkpoint(), tmp_path / "out"
    args = ("--lr", "1e30", "--save-every", "1")
    code, _, err = run("sft", base, "--data", chat, *QUICK, *args, "-o", out)
    assert code == 1
    # The first step of a rising learning rate changes nothing, the second everything.
    assert "the loss is nan at step 3" in err and "lower --lr" in err
    assert "checkpoint-1 is its last good checkpoint" in err
    good = load_file(tmp_path / "out.training" / "checkpoint-1" / "model.safetensors")
    assert all(bool(t.isfinite().all()) for t in good.values())
    assert not out.exists()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--max-tokens", "200"), 2, "200 tokens are more than the model's context of 128"),
        (("--max-tokens", "8"), 2, "has more than 8 tokens"),
        (("--chat-format", "chatml"), 2, "needs the token <|im_end|>"),
        (("--chat-format", "x"), 2, "no chat format 'x'"),
        (("--eval-share", "0.01"), 2, "0 held out"),
        (("--batch", "3", "--micro-batch", "2"), 2, "no multiple of --micro-batch 2"),
        (("--device", "abacus"), 2, "no device 'abacus'"),
        (("--data", "absent.jsonl"), 2, "absent.jsonl: cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(
    run, make_checkpoint, chat, tmp_path, args, code, message
):
    base, out = make_checkpoint(), tmp_path / "out"
    found, _, err = run("sft", base, "--data", chat, *args, "-o", out)
    assert found == code and message in err
    assert len(err.splitlines()) == 1
    assert not out.exists() and not (tmp_path / "out.training").exists()


def test_a_folder_of_somebody_s_is_left_alone(run, make_checkpoint, chat, tmp_path):
    work = tmp_path / "out.training"
    work.mkdir()
    (work / "thesis.txt").write_text("mine")
    base = make_checkpoint()
    code, _, err = run("sft", base, "--data", chat, *QUICK, "--restart", "-o", tmp_path / "out")
    assert code == 2 and "no folder of a training run" in err
    assert (work / "thesis.txt").read_text() == "mine"


def test_what_is_missing_is_named(run, make_checkpoint, chat, tmp_path, monkeypatch):
    from importlib import util

    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "trl" else find(name))
    code, _, err = run("sft", make_checkpoint(), "--data", chat, "-o", tmp_path / "out")
    assert code == 5 and "sft needs trl, which is not installed" in err


def test_the_disk_must_hold_the_checkpoints(run, make_checkpoint, chat, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "_STATE_BYTES", 1 << 50)
    code, _, err = run("sft", make_checkpoint(), "--data", chat, "-o", tmp_path / "out")
    assert code == 4 and "are needed and" in err


def test_what_a_machine_lacks_is_one_sentence(run, make_checkpoint, chat, tmp_path, monkeypatch):
    base = make_checkpoint()
    for error, code, message in (
        (torch.OutOfMemoryError("…"), 1, "the memory of cpu is too small for this; take --qlora"),
        (OSError(errno.ENOSPC, "No space left on device"), 4, "(No space left on device); make"),
    ):

        def fail(self, args, state, control, error=error, **more):
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(watch.Watch, "on_step_end", fail)
            found, _, err = run("sft", base, "--data", chat, *QUICK, "-o", tmp_path / "out")
        assert found == code and message in err
        assert "Traceback" not in err


def test_progress_and_nothing_else_is_on_standard_error(cli, make_checkpoint, pairs, tmp_path):
    done = cli("dpo", make_checkpoint(), "--data", pairs, *QUICK, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    titles = {line.partition(":")[0] for line in done.stderr.splitlines()}
    assert titles == {"Held out, before", "Reference", "Training", "Held out, after"}
    # Paths may be longer.
    lines = [line for line in done.stdout.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= 80


def test_a_result_does_not_replace_its_own_base(run, make_checkpoint, chat):
    base = make_checkpoint()
    before = (base / "model.safetensors").read_bytes()
    for method in ("--full", "--lora"):
        args = ("--steps", "1", method, "--overwrite", "-o", base)
        code, _, err = run("sft", base, "--data", chat, *QUICK, *args)
        assert code == 4 and "itself; choose another folder with -o" in err
    assert (base / "model.safetensors").read_bytes() == before
