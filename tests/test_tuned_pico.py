"""The built-in base, tuned on the English part of the built-in data: it answers, and it stops."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import pytest

from dus_edge.data import read_text
from dus_edge.export.vocab.vocab import read_vocab
from dus_edge.jobs.export.gguf import export_gguf
from dus_edge.jobs.train.dpo import tune_on_preferences
from dus_edge.jobs.train.sft import tune_on_dialogues
from dus_edge.jobs.train.tuning import TuneOptions
from dus_edge.ollama import chat
from dus_edge.ollama.gotemplate import render_conversation
from dus_edge.ollama.grammar import parse_modelfile
from dus_edge.quant.recipe import find_preset
from dus_edge.text.dialogues import read_dialogues, split_held_out
from dus_edge.train.tune.examples import Coder, dialogue_examples
from dus_edge.train.tune.formats import known_format
from dus_edge.train.tune.model import open_tokenizer
from dus_edge.upscale.model import plan_chooser

from .cases import ONE_THREAD

AS_IT_IS = plan_chooser(None, None, (), False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tuned")


@pytest.fixture(scope="module")
def english(folder) -> Callable[[str], str]:
    """The English rows of a built-in file, in a file."""

    def write(name: str) -> str:
        lines = read_text(f"dialogues/{name}").splitlines()
        kept = [line for line in lines if json.loads(line)["language"] == "en"]
        (folder / name).write_text("\n".join(kept) + "\n", encoding="utf-8")
        return str(folder / name)

    return write


@pytest.fixture(scope="module")
def tuned(folder, english) -> tuple[Path, dict]:
    options = TuneOptions(english("chat.jsonl"), steps=24, batch=4, device="cpu")
    return folder / "sft", tune_on_dialogues("pico", folder / "sft", options)[1]


@pytest.fixture(scope="module")
def exported(folder, tuned) -> tuple[Path, Path]:
    """A GGUF file of the tuned model, and its Modelfile."""
    written = export_gguf(str(tuned[0]), AS_IT_IS, [find_preset("f16")], folder / "gguf")
    return written.outputs[0].path, written.outputs[0].modelfile


def test_answers_that_were_held_out_become_likelier(tuned):
    _, figures = tuned
    assert figures["held_out_examples"] == 10
    assert figures["held_out_loss_after"] < figures["held_out_loss_before"] - 1


def test_the_model_answers_in_its_format_and_stops(tuned, exported, english):
    """In llama.cpp, by the template in the file; nothing stops it but its own end-of-text token."""
    model = llama_cpp.Llama(str(exported[0]), n_ctx=512, verbose=False, **ONE_THREAD)
    held = split_held_out(read_dialogues(english("chat.jsonl")).rows, 0.1)[1]
    go = chat.family("solar").template
    stopped = []
    for row in held:
        prompt = render_conversation(go, row.messages[:-1])
        ids = model.tokenize(prompt.encode(), add_bos=True, special=True)
        found = model.create_completion(ids, temperature=0, max_tokens=64)["choices"][0]
        if found["finish_reason"] == "stop":
            stopped.append(found["text"])
    # A model of 6 M parameters runs in circles now and then.
    assert len(stopped) >= len(held) // 2
    for text in stopped:
        assert text.strip() and "###" not in text


def test_the_modelfile_has_the_format_that_training_saw(tuned, exported, english):
    path, modelfile = exported
    commands = {c.name: c.value for c in parse_modelfile(modelfile.read_text()) if not c.key}
    vocab = read_vocab(tuned[0], 4096)
    form = known_format("solar", {"bos_token": "<s>", "eos_token": "</s>"}, vocab.tokens)
    coder = Coder(form, open_tokenizer(tuned[0]), 1, 512)
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for row in read_dialogues(english("chat.jsonl")).rows:
        (example,), _ = dialogue_examples(coder, [row])
        places = [i for i, x in enumerate(example.learnt) if x and not example.learnt[i - 1]]
        turns = [i for i, m in enumerate(row.messages) if m["role"] == "assistant"]
        for place, turn in zip(places, turns, strict=True):
            text = render_conversation(commands["template"], row.messages[:turn])
            ids = model.tokenize(text.encode(), add_bos=True, special=True)
            assert ids == list(example.ids[:place])


def test_preferences_that_were_held_out_are_shared(folder, tuned, english):
    options = TuneOptions(
        english("preferences.jsonl"), steps=12, batch=4, lr=1e-4, eval_share=0.2, device="cpu"
    )
    figures = tune_on_preferences(str(tuned[0]), folder / "dpo", options)[1]
    assert figures["held_out_pairs"] == 10
    assert figures["held_out_margin_before"] == 0
    assert figures["held_out_margin_after"] > 0
