"""Measure our quantizers beside ggml's on one core: speed and error, type by type.

    python benchmarks/bench_quantizers.py [--types Q4_K,Q6_K] [--rounds 5] [--quick]
    python benchmarks/bench_quantizers.py --markdown

ggml's side is `ggml_quantize_chunk` of the libggml-base that llama-cpp-python carries. Both sides
run in one process on one thread, tied to one core where the system allows it, and alternate round
by round. Speed is of float32 rows for both, and of bf16 rows for ours, which converts within its
kernels. Both sides' bytes go through ggml's own dequantizers (`ggml_get_type_traits`) for the
errors.

Seconds of every round go to `results/quantizers.jsonl`, one line for each (type, importance,
data); errors to `results/quantizer_errors.jsonl`, one line for each (type, importance, tensor),
which replaces that of an earlier run. `--markdown` renders both.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import RESULTS, append, machine, read

from dus_edge.checkpoint.builtin import BUILTIN
from dus_edge.checkpoint.resolve import resolve_base
from dus_edge.checkpoint.safetensors import SafetensorsCheckpoint
from dus_edge.quant import ggml, native
from dus_edge.quant.imatrix import DEPENDENT
from dus_edge.quant.types import TYPES, QuantType
from dus_edge.words import markdown_table

#: The types measured: those for which ggml has no use for importance, and those for which it has.
UNWEIGHTED = ["F16", "BF16", "Q8_0"]
WEIGHTED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
WEIGHTED += ["IQ4_NL", "IQ4_XS", "IQ3_S", "IQ2_S", "IQ2_XS"]
NAMES = UNWEIGHTED + WEIGHTED
DATA = ("gaussian", "heavy", "pico")
SEED = 20261121
SIGMA = 0.02
N_COLS = 4096
#: Errors are summed over pieces of this many weights, so that float64 copies stay small.
PIECE = 1 << 20

Quantize = Callable[[np.ndarray, QuantType, np.ndarray | None], np.ndarray]


@dataclass(frozen=True)
class Data:
    """One kind of weights.

    Attributes:
        name: one of `DATA`.
        tensors: float32 matrices by name; errors are of each.
    """

    name: str
    tensors: Mapping[str, np.ndarray]

    @functools.cached_property
    def timed(self) -> list[np.ndarray]:
        """The matrices joined by width, so that a timed call is no short one."""
        widths = sorted({t.shape[1] for t in self.tensors.values()})
        return [
            np.concatenate([t for t in self.tensors.values() if t.shape[1] == width])
            for width in widths
        ]

    @property
    def n_weights(self) -> int:
        """Weights of all matrices."""
        return sum(t.size for t in self.tensors.values())


# Data


def make_data(name: str, n_weights: int) -> Data:
    """The weights called `name`: one matrix of about `n_weights`, or pico's own."""
    if name == "pico":
        return Data(name, pico_matrices())
    rng = np.random.default_rng([SEED, zlib.crc32(name.encode())])
    shape = (max(1, n_weights // N_COLS), N_COLS)
    return Data(name, {name: gaussian(rng, shape) if name == "gaussian" else heavy(rng, shape)})


def gaussian(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Normal weights of standard deviation `SIGMA`, float32."""
    return rng.standard_normal(shape, np.float32) * np.float32(SIGMA)


def heavy(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Student's t with 3 degrees of freedom, scaled to standard deviation `SIGMA`, float32."""
    return (rng.standard_t(3, shape) * (SIGMA / math.sqrt(3))).astype(np.float32)


def pico_matrices() -> dict[str, np.ndarray]:
    """The built-in base's matrices by name, float32; up-scaling repeats them unchanged."""
    checkpoint = SafetensorsCheckpoint(resolve_base(BUILTIN, weights=True))
    specs = checkpoint.specs().values()
    found = {s.name: ggml.to_f32(checkpoint.read(s.name)) for s in specs if len(s.shape) == 2}
    return {name: t for name, t in found.items() if t.shape[1] % 256 == 0}


def make_importance(n_cols: int, name: str = "") -> np.ndarray:
    """Stand-in for an importance matrix, float32 (n_cols,), the same for the same `name`.

    A column's importance is the mean square of its activation (llama.cpp, tools/imatrix); such
    means spread over orders of magnitude, here as a log-normal of sigma 1.
    """
    rng = np.random.default_rng([SEED, n_cols, zlib.crc32(name.encode())])
    return rng.lognormal(0.0, 1.0, n_cols).astype(np.float32)


def to_bf16(rows: np.ndarray) -> np.ndarray:
    """float32 rows rounded to bf16, as uint16 bit patterns of the same shape."""
    return ggml_quantize(rows, TYPES["BF16"], None).view(np.uint16).reshape(rows.shape)


# The two sides


def ggml_quantize(rows: np.ndarray, kind: QuantType, importance: np.ndarray | None) -> np.ndarray:
    """ggml's bytes (uint8) for float32 rows (n_rows, n_cols); importance is float32 (n_cols,)."""
    n_rows, n_cols = rows.shape
    out = np.empty(n_rows * kind.row_bytes(n_cols), np.uint8)
    weights = None if importance is None else importance.ctypes.data
    written = ggml.library().ggml_quantize_chunk(
        kind.ggml_id, rows.ctypes.data, out.ctypes.data, 0, n_rows, n_cols, weights
    )
    if written != out.nbytes:
        sys.exit(f"ggml wrote {written} bytes of {kind.name}, expected {out.nbytes}")
    return out


def native_quantize(rows: np.ndarray, kind: QuantType, importance: np.ndarray | None) -> np.ndarray:
    """Our bytes (uint8); rows are float32, or uint16 for bf16."""
    return native.quantize(rows, kind, importance, validate=False)


def checked_ggml(rows: np.ndarray, kind: QuantType, importance: np.ndarray | None) -> np.ndarray:
    """As `ggml_quantize`, then its look for values that the type cannot hold."""
    out = ggml_quantize(rows, kind, importance)
    if not ggml.library().ggml_validate_row_data(kind.ggml_id, out.ctypes.data, out.nbytes):
        sys.exit(f"ggml finds its own {kind.name} unsound")
    return out


def checked_native(rows: np.ndarray, kind: QuantType, importance: np.ndarray | None) -> np.ndarray:
    """As `native_quantize`, with its own look for values that the type cannot hold."""
    return native.quantize(rows, kind, importance, validate=True)


# Speed


def use_one_core() -> int | None:
    """Tie this process to the last core it may use; None where the system has no such call."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return core


def seconds_of(work: Callable[[], None], repeats: int) -> float:
    """Wall seconds of one of `repeats` calls, their mean."""
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def repeats_for(work: Callable[[], None], min_seconds: float) -> int:
    """Calls that last `min_seconds`; makes the uncounted first calls."""
    # A first call may load or compile something, so the second one counts where it is short.
    if (once := seconds_of(work, 1)) < 5 * min_seconds:
        once = seconds_of(work, 1)
    return max(1, math.ceil(min_seconds / once))


def time_sides(
    works: Mapping[str, Callable[[], None]], rounds: int, min_seconds: float
) -> dict[str, list[float]]:
    """Seconds of every side's call, round by round; the sides take turns.

    Args:
        works: one call of each side.
        rounds: turns of each side.
        min_seconds: a side's turn repeats its call until it lasts this long.
    """
    repeats = {side: repeats_for(work, min_seconds) for side, work in works.items()}
    seconds: dict[str, list[float]] = {side: [] for side in works}
    for _ in range(rounds):
        for side, work in works.items():
            seconds[side].append(short(seconds_of(work, repeats[side])))
    return seconds


def works_of(
    data: Data, kind: QuantType, weighted: bool, sides: Mapping[str, Quantize]
) -> dict[str, Callable[[], None]]:
    """What is timed: all of the data through ggml, through ours, and through ours from bf16."""
    f32 = data.timed
    bf16 = [to_bf16(rows) for rows in f32]
    importance = [make_importance(rows.shape[1]) if weighted else None for rows in f32]

    def through(quantize: Quantize, inputs: list[np.ndarray]) -> Callable[[], None]:
        def work() -> None:
            for rows, w in zip(inputs, importance, strict=True):
                quantize(rows, kind, w)

        return work

    return {
        "ggml": through(sides["ggml"], f32),
        "native": through(sides["native"], f32),
        "native_bf16": through(sides["native"], bf16),
    }


# Errors


def search_weights(
    rows: np.ndarray, kind: QuantType, importance: np.ndarray | None
) -> np.ndarray | None:
    """The weights of squared errors in ggml's own search, float64 (n_rows, n_cols).

    From ggml/src/ggml-quants.c, `quantize_row_*_impl` with importance w and `quantize_row_*_ref`
    without. Q2_K without importance weights absolute errors, not squares, with these weights.

    Returns:
        None where ggml does not search.
    """
    if kind.name not in WEIGHTED:
        return None
    x2 = np.square(rows, dtype=np.float64)

    def mean(n: int, values: np.ndarray = x2) -> np.ndarray:
        """Means of groups of n columns, repeated for every column."""
        return np.repeat(values.reshape(len(rows), -1, n).mean(-1), n, axis=1)

    if importance is None:
        match kind.name:
            case "Q2_K":
                return np.sqrt(x2)
            case "Q3_K" | "Q6_K" | "IQ4_NL" | "IQ4_XS" | "IQ3_S":
                return x2
            case "Q4_K" | "Q5_K":
                return np.sqrt(mean(32)) + np.sqrt(x2)
        return None
    match kind.name:
        case "Q6_K":
            return np.broadcast_to(importance.astype(np.float64), rows.shape)
        case "Q2_K":
            sigma2 = mean(256)
        case "Q3_K" | "Q4_K" | "Q5_K" | "IQ4_NL" | "IQ4_XS" | "IQ3_S" | "IQ2_S" | "IQ2_XS":
            sigma2 = 2 * mean(kind.block_weights)
        case _:
            sigma2 = mean(rows.shape[1])
    return importance * np.sqrt(sigma2 + x2)


def rmse_of(
    rows: np.ndarray, data: np.ndarray, kind: QuantType, importance: np.ndarray | None
) -> dict[str, float]:
    """Root of the mean squared error of quantized bytes (uint8) for float32 rows, in its forms.

    Returns:
        ``plain``; ``importance``, a mean weighted by importance, if that is given; ``search``, a
        mean weighted as ggml's search does, if it searches.
    """
    n_rows, n_cols = rows.shape
    step = max(1, PIECE // n_cols)
    sums: dict[str, np.ndarray] = {}
    for start in range(0, n_rows, step):
        x = rows[start : start + step]
        row_bytes = kind.row_bytes(n_cols)
        piece = data[start * row_bytes : (start + len(x)) * row_bytes]
        squares = np.square(np.subtract(ggml.dequantize(piece, kind, x.shape), x, dtype=np.float64))
        weights = {"plain": np.ones(1), "search": search_weights(x, kind, importance)}
        if importance is not None:
            weights["importance"] = importance.astype(np.float64)
        for name, w in weights.items():
            if w is not None:
                w = np.broadcast_to(w, x.shape)
                added = np.array([np.einsum("ij,ij->", w, squares), w.sum()])
                sums[name] = sums.get(name, 0.0) + added
    return {name: short(math.sqrt(a / b)) if b else 0.0 for name, (a, b) in sums.items()}


def same_blocks(a: np.ndarray, b: np.ndarray, kind: QuantType) -> float:
    """Share (0..1) of blocks whose bytes are the same."""
    return float((a == b).reshape(-1, kind.block_bytes).all(axis=1).mean())


def errors_of(data: Data, kind: QuantType, weighted: bool) -> list[dict]:
    """One line of results for each tensor."""
    lines = []
    for name, rows in data.tensors.items():
        importance = make_importance(rows.shape[1], name) if weighted else None
        theirs = ggml_quantize(rows, kind, importance)
        ours = native_quantize(rows, kind, importance)
        line = {"type": kind.name, "importance": weighted, "data": data.name, "tensor": name}
        lines.append(
            line
            | {
                "shape": list(rows.shape),
                "ggml_rmse": rmse_of(rows, theirs, kind, importance),
                "native_rmse": rmse_of(rows, ours, kind, importance),
                "same_blocks": round(same_blocks(theirs, ours, kind), 6),
            }
        )
    return lines


def short(value: float) -> float:
    """Seven digits, so that lines of results stay short."""
    return float(f"{value:.7g}")


def ratio(ours: float, theirs: float) -> float:
    """ours / theirs; 1 for two zeros."""
    if ours == theirs:
        return 1.0
    return ours / theirs if theirs else math.inf


def rmse_ratios(lines: Iterable[Mapping], form: str) -> list[float]:
    """ours / ggml of one form of RMSE, tensor by tensor; none where lines lack that form."""
    return [
        ratio(line["native_rmse"][form], line["ggml_rmse"][form])
        for line in lines
        if form in line["ggml_rmse"]
    ]


def merge_errors(path: Path, new: list[dict]) -> None:
    """Put new lines in the place of those of the same type, importance and data."""

    def key(line: Mapping) -> tuple:
        return NAMES.index(line["type"]), line["importance"], DATA.index(line["data"])

    measured = {key(line) for line in new}
    kept = [line for line in read(path) if key(line) not in measured]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(x) + "\n" for x in sorted(kept + new, key=key)))


# Printing

HEAD = """\
                     Mweights/s, median   ours/ggml  RMSE ours/ggml by search's w
type  imp data       ggml   ours   bf16   med  best   mean  worst   mean  worst"""


def speeds(line: Mapping, best: Callable[[list[float]], float]) -> tuple[float, float, float]:
    """Million weights a second of ggml, ours, and ours from bf16."""
    ggml_s, ours_s, bf16_s = (best(line["seconds"][s]) for s in ("ggml", "native", "native_bf16"))
    n = line["n_weights"] / 1e6
    return n / ggml_s, n / ours_s, n / bf16_s


def main_form(weighted: bool) -> str:
    """The RMSE that counts: weighted by importance where that was given."""
    return "importance" if weighted else "plain"


def printed(line: Mapping, errors: list[dict]) -> str:
    """A row of the table, within 80 columns."""
    theirs, ours, bf16 = speeds(line, statistics.median)
    best_theirs, best_ours, _ = speeds(line, min)
    text = f"{line['type']:5} {'yes' if line['importance'] else '–':3} {line['data']:8}"
    text += f" {theirs:6.1f} {ours:6.1f} {bf16:6.1f}"
    text += f" {ours / theirs:#5.3g} {best_ours / best_theirs:#5.3g}"
    for form in (main_form(line["importance"]), "search"):
        found = rmse_ratios(errors, form)
        cells = (f"{statistics.mean(found):.4f}", f"{max(found):.4f}") if found else ("–", "–")
        text += "".join(f" {cell:>6}" for cell in cells)
    return text


def latest(lines: Iterable[dict]) -> dict[tuple[str, bool], dict[str, dict]]:
    """The newest line of each data, by (type, importance), in the order of `NAMES`."""
    found: dict[tuple[str, bool], dict[str, dict]] = {}
    for line in lines:
        found.setdefault((line["type"], line["importance"]), {})[line["data"]] = line
    return dict(sorted(found.items(), key=lambda item: (NAMES.index(item[0][0]), item[0][1])))


def render_speeds(lines: list[dict]) -> str:
    """Speeds and their ratios, as a Markdown table; only types whose Gaussian run is there."""
    head = ["type", "importance", "ggml", "ours", "ours from bf16"]
    head += ["ours/ggml", "of the best rounds", "heavy-tailed", "pico"]
    rows = []
    for (name, weighted), by_data in latest(lines).items():
        if "gaussian" not in by_data:
            continue
        ratios = {}
        for data, line in by_data.items():
            theirs, ours, _ = speeds(line, statistics.median)
            ratios[data] = f"{ours / theirs:.2f}"
        best_theirs, best_ours, _ = speeds(by_data["gaussian"], min)
        cells = [f"{speed:.1f}" for speed in speeds(by_data["gaussian"], statistics.median)]
        cells += [ratios["gaussian"], f"{best_ours / best_theirs:.2f}"]
        cells += [ratios.get(data, "–") for data in ("heavy", "pico")]
        rows.append([name, "yes" if weighted else "no", *cells])
    return markdown_table(head, rows, left=range(2))


def render_errors(lines: list[dict], weighted: bool, form: str) -> str:
    """Ratios of one form of RMSE, ours / ggml, as a Markdown table."""
    head = ["type", "Gaussian", "heavy-tailed", "pico, mean", "pico, worst tensor"]
    rows = []
    for name in NAMES:
        of_type = [x for x in lines if (x["type"], x["importance"]) == (name, weighted)]
        by_data = {d: rmse_ratios([x for x in of_type if x["data"] == d], form) for d in DATA}
        if not any(by_data.values()):
            continue
        found = [by_data["gaussian"], by_data["heavy"], by_data["pico"]]
        cells = [f"{statistics.mean(r):.4f}" if r else "–" for r in found]
        cells.append(f"{max(by_data['pico']):.4f}" if by_data["pico"] else "–")
        rows.append([name, *cells])
    return markdown_table(head, rows)


def render(timed: list[dict], errors: list[dict]) -> str:
    """All tables, with what they were measured on."""
    newest = [line for by_data in latest(timed).values() for line in by_data.values()]
    about = {
        what: ", ".join(dict.fromkeys(str(line[what]) for line in newest))
        for what in ("cpu", "commit", "date", "llama_cpp_python", "rounds")
    }
    return "\n\n".join(
        (
            "Gaussian weights, million a second, medians of {rounds} rounds; the last two columns\n"
            "are ours/ggml on other weights ({cpu}, one thread; commit {commit},\n"
            "{date}; ggml of llama-cpp-python {llama_cpp_python}):".format(**about),
            render_speeds(timed),
            "RMSE, ours/ggml, without importance:",
            render_errors(errors, False, "plain"),
            "The same, squares weighted as ggml's own search weights them:",
            render_errors(errors, False, "search"),
            "RMSE weighted by importance, ours/ggml, with importance:",
            render_errors(errors, True, "importance"),
            "The same, squares weighted as ggml's own search weights them:",
            render_errors(errors, True, "search"),
        )
    )


def parse_types(text: str) -> list[QuantType]:
    """``Q4_K,Q6_K`` → types; a name that is not measured ends the program."""
    names = [name.strip().upper() for name in text.split(",")]
    if unknown := [name for name in names if name not in NAMES]:
        sys.exit(f"Not measured here: {', '.join(unknown)}. Types: {', '.join(NAMES)}.")
    return [TYPES[name] for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", default=",".join(NAMES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--weights", type=int, default=1 << 22, help="of the synthetic matrices")
    parser.add_argument("--data", default=",".join(DATA))
    parser.add_argument("--seconds", type=float, default=0.2, help="least length of a round")
    parser.add_argument("--quick", action="store_true", help="does it work? Figures mean nothing")
    parser.add_argument("--validate", action="store_true", help="time both sides' checks too")
    parser.add_argument("--out-suffix", help="results/quantizers<suffix>.jsonl; -quick if --quick")
    parser.add_argument("--markdown", action="store_true", help="only render what is there")
    args = parser.parse_args()

    suffix = args.out_suffix or ("-quick" if args.quick else "")
    timed_path = RESULTS / f"quantizers{suffix}.jsonl"
    errors_path = RESULTS / f"quantizer_errors{suffix}.jsonl"
    if args.markdown:
        print(render(read(timed_path), read(errors_path)))
        return
    if args.quick:
        args.rounds, args.weights, args.seconds = 2, 1 << 15, 0.01
    kinds = parse_types(args.types)
    # The cores are counted before the process is tied to one of them.
    about = machine() | {"core": use_one_core(), "threads": 1, "rounds": args.rounds}
    about |= {"llama_cpp_python": ggml.version(), "validate": args.validate}
    sides = {"ggml": ggml_quantize, "native": native_quantize}
    if args.validate:
        sides = {"ggml": checked_ggml, "native": checked_native}

    # Without importance IQ2_XS would end ggml's process, and no preset has IQ2_S.
    runs = [
        (k, w)
        for k in kinds
        for w in (False, True)
        if (k.name in WEIGHTED if w else k not in DEPENDENT)
    ]
    dtypes = (np.dtype(np.float32), np.dtype(np.uint16))
    native.prepare([(k, dtype, w) for k, w in runs for dtype in dtypes], print)
    tied = "not tied to a core" if about["core"] is None else f"tied to core {about['core']}"
    print(f"{about['cpu']}, one thread, {tied}; {args.rounds} rounds, alternating\n\n{HEAD}")
    all_data = [make_data(name, args.weights) for name in args.data.split(",")]
    all_errors = []
    for kind, weighted in runs:
        for data in all_data:
            seconds = time_sides(works_of(data, kind, weighted, sides), args.rounds, args.seconds)
            line = {"type": kind.name, "importance": weighted, "data": data.name}
            line |= {"n_weights": data.n_weights, "seconds": seconds} | about
            errors = errors_of(data, kind, weighted)
            print(printed(line, errors), flush=True)
            # Line by line, so that a run cut short has not measured for nothing.
            append(timed_path, [line])
            all_errors += [e | {"commit": about["commit"]} for e in errors]
    merge_errors(errors_path, all_errors)


if __name__ == "__main__":
    main()
