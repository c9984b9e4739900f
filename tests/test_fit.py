"""Cases reckoned by hand, in MiB, and what the answers must keep to."""

from __future__ import annotations

import pytest

from dus_edge.checkpoint.config import parse_config
from dus_edge.predict import fit
from dus_edge.predict.devices import find_device
from dus_edge.predict.memory.llama import memory_use, usable_bytes
from dus_edge.predict.stored_model import MIB, RunSettings
from dus_edge.tables.predicted import solar_config

SOLAR = fit.models_of_presets(solar_config(), "SOLAR")
# What all cases share, at 4,096 tokens and ubatch 512, flash attention on:
#   cache    48 layers x 4,096 x (1,024 + 1,024) x 2 B                       =  768 MiB
#   compute  3 x 512 x 14,336 x 4 B (gate, up, product) = 84; 3 x 512 x 4,096 x 4 B = 24
#            (residual, norm, input); mask 512 x 4,096 x 2 B = 4                =  112 MiB
#   CUDA's share 38.33 + 1.853 for 1,024 resident threads + 45.1 MiB (RTX 4060: 24 multiprocessors
#            of 1,536: 150.1; RTX 3060: 28: 161.3; RTX 4090: 128: 439.2), Metal's none
# The embedding stays on the host: 32,000 x 4,096 weights.


def judge(preset, device, **kwargs):
    settings = RunSettings(flash_attn=kwargs.pop("flash_attn", True))
    return fit.judge(SOLAR[preset], find_device(device), settings, **kwargs)


def test_q4_k_m_on_an_8_gb_card_on_windows():
    # Q4_K_M: 6,460,923,904 B = 6,161.6 MiB, less the embedding 131,072,000 x 4.5 bit = 70.3:
    # 6,091.3 + 768 + 112 + 150.1 = 7,121.4. Usable: 8,192 - 1,009 = 7,183. It fits, by 62 MiB.
    v = judge("q4_k_m", "rtx-4060")
    assert v.use.total_bytes / MIB == pytest.approx(7121.4, abs=0.2)
    assert v.usable_bytes / MIB == 7183
    assert v.fits
    assert v.offloaded_layers == 49


def test_q4_k_m_on_an_8_gb_card_without_flash_attention():
    # The scores of 32 heads: 512 x 4,096 x 32 x 4 B = 256 MiB; the mask in f32 8; the indices of
    # V's rows 512 x 1,024 x 8 B = 4; four of 8: 300. 6,091.3 + 768 + 300 + 150 = 7,309 > 7,183.
    v = judge("q4_k_m", "rtx-4060", flash_attn=False)
    assert v.use.compute_buffer_bytes / MIB == pytest.approx(300, abs=0.1)
    assert not v.fits
    assert 45 <= v.offloaded_layers < 49


@pytest.mark.parametrize(
    ("platform", "usable"),
    # 8,192 x 2/3 = 5,461.3; 8,192 x 0.74 = 6,062.1
    [("macos15", 5461.3), ("macos26", 6062.1)],
)
def test_q4_k_m_on_an_8_gb_mac(platform, usable):
    # 6,091.3 + 768 + 112 = 6,971.3: more than either. The weights alone are more, so no context
    # fits at all. What guides say, that it runs on an M1 of 8 GB, holds for a part of the layers.
    v = judge("q4_k_m", "m1-8c", platform=platform, memory_gb=8)
    assert v.usable_bytes / MIB == pytest.approx(usable, abs=0.1)
    assert v.use.total_bytes / MIB == pytest.approx(6971.3, abs=0.2)
    assert not v.fits
    assert v.longest_context is None
    assert 0 < v.offloaded_layers < 49


@pytest.mark.parametrize(
    ("platform", "fits"),
    # 16,384 x 2/3 = 10,922.7; 12,713.12 x 10^6 B = 12,124.2 was read under macOS 26
    [("macos15", False), ("macos26", True)],
)
def test_q8_0_on_a_16_gb_mac(platform, fits):
    # Q8_0: 11,403,411,456 B = 10,875.1, less the embedding at 8.5 bit = 132.8: 10,742.3 + 768 + 112
    # = 11,622.3: it fits under the new rule, not under the old one.
    v = judge("q8_0", "m1-8c", platform=platform, memory_gb=16)
    assert v.use.total_bytes / MIB == pytest.approx(11622.3, abs=0.2)
    assert v.fits is fits


def test_q4_k_m_on_a_16_gb_mac_under_both_rules():
    # 6,971.3 is less than 10,922.7 and 12,124.2.
    assert judge("q4_k_m", "m1-8c", platform="macos15", memory_gb=16).fits
    assert judge("q4_k_m", "m1-8c", platform="macos26", memory_gb=16).fits


def test_f16_on_24_gb():
    # F16: 21,463,842,816 B = 20,469.5, less the embedding 250: 20,219.5 + 768 + 112 + 439.2 =
    # 21,538.7. Usable: 24,564 - 1,009 = 23,555.
    v = judge("f16", "rtx-4090", platform="windows")
    assert v.use.total_bytes / MIB == pytest.approx(21538.7, abs=0.2)
    assert v.fits


def test_q8_0_on_a_12_gb_card():
    # 10,742.3 + 768 + 112 + 161.3 = 11,783.6. Usable 12,287 - 1,009 = 11,278: 506 too much. A layer
    # has 218,112,000 weights at 8.5 bit = 221 MiB, and 16 of cache: three layers are left out.
    # With a shorter context: 11,278 - 10,742.3 - 161.3 - 108 = 266 MiB at 0.1895 per token: 1,280.
    v = judge("q8_0", "rtx-3060-12gb", platform="windows")
    assert not v.fits
    assert v.offloaded_layers == 49 - 3
    assert v.longest_context == 1280


def test_the_best_preset_of_a_12_gb_card():
    # Of 11,278: Q8_0 11,784 is too much; Q6_K 8,804,466,688 B = 8,396.6, less 102.5: 8,294.1 +
    # 1,041 = 9,335 fits.
    usable = usable_bytes(find_device("rtx-3060-12gb"), "windows")
    assert fit.best_preset(SOLAR, RunSettings(), usable) == "q6_k"
    assert fit.best_preset(SOLAR, RunSettings(), 100 * MIB) is None


def test_a_model_that_fits_nowhere():
    # 480 layers of 16,384: 480 x (2 x 268 M + 2 x 34 M + 3 x 872 M) = 1.5 T weights, 2 B each:
    # 2,852 GiB, and the largest Mac has 512.
    config = dict(solar_config().raw) | {
        "num_hidden_layers": 480,
        "hidden_size": 16384,
        "num_attention_heads": 128,
        "intermediate_size": 53248,
    }
    model = fit.models_of_presets(parse_config(config))["f16"]
    assert model.weights_bytes / 2**30 == pytest.approx(2852, abs=1)
    assert fit.devices_that_run(model, RunSettings()) == []


def test_which_devices_run_q4_k_m():
    # 7,121 MiB: an RTX 4060 (7,183 usable) does, cards of 6 GB do not, nor Macs of 8 GB.
    run = {(v.device.id, v.memory_gb) for v in fit.devices_that_run(SOLAR["q4_k_m"], RunSettings())}
    assert {("rtx-4060", 8), ("rtx-3060-12gb", 12), ("m1-8c", 16)} <= run
    assert not {("rtx-3050-6gb", 6), ("m1-8c", 8), ("rtx-3050-laptop", 4)} & run


@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("device", ["rtx-3050-laptop", "rtx-3050-6gb", "rtx-3060-12gb"])
def test_one_more_would_not_fit(device, flash_attn):
    """Layers and context are the largest that fit: one step more is too much."""
    model, card = SOLAR["q8_0"], find_device(device)
    settings = RunSettings(flash_attn=flash_attn)
    usable = usable_bytes(card)

    def total(**fields):
        return memory_use(model, RunSettings(flash_attn=flash_attn, **fields)).total_bytes

    n = fit.layers_that_fit(model, settings, usable)
    assert total(n_gpu_layers=n) <= usable < total(n_gpu_layers=n + 1)
    context = fit.longest_context(model, settings, usable) or 0
    assert context == 0 or total(context=context) <= usable
    assert usable < total(context=context + fit.CONTEXT_STEP)


def test_a_context_beyond_the_model():
    """Judged and warned of, as llama.cpp does."""
    v = fit.judge(SOLAR["q4_0"], find_device("rtx-4090"), RunSettings(context=8192))
    assert v.fits and v.longest_context == 8192
    assert v.use.kv_cache_bytes == 2 * 48 * 4096 * 1024 * 2 * 2
    assert v.context_warning.startswith("SOLAR was made for 4,096 tokens")
    assert judge("q4_0", "rtx-4090").context_warning is None
