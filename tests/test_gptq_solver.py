"""The GPTQ solver against the paper's procedure done the long way, and on real layers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dus_edge.checkpoint.builtin import BUILTIN
from dus_edge.checkpoint.resolve import resolve_base
from dus_edge.checkpoint.safetensors import SafetensorsCheckpoint
from dus_edge.errors import CheckpointError, UsageError
from dus_edge.quant import gptq, gptq_format, gptq_loops
from dus_edge.quant.feedback import gram
from dus_edge.quant.gptq import GPTQSettings

from .cases import check_each
from .draws import examples

#: Shares of the covering scale that are tried: first and last, by bits.
SHARES = {2: (1.2, 0.6), 3: (1.1, 0.65), 4: (1.05, 0.75), 8: (1.02, 0.95)}
#: (bits, group size, symmetric, act-order, group-aware act-order)
OPTIONS = [
    options
    for options in product((2, 3, 4, 8), (32, 64, 128, -1), (True, False), (True, False), (1, 0))
    if not (options[3] and options[4])
]


# The procedure, the long way


def half(x: np.ndarray) -> np.ndarray:
    """Rounded to float16 by way of float32, as torch does."""
    return x.astype(np.float32).astype(np.float16).astype(np.float64)


def candidates(x: np.ndarray, chosen: GPTQSettings) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scales and zero points to try for the columns of a group ``(rows, n)``."""
    low, high = np.minimum(x.min(1), 0), np.maximum(x.max(1), 0)
    found = []
    for share in np.linspace(*SHARES[chosen.bits], chosen.candidates):
        if chosen.sym:
            middle = 2 ** (chosen.bits - 1)
            cover = np.where(high > -low, -high, -low) / middle
            scale, zero = half(share * cover), np.full(len(x), middle)
        else:
            scale = half(share * (high - low) / chosen.top)
            zero = np.clip(np.rint(-low * share / scale), 1, chosen.top)
        found.append((scale, zero))
    return found


def visiting_order(diagonal: np.ndarray, chosen: GPTQSettings) -> list[int]:
    n = len(diagonal)
    if chosen.desc_act:
        return sorted(range(n), key=lambda i: -diagonal[i])
    if not chosen.act_group_aware:
        return list(range(n))
    width = chosen.group_width(n)
    groups = [range(g, g + width) for g in range(0, n, width)]
    groups.sort(key=lambda group: -diagonal[list(group)].mean())
    return [i for group in groups for i in sorted(group, key=lambda i: -diagonal[i])]


def long_way(
    weight: np.ndarray, hessian: np.ndarray, chosen: GPTQSettings
) -> dict[str, np.ndarray]:
    """GPTQ with the inverse of what remains of the Hessian taken anew for every column."""
    n_out, n = weight.shape
    width = chosen.group_width(n)
    diagonal = hessian.diagonal()
    mean = diagonal[diagonal > 0].mean()
    damped = hessian.copy()
    damped[diagonal == 0, diagonal == 0] = mean
    damped += np.eye(n) * chosen.damp * mean
    w = np.where(diagonal == 0, 0, weight)
    order = visiting_order(diagonal, chosen)
    inverses = [np.linalg.inv(damped[np.ix_(order[k:], order[k:])]) for k in range(n)]

    def quantize(w, first, stop, scale, zero):
        """Columns first … stop of the order, compensated in all later ones."""
        w, codes, cost = w.copy(), np.zeros((n_out, stop - first), int), np.zeros(n_out)
        for k in range(first, stop):
            i = order[k]
            q = np.clip(np.rint(w[:, i] / scale) + zero, 0, chosen.top)
            error = w[:, i] - scale * (q - zero)
            cost += error**2 / inverses[k][0, 0]
            w[:, order[k:]] -= np.outer(error / inverses[k][0, 0], inverses[k][0])
            codes[:, k - first] = q
        return w, codes, cost

    codes = np.zeros((n_out, n), int)
    scales, zeros = np.zeros((n // width, n_out)), np.zeros((n // width, n_out), int)
    g_idx = np.zeros(n, int)
    for first in range(0, n, width):
        stop = first + width
        members = order[first:stop]
        tried = candidates(w[:, members], chosen)
        if width not in (32, 64, 128) and width > chosen.block:
            # A row too long to be tried: errors weighted with what they cost alone.
            cost_of = np.array([1 / inverses[k][0, 0] for k in range(n)])
            costs = [
                (cost_of * (x - s * (np.clip(np.rint(x / s) + z, 0, chosen.top) - z)) ** 2).sum(1)
                for s, z in ((s[:, None], z[:, None]) for s, z in tried)
                for x in (w[:, members],)
            ]
        else:
            costs = [quantize(w, first, stop, s, z)[2] for s, z in tried]
        best = np.argmin(costs, 0)
        scale = np.array([s for s, _ in tried])[best, range(n_out)]
        zero = np.array([z for _, z in tried])[best, range(n_out)]
        group = first // width if chosen.desc_act else members[0] // width
        w, codes[:, members], _ = quantize(w, first, stop, scale, zero)
        scales[group], zeros[group], g_idx[members] = scale, zero, group
    return {"codes": codes, "scales": scales, "zeros": zeros, "g_idx": g_idx}


# Problems


def problem(
    n_out: int, n_in: int, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and XᵀX of correlated inputs of very different sizes."""
    rng = np.random.default_rng(seed)
    rank = max(4, n_in // 4)
    x = rng.standard_normal((2 * n_in, rank)) @ rng.standard_normal((rank, n_in))
    x += rng.standard_normal(x.shape) * 2
    x *= rng.lognormal(0, 0.7, n_in)
    weight = rng.standard_normal((n_out, n_in)) * 0.05
    return torch.from_numpy(weight).to(dtype), torch.from_numpy(x.T @ x).to(dtype)


def true_loss(weight: torch.Tensor, hessian: torch.Tensor, solution: gptq.Solution) -> float:
    delta = weight.double() - gptq.dequantize(solution).double()
    return float(((delta @ hessian.double()) * delta).sum())


@cache
def pico_layers() -> dict[str, torch.Tensor]:
    checkpoint = SafetensorsCheckpoint(resolve_base(BUILTIN, weights=True))
    names = [n for n in checkpoint.specs() if "proj" in n and (".0." in n or ".5." in n)]
    bits = {n: np.array(checkpoint.read(n)).astype(np.int32) << 16 for n in names}
    return {n: torch.from_numpy(b.view(np.float32)) for n, b in bits.items()}


# The same as the long way


@given(
    st.sampled_from(OPTIONS),
    st.sampled_from((32, 64, 128)),
    st.sampled_from((0.01, 0.1)),
    st.integers(0, 2**32 - 1),
)
@examples(25)
def test_solves_as_the_paper_does_the_long_way(options, block, damp, seed):
    check_long_way(options, block, damp, seed)


def test_every_combination_of_options():
    check_each(check_long_way, OPTIONS, [64], [0.01], [7])


def check_long_way(options: tuple, block: int, damp: float, seed: int) -> None:
    bits, group_size, sym, desc_act, aware = options
    n_in = {32: 96, 64: 128, 128: 128, -1: 96}[group_size]
    chosen = GPTQSettings(bits, group_size, sym, desc_act, bool(aware), damp, block, candidates=4)
    weight, hessian = problem(32, n_in, seed)
    if seed % 3 == 0:
        hessian[5] = hessian[:, 5] = 0
    solution = gptq.solve(weight, hessian, chosen)
    expected = long_way(weight.numpy(), hessian.numpy(), chosen)
    assert solution.fallback is None
    for field, dtype in (("codes", "uint8"), ("scales", "float16"), ("zeros", "int32")):
        found = getattr(solution, field).numpy()
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, expected[field])
    np.testing.assert_array_equal(solution.g_idx.numpy(), expected["g_idx"])
    assert solution.loss == pytest.approx(true_loss(weight, hessian, solution), rel=1e-6)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_compiled_and_tensor_loops_agree(bits, sym):
    """A sum in another order may round a weight that lies between two codes the other way."""
    weight, hessian = problem(512, 128, bits, torch.float32)
    chosen = GPTQSettings(bits, sym=sym)
    factor = gptq.prepare(hessian, chosen)
    x = weight.T[factor.columns].contiguous()
    scales, zeros = gptq._candidates(x, chosen)
    found = []
    for function in (gptq_loops.solve_group, gptq_loops.solve_group_by_tensors):
        codes, delta = torch.zeros(x.shape, dtype=torch.uint8), x.clone()
        cost = torch.ones(512)
        chose = function(
            x, factor.inverses[0], scales, zeros, chosen.top, codes, delta, cost
        )  # fmt: skip
        found.append((codes, delta, cost, *chose))
        torch.testing.assert_close(delta, x - chose[0] * (codes - chose[1]), rtol=0, atol=1e-6)
    same = (found[0][0] == found[1][0]).all(0)
    assert same.float().mean() > 0.98
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours[..., same], theirs[..., same], rtol=1e-3, atol=1e-6)
    assert float(found[0][2].sum()) == pytest.approx(float(found[1][2].sum()), rel=1e-3)
    weights = hessian.diagonal()[factor.columns].contiguous()
    pair = [
        torch.stack(function(x, weights, scales, zeros, chosen.top))
        for function in (gptq_loops.choose_scales, gptq_loops.choose_scales_by_tensors)
    ]
    assert (pair[0] == pair[1]).all(0).float().mean() > 0.98


# Real layers


@pytest.mark.parametrize("desc_act", [False, True], ids=["groups", "desc_act"])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (4, 128), (8, -1)])
def test_real_layers_lose_less_than_by_rounding(bits, group_size, desc_act):
    layers = pico_layers()
    assert len(layers) == 14
    chosen = GPTQSettings(bits, group_size, desc_act=desc_act)
    for i, (name, weight) in enumerate(layers.items()):
        _, hessian = problem(32, weight.shape[1], i, torch.float32)
        solution = gptq.solve(weight, hessian, chosen, name)
        assert solution.fallback is None
        assert solution.loss == pytest.approx(true_loss(weight, hessian, solution), rel=2e-3)
        assert solution.loss < 0.8 * solution.rtn_loss


def test_what_is_stored_is_what_was_solved_for():
    weight, hessian = problem(64, 128, 3, torch.float32)
    for chosen in (GPTQSettings(), GPTQSettings(3, 32, sym=False, desc_act=True)):
        solution = gptq.solve(weight, hessian, chosen)
        read = gptq_format.dequantized(*gptq_format.stored(solution, chosen).values(), chosen.bits)
        np.testing.assert_array_equal(read, gptq.dequantize(solution).numpy())


@pytest.mark.parametrize("group_size", [64, -1])
def test_visiting_important_columns_first_loses_less(group_size):
    losses = {}
    for order in ("none", "aware", "desc"):
        chosen = GPTQSettings(
            4, group_size, act_group_aware=order == "aware", desc_act=order == "desc"
        )  # fmt: skip
        losses[order] = sum(
            gptq.solve(*problem(64, 256, seed, torch.float32), chosen).loss for seed in range(4)
        )
    assert losses["aware"] < 0.97 * losses["none"]
    assert losses["desc"] < 0.97 * losses["none"]


def test_trying_more_scales_loses_less():
    losses = []
    for candidates in (1, 4, 12):
        chosen = GPTQSettings(candidates=candidates)
        solutions = [gptq.solve(*problem(64, 256, s, torch.float32), chosen) for s in range(4)]
        losses.append(sum(s.loss for s in solutions))
    assert losses[2] < 0.98 * losses[1] < 0.9 * losses[0]


def test_matrices_with_one_input_share_a_factor():
    chosen = GPTQSettings(group_size=64)
    weight, hessian = problem(96, 192, 0, torch.float32)
    factor = gptq.prepare(hessian, chosen)
    for part in (weight, weight[:64], weight[64:]):
        alone, shared = gptq.solve(part, hessian, chosen), gptq.solve(part, factor, chosen)
        assert torch.equal(alone.codes, shared.codes)
        assert alone.loss == shared.loss
    with pytest.raises(ValueError, match="prepared for other settings"):
        gptq.solve(weight, factor, replace(chosen, bits=3))


def test_a_tall_matrix_is_compared_on_some_rows():
    weight, hessian = problem(1056, 128, 1, torch.float32)
    chosen = GPTQSettings(group_size=32)
    solution = gptq.solve(weight, hessian, chosen)
    parts = [gptq.solve(w, hessian, chosen) for w in weight.split(96)]
    assert solution.rtn_loss == pytest.approx(sum(p.rtn_loss for p in parts), rel=0.1)
    assert solution.loss == pytest.approx(sum(p.loss for p in parts), rel=1e-3)


# Where there is nothing to solve


def hopeless(kind: str) -> torch.Tensor:
    _, hessian = problem(32, 128, 0, torch.float32)
    if kind == "indefinite":
        hessian[3, 90] = hessian[90, 3] = 1e3 * hessian.diagonal().max()
    elif kind == "not finite":
        hessian[7, 7] = torch.nan
    elif kind == "nan beside the diagonal":
        hessian[3, 90] = hessian[90, 3] = torch.nan
    elif kind == "negative":
        hessian[9, 9] = -1
    else:
        hessian[:] = 0
    return hessian


@pytest.mark.parametrize("desc_act", [False, True], ids=["groups", "desc_act"])
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("indefinite", "not positive definite"),
        ("not finite", "not finite"),
        ("nan beside the diagonal", "not positive definite"),
        ("negative", "negative diagonal"),
        ("empty", "all zero"),
    ],
)
def test_a_useless_hessian_means_rounding_to_nearest(kind, why, desc_act):
    weight, _ = problem(32, 128, 1, torch.float32)
    solution = gptq.solve(weight, hopeless(kind), GPTQSettings(desc_act=desc_act, group_size=32))
    assert why in solution.fallback
    groups = solution.g_idx.long()
    error = (gptq.dequantize(solution) - weight).abs()
    step = solution.scales.float().abs()[groups].T
    inside = (solution.codes > 0) & (solution.codes < 15)
    assert inside.float().mean() > 0.8
    assert bool((error <= step * 0.5001)[inside].all())


def test_never_worse_than_rounding_to_nearest(monkeypatch):
    """Were GPTQ to fail, the result is that of rounding, and says so."""
    weight, hessian = problem(512, 128, 2, torch.float32)
    chosen = GPTQSettings()
    good = gptq.solve(weight, hessian, chosen)
    solve = gptq._solve

    def bad(rows, factor):
        solution, losses = solve(rows, factor)
        return replace(solution, codes=15 - solution.codes), losses * 1e3

    monkeypatch.setattr(gptq, "_solve", bad)
    solution = gptq.solve(weight, hessian, chosen)
    assert solution.fallback.startswith("rounding to nearest loses less")
    assert solution.loss == solution.rtn_loss == pytest.approx(good.rtn_loss, rel=0.2)
    assert solution.loss == pytest.approx(true_loss(weight, hessian, solution), rel=1e-3)


def test_a_singular_hessian_needs_only_damping():
    """Fewer tokens than inputs."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((40, 256)).astype(np.float32))
    weight, _ = problem(32, 256, 0, torch.float32)
    solution = gptq.solve(weight, x.T @ x, GPTQSettings())
    assert solution.fallback is None
    assert solution.loss < 0.3 * solution.rtn_loss


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-6, 1e30])
@pytest.mark.parametrize("sym", [True, False])
def test_weights_beyond_the_reach_of_float16_scales(size, sym):
    weight, hessian = problem(32, 128, 0, torch.float32)
    weight = weight * size
    weight[0] = 1.0
    solution = gptq.solve(weight, hessian, GPTQSettings(group_size=32, sym=sym))
    restored = gptq.dequantize(solution)
    assert bool(torch.isfinite(restored).all())
    assert bool((solution.scales != 0).all())
    assert float(restored[0].sub(1).abs().max()) < 0.2
    gptq_format.stored(solution, GPTQSettings(group_size=32, sym=sym))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(value):
    weight, hessian = problem(32, 128, 0, torch.float32)
    weight[3, 5] = value
    with pytest.raises(CheckpointError, match=r"model\.q_proj: weights are not finite"):
        gptq.solve(weight, hessian, GPTQSettings(), "model.q_proj")


def test_shapes_that_do_not_divide_are_refused():
    weight, hessian = problem(32, 96, 0, torch.float32)
    with pytest.raises(UsageError, match=r"model\.q_proj: groups of 128 do not divide"):
        gptq.solve(weight, hessian, GPTQSettings(), "model.q_proj")


@pytest.mark.parametrize("width", [1, 128, 300, 2080])
def test_half_of_a_gram_matrix_is_enough(width):
    x = torch.randn(70, width, generator=torch.Generator().manual_seed(width))
    found = torch.zeros(width, width)
    for part in x.split(32):
        gram.add_gram(found, part)
    gram.mirror(found)
    assert torch.equal(found, found.T)
    expected = (x.double().T @ x.double()).float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
