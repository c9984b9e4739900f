"""Feedback into the head: its inputs beside transformers', its blocks beside the long way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dus_edge.calibrate import engine
from dus_edge.calibrate.feedback import WantedBlocks, held_out_chunks
from dus_edge.calibrate.fisher.token_weights import HeadWeights
from dus_edge.calibrate.head_feedback import (
    HeadInputs,
    feed_head,
    head_inputs,
    read_head,
    write_head,
)
from dus_edge.calibrate.streams import NullVisitor
from dus_edge.quant import ggml, native
from dus_edge.quant import types as t
from dus_edge.quant.feedback.layouts import LOSES_MORE
from dus_edge.quant.feedback.solve import FeedbackSettings
from dus_edge.upscale.model import find_model, plan_chooser

from .forms import FORMS, load

pytestmark = pytest.mark.usefixtures("compiled")
RNG = np.random.default_rng(6)
TOKENS = RNG.integers(3, 4096, (16, 24)).astype(np.int32)
WEIGHTS = HeadWeights(
    RNG.uniform(0.5, 1.5, TOKENS.shape).astype(np.float32),
    RNG.uniform(0.5, 1.5, len(TOKENS)).astype(np.float32),
)
HELD = sorted(held_out_chunks(*TOKENS.shape))
FITTED = [i for i in range(len(TOKENS)) if i not in HELD]


def opened(base):
    choose = plan_chooser(None, None, (), False)
    return find_model(str(base), choose, weights=True, say=lambda line: None).open()


def test_inputs_are_those_of_transformers(make_checkpoint):
    base = make_checkpoint(dtype="F32", **FORMS["llama-tied"])
    checkpoint = opened(base)
    h = engine.run_layers(checkpoint, TOKENS, NullVisitor(), engine.choose_settings("cpu"))
    model = load(base)
    with torch.no_grad():
        x = model.model(torch.from_numpy(TOKENS).long()).last_hidden_state.double()
    x = x * torch.from_numpy(WEIGHTS.tokens).double().sqrt()[..., None]
    fitted = x[FITTED].flatten(0, 1)
    gram = fitted.T @ fitted
    for tied in (False, True):
        found = head_inputs(checkpoint, h, WEIGHTS, tied)
        expected = gram + tied * float(WEIGHTS.lookups[FITTED].sum()) * torch.eye(len(gram))
        torch.testing.assert_close(found.gram.double(), expected, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found.held.double(), x[HELD].flatten(0, 1), rtol=0, atol=1e-4)
        assert found.looked_up == pytest.approx(tied * float(WEIGHTS.lookups[HELD].sum()))


class Head:
    """A checkpoint of one tensor."""

    def __init__(self, weight: np.ndarray) -> None:
        self.weight = weight

    def specs(self):
        return {"head": self.weight}

    def read(self, name, start, stop):
        return self.weight[start:stop]


def correlated(n: int, width: int) -> torch.Tensor:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((n, width // 8)) @ rng.standard_normal((width // 8, width))
    return torch.from_numpy(x + rng.standard_normal(x.shape)).float()


def inputs(looked_up: float = 0.0) -> HeadInputs:
    x = correlated(1024, 256)
    fitted, held = x[:896], x[896:]
    return HeadInputs(fitted.T @ fitted + 7 * looked_up * torch.eye(256), held, looked_up)


def fed(weight: np.ndarray, given: HeadInputs, kind=t.Q4_K, scale=1.0):
    wanted = WantedBlocks(kind, scale)
    return feed_head(Head(weight), "head", wanted, given, native, FeedbackSettings())


def test_the_better_blocks_are_kept_and_told(tmp_path, monkeypatch):
    weight = np.random.default_rng(2).standard_normal((300, 256)).astype(np.float32) * 0.05
    outcome, data = fed(weight, inputs())
    values = ggml.dequantize(data, t.Q4_K, weight.shape)
    delta = torch.from_numpy(weight - values)
    assert outcome.fallback is None and outcome.loss < 0.8 * outcome.plain_loss
    assert outcome.loss == pytest.approx(float((inputs().held @ delta.T).square().sum()), rel=1e-4)
    plain = ggml.dequantize(native.quantize(weight, t.Q4_K), t.Q4_K, weight.shape)
    delta = torch.from_numpy(weight - plain)
    before = float((inputs().held @ delta.T).square().sum())
    assert outcome.plain_loss == pytest.approx(before, rel=1e-4)
    # However many rows are in memory at once.
    monkeypatch.setattr("dus_edge.calibrate.head_feedback._ROWS", 128)
    np.testing.assert_array_equal(fed(weight, inputs())[1], data)
    write_head(tmp_path / "head", outcome, data)
    again, kept = read_head(tmp_path / "head")
    assert again == outcome
    np.testing.assert_array_equal(kept, data)
    assert [p.name for p in tmp_path.iterdir()] == ["head"]


def test_what_is_looked_up_stays_nearer_to_itself():
    """The more looking up counts, the less are rows bent towards the inputs of the head."""
    weight = np.random.default_rng(2).standard_normal((128, 256)).astype(np.float32) * 0.05
    errors = []
    for looked_up in (0.0, 1e3, 1e6):
        outcome, data = fed(weight, inputs(looked_up))
        values = ggml.dequantize(data, t.Q4_K, weight.shape)
        errors.append(float(np.square(weight - values).mean()))
        delta = torch.from_numpy(weight - values)
        there = float((inputs().held @ delta.T).square().sum())
        expected = there + looked_up * float(delta.square().sum())
        loss = outcome.plain_loss if outcome.fallback else outcome.loss
        assert loss == pytest.approx(expected, rel=1e-4)
    assert errors[0] > 1.1 * errors[1] and errors[1] > 0.95 * errors[2]


def test_blocks_that_lose_more_are_not_kept():
    weight = np.random.default_rng(2).standard_normal((64, 256)).astype(np.float32)
    given = inputs()
    other = HeadInputs(given.gram, torch.randn(64, 256, generator=torch.manual_seed(0)), 0.0)
    outcome, data = fed(weight, other)
    assert outcome.fallback == LOSES_MORE and outcome.loss >= outcome.plain_loss
    np.testing.assert_array_equal(data.reshape(-1), native.quantize(weight, t.Q4_K).reshape(-1))


def test_inputs_that_are_useless_leave_blocks_as_they_would_be():
    weight = np.random.default_rng(2).standard_normal((64, 256)).astype(np.float32)
    outcome, data = fed(weight, HeadInputs(torch.zeros(256, 256), torch.zeros(8, 256), 0.0))
    assert outcome.loss is None and "zero" in str(outcome.fallback)
    np.testing.assert_array_equal(data.reshape(-1), native.quantize(weight, t.Q4_K).reshape(-1))
