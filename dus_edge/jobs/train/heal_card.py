"""The card of a healed model: what was trained, on what, and how far it came."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import Template

from dus_edge import __version__
from dus_edge.checkpoint.names import RECOVERY_PLOT
from dus_edge.data import read_text
from dus_edge.export.card import copies_row
from dus_edge.train.recovery.data import HealData
from dus_edge.train.recovery.log import Curve
from dus_edge.train.recovery.options import HealOptions
from dus_edge.upscale.model import Model
from dus_edge.upscale.plan import DepthPlan
from dus_edge.words import markdown_table


@dataclass(frozen=True)
class Recovery:
    """How far a run came, in nats a token on held-out text.

    Attributes:
        healed: the model's curve; its first point is the model as it was up-scaled.
        base: the base's, untrained; None where it is not at hand.
        control: the base trained on the same tokens; None where it was not run.
    """

    healed: Curve
    base: Curve | None
    control: Curve | None

    @property
    def closed(self) -> float | None:
        """Share of the gap between the up-scaled model and its goal that is closed.

        The goal is the control, for training on any text lowers the loss on that text; without
        one it is the base itself, and the share says too much.
        """
        goal = self.control or self.base
        if goal is None:
            return None
        gap = self.healed.means[0] - goal.means[-1]
        return (self.healed.means[0] - self.healed.means[-1]) / gap if gap > 0 else None


def gap_sentence(recovery: Recovery) -> str:
    """What share of the gap is closed, and to what."""
    if recovery.closed is None:
        return ""
    if recovery.control:
        return (
            f"{recovery.closed:.0%} of the gap to the control is closed: the base, trained on the "
            "same tokens."
        )
    return (
        f"{recovery.closed:.0%} of the gap to the base is closed. Part of that is learning what "
        "this text is like, which the base did not; only a control (`--control`) tells them apart."
    )


def healed_card(
    model: Model,
    plan: DepthPlan,
    options: HealOptions,
    data: HealData,
    recovery: Recovery,
    n_learned: int,
    drawn: bool,
) -> str:
    """Markdown with the hub's front matter; the licence is the base's own."""
    source = model.source
    base = source.repo_id or source.name
    return Template(read_text("healed_card.md")).substitute(
        front_licence=source.licence or "unknown",
        front_base=f"base_model: {source.repo_id}\n" if source.repo_id else "",
        title=f"{model.name.title}, healed",
        base=base + (f" at revision `{source.revision}`" if source.revision else ""),
        n_base=plan.n_base,
        depth=plan.depth,
        spelled=plan.spelled,
        copies=copies_row(plan),
        version=__version__,
        architecture=model.config.architecture,
        parameters=f"{model.n_parameters:,}",
        n_learned=f"{n_learned:,}",
        mode=options.mode.spelled,
        tokens=f"{recovery.healed.tokens[-1]:,}",
        steps=f"{options.n_steps:,}",
        rate=f"{options.peak:g}",
        teacher=f", {options.teacher:g} of the target from the base" if options.teacher else "",
        texts=_texts(options, data),
        heldout_tokens=f"{sum(s.n_tokens for s in data.held):,}",
        losses=_losses(recovery),
        gap=gap_sentence(recovery),
        picture=f"\n![Held-out loss against tokens]({RECOVERY_PLOT})\n" if drawn else "",
        licence=(
            f"The weights come from the base's, so its licence holds: `{source.licence}`."
            if source.licence
            else "The base does not say its licence, so the licence is unknown: ask its authors "
            "before you pass this on."
        ),
    )


def _texts(options: HealOptions, data: HealData) -> str:
    passes: Mapping[int, float] = data.batches.passes(options.n_steps)
    rows = [
        (
            stream.source,
            stream.language,
            f"{stream.n_tokens:,}",
            f"{weight:.0%}",
            f"{passes[i]:.2f}",
            data.licences.get(stream.source, "unknown"),
        )
        for i, (stream, weight) in enumerate(zip(data.streams, data.weights, strict=True))
    ]
    return markdown_table(("text", "language", "tokens", "share", "passes", "licence"), rows)


def _losses(recovery: Recovery) -> str:
    columns: list[tuple[str, Curve, int]] = []
    if recovery.base:
        columns.append(("base", recovery.base, 0))
    columns += [("up-scaled", recovery.healed, 0), ("healed", recovery.healed, -1)]
    if recovery.control:
        columns.append(("control", recovery.control, -1))
    rows = []
    languages = list(recovery.healed.by_language)
    if len(languages) > 1:
        rows += [
            (lang, *(f"{c.by_language[lang][at]:.4f}" for _, c, at in columns))
            for lang in languages
        ]
    rows.append(("all", *(f"{c.means[at]:.4f}" for _, c, at in columns)))
    return markdown_table(("", *(name for name, _, _ in columns)), rows)
