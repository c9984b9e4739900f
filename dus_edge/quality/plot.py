"""Divergence against file size as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dus_edge.errors import UsageError
from dus_edge.files import output_files, pwrite_all
from dus_edge.packages import require
from dus_edge.quality.compare import Results
from dus_edge.quality.frontier import frontier
from dus_edge.quality.label_layout import Box, boxes_along, place_labels
from dus_edge.quality.names import labels
from dus_edge.words import cut_end, cut_middle, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

_SUFFIXES = (".png", ".svg")
#: Name, marker and fill by kind of model: told apart by shape and by light and dark, so grey is
#: enough.
KIND_STYLES = {
    "gguf": ("GGUF", "o", "#20506e"),
    "gptq": ("GPTQ", "s", "#ffffff"),
    "bitsandbytes": ("bitsandbytes", "^", "#b0b0b0"),
    "hf": ("safetensors", "D", "#000000"),
}
#: The same of GGUF files by how their types were chosen (`Origin.way`), where those differ.
WAY_STYLES = {
    "preset": ("preset", "o", "#20506e"),
    "preset + imatrix": ("preset + imatrix", "s", "#20506e"),
    "preset + feedback": ("preset + feedback", "v", "#20506e"),
    "mix": ("mix", "D", "#ffffff"),
    "mix + imatrix": ("mix + imatrix", "D", "#c8761a"),
    "mix + feedback": ("mix + feedback", "X", "#c8761a"),
}
INK, FAINT, LINE = "#1a1a1a", "#d0d0d0", "#8a8a8a"
#: Share of a file's size that the axis of sizes spans at least: presets differ by some bytes.
NARROWEST = 0.05
_MOST_LABEL = 36
_LABEL = {"fontsize": 8.5, "color": INK, "ha": "left", "va": "bottom"}


def plot(results: Results, path: Path) -> None:
    """Write mean KL divergence (log scale, bars of one standard error) against file size.

    A line joins the files on the frontier: none of their size or below diverges less.

    The background is white and opaque, so that the picture can be read on a light page as on a
    dark one. Candidates that do not diverge at all have no place on a log scale; the line
    below the title names them. Equal results give equal files.

    Args:
        results: of `quality`.
        path: ends in ``.png`` or ``.svg``; an existing file is replaced.

    Raises:
        UsageError: another ending.
        DependencyError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    if path.suffix not in _SUFFIXES:
        raise UsageError(f"{path}: plots are written as {' or '.join(_SUFFIXES)}.")
    data = render_plot(results, path.suffix[1:])
    with output_files([(path, len(data))]) as (fd,):
        pwrite_all(fd, data, 0)


def render_plot(results: Results, form: str) -> bytes:
    """The picture's bytes; `form` is ``png`` or ``svg``."""
    check_plots()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # The salt of ids in SVG files, which is random otherwise.
    with matplotlib.rc_context({"svg.hashsalt": "dus-edge", "font.family": "DejaVu Sans"}):
        figure = _draw(results)
        FigureCanvasAgg(figure)
        write_labels(figure.axes[0], *_shown(results), line=_frontier(results))
        out = io.BytesIO()
        date = {"Date": None} if form == "svg" else {"Software": None}
        figure.savefig(out, format=form, metadata=date)
    return out.getvalue()


def check_plots() -> None:
    """Find out whether plots can be drawn.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    require("plots", "plots are drawn by")


def _unit(results: Results) -> tuple[float, str]:
    largest = max(c.info.n_bytes for c in results.candidates)
    return (2.0**30, "GiB") if largest >= 2**30 else (2.0**20, "MiB")


def _shown(results: Results) -> tuple[list[tuple[float, float]], list[str]]:
    """Points in data coordinates and their names; those without divergence are left out."""
    scale, _ = _unit(results)
    named = zip(labels(results), results.candidates, strict=True)
    found = [
        ((c.info.n_bytes / scale, c.total.kl.value), name)
        for name, c in named
        if c.total.kl.value > 0
    ]
    return [point for point, _ in found], [cut_middle(name, _MOST_LABEL) for _, name in found]


def _frontier(results: Results) -> list[tuple[float, float]]:
    """The points of the frontier, in data coordinates, from the smallest file on."""
    scale, _ = _unit(results)
    return sorted(
        (c.info.n_bytes / scale, c.total.kl.value)
        for c, on in zip(results.candidates, frontier(results), strict=True)
        if on and c.total.kl.value > 0
    )


def _styles(results: Results) -> list[tuple[str, str, str]]:
    """Name, marker and fill of every candidate; how types were chosen only where that differs."""
    origins = [c.info.origin for c in results.candidates if c.info.kind == "gguf"]
    ways = {origin.way for origin in origins if origin}
    return [
        WAY_STYLES[origin.way]
        if c.info.kind == "gguf" and (origin := c.info.origin) and ways != {"preset"}
        else KIND_STYLES[c.info.kind]
        for c in results.candidates
    ]


def _draw(results: Results) -> Any:
    """The figure but for the labels."""
    from matplotlib.figure import Figure

    scale, unit = _unit(results)
    figure = Figure(figsize=(7.2, 4.8), dpi=160, facecolor="white", layout="constrained")
    axes = figure.add_subplot(facecolor="white")
    drawn = [c for c in results.candidates if c.total.kl.value > 0]
    if drawn:
        axes.set_yscale("log")
    if len(line := _frontier(results)) > 1:
        axes.plot(*zip(*line, strict=True), color=LINE, linewidth=1.4, label="frontier", zorder=1.5)
    styles = _styles(results)
    for style in dict.fromkeys([*WAY_STYLES.values(), *KIND_STYLES.values()]):
        name, marker, fill = style
        members = [c for c, own in zip(results.candidates, styles, strict=True) if own == style]
        members = [c for c in members if c.total.kl.value > 0]
        if not members:
            continue
        kl = [c.total.kl.value for c in members]
        # A bar down to zero or below would have no end on a log scale.
        errors = [min(c.total.kl.error or 0.0, 0.9 * c.total.kl.value) for c in members]
        sizes = [c.info.n_bytes / scale for c in members]
        axes.errorbar(sizes, kl, yerr=errors, fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
        axes.plot(
            sizes,
            kl,
            marker,
            label=name,
            color=INK,
            markerfacecolor=fill,
            markeredgewidth=0.9,
            markersize=6,
        )
    axes.margins(0.12, 0.14)
    low, high = axes.get_xlim()
    if (lacking := NARROWEST * high - (high - low)) > 0:
        axes.set_xlim(low - lacking / 2, high + lacking / 2)
    axes.grid(True, which="major", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"File size, {unit}", color=INK)
    axes.set_ylabel("Mean KL divergence from the reference,\nnats per token", color=INK)
    axes.tick_params(colors=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(framealpha=1, facecolor="white", edgecolor=FAINT, labelcolor=INK, fontsize=8.5)
    axes.set_title(_caption(results), fontsize=8.5, color=INK, loc="left", linespacing=1.4)
    return figure


def _caption(results: Results) -> str:
    reference = results.reference
    n_tokens = sum(results.chunks.values()) * (results.n_ctx - 1 - results.first_scored)
    lines = [
        f"Reference: {cut_end(reference.name, 48)} ({format_bytes(reference.n_bytes)}); "
        f"{n_tokens:,} tokens of {', '.join(results.chunks)}"
    ]
    same = [
        label
        for label, c in zip(labels(results), results.candidates, strict=True)
        if c.total.kl.value <= 0
    ]
    if same:
        lines.append(f"No divergence at all: {', '.join(same)}")
    return "\n".join(cut_end(line, 100) for line in lines)


# -- labels -------------------------------------------------------------------------------------


def write_labels(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    line: Sequence[tuple[float, float]] = (),
) -> None:
    """Write each name beside its point where it covers nothing of what was drawn before.

    Lines that words must not cross are those of collections (`errorbar`, `hlines`), and there is
    room for a legend. The figure's layout is final after this.

    Args:
        axes: with an Agg canvas behind.
        points: in data coordinates.
        names: of each.
        line: points of a line that words must not cross either.
    """
    if not points:
        return
    figure = axes.figure
    figure.draw_without_rendering()
    # The layout is final now; labels must not move it.
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()
    to_points = 72 / figure.dpi

    def in_points(box: Bbox) -> Box:
        x0, y0, x1, y1 = (v * to_points for v in box.extents)
        return x0, y0, x1, y1

    obstacles = [
        in_points(path.get_extents(axes.transData).padded(1))
        for bars in axes.collections
        for path in bars.get_paths()
    ]
    if line:
        obstacles += boxes_along([tuple(xy * to_points) for xy in axes.transData.transform(line)])
    if (legend := axes.get_legend()) is not None:
        obstacles.append(in_points(legend.get_window_extent(renderer)))
    texts = [
        axes.annotate(name, point, (0, 0), textcoords="offset points", **_LABEL)
        for name, point in zip(names, points, strict=True)
    ]
    extents = [in_points(text.get_window_extent(renderer)) for text in texts]
    centres = [tuple(xy * to_points) for xy in axes.transData.transform(points)]
    places = place_labels(
        centres,
        [(x1 - x0, y1 - y0) for x0, y0, x1, y1 in extents],
        obstacles,
        in_points(axes.get_window_extent(renderer)),
    )
    for text, (x, y), point, place in zip(texts, centres, points, places, strict=True):
        text.set_position((place.box[0] - x, place.box[1] - y))
        if place.has_line:
            axes.annotate(
                "",
                point,
                place.anchor,
                textcoords="offset points",
                arrowprops={
                    "arrowstyle": "-",
                    "color": "#606060",
                    "linewidth": 0.7,
                    "shrinkA": 1.5,
                    "shrinkB": 3.5,
                },
            )
