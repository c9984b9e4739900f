"""Fit the speed model to published llama.cpp runs and cross-validate it by device.

    python benchmarks/fit_speed.py [--markdown] [--no-plot]

Writes `dus_edge/data/speed.toml` (constants), `results/speed.jsonl` (every row with the prediction
of a fit that never saw its device) and `results/speed.png` and `.svg` (that as a picture). Takes
some minutes.

Rows that llama-bench measured decide. Other tools' rates are fitted afterwards, with those
constants as they are, and decide only terms that no row of llama-bench has: kernels of llamafile
(LocalScore), builds of 2023, a card's architecture. They are predicted and listed apart.

The loss is Huber's on log(predicted / measured), every device counting as one, with a Gaussian
prior that draws deviations (by architecture, era, type) towards zero, so that a group with few rows
does not run off. Everything is fitted again without the device in turn, the intervals too: they are
quantiles of an inner 5-fold cross-validation by device of the other devices only.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from common import RESULTS, read_published, toml_text

from dus_edge import data
from dus_edge.checkpoint.config import config_of_shape
from dus_edge.families.shape import Shape
from dus_edge.files import write_text
from dus_edge.predict.devices import Device, load_devices
from dus_edge.predict.memory.llama import model_of_config
from dus_edge.predict.speed.device import BACKENDS, device_speed
from dus_edge.predict.speed.predict import Spread
from dus_edge.predict.speed.roofline import (
    MIXED_ERA,
    Case,
    Features,
    Terms,
    features,
    pp_formula,
    pp_terms,
    term_sums,
    tg_formula,
    tg_terms,
)
from dus_edge.predict.speed.work import GROUPS, Work, group
from dus_edge.predict.speed.work import work_of as stored_work
from dus_edge.predict.stored_model import RunSettings, StoredModel
from dus_edge.quant.recipe import PRESETS
from dus_edge.words import markdown_table

#: Layers, hidden, ffn (active experts together), heads, KV heads, head dimension, vocabulary, tied
#: head, as config.json has them; a test compares them with the published parameter counts.
SHAPES = {
    "llama-7b": (32, 4096, 11008, 32, 32, 128, 32000, False),
    "llama-13b": (40, 5120, 13824, 40, 40, 128, 32000, False),
    "llama-30b": (60, 6656, 17920, 52, 52, 128, 32000, False),
    "llama-65b": (80, 8192, 22016, 64, 64, 128, 32000, False),
    "llama2-70b": (80, 8192, 28672, 64, 8, 128, 32000, False),
    "llama3-8b": (32, 4096, 14336, 32, 8, 128, 128256, False),
    "llama3-70b": (80, 8192, 28672, 64, 8, 128, 128256, False),
    "llama3.2-1b": (16, 2048, 8192, 32, 8, 64, 128256, True),
    "llama3.2-3b": (28, 3072, 8192, 24, 8, 128, 128256, True),
    "qwen3-0.6b": (28, 1024, 3072, 16, 8, 128, 151936, True),
    "qwen3-1.7b": (28, 2048, 6144, 16, 8, 128, 151936, True),
    "qwen3-4b": (36, 2560, 9728, 32, 8, 128, 151936, True),
    "qwen3-8b": (36, 4096, 12288, 32, 8, 128, 151936, False),
    "qwen3-14b": (40, 5120, 17408, 40, 8, 128, 151936, False),
    "qwen3-32b": (64, 5120, 25600, 64, 8, 128, 151936, False),
    "qwen3-30b-a3b": (48, 2048, 6144, 32, 4, 128, 151936, False),
    "qwen2.5-0.5b": (24, 896, 4864, 14, 2, 64, 151936, True),
    "qwen2.5-3b": (36, 2048, 11008, 16, 2, 128, 151936, True),
    "qwen2.5-7b": (28, 3584, 18944, 28, 4, 128, 152064, False),
    "qwen2.5-14b": (48, 5120, 13824, 40, 8, 128, 152064, False),
    "qwen-7b": (32, 4096, 11008, 32, 32, 128, 151936, False),
    "qwen3.6-27b": (64, 5120, 17408, 24, 4, 256, 248320, False),
    "tinyllama": (22, 2048, 5632, 32, 4, 64, 32000, False),
    "phi-4-mini": (32, 3072, 8192, 24, 8, 128, 200064, True),
    "phi-3.5-mini": (32, 3072, 8192, 32, 32, 96, 32064, False),
    "phi-3-medium": (40, 5120, 17920, 40, 10, 128, 32064, False),
    "phi-4": (40, 5120, 17920, 40, 10, 128, 100352, False),
    "smollm2-360m": (32, 960, 2560, 15, 5, 64, 49152, True),
    "smollm2-1.7b": (24, 2048, 8192, 32, 32, 64, 49152, True),
    "gemma-3-1b": (26, 1152, 6912, 4, 1, 256, 262144, True),
    "gemma-3-4b": (34, 2560, 10240, 8, 4, 256, 262144, True),
    "mistral-7b": (32, 4096, 14336, 32, 8, 128, 32768, False),
    "ministral-8b": (36, 4096, 12288, 32, 8, 128, 131072, False),
    "ministral-3-3b": (26, 3072, 9216, 32, 8, 128, 131072, True),
    "ministral-3-14b": (40, 5120, 16384, 32, 8, 128, 131072, False),
    "mistral-nemo": (40, 5120, 14336, 32, 8, 128, 131072, False),
    "mistral-small-24b": (40, 5120, 32768, 32, 8, 128, 131072, False),
    "codestral-22b": (56, 6144, 16384, 48, 8, 128, 32768, False),
    "falcon3-7b": (28, 3072, 23040, 12, 4, 256, 131072, False),
    "granite-3.1-8b": (40, 4096, 12800, 32, 8, 128, 49155, True),
    "granite-4.1-8b": (40, 4096, 12800, 32, 8, 128, 100352, True),
    "yi-1.5-9b": (48, 4096, 11008, 32, 4, 128, 64000, False),
    "internlm3-8b": (48, 4096, 10240, 32, 2, 128, 128512, False),
    "internlm2.5-20b": (48, 6144, 16384, 48, 8, 128, 92544, False),
    "solar-10.7b": (48, 4096, 14336, 32, 8, 128, 32000, False),
}
#: A piece of the published name, in lower case -> shape; the first that fits counts.
NAMES = (
    ("qwen3.6-27b", "qwen3.6-27b"),
    ("30b-a3b", "qwen3-30b-a3b"),
    ("qwen-7b-chat", "qwen-7b"),
    ("nemotron-nano-8b", "llama3-8b"),
    ("r1-distill-llama-8b", "llama3-8b"),
    ("distill-qwen-14b", "qwen2.5-14b"),
    ("deepseek-r1:14b", "qwen2.5-14b"),
    ("distill-qwen-7b", "qwen2.5-7b"),
    ("solar", "solar-10.7b"),
    ("tinyllama", "tinyllama"),
    ("llama-1 7b", "llama-7b"),
    ("llama-1 13b", "llama-13b"),
    ("llama-1 30b", "llama-30b"),
    ("llama-1 65b", "llama-65b"),
    ("llama-2 7b", "llama-7b"),
    ("llama 7b", "llama-7b"),
    ("llama-2 13b", "llama-13b"),
    ("llama-2 70b", "llama2-70b"),
    ("llama-3 8b", "llama3-8b"),
    ("llama-3 70b", "llama3-70b"),
    ("llama-3.1 70b", "llama3-70b"),
    ("3.1-8b-instruct", "llama3-8b"),
    ("llama-3.1 8b", "llama3-8b"),
    ("llama3.1:8b", "llama3-8b"),
    ("3.2-1b", "llama3.2-1b"),
    ("3.2 1b", "llama3.2-1b"),
    ("3.2:1b", "llama3.2-1b"),
    ("3.2-3b", "llama3.2-3b"),
    ("3.2 3b", "llama3.2-3b"),
    ("3.2:3b", "llama3.2-3b"),
    ("qwen3-0.6b", "qwen3-0.6b"),
    ("qwen3-1.7b", "qwen3-1.7b"),
    ("qwen3-4b", "qwen3-4b"),
    ("qwen3 8b", "qwen3-8b"),
    ("qwen3-8b", "qwen3-8b"),
    ("qwen3:8b", "qwen3-8b"),
    ("qwen3 14b", "qwen3-14b"),
    ("qwen3-14b", "qwen3-14b"),
    ("qwen3 32b", "qwen3-32b"),
    ("qwen3-32b", "qwen3-32b"),
    ("qwen2.5-0.5b", "qwen2.5-0.5b"),
    ("coder-3b", "qwen2.5-3b"),
    ("qwen2.5-7b", "qwen2.5-7b"),
    ("coder-7b", "qwen2.5-7b"),
    ("coder:7b", "qwen2.5-7b"),
    ("qwen2.5 14b", "qwen2.5-14b"),
    ("qwen2.5-14b", "qwen2.5-14b"),
    ("coder-14b", "qwen2.5-14b"),
    ("coder:14b", "qwen2.5-14b"),
    ("phi-4-mini", "phi-4-mini"),
    ("phi-3.5-mini", "phi-3.5-mini"),
    ("phi-3-medium", "phi-3-medium"),
    ("phi-4", "phi-4"),
    ("360m", "smollm2-360m"),
    ("smollm2-1.7b", "smollm2-1.7b"),
    ("gemma-3-1b", "gemma-3-1b"),
    ("gemma-3-4b", "gemma-3-4b"),
    ("mistral-7b", "mistral-7b"),
    ("mistral 7b", "mistral-7b"),
    ("ministral-8b", "ministral-8b"),
    ("ministral-3-3b", "ministral-3-3b"),
    ("ministral-3:14b", "ministral-3-14b"),
    ("nemo", "mistral-nemo"),
    ("small", "mistral-small-24b"),
    ("devstral:24b", "mistral-small-24b"),
    ("codestral", "codestral-22b"),
    ("falcon3-7b", "falcon3-7b"),
    ("granite-3.1-8b", "granite-3.1-8b"),
    ("granite-4.1-8b", "granite-4.1-8b"),
    ("yi-1.5-9b", "yi-1.5-9b"),
    ("internlm3", "internlm3-8b"),
    ("internlm2_5", "internlm2.5-20b"),
)

#: Prompt and generation lengths of LocalScore, whose averages some rows are.
LOCALSCORE = (
    (1024, 16), (4096, 256), (2048, 256), (2048, 768), (1024, 1024), (1280, 3072), (384, 1152),
    (64, 1024), (16, 1536),
)  # fmt: skip
#: What llama-bench measured. Other tools' rates, averages among them, decide only constants of
#: their own: of kernels and eras that llama-bench's rows do not have.
DECIDING = ("llama-bench", "llama-bench at context depth", "user-submitted llama-bench")
#: Rows that do not say which of several variants ran: the one whose facts are taken, and all that
#: it may be; the row is left out with each of them.
VARIANTS = {
    "a100-80gb?": ("a100-80gb-pcie", ("a100-80gb-pcie", "a100-80gb-sxm")),
    "m2-pro-?": ("m2-pro-19c", ("m2-pro-16c", "m2-pro-19c")),
    "m4-pro-?": ("m4-pro-20c", ("m4-pro-16c", "m4-pro-20c")),
}
#: Median and scale of a base term's logarithm or logit, and the scale of deviations from it.
PRIORS = {
    "tg": {
        "eta": (1.5, 1.0), "alu": (2.5, 1.0), "kv": (1.0, 1.0), "score": (0.0, 1.5),
        "layer": (-10.0, 1.0), "token": (-8.5, 1.0),
    },
    "pp": {
        "mm": (0.0, 1.0), "read": (0.0, 0.7), "attn": (0.5, 1.0),
        "layer": (-8.5, 1.0), "token": (-8.0, 1.0),
    },
}  # fmt: skip
#: Kernels differ more in arithmetic than in how well they read; the ratio is of chips.
DEVIATION = 0.2
WIDE = {"alu": 0.7, "ratio": 0.6}
#: Scale of the noise, and where the loss turns from square to linear.
NOISE, KNEE = 0.06, 0.10
#: Of a sum of terms, for its derivative.
STEP = 1e-5
INNER_FOLDS = 5
TARGETS = {"tg": (0.06, 0.18), "pp": (0.15, math.inf)}
#: Share of left-out rows that should lie in the intervals of 80 %.
COVERED = (0.78, 0.85)
HEAD = ("devices", "rows", "mean error", "90th percentile", "bias", "in interval")
TOML = Path(data.__file__).parent / "speed.toml"
#: What stands above the constants.
ABOUT = (
    "Constants of dus_edge/predict/speed/roofline.py: "
    "logarithms or logits of efficiencies and costs.",
    "Written by benchmarks/fit_speed.py from published/runs.json, whose rows name their",
    "sources; cross_validation is of fits without the device predicted.",
    "offload is from one published run (24 of 33 layers on an RTX 4060 Laptop), its scale a",
    "judgement of how far hosts differ.",
    "unpublished: what a type costs that no published run is of. Q4_0's rows, left out and taken",
    "for Q4_K's of as many bits, are that much further off than Q4_0's own constants.",
)


@dataclass(frozen=True)
class Row:
    """A published rate and what would be predicted for it.

    Attributes:
        raw: as published, and `row`, its place in published/runs.json, which names the source.
        device: id in devices.toml.
        may_be: ids that it may have been; the row is left out with any of them.
        rate: tokens per second as published.
        cases: one, or several whose rates were averaged.
    """

    raw: Mapping
    device: str
    may_be: tuple[str, ...]
    rate: float
    cases: tuple[Case, ...]

    @property
    def family(self) -> str:
        return self.cases[0].device.family


def shape_of(model: str) -> tuple:
    """The shape of a model by its published name."""
    return SHAPES[next(shape for piece, shape in NAMES if piece in model.lower())]


def work_of(row: Mapping) -> Work:
    """The work of a row's model; Unsloth's dynamic mixes are taken for Q4_K_M."""
    n_layers, hidden, ffn, n_heads, n_kv_heads, head_dim, vocab, tied = shape_of(row["model"])
    quant = row["quant"].lower()
    preset = {"q3_k_s": "q3_k_m"}.get(quant, "q4_k_m" if "xl" in quant else quant)
    shape = Shape(
        n_layers=n_layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim or hidden // n_heads,
        vocab_size=vocab,
        context_length=1,
    )
    cache = "q8_0" if "q8_0 KV" in (row["notes"] or "") else "f16"
    return stored_work(_stored(shape, tied, preset), RunSettings(type_k=cache, type_v=cache))


@functools.cache
def _stored(shape: Shape, tied: bool, preset: str) -> StoredModel:
    return model_of_config(config_of_shape(shape, tied_head=tied), PRESETS[preset])


def era_of(row: Mapping) -> str:
    """Build era; llamafile (LocalScore) has kernels of its own, so it counts as one.

    Rows without an era run at a depth, which llama-bench has been able to since April 2025.
    """
    if row["metric"].startswith("LocalScore"):
        return "llamafile"
    return {"mixed (2023-2025)": MIXED_ERA, None: "2025+"}.get(row["era"], row["era"])


def backend_of(row: Mapping) -> str:
    """``cuda``, ``metal`` or ``vulkan``; where a table does not say which of two, the first."""
    name = row["backend"].lower()
    return "cuda" if "not stated" in name else name.split(" ")[0]


def rows_of(runs: Sequence[Mapping], devices: Mapping[str, Device], which: str) -> list[Row]:
    """The rows that state a rate of this kind, of devices that are in the database."""
    rows = []
    for index, run in enumerate(runs):
        rate = run[f"{which}_tps"]
        named = run["device_id"]
        device, may_be = VARIANTS.get(named, (named.rstrip("?"), (named.rstrip("?"),)))
        if not rate or device not in devices:
            continue
        case = Case(
            device_speed(devices[device], backend_of(run)),
            work_of(run),
            era_of(run),
            bool(run["flash_attn"]),
        )
        cases = tg_cases(run, case) if which == "tg" else pp_cases(run, case)
        rows.append(Row({**run, "row": index}, device, may_be, rate, cases))
    return rows


def tg_cases(run: Mapping, case: Case) -> tuple[Case, ...]:
    """What a published generation rate was taken at; N tokens have a mean depth of N/2."""
    depth = run["context_depth"] or 0
    if run["metric"] == "LocalScore average":
        return tuple(replace(case, depth=p + n / 2) for p, n in LOCALSCORE)
    if run["metric"] == "llama.cpp main":
        return (replace(case, depth=384),)  # 512 of context, shifted by half when full
    return (replace(case, depth=depth + (run["n_gen"] or 256) / 2),)


def pp_cases(run: Mapping, case: Case) -> tuple[Case, ...]:
    """What a published prompt rate was taken at: an empty cache, or 512 tokens at a depth."""
    depth = run["context_depth"] or 0
    if run["metric"] == "LocalScore average":
        return tuple(replace(case, n_prompt=p) for p, _ in LOCALSCORE)
    at_depth = run["metric"] == "llama-bench at context depth" or "pp512 at" in (run["notes"] or "")
    if at_depth or (run["n_prompt"] < depth):
        return (replace(case, depth=depth),)
    return (replace(case, n_prompt=run["n_prompt"]),)


def is_fitted(row: Row) -> bool:
    """Whether a row takes part: marked so, and of a model of 1 B parameters or more."""
    return row.raw["use"] == "fit" and row.raw["params_b"] >= 1


def decides(row: Row) -> bool:
    """Whether a row decides the constants that all share, and is what the fit is judged by."""
    return is_fitted(row) and row.raw["metric"] in DECIDING


class Problem:
    """Rows as arrays, and the fit to any part of them."""

    def __init__(self, rows: Sequence[Row], which: str) -> None:
        self.rows, self.which = rows, which
        self.names = _names(rows, which)
        cases = [case for row in rows for case in row.cases]
        self.owner = np.array([i for i, row in enumerate(rows) for _ in row.cases])
        self.tokens = np.array([1.0 if which == "tg" else c.n_prompt for c in cases])
        self.features = features(cases, Terms(self.names), which)
        self.logs = np.log([row.rate for row in rows])
        self.devices = np.array([row.device for row in rows])
        self.families = np.array([row.family for row in rows])
        self.deciding = np.array([decides(row) for row in rows])
        priors = np.array([_prior(name, which) for name in self.names])
        self.centre, self.scale = priors[:, 0], priors[:, 1]

    @functools.cached_property
    def own(self) -> np.ndarray:
        """``(n_terms,)`` bool: terms that only rows of other tools have."""
        shared = _names([r for r in self.rows if decides(r)], self.which)
        return np.array([name not in shared for name in self.names])

    def without(self, device: str) -> np.ndarray:
        """``(n_rows,)`` bool: rows that cannot be of this device."""
        return np.array([device not in row.may_be and row.device != device for row in self.rows])

    def log_rates(self, theta: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Logarithms of the predicted rates of the rows in `mask`."""
        return self._part(np.ones(len(self.rows), bool) if mask is None else mask)(theta)[0]

    def _part(self, mask: np.ndarray):
        """A function from terms to the rows' log rates and, if asked, their derivatives."""
        keep = mask[self.owner]
        f = Features(
            {k: v[keep] for k, v in self.features.arrays.items()},
            {k: v[keep] for k, v in self.features.terms.items()},
        )
        owner = (np.cumsum(mask) - 1)[self.owner[keep]]
        tokens, count = self.tokens[keep], np.bincount(owner)
        formula = tg_formula if self.which == "tg" else pp_formula

        def rates(theta: np.ndarray, slopes: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
            sums = term_sums(theta, f)
            each = tokens / formula(f.arrays, sums)
            mean = np.bincount(owner, each) / count
            if not slopes:
                return np.log(mean), None
            moved = np.zeros((len(each), len(theta)))
            for part, total in sums.items():
                # One column of sums at a time; the terms behind it all move it alike.
                columns = total.reshape(len(each), -1)
                matrices = f.terms[part].reshape(len(each), columns.shape[1], len(theta))
                for g in range(columns.shape[1]):
                    there = columns.copy()
                    there[:, g] += STEP
                    changed = {**sums, part: there.reshape(total.shape)}
                    slope = (tokens / formula(f.arrays, changed) - each) / STEP
                    moved += slope[:, None] * matrices[:, g]
            out = np.zeros((len(count), len(theta)))
            np.add.at(out, owner, moved)
            return np.log(mean), out / (count * mean)[:, None]

        return rates

    def fit(self, mask: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
        """Most probable terms given the rows in `mask`, those of llama-bench first."""
        theta = self.centre.copy() if start is None else start.copy()
        theta = self._fit(mask & self.deciding, theta, ~self.own)
        others = mask & ~self.deciding
        return self._fit(others, theta, self.own) if others.any() and self.own.any() else theta

    def _fit(self, mask: np.ndarray, theta: np.ndarray, free: np.ndarray) -> np.ndarray:
        """Levenberg-Marquardt, reweighted, over the free terms."""
        predicted, measured = self._part(mask), self.logs[mask]
        _, inverse, rows = np.unique(self.devices[mask], return_inverse=True, return_counts=True)
        weights = 1 / rows[inverse]
        weights *= len(weights) / weights.sum() / NOISE**2
        precision = self.scale[free] ** -2.0

        def cost(theta: np.ndarray, log: np.ndarray) -> float:
            size = np.abs(log - measured)
            loss = np.where(size < KNEE, size**2 / 2, KNEE * (size - KNEE / 2))
            off = (theta - self.centre)[free]
            return float((weights * loss).sum() + (off**2 * precision).sum() / 2)

        log, jacobian = predicted(theta, True)
        value = cost(theta, log)
        damping = 1e-2
        for _ in range(60):
            error, jacobian = log - measured, jacobian[:, free]
            robust = weights * np.minimum(1, KNEE / np.maximum(np.abs(error), 1e-12))
            normal = jacobian.T @ (jacobian * robust[:, None]) + np.diag(precision)
            slope = jacobian.T @ (robust * error) + (theta - self.centre)[free] * precision
            before = value
            for _ in range(10):
                step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -slope)
                trial = theta.copy()
                trial[free] += np.clip(step, -1, 1)
                value_there = cost(trial, predicted(trial)[0])
                if value_there < value:
                    theta, value = trial, value_there
                    damping = max(damping / 5, 1e-9)
                    break
                damping *= 4
            if before - value < 1e-6 * value:
                break
            log, jacobian = predicted(theta, True)
        return theta

    def spread(self, mask: np.ndarray, start: np.ndarray) -> Spread:
        """How far llama-bench's rows in `mask` lie from fits to other devices of `mask`."""
        mask = mask & self.deciding
        devices = sorted(set(self.devices[mask]), key=lambda d: (self._family(d), d))
        out = np.full(len(self.rows), np.nan)
        for fold in range(INNER_FOLDS):
            kept = mask.copy()
            for device in devices[fold::INNER_FOLDS]:
                kept &= self.without(device)
            theta = self.fit(kept, start)
            left = mask & np.isin(self.devices, devices[fold::INNER_FOLDS])
            out[left] = self.logs[left] - self.log_rates(theta, left)
        return spread_of(out[mask], self.families[mask])

    def _family(self, device: str) -> str:
        return str(self.families[self.devices == device][0])


def spread_of(errors: np.ndarray, families: np.ndarray) -> Spread:
    """Quantiles of log(measured / predicted)."""
    low, high = np.quantile(errors, (0.1, 0.9))
    return Spread(float(low), float(high), tuple(sorted(set(map(str, families)))))


def _names(rows: Sequence[Row], which: str) -> tuple[str, ...]:
    """The terms that some row has; a type group's only if a model has such weights."""
    found: set[str] = set()
    for row in rows:
        for case in row.cases:
            for lists in (tg_terms if which == "tg" else pp_terms)(case).values():
                held = {GROUPS.index(group(t)) for t in case.work.weights}
                for i, terms in enumerate(lists):
                    if len(lists) == 1 or i in held:
                        found.update(t if isinstance(t, str) else t[0] for t in terms)
    return tuple(sorted(found))


def _prior(name: str, which: str) -> tuple[float, float]:
    part, *rest = name.split(".")
    if len(rest) == 1 and rest[0] in BACKENDS:
        return PRIORS[which][part]
    return 0.0, WIDE.get(part, WIDE.get(rest[-1], DEVIATION))


def cross_validate(problem: Problem, start: np.ndarray) -> list[dict]:
    """Every row predicted, with its interval, by a fit that never saw its device."""
    lines: dict[int, dict] = {}
    devices = sorted(set(problem.devices))
    for done, device in enumerate(devices, 1):
        mask = problem.without(device)
        theta = problem.fit(mask, start)
        spread = problem.spread(mask, theta)
        left = problem.devices == device
        for i, log in zip(np.flatnonzero(left), problem.log_rates(theta, left), strict=True):
            lines[i] = line(problem.rows[i], problem.which, math.exp(log), spread)
        print(f"\r{problem.which}: {done} of {len(devices)} devices", end="", file=sys.stderr)
    print(file=sys.stderr)
    return [lines[i] for i in sorted(lines)]


def line(row: Row, which: str, predicted: float, spread: Spread) -> dict:
    """A row with its prediction, as it is written to the results."""
    case = row.cases[0]
    low, high = spread.ends(predicted, row.family)
    n_bytes = case.work.weight_bytes
    plain = case.device.bandwidth_gbps * 1e9 / n_bytes
    return {
        "kind": which,
        "row": row.raw["row"],
        "use": row.raw["use"],
        "decides": decides(row),
        "device": row.device,
        "device_id": row.raw["device_id"],
        "family": row.family,
        "model": row.raw["model"],
        "params_b": row.raw["params_b"],
        "quant": row.raw["quant"],
        "era": row.raw["era"],
        "metric": row.raw["metric"],
        "n_prompt": row.raw["n_prompt"],
        "n_gen": row.raw["n_gen"],
        "context_depth": row.raw["context_depth"],
        "measured": row.rate,
        "predicted": round(predicted, 3),
        "low": round(low, 3),
        "high": round(high, 3),
        **({"bandwidth_over_bytes": round(plain, 3)} if which == "tg" else {}),
    }


def summary(lines: Sequence[Mapping], key: str = "predicted", factor: float = 1.0) -> dict:
    """Mean and 90th percentile of |predicted / measured − 1|, bias, and the share covered."""
    measured = np.array([x["measured"] for x in lines])
    error = factor * np.array([x[key] for x in lines]) / measured - 1
    inside = [x["low"] <= x["measured"] <= x["high"] for x in lines]
    return {
        "rows": len(lines),
        "devices": len({x["device"] for x in lines}),
        "mean_absolute_error": float(np.abs(error).mean()),
        "p90_absolute_error": float(np.quantile(np.abs(error), 0.9)),
        "bias": float(error.mean()),
        "coverage": float(np.mean(inside)),
    }


def fit_offload(runs: Sequence[Mapping], devices: Mapping[str, Device]) -> dict[str, float]:
    """The two rates of a partly offloaded model from the run that states its number of layers.

    Its speed with all layers on the device was published beside it, so nothing else is needed.
    """
    (part,) = [r for r in runs if "ngl 24 of 33" in (r["notes"] or "")]
    whole = next(
        r for r in runs if (r["device_id"], r["model"]) == (part["device_id"], part["model"])
    )
    outside = 9 / 33
    moved = outside * work_of(part).weight_bytes / 1e9
    host = moved / (1 / part["tg_tps"] - (1 - outside) / whole["tg_tps"])
    bus = moved / (512 / part["pp_tps"] - 512 / whole["pp_tps"])
    # Desktop hosts have between 40 and 90 GB/s, and buses between 6 and 25.
    return {"host_gbps": round(host, 2), "bus_gbps": round(bus, 2), "scale": 0.4}


def fit_unpublished(problems: Mapping[str, Problem]) -> dict[str, float]:
    """How much further off a type of 4 bits is that the fit never saw, as two scales."""
    scales = {}
    for which, problem in problems.items():
        unseen = np.array([row.raw["quant"] == "Q4_0" for row in problem.rows])
        own = problem.logs - problem.log_rates(problem.fit(np.ones(unseen.size, bool)))
        taken = Problem([_as_q4_k(row) for row in itertools.compress(problem.rows, unseen)], which)
        known = dict(zip(problem.names, problem.fit(~unseen), strict=True))
        theta = np.array([known.get(name, 0.0) for name in taken.names])
        other = taken.logs - taken.log_rates(theta)
        excess = np.square(other).mean() - np.square(own[unseen]).mean()
        scales[f"{which}_scale"] = math.sqrt(max(0.0, float(excess)))
    return scales


def _as_q4_k(row: Row) -> Row:
    """The row as if its Q4_0 weights were Q4_K's, which take as many bytes."""

    def renamed(case: Case) -> Case:
        weights = dict(case.work.weights)
        weights["Q4_K"] = weights.get("Q4_K", 0) + weights.pop("Q4_0")
        return replace(case, work=replace(case.work, weights=weights))

    return replace(row, cases=tuple(map(renamed, row.cases)))


def fit_all() -> tuple[dict[str, Problem], dict[str, np.ndarray]]:
    """The rows that take part, and the terms fitted to all of them, for tg and pp."""
    runs = read_published("runs")
    devices = {d.id: d for d in load_devices()}
    problems = {
        which: Problem([r for r in rows_of(runs, devices, which) if is_fitted(r)], which)
        for which in ("tg", "pp")
    }
    return problems, {k: p.fit(np.ones(len(p.rows), bool)) for k, p in problems.items()}


def markdown(lines: Sequence[Mapping]) -> str:
    """The cross-validation as tables, by family and in all, with both yardsticks for tg."""
    parts = []
    for which in ("tg", "pp"):
        own = [x for x in lines if x["kind"] == which and x["decides"]]
        yardsticks = (0.55, 1.0) if which == "tg" else ()
        named = ["0.55 × bandwidth ÷ bytes", "bandwidth ÷ bytes"][: len(yardsticks)]
        groups = {f: [x for x in own if x["family"] == f] for f in sorted(_all(own, "family"))}
        table = [_cells(f, x, yardsticks) for f, x in (*groups.items(), ("all", own))]
        parts.append(f"### {which}\n\n{markdown_table(['family', *HEAD, *named], table)}")
        rest = [x for x in lines if x["kind"] == which and not x["decides"] and _takes_part(x)]
        groups = {m: [x for x in rest if x["metric"] == m] for m in sorted(_all(rest, "metric"))}
        table = [_cells(m, x) for m, x in (*groups.items(), ("all", rest))]
        parts.append(f"### {which}, other tools\n\n{markdown_table(['tool', *HEAD], table)}")
    others = [x for x in lines if not _takes_part(x)]
    table = [
        [
            x["kind"], x["use"] if x["use"] != "fit" else "below 1 B",
            f"{x['device_id']}, {x['model']} {x['quant']}",
            f"{x['measured']:.4g}", f"{x['predicted']:.4g} ({x['low']:.4g}–{x['high']:.4g})",
        ]
        for x in others
    ]  # fmt: skip
    head = ["", "mark", "run", "measured", "predicted, all layers on the device"]
    parts.append(f"### Rows that take no part\n\n{markdown_table(head, table, left=range(3))}")
    return "\n\n".join(parts)


def _all(lines: Sequence[Mapping], key: str) -> set:
    return {x[key] for x in lines}


def _takes_part(x: Mapping) -> bool:
    return x["use"] == "fit" and x["params_b"] >= 1


def _cells(name: str, part: Sequence[Mapping], yardsticks: Sequence[float] = ()) -> list[str]:
    """A line of a table: one group of rows."""
    x = summary(part)
    cells = [name, str(x["devices"]), str(x["rows"])]
    cells += [f"{100 * x[k]:.1f} %" for k in ("mean_absolute_error", "p90_absolute_error")]
    cells += [f"{100 * x['bias']:+.1f} %", f"{100 * x['coverage']:.0f} %"]
    for factor in yardsticks:
        y = summary(part, "bandwidth_over_bytes", factor)
        mean, p90 = y["mean_absolute_error"], y["p90_absolute_error"]
        cells.append(f"{100 * mean:.1f} % ({100 * p90:.0f} %)")
    return cells


def plot(lines: Sequence[Mapping], path: Path) -> None:
    """Predicted against measured, both on log scales, one panel each for tg and pp."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    styles = {
        "apple": ("o", "#c0504d", "Apple, Metal"),
        "nvidia-desktop": ("s", "#20506e", "GeForce desktop"),
        "nvidia-laptop": ("^", "#e0a030", "GeForce laptop"),
        "nvidia-pro": ("D", "#6aa5c8", "workstation, datacenter"),
    }
    with matplotlib.rc_context({"svg.hashsalt": "dus-edge", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(11, 5.4), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        for axes, which in zip(figure.subplots(1, 2), ("tg", "pp"), strict=True):
            own = [x for x in lines if x["kind"] == which and x["decides"]]
            x = summary(own)
            ends = min(v["measured"] for v in own) / 1.5, max(v["measured"] for v in own) * 1.5
            axes.plot(ends, ends, color="#1a1a1a", linewidth=0.8, label="equal")
            off = 0.2
            axes.fill_between(
                ends, [e * (1 - off) for e in ends], [e * (1 + off) for e in ends],
                color="#d0d0d0", alpha=0.5, linewidth=0, label="±20 %",
            )  # fmt: skip
            for key, (marker, colour, label) in styles.items():
                part = [v for v in own if _style(v["family"]) == key]
                axes.scatter(
                    [v["measured"] for v in part], [v["predicted"] for v in part],
                    s=16, marker=marker, c=colour, alpha=0.75, linewidths=0, label=label,
                )  # fmt: skip
            axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
            axes.set_xlabel("measured and published, tok/s")
            axes.set_ylabel("predicted without the device, tok/s")
            name = "Generation (tg)" if which == "tg" else "Prompt processing (pp)"
            axes.set_title(
                f"{name}: {x['rows']} runs on {x['devices']} devices,\n"
                f"mean error {100 * x['mean_absolute_error']:.1f} %, "
                f"90th percentile {100 * x['p90_absolute_error']:.1f} %",
                fontsize=11,
            )
            axes.set_axisbelow(True)
            axes.grid(color="#ececec", linewidth=0.6)
            axes.legend(fontsize=8.5, frameon=False, loc="upper left")
        for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
            figure.savefig(path.with_suffix(suffix), metadata=metadata, dpi=130)


def _style(family: str) -> str:
    if family.startswith("apple"):
        return "apple"
    if family.endswith("laptop"):
        return "nvidia-laptop"
    return "nvidia-desktop" if family.endswith("desktop") else "nvidia-pro"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--markdown", action="store_true", help="print the tables")
    parser.add_argument("--no-plot", action="store_true")
    args = parser.parse_args()
    runs = read_published("runs")
    devices = {d.id: d for d in load_devices()}
    problems, thetas = fit_all()
    tables: dict[str, dict] = {"offload": fit_offload(runs, devices)}
    tables["unpublished"] = fit_unpublished(problems)
    lines: list[dict] = []
    for which, problem in problems.items():
        theta = thetas[which]
        spread = problem.spread(np.ones(len(problem.rows), bool), theta)
        checked = cross_validate(problem, theta)
        tables[f"{which}.cross_validation"] = summary([x for x in checked if x["decides"]])
        tables[f"{which}.other_tools"] = summary([x for x in checked if not x["decides"]])
        tables[f"{which}.spread"] = asdict(spread) | {"families": list(spread.families)}
        tables[f"{which}.terms"] = dict(zip(problem.names, map(float, theta), strict=True))
        others = [r for r in rows_of(runs, devices, which) if not is_fitted(r)]
        outside = Problem(others, which)
        known = dict(zip(problem.names, theta, strict=True))
        there = np.array([known.get(n, 0.0) for n in outside.names])
        lines += checked
        for row, log in zip(others, outside.log_rates(there), strict=True):
            lines.append(line(row, which, math.exp(log), spread))
    write_text(TOML, toml_text(ABOUT, tables))
    write_text(RESULTS / "speed.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
    if not args.no_plot:
        plot(lines, RESULTS / "speed.png")
    if args.markdown:
        print(markdown(lines))
    for which in ("tg", "pp"):
        x = tables[f"{which}.cross_validation"]
        mean, p90 = TARGETS[which]
        met = x["mean_absolute_error"] <= mean and x["p90_absolute_error"] <= p90
        met &= COVERED[0] <= x["coverage"] <= COVERED[1]
        print(f"{which}: targets {'met' if met else 'MISSED'}: {x}", file=sys.stderr)


if __name__ == "__main__":
    main()
