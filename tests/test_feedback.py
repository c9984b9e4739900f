"""Error feedback into blocks: layouts beside ggml's reading, the solver beside the long way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dus_edge.calibrate.feedback import (
    FeedbackCollector,
    WantedBlocks,
    held_out_chunks,
    read_blocks,
)
from dus_edge.errors import UsageError
from dus_edge.quant import ggml, kernels, native
from dus_edge.quant import types as t
from dus_edge.quant.feedback.layouts import LAYOUTS, LOSES_MORE, stored_values, takes_feedback
from dus_edge.quant.feedback.solve import FeedbackSettings, feed, prepare_blocks, quantize_rows

from .cases import check_each
from .native_cases import gaussian, importance_of

KINDS = tuple(LAYOUTS)
SETTINGS = FeedbackSettings()
pytestmark = pytest.mark.usefixtures("compiled")


def problem(n_out: int, n_in: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and XᵀX of correlated inputs of different sizes."""
    rng = np.random.default_rng(seed)
    rank = n_in // 4
    x = rng.standard_normal((2 * n_in, rank)) @ rng.standard_normal((rank, n_in))
    x += rng.standard_normal(x.shape) * 2
    x *= rng.lognormal(0, 0.7, n_in)
    weight = rng.standard_normal((n_out, n_in)) * 0.05
    return torch.from_numpy(weight).float(), torch.from_numpy(x.T @ x).float()


def loss(weight: torch.Tensor, hessian: torch.Tensor, data: np.ndarray, kind: t.QuantType) -> float:
    """tr(ΔW·H·ΔWᵀ) of what ggml reads."""
    values = torch.from_numpy(ggml.dequantize(data, kind, tuple(weight.shape)))
    delta = (weight - values).double()
    return float(((delta @ hessian.double()) * delta).sum())


def fed(weight, hessian, kind, settings=SETTINGS, n_threads=1) -> np.ndarray:
    factor = prepare_blocks(hessian, kind.block_weights, settings)
    return feed(weight, factor, kind, native, settings, n_threads)


# Layouts


def blocks_of(kind: t.QuantType, rows: np.ndarray) -> np.ndarray:
    data = native.quantize(rows, kind, None if kind is t.Q8_0 else importance_of(rows.shape[1]))
    return data.reshape(-1, kind.block_bytes)


def test_what_is_read_of_a_block_is_what_ggml_reads():
    def check(kind):
        rows = gaussian((48, 512))
        rows[0] = 0
        blocks, layout = blocks_of(kind, rows), LAYOUTS[kind]
        d, m = (np.repeat(a, kind.block_weights // a.shape[1], axis=1) for a in layout.grid(blocks))
        values = ggml.dequantize(blocks.reshape(-1), kind, rows.shape).reshape(d.shape)
        units = (values + m) / np.where(d == 0, 1, d)
        if layout.levels is None:
            levels, codes = np.arange(layout.top + 1), np.rint(units)
        else:
            levels = layout.levels
            codes = np.abs(units[..., None] - levels).argmin(-1)
        assert codes.min() >= 0 and codes.max() <= layout.top
        assert len(np.unique(codes)) > layout.top // 2
        np.testing.assert_allclose(d * levels[codes.astype(int)] - m, values, rtol=0, atol=1e-6)
        # And what is put there comes out again.
        changed = np.random.default_rng(1).integers(0, layout.top + 1, codes.shape, np.uint8)
        layout.put(blocks, changed)
        found = ggml.dequantize(blocks.reshape(-1), kind, rows.shape).reshape(d.shape)
        np.testing.assert_allclose(found, d * levels[changed] - m, rtol=0, atol=2e-6)
        np.testing.assert_allclose(
            stored_values(blocks.reshape(len(rows), -1), kind), found.reshape(rows.shape), atol=1e-6
        )
        layout.put(blocks, codes.astype(np.uint8))
        some = (d != 0).all(1)  # of others the codes cannot be told
        np.testing.assert_array_equal(blocks[some], blocks_of(kind, rows)[some])

    check_each(check, KINDS)


def test_common_factors_are_where_they_are_said_to_be():
    """Doubling all of them doubles what ggml reads."""

    def check(kind):
        rows = gaussian((16, 256))
        blocks = blocks_of(kind, rows)
        before = ggml.dequantize(blocks.reshape(-1), kind, rows.shape)
        for at in LAYOUTS[kind].halves:
            half = np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2") * np.float16(2)
            blocks[:, at : at + 2] = half.view(np.uint8)
        after = ggml.dequantize(blocks.reshape(-1), kind, rows.shape)
        np.testing.assert_allclose(after, 2 * before, rtol=1e-6)

    check_each(check, KINDS)


def test_which_rows_take_feedback():
    assert takes_feedback(t.Q4_K, 512) and takes_feedback(t.Q8_0, 96)
    assert not takes_feedback(t.Q4_K, 96)
    assert not takes_feedback(t.F16, 512) and not takes_feedback(t.F32, 512)


# The solver


def long_way(x, hessian, part, scale, minimum, levels) -> np.ndarray:
    """Codes of columns from the last to the first, the inverse taken anew for each; float64."""
    w, codes = x.copy(), np.zeros(x.shape, int)
    for i in range(len(x) - 1, -1, -1):
        inverse = np.linalg.inv(hessian[: i + 1, : i + 1])
        s, m = scale[part[i]], minimum[part[i]]
        codes[i] = np.abs((w[i] + m) / s - levels[:, None]).argmin(0)
        error = w[i] - (s * levels[codes[i]] - m)
        w[: i + 1] -= np.outer(inverse[:, i], error / inverse[i, i])
    return codes


@pytest.mark.parametrize("curved", [False, True])
def test_codes_are_those_of_the_long_way(curved):
    rng = np.random.default_rng(3)
    n, rows = 32, 48
    _, hessian = problem(1, n, 5)
    hessian = hessian.double() + torch.eye(n).double()
    lower = torch.linalg.cholesky(hessian)
    inverse = torch.linalg.inv(lower).float().numpy()
    x = rng.standard_normal((n, rows)).astype(np.float32)
    part = rng.integers(0, 2, n)
    if curved:
        levels = LAYOUTS[t.IQ4_XS].levels
        scale = (rng.uniform(0.01, 0.02, (2, rows)) * rng.choice([-1, 1], rows)).astype(np.float32)
        minimum = np.zeros((2, rows), np.float32)
    else:
        levels = np.arange(8, dtype=np.float32)
        scale = rng.uniform(0.2, 0.4, (2, rows)).astype(np.float32)
        minimum = rng.uniform(1, 2, (2, rows)).astype(np.float32)
    codes, cost = np.empty((n, rows), np.uint8), np.empty(rows, np.float32)
    top = len(levels) - 1
    kernels.load("feed_block")(x, inverse, part, scale, minimum, top, curved, codes, cost)
    expected = long_way(x.astype(float), hessian.numpy(), part, scale, minimum, levels)
    # A tie that float32 sees the other way changes the columns behind it.
    same = (codes == expected).all(0)
    assert same.mean() > 0.9
    delta = x - (scale[part] * levels[codes] - minimum[part])
    true = np.einsum("ir,ij,jr->r", delta, hessian.numpy(), delta)
    np.testing.assert_allclose(cost, true, rtol=1e-4)


def test_feedback_loses_less_than_importance_on_the_same_inputs():
    def check(kind, seed):
        weight, hessian = problem(80, 768, seed)
        importance = hessian.diagonal().numpy()
        plain = quantize_rows(weight, kind, native, importance)
        assert loss(weight, hessian, fed(weight, hessian, kind), kind) < 0.9 * loss(
            weight, hessian, plain, kind
        )

    check_each(check, KINDS, (0, 1))


def test_fitting_scales_again_never_loses_more_in_one_block():
    def check(kind):
        weight, hessian = problem(64, kind.block_weights, 7)
        losses = [
            loss(weight, hessian, fed(weight, hessian, kind, FeedbackSettings(refits=n)), kind)
            for n in (0, 1, 2)
        ]
        # The damped Hessian decides, so the true loss may rise by a trifle.
        assert losses[2] <= losses[1] * 1.002 and losses[1] <= losses[0] * 1.002
        assert losses[1] < losses[0]

    check_each(check, (t.Q2_K, t.Q3_K, t.Q4_K, t.Q4_0))


def test_the_bytes_do_not_depend_on_the_number_of_threads():
    def check(kind):
        weight, hessian = problem(700, 512)
        one, two = (fed(weight, hessian, kind, n_threads=n) for n in (1, 2))
        np.testing.assert_array_equal(one, two)

    check_each(check, (t.Q3_K, t.Q4_0))


def test_rows_do_not_depend_on_their_neighbours():
    weight, hessian = problem(37, 512)
    whole = fed(weight, hessian, t.Q4_K)
    np.testing.assert_array_equal(whole[:5], fed(weight[:5].contiguous(), hessian, t.Q4_K))


def test_inputs_that_never_came_are_rounded_as_they_are():
    """Other text may need them: they are neither set to zero nor used to make errors good."""
    weight, hessian = problem(64, 512)
    dead = torch.arange(0, 512, 3)
    hessian[dead], hessian[:, dead] = 0, 0
    data = fed(weight, hessian, t.Q4_K)
    values = torch.from_numpy(stored_values(data, t.Q4_K))
    error = (values - weight)[:, dead].square().mean().sqrt()
    assert error < 0.15 * weight.square().mean().sqrt()
    plain = quantize_rows(weight, t.Q4_K, native, hessian.diagonal().numpy())
    assert loss(weight, hessian, data, t.Q4_K) < loss(weight, hessian, plain, t.Q4_K)


def test_a_useless_hessian_says_why():
    for hessian, said in (
        (torch.zeros(256, 256), "zero"),
        (torch.full((256, 256), torch.nan), "not finite"),
    ):
        assert said in str(prepare_blocks(hessian, 256, SETTINGS).fallback)
    factor = prepare_blocks(torch.eye(256), 256, SETTINGS)
    with pytest.raises(ValueError, match="prepared for 256 columns"):
        feed(torch.zeros(16, 256), factor, t.Q4_0, native, SETTINGS)


# The collector


def test_chunks_that_are_held_out():
    assert held_out_chunks(2, 512) == {1}
    assert held_out_chunks(16, 512) == {4, 12}
    assert len(held_out_chunks(400, 512)) == 4
    assert len(held_out_chunks(8, 4096)) == 1
    with pytest.raises(UsageError, match="two chunks"):
        held_out_chunks(1, 512)


def collect(
    weight: torch.Tensor,
    x: torch.Tensor,
    kind: t.QuantType,
    n_ctx: int,
    counted: np.ndarray | None = None,
    **options,
):
    wanted = {"a.weight": WantedBlocks(kind, **options)}
    if counted is None:
        counted = np.ones((len(x) // n_ctx, n_ctx), np.float32)
    collector = FeedbackCollector(wanted, native, SETTINGS, [{"site": counted}])
    for part in x.split(2 * n_ctx):
        collector.observe(0, "site", part)
    others = {"b.weight": weight}
    return collector, collector.finish_site(0, "site", {"a.weight": weight} | others)


def correlated(n: int, n_in: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, n_in // 8)) @ rng.standard_normal((n_in // 8, n_in))
    return torch.from_numpy(x + rng.standard_normal(x.shape)).float()


def test_a_matrix_that_gains_keeps_feedback_and_is_stored(tmp_path):
    weight, x = problem(64, 256)[0], correlated(1024, 256)
    collector, replaced = collect(weight, x, t.Q3_K, 64)
    outcome = collector.outcomes["a.weight"]
    assert outcome.fallback is None and outcome.loss < 0.8 * outcome.plain_loss
    # Judged on the chunks that were held out, and on these alone.
    held = torch.cat([x.view(16, 64, 256)[i] for i in sorted(held_out_chunks(16, 64))])
    again = (held @ (weight - replaced["a.weight"]).T).square().sum()
    assert outcome.loss == pytest.approx(float(again), rel=1e-4)
    assert set(replaced) == {"a.weight"}
    np.testing.assert_allclose(
        collector.sums["b.weight"], x.double().square().sum(0).numpy(), rtol=1e-5
    )
    collector.save(0, tmp_path / "layer")
    data = read_blocks(tmp_path / "layer", "a.weight", t.Q3_K)
    values = ggml.dequantize(data, t.Q3_K, (64, 256))
    np.testing.assert_allclose(values, replaced["a.weight"].numpy(), atol=1e-6)
    other = FeedbackCollector({}, native, SETTINGS, [{"site": np.ones((16, 64), "f4")}])
    other.load(0, tmp_path / "layer")
    assert other.outcomes == collector.outcomes
    np.testing.assert_array_equal(other.sums["a.weight"], collector.sums["a.weight"])


def test_a_token_of_weight_n_is_n_tokens():
    """Whole weights beside a text in which each token stands as often, in blocks and in losses."""
    weight, x = problem(64, 256)[0], correlated(1024, 256)
    counted = np.random.default_rng(5).integers(1, 4, (16, 64)).astype(np.float32)
    times = torch.from_numpy(counted.astype(np.int64))
    # The same number of tokens in each chunk, so that the same chunks are held out.
    times[:, -1] += 192 - times.sum(1)
    collector, weighed = collect(weight, x, t.Q4_K, 64, times.numpy().astype(np.float32))
    many = x.repeat_interleave(times.flatten(), dim=0)
    other, repeated = collect(weight, many, t.Q4_K, 192)
    a, b = (c.outcomes["a.weight"] for c in (collector, other))
    # Importance is of the text as it is, so only the fed blocks are the same.
    assert a.fallback is None and b.fallback is None
    assert a.loss == pytest.approx(b.loss, rel=5e-2)  # a tie changes the rest of its row
    plain = collect(weight, x, t.Q4_K, 64)[1]
    same, before = (
        torch.isclose(weighed["a.weight"], other["a.weight"], atol=1e-6).float().mean()
        for other in (repeated, plain)
    )
    assert same > 0.9 and before < 0.1


def test_a_matrix_that_does_not_gain_keeps_its_blocks_by_importance():
    """Inputs that tell nothing of those held out: what was fitted to them is worse there."""
    weight, n_ctx = problem(64, 256)[0], 64
    x = correlated(16 * n_ctx, 256)
    chunks = x.view(16, n_ctx, 256)
    for i in held_out_chunks(16, n_ctx):
        chunks[i] = correlated(n_ctx, 256, seed=100 + i)
    collector, replaced = collect(weight, x, t.Q3_K, n_ctx)
    outcome = collector.outcomes["a.weight"]
    assert outcome.fallback == LOSES_MORE and outcome.loss >= outcome.plain_loss
    sums = x.square().sum(0).numpy()
    plain = stored_values(quantize_rows(weight, t.Q3_K, native, sums), t.Q3_K)
    np.testing.assert_allclose(replaced["a.weight"].numpy(), plain, atol=1e-3)


def test_a_scale_that_the_reader_wants_is_in_the_blocks_and_not_in_the_layer():
    weight, x = problem(64, 256)[0], correlated(1024, 256)
    plain, folded = (collect(weight, x, t.Q8_0, 64, scale=s) for s in (1.0, 4.0))
    np.testing.assert_allclose(folded[1]["a.weight"], plain[1]["a.weight"], atol=1e-6)
    a, b = (stored_values(c._arrays["a.weight Q8_0"], t.Q8_0) for c, _ in (plain, folded))
    np.testing.assert_allclose(b, 4 * a, atol=1e-6)


def test_without_a_factor_the_reason_is_kept():
    weight, x = problem(64, 256)[0], torch.zeros(1024, 256)
    collector, _ = collect(weight, x, t.Q4_K, 64)
    assert "zero" in str(collector.outcomes["a.weight"].fallback)
