"""All angles as a heat map, the plan's seams drawn in; block influence of the layers below."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from dus_edge.packages import require
from dus_edge.quality.plot import FAINT, INK
from dus_edge.tables.grow.seam import SeamResults, three_digits
from dus_edge.words import cut_end, cut_middle

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PLAIN, _STRONG = "#20506e", "#b0522a"
#: Seams that are told one by one; where there are more, only the first.
_MOST_SEAMS = 5
_MOST_OUTLIERS = 12


def check_seam_plot() -> None:
    """Find out whether the picture can be drawn.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    require("plots", "the heat map of the streams is drawn by")


def render_seams(results: SeamResults, form: str) -> bytes:
    """The picture's bytes; equal results give equal ones.

    Args:
        results: of `seam`.
        form: ``png`` or ``svg``.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    return render_figure(lambda: draw_seams(results), form)


def render_figure(draw: Callable[[], Any], form: str) -> bytes:
    """The bytes of a figure, the same each time.

    Args:
        draw: makes the figure.
        form: ``png`` or ``svg``.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    check_seam_plot()
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "dus-edge", "font.family": "DejaVu Sans"}):
        out = io.BytesIO()
        date = {"Date": None} if form == "svg" else {"Software": None}
        _settled(draw()).savefig(out, format=form, metadata=date)
    return out.getvalue()


def _settled(figure: Any) -> Any:
    """The figure with its axes where the layout puts them, less the last digits.

    Those differ from one time to the next, and the names of clip paths in an SVG with them.
    """
    figure.draw_without_rendering()
    places = [(axes, axes.get_position().bounds) for axes in figure.axes]
    figure.set_layout_engine("none")
    for axes, bounds in places:
        axes.set_position([round(x, 6) for x in bounds])
    return figure


def draw_seams(results: SeamResults) -> Any:
    """The figure: the map, the scale of its colours, and the dots, on a canvas of Agg."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 7.6), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(4, 1), width_ratios=(30, 1))
    axes = figure.add_subplot(grid[0, 0])
    below = figure.add_subplot(grid[1, 0], sharex=axes)
    image = _map(axes, results)
    _mark(axes, results)
    _influences(below, results)
    scale = figure.colorbar(image, cax=figure.add_subplot(grid[0, 1]))
    scale.set_label("angle, units of π", color=INK, fontsize=9)
    scale.ax.tick_params(labelsize=8)
    for part in (axes, below):
        part.tick_params(colors=INK, labelsize=8)
        for side in ("top", "right"):
            part.spines[side].set_visible(False)
    return figure


def _map(axes: Axes, results: SeamResults) -> Any:
    """Half of the matrix: the other half is the same, and has room for words."""
    from matplotlib.ticker import MaxNLocator

    angles = results.geometry.angles
    lower = np.tril(np.ones(angles.shape, bool), -1)
    image = axes.imshow(
        np.ma.array(angles, mask=lower), cmap="viridis", aspect="auto", interpolation="nearest"
    )
    title = f"{cut_middle(results.name, 40)}: angles between the inputs of its layers"
    plan = cut_end(results.plan.spelled, 60)
    axes.set_title(f"{title}\nPlan {plan}", loc="left", fontsize=9.5, color=INK, linespacing=1.4)
    axes.set_ylabel("input of layer", color=INK, fontsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    return image


def _mark(axes: Axes, results: SeamResults) -> None:
    """The seams, and the best block of each size."""
    best = [b.block for b in results.best if b.block is not None]
    if best:
        axes.plot(
            [end for _, end in best],
            [start for start, _ in best],
            linestyle="none",
            marker="o",
            markersize=3.2,
            markerfacecolor="white",
            markeredgecolor=INK,
            markeredgewidth=0.6,
            label="best block of each size (row: start, column: end)",
        )
    shown = results.seams[:_MOST_SEAMS]
    few = len(shown) == len(results.seams)
    style = {
        "linestyle": "none",
        "marker": "s",
        "markersize": 8 if few else 4,
        "markerfacecolor": "none",
        "markeredgecolor": _STRONG,
        "markeredgewidth": 1.8 if few else 0.8,
    }
    for c in results.seams:
        sides = sorted((c.seam.left + 1, c.seam.right))
        axes.plot([sides[1]], [sides[0]], **style)
    for c in shown:
        ratio = three_digits(c.rms_ratio)
        said = f"seam {c.seam.left} → {c.seam.right}: {c.angle:.3f}, RMS × {ratio}"
        axes.plot([], [], label=said, **style)
    if more := len(results.seams) - len(shown):
        axes.plot([], [], label=f"and {more} more seams", **style)
    if best or results.seams:
        axes.legend(loc="lower left", fontsize=7.5, frameon=False, labelcolor=INK)


def _influences(axes: Axes, results: SeamResults) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    g = results.geometry
    layers = np.arange(g.n_layers)
    outlier = np.isin(layers, g.outliers)
    for chosen, marker, colour in ((~outlier, "o", _PLAIN), (outlier, "D", _STRONG)):
        # A layer stands between its input and its output.
        axes.plot(layers[chosen] + 0.5, g.influence[chosen], marker, color=colour, markersize=4.5)
    axes.axhline(g.outlier_limit, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    if g.influence.min() > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    shown = ", ".join(map(str, g.outliers[:_MOST_OUTLIERS]))
    if len(g.outliers) > _MOST_OUTLIERS:
        shown += ", …"
    title = f"Block influence; outliers, above the dashed line: {shown or 'none'}"
    axes.set_title(title, loc="left", fontsize=9.5, color=INK)
    axes.set_xlabel("layer, and input of layer", color=INK, fontsize=9)
    axes.set_ylabel("1 − cosine", color=INK, fontsize=9)
    axes.margins(y=0.15)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
