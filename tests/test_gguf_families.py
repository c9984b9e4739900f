"""A finished GGUF of every family as a base: copied by ranges, or dequantized into a folder."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from dus_edge.errors import UnsupportedError
from dus_edge.jobs.export.checkpoint import export_checkpoint
from dus_edge.jobs.export.ranges import copy_ranges
from dus_edge.upscale.model import find_model, plan_chooser

from .cases import check_each
from .family_models import FAMILY_FORMS, write_model
from .forms import load
from .gguf_cases import export
from .test_family_models import F32_CACHE, chooser, expected, with_gelu_of_f16
from .test_logits import llama_log_probs, log_probs

#: A file from before heads had a size of their own.
NO_HEAD_SIZE = {"attention__key_length": None, "attention__value_length": None}
RUNNING = [name for name, form in FAMILY_FORMS.items() if form.llama_cpp]
AS_IT_IS = plan_chooser(None, None, (), False)


def made(name: str, folder: Path) -> tuple[Path, Path]:
    """A form's checkpoint, and its GGUF."""
    base = write_model(FAMILY_FORMS[name], folder / "base")
    choose = f"0:{FAMILY_FORMS[name].raw['num_hidden_layers']}"
    return base, export(base, folder / "gguf", "f32", plan=choose)["f32"]


@pytest.mark.parametrize("name", RUNNING)
def test_a_checkpoint_of_it_computes_what_it_does(name, tmp_path):
    """As it is, and up-scaled: what transformers' model with its layers copied computes."""
    form = FAMILY_FORMS[name]
    base, file = made(name, tmp_path)
    export_checkpoint(str(file), AS_IT_IS, tmp_path / "back")
    found = log_probs(with_gelu_of_f16(load(tmp_path / "back")))
    assert np.abs(found - llama_log_probs(file, **F32_CACHE)).max() < 1e-3
    export_checkpoint(str(file), chooser(form.plans[0]), tmp_path / "up")
    wanted = log_probs(expected(base, form, form.plans[0]))
    assert np.abs(log_probs(load(tmp_path / "up")) - wanted).max() < 1e-3


def other_scale(name: str, depth: int) -> bool:
    """Whether llama.cpp has another scale of attention for a family's models of that depth."""
    special = {"gemma2": 46, "gemma3": 62}
    return special.get(FAMILY_FORMS[name].family) == depth


@pytest.mark.parametrize("name", RUNNING)
def test_copied_ranges_compute_what_the_plan_says(name, tmp_path):
    form = FAMILY_FORMS[name]
    base, file = made(name, tmp_path)

    def check(plan: str) -> None:
        out = tmp_path / plan.replace(":", "-")
        model = expected(base, form, plan)
        if other_scale(name, model.config.num_hidden_layers):
            with pytest.raises(UnsupportedError, match="by another number than that of"):
                copy_ranges(str(file), chooser(plan), out)
            return
        copied = copy_ranges(str(file), chooser(plan), out).outputs[0].path
        wanted = log_probs(with_gelu_of_f16(model))
        assert np.abs(llama_log_probs(copied, **F32_CACHE) - wanted).max() < 1e-3

    check_each(check, form.plans)


def test_a_pattern_that_no_rule_makes_is_read(tmp_path):
    """An up-scaled Gemma 3 as a base again: its list of windows decides, twice."""
    form = FAMILY_FORMS["gemma3"]
    base, file = made("gemma3", tmp_path)
    once = copy_ranges(str(file), chooser("0:5,2:8"), tmp_path / "once").outputs[0].path
    twice = copy_ranges(str(once), chooser("0:8,5:11"), tmp_path / "twice").outputs[0].path
    order = [*range(5), *range(2, 8)]
    order = [order[i] for i in [*range(8), *range(5, 11)]]
    wanted = log_probs(with_gelu_of_f16(expected(base, form, ",".join(map(str, order)))))
    assert np.abs(llama_log_probs(twice, **F32_CACHE) - wanted).max() < 1e-3
    export_checkpoint(str(twice), AS_IT_IS, tmp_path / "back")
    assert np.abs(log_probs(with_gelu_of_f16(load(tmp_path / "back"))) - wanted).max() < 1e-3


def with_entry(source: Path, to: Path, **entries: object) -> Path:
    """A copy of a GGUF with entries of its metadata changed or added; None takes one away."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(to, architecture)
    new = {f"{architecture}.{key.replace('__', '.')}": value for key, value in entries.items()}
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in {"general.architecture", *new}:
            continue
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
    for key, value in new.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)  # all are F32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


def test_what_llama_cpps_converter_writes_otherwise(tmp_path):
    """Gemma 3 without a list of windows, or with their period; Phi-3 with a window."""
    _, gemma = made("gemma3", tmp_path / "gemma3")
    _, phi = made("phi3", tmp_path / "phi3")
    windows = [True] * 5 + [False] + [True] * 2
    cases = {
        "plain": (gemma, {"attention__sliding_window_pattern": None}, ("layer_types", None)),
        "every": (gemma, {"attention__sliding_window_pattern": 4}, ("sliding_window_pattern", 4)),
        "listed": (gemma, {"attention__sliding_window_pattern": windows}, ("layer_types", None)),
        "window": (phi, {"attention__sliding_window": 2047}, ("sliding_window", 2047)),
        "no head size": (gemma, NO_HEAD_SIZE, ("head_dim", 16)),
    }

    def check(name: str) -> None:
        source, entries, (key, value) = cases[name]
        file = with_entry(source, tmp_path / f"{name}.gguf", **entries)
        model = find_model(str(file), AS_IT_IS, weights=False, say=print)
        assert model.config.raw.get(key) == value

    check_each(check, cases)
