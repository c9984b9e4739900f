"""The model card of an up-scaled checkpoint: what it is, of what, under which licence."""

from __future__ import annotations

from string import Template

from dus_edge import __version__
from dus_edge.checkpoint.card import CARD
from dus_edge.checkpoint.spec import Source
from dus_edge.data import read_text
from dus_edge.upscale.model import Model
from dus_edge.upscale.plan import DepthPlan
from dus_edge.words import counts_text


def model_card(model: Model, library: str = "transformers", stored: str = "") -> str:
    """Markdown with the hub's front matter.

    Args:
        model: what is written.
        library: what loads it: ``transformers`` or ``mlx``.
        stored: how its weights are stored, for the table, where that is worth a line.

    The licence is the base's own: copying layers gives no new rights. One that is not known is
    said to be unknown. A base with an adapter and no more layers than before has the card that came
    with the merging.
    """
    source, plan = model.source, model.plan
    if model.adapter is not None and plan.is_identity:
        return (source.folder / CARD).read_text(encoding="utf-8")
    licence = source.licence
    base = source.repo_id or source.name
    seams = "; ".join(
        f"between layers {s.position - 1} and {s.position} (source layers {s.left} and {s.right})"
        for s in plan.seams
    )
    card = "model_card.md"
    if source.gguf is not None and plan.is_identity:
        card = "dequantized_card.md"
    return Template(read_text(card)).substitute(
        front_licence=licence or "unknown",
        library=library,
        # mlx-lm writes this tag; the hub finds models of MLX by it.
        library_tag="" if library == "transformers" else f"- {library}\n",
        use=read_text(f"card_use_{library}.md"),
        stored=f"| Weights | {stored} |\n" if stored else "",
        front_base=f"base_model: {source.repo_id}\n" if source.repo_id else "",
        title=model.name.title,
        base=base + (f" at revision `{source.revision}`" if source.revision else ""),
        licence=(
            f"The weights are copies of the base's, so its licence holds: `{licence}`."
            if licence
            else "The base does not say its licence, so the licence is unknown: ask its authors "
            "before you pass this on."
        ),
        n_base=plan.n_base,
        depth=plan.depth,
        spelled=plan.spelled,
        training=_training(model),
        copies=copies_row(plan) + _weights_row(source),
        weights=_weights_row(source),
        drop=f" (m = {plan.drop})" if plan.drop is not None else "",
        seams=f"Seams: {seams}." if seams else "There is no seam.",
        parameters=f"{model.n_parameters:,}",
        architecture=model.config.architecture,
        version=__version__,
    )


def copies_row(plan: DepthPlan) -> str:
    """A row of a card's table on how copies differ from their sources; empty if they do not."""
    if plan.method.is_plain:
        return ""
    return f"| Copies | {len(plan.copies)} layers; {plan.method.sentence} |\n"


def _weights_row(source: Source) -> str:
    """A row of a card's table on weights that were dequantized; empty for all others."""
    if source.gguf is None or not source.gguf.is_quantized:
        return ""
    return f"| Weights | of a GGUF ({counts_text(source.gguf.types)}), dequantized to float16 |\n"


def _training(model: Model) -> str:
    """What was done beside copying layers."""
    if model.adapter is None or not model.on_result:
        changed = (
            "nothing is changed in\nthem" if model.plan.method.is_plain else "the copies changed"
        )
        return (
            f"layers are copied, {changed}, and **nothing has been trained "
            "since**. Expect it to be worse than its base until it is\ntrained further."
        )
    return (
        f"layers are copied, and then the\nLoRA adapter `{model.adapter.name}` was merged, which "
        "was trained on the up-scaled model."
    )
