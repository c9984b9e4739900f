"""Divergence against size as an SVG that stands in a page: its colours are the page's classes.

Written by hand and not by matplotlib, whose pictures carry styles of their own: the page's policy
allows none, and they would not follow a reader from light to dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from dus_edge.quality.label_layout import Box, boxes_along, place_labels
from dus_edge.quality.plot import NARROWEST
from dus_edge.tables.evaluation_plot import log_ticks
from dus_edge.tables.frontier.panels import FrontierPanel, PlottedFile
from dus_edge.words import cut_middle, format_bytes

#: Pixels of the picture, and of the margins around what is plotted.
WIDTH_PX, HEIGHT_PX = 400, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 30, 42
#: Shape, class of the colour, and whether it is filled, by way (`Origin.way`) or format.
_STYLES = {
    "preset": ("circle", "plain", True),
    "preset by ggml": ("circle", "plain", False),
    "preset + imatrix": ("square", "imatrix", True),
    "preset by ggml + imatrix": ("square", "imatrix", False),
    "mix": ("diamond", "mix", False),
    "mix by weight error": ("diamond", "plain", False),
    "mix + imatrix": ("diamond", "mix", True),
    "preset + feedback": ("down", "feedback", True),
    "mix + feedback": ("cross", "both", True),
    "GGUF": ("circle", "other", True),
    "GPTQ": ("up", "plain", False),
    "bitsandbytes": ("up", "plain", True),
    "safetensors": ("down", "plain", False),
}
_OTHER = ("down", "plain", False)
_RADIUS = 4.6
#: A letter's width at 12 pixels, and a line's height: those of wide system fonts.
_LETTER_PX, _LINE_PX = 7.2, 14.0
_MOST_LABEL = 34


def frontier_svg(panel: FrontierPanel) -> str:
    """The picture; equal panels give equal ones.

    Files without a place on a log scale are not in it.

    Args:
        panel: of one file or more.
    """
    shown = [f for f in panel.files if f.has_place]
    scale = _Scale(shown)
    parts = [*_axes(scale)]
    line = [(scale.x(f.n_bytes), scale.y(f.kl or 1)) for f in panel.frontier if f.has_place]
    if len(line) > 1:
        points = " ".join(f"{_place(x)},{_place(y)}" for x, y in line)
        parts.append(f'<polyline class="frontier" points="{points}"/>')
    parts += [_bar(scale, f) for f in shown if f.error]
    # What is on the frontier is drawn last, on top.
    for f in sorted(shown, key=lambda f: f.on_frontier):
        said = escape(f"{f.name}: {format_bytes(f.n_bytes)}, {f.kl:.3g} nats")
        x, y = scale.x(f.n_bytes), scale.y(f.kl or 1)
        parts.append(f"<g>{marker(f.way, x, y)}<title>{said}</title></g>")
    parts += _labels(scale, shown, line)
    return (
        f'<svg viewBox="0 0 {WIDTH_PX} {HEIGHT_PX}" role="img" aria-label="{escape(words(panel))}">'
        f"{''.join(parts)}</svg>"
    )


def words(panel: FrontierPanel) -> str:
    """The picture for those who do not see it: the frontier, file by file."""
    found = [
        f"{f.name}, {format_bytes(f.n_bytes)}, {f.kl:.3g}"
        for f in panel.frontier
        if f.kl is not None
    ]
    return (
        f"{panel.title}. Divergence in nats against file size of {len(panel.files)} files. "
        f"On the frontier: {'; '.join(found) or 'none'}."
    )


def marker(way: str, x: float, y: float) -> str:
    """A way's mark around a place, pixels."""
    shape, tone, filled = _STYLES.get(way, _OTHER)
    name = f'class="mark {tone}{"" if filled else " hollow"}"'
    r = _RADIUS
    if shape == "circle":
        return f'<circle {name} cx="{_place(x)}" cy="{_place(y)}" r="{r}"/>'
    corners = {
        "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
        "down": ((-1.15, -0.9), (1.15, -0.9), (0, 1.2)),
        "up": ((-1.15, 0.9), (1.15, 0.9), (0, -1.2)),
        "cross": (
            *((-1.2, -0.7), (-0.7, -1.2), (0, -0.5), (0.7, -1.2), (1.2, -0.7), (0.5, 0)),
            *((1.2, 0.7), (0.7, 1.2), (0, 0.5), (-0.7, 1.2), (-1.2, 0.7), (-0.5, 0)),
        ),
    }[shape]
    path = "L".join(f"{_place(x + r * dx)} {_place(y + r * dy)}" for dx, dy in corners)
    return f'<path {name} d="M{path}Z"/>'


class _Scale:
    """Places of bytes (linear) and nats (log) in the picture."""

    def __init__(self, files: Sequence[PlottedFile]) -> None:
        sizes = [f.n_bytes for f in files] or [0, 1]
        ends = [k for f in files for k in _ends(f)] or [0.1, 1.0]
        self.unit, self.unit_name = (2.0**30, "GiB") if max(sizes) >= 2**30 else (2.0**20, "MiB")
        low, high = min(sizes) / self.unit, max(sizes) / self.unit
        # Files of one preset differ by some bytes; they stand in one column.
        gap = max(0.13 * (high - low), NARROWEST / 2 * high) or 1.0
        self.low, self.high = low - gap, high + gap
        bottom, top = math.log(min(ends)), math.log(max(ends))
        gap = 0.1 * (top - bottom) or 0.5
        self.bottom, self.top = bottom - gap, top + gap

    def x(self, n_bytes: float) -> float:
        share = (n_bytes / self.unit - self.low) / (self.high - self.low)
        return _LEFT + share * (WIDTH_PX - _LEFT - _RIGHT)

    def y(self, kl: float) -> float:
        share = (math.log(kl) - self.bottom) / (self.top - self.bottom)
        return HEIGHT_PX - _BOTTOM - share * (HEIGHT_PX - _TOP - _BOTTOM)


def _ends(f: PlottedFile) -> tuple[float, float]:
    """Of a file's bar; down to zero it would have no end on a log scale."""
    kl = f.kl or 1.0
    error = min(f.error or 0.0, 0.9 * kl)
    return kl - error, kl + error


def _axes(scale: _Scale) -> list[str]:
    right, bottom = WIDTH_PX - _RIGHT, HEIGHT_PX - _BOTTOM
    parts = []
    for value in log_ticks(math.exp(scale.bottom), math.exp(scale.top)):
        y = scale.y(value)
        parts.append(_line("grid", _LEFT, y, right, y))
        parts.append(_text(_LEFT - 7, y + 4, f"{value:g}", "small soft", "end"))
    for value in _ticks(scale.low, scale.high):
        x = scale.x(value * scale.unit)
        parts.append(_line("grid", x, _TOP, x, bottom))
        parts.append(_text(x, bottom + 17, f"{value:g}", "small soft", "middle"))
    parts.append(_line("axis", _LEFT, bottom, right, bottom))
    parts.append(_line("axis", _LEFT, _TOP, _LEFT, bottom))
    parts.append(_text(4, 15, "Mean KL, nats per token (log scale)", "small soft", "start"))
    name = f"File size, {scale.unit_name}"
    parts.append(_text((_LEFT + right) / 2, HEIGHT_PX - 7, name, "small soft", "middle"))
    return parts


def _bar(scale: _Scale, f: PlottedFile) -> str:
    x, (low, high) = scale.x(f.n_bytes), _ends(f)
    return _line("error", x, scale.y(low), x, scale.y(high))


def _labels(
    scale: _Scale, shown: Sequence[PlottedFile], line: Sequence[tuple[float, float]]
) -> list[str]:
    """Words beside their points; where there is no room near by, with a line to the point."""
    named = [f for f in shown if f.label]
    texts = [cut_middle(f.label, _MOST_LABEL) for f in named]

    def up(x: float, y: float) -> tuple[float, float]:
        return x, HEIGHT_PX - y

    places = [up(scale.x(f.n_bytes), scale.y(f.kl or 1)) for f in named]
    obstacles: list[Box] = boxes_along([up(x, y) for x, y in line])
    for f in shown:
        x, (low, high) = scale.x(f.n_bytes), map(scale.y, _ends(f))
        obstacles.append((x - 1, HEIGHT_PX - low, x + 1, HEIGHT_PX - high))
        if f not in named:
            _, y = up(x, scale.y(f.kl or 1))
            obstacles.append((x - 6, y - 6, x + 6, y + 6))
    frame = (_LEFT + 2.0, float(_BOTTOM), WIDTH_PX - 3.0, float(HEIGHT_PX - _TOP + 8))
    sizes = [(_LETTER_PX * len(text), _LINE_PX) for text in texts]
    parts = []
    for text, (x, y), place in zip(
        texts, places, place_labels(places, sizes, obstacles, frame), strict=True
    ):
        if place.has_line:
            dx, dy = place.anchor
            length = math.hypot(dx, dy)
            start = (x + dx * 5 / length, y + dy * 5 / length)
            parts.append(_line("leader", *up(*start), *up(x + dx, y + dy)))
        # Words are narrower than the room that was kept for them: they lean to their point.
        left, low, right, _ = place.box
        if place.anchor[0] < -1:
            at, anchor = right, "end"
        elif place.anchor[0] > 1:
            at, anchor = left, "start"
        else:
            at, anchor = (left + right) / 2, "middle"
        parts.append(_text(at, HEIGHT_PX - low - 3, text, "small over", anchor))
    return parts


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers within a range, four to eight of them."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(s for s in (1, 2, 5, 10) if s * power >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(k * step, 10) for k in range(max(first, 0), last + 1)]


def _place(v: float) -> str:
    """A coordinate, to a tenth of a unit."""
    return f"{v:.1f}".removesuffix(".0")


def _line(name: str, x0: float, y0: float, x1: float, y1: float) -> str:
    ends = f'x1="{_place(x0)}" y1="{_place(y0)}" x2="{_place(x1)}" y2="{_place(y1)}"'
    return f'<line class="{name}" {ends}/>'


def _text(x: float, y: float, said: str, name: str, anchor: str) -> str:
    where = f'x="{_place(x)}" y="{_place(y)}" text-anchor="{anchor}"'
    return f'<text class="{name}" {where}>{escape(said)}</text>'
