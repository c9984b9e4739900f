"""The stored form of GPTQ matrices, against AutoGPTQ's way of packing them, bit by bit."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dus_edge.errors import UsageError
from dus_edge.quant.gptq_format import (
    GPTQ_BITS,
    GPTQSettings,
    dequantized,
    pack,
    quantize_config,
    stored,
    tensor_specs,
    unpack,
)

from .draws import examples

each_bits = pytest.mark.parametrize("bits", GPTQ_BITS)


def words_of(codes: list[int], bits: int) -> list[int]:
    """One column of codes as AutoGPTQ packs it: a little-endian stream of bits."""
    stream = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    words = [stream >> (32 * i) & 0xFFFFFFFF for i in range(len(codes) * bits // 32)]
    return [w - 2**32 if w >= 2**31 else w for w in words]


def autogptq_3bit(q: list[int]) -> list[int]:
    """The three words that `QuantLinear.pack` of AutoGPTQ makes of 32 codes of 3 bits."""
    first = [q[i] << 3 * i for i in range(10)] + [q[10] << 30]
    second = [q[10] >> 2] + [q[11 + i] << 3 * i + 1 for i in range(10)] + [q[21] << 31]
    third = [q[21] >> 1] + [q[22 + i] << 3 * i + 2 for i in range(10)]
    return [sum(parts) & 0xFFFFFFFF for parts in (first, second, third)]


@given(
    st.sampled_from(GPTQ_BITS),
    st.sampled_from((0, 1)),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(0, 2**32 - 1),
)
@examples(60)
def test_packing_is_a_stream_of_bits(bits, axis, units, width, seed):
    shape = (32 * units, width) if axis == 0 else (width, 32 * units)
    codes = np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.uint8)
    packed = pack(codes, bits, axis)
    assert packed.dtype == np.int32
    assert packed.flags.c_contiguous
    for k in range(width):
        assert packed.take(k, 1 - axis).tolist() == words_of(codes.take(k, 1 - axis), bits)
    np.testing.assert_array_equal(unpack(packed, bits, axis), codes)


def test_three_bits_cross_words_as_in_autogptq():
    codes = np.random.default_rng(0).integers(0, 8, (32, 7)).astype(np.uint8)
    packed = pack(codes, 3, 0).view(np.uint32)
    for k in range(7):
        assert packed[:, k].tolist() == autogptq_3bit([int(c) for c in codes[:, k]])


def random_codes(bits: int, n_out: int, n_in: int, width: int, seed: int) -> SimpleNamespace:
    rng = np.random.default_rng(seed)
    n_groups = n_in // width
    return SimpleNamespace(
        codes=rng.integers(0, 2**bits, (n_out, n_in)).astype(np.uint8),
        scales=(rng.standard_normal((n_groups, n_out)) * 0.01).astype(np.float16),
        zeros=rng.integers(1, 2**bits, (n_groups, n_out)).astype(np.int32),
        g_idx=rng.permutation(np.arange(n_in) // width).astype(np.int32),
    )


@given(
    st.sampled_from(GPTQ_BITS),
    st.sampled_from((32, 64, -1)),
    st.sampled_from((32, 96)),
    st.integers(0, 2**32 - 1),
)
@examples(40)
def test_stored_tensors_mean_the_weights(bits, group_size, n_out, seed):
    chosen = GPTQSettings(bits=bits, group_size=group_size, sym=False)
    n_in = 192
    made = random_codes(bits, n_out, n_in, chosen.group_width(n_in), seed)
    tensors = stored(made, chosen)
    specs = tensor_specs((n_out, n_in), chosen)
    assert {k: (v.dtype.name, v.shape) for k, v in tensors.items()} == specs
    assert all(v.flags.c_contiguous for v in tensors.values())
    weights = dequantized(
        tensors["qweight"], tensors["qzeros"], tensors["scales"], tensors["g_idx"], bits
    )
    assert weights.dtype == np.float32
    for o in range(0, n_out, 7):
        for i in range(0, n_in, 11):
            g = made.g_idx[i]
            step = int(made.codes[o, i]) - int(made.zeros[g, o])
            assert weights[o, i] == np.float32(made.scales[g, o]) * np.float32(step)


@each_bits
def test_symmetric_zero_points_are_the_known_words(bits):
    """A zero point of 8 is stored as a nibble of 7, as every 4-bit reader expects."""
    made = random_codes(bits, 32, 64, 32, 0)
    made.zeros[:] = 2 ** (bits - 1)
    words = stored(made, GPTQSettings(bits=bits, group_size=32))["qzeros"].view(np.uint32)
    known = {2: [0x55555555] * 2, 3: [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D], 4: [0x77777777] * 4}
    assert words[0].tolist() == known.get(bits, [0x7F7F7F7F] * 8)


@each_bits
@pytest.mark.parametrize("zero", ["0", "2^bits"])
def test_zero_points_that_would_carry_are_refused(bits, zero):
    made = random_codes(bits, 32, 64, 32, 0)
    made.zeros[1, 5] = 0 if zero == "0" else 2**bits
    with pytest.raises(ValueError, match="zero points must lie in 1"):
        stored(made, GPTQSettings(bits=bits, group_size=32, sym=False))


def test_config_has_what_all_loaders_take():
    config = quantize_config(GPTQSettings(bits=3, group_size=64, desc_act=True, damp=0.02))
    assert config == {
        "bits": 3,
        "group_size": 64,
        "desc_act": True,
        "sym": True,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "damp_percent": 0.02,
        "static_groups": False,
        "true_sequential": True,
    }


def test_config_of_asymmetric_codes_names_a_writer_that_keeps_zero_points_above_0():
    """GPTQModel refuses ``sym: false`` in version 1 unless ``gptqmodel`` ≥ 0.9 is among these."""
    config = quantize_config(GPTQSettings(sym=False))
    assert config["sym"] is False
    writers = dict(w.split(":") for w in config["meta"]["quantizer"])
    assert writers["gptqmodel"] >= "0.9"
    assert "is_marlin_format" not in config


@pytest.mark.parametrize(
    ("change", "shape", "message"),
    [
        ({"bits": 5}, (64, 128), "no 5-bit codes; choose one of 2, 3, 4 or 8"),
        ({"group_size": 100}, (64, 128), "group size 100 is not known"),
        ({"group_size": 0}, (64, 128), "group size 0 is not known"),
        ({"damp": 0.0}, (64, 128), "damping 0.0"),
        ({"block": 48}, (64, 128), "multiple of 32"),
        ({"candidates": 0}, (64, 128), "at least one candidate"),
        ({}, (64, 320), "m.weight: groups of 128 do not divide its 320 inputs; .*32, 64 or -1"),
        ({"group_size": -1}, (64, 100), "m.weight: GPTQ packs 32 codes at a time"),
        ({}, (40, 128), "m.weight: GPTQ packs 32 codes at a time and cannot store 40 × 128"),
        ({}, (128,), "m.weight: GPTQ quantizes matrices"),
    ],
)
def test_what_cannot_be_stored_is_refused(change, shape, message):
    with pytest.raises(UsageError, match=message):
        replace(GPTQSettings(), **change).check("m.weight", shape)


@each_bits
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_what_can_be_stored_is_not_refused(bits, group_size):
    GPTQSettings(bits=bits, group_size=group_size).check("m.weight", (96, 256))
