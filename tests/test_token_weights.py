"""What errors behind tokens are worth: gradients against transformers', and their use."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dus_edge.calibrate import engine
from dus_edge.calibrate.fisher import descent
from dus_edge.calibrate.fisher.token_weights import weigh_tokens, weights_of
from dus_edge.calibrate.streams import KeptStates, NullVisitor
from dus_edge.errors import CheckpointError
from dus_edge.upscale.model import find_model, plan_chooser

from .conftest import TINY
from .forms import FORMS, deep_copied, load

SOURCES = (0, 1, 2, 1, 2, 3)
TOKENS = np.random.default_rng(5).integers(3, 4096, (3, 24)).astype(np.int32)
LANGUAGES = ("en", "ko", "en")
CPU = engine.choose_settings("cpu")
#: Matrices that a site feeds, as transformers calls them.
SITES = {
    "attn_input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_output": ("self_attn.o_proj",),
    "ffn_input": ("mlp.gate_proj", "mlp.up_proj"),
    "ffn_output": ("mlp.down_proj",),
}


def weighed(base, folder, seed=0):
    choose = plan_chooser(None, None, ("0:3,1:4",), True)
    checkpoint = find_model(str(base), choose, weights=True, say=lambda line: None).open()
    folder.mkdir()
    state = descent.DownwardState(folder, "same")
    with state.states() as fd:
        kept = KeptStates(fd, checkpoint.config, TOKENS, CPU.dtype)
        engine.run_layers(checkpoint, TOKENS, NullVisitor(), CPU, between=kept.put)
        return weigh_tokens(checkpoint, TOKENS, kept, CPU, state, languages=LANGUAGES, seed=seed)


def test_weights_are_those_of_transformers_gradients(make_checkpoint, tmp_path):
    base = make_checkpoint(dtype="F32", **FORMS["llama-gqa"])
    found, ends = weighed(base, tmp_path / "state", seed=3)
    model = deep_copied(load(base), SOURCES)
    outputs: dict[str, torch.Tensor] = {}

    def keep(name):
        def hook(module, args, y):
            y.retain_grad()
            outputs[name] = y

        return hook

    model.get_input_embeddings().register_forward_hook(keep("rows"))
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(keep(name))
    logits = model(torch.from_numpy(TOKENS).long(), use_cache=False).logits
    u = torch.from_numpy(np.random.default_rng(3).random(logits.shape[:2], np.float32))
    sums = logits.detach().double().softmax(-1).cumsum(-1)
    labels = (sums <= u.double()[..., None]).sum(-1)
    (-logits.log_softmax(-1).gather(-1, labels[..., None]).sum()).backward()
    for layer in range(len(SOURCES)):
        for site, roles in SITES.items():
            names = [f"model.layers.{layer}.{role}" for role in roles]
            squares = sum(outputs[n].grad.double().square().sum(-1) for n in names)
            np.testing.assert_allclose(
                found[layer][site],
                weights_of(squares.sqrt().numpy(), LANGUAGES),
                rtol=1e-3,
                atol=1e-4,
            )

    rows, spread = (
        outputs["rows"],
        1 - logits.detach().double().softmax(-1).square().sum(-1).numpy(),
    )
    np.testing.assert_allclose(ends.tokens, weights_of(spread, LANGUAGES), rtol=1e-4)
    squares = rows.grad.double().square().sum(-1).numpy()
    weights = weights_of(squares, LANGUAGES) * squares.sum() / spread.sum() / rows.shape[-1]
    np.testing.assert_allclose(ends.lookups, weights.sum(1), rtol=1e-3)


def test_weights_have_a_mean_of_one_and_no_token_is_left_out():
    squares, one = np.random.default_rng(0).lognormal(0, 3, (4, 32)), ["en"] * 4
    squares[:, 0] = 0
    found = weights_of(squares, one)
    assert found.dtype == np.float32 and found.min() > 0
    assert found.mean() == pytest.approx(1, rel=1e-5)
    order = np.argsort(squares, axis=None)
    assert (np.diff(found.flatten()[order]) >= 0).all()
    np.testing.assert_allclose(weights_of(1e6 * squares, one), found, rtol=1e-6)
    np.testing.assert_array_equal(weights_of(np.zeros((2, 8)), one[:2]), np.ones((2, 8), "f4"))


def test_all_languages_count_alike():
    squares = np.random.default_rng(0).lognormal(0, 3, (4, 32))
    found = weights_of(squares, ("ko", "en", "ko", "ko"))
    assert found[1].sum() == pytest.approx(found[[0, 2, 3]].sum(), rel=1e-5)
    alone = weights_of(squares, ["en"] * 4)
    np.testing.assert_allclose(found[1] / found[1, 0], alone[1] / alone[1, 0], rtol=1e-5)


def test_gradients_that_are_no_numbers_are_named(make_checkpoint, tmp_path, monkeypatch):
    base = make_checkpoint(dtype="F32", **TINY)
    original = descent.layer_gradients

    def broken(layer, h, behind):
        found = original(layer, h, behind)
        next(iter(found.outputs.values()))[0, 0] = torch.nan
        return found

    monkeypatch.setattr(descent, "layer_gradients", broken)
    with pytest.raises(CheckpointError, match="layer 5 are not finite"):
        weighed(base, tmp_path / "state")
