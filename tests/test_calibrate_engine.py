"""The layer-by-layer engine computes what transformers does, and shows what llama.cpp sees."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dus_edge.calibrate import engine, layer
from dus_edge.calibrate.imatrix import ImatrixCollector
from dus_edge.errors import CheckpointError, UsageError
from dus_edge.families.family import load_families
from dus_edge.jobs.export.gguf import export_gguf
from dus_edge.quant.recipe import PRESETS
from dus_edge.upscale.model import find_model, plan_chooser

from . import llama_imatrix
from .forms import FORMS, deep_copied, load

PLAN = "0:3,1:4"
SOURCES = (0, 1, 2, 1, 2, 3)
TOKENS = np.random.default_rng(3).integers(3, 4096, (5, 32)).astype(np.int32)
CPU = engine.choose_settings("cpu")
#: The matrices fed by each site, as transformers' modeling_llama.py computes.
SITES = {
    "attn_input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_output": ("self_attn.o_proj",),
    "ffn_input": ("mlp.gate_proj", "mlp.up_proj"),
    "ffn_output": ("mlp.down_proj",),
}
LINEARS = tuple(name for names in SITES.values() for name in names)


PLAIN_ROPE = [
    form for form in FORMS if "rope" not in form and form[:7] not in ("llama-3", "llama-5")
]


class Replacer(ImatrixCollector):
    """Replaces every matrix of a layer by another one, and remembers by what."""

    replaces = True

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def finish_site(self, layer, site, weights):
        super().finish_site(layer, site, weights)
        assert tuple(weights) == tuple(f"model.layers.{layer}.{x}.weight" for x in SITES[site])
        return {name: weight.float() * self.factor for name, weight in weights.items()}


def opened(base: Path, plan: str = PLAN):
    choose = plan_chooser(None, None, (plan,), True)
    return find_model(str(base), choose, weights=True, say=lambda line: None).open()


def inputs_of(model) -> dict[str, torch.Tensor]:
    """Σx² of every layer's matrix, by transformers and hooks; and what the last layer gives."""
    sums: dict[str, torch.Tensor] = {}

    def hook(name):
        def before(module, args):
            part = args[0].double().square().sum((0, 1))
            sums[name] = sums.get(name, 0) + part

        return before

    def keep(module, args):
        sums["last"] = args[0]

    for name, module in model.named_modules():
        if any(name.endswith(linear) for linear in LINEARS):
            module.register_forward_pre_hook(hook(f"{name}.weight"))
    model.model.norm.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(torch.from_numpy(TOKENS).long(), use_cache=False)
    return sums


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("collector", [ImatrixCollector, Replacer])
def test_computes_what_transformers_does(make_checkpoint, form, collector):
    base = make_checkpoint(dtype="F32", **FORMS[form])
    expected = inputs_of(deep_copied(load(base), SOURCES))
    visitor = collector()
    told = []
    checkpoint = opened(base)
    h = engine.run_layers(checkpoint, TOKENS, visitor, CPU, advance=told.append)
    torch.testing.assert_close(h, expected.pop("last"), rtol=1e-5, atol=1e-6)
    results = visitor.results()
    assert results.keys() == expected.keys()
    for name, (sums, count) in results.items():
        assert count == TOKENS.size
        torch.testing.assert_close(sums, expected[name], rtol=1e-5, atol=1e-6)
    assert sum(told) == engine.total_token_layers(checkpoint, TOKENS)


def test_a_sliding_window_shorter_than_the_chunk(make_checkpoint):
    base = make_checkpoint(dtype="F32", **FORMS["mistral-v0.1"] | {"sliding_window": 8})
    expected = inputs_of(deep_copied(load(base), SOURCES))["last"]
    h = engine.run_layers(opened(base), TOKENS, ImatrixCollector(), CPU)
    torch.testing.assert_close(h, expected, rtol=1e-5, atol=1e-6)


def test_replaced_matrices_are_what_the_rest_of_the_model_sees(make_checkpoint):
    base = make_checkpoint(dtype="F32")
    model = deep_copied(load(base), SOURCES)
    for name, parameter in model.named_parameters():
        if any(name.endswith(f"{linear}.weight") for linear in LINEARS):
            parameter.data *= 1.5
    expected = inputs_of(model)
    visitor = Replacer(1.5)
    h = engine.run_layers(opened(base), TOKENS, visitor, CPU)
    torch.testing.assert_close(h, expected.pop("last"), rtol=1e-5, atol=1e-6)
    for name, (sums, _) in visitor.results().items():
        torch.testing.assert_close(sums, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", [32, 64, 10_000])
def test_batches_do_not_change_the_result(make_checkpoint, step):
    base = make_checkpoint(dtype="F32")
    settings = engine.ComputeSettings("cpu", "float32", step)
    alone, batched = ImatrixCollector(), ImatrixCollector()
    h = engine.run_layers(opened(base), TOKENS, alone, CPU)
    other = engine.run_layers(opened(base), TOKENS, batched, settings)
    torch.testing.assert_close(h, other, rtol=1e-5, atol=1e-6)
    for name, (sums, _) in alone.results().items():
        torch.testing.assert_close(sums, batched.results()[name][0], rtol=1e-5, atol=1e-6)


def test_statistics_are_llama_cpps(pico, tmp_path):
    """Every entry within 1e-2 of what llama.cpp computes from the same F32 model and tokens."""
    choose = plan_chooser(None, None, (), True)
    result = export_gguf("pico", choose, [PRESETS["f32"]], tmp_path)
    tokens = np.random.default_rng(0).integers(3, 4000, (3, 64)).astype(np.int32)
    theirs = llama_imatrix.collect(result.outputs[0].path, tokens)
    visitor = ImatrixCollector()
    engine.run_layers(result.model.open(), tokens, visitor, CPU)

    gguf_name = load_families()["llama"].gguf_name
    ours = {gguf_name(name): value for name, value in visitor.results().items()}
    assert ours.keys() == theirs.keys()
    for name, (sums, count) in ours.items():
        expected, n = theirs[name]
        assert count == n
        np.testing.assert_allclose(sums.numpy(), expected, rtol=1e-2)


# Interrupted runs


class Interrupting(Replacer):
    """Ctrl-C in the midst of a layer."""

    def __init__(self, layer: int | None) -> None:
        super().__init__(1.25)
        self.layer = layer

    def observe(self, layer, site, x):
        if layer == self.layer and site == "ffn_output":
            raise KeyboardInterrupt
        super().observe(layer, site, x)


@pytest.mark.parametrize("cut", [1, 5])
def test_an_interrupted_run_goes_on_with_the_same_bytes(make_checkpoint, tmp_path, cut):
    checkpoint = opened(make_checkpoint(dtype="BF16"))

    def run(stop: int | None, folder: str) -> tuple[torch.Tensor, Interrupting]:
        visitor = Interrupting(stop)
        state = engine.State(tmp_path / folder, {"text": "same"})
        return engine.run_layers(checkpoint, TOKENS, visitor, CPU, state=state), visitor

    h, whole = run(None, "whole")
    with pytest.raises(KeyboardInterrupt):
        run(cut, "cut")
    assert engine.State(tmp_path / "cut", {"text": "same"}).n_done() == cut
    resumed, visitor = run(None, "cut")
    assert torch.equal(resumed, h)
    for name, (sums, count) in whole.results().items():
        assert torch.equal(sums, visitor.results()[name][0])
        assert count == visitor.results()[name][1]


def test_a_state_of_other_inputs_is_not_taken_up(make_checkpoint, tmp_path):
    checkpoint = opened(make_checkpoint())
    engine.run_layers(
        checkpoint, TOKENS, ImatrixCollector(), CPU, state=engine.State(tmp_path, {"text": "a"})
    )
    assert engine.State(tmp_path, {"text": "a"}).n_done() == 6
    assert engine.State(tmp_path, {"text": "b"}).n_done() == 0
    (tmp_path / "state.json").write_text("{")
    assert engine.State(tmp_path, {"text": "a"}).n_done() == 0


@pytest.mark.parametrize("kept", [0, 32 * 48 * 4 * 2, None])
def test_what_is_kept_between_passes_changes_no_bit(make_checkpoint, monkeypatch, kept):
    base = make_checkpoint(dtype="F32")
    settings = engine.ComputeSettings("cpu", "float32", 64)
    h = engine.run_layers(opened(base), TOKENS, Replacer(), settings)
    if kept is not None:
        monkeypatch.setattr(engine, "_KEPT_BYTES", kept)
    assert torch.equal(engine.run_layers(opened(base), TOKENS, Replacer(), settings), h)


@pytest.mark.parametrize("form", ["llama-gqa", "llama-biases", "mistral-head-dim"])
def test_products_in_bfloat16_round_what_is_multiplied(make_checkpoint, form):
    """As far off as rounding all factors to 8 bits puts it; hidden states stay float32."""
    base = make_checkpoint(dtype="F32", **FORMS[form])
    h, narrow = (
        engine.run_layers(
            opened(base), TOKENS, Replacer(), engine.ComputeSettings("cpu", "float32", 64, products)
        )
        for products in (None, "bfloat16")
    )
    assert narrow.dtype == torch.float32
    off = float((narrow - h).norm() / h.norm())
    assert 1e-4 < off < 2e-2


@pytest.mark.parametrize("n_ctx", [1, 128, 300])
def test_narrow_attention_is_attention(n_ctx):
    generator = torch.Generator().manual_seed(n_ctx)
    q, k, v = (torch.randn(2, n, n_ctx, 16, generator=generator) for n in (6, 2, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=0.3, enable_gqa=True
    )
    same = layer._causal_narrow(q, k, v, 0.3, torch.float32)
    torch.testing.assert_close(same, expected, rtol=1e-4, atol=1e-5)
    narrow = layer._causal_narrow(q, k, v, 0.3, torch.bfloat16)
    assert float((narrow - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize("form", PLAIN_ROPE)
def test_plain_rotary_tables_are_transformers(make_checkpoint, form):
    config = opened(make_checkpoint(**FORMS[form])).config
    assert config.rope.kind == "default"
    rotary, _ = layer._rotary(config)
    cos, sin = rotary(torch.zeros(1), torch.arange(300)[None])
    for place in layer.positions(config, 300, "cpu", torch.float32):
        assert torch.equal(place.rotary[0], cos[0])
        assert torch.equal(place.rotary[1], sin[0])


# Bad input


@pytest.mark.parametrize("replaces", [False, True])
def test_activations_that_are_not_finite_name_their_layer(make_checkpoint, replaces):
    base = make_checkpoint(dtype="F32")
    weights = base / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.2.mlp.down_proj.weight"][3, 5] = float("inf")
    save_file(tensors, weights)
    visitor = Replacer() if replaces else ImatrixCollector()
    # Source layer 2 stands first at place 2 of the result.
    with pytest.raises(CheckpointError, match="behind layer 2 are not finite"):
        engine.run_layers(opened(base), TOKENS, visitor, CPU)


def test_devices():
    with pytest.raises(UsageError, match=r"no device 'gpu'.*cpu, cuda, mps"):
        engine.choose_settings("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no cuda device is usable here"):
            engine.choose_settings("cuda")
    assert engine.choose_settings("cpu") == engine.ComputeSettings("cpu", "float32", 2048)
    assert engine.choose_settings("cpu", "float32", narrow=True).products is None


@pytest.mark.parametrize("there", [False, True])
def test_bfloat16_products_where_the_processor_has_them(monkeypatch, there):
    monkeypatch.setattr(engine, "_has_bf16", lambda: there)
    found = engine.choose_settings("cpu", narrow=True)
    assert (found.dtype, found.products) == ("float32", "bfloat16" if there else None)


def test_identity_is_json(tmp_path):
    """What a run is told apart by must not depend on the order of its parts."""
    a = engine.State(tmp_path, json.loads('{"a": 1, "b": [1, 2]}'))
    b = engine.State(tmp_path, json.loads('{"b": [1, 2], "a": 1}'))
    assert a.identity == b.identity
