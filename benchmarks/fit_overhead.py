"""Fit the rule of CUDA's overhead to published readings, and show every card beside it.

    python benchmarks/fit_overhead.py

Prints the constants of `dus_edge/predict/memory/cuda.py` and three tables: the context by card,
loaded processes, and what Windows holds beside the context. Nothing is written.

The context is the same at every start of a process on a card, and desktops and other processes
only add to it. So of each card the least of its readings under Linux counts, and the line through
the cards is the one of the least absolute deviations, which one card with something more cannot
pull. What a loaded process takes more than that line is the median of the cards' medians.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from common import read_published

from dus_edge.predict.memory.cuda import LOADED_MIB, THREADS, context_bytes, cuda_overhead_bytes
from dus_edge.predict.stored_model import MIB
from dus_edge.words import markdown_table

#: The one constant that the rule replaced, MiB.
BEFORE = 135

Row = Mapping[str, Any]


def published() -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """The readings, and the facts of their cards."""
    stored = read_published("overhead")
    return stored["rows"], stored["cards"]


def alone(row: Row) -> bool:
    """Whether a reading is of the process alone, as far as is said."""
    return row["shared"] is False or (row["shared"] is None and row["system"] == "Linux")


def threads(card: Mapping[str, Any]) -> float:
    """Resident threads of a card, in units of 1,024."""
    return card["n_sm"] * THREADS[card["compute_capability"]] / 1024


def by_card(rows: Iterable[Row]) -> dict[str, list[float]]:
    """What was taken, MiB, by card."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["device"], []).append(row["taken_mib"])
    return found


def contexts(rows: Iterable[Row]) -> dict[str, float]:
    """The least reading of each card before anything is loaded, MiB."""
    chosen = [r for r in rows if r["measured"] != "exit" and r["system"] == "Linux" and alone(r)]
    return {name: min(taken) for name, taken in by_card(chosen).items()}


def least_deviations(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Intercept and slope of the line of the least sum of absolute deviations.

    Such a line goes through two of the points, so all pairs are tried.
    """

    def cost(line: tuple[float, float]) -> float:
        return sum(abs(y - line[0] - line[1] * x) for x, y in points)

    lines = []
    for (x0, y0), (x1, y1) in itertools.combinations(sorted(points), 2):
        if x0 != x1:
            slope = (y1 - y0) / (x1 - x0)
            lines.append((y0 - slope * x0, slope))
    return min(lines, key=cost)


def fit(rows: list[dict[str, Any]], cards: Mapping[str, Any]) -> tuple[float, float, float]:
    """The context's intercept and slope for 1,024 threads, and what a load adds; MiB."""
    least = contexts(rows)
    start, slope = least_deviations([(threads(cards[n]), mib) for n, mib in least.items()])
    loaded = by_card(r for r in rows if r["measured"] == "exit" and alone(r))
    more = [
        statistics.median(taken) - start - slope * threads(cards[name])
        for name, taken in loaded.items()
    ]
    return start, slope, statistics.median(more)


def main() -> None:
    rows, cards = published()
    start, slope, more = fit(rows, cards)
    print(
        f"context {start:.2f} MiB + {slope:.3f} MiB for 1,024 threads; loaded {more:.1f} MiB more"
    )

    def rule(name: str) -> float:
        return context_bytes(cards[name]["n_sm"], cards[name]["compute_capability"]) / MIB

    def whole(name: str) -> float:
        return cuda_overhead_bytes(cards[name]["n_sm"], cards[name]["compute_capability"]) / MIB

    least = contexts(rows)
    every = by_card(r for r in rows if r["measured"] != "exit" and r["system"] == "Linux")
    print("\nContext, Linux (MiB)\n")
    print(
        markdown_table(
            ["Card", "SMs", "Threads / 1,024", "Least read", "Rule", "Error", "All read"],
            [
                [
                    name,
                    str(cards[name]["n_sm"]),
                    f"{threads(cards[name]):.0f}",
                    f"{mib:.0f}",
                    f"{rule(name):.0f}",
                    f"{rule(name) - mib:+.0f}",
                    " ".join(f"{x:.0f}" for x in sorted(every[name])),
                ]
                for name, mib in sorted(least.items(), key=lambda x: threads(cards[x[0]]))
            ],
        )
    )
    print(f"\nLoaded (MiB; the rule is the context's and {LOADED_MIB:g})\n")
    print(
        markdown_table(
            ["Card", "Read", "Rule", f"Error of {BEFORE} before"],
            [
                [
                    r["device"],
                    f"{r['taken_mib']:.0f}",
                    f"{whole(r['device']):.0f} ({whole(r['device']) - r['taken_mib']:+.0f})",
                    f"{BEFORE - r['taken_mib']:+.0f}",
                ]
                for r in rows
                if r["measured"] == "exit" and alone(r)
            ],
        )
    )
    held = by_card(
        {"device": r["device"], "taken_mib": r["taken_mib"] - rule(r["device"])}
        for r in rows
        if r["measured"] == "start" and r["system"] == "Windows"
    )
    print("\nWindows: total less free less the context's rule (MiB)\n")
    print(
        markdown_table(
            ["Card", "Readings", "Median"],
            [[n, str(len(x)), f"{statistics.median(x):.0f}"] for n, x in sorted(held.items())],
        )
    )
    print(f"\nMedian of the cards: {statistics.median(map(statistics.median, held.values())):.0f}")


if __name__ == "__main__":
    main()
