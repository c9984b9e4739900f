"""Predictions of speed: the fitted constants in the roofline formulas, with intervals.

The constants are in `data/speed.toml`, fitted by `benchmarks/fit_speed.py`. GPTQ weights (type
names such as ``GPTQ4_128``) run on other kernels, see `dus_edge.predict.speed.gptq`; of them only
generation on CUDA is predicted.
"""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dus_edge import data
from dus_edge.errors import UsageError
from dus_edge.predict.speed import gptq
from dus_edge.predict.speed.device import DeviceSpeed
from dus_edge.predict.speed.roofline import (
    ERAS,
    MIXED_ERA,
    UBATCH,
    Case,
    Terms,
    features,
    pp_seconds,
    tg_seconds,
)
from dus_edge.predict.speed.work import Work

#: Scale of the error of a compute rate guessed from the number of cores.
_ESTIMATED_SCALE = 0.2
#: 90 % quantile of a normal distribution of scale 1.
_Q90 = 1.2816


@dataclass(frozen=True, slots=True)
class PredictedSpeed:
    """Tokens per second, each with the ends of its 80 % interval.

    Attributes:
        pp_tokens_per_s, …: None where only generation is predicted.
        engine: whose speed it is; another one's may be several times less.
    """

    tg_tokens_per_s: float
    tg_tokens_per_s_low: float
    tg_tokens_per_s_high: float
    pp_tokens_per_s: float | None = None
    pp_tokens_per_s_low: float | None = None
    pp_tokens_per_s_high: float | None = None
    engine: str = "llama.cpp"


@dataclass(frozen=True, slots=True)
class Spread:
    """How far measurements lie from predictions, from devices that were left out of the fit.

    One for all families: those with few devices say too little of their own.

    Attributes:
        low, high: 10 % and 90 % quantiles of log(measured / predicted).
        families: of the devices that were left out; one never seen has √2 of the distances.
    """

    low: float
    high: float
    families: tuple[str, ...]

    def ends(self, rate: float, family: str, extra: float = 0.0) -> tuple[float, float]:
        """The 80 % interval around a rate; `extra` is a further scale of its own."""
        wider = 1.0 if family in self.families else math.sqrt(2)
        # What is measured on average must not push a prediction out of its interval.
        low, high = min(self.low * wider, 0.0), max(self.high * wider, 0.0)
        down, up = (math.hypot(x, _Q90 * extra) for x in (low, high))
        return rate * math.exp(-down), rate * math.exp(up)


@dataclass(frozen=True, slots=True)
class Fitted:
    """Constants of one of the two formulas."""

    terms: Terms
    theta: np.ndarray
    spread: Spread


@dataclass(frozen=True, slots=True)
class Offload:
    """What layers outside the device's memory cost.

    Attributes:
        host_gbps: rate at which the CPU reads weights and cache when it generates.
        bus_gbps: rate at which weights reach the device for every ubatch of a prompt.
        scale: of log(measured / predicted), beside that of the device.
    """

    host_gbps: float
    bus_gbps: float
    scale: float


@functools.cache
def unpublished_scales() -> tuple[float, float]:
    """Scales of log(measured / predicted), tg and pp, of a type of which no run was fitted."""
    table = _table()["unpublished"]
    return table["tg_scale"], table["pp_scale"]


@functools.cache
def _table() -> Mapping[str, Any]:
    return tomllib.loads(data.read_text("speed.toml"))


@functools.cache
def constants() -> tuple[Fitted, Fitted, Offload]:
    """The fitted constants for tg and pp, and those of partly offloaded models."""
    table = _table()
    tg, pp = (
        Fitted(
            Terms(tuple(table[k]["terms"])),
            np.array(list(table[k]["terms"].values())),
            _spread(table[k]["spread"]),
        )
        for k in ("tg", "pp")
    )
    return tg, pp, Offload(**table["offload"])


def _spread(table: Mapping[str, Any]) -> Spread:
    return Spread(table["low"], table["high"], tuple(table["families"]))


def predict(
    device: DeviceSpeed,
    work: Work,
    *,
    depth: float = 0,
    n_prompt: int = 512,
    era: str = ERAS[-1],
    flash_attn: bool = False,
    offloaded_layers: int | None = None,
    host_gbps: float | None = None,
    kernel: str | None = None,
) -> PredictedSpeed:
    """Speed of a model on a device; of a GPTQ model only that of generation.

    Args:
        device: see `device_speed`.
        work: see `work_of`.
        depth: tokens in the KV cache before the prompt or the token.
        n_prompt: tokens of the prompt, as in ``pp512``.
        era: of the llama.cpp build, one of `ERAS`.
        flash_attn: llama.cpp's ``-fa``. No published run on Metal states it; it is given the
            change that CUDA shows, so take care at large depths.
        offloaded_layers: layers on the device (llama.cpp's ``-ngl``, where the output matrix counts
            as one more); none: all. The others run on the CPU, and for a prompt their weights
            cross the bus. Those two rates come from few runs and depend on the host.
        host_gbps: rate at which the CPU reads weights; None: that of the published run.
        kernel: that runs a GPTQ model, one of `dus_edge.predict.speed.gptq.KERNELS`; none: the
            first, ExLlamaV2. `era` and `flash_attn` are llama.cpp's and change nothing of it.

    Raises:
        UsageError: a number is out of its range, the era or the kernel unknown, or nothing is
            published of a GPTQ model like this.
    """
    if era not in (*ERAS, MIXED_ERA):
        raise UsageError(f"There is no era {era!r}; it is one of {', '.join(ERAS)}.")
    if not (math.isfinite(depth) and depth >= 0):
        raise UsageError(f"The depth is a number of tokens, 0 or more, not {depth}.")
    if n_prompt < 1:
        raise UsageError(f"A prompt has 1 token or more, not {n_prompt}.")
    outside = 0.0
    if offloaded_layers is not None:
        if offloaded_layers < 0:
            raise UsageError(f"Offloaded layers are 0 or more, not {offloaded_layers}.")
        n_parts = work.shape.n_layers + 1
        outside = 1 - min(offloaded_layers, n_parts) / n_parts
    if any(map(gptq.is_gptq, work.weights)):
        return _predict_gptq(device, work, depth, outside, kernel or gptq.KERNELS[0])
    if kernel is not None:
        raise UsageError(f"Kernel {kernel!r} is for GPTQ models, and this is none.")
    tg, pp, offload = constants()
    case = Case(device, work, era, flash_attn, depth, n_prompt)
    tg_s = float(tg_seconds(tg.theta, features([case], tg.terms, "tg"))[0])
    pp_s = float(pp_seconds(pp.theta, features([case], pp.terms, "pp"))[0])
    tg_extra, pp_extra = (work.unpublished_share * scale for scale in unpublished_scales())
    if outside:
        moved = outside * (work.weight_bytes + depth * work.kv_bytes_per_token)
        # The CPU has no more bandwidth than the memory it shares with the device.
        host = host_gbps or offload.host_gbps
        if device.backend == "metal":
            host = min(host, device.bandwidth_gbps)
        tg_s = (1 - outside) * tg_s + max(moved / (host * 1e9), outside * tg_s)
        if device.backend != "metal":
            ubatches = math.ceil(n_prompt / UBATCH)
            pp_s += ubatches * outside * work.weight_bytes / (offload.bus_gbps * 1e9)
        tg_extra, pp_extra = (math.hypot(x, offload.scale) for x in (tg_extra, pp_extra))
    if device.estimated:
        pp_extra = math.hypot(pp_extra, _ESTIMATED_SCALE)
    tg_rate, pp_rate = 1 / tg_s, n_prompt / pp_s
    return PredictedSpeed(
        tg_rate,
        *tg.spread.ends(tg_rate, device.family, tg_extra),
        pp_rate,
        *pp.spread.ends(pp_rate, device.family, pp_extra),
    )


def _predict_gptq(
    device: DeviceSpeed, work: Work, depth: float, outside: float, kernel: str
) -> PredictedSpeed:
    """Generation of a GPTQ model, whose interval is never narrower than llama.cpp's."""
    if kernel not in gptq.KERNELS:
        raise UsageError(
            f"Nothing is known of GPTQ kernel {kernel!r}; it is one of {', '.join(gptq.KERNELS)}."
        )
    if device.backend != "cuda":
        raise UsageError(f"No run of a GPTQ model on {device.backend.capitalize()} is published.")
    if outside:
        raise UsageError(
            "ExLlamaV2 and Marlin run a GPTQ model only if all of it is on the device."
        )
    for name in filter(gptq.is_gptq, work.weights):
        if gptq.code_bits(name) not in gptq.PREDICTED_BITS:
            raise UsageError(f"No run of a GPTQ model of {gptq.code_bits(name)} bits is published.")
    tg, own = constants()[0], gptq.kernel_speeds()[kernel]
    terms = Terms((*tg.terms.names, *own.terms))
    theta = np.array([*tg.theta, *own.terms.values()])
    # Both engines have flash attention; older eras of llama.cpp are 17 to 21 % off.
    case = Case(device, work, ERAS[-1], flash_attn=True, depth=depth, kernel=kernel)
    rate = 1 / float(tg_seconds(theta, features([case], terms, "tg"))[0])
    low, high = tg.spread.ends(rate, device.family)
    spread = math.exp(own.half_width)
    return PredictedSpeed(
        rate, min(low, rate / spread), max(high, rate * spread), engine=gptq.ENGINES[kernel]
    )
