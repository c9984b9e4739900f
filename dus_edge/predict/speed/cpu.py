"""Speed on a processor alone, its memory in two channels: two rules from few published rows.

A token reads all weights and the cache once, at a share of the memory's nominal rate; a prompt is
arithmetic of the cores:

    t = (weight bytes + depth·kv bytes) / (BW·η)
    t = (2·n·weights + 4·layers·heads·head_dim·n·(depth + n/2)) / (cores·γ)

η by desktop and laptop, γ by instruction set, in `data/cpu_speed.toml`, from
`benchmarks/published/cpu.json` by `benchmarks/fit_cpu_speed.py`. Threads are one a core; clock and
power limits are inside the interval.
"""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass

from dus_edge import data
from dus_edge.errors import UsageError
from dus_edge.predict.devices import Device
from dus_edge.predict.speed.predict import PredictedSpeed
from dus_edge.predict.speed.work import Work, bytes_per_weight

#: Instruction sets whose rate is known.
SIMD = ("avx2", "avx512")
#: How much longer a core takes for a type's weights than for as many bytes of another type, if
#: arithmetic and not memory holds it up. llama.cpp, best of 5 turns, one core of an AMD EPYC with
#: AVX-512: IQ3_S at 3.1 GB/s beside Q3_K at 6.4; on a newer one IQ2_S at 5.2 and IQ2_XS at 4.7 GB/s
#: beside Q2_K at 11.3.
_SLOWER = {"IQ3_S": 2.07, "IQ2_S": 2.15, "IQ2_XS": 2.39}


@dataclass(frozen=True, slots=True)
class CpuRates:
    """What the rules take from published runs.

    Attributes:
        efficiency: share of the memory's nominal rate, by market.
        core_gflops: rate of a core in a prompt, 10⁹ operations a second, by instruction set.
        tg_half_width, pp_half_width: of the 80 % interval of log(measured / predicted).
    """

    efficiency: Mapping[str, float]
    core_gflops: Mapping[str, float]
    tg_half_width: float
    pp_half_width: float


@functools.cache
def cpu_rates() -> CpuRates:
    """The fitted rates."""
    table = tomllib.loads(data.read_text("cpu_speed.toml"))
    interval = table["interval"]
    return CpuRates(table["efficiency"], table["core_gflops"], interval["tg"], interval["pp"])


def token_seconds(work: Work, bandwidth_gbps: float, efficiency: float, depth: float = 0) -> float:
    """Seconds of one generated token with so many in the cache."""
    read = work.weight_bytes + depth * work.kv_bytes_per_token
    return read / (bandwidth_gbps * 1e9 * efficiency)


def slowest(work: Work) -> float:
    """Times as long as `token_seconds` that a token's weights take where cores are slow (1…)."""
    times = sum(n * bytes_per_weight(t) * _SLOWER.get(t, 1) for t, n in work.weights.items())
    return times / work.weight_bytes


def host_gbps(device: Device) -> float:
    """Rate at which a processor reads weights, GB/s, for layers that are left to it."""
    return (device.bandwidth_gbps or 0.0) * cpu_rates().efficiency[_market(device)]


def prompt_operations(work: Work, n_prompt: int, depth: float = 0) -> float:
    """Operations of a prompt behind so many tokens."""
    attention = 4 * work.shape.n_layers * work.shape.q_width * n_prompt * (depth + n_prompt / 2)
    return 2 * n_prompt * work.n_weights + attention


def predict_cpu(
    device: Device, work: Work, *, depth: float = 0, n_prompt: int = 512
) -> PredictedSpeed:
    """Speed of a model that llama.cpp runs on a processor; without cores only generation.

    Raises:
        UsageError: the rate of its memory is unknown.
    """
    if not device.bandwidth_gbps:
        raise UsageError(
            f"The memory bandwidth of {device.id} is unknown, and its speed follows from it; name "
            "the memory, as in --device cpu-ddr4-3200, or measure with `dus-edge bench run`."
        )
    rates = cpu_rates()
    efficiency = rates.efficiency[_market(device)]
    tg = 1 / token_seconds(work, device.bandwidth_gbps, efficiency, depth)
    spread = math.exp(rates.tg_half_width)
    low = tg / (spread * slowest(work))
    if device.cpu_cores is None:
        return PredictedSpeed(tg, low, tg * spread)
    rate = device.cpu_cores * rates.core_gflops[device.simd or SIMD[0]] * 1e9
    pp = n_prompt * rate / prompt_operations(work, n_prompt, depth)
    wide = math.exp(rates.pp_half_width)
    return PredictedSpeed(tg, low, tg * spread, pp, pp / wide, pp * wide)


def _market(device: Device) -> str:
    return "laptop" if device.family.endswith("laptop") else "desktop"
