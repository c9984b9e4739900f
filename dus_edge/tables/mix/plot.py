"""A mix as a picture: layer by matrix, coloured by bits per weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dus_edge.quality.plot import INK
from dus_edge.quant.mix.matrices import Matrix
from dus_edge.quant.types import QuantType
from dus_edge.tables.grow.seam_plot import render_figure
from dus_edge.tables.mix.text import LETTERS, roles_of
from dus_edge.words import cut_middle

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Bits per weight at the ends of the colours; what is beyond has the colour of the end.
_FEWEST, _MOST = 2.0, 9.0
#: Up to so many layers each cell has its letter.
_MOST_LETTERED = 64


def render_mix(
    matrices: Sequence[Matrix], kinds: Mapping[str, QuantType], title: str, form: str
) -> bytes:
    """The picture's bytes; equal mixes give equal ones.

    Args:
        matrices: of the model.
        kinds: the type of each, by name.
        title: a line above it.
        form: ``png`` or ``svg``.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    return render_figure(lambda: draw_mix(matrices, kinds, title), form)


def draw_mix(matrices: Sequence[Matrix], kinds: Mapping[str, QuantType], title: str) -> Any:
    """The figure: the layers, beside them what is outside layers, and the scale of the colours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    outside = [m for m in matrices if m.layer is None]
    inside = [m for m in matrices if m.layer is not None]
    roles = roles_of(inside)
    n_layers = 1 + max((m.layer or 0 for m in inside), default=0)
    width = min(12.0, max(6.0, 3.2 + 0.17 * n_layers))
    figure = Figure(
        figsize=(width, 1.5 + 0.32 * len(roles)), dpi=160, facecolor="white", layout="constrained"
    )
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1, 3, width_ratios=(max(1, len(outside)), max(8, n_layers), 0.5))
    left, right = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    table = np.full((len(roles), n_layers), np.nan)
    names = {(m.role, m.layer): m for m in inside}
    for (role, layer), matrix in names.items():
        table[roles.index(role), layer or 0] = kinds[matrix.name].bits_per_weight
    image = _cells(right, table)
    _cells(left, np.array([[kinds[m.name].bits_per_weight for m in outside]]).reshape(1, -1))
    if n_layers <= _MOST_LETTERED:
        for (role, layer), matrix in names.items():
            _letter(right, layer or 0, roles.index(role), kinds[matrix.name])
    for i, matrix in enumerate(outside):
        _letter(left, i, 0, kinds[matrix.name])
    right.set_yticks(range(len(roles)), roles)
    right.set_xlabel("layer", color=INK, fontsize=9)
    left.set_xticks(range(len(outside)), [m.role for m in outside], rotation=90)
    left.set_yticks([])
    figure.suptitle(cut_middle(title, 90), x=0.01, ha="left", fontsize=9.5, color=INK)
    scale = figure.colorbar(image, cax=figure.add_subplot(grid[0, 2]))
    scale.set_label("bits per weight", color=INK, fontsize=9)
    scale.ax.tick_params(labelsize=8)
    return figure


def _cells(axes: Axes, table: np.ndarray) -> Any:
    image = axes.imshow(
        np.ma.masked_invalid(table),
        cmap="viridis",
        vmin=_FEWEST,
        vmax=_MOST,
        aspect="auto",
        interpolation="nearest",
    )
    axes.tick_params(colors=INK, labelsize=8, length=2)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    return image


def _letter(axes: Axes, x: int, y: int, kind: QuantType) -> None:
    """The letter of the terminal's grid, dark on light and light on dark."""
    light = kind.bits_per_weight > (_FEWEST + _MOST) / 2
    axes.text(
        x,
        y,
        LETTERS.get(kind.name, "?"),
        ha="center",
        va="center",
        fontsize=6.5,
        color=INK if light else "white",
    )
