"""Every family's models compute in llama.cpp, and in our engine, what they do in transformers."""

from __future__ import annotations

import itertools

import llama_cpp
import numpy as np
import pytest
import torch

from dus_edge.calibrate import engine
from dus_edge.calibrate.imatrix import ImatrixCollector
from dus_edge.errors import UsageError
from dus_edge.jobs.export.bnb import export_bnb
from dus_edge.jobs.export.calibration import Machine, TextChoice
from dus_edge.jobs.export.checkpoint import export_checkpoint
from dus_edge.jobs.export.gguf import export_gguf
from dus_edge.jobs.export.gptq import export_gptq
from dus_edge.quant.gptq_format import GPTQSettings
from dus_edge.quant.recipe import PRESETS
from dus_edge.run.open import inspect_source, open_source
from dus_edge.upscale.model import find_model, plan_chooser
from dus_edge.upscale.plan import parse

from .cases import check_each
from .family_models import FAMILY_FORMS, write_model
from .forms import deep_copied, load
from .gguf_cases import assert_same_as_llama_quantize, export
from .test_calibrate_engine import CPU, Replacer
from .test_logits import TOKENS, llama_log_probs, log_probs

LONG = np.array([TOKENS], np.int32)
#: Keys and values of f16 would hide differences of the size that is looked for.
F32_CACHE = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
#: One form of each family.
FAMILIES = tuple({form.family: name for name, form in reversed(FAMILY_FORMS.items())}.values())


def chooser(plan: str | None):
    return plan_chooser(None, None, (plan,) if plan else (), plan is not None)


def expected(base, form, plan: str | None):
    """transformers' own model of a plan: its layers copied, each with what makes it its own."""
    model = load(base)
    if plan is None:
        return model
    return deep_copied(model, parse(form.raw["num_hidden_layers"], plan).sources)


def with_gelu_of_f16(model):
    """GELU as ggml has it on CPUs: looked up in a table from f16 to f16 (`ggml_vec_gelu_f32`)."""

    def gelu(x: torch.Tensor) -> torch.Tensor:
        looked_up = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x >= 10, x, torch.where(x <= -10, 0.0, looked_up))

    for module in model.modules():
        if "gelu" in type(getattr(module, "act_fn", None)).__name__.lower():
            module.act_fn.forward = gelu
    return model


@pytest.mark.parametrize("name", [name for name, form in FAMILY_FORMS.items() if form.llama_cpp])
def test_llama_cpp_computes_what_transformers_does(name, tmp_path):
    form = FAMILY_FORMS[name]
    base = write_model(form, tmp_path / "base")

    def check(plan: str | None) -> None:
        wanted = log_probs(with_gelu_of_f16(expected(base, form, plan)))
        out = tmp_path / str(plan).replace(":", "-")
        result = export_gguf(str(base), chooser(plan), [PRESETS["f32"]], out)
        found = llama_log_probs(result.outputs[0].path, **F32_CACHE)
        assert np.abs(found - wanted).max() < 1e-3

    check_each(check, (None, *form.plans))


@pytest.mark.parametrize("name", FAMILY_FORMS)
def test_an_upscaled_folder_is_the_base_with_its_layers_copied(name, tmp_path):
    form = FAMILY_FORMS[name]
    base = write_model(form, tmp_path / "base")

    def check(plan: str) -> None:
        out = tmp_path / plan.replace(":", "-")
        export_checkpoint(str(base), chooser(plan), out)
        np.testing.assert_array_equal(log_probs(load(out)), log_probs(expected(base, form, plan)))

    check_each(check, form.plans)


@pytest.mark.parametrize("name", FAMILY_FORMS)
def test_the_engine_computes_what_transformers_does(name, tmp_path):
    form = FAMILY_FORMS[name]
    base = write_model(form, tmp_path / "base")
    plan = form.plans[0]
    model = expected(base, form, plan)
    family = find_model(str(base), chooser(plan), weights=False, say=print).config.family
    sums: dict[str, torch.Tensor] = {}

    def watch(key: str):
        def before(module, args):
            sums[key] = args[0].double().square().sum((0, 1))

        return before

    for key, module in model.named_modules():
        if family.is_linear(f"{key}.weight"):
            module.register_forward_pre_hook(watch(f"{key}.weight"))
    last: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    with torch.no_grad():
        model(torch.from_numpy(LONG).long(), use_cache=False)

    def check(collector) -> None:
        visitor = collector()
        checkpoint = find_model(str(base), chooser(plan), weights=True, say=print).open()
        h = engine.run_layers(checkpoint, LONG, visitor, CPU)
        torch.testing.assert_close(h, last[0], rtol=1e-4, atol=1e-5)
        results = visitor.results()
        assert results.keys() == sums.keys()
        for key, (found, _) in results.items():
            torch.testing.assert_close(found, sums[key], rtol=1e-4, atol=1e-5)

    check_each(check, (ImatrixCollector, Same))


class Same(Replacer):
    """Puts every matrix in its own place: the layer is computed site by site."""

    def finish_site(self, layer, site, weights):
        ImatrixCollector.finish_site(self, layer, site, weights)
        return {name: weight.float() for name, weight in weights.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_presets_are_what_llama_quantize_makes(name, tmp_path):
    form = FAMILY_FORMS[name]
    base = write_model(form.wide(), tmp_path / "base", rows=48)
    presets = ("f32", "q8_0", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")
    files = export(base, tmp_path / "out", *presets, plan=form.plans[0], quantizer="ggml")
    assert_same_as_llama_quantize(files, tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_quantized_folders_compute_nearly_what_the_model_does(name, tmp_path):
    form = FAMILY_FORMS[name]
    base, plan = write_model(form, tmp_path / "base"), form.plans[0]
    wanted = log_probs(expected(base, form, plan))
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    text = TextChoice((tmp_path / "text.txt",), n_ctx=32, n_chunks=4)
    settings = GPTQSettings(bits=8, group_size=32)
    export_gptq(str(base), chooser(plan), tmp_path / "gptq", settings, text, Machine("cpu"))
    export_bnb(str(base), chooser(plan), tmp_path / "int8", "int8")

    def check(folder: str) -> None:
        with open_source(inspect_source(tmp_path / folder), n_threads=1) as source:
            found = source.log_probs(np.array(TOKENS))
        assert np.abs(found - wanted).mean() < 0.03
        assert np.abs(found - wanted).max() > 0

    check_each(check, ("gptq", "int8"))


@pytest.mark.parametrize("name", [name for name, form in FAMILY_FORMS.items() if form.refused])
def test_a_plan_that_breaks_the_pattern_is_refused(name, tmp_path):
    form = FAMILY_FORMS[name]
    base = write_model(form, tmp_path / "base")

    def check(plan: str) -> None:
        with pytest.raises(UsageError, match="follow a pattern of") as refused:
            export_gguf(str(base), chooser(plan), [PRESETS["f32"]], tmp_path / "out")
        assert "choose" in str(refused.value)
        assert not (tmp_path / "out").exists()

    check_each(check, form.refused)


@pytest.mark.parametrize("name", FAMILIES)
def test_scaled_copies_add_so_much_less(name, tmp_path):
    form = FAMILY_FORMS[name]
    base = write_model(form, tmp_path / "base")
    config = find_model(str(base), chooser(None), weights=True, say=print).base_config
    plan = parse(config.n_layers, form.plans[0])

    def check(scale: float) -> None:
        out = tmp_path / f"up-{scale}"
        how = plan_chooser(None, None, (form.plans[0],), True, branch_scale=scale)
        export_checkpoint(str(base), how, out)
        model = expected(base, form, form.plans[0] if scale else None)
        for i, role in itertools.product(plan.copies if scale else (), config.family.branch_roles):
            part = model.get_submodule(config.family.name(role, i).removesuffix(".weight"))
            part.register_forward_hook(lambda module, args, out: out * scale)
        assert np.abs(log_probs(load(out)) - log_probs(model)).max() < 1e-4

    check_each(check, (0.0, 0.5))
