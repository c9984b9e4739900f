"""The speed model: physics, the stored constants against a fresh fit, the stored validation."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dus_edge import data
from dus_edge.errors import UsageError
from dus_edge.predict.devices import find_device, load_devices
from dus_edge.predict.speed.device import DeviceSpeed, device_speed
from dus_edge.predict.speed.predict import predict
from dus_edge.predict.speed.roofline import ERAS
from dus_edge.predict.speed.work import Work

from .cases import check_each
from .draws import examples
from .scripts import BENCHMARKS, load_script, read_published
from .shapes import LLAMA3_8B, SOLAR, attention, dense_work

IDS = [d.id for d in load_devices() if d.backend in ("CUDA", "Metal")]


def work(preset: str = "q4_k_m", shape: Mapping = SOLAR, **changes) -> Work:
    tied_head = changes.pop("tied_head", False)
    return dense_work(preset, {**shape, **changes}, tied_head)


def device(name: str = "rtx-3060-12gb") -> DeviceSpeed:
    return device_speed(find_device(name))


@pytest.fixture(scope="module")
def fit_speed() -> ModuleType:
    return load_script("fit_speed")


@pytest.fixture(scope="module")
def stored() -> Mapping:
    return tomllib.loads(data.read_text("speed.toml"))


@pytest.fixture(scope="module")
def validated() -> list[dict]:
    text = (BENCHMARKS / "results" / "speed.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


# --- work ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "file_gib"), [("q4_k_m", 4.58), ("q4_0", 4.33), ("f16", 14.96)])
def test_bytes_read_are_the_published_file_less_the_embedding_table(preset, file_gib):
    # File sizes as llama-bench printed them for Llama 3 8B.
    kind = {"q4_k_m": 4.5, "q4_0": 4.5, "f16": 16}[preset]
    table = 128256 * 4096 * kind / 8
    read = work(preset, LLAMA3_8B).weight_bytes
    assert (read + table) / 2**30 == pytest.approx(file_gib, rel=0.004)


def test_tied_embeddings_are_read_as_the_output_matrix():
    tied, own = work(tied_head=True), work()
    assert tied.n_weights == own.n_weights


def test_kv_bytes_per_token():
    assert work(shape=LLAMA3_8B).kv_bytes_per_token == 2 * 32 * 8 * 128 * 2


# --- physics ------------------------------------------------------------------------------------


def test_every_device_has_an_ordered_positive_prediction():
    def check(name):
        speed = predict(device(name), work())
        assert 0 < speed.tg_tokens_per_s_low < speed.tg_tokens_per_s < speed.tg_tokens_per_s_high
        assert 0 < speed.pp_tokens_per_s_low < speed.pp_tokens_per_s < speed.pp_tokens_per_s_high
        # A token cannot be faster than its bytes through the memory.
        d = device(name)
        assert speed.tg_tokens_per_s < d.bandwidth_gbps * 1e9 / work().weight_bytes

    check_each(check, IDS)


def test_smaller_files_generate_faster():
    def check(name):
        rates = [predict(device(name), work(p)).tg_tokens_per_s for p in ("f16", "q8_0", "q4_0")]
        assert rates == sorted(rates)
        assert rates[2] > 1.8 * rates[0]

    check_each(check, IDS)


@examples(60)
@given(
    name=st.sampled_from(IDS),
    era=st.sampled_from(ERAS),
    flash_attn=st.booleans(),
    depth=st.floats(0, 100_000),
    more=st.floats(1.01, 4),
)
def test_monotone(name, era, flash_attn, depth, more):
    d, w = device(name), work()
    options = {"era": era, "flash_attn": flash_attn}
    here = predict(d, w, depth=depth, **options)
    deeper = predict(d, w, depth=depth * more + 1, **options)
    assert deeper.tg_tokens_per_s < here.tg_tokens_per_s
    assert deeper.pp_tokens_per_s < here.pp_tokens_per_s
    faster = replace(d, bandwidth_gbps=d.bandwidth_gbps * more)
    assert predict(faster, w, depth=depth, **options).tg_tokens_per_s > here.tg_tokens_per_s
    stronger = replace(d, matmul_tflops=d.matmul_tflops * more)
    assert predict(stronger, w, depth=depth, **options).pp_tokens_per_s > here.pp_tokens_per_s
    heavier = replace(w, weights={k: v * more for k, v in w.weights.items()})
    slower = predict(d, heavier, depth=depth, **options)
    assert slower.tg_tokens_per_s < here.tg_tokens_per_s
    assert slower.pp_tokens_per_s < here.pp_tokens_per_s


@pytest.mark.parametrize("name", ["rtx-3060-12gb", "m1-8c"])
def test_fewer_layers_on_the_device_are_never_faster(name):
    speeds = [predict(device(name), work(), offloaded_layers=n) for n in (49, 48, 40, 20, 0)]
    whole = predict(device(name), work())
    assert speeds[0] == whole
    tg = [x.tg_tokens_per_s for x in speeds]
    pp = [x.pp_tokens_per_s for x in speeds]
    assert tg == sorted(tg, reverse=True)
    assert pp == sorted(pp, reverse=True)
    half = speeds[3]
    width = half.tg_tokens_per_s_high / half.tg_tokens_per_s_low
    assert width > whole.tg_tokens_per_s_high / whole.tg_tokens_per_s_low


def test_partial_offload_reproduces_the_run_it_came_from(stored):
    # RTX 4060 Laptop, 24 of 33 layers: 46.03 -> 24.12 tok/s, 2177.65 -> 1342.39 tok/s for pp512.
    shape = {**LLAMA3_8B, "intermediate_size": 11008, "n_kv_heads": 32, "vocab_size": 151936}
    outside = 9 / 33 * work(shape=shape).weight_bytes / 1e9
    tg = 1 / (24 / 33 / 46.03 + outside / stored["offload"]["host_gbps"])
    pp = 512 / (512 / 2177.65 + outside / stored["offload"]["bus_gbps"])
    assert tg == pytest.approx(24.12, rel=0.01)
    assert pp == pytest.approx(1342.39, rel=0.01)


def test_a_quantized_cache_costs_less_at_depth():
    d = device()
    f16 = predict(d, work(), depth=8192)
    q8 = predict(d, replace(work(), kv_bytes_per_value=34 / 32), depth=8192)
    assert q8.tg_tokens_per_s > f16.tg_tokens_per_s


def test_fused_attention_pays_at_depth():
    d = device("rtx-4090")
    plain, fused = (predict(d, work(), depth=30_000, flash_attn=x) for x in (False, True))
    assert fused.tg_tokens_per_s > plain.tg_tokens_per_s
    assert fused.pp_tokens_per_s > plain.pp_tokens_per_s


def test_unknown_family_has_a_wider_interval():
    d = device()
    known, unknown = (predict(x, work()) for x in (d, replace(d, family="nvidia-60-desktop")))
    assert unknown.tg_tokens_per_s_high > known.tg_tokens_per_s_high
    assert unknown.tg_tokens_per_s_low < known.tg_tokens_per_s_low


# --- constants and their validation -------------------------------------------------------------


def test_shapes_agree_with_published_parameter_counts(fit_speed):
    # All but the mixture of experts (its active weights count) and hybrid models.
    for run in read_published("runs"):
        if "A3B" in run["model"] or "Qwen3.6" in run["model"]:
            continue
        layers, hidden, ffn, heads, kv, dim, vocab, tied = fit_speed.shape_of(run["model"])
        count = layers * (2 * hidden * heads * dim + 2 * hidden * kv * dim + 3 * hidden * ffn)
        count += vocab * hidden * (1 if tied else 2)
        assert count / 1e9 == pytest.approx(run["params_b"], rel=0.04), run["model"]


def test_stored_constants_are_those_of_the_fit(fit_speed, stored):
    problems, thetas = fit_speed.fit_all()
    for which, problem in problems.items():
        terms = stored[which]["terms"]
        assert tuple(terms) == problem.names
        rates = problem.log_rates(np.array(list(terms.values())))
        # Rates are compared: two terms may trade a little where no row tells them apart.
        assert np.abs(rates - problem.log_rates(thetas[which])).max() < 0.005


#: Presets of which no run is published.
UNPUBLISHED = ("iq4_nl", "iq4_xs", "iq3_s", "iq3_m", "iq2_m", "iq2_s")


def test_a_type_that_nobody_measured_is_less_certain(fit_speed, stored):
    """Q4_0's rows, predicted as if no run of that type were known, tell by how much."""
    assert all(row["quant"].lower() not in UNPUBLISHED for row in read_published("runs"))
    fresh = fit_speed.fit_unpublished(fit_speed.fit_all()[0])
    assert stored["unpublished"] == pytest.approx(fresh, abs=0.005)
    assert min(fresh.values()) > 0
    shape = attention(32, 32, 8, 128)

    def widths(weights: Mapping[str, float]) -> np.ndarray:
        x = predict(device(), Work(shape, weights))
        tg = x.tg_tokens_per_s_high / x.tg_tokens_per_s_low
        return np.array([tg, x.pp_tokens_per_s_high / x.pp_tokens_per_s_low])

    certain, half = widths({"Q4_K": 2e9}), widths({"Q4_K": 1e9, "IQ4_NL": 1e9})
    whole = widths({"IQ4_NL": 2e9})
    assert (certain < half).all() and (half < whole).all()
    for known, taken in (("Q4_K", "IQ4_NL"), ("Q3_K", "IQ3_S")):
        same = [predict(device(), Work(shape, {kind: 2e9})) for kind in (known, taken)]
        assert same[0].tg_tokens_per_s == same[1].tg_tokens_per_s
        assert same[0].tg_tokens_per_s_high < same[1].tg_tokens_per_s_high


def test_no_constant_belongs_to_a_device(stored):
    ids = {d.id for d in load_devices()}
    for which in ("tg", "pp"):
        assert not {part for t in stored[which]["terms"] for part in t.split(".")} & ids


def fitted(validated: list[dict], which: str) -> list[dict]:
    """Rows of llama-bench, each predicted by a fit without its device."""
    return [x for x in validated if x["kind"] == which and x["decides"]]


@pytest.mark.parametrize(("which", "mean", "p90"), [("tg", 0.06, 0.15), ("pp", 0.12, math.inf)])
def test_validation_meets_its_targets(validated, which, mean, p90):
    rows = fitted(validated, which)
    error = np.array([abs(x["predicted"] / x["measured"] - 1) for x in rows])
    inside = np.mean([x["low"] <= x["measured"] <= x["high"] for x in rows])
    assert error.mean() <= mean
    assert np.quantile(error, 0.9) <= p90
    assert 0.78 <= inside <= 0.85


def test_only_rows_of_llama_bench_decide(fit_speed, validated):
    named = {"llama-bench", "llama-bench at context depth", "user-submitted llama-bench"}
    for x in validated:
        expected = x["metric"] in named and x["use"] == "fit" and x["params_b"] >= 1
        assert x["decides"] == expected
    problems, thetas = fit_speed.fit_all()
    for which, problem in problems.items():
        # Another tool's row far off moves no constant that llama-bench's rows have.
        problem.logs[~problem.deciding] += 1.0
        moved = problem.fit(np.ones(len(problem.rows), bool))
        assert np.allclose(moved[~problem.own], thetas[which][~problem.own], atol=1e-9)
        assert not np.allclose(moved[problem.own], thetas[which][problem.own], atol=1e-3)


def test_both_yardsticks_are_worse(validated):
    rows = fitted(validated, "tg")
    ours = np.mean([abs(x["predicted"] / x["measured"] - 1) for x in rows])
    for factor in (0.55, 1.0):
        theirs = [abs(factor * x["bandwidth_over_bytes"] / x["measured"] - 1) for x in rows]
        assert ours < np.mean(theirs) / 2


def test_no_row_is_lost(validated):
    devices = {d.id for d in load_devices()} | {"a100-80gb", "m2-pro-", "m4-pro-"}
    for which in ("tg", "pp"):
        published = [
            r
            for r in read_published("runs")
            if r[f"{which}_tps"] and r["device_id"].rstrip("?") in devices
        ]
        assert len(published) == sum(x["kind"] == which for x in validated)


def test_validated_rows_are_of_fits_without_their_device(fit_speed, validated):
    # One device again, from the prior means, without what cross_validate knew.
    problems, _ = fit_speed.fit_all()
    problem = problems["tg"]
    theta = problem.fit(problem.without("rtx-4080"))
    left = problem.deciding & (problem.devices == "rtx-4080")
    again = np.exp(problem.log_rates(theta, left))
    kept = [x["predicted"] for x in fitted(validated, "tg") if x["device"] == "rtx-4080"]
    assert np.allclose(again, kept, rtol=0.005)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"depth": -1}, "depth"),
        ({"depth": math.nan}, "depth"),
        ({"n_prompt": 0}, "prompt"),
        ({"era": "2022"}, "2023"),
        ({"offloaded_layers": -1}, "layers"),
    ],
)
def test_bad_options(options, word):
    with pytest.raises(UsageError, match=word):
        predict(device(), work(), **options)


def test_bad_models_and_devices():
    with pytest.raises(UsageError, match="hidden"):
        work(hidden_size=-4096)
    with pytest.raises(UsageError, match="IQ1_S"):
        Work(attention(32, 32, 8, 128), {"IQ1_S": 1e9})
    with pytest.raises(UsageError, match="no weights"):
        Work(attention(32, 32, 8, 128), {})
    with pytest.raises(UsageError, match="negative"):
        Work(attention(32, 32, 8, 128), {"F16": -1.0})
    with pytest.raises(UsageError, match="n_layers"):
        Work(attention(0, 32, 8, 128), {"F16": 1e9})
    with pytest.raises(UsageError, match="bandwidth_gbps"):
        replace(device(), bandwidth_gbps=0)
    with pytest.raises(UsageError, match="bandwidth"):
        device_speed(replace(find_device("rtx-4090"), bandwidth_gbps=None))
    with pytest.raises(UsageError, match="cuda_cores"):
        device_speed(replace(find_device("rtx-4090"), fp32_tflops=None, cuda_cores=None))
    with pytest.raises(UsageError, match="cpu"):
        device_speed(find_device("rtx-4090"), backend="CPU")
