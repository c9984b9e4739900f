"""The section of TABLES.md on presets, mixes and feedback at the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dus_edge.quality.frontier import SAME_SIZE
from dus_edge.tables.frontier.medians import MedianRun, median_runs
from dus_edge.tables.frontier.panels import about_runs, language_words, model_words
from dus_edge.tables.measured import cell_with_error
from dus_edge.words import format_bytes, markdown_table


def divergence_markdown(lines: Iterable[Mapping[str, Any]]) -> str:
    """A table for each model and text, presets by ways; empty where nothing was measured."""
    groups = median_runs(lines)
    if not groups:
        return ""
    parts = [
        "## Divergence\n",
        "Mean KL of files from their model in nats per token on text held out, measured by "
        "`bench_divergence.py`: each preset by ggml's quantizers and by ours, with importance "
        "(*imatrix*), as a mix of types of the same size, and with error feedback. ± is one "
        "standard error over chunks of text. **Bold** is on the frontier: no file of the table as "
        f"large (within {100 * SAME_SIZE:g} %) or smaller diverges less.\n",
    ]
    for runs in groups:
        parts.append(f"### {model_words(runs[0].model)}: {language_words(runs[0].text)}\n")
        parts.append(f"{about_runs(runs)}.\n")
        parts.append(_table(runs))
    return "\n".join(parts)


def _table(runs: Sequence[MedianRun]) -> str:
    ways = list(dict.fromkeys(run.way for run in runs))
    cells: dict[str, dict[str, str]] = {}
    sizes: dict[str, int] = {}
    for run in runs:
        kl = cell_with_error(run.kl_nats, run.kl_nats_error)
        cells.setdefault(run.preset, {})[run.way] = f"**{kl}**" if run.on_frontier else kl
        sizes[run.preset] = max(run.file_bytes, sizes.get(run.preset, 0))
    rows = [
        [preset, format_bytes(sizes[preset]), *(found.get(way, "") for way in ways)]
        for preset, found in cells.items()
    ]
    return markdown_table(["preset", "size", *ways], rows) + "\n"
