"""What a checkpoint's chat format is, and what a Modelfile has to say so that Ollama runs it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from dus_edge.ollama.autodetect import NearTemplate, capabilities, near_template
from dus_edge.ollama.chat import (
    ChatFamily,
    Rendered,
    match_family,
    rendered,
    renders_alike,
    without_begin,
)
from dus_edge.ollama.edges import EDGES, edge_differences, edge_sentences
from dus_edge.ollama.turns import find_form, go_template, learn_turns, turn_stops
from dus_edge.text.jinja import render_apart

#: The name of a format that has none.
OWN = "own"
_SOURCE = "its turns, put into a Go template"


@dataclass(frozen=True)
class ChatFormat:
    """A checkpoint's chat format as far as Ollama is concerned.

    Attributes:
        family: with a Go template that renders as the checkpoint's own; None if there is none.
        known: whether the family is one of `families()`, and not learnt from the template.
        stops: texts that end an answer.
        near: the template of its own that Ollama takes where the Modelfile has no TEMPLATE.
        has: what makes Ollama run the GGUF's own template though the Modelfile has a TEMPLATE:
            tools, thinking.
        differs: where the Go template renders otherwise: half sentences about the checkpoint's.
        dated: whether the checkpoint's writes the day's date.
    """

    family: ChatFamily | None
    known: bool
    stops: tuple[str, ...]
    near: NearTemplate | None
    has: tuple[str, ...]
    differs: tuple[str, ...]
    dated: bool

    @property
    def left(self) -> bool:
        """Whether the GGUF's own template is left to run on purpose: Ollama runs it without a
        TEMPLATE, and the date would stand still in one."""
        runs = bool(self.has) or self.near is None
        return self.family is not None and not self.known and self.dated and runs


def recognise_format(
    jinja_template: str, special_tokens: Mapping[str, str], ends: Iterable[str] = ()
) -> ChatFormat:
    """The chat format of a checkpoint.

    Args:
        jinja_template: its chat template.
        special_tokens: texts by role: ``bos_token``, ``eos_token``, …
        ends: texts of the tokens that end a turn or a text.
    """
    family, stops, differs = None, (), ()
    texts = rendered(jinja_template, special_tokens)
    match = texts and match_family(texts, special_tokens)
    if texts is not None:
        shown = match[1] if match else _without_spelled(texts, special_tokens)
        learnt = _learnt(shown, special_tokens)
        family = _better(match[0], learnt, shown) if match else learnt
        if family is not None:
            stops, differs = family.stops, _differences(family, shown)
        elif turns := learn_turns(shown.turns):
            stops = turn_stops(turns)
    return ChatFormat(
        family=family,
        known=bool(match),
        stops=tuple(dict.fromkeys((*stops, *ends))),
        near=near_template(jinja_template),
        has=capabilities(jinja_template),
        differs=tuple(differs),
        dated=texts is not None and _dated(jinja_template, special_tokens),
    )


def _learnt(texts: Rendered, special_tokens: Mapping[str, str]) -> ChatFamily | None:
    """The family of a template's turns, if a Go template of them renders the probes alike."""
    turns = learn_turns(texts.turns)
    template = turns and go_template(turns)
    if not turns or not template:
        return None
    family = ChatFamily(OWN, "the checkpoint's own", template, turn_stops(turns), _SOURCE)
    if form := find_form(turns, special_tokens):
        family = replace(
            family, name=form.name, title=form.title, stops=form.stops, source=form.source
        )
    return family if renders_alike(family, texts) else None


def _better(family: ChatFamily, learnt: ChatFamily | None, texts: Rendered) -> ChatFamily:
    """The family, with the template that was learnt where that one differs less."""
    if learnt is None:
        return family
    ours = set(edge_differences(family.template, family.system, texts.edges))
    theirs = set(edge_differences(learnt.template, None, texts.edges))
    return replace(family, template=learnt.template, system=None) if theirs < ours else family


def _differences(family: ChatFamily, texts: Rendered) -> list[str]:
    names = edge_differences(family.template, family.system, texts.edges)
    return edge_sentences(names, texts.edges)


def _without_spelled(texts: Rendered, special_tokens: Mapping[str, str]) -> Rendered:
    """The texts without a begin-of-text token that is spelled out at the front alone."""
    begin, turns = special_tokens.get("bos_token"), learn_turns(texts.turns)
    if not begin or (turns and begin in turns.turn):
        return texts
    return without_begin(texts, special_tokens) or texts


def _dated(jinja_template: str, special_tokens: Mapping[str, str]) -> bool:
    """Whether a template writes something else on another day."""
    if not any(name in jinja_template for name in ("strftime_now", "date_string")):
        return False
    talks = list(EDGES.values())
    today, other = (
        render_apart(jinja_template, talks, special_tokens, other_day=other_day)
        for other_day in (False, True)
    )
    return today != other
