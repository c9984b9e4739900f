"""The card of a tuned model: of what base, on which data, how far it came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Template

from dus_edge import __version__
from dus_edge.checkpoint.card import languages
from dus_edge.data import read_text
from dus_edge.text.dialogues import TuningData
from dus_edge.train.tune.settings import TuneSettings
from dus_edge.upscale.model import Model
from dus_edge.words import markdown_table

#: The same names that the hub has for languages; a row may say anything.
_CODES = range(2, 4)


@dataclass(frozen=True)
class Tuned:
    """What a finished run has to say.

    Attributes:
        data: the rows.
        data_licence: identifier, or None where nobody knows.
        format_name: of the chat format.
        n_trained: examples trained on.
        held_out: what was measured on, in words.
        figures: rows of a table: what, before, after.
    """

    data: TuningData
    data_licence: str | None
    format_name: str
    n_trained: int
    held_out: str
    figures: Sequence[tuple[str, str, str]]


def tuned_card(model: Model, settings: TuneSettings, tuned: Tuned) -> str:
    """Markdown with the hub's front matter. The licence is the base's own."""
    source = model.source
    base = source.repo_id or source.name
    said = {row.language for row in tuned.data.rows if len(row.language) in _CODES}
    codes = sorted(said | set(languages(source.folder)))
    front = "".join(f"- {code}\n" for code in codes)
    words = _method_words(settings)
    return Template(read_text("tuned_card.md")).substitute(
        words,
        front_licence=source.licence or "unknown",
        front_base=f"base_model: {source.repo_id}\n" if source.repo_id else "",
        front_languages=f"language:\n{front}" if codes else "",
        goal=settings.goal,
        title=f"{model.name.title}, tuned",
        base=base + (f" at revision `{source.revision}`" if source.revision else ""),
        version=__version__,
        architecture=model.config.architecture,
        layers=model.plan.depth,
        parameters=f"{model.n_parameters:,}",
        data=tuned.data.name,
        licence_of_data=tuned.data_licence or "not known",
        rows=f"{tuned.n_trained:,} examples",
        steps=f"{settings.n_steps:,} of {settings.batch}, learning rate {settings.learning_rate:g}",
        format=tuned.format_name,
        held_out=tuned.held_out,
        figures=markdown_table(("", "before", "after"), tuned.figures),
        licence=(
            f"The weights come from the base's, so its licence holds: `{source.licence}`."
            if source.licence
            else "The base does not say its licence, so the licence is unknown: ask its authors "
            "before you pass this on."
        ),
    )


def _method_words(settings: TuneSettings) -> Mapping[str, str]:
    adapter = f"LoRA of rank {settings.rank} on all linear layers"
    methods = {
        "full": "all weights",
        "lora": adapter,
        "qlora": f"{adapter}, base in NF4 with double quantization",
    }
    on = {"sft": "on dialogues (SFT)", "dpo": f"on preferences (DPO, beta {settings.beta:g})"}
    what = "This is an adapter: it needs that base." if settings.is_adapter else ""
    return {
        "method": methods[settings.method],
        "on": on[settings.goal],
        "what": what,
        "library": "peft" if settings.is_adapter else "transformers",
    }
