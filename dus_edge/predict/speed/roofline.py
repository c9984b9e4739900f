"""How long a device takes for a token and for a prompt: two formulas of named constants.

Roofline models in seconds (Williams, Waterman, Patterson, CACM 52(4), 2009). A generated token
reads every weight but those of the embedding table, and the KV cache, once, and unpacks and
multiplies them on the shaders meanwhile:

    t = (m³ + a³)^⅓                                             the slower of the two, mostly
        m = Σ bytes_g / (BW·η_g)                                weights read, by group g of types
        a = Σ weights_g·ω_g / ALU                               and their arithmetic
        + depth·(kv_bytes_per_token / (BW·κ) + 4·layers·heads·head_dim·β / ALU)    attention
        + layers·σ + τ                                          kernel launches, sampling

and a prompt of n tokens is processed in ubatches of 512:

    t = 2·n·Σ weights_g / (PEAK·μ_g)                            matrix products
        + 4·layers·heads·head_dim·n·(depth + n/2)·α / PEAK      attention
        + ubatches·(Σ bytes_g·ρ / BW + layers·σ + τ)            weights read, kernel launches

BW is the memory bandwidth; ALU the FP32 rate of the shaders; PEAK the rate of dense matrix
products: tensor cores with FP16 accumulation on CUDA (INT8, which kernels for quantized weights
use, is twice that on every card, so one figure serves), the shader rate on Metal, four times that
with the matrix units of M5. η, κ, μ are logistic functions and ω, α, β, ρ, σ, τ exponentials of
sums of named terms in `data/speed.toml`: a base by backend and deviations by type group,
architecture, era, memory and flash attention, none by device. `benchmarks/fit_speed.py` fits them
to published llama.cpp measurements, `benchmarks/published/runs.json`, and cross-validates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dus_edge.predict.speed.device import DeviceSpeed
from dus_edge.predict.speed.gptq import MATRIX_UNITS
from dus_edge.predict.speed.work import GROUPS, Work, bytes_per_weight, group

#: Build eras of llama.cpp, and of published tables that mix them.
ERAS = ("2023", "2024", "2025+")
MIXED_ERA = "mixed"
#: Tokens that llama.cpp processes at once (its `-ub`).
UBATCH = 512
#: How reading and arithmetic overlap: 1 not at all, ∞ wholly; chosen by cross-validation.
_OVERLAP = 3
#: TFLOP/s for every GB/s of a usual card.
_USUAL_RATIO = 0.2


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
    era, fa, kernel = case.era, case.flash_attn, case.kernel
    b, arch = case.device.backend, case.device.architecture
    eta: list[list[Term]] = []
    alu: list[list[Term]] = []
    for g in GROUPS:
        own = [f"eta.{kernel}"] if kernel and g != "f16" else []
        eta.append([f"eta.{b}", f"eta.{b}.{g}", *own])
        # A type of few bits deviates from the k-quants that it is one of.
        kinds = ("k", "k_low") if g == "k_low" else (g,)
        names = [f"alu.{b}", *(f"alu.{b}.{kind}" for kind in kinds), f"alu.{b}.{era}"]
        alu.append([*names, f"alu.arch.{arch}"])
    own_part = {part: [f"{part}.{kernel}"] if kernel else [] for part in ("layer", "token")}
    return {
        "eta": eta,
        "alu": alu,
        "kv": [[f"kv.{b}", *(["kv.fa"] if fa else [])]],
        "score": [[f"score.{b}", *(["score.fa"] if fa else [])]],
        "layer": [[f"layer.{b}", f"layer.{b}.{era}", f"layer.arch.{arch}", *own_part["layer"]]],
        "token": [[f"token.{b}", *own_part["token"]]],
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
            # 512 tokens do not fill the largest chips, none of them holds its boost clock, and
            # the more they compute for their bandwidth, the more they wait for memory.
            names.append(("mm.cuda.size", math.log(d.matmul_tflops / 100)))
            ratio = d.matmul_tflops / d.bandwidth_gbps
            names.append(("mm.cuda.ratio", math.log(ratio / _USUAL_RATIO)))
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


def _vector_tflops(case: Case) -> float:
    """Rate of products with a vector."""
    d = case.device
    return d.matmul_tflops if case.kernel in MATRIX_UNITS else d.shader_tflops


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
        "shader": [_vector_tflops(c) * 1e12 for c in cases],
        "layers": [c.work.shape.n_layers for c in cases],
        "attention": [4 * c.work.shape.n_layers * c.work.shape.q_width for c in cases],
        "kv": [c.work.kv_bytes_per_token for c in cases],
        "depth": [c.depth for c in cases],
        "prompt": [c.n_prompt for c in cases],
    }
    arrays = {name: np.array(values, np.float64) for name, values in column.items()}
    return Features({**arrays, "bytes": group_bytes, "weights": group_weights}, matrices)


def term_sums(theta: np.ndarray, f: Features) -> dict[str, np.ndarray]:
    """Part of the formula → ``(n_cases,)`` or ``(n_cases, n_groups)`` sums of its terms."""
    return {part: matrix @ theta for part, matrix in f.terms.items()}


def tg_seconds(theta: np.ndarray, f: Features) -> np.ndarray:
    """``(n_cases,)`` seconds of one generated token; `theta` in the order of the terms."""
    return tg_formula(f.arrays, term_sums(theta, f))


def pp_seconds(theta: np.ndarray, f: Features) -> np.ndarray:
    """``(n_cases,)`` seconds of the whole prompt; `theta` in the order of the terms."""
    return pp_formula(f.arrays, term_sums(theta, f))


def tg_formula(a: Mapping[str, np.ndarray], x: Mapping[str, np.ndarray]) -> np.ndarray:
    """`tg_seconds` of `Features.arrays` and `term_sums`."""
    read = (a["bytes"] / _logistic(x["eta"])).sum(1) / a["bandwidth"]
    computed = (a["weights"] * np.exp(x["alu"])).sum(1) / a["shader"]
    weights = (read**_OVERLAP + computed**_OVERLAP) ** (1 / _OVERLAP)
    cache = a["kv"] / (a["bandwidth"] * _logistic(x["kv"]))
    cache = cache + a["attention"] * np.exp(x["score"]) / a["shader"]
    fixed = a["layers"] * np.exp(x["layer"]) + np.exp(x["token"])
    return weights + a["depth"] * cache + fixed


def pp_formula(a: Mapping[str, np.ndarray], x: Mapping[str, np.ndarray]) -> np.ndarray:
    """`pp_seconds` of `Features.arrays` and `term_sums`."""
    n = a["prompt"]
    products = 2 * n * (a["weights"] / _logistic(x["mm"])).sum(1)
    attention = a["attention"] * n * (a["depth"] + n / 2) * np.exp(x["attn"])
    read = a["bytes"].sum(1) * np.exp(x["read"]) / a["bandwidth"]
    each = read + a["layers"] * np.exp(x["layer"]) + np.exp(x["token"])
    return (products + attention) / a["matmul"] + np.ceil(n / UBATCH) * each


def _logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
