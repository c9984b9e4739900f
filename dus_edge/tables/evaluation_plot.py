"""Scores against file size as a picture: the suite's average, and each task by itself."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dus_edge.eval.paired import ComparedScore, MeanScore, ModelSummary
from dus_edge.eval.results import EvalResults
from dus_edge.quality.plot import FAINT, INK, KIND_STYLES, check_plots, write_labels
from dus_edge.words import cut_end, cut_middle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
#: Inches; the first panel grows with each model beyond so many.
_WIDTH, _TOP, _ROW, _MORE, _MANY = 7.2, 4.2, 1.9, 0.12, 12
#: From this ratio of the largest to the smallest file on, sizes are on a log scale.
_WIDE = 1.6
#: Tasks that are drawn by themselves; the page has them all.
_MOST_TASKS = 12
_MOST_LABEL = 28

#: A score and its difference to the reference, of one model.
_Pick = Callable[[ModelSummary], tuple[MeanScore, ComparedScore | None]]


def render_evaluation(
    results: EvalResults,
    summaries: Sequence[ModelSummary],
    names: Sequence[str],
    titles: Mapping[str, str],
    form: str,
) -> bytes:
    """The picture's bytes. Equal results give equal files.

    Bars are 95 % intervals of the paired difference to the reference, set on the reference's
    score, which is the broken line: a bar that does not reach it is a clear difference.

    Args:
        results: of one model or more.
        summaries: of `paired.summarize_models`.
        names: short ones, of the models.
        titles: of the groups.
        form: ``png`` or ``svg``.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    check_plots()
    import matplotlib

    # The salt of ids in SVG files is random otherwise.
    with matplotlib.rc_context({"svg.hashsalt": "dus-edge", "font.family": "DejaVu Sans"}):
        figure = evaluation_figure(results, summaries, names, titles)
        out = io.BytesIO()
        date = {"Date": None} if form == "svg" else {"Software": None}
        figure.savefig(out, format=form, metadata=date)
    return out.getvalue()


def evaluation_figure(
    results: EvalResults,
    summaries: Sequence[ModelSummary],
    names: Sequence[str],
    titles: Mapping[str, str],
) -> Figure:
    """The picture of `render_evaluation`, with labels in the first of its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    whole, *others = results.groups
    small = [whole, *others][:_MOST_TASKS] if others else []
    n_rows = math.ceil(len(small) / _COLUMNS)
    height = _TOP + _MORE * max(0, len(names) - _MANY)
    size = (_WIDTH, height + _ROW * n_rows)
    figure = Figure(figsize=size, dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1 + n_rows, _COLUMNS, height_ratios=[height] + [_ROW] * n_rows)
    top = figure.add_subplot(grid[0, :], facecolor="white")
    pick: _Pick = _of_group(whole)
    what = cut_end(titles[whole], 40)
    if others:
        what = f"Average of {len(results.groups)} tasks"

        def pick(s: ModelSummary) -> tuple[MeanScore, ComparedScore | None]:
            return s.average, s.average_difference

    points = _draw(top, results, summaries, pick)
    top.set_ylabel(f"{what}, per cent", color=INK)
    scale = " (log scale)" if _is_wide(results) else ""
    top.set_xlabel(f"File size, {_unit(results)[1]}{scale}", color=INK)
    _legend(top, results)
    head: dict[str, Any] = {"fontsize": 8.5, "color": INK, "loc": "left"}
    top.set_title(_caption(results, names), linespacing=1.4, **head)
    for i, group in enumerate(small):
        axes = figure.add_subplot(grid[1 + i // _COLUMNS, i % _COLUMNS], facecolor="white")
        _draw(axes, results, summaries, _of_group(group), small=True)
        axes.set_title(cut_end(titles[group], 26), **head)
    shown = [(p, cut_middle(n, _MOST_LABEL)) for p, n in zip(points, names, strict=True) if p]
    write_labels(top, [p for p, _ in shown], [n for _, n in shown])
    return figure


def _of_group(name: str) -> _Pick:
    return lambda s: (s.scores[name], s.differences.get(name))


def _unit(results: EvalResults) -> tuple[float, str]:
    largest = max(m.info.n_bytes for m in results.models)
    return (1e9, "GB") if largest >= 1e9 else (1e6, "MB")


def _is_wide(results: EvalResults) -> bool:
    sizes = [m.info.n_bytes for m in results.models]
    return max(sizes) > _WIDE * min(sizes)


def _draw(
    axes: Axes,
    results: EvalResults,
    summaries: Sequence[ModelSummary],
    pick: _Pick,
    *,
    small: bool = False,
) -> list[tuple[float, float] | None]:
    """One panel; returns the models' points in data coordinates, None where there is no score."""
    scale, _ = _unit(results)
    points: list[tuple[float, float] | None] = []
    for m, s in zip(results.models, summaries, strict=True):
        score, _ = pick(s)
        value = score.value
        points.append(None if value is None else (m.info.n_bytes / scale, 100 * value))
    reference = pick(summaries[0])[0].value
    drawn = [p for p in points if p]
    for s, point in zip(summaries, points, strict=True):
        ends = _bar(*pick(s), reference, alone=len(summaries) == 1)
        if point is None or ends is None:
            continue
        axes.errorbar(
            *([v] for v in point),
            yerr=[[max(point[1] - ends[0], 0)], [max(ends[1] - point[1], 0)]],
            fmt="none",
            ecolor=INK,
            elinewidth=0.8 if small else 1,
            capsize=1.5 if small else 2.5,
        )
    for kind, (label, marker, fill) in KIND_STYLES.items():
        of_kind = [
            p for m, p in zip(results.models, points, strict=True) if p and m.info.kind == kind
        ]
        if of_kind:
            axes.plot(
                *zip(*of_kind, strict=True),
                marker,
                label=label,
                color=INK,
                markerfacecolor=fill,
                markeredgewidth=0.7 if small else 0.9,
                markersize=3.5 if small else 6,
            )
    if _is_wide(results):
        axes.set_xscale("log")
    axes.margins(0.08 if small else 0.14, 0.12)
    if reference is not None and len(drawn) > 1:
        ends = axes.get_xlim()
        axes.hlines(100 * reference, *ends, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xlim(*ends)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -4), min(high, 104))
    _quiet(axes, small, _is_wide(results))
    return points


def _bar(
    score: MeanScore, c: ComparedScore | None, reference: float | None, *, alone: bool
) -> tuple[float, float] | None:
    """Where a model's bar ends, per cent; None for the reference and what has no interval."""
    if alone and score.value is not None and score.error is not None:
        reach = 1.96 * score.error
        return 100 * (score.value - reach), 100 * (score.value + reach)
    if c is None or c.low is None or c.high is None or reference is None:
        return None
    return 100 * (reference + c.low), 100 * (reference + c.high)


def _quiet(axes: Axes, small: bool, is_log: bool) -> None:
    """Thin lines, few numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    axes.grid(True, which="major", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=7 if small else 9)
    if small:
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(4))
    if is_log:
        axes.xaxis.set_major_locator(FixedLocator(log_ticks(*axes.get_xlim())))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers within a range, five at most where there are not too few."""
    found: list[float] = []
    tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        inside = [x for k in tens for s in steps if low <= (x := s * 10.0**k) <= high]
        if len(inside) > 5 and len(found) > 2:
            break
        found = inside
    return found


def _legend(axes: Axes, results: EvalResults) -> None:
    if len({m.info.kind for m in results.models}) > 1:
        axes.legend(framealpha=1, facecolor="white", edgecolor=FAINT, labelcolor=INK, fontsize=8)


def _caption(results: EvalResults, names: Sequence[str]) -> str:
    if results.n_docs is None:
        docs = "all documents of each task"
    else:
        docs = f"{results.n_docs:,} documents of each task, seed {results.seed}"
    suite = results.suite if len(results.suite) <= 40 else "the tasks named"
    lines = [f"{suite} by {results.harness}; {docs}"]
    if len(results.models) > 1:
        lines.append(f"Broken line: {cut_middle(names[0], _MOST_LABEL)}, the reference.")
        lines[-1] += " Bars: 95 % interval of the paired difference to it"
    else:
        lines.append(f"{cut_end(results.models[0].info.name, 60)}. Bars: 1.96 standard errors")
    if (n := len(results.groups)) > _MOST_TASKS:
        lines.append(f"The first {_MOST_TASKS} of {n} tasks are drawn by themselves")
    return "\n".join(cut_end(line, 105) for line in lines)
