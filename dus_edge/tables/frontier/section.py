"""The section of the page that shows what was measured: plots, and their figures as tables."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dus_edge.quality.frontier import SAME_SIZE
from dus_edge.tables.frontier.panels import FrontierPanel, PlottedFile
from dus_edge.tables.frontier.svg import frontier_svg, marker
from dus_edge.tables.measured import cell_with_error
from dus_edge.words import format_bytes


def frontier_section(panels: Sequence[FrontierPanel]) -> str:
    """HTML without scripts or styles of its own; empty without panels."""
    if not panels:
        return ""
    ways = dict.fromkeys(f.way for p in panels for f in p.files)
    keys = "".join(
        f'<li><svg class="swatch" viewBox="0 0 14 14" aria-hidden="true">{marker(way, 7, 7)}</svg>'
        f"{escape(way)}</li>"
        for way in ways
    )
    line = (
        '<li><svg class="swatch" viewBox="0 0 14 14" aria-hidden="true">'
        '<path class="frontier" d="M0 11L14 3"/></svg>frontier</li>'
    )
    share = f"{100 * SAME_SIZE:g}&nbsp;%"
    return f"""
<section class="card measured" aria-labelledby="frontier-title">
  <p><span class="tag fact">Measured, not predicted</span></p>
  <h2 id="frontier-title">Divergence against size</h2>
  <p class="about">How far files are from the model that they were made of: the mean divergence (KL)
  of the next token's distribution, on text held out. A bar is one standard error over chunks of
  the text. The line is the frontier: no file as large (within {share}) or smaller
  diverges less. Other models than SOLAR: take from it the order, not the amounts.</p>
  <ul class="legend across">{line}{keys}</ul>
  <div class="panels">{"".join(map(_panel, panels))}
  </div>
</section>
"""


def _panel(panel: FrontierPanel) -> str:
    title = escape(panel.title)
    unplaced = [f.name for f in panel.files if not f.has_place]
    note = ""
    if unplaced:
        note = f'\n    <p class="about">Not drawn: {escape(", ".join(unplaced))}.</p>'
    rows = "".join(map(_row, panel.files))
    return f"""
  <div class="panel">
    <h3>{title}</h3>
    <p class="about">{escape(panel.about)}</p>
    <div class="plot" tabindex="0" role="region" aria-label="Plot, {title}">{frontier_svg(panel)}\
</div>{note}
    <details><summary>These figures as a table</summary>
    <div class="table-box" tabindex="0" role="region" aria-label="Figures, {title}">
    <table class="plain"><thead><tr><th scope="col">file</th><th scope="col">size</th>\
<th scope="col">KL, nats</th><th scope="col">frontier</th></tr></thead><tbody>{rows}</tbody></table>
    </div></details>
  </div>"""


def _row(f: PlottedFile) -> str:
    kl = escape(cell_with_error(f.kl, f.error))
    cells = f"<td>{format_bytes(f.n_bytes)}</td><td>{kl}</td><td>{'yes' * f.on_frontier}</td>"
    return f'<tr><th scope="row">{escape(f.name)}</th>{cells}</tr>'
