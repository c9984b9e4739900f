"""The recovery as a picture: held-out loss against tokens, the base and its control beside it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dus_edge.packages import require
from dus_edge.train.recovery.log import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _FAINT = "#1a1a1a", "#d8d8d8"
#: Told apart by dash and marker too, so that grey is enough.
_STYLES = (
    ("#20506e", "-", "o"),
    ("#b0522a", "--", "s"),
    ("#4c7a34", "-.", "^"),
    ("#7b4b94", ":", "D"),
)


def render_recovery(curves: Sequence[Curve], base: float, title: str, form: str = "svg") -> bytes:
    """Draw curves of held-out loss; equal curves give equal bytes.

    Args:
        curves: the healed model's first; a control's is named ``control``.
        base: loss of the base, untrained, as a level line.
        title: of the picture.
        form: ``svg`` or ``png``.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    require("plots", "the plot of the recovery needs")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"svg.hashsalt": "dus-edge", "font.size": 9.5}):
        figure, axes = plt.subplots(figsize=(6.4, 4.0), dpi=150)
        axes.axhline(base, color=_INK, linewidth=1, linestyle=(0, (1, 2)))
        for curve, (colour, dash, marker) in zip(curves, _STYLES, strict=False):
            axes.plot(
                curve.tokens,
                curve.means,
                color=colour,
                linestyle=dash,
                marker=marker,
                markersize=4,
                linewidth=1.6,
                label=curve.name,
            )
        axes.plot([], [], color=_INK, linestyle=(0, (1, 2)), linewidth=1, label="base, untrained")
        _dress(axes, title)
        out = io.BytesIO()
        figure.tight_layout()
        figure.savefig(out, format=form, metadata={"Date": None} if form == "svg" else None)
        plt.close(figure)
    return out.getvalue()


def _dress(axes: Axes, title: str) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_title(title, loc="left", fontsize=10.5, color=_INK)
    axes.set_xlabel("tokens trained on", color=_INK)
    axes.set_ylabel("held-out loss, nats a token", color=_INK)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_xlim(left=0)
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)
