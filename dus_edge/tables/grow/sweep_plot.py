"""Loss above the base's against depth, and against the angle of the seam."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dus_edge.quality.plot import FAINT, INK
from dus_edge.tables.grow.seam_plot import render_figure
from dus_edge.tables.grow.swept import SweepResults, SweptPlan
from dus_edge.upscale.blocks import repeated_outliers
from dus_edge.words import cut_middle

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = ("o", "s", "^", "D", "v", "P")
#: Plans that are named in the picture, of each way of making copies.
_MOST_NAMED = 7


def render_sweep(results: SweepResults, form: str) -> bytes:
    """The picture's bytes; equal results give equal ones.

    Args:
        results: of `sweep`.
        form: ``png`` or ``svg``.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    return render_figure(lambda: draw_sweep(results), form)


def draw_sweep(results: SweepResults) -> Any:
    """The figure: two panels that share the axis of losses, on a canvas of Agg."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.9), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    _by_depth(left, results)
    colours = _by_angle(right, results)
    if colours is not None:
        scale = figure.colorbar(colours, ax=right)
        scale.set_label("layers of the result", color=INK, fontsize=9)
        scale.ax.tick_params(labelsize=8)
    name = cut_middle(results.name, 40)
    left.set_title(f"{name}, untrained: loss by depth", loc="left", fontsize=9.5, color=INK)
    right.set_title("and by the angle across the seam", loc="left", fontsize=9.5, color=INK)
    left.set_ylabel("loss above the base's, nats a token", color=INK, fontsize=9)
    for axes in (left, right):
        axes.tick_params(colors=INK, labelsize=8)
        axes.grid(color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure


def _by_depth(axes: Axes, results: SweepResults) -> None:
    from matplotlib.ticker import MaxNLocator

    methods = list(dict.fromkeys(p.plan.method for p in results.plans))
    for k, method in enumerate(methods):
        own = [p for p in results.plans if p.plan.method == method]
        best = [p for p in results.best if p.plan.method == method]
        colour, marker = f"C{k}", _MARKERS[k % len(_MARKERS)]
        axes.errorbar(
            [p.plan.depth for p in own],
            [p.loss for p in own],
            yerr=[results.loss_width(p) or 0 for p in own],
            fmt=marker,
            color=colour,
            markersize=4,
            alpha=0.65,
            elinewidth=0.7,
            label=method.spelled or "copies as they are",
        )
        axes.plot([p.plan.depth for p in best], [p.loss for p in best], color=colour, linewidth=1.1)
        _name(axes, best)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_xlabel("layers of the result", color=INK, fontsize=9)
    axes.legend(loc="upper left", fontsize=7.5, frameon=False, labelcolor=INK)


def _name(axes: Axes, best: list[SweptPlan]) -> None:
    """Labels of some plans on the line, spread evenly over it."""
    if not best:
        return
    shown = np.unique(np.linspace(0, len(best) - 1, min(len(best), _MOST_NAMED)).round())
    for i in shown.astype(int):
        p = best[i]
        axes.annotate(
            cut_middle(p.candidate.label, 18),
            (p.plan.depth, p.loss),
            xytext=(3, -9),
            textcoords="offset points",
            fontsize=6.5,
            color=INK,
        )


def _by_angle(axes: Axes, results: SweepResults) -> Any:
    """Plans of plain copies; those that repeat an outlier are drawn as diamonds."""
    own = [p for p in results.plans if p.angle is not None and p.plan.method.is_plain]
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("angle, units of π", color=INK, fontsize=9)
    if not own:
        return None
    depths = [p.plan.depth for p in own]
    limits = {"vmin": min(depths), "vmax": max(depths) + (min(depths) == max(depths))}
    image = None
    outliers = results.geometry.outliers
    for repeats, marker, said in (
        (False, "o", "repeats no outlier"),
        (True, "D", "repeats an outlier layer"),
    ):
        some = [p for p in own if bool(repeated_outliers(p.plan, outliers)) == repeats]
        if some:
            image = axes.scatter(
                [p.angle or 0.0 for p in some],
                [p.loss for p in some],
                c=[p.plan.depth for p in some],
                marker=marker,
                s=22,
                cmap="viridis",
                label=said,
                **limits,
            )
    axes.legend(loc="upper left", fontsize=7.5, frameon=False, labelcolor=INK)
    return image
