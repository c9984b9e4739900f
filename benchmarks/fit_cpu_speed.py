"""Fit the two rules of processors alone to published runs, each processor left out in turn.

    python benchmarks/fit_cpu_speed.py [--markdown]

Writes `dus_edge/data/cpu_speed.toml` and `results/cpu_speed.jsonl`. Takes a second. Every constant
is a geometric mean over processors. The interval: the root mean square of log(measured / predicted)
of processors left out, times the 90 % quantile of Student's t with as many degrees of freedom as
processors, less one.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from common import RESULTS, read_published, toml_text
from fit_gptq_speed import T90
from fit_speed import work_of

from dus_edge import data
from dus_edge.families.shape import Shape
from dus_edge.files import write_text
from dus_edge.predict.processors import memory_gbps
from dus_edge.predict.speed.cpu import prompt_operations, token_seconds
from dus_edge.predict.speed.work import Work
from dus_edge.words import markdown_table

TOML = Path(data.__file__).parent / "cpu_speed.toml"
#: Mean depth of 128 tokens from an empty cache.
DEPTH = 64
ABOUT = (
    "Rates of dus_edge/predict/speed/cpu.py: share of the memory's nominal rate, and of a core",
    "in a prompt, 10^9 operations a second. Written by benchmarks/fit_cpu_speed.py from",
    "published/cpu.json, whose rows name their sources. interval: half widths of",
    "log(measured / predicted), 80 %. left_out: of processors that the constants never saw.",
)


def model_work(row: Mapping) -> Work:
    """The work of a row's model; a mixture of experts by the weights that a token passes."""
    if "weights_b" not in row:
        return work_of({**row, "notes": None})
    shape = Shape(
        n_layers=32,
        hidden_size=4096,
        intermediate_size=14336,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        vocab_size=32000,
        context_length=1,
    )
    return Work(shape, {row["quant"]: row["weights_b"] * 1e9})


def constant(row: Mapping, which: str) -> tuple[str, float] | None:
    """Which constant a row speaks of, and the value that would make the rule exact."""
    rate = row.get("tg128_tps" if which == "tg" else "pp512_tps")
    if rate is None:
        return None
    work = model_work(row)
    if which == "tg":
        exact = token_seconds(work, memory_gbps(row["memory"], row["channels"]), 1, DEPTH) * rate
        return ("laptop" if row["laptop"] else "desktop"), exact
    return row["simd"], prompt_operations(work, 512) / 512 * rate / row["cores"] / 1e9


def means(values: Sequence[tuple[str, str, float]]) -> dict[str, float]:
    """Constant → geometric mean over processors of (constant, processor, value)."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, cpu, value in values:
        found.setdefault(name, {}).setdefault(cpu, []).append(math.log(value))
    return {
        name: math.exp(sum(sum(x) / len(x) for x in cpus.values()) / len(cpus))
        for name, cpus in sorted(found.items())
    }


def left_out(rows: Sequence[Mapping], which: str) -> list[dict]:
    """Every row with the rate that constants without its processor predict."""
    known = [(row, *c) for row in rows if (c := constant(row, which))]
    lines = []
    for row, name, value in known:
        others = [(n, r["cpu"], v) for r, n, v in known if r["cpu"] != row["cpu"]]
        measured = row["tg128_tps" if which == "tg" else "pp512_tps"]
        lines.append(
            {
                "kind": which,
                "row": row["row"],
                "cpu": row["cpu"],
                "memory": row.get("memory"),
                "simd": row["simd"],
                "model": f"{row['model']} {row['quant']}",
                "measured": measured,
                "predicted": round(measured * means(others)[name] / value, 3),
            }
        )
    return lines


def half_width(lines: Sequence[Mapping]) -> float:
    """Half of the 80 % interval; a processor counts once."""
    errors: dict[str, list[float]] = {}
    for x in lines:
        errors.setdefault(x["cpu"], []).append(math.log(x["measured"] / x["predicted"]) ** 2)
    square = sum(sum(e) / len(e) for e in errors.values()) / len(errors)
    return math.sqrt(square) * T90[len(errors) - 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--markdown", action="store_true", help="print the table")
    args = parser.parse_args()
    rows = read_published("cpu")["rows"]
    tables: dict[str, dict] = {"interval": {}, "left_out": {}}
    lines: list[dict] = []
    for which, name in (("tg", "efficiency"), ("pp", "core_gflops")):
        known = [(c[0], row["cpu"], c[1]) for row in rows if (c := constant(row, which))]
        tables[name] = means(known)
        own = left_out(rows, which)
        half = half_width(own)
        tables["interval"][which] = half
        errors = [abs(x["predicted"] / x["measured"] - 1) for x in own]
        inside = [abs(math.log(x["measured"] / x["predicted"])) <= half for x in own]
        tables["left_out"] |= {
            f"{which}_rows": len(own),
            f"{which}_mean_absolute_error": sum(errors) / len(errors),
            f"{which}_coverage": sum(inside) / len(inside),
        }
        lines += own
    write_text(TOML, toml_text(ABOUT, tables))
    write_text(RESULTS / "cpu_speed.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
    if args.markdown:
        head = [
            "",
            "processor",
            "memory",
            "instructions",
            "model",
            "measured",
            "predicted",
            "error",
        ]
        cells = (
            [
                x["kind"], x["cpu"], x["memory"] or "–", x["simd"], x["model"],
                f"{x['measured']:.4g}", f"{x['predicted']:.4g}",
                f"{100 * (x['predicted'] / x['measured'] - 1):+.0f} %",
            ]
            for x in lines
        )  # fmt: skip
        print(markdown_table(head, cells, left=range(5)))
    print(tables)


if __name__ == "__main__":
    main()
