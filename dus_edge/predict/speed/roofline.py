"""How fast a model generates and reads its prompt on a device, predicted with an interval.

Roofline models in seconds (Williams, Waterman, Patterson, CACM 52(4), 2009). A generated token
reads every weight but those of the embedding table, and the KV cache, once:

    t = Σ bytes_g / (BW·η_g)                                    weights, by group g of types
        + depth·(kv_bytes_per_token / (BW·κ) + layers·λ)        attention
        + layers·σ + τ                                          kernel launches, sampling

and a prompt of n tokens is processed in ubatches of 512:

    t = 2·n·Σ weights_g / (PEAK·μ_g)                            matrix products
        + 4·layers·heads·head_dim·n·(depth + n/2)·α / PEAK      attention
        + ubatches·(Σ bytes_g·ρ / BW + layers·σ + τ)            weights read, kernel launches

BW is the memory bandwidth; PEAK the rate of dense matrix products: tensor cores with FP16
accumulation on CUDA (INT8, which kernels for quantized weights use, is twice that on every card,
so one figure serves), the shader rate on Metal, four times that with the matrix units of M5.
η, κ, μ are logistic functions and α, λ, ρ, σ, τ exponentials of sums of named terms in
`data/speed.toml`: a base by backend and deviations by type group, architecture, era, memory and
flash attention, none by device. `benchmarks/fit_speed.py` fits them to published llama.cpp
measurements, `data/published_runs.json`, and cross-validates.

GPTQ weights (type names such as ``GPTQ4_128``) run on other kernels, see
`dus_edge.predict.speed.gptq`; of them only generation on CUDA is predicted.
"""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dus_edge import data
from dus_edge.errors import UsageError
from dus_edge.predict.devices import Device
from dus_edge.predict.speed import gptq
from dus_edge.quant import types
from dus_edge.quant.recipe import ModelShape, Preset, tensor_type

#: Build eras of llama.cpp, and of published tables that mix them.
ERAS = ("2023", "2024", "2025+")
MIXED_ERA = "mixed"
BACKENDS = ("cuda", "metal", "vulkan")
#: Tokens that llama.cpp processes at once (its `-ub`).
UBATCH = 512
#: Types whose kernels work alike.
GROUPS = ("f16", "q8", "q4", "k", "k_low")
_GROUP_OF = {
    "F32": "f16", "F16": "f16", "BF16": "f16", "Q8_0": "q8",
    "Q4_0": "q4", "Q4_1": "q4", "Q5_0": "q4", "Q5_1": "q4",
    "Q4_K": "k", "Q5_K": "k", "Q6_K": "k", "Q3_K": "k_low", "Q2_K": "k_low",
}  # fmt: skip
#: GPTQ weights by the bits of a code.
_GPTQ_GROUP_OF = {2: "k_low", 3: "k_low", 4: "q4", 8: "q8"}


def group(type_name: str) -> str:
    """The group of a tensor type.

    Raises:
        UsageError: no speed is known for it.
    """
    if gptq.is_gptq(type_name):
        return _GPTQ_GROUP_OF[gptq.code_bits(type_name)]
    if type_name not in _GROUP_OF:
        raise UsageError(f"No speed is known for tensors of type {type_name}.")
    return _GROUP_OF[type_name]


def bytes_per_weight(type_name: str) -> float:
    """Bytes that a weight of a tensor type takes, its share of scales included."""
    if gptq.is_gptq(type_name):
        return gptq.bits_per_weight(type_name) / 8
    return types.TYPES[type_name].bits_per_weight / 8


@dataclass(frozen=True, slots=True)
class DeviceSpeed:
    """The facts of a device that its speed follows from.

    Attributes:
        backend: ``cuda``, ``metal`` or ``vulkan``.
        architecture: lower case, e.g. ``ampere``, ``ada``, ``m3``.
        family: of `devices.toml`, e.g. ``nvidia-40-desktop``; the interval goes by it.
        bandwidth_gbps: memory bandwidth, decimal GB/s.
        matmul_tflops: dense matrix products: FP16 tensor cores with FP16 accumulation on CUDA,
            the shader rate or that of the matrix units on Metal.
        hbm: memory is stacked (A100, H100, H200): one chip cannot keep it busy with small kernels.
        estimated: the compute rates were estimated from the number of cores.
    """

    backend: str
    architecture: str
    family: str
    bandwidth_gbps: float
    matmul_tflops: float
    hbm: bool = False
    estimated: bool = False

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UsageError(
                f"There is no speed model for backend {self.backend!r}; "
                f"it is one of {', '.join(BACKENDS)}."
            )
        for name in ("bandwidth_gbps", "matmul_tflops"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} of the device must be positive, not {value}.")


def device_speed(device: Device, backend: str | None = None) -> DeviceSpeed:
    """What the speed of an entry of `data/devices.toml` follows from.

    Args:
        device: see `dus_edge.predict.devices.find_device`.
        backend: another one than the device's own, e.g. ``vulkan``.

    Raises:
        UsageError: its bandwidth, or everything on its compute, is unknown, or nothing is known of
            its backend.
    """
    if not device.bandwidth_gbps:
        raise UsageError(
            f"The memory bandwidth of {device.id} is unknown, and its speed follows from it; "
            "measure with `dus-edge bench run` instead."
        )
    kind = (backend or device.backend).lower()
    fp32 = device.fp32_tflops
    if not fp32 and not device.cuda_cores:
        raise UsageError(f"Neither fp32_tflops nor cuda_cores of {device.id} is known.")
    rate = fp32 or (device.cuda_cores or 0) * 2 * _CLOCK_GHZ / 1000
    if kind == "metal":
        matmul = rate * (_M5_MATRIX_UNITS if device.family == "apple-m5" else 1)
    else:
        matmul = device.fp16_tflops_dense_fp16acc or rate * _TENSOR_CORES
    return DeviceSpeed(
        backend=kind,
        architecture=_architecture(device),
        family=device.family,
        bandwidth_gbps=device.bandwidth_gbps,
        matmul_tflops=matmul,
        hbm=device.compute_capability in _HBM_CAPABILITIES,
        estimated=not fp32,
    )


#: For cards whose rates are not published: a usual boost clock, and the ratio of FP16 tensor cores
#: to shaders of GeForce cards (Ampere and Ada whitepapers).
_CLOCK_GHZ = 1.6
_TENSOR_CORES = 4
#: An assumption after Apple's announcement of M5; the three published M5 prompt rates fit it.
_M5_MATRIX_UNITS = 4
#: GA100 and GH100.
_HBM_CAPABILITIES = ("8.0", "9.0")


def _architecture(device: Device) -> str:
    if device.family.startswith("apple-"):
        return device.family.removeprefix("apple-")
    return device.architecture.lower().split(" ")[0]


@dataclass(frozen=True, slots=True)
class Work:
    """What one token costs a model, whatever the device.

    Attributes:
        n_layers, n_heads, head_dim, n_kv_heads: of attention.
        weights: type name (``Q4_K``, ``GPTQ4_128``, …) → weights that every token passes (active
            ones of a mixture of experts), without an embedding table that is only looked up.
        kv_bytes_per_value: 2 for f16, 34/32 for q8_0, 18/32 for q4_0.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    weights: Mapping[str, float]
    kv_bytes_per_value: float = 2.0

    def __post_init__(self) -> None:
        for name in ("n_layers", "n_heads", "n_kv_heads", "head_dim", "kv_bytes_per_value"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} of the model must be positive.")
        for name, n in self.weights.items():
            group(name)
            if not n >= 0:
                raise UsageError(f"The number of {name} weights must not be negative.")
        if not sum(self.weights.values()) > 0:
            raise UsageError("The model has no weights.")

    @property
    def weight_bytes(self) -> float:
        """Bytes of weights that one token reads."""
        return sum(n * bytes_per_weight(t) for t, n in self.weights.items())

    @property
    def n_weights(self) -> float:
        """Weights that one token passes."""
        return sum(self.weights.values())

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of KV cache of one position."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * self.kv_bytes_per_value


def dense_work(
    preset: Preset,
    *,
    n_layers: int,
    hidden: int,
    ffn: int,
    n_heads: int,
    n_kv_heads: int,
    vocab: int,
    head_dim: int | None = None,
    tied_head: bool = False,
    kv_bytes_per_value: float = 2.0,
) -> Work:
    """The work of a dense Llama-form model in a preset, tensor by tensor as llama.cpp mixes types.

    Raises:
        UsageError: a size is not positive.
    """
    sizes = {
        "n_layers": n_layers, "hidden": hidden, "ffn": ffn,
        "n_heads": n_heads, "n_kv_heads": n_kv_heads, "vocab": vocab,
    }  # fmt: skip
    for name, value in sizes.items():
        if value <= 0:
            raise UsageError(f"{name} of the model must be positive, not {value}.")
    head_dim = head_dim or hidden // n_heads
    shape = ModelShape(n_layers, n_heads, n_kv_heads, tied_head)
    q, kv = n_heads * head_dim, n_kv_heads * head_dim
    parts = {
        "attn_q": (q, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden),
        "attn_output": (hidden, q), "ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden),
        "ffn_down": (hidden, ffn),
    }  # fmt: skip
    tensors = {
        f"blk.{i}.{part}.weight": size for i in range(n_layers) for part, size in parts.items()
    }
    tensors["token_embd.weight" if tied_head else "output.weight"] = (vocab, hidden)
    weights: dict[str, float] = {}
    for name, size in tensors.items():
        kind = tensor_type(preset, name, size, shape).name
        weights[kind] = weights.get(kind, 0) + math.prod(size)
    return Work(n_layers, n_heads, n_kv_heads, head_dim, weights, kv_bytes_per_value)


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
class Case:
    """One device running one model in one way.

    Attributes:
        depth: tokens in the cache before, for generation their mean over the run.
        n_prompt: tokens of the prompt that is timed.
        kernel: of a GPTQ model, one of `dus_edge.predict.speed.gptq.KERNELS`; None is llama.cpp.
    """

    device: DeviceSpeed
    work: Work
    era: str = ERAS[-1]
    flash_attn: bool = False
    depth: float = 0.0
    n_prompt: int = 512
    kernel: str | None = None


Term = str | tuple[str, float]


class Terms:
    """Named constants that add up, as a matrix over cases."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._index = {name: i for i, name in enumerate(names)}

    def matrix(self, rows: Sequence[Sequence[Term]]) -> np.ndarray:
        """``(n_rows, n_names)``: how often a row has a term; deviations not known are zero."""
        out = np.zeros((len(rows), len(self.names)))
        for i, row in enumerate(rows):
            for term in row:
                name, value = (term, 1.0) if isinstance(term, str) else term
                if (j := self._index.get(name)) is not None:
                    out[i, j] = value
        return out


@dataclass(frozen=True, slots=True)
class Features:
    """Cases as arrays, so that one formula serves a prediction and a fit.

    Attributes:
        arrays: ``(n_cases,)`` or ``(n_cases, n_groups)`` figures of devices, models and runs.
        terms: part of the formula → ``(n_cases, n_terms)`` or ``(n_cases, n_groups, n_terms)``.
    """

    arrays: Mapping[str, np.ndarray]
    terms: Mapping[str, np.ndarray]


def tg_terms(case: Case) -> dict[str, list[list[Term]]]:
    """The terms that a case's generation adds up, by part; for weights one list a group."""
    d, era = case.device, case.era
    b, arch = d.backend, d.architecture
    eta: list[list[Term]] = []
    for g in GROUPS:
        names: list[Term] = [f"eta.{b}", f"eta.{b}.{g}", f"eta.{b}.{era}", f"eta.arch.{arch}"]
        if b == "metal":
            # The fewer cores, the sooner they wait for memory and not for their own arithmetic.
            names.append(("eta.metal.size", math.log(d.bandwidth_gbps / 200)))
        if d.hbm:
            names += ["eta.hbm", f"eta.hbm.{_coarse(g)}.{era}"]
        if case.kernel and g != "f16":
            names.append(f"eta.{case.kernel}")
        eta.append(names)
    fa, kernel = case.flash_attn, case.kernel
    own = {part: [f"{part}.{kernel}"] if kernel else [] for part in ("layer", "token")}
    return {
        "eta": eta,
        "kv": [[f"kv.{b}", *(["kv.fa"] if fa else [])]],
        "latency": [[f"latency.{b}", *(["latency.fa"] if fa else [])]],
        "layer": [[f"layer.{b}", f"layer.{b}.{era}", f"layer.arch.{arch}", *own["layer"]]],
        "token": [[f"token.{b}", *own["token"]]],
    }


def pp_terms(case: Case) -> dict[str, list[list[Term]]]:
    """The terms that a case's prompt adds up, by part; for matrix products one list a group."""
    d, era = case.device, case.era
    b = d.backend
    mm: list[list[Term]] = []
    for g in GROUPS:
        kind = _coarse(g)
        names: list[Term] = [f"mm.{b}", f"mm.{b}.{g}", f"mm.{b}.{kind}.{era}"]
        names += [f"mm.arch.{d.architecture}", f"mm.market.{_market(d)}"]
        if b == "cuda":
            # 512 tokens do not fill the largest chips, and none of them holds its boost clock.
            names.append(("mm.cuda.size", math.log(d.matmul_tflops / 100)))
        if d.hbm:
            names += ["mm.hbm", f"mm.hbm.{kind}.{era}"]
        mm.append(names)
    return {
        "mm": mm,
        "read": [[f"read.{b}"]],
        "attn": [[f"attn.{b}", f"attn.{b}.{era}", *(["attn.fa"] if case.flash_attn else [])]],
        "layer": [[f"layer.{b}", f"layer.{b}.{era}"]],
        "token": [[f"token.{b}"]],
    }


def _coarse(group: str) -> str:
    return "f16" if group == "f16" else "quantized"


def _market(device: DeviceSpeed) -> str:
    """Workstation and mobile chips run the same silicon at a fraction of the power."""
    for kind in ("laptop", "pro", "datacenter"):
        if device.family.endswith(kind):
            return kind
    return "desktop"


def features(cases: Sequence[Case], terms: Terms, which: str) -> Features:
    """Cases as arrays for `tg_seconds` (`which` is ``tg``) or `pp_seconds` (``pp``)."""
    named = [tg_terms(c) if which == "tg" else pp_terms(c) for c in cases]
    matrices = {}
    for part in named[0] if named else ():
        flat = [row for case in named for row in case[part]]
        width = len(flat) // len(cases)
        matrix = terms.matrix(flat).reshape(len(cases), width, len(terms.names))
        matrices[part] = matrix if width > 1 else matrix[:, 0]
    group_bytes = np.zeros((len(cases), len(GROUPS)))
    group_weights = np.zeros_like(group_bytes)
    for i, case in enumerate(cases):
        for name, n in case.work.weights.items():
            g = GROUPS.index(group(name))
            group_weights[i, g] += n
            group_bytes[i, g] += n * bytes_per_weight(name)
    column = {
        "bandwidth": [c.device.bandwidth_gbps * 1e9 for c in cases],
        "matmul": [c.device.matmul_tflops * 1e12 for c in cases],
        "layers": [c.work.n_layers for c in cases],
        "attention": [4 * c.work.n_layers * c.work.n_heads * c.work.head_dim for c in cases],
        "kv": [c.work.kv_bytes_per_token for c in cases],
        "depth": [c.depth for c in cases],
        "prompt": [c.n_prompt for c in cases],
    }
    arrays = {name: np.array(values, np.float64) for name, values in column.items()}
    return Features({**arrays, "bytes": group_bytes, "weights": group_weights}, matrices)


def tg_seconds(theta: np.ndarray, f: Features) -> np.ndarray:
    """``(n_cases,)`` seconds of one generated token; `theta` in the order of the terms."""
    a, x = f.arrays, {part: m @ theta for part, m in f.terms.items()}
    weights = (a["bytes"] / _logistic(x["eta"])).sum(1) / a["bandwidth"]
    cache = a["kv"] / (a["bandwidth"] * _logistic(x["kv"])) + a["layers"] * np.exp(x["latency"])
    fixed = a["layers"] * np.exp(x["layer"]) + np.exp(x["token"])
    return weights + a["depth"] * cache + fixed


def pp_seconds(theta: np.ndarray, f: Features) -> np.ndarray:
    """``(n_cases,)`` seconds of the whole prompt; `theta` in the order of the terms."""
    a, x = f.arrays, {part: m @ theta for part, m in f.terms.items()}
    n = a["prompt"]
    products = 2 * n * (a["weights"] / _logistic(x["mm"])).sum(1)
    attention = a["attention"] * n * (a["depth"] + n / 2) * np.exp(x["attn"])
    read = a["bytes"].sum(1) * np.exp(x["read"]) / a["bandwidth"]
    each = read + a["layers"] * np.exp(x["layer"]) + np.exp(x["token"])
    return (products + attention) / a["matmul"] + np.ceil(n / UBATCH) * each


def _logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@dataclass(frozen=True, slots=True)
class Spread:
    """How far measurements lie from predictions, from devices that were left out of the fit.

    Attributes:
        overall: scale of log(measured / predicted) over all families.
        families: the scale by family, drawn towards `overall` and widened where devices are few.
        low, high: 10 % and 90 % quantiles of log(measured / predicted) in units of the scale.
    """

    overall: float
    families: Mapping[str, float]
    low: float
    high: float

    def scale(self, family: str) -> float:
        """The scale of a family; one never seen has √2 of the overall one."""
        return self.families.get(family, self.overall * math.sqrt(2))

    def ends(self, rate: float, family: str, extra: float = 0.0) -> tuple[float, float]:
        """The 80 % interval around a rate; `extra` is a further scale of its own."""
        scale = math.hypot(self.scale(family), extra)
        # The measured bias of a family of devices must not push a prediction out of its interval.
        return rate * math.exp(min(self.low * scale, 0)), rate * math.exp(max(self.high * scale, 0))


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
def constants() -> tuple[Fitted, Fitted, Offload]:
    """The fitted constants for tg and pp, and those of partly offloaded models."""
    table = tomllib.loads(data.read_text("speed.toml"))
    tg, pp = (
        Fitted(
            Terms(tuple(table[k]["terms"])),
            np.array(list(table[k]["terms"].values())),
            Spread(**table[k]["spread"]),
        )
        for k in ("tg", "pp")
    )
    return tg, pp, Offload(**table["offload"])


def predict(
    device: DeviceSpeed,
    work: Work,
    *,
    depth: float = 0,
    n_prompt: int = 512,
    era: str = ERAS[-1],
    flash_attn: bool = False,
    offloaded_layers: int | None = None,
    kernel: str | None = None,
) -> PredictedSpeed:
    """Speed of a model on a device; of a GPTQ model only that of generation.

    Args:
        device: see `device_speed`.
        work: see `dense_work`.
        depth: tokens in the KV cache before the prompt or the token.
        n_prompt: tokens of the prompt, as in ``pp512``.
        era: of the llama.cpp build, one of `ERAS`.
        flash_attn: llama.cpp's ``-fa``. No published run on Metal states it; it is given the
            change that CUDA shows, so take care at large depths.
        offloaded_layers: layers on the device (llama.cpp's ``-ngl``, where the output matrix counts
            as one more); none: all. The others run on the CPU, and for a prompt their weights
            cross the bus. Those two rates come from few runs and depend on the host.
        kernel: that runs a GPTQ model, one of `dus_edge.predict.speed.gptq.KERNELS`; none: the first,
            ExLlamaV2. `era` and `flash_attn` are llama.cpp's and change nothing of it.

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
        outside = 1 - min(offloaded_layers, work.n_layers + 1) / (work.n_layers + 1)
    if any(map(gptq.is_gptq, work.weights)):
        return _predict_gptq(device, work, depth, outside, kernel or gptq.KERNELS[0])
    if kernel is not None:
        raise UsageError(f"Kernel {kernel!r} is for GPTQ models, and this is none.")
    tg, pp, offload = constants()
    case = Case(device, work, era, flash_attn, depth, n_prompt)
    tg_s = float(tg_seconds(tg.theta, features([case], tg.terms, "tg"))[0])
    pp_s = float(pp_seconds(pp.theta, features([case], pp.terms, "pp"))[0])
    tg_extra = pp_extra = 0.0
    if outside:
        moved = outside * (work.weight_bytes + depth * work.kv_bytes_per_token)
        # The CPU has no more bandwidth than the memory it shares with the device.
        host = offload.host_gbps
        if device.backend == "metal":
            host = min(host, device.bandwidth_gbps)
        tg_s = (1 - outside) * tg_s + max(moved / (host * 1e9), outside * tg_s)
        if device.backend != "metal":
            ubatches = math.ceil(n_prompt / UBATCH)
            pp_s += ubatches * outside * work.weight_bytes / (offload.bus_gbps * 1e9)
        tg_extra = pp_extra = offload.scale
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


#: Scale of the error of a compute rate guessed from the number of cores.
_ESTIMATED_SCALE = 0.2
