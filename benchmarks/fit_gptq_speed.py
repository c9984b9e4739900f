"""Check the speed model on published GPTQ runs, and fit what its kernels change.

    python benchmarks/fit_gptq_speed.py [--markdown]

Writes `dus_edge/data/gptq_speed.toml` (deviations and intervals) and `results/gptq_speed.jsonl`
(every published generation rate with its prediction). Run it again after `fit_speed.py`, whose
constants it takes as they are. Takes a second.

Every set of deviations in `TRIED` is fitted and judged by the rows of a source that the fit never
saw; a later one is taken only if it is better there by a tenth, and by half a percent. Rows count
as one over the root of the rows of their source and card, with the loss of `fit_speed.py`.

The interval: the root mean square of log(measured / predicted), each row predicted without its
source (rows marked `check` are never fitted), over rows or over pairs of source and card, whichever
is larger, times the 90 % quantile of Student's t. Sources are what is independent, so they are the
degrees of freedom, less one where something was fitted, and a fitted mean adds its own error. A
prediction takes the ends of this interval or of llama.cpp's, whichever are further out.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from common import RESULTS, read_published, toml_text
from fit_speed import KNEE, NOISE, VARIANTS

from dus_edge import data
from dus_edge.families.shape import Shape
from dus_edge.files import write_text
from dus_edge.predict.devices import Device, load_devices
from dus_edge.predict.speed import gptq as g
from dus_edge.predict.speed.device import device_speed
from dus_edge.predict.speed.predict import constants
from dus_edge.predict.speed.roofline import ERAS, Case, Terms, features, tg_seconds
from dus_edge.predict.speed.work import Work
from dus_edge.words import markdown_table

TOML = Path(data.__file__).parent / "gptq_speed.toml"
#: Parts of the formula that may deviate by kernel, sets of them from small to large.
TRIED = ((), ("layer",), ("token",), ("eta",), ("eta", "layer"), ("eta", "token"))
#: How much better a set must be on rows it was not fitted to: as a share, and outright.
WORTH = (0.1, 0.005)
#: Scale of a deviation before anything is seen.
PRIOR = 1.0
#: Student's t: 90 % quantiles for 1 to 10 degrees of freedom.
T90 = (3.078, 1.886, 1.638, 1.533, 1.476, 1.440, 1.415, 1.397, 1.383, 1.372)
#: Marks of rows that count for the interval.
HELD = ("fit", "check")
#: What stands above the constants.
ABOUT = (
    "What the kernels for GPTQ models change in the constants of speed.toml.",
    "Written by benchmarks/fit_gptq_speed.py from published/gptq.json, whose rows name their",
    "sources. terms: deviations of logarithms (layer, token) and logits (eta). interval: of",
    "log(measured / predicted). tried: mean error of each set on sources it never saw.",
)


def work_of(row: Mapping) -> Work:
    """The work of a published run's model: linear layers as GPTQ, the head as float16."""
    q, kv = (row[k] * row["head_dim"] for k in ("n_heads", "n_kv_heads"))
    a_layer = row["hidden"] * (2 * q + 2 * kv + 3 * row["ffn"])
    weights = {
        g.kind_name(row["bits"], row["group_size"]): row["n_layers"] * a_layer,
        "F16": row["vocab"] * row["hidden"],
    }
    shape = Shape(
        hidden_size=row["hidden"],
        intermediate_size=row["ffn"],
        vocab_size=row["vocab"],
        context_length=1,
        **{key: row[key] for key in ("n_layers", "n_heads", "n_kv_heads", "head_dim")},
    )
    return Work(shape, weights)


def case_of(row: Mapping, devices: Mapping[str, Device]) -> Case:
    """What a published rate was taken at; N tokens have a mean depth of N/2."""
    named = row["device_id"]
    device = device_speed(devices[VARIANTS.get(named, (named,))[0]])
    depth = (row["context_depth"] or 0) + (row["n_gen"] or 256) / 2
    return Case(device, work_of(row), ERAS[-1], flash_attn=True, depth=depth, kernel=row["kernel"])


class Rows:
    """Published generation rates as arrays."""

    def __init__(self, rows: Sequence[Mapping], devices: Mapping[str, Device]) -> None:
        self.rows = list(rows)
        self.cases = [case_of(row, devices) for row in self.rows]
        self.logs = np.log([row["tg_tps"] for row in self.rows])
        self.sources = np.array([row["source"] for row in self.rows])
        self.pairs = np.array([f"{row['source']}, {row['device_id']}" for row in self.rows])
        self.fitted = np.array([row["use"] == "fit" for row in self.rows])

    def errors(self, names: Sequence[str], values: np.ndarray) -> np.ndarray:
        """``(n_rows,)`` log(measured / predicted) with these deviations from llama.cpp."""
        tg = constants()[0]
        terms = Terms((*tg.terms.names, *names))
        seconds = tg_seconds(np.concatenate([tg.theta, values]), features(self.cases, terms, "tg"))
        return self.logs + np.log(seconds)

    def fit(self, names: Sequence[str], mask: np.ndarray) -> np.ndarray:
        """The most probable deviations given the rows in `mask`: Gauss-Newton, reweighted."""
        values = np.zeros(len(names))
        if not names or not mask.any():
            return values
        _, inverse, count = np.unique(self.pairs[mask], return_inverse=True, return_counts=True)
        weights = 1 / np.sqrt(count[inverse])
        weights *= len(weights) / weights.sum() / NOISE**2
        for _ in range(40):
            error = self.errors(names, values)[mask]
            moved = [values + 1e-5 * unit for unit in np.eye(len(names))]
            slopes = np.stack([(self.errors(names, v)[mask] - error) / 1e-5 for v in moved], axis=1)
            robust = weights * np.minimum(1, KNEE / np.maximum(np.abs(error), 1e-12))
            normal = slopes.T @ (slopes * robust[:, None]) + np.eye(len(names)) / PRIOR**2
            step = np.linalg.solve(normal, slopes.T @ (robust * error) + values / PRIOR**2)
            values = values - step
            if np.abs(step).max() < 1e-9:
                break
        return values

    def held_out(self, names: Sequence[str]) -> np.ndarray:
        """``(n_rows,)`` errors of fits without the row's source."""
        out = np.empty(len(self.rows))
        for source in sorted(set(self.sources)):
            own = self.sources == source
            out[own] = self.errors(names, self.fit(names, self.fitted & ~own))[own]
        return out


def mean_error(errors: np.ndarray) -> float:
    """Mean of |predicted / measured − 1|."""
    return float(np.abs(np.expm1(-errors)).mean())


def choose(rows: Rows, kernel: str) -> tuple[tuple[str, ...], dict[str, float]]:
    """The deviations to keep, and the held-out mean error of every set tried."""
    tried: dict[str, float] = {}
    best, known = (), math.inf
    for parts in TRIED:
        names = tuple(f"{part}.{kernel}" for part in parts)
        error = mean_error(rows.held_out(names)[rows.fitted])
        tried[" + ".join(parts) or "none"] = error
        if known == math.inf or error < known - max(WORTH[0] * known, WORTH[1]):
            best, known = names, error
    return best, tried


def interval(errors: np.ndarray, rows: Rows, n_fitted: int) -> dict[str, float]:
    """The half width of the 80 % interval, and what it was made of."""
    squares = [(errors[rows.pairs == pair] ** 2).mean() for pair in sorted(set(rows.pairs))]
    scale = math.sqrt(max(float(np.mean(squares)), float((errors**2).mean())))
    sources = len(set(rows.sources))
    freedom = sources - (n_fitted > 0)
    wider = math.sqrt(1 + 1 / sources) if n_fitted else 1.0
    return {
        "rows": len(rows.rows),
        "sources": sources,
        "pairs": len(squares),
        "rms": scale,
        "half_width": T90[min(freedom, len(T90)) - 1] * scale * wider,
    }


def lines_of(rows: Rows, errors: np.ndarray, half_width: float) -> list[dict]:
    """Rows with their predictions, as they are written to the results."""
    spread = constants()[0].spread
    kept = (
        "source", "use", "kernel", "device_id", "model", "group_size", "context_depth", "n_gen",
    )  # fmt: skip
    lines = []
    for row, case, log, error in zip(rows.rows, rows.cases, rows.logs, errors, strict=True):
        rate = math.exp(log - error)
        low, high = spread.ends(rate, case.device.family)
        lines.append(
            {
                **{k: row[k] for k in kept},
                "measured": row["tg_tps"],
                "predicted": round(rate, 3),
                "low": round(min(low, rate * math.exp(-half_width)), 3),
                "high": round(max(high, rate * math.exp(half_width)), 3),
            }
        )
    return lines


def run() -> tuple[dict[str, dict], list[dict]]:
    """Tables of constants by kernel, and every row with its prediction."""
    devices = {d.id: d for d in load_devices()}
    published = [r for r in read_published("gptq") if r["tg_tps"]]
    tables: dict[str, dict] = {}
    lines: list[dict] = []
    for kernel in g.KERNELS:
        own = [r for r in published if r["kernel"] == kernel]
        rows = Rows([r for r in own if r["use"] in HELD], devices)
        names, tried = choose(rows, kernel)
        values, errors = rows.fit(names, rows.fitted), rows.held_out(names)
        found = interval(errors, rows, len(names))
        tables[f"{kernel}.terms"] = dict(zip(names, map(float, values), strict=True))
        tables[f"{kernel}.interval"] = found
        tables[f"{kernel}.tried"] = tried
        lines += lines_of(rows, errors, found["half_width"])
        others = Rows([r for r in own if r["use"] not in HELD], devices)
        lines += lines_of(others, others.errors(names, values), found["half_width"])
    # Of older kernels nothing is fitted: how far they lie from llama.cpp's constants.
    older = Rows([r for r in published if r["kernel"] not in g.KERNELS], devices)
    return tables, lines + lines_of(older, older.errors((), np.zeros(0)), 0.0)


def summary(lines: Sequence[Mapping]) -> dict[str, float]:
    """Mean and largest |predicted / measured − 1|, bias, and the share inside the interval."""
    errors = np.array([x["predicted"] / x["measured"] - 1 for x in lines])
    inside = [x["low"] <= x["measured"] <= x["high"] for x in lines]
    return {
        "rows": len(lines),
        "sources": len({x["source"] for x in lines}),
        "cards": len({x["device_id"] for x in lines}),
        "mean_absolute_error": float(np.abs(errors).mean()),
        "largest": float(np.abs(errors).max()),
        "bias": float(errors.mean()),
        "coverage": float(np.mean(inside)),
    }


def markdown(lines: Sequence[Mapping]) -> str:
    """The held-out errors by kernel and mark, then every row that counts."""
    groups: dict[tuple[str, str], list[Mapping]] = {}
    for x in lines:
        groups.setdefault((x["kernel"], x["use"]), []).append(x)
    head = ["kernel", "mark", "sources", "cards", "rows", "mean error", "largest", "bias", "inside"]
    table = []
    for (kernel, use), part in groups.items():
        x = summary(part)
        cells = [kernel, use, str(x["sources"]), str(x["cards"]), str(x["rows"])]
        cells += [f"{100 * x[k]:.1f} %" for k in ("mean_absolute_error", "largest")]
        table.append([*cells, f"{100 * x['bias']:+.1f} %", f"{100 * x['coverage']:.0f} %"])
    parts = [markdown_table(head, table, left=range(2))]
    head = ["kernel", "card", "model", "source", "depth", "published", "predicted"]
    table = [
        [
            x["kernel"], x["device_id"], x["model"], x["source"], str(x["context_depth"] or 0),
            f"{x['measured']:.4g}", f"{x['predicted']:.4g} ({x['low']:.4g}–{x['high']:.4g})",
        ]
        for x in lines if x["use"] in HELD
    ]  # fmt: skip
    return "\n\n".join([*parts, markdown_table(head, table, left=range(4))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--markdown", action="store_true", help="print the tables")
    args = parser.parse_args()
    tables, lines = run()
    write_text(TOML, toml_text(ABOUT, tables))
    write_text(RESULTS / "gptq_speed.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
    if args.markdown:
        print(markdown(lines))


if __name__ == "__main__":
    main()
