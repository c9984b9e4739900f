"""Predicted speed of GPTQ models: sizes, physics, the check against published runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dus_edge import data
from dus_edge.errors import UsageError
from dus_edge.predict.devices import find_device, load_devices
from dus_edge.predict.speed import gptq as g
from dus_edge.predict.speed.device import DeviceSpeed, device_speed
from dus_edge.predict.speed.predict import constants, predict
from dus_edge.predict.speed.roofline import Case, tg_terms
from dus_edge.predict.speed.work import Work, bytes_per_weight
from dus_edge.quant import gptq_format

from .cases import check_each
from .draws import examples
from .scripts import BENCHMARKS, load_script, read_published
from .shapes import attention, dense_work

CUDA = [d.id for d in load_devices() if d.backend == "CUDA"]
#: Weights of SOLAR's linear layers, and of its head.
LINEAR, HEAD = 48 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336), 32000 * 4096


def work(kind: str = "GPTQ4_128") -> Work:
    return Work(attention(48, 32, 8, 128), {kind: LINEAR, "F16": HEAD})


def device(name: str = "rtx-3060-12gb") -> DeviceSpeed:
    return device_speed(find_device(name))


@pytest.fixture(scope="module")
def fit_gptq_speed() -> ModuleType:
    return load_script("fit_gptq_speed")


@pytest.fixture(scope="module")
def published() -> list[dict]:
    return read_published("gptq")


@pytest.fixture(scope="module")
def fresh(fit_gptq_speed) -> tuple[dict, list[dict]]:
    return fit_gptq_speed.run()


# --- sizes --------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_stored_tensors():
    n_out, n_in = 96, 512

    def check(bits, group_size):
        form = gptq_format.GPTQSettings(bits=bits, group_size=group_size)
        specs = gptq_format.tensor_specs((n_out, n_in), form)
        sizes = {k: math.prod(shape) * np.dtype(d).itemsize for k, (d, shape) in specs.items()}
        whole_row = group_size == -1
        kind = g.kind_name(bits, None if whole_row else group_size)
        parts = ("qweight",) if whole_row else ("qweight", "qzeros", "scales")
        assert bytes_per_weight(kind) * n_out * n_in == sum(sizes[x] for x in parts)

    check_each(check, [2, 3, 4, 8], [32, 64, 128, -1])


@pytest.mark.parametrize(
    ("bits", "group_size", "name"),
    [(4, 128, "GPTQ4_128"), (4, None, "GPTQ4_ROW"), (8, 32, "GPTQ8_32")],
)
def test_names(bits, group_size, name):
    assert g.kind_name(bits, group_size) == name
    assert g.is_gptq(name)
    assert g.code_bits(name) == bits


@pytest.mark.parametrize("name", ["Q4_0", "GPTQ4", "GPTQ4_0", "GPTQ5_128", "GPTQ4_128x", "gptq4_1"])
def test_other_names_are_none_of_gptq(name):
    assert not g.is_gptq(name)


# --- predictions --------------------------------------------------------------------------------


def test_every_card_has_an_ordered_prediction_of_generation_alone():
    def check(name, kernel):
        d = device(name)
        speed = predict(d, work(), kernel=kernel)
        assert 0 < speed.tg_tokens_per_s_low < speed.tg_tokens_per_s < speed.tg_tokens_per_s_high
        assert speed.tg_tokens_per_s < d.bandwidth_gbps * 1e9 / work().weight_bytes
        assert speed.pp_tokens_per_s is None
        assert speed.pp_tokens_per_s_low is speed.pp_tokens_per_s_high is None

    check_each(check, CUDA, g.KERNELS)


def test_the_interval_is_no_narrower_than_llama_cpps():
    def check(name, kernel):
        ours = predict(device(name), work(), kernel=kernel)
        theirs = predict(device(name), dense_work("q4_0"))
        for end in ("low", "high"):
            mine, other = (
                abs(math.log(getattr(x, f"tg_tokens_per_s_{end}") / x.tg_tokens_per_s))
                for x in (ours, theirs)
            )
            assert mine >= other - 1e-12

    check_each(check, CUDA, g.KERNELS)


def test_the_server_costs_and_exllamav2_is_the_default():
    def check(name):
        d = device(name)
        first, second = (predict(d, work(), kernel=k) for k in g.KERNELS)
        assert predict(d, work()) == first
        assert (first.engine, second.engine) == ("ExLlamaV2", "vLLM (Marlin)")
        assert predict(d, dense_work("q4_0")).engine == "llama.cpp"
        assert second.tg_tokens_per_s < first.tg_tokens_per_s

    check_each(check, CUDA)


def test_codes_smaller_than_q4_0_are_faster_and_smaller_groups_slower():
    rates = [
        predict(device(), work(kind)).tg_tokens_per_s
        for kind in ("GPTQ4_32", "GPTQ4_64", "GPTQ4_128", "GPTQ4_ROW")
    ]
    assert rates == sorted(rates)
    q4_0 = predict(device(), dense_work("q4_0"), flash_attn=True)
    assert 1 < rates[2] / q4_0.tg_tokens_per_s < 1.1


@examples(40)
@given(
    name=st.sampled_from(CUDA),
    kernel=st.sampled_from(g.KERNELS),
    depth=st.floats(0, 30_000),
    more=st.floats(1.01, 4),
)
def test_monotone(name, kernel, depth, more):
    d, w = device(name), work()
    here = predict(d, w, depth=depth, kernel=kernel).tg_tokens_per_s
    assert predict(d, w, depth=depth * more + 1, kernel=kernel).tg_tokens_per_s < here
    faster = replace(d, bandwidth_gbps=d.bandwidth_gbps * more)
    assert predict(faster, w, depth=depth, kernel=kernel).tg_tokens_per_s > here
    heavier = replace(w, weights={k: v * more for k, v in w.weights.items()})
    assert predict(d, heavier, depth=depth, kernel=kernel).tg_tokens_per_s < here


def test_what_belongs_to_llama_cpp_changes_nothing():
    plain = predict(device(), work())
    assert predict(device(), work(), era="2023", flash_attn=True, n_prompt=9) == plain
    assert predict(device(), work(), offloaded_layers=49) == plain


def test_kernels_add_no_terms_to_llama_cpps():
    case = Case(device(), dense_work("q4_0"))
    names = {
        t if isinstance(t, str) else t[0] for rows in tg_terms(case).values() for r in rows
        for t in r
    }  # fmt: skip
    assert names <= {*constants()[0].terms.names, "eta.cuda.q8", "eta.arch.ampere"}
    assert not any(k in name for name in names for k in (*g.KERNELS, "None"))


@pytest.mark.parametrize(
    ("device_name", "kind", "options", "word"),
    [
        ("m1-8c", "GPTQ4_128", {}, "Metal"),
        ("rtx-4090", "GPTQ8_128", {}, "8 bits"),
        ("rtx-4090", "GPTQ4_128", {"kernel": "triton"}, "exllamav2, marlin"),
        ("rtx-4090", "GPTQ4_128", {"offloaded_layers": 20}, "all of it"),
        ("rtx-4090", "Q4_0", {"kernel": "marlin"}, "for GPTQ models"),
        ("rtx-4090", "GPTQ4_128", {"depth": -1}, "depth"),
    ],
)
def test_what_is_not_known_is_said(device_name, kind, options, word):
    with pytest.raises(UsageError, match=word):
        predict(device(device_name), work(kind), **options)


def test_vulkan_is_not_known_either():
    with pytest.raises(UsageError, match="Vulkan"):
        predict(device_speed(find_device("rtx-4090"), backend="vulkan"), work())


# --- published runs -----------------------------------------------------------------------------


def test_rows_state_what_they_must(published):
    devices = {d.id for d in load_devices()}
    seen = set()
    for row in published:
        where = f"{row['source']}: {row['model']}"
        assert row["source_url"].startswith("https://"), where
        assert row["batch"] == 1 and row["bits"] == 4, where
        assert row["tg_tps"] or row["vram_mib"], where
        assert row["device_id"] is None or row["device_id"].rstrip("?") in {*devices, "a100-80gb"}
        assert row["device_id"] or row["use"] == "memory", where
        assert (row["pp_tps"] is None) or row["n_prompt"], where
        assert (row["vram_mib"] is None) == (row["vram_what"] is None), where
        q, kv = (row[k] * row["head_dim"] for k in ("n_heads", "n_kv_heads"))
        count = row["n_layers"] * row["hidden"] * (2 * q + 2 * kv + 3 * row["ffn"])
        count += row["vocab"] * row["hidden"] * (1 if row["tied_head"] else 2)
        assert count / 1e9 == pytest.approx(row["params_b"], rel=0.01), where
        seen.add(json.dumps(row, sort_keys=True))
    assert len(seen) == len(published)


def test_torch_allocated_what_the_sizes_say(published):
    # ExLlama keeps the embedding on the host and some buffers beside the weights.
    for row in published:
        if row["vram_what"] != "weights as PyTorch allocated them":
            continue
        q, kv = (row[k] * row["head_dim"] for k in ("n_heads", "n_kv_heads"))
        linear = row["n_layers"] * row["hidden"] * (2 * q + 2 * kv + 3 * row["ffn"])
        kind = g.kind_name(row["bits"], row["group_size"])
        mib = (linear * bytes_per_weight(kind) + 2 * row["vocab"] * row["hidden"]) / 2**20
        assert mib < row["vram_mib"] < 1.06 * mib


def test_transformers_is_no_engine_to_compare_with(published):
    qwen = [r for r in published if r["source"] == "Qwen2.5 documentation"]
    rates = {
        use: {r["model"]: r["tg_tps"] for r in qwen if r["use"] == use}
        for use in ("fit", "transformers")
    }
    ratios = [rate / rates["transformers"][model] for model, rate in rates["fit"].items()]
    assert 2.8 < min(ratios) < max(ratios) < 5.1  # what the module says of it


def test_stored_constants_are_those_of_the_fit(fit_gptq_speed, fresh):
    assert fit_gptq_speed.toml_text(fit_gptq_speed.ABOUT, fresh[0]) == data.read_text(
        "gptq_speed.toml"
    )


def test_stored_lines_are_those_of_the_fit(fresh, published):
    text = (BENCHMARKS / "results" / "gptq_speed.jsonl").read_text()
    stored = [json.loads(x) for x in text.splitlines()]
    assert len(stored) == sum(row["tg_tps"] is not None for row in published)
    for mine, kept in zip(fresh[1], stored, strict=True):
        assert mine.keys() == kept.keys()
        assert mine["predicted"] == pytest.approx(kept["predicted"], rel=1e-3)


def test_exllamav2_has_no_constant_of_its_own_and_is_predicted(fit_gptq_speed, fresh):
    tables, lines = fresh
    assert tables["exllamav2.terms"] == {}
    own = [x for x in lines if x["kernel"] == "exllamav2" and x["use"] == "fit"]
    found = fit_gptq_speed.summary(own)
    assert found["mean_absolute_error"] <= 0.06
    assert found["coverage"] >= 0.75
    assert (found["sources"], found["cards"]) == (4, 3)


def test_marlin_is_predicted_where_it_was_never_fitted(fit_gptq_speed, fresh):
    tables, lines = fresh
    assert set(tables["marlin.terms"]) == {"layer.marlin"}
    assert tables["marlin.terms"]["layer.marlin"] > 0
    own = [x for x in lines if x["kernel"] == "marlin"]
    held, checks = ([x for x in own if x["use"] == use] for use in ("fit", "check"))
    assert fit_gptq_speed.summary(held)["mean_absolute_error"] <= 0.10
    assert fit_gptq_speed.summary([*held, *checks])["coverage"] >= 0.75
    assert all(abs(x["predicted"] / x["measured"] - 1) < 0.1 for x in checks)


def test_predict_says_what_the_script_says(fit_gptq_speed, fresh, published):
    row = next(r for r in published if r["device_id"] == "rtx-4090" and r["kernel"] == "exllamav2")
    line = next(x for x in fresh[1] if x["measured"] == row["tg_tps"])
    depth = row["context_depth"] + row["n_gen"] / 2
    speed = predict(device("rtx-4090"), fit_gptq_speed.work_of(row), depth=depth)
    ends = speed.tg_tokens_per_s_low, speed.tg_tokens_per_s_high
    assert speed.tg_tokens_per_s == pytest.approx(line["predicted"], rel=1e-3)
    assert ends == pytest.approx((line["low"], line["high"]), rel=1e-3)


@pytest.fixture(scope="module")
def planted(fit_gptq_speed, published):
    """Rows of Marlin whose rates are those of a layer cost 2.5 times llama.cpp's."""
    devices = {d.id: d for d in load_devices()}
    rows = fit_gptq_speed.Rows(
        [r for r in published if r["kernel"] == "marlin" and r["use"] == "fit"], devices
    )
    rows.logs = rows.logs - rows.errors(("layer.marlin",), np.array([math.log(2.5)]))
    return rows


def test_a_planted_deviation_is_found(planted):
    found = planted.fit(("layer.marlin",), planted.fitted)
    assert found == pytest.approx(math.log(2.5), abs=0.02)
    assert np.abs(planted.held_out(("layer.marlin",))).max() < 0.03


def test_the_smallest_set_that_explains_is_chosen(fit_gptq_speed, planted):
    names, tried = fit_gptq_speed.choose(planted, "marlin")
    assert names == ("layer.marlin",)
    assert tried["layer"] < 0.02 < tried["none"]


def test_fewer_sources_widen_the_interval(fit_gptq_speed, planted):
    errors = np.full(len(planted.rows), 0.1)
    two = fit_gptq_speed.interval(errors, planted, 0)
    fitted = fit_gptq_speed.interval(errors, planted, 1)
    assert two["sources"] == 2
    # Student's t at 90 %: 1.886 with two degrees of freedom, 3.078 with one (any table of t).
    assert two["half_width"] == pytest.approx(0.1 * 1.886)
    assert fitted["half_width"] == pytest.approx(0.1 * 3.078 * math.sqrt(1.5))
