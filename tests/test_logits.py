"""What the results compute: transformers and llama.cpp against the base with its layers copied."""

from __future__ import annotations

from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import torch

from dus_edge.jobs.export.checkpoint import export_checkpoint
from dus_edge.jobs.export.gguf import export_gguf
from dus_edge.quant.recipe import PRESETS
from dus_edge.upscale.model import plan_chooser

from .cases import ONE_THREAD
from .forms import FORMS, deep_copied, load

TOKENS = [1, *np.random.default_rng(7).integers(3, 4096, 47).tolist()]
PLAN = "0:3,1:4"


@pytest.fixture(params=FORMS)
def base(request, make_checkpoint) -> Path:
    # f32 weights: bf16 would hide differences of the size that is looked for.
    return make_checkpoint(dtype="F32", **FORMS[request.param])


def log_probs(model) -> np.ndarray:
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([TOKENS])).logits[0], -1).numpy()


def llama_log_probs(path: Path, **options) -> np.ndarray:
    fixed = {"n_ctx": 64, "logits_all": True, "verbose": False, "n_gpu_layers": 0}
    model = llama_cpp.Llama(str(path), **fixed, **ONE_THREAD, **options)
    try:
        model.eval(TOKENS)
        logits = np.array(model.scores[: len(TOKENS)], np.float64)
    finally:
        model.close()
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_upscaled_checkpoint_is_the_base_with_its_layers_copied(base, tmp_path):
    choose = plan_chooser(None, None, (PLAN,), True)
    export_checkpoint(str(base), choose, tmp_path / "up")
    expected = log_probs(deep_copied(load(base), (0, 1, 2, 1, 2, 3)))
    np.testing.assert_array_equal(log_probs(load(tmp_path / "up")), expected)


def test_gguf_computes_what_transformers_does(base, tmp_path):
    choose = plan_chooser(None, None, (PLAN,), True)
    export_checkpoint(str(base), choose, tmp_path / "up")
    export_gguf(str(base), choose, [PRESETS["f32"]], tmp_path)
    theirs = llama_log_probs(next(tmp_path.glob("*.gguf")))
    assert np.abs(theirs - log_probs(load(tmp_path / "up"))).max() < 1e-3


def test_an_upscaled_base_is_a_base_like_any_other(make_checkpoint, tmp_path):
    """View of a view on disk: 4 → 6 → 10 layers equals the composed plan at once."""
    base = make_checkpoint(dtype="F32")
    once = plan_chooser(1, None, (), True)
    export_checkpoint(str(base), once, tmp_path / "six")
    export_checkpoint(str(tmp_path / "six"), once, tmp_path / "ten")
    both = plan_chooser(None, None, ("0:3,1:4", "0:5,1:6"), True)
    export_checkpoint(str(base), both, tmp_path / "composed")
    weights = "model.safetensors"
    assert (tmp_path / "ten" / weights).read_bytes() == (
        tmp_path / "composed" / weights
    ).read_bytes()
