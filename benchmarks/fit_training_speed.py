"""Which share of a card's matrix rate published trainings reached.

    python benchmarks/fit_training_speed.py     # prints every run, writes data/training_speed.toml

A run's operations are those of `dus_edge/predict/training/speed.py`: forward twice the parameters
that multiply, and attention; backward once more for inputs and once for weights, which adapters
spare; forward again with checkpointing. Runs of fewer than 1,024 tokens at a time are shown and not
counted.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from common import HERE, read_published, toml_text

from dus_edge.predict.devices import find_device
from dus_edge.predict.training.speed import BUSY_TOKENS
from dus_edge.words import markdown_table

TARGET = HERE.parent / "dus_edge" / "data" / "training_speed.toml"
ABOUT = (
    "Share of the dense 16-bit matrix rate that published trainings reached, by method: lowest,",
    "geometric mean, highest, and how many. Written by benchmarks/fit_training_speed.py from",
    "published/training.json, whose rows name their sources. Each row counts the operations of",
    "predict/training/speed.py, the second forward of checkpointing among them.",
)


def flops(row: Mapping[str, Any]) -> float:
    """Operations of a token."""
    attention = 2 * row["hidden_size"] * row["sequence"] * row["n_layers"]
    forward = 2 * row["matrices"] + attention
    weights = 2 * row["matrices"] if row["method"] == "full" else 0
    return 2 * forward + attention + weights + (forward if row["checkpointing"] else 0)


def efficiency(row: Mapping[str, Any]) -> float:
    """Share of the card's rate."""
    rate = find_device(row["device"]).fp16_tflops_dense
    assert rate is not None
    return row["tokens_per_s"] * flops(row) / (rate * 1e12)


def counted(row: Mapping[str, Any]) -> bool:
    """Whether a run is of enough tokens at a time."""
    return row["sequence"] * row["batch"] >= BUSY_TOKENS


def fitted() -> dict[str, dict[str, float]]:
    """The tables of the data file."""
    tables = {}
    for method in ("full", "lora", "qlora"):
        found = [
            efficiency(r)
            for r in read_published("training")["rows"]
            if r["method"] == method and counted(r)
        ]
        middle = math.exp(sum(map(math.log, found)) / len(found))
        tables[method] = {
            "low": min(found),
            "middle": middle,
            "high": max(found),
            "rows": len(found),
        }
    return tables


def main() -> int:
    rows = read_published("training")["rows"]
    cells = (
        [
            r["model"],
            r["method"],
            r["device"],
            f"{r['batch']}x{r['sequence']}",
            f"{r['tokens_per_s']:,.0f}",
            f"{efficiency(r):.2f}" + ("" if counted(r) else " (not counted)"),
        ]
        for r in rows
    )
    head = ["model", "method", "card", "tokens", "tok/s", "efficiency"]
    print(markdown_table(head, cells, left=(0, 1, 2)))
    TARGET.write_text(toml_text(ABOUT, fitted()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
