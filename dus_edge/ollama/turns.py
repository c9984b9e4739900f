"""A chat template as turns: a frame around each message, written again in Go.

Most chat templates write a fixed text before the first question, between a question and its
answer, between an answer and the next question, and at the end. Those texts are learnt from what
the template renders for messages whose contents are marks, and put into a Go template. Whether
that one renders as the checkpoint's own does is for `recognise` to try, with other conversations.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from dus_edge.ollama.gotemplate import Message

_U, _A, _V, _B, _W, _S = (f"{mark} stands here" for mark in ("U1", "A1", "U2", "A2", "U3", "S1"))


def _talk(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    roles = ("user", "assistant")
    front = [] if system is None else [{"role": "system", "content": system}]
    return (*front, *({"role": roles[i % 2], "content": c} for i, c in enumerate(contents)))


_MARK = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")

#: What `learn_turns` wants to see rendered.
TURN_PROBES = (
    _talk(_U),
    _talk(_U, _A, _V, _B, _W),
    _talk(_U, system=_S),
    _talk(_U, _A, _V, system=_S),
    _talk(_U, system=""),
)


@dataclass(frozen=True)
class Turns:
    """The texts around the messages of a conversation.

    Attributes:
        first: before the first question.
        told: the same where a system message precedes it, which follows the text.
        after: between the system message and the question.
        empty: before the first question where the system message is empty.
        answer: between a question and its answer.
        turn: between an answer and the next question.
        end: behind the last question.
        at_last: whether the system message stands before the last question instead; `told` and
            `empty` are then what is added to `first` and `turn`.
        refuses: whether the template takes no system messages; they precede the first question.
        drops: whether it leaves them out.
    """

    first: str
    told: str
    after: str
    empty: str
    answer: str
    turn: str
    end: str
    at_last: bool = False
    refuses: bool = False
    drops: bool = False


def learn_turns(texts: Sequence[str | None]) -> Turns | None:
    """The turns of a template.

    Args:
        texts: what it renders for `TURN_PROBES`; None where it refuses.

    Returns:
        None if the template is no such frame.
    """
    one = _between(texts[0], _U)
    many = _between(texts[1], _U, _A, _V, _B, _W)
    if one is None or many is None:
        return None
    first, end = one
    answer, turn = many[1:3]
    if many != [first, answer, turn, answer, turn, end] or not turn.strip():
        return None
    if texts[2] is None:
        return Turns(first, first, "\n\n", first, answer, turn, end, refuses=True)
    if texts[2] == texts[0] and _between(texts[3], _U, _A, _V) == [first, answer, turn, end]:
        return Turns(first, first, "", first, answer, turn, end, drops=True)
    lone, front = _between(texts[2], _S, _U), _between(texts[3], _S, _U, _A, _V)
    empty = _between(texts[4], _U)
    if lone is None or lone[2] != end:
        return None
    told, after = lone[:2]
    if front == [told, after, answer, turn, end]:
        quiet = empty[0] if empty and empty[1] == end else told + after
        return Turns(first, told, after, quiet, answer, turn, end)
    last = _between(texts[3], _U, _A, _S, _V)
    lead = told.removeprefix(first)
    if not told.startswith(first) or last != [first, answer, turn + lead, after, end]:
        return None
    quiet = lead + after
    if empty and empty[0].startswith(first) and empty[1] == end:
        quiet = empty[0].removeprefix(first)
    return Turns(first, lead, after, quiet, answer, turn, end, at_last=True)


def go_template(turns: Turns) -> str | None:
    """The Go template of turns; None if a text in it could not stand in one or in a Modelfile."""
    texts = (turns.first, turns.told, turns.after, turns.empty, turns.answer, turns.turn, turns.end)
    if not all(map(_stands, texts)):
        return None
    return _at_last(turns) if turns.at_last else _at_first(turns)


@dataclass(frozen=True)
class TurnForm:
    """A format with a name, known by its turns.

    Attributes:
        name: of it.
        title: how a Modelfile's comment names it.
        answer, turn: of `Turns`; ``</s>`` for the end-of-text token.
        told: of `Turns`, what it ends in; None: any.
        stops: texts that end an answer, beside the tokenizer's end-of-text token.
        source: where the format is defined.
    """

    name: str
    title: str
    answer: str
    turn: str
    stops: tuple[str, ...]
    source: str
    told: str | None = None


@cache
def turn_forms() -> tuple[TurnForm, ...]:
    """Every named form, in the order of `templates/forms.toml`."""
    path = resources.files(__package__) / "templates" / "forms.toml"
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["form"]
    return tuple(TurnForm(**{**entry, "stops": tuple(entry["stops"])}) for entry in entries)


def find_form(turns: Turns, special_tokens: Mapping[str, str]) -> TurnForm | None:
    """The named form that turns are of."""
    end = special_tokens.get("eos_token") or "</s>"
    for form in turn_forms():
        answer, turn = (text.replace("</s>", end) for text in (form.answer, form.turn))
        fits = form.told is None or (
            not (turns.refuses or turns.drops) and turns.told.endswith(form.told)
        )
        if (turns.answer, turns.turn) == (answer, turn) and fits:
            return form
    return None


def turn_stops(turns: Turns) -> tuple[str, ...]:
    """What ends an answer in a format without a name: what follows it, and what begins the next
    question; marks such as ``<|user|>`` if there are any, else lines."""
    found = _MARK.findall(turns.turn) or [line.strip() for line in turns.turn.strip().splitlines()]
    return tuple(dict.fromkeys(text for text in (found[0], found[-1]) if len(text) > 2))


def _between(text: str | None, *marks: str) -> list[str] | None:
    """The texts around marks that stand in this order, once each; None if they do not."""
    if text is None or any(text.count(mark) != 1 for mark in marks):
        return None
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            return None
        parts.append(before)
    return [*parts, text]


def _stands(text: str) -> bool:
    braces = "{{" in text or "}}" in text or text.endswith("{") or text.startswith("}")
    return not braces and all(c.isprintable() or c in "\n\t" for c in text)


def _at_first(turns: Turns) -> str:
    asked, noted = f"{{{{ else }}}}{turns.first}", ""
    if turns.empty != turns.first:
        asked = f"{{{{ else if $told }}}}{turns.empty}{asked}"
        noted = _NOTED
    told = f"{{{{ else if $.System }}}}{turns.told}{{{{ $.System }}}}{turns.after}"
    return (
        f"{noted}{{{{- $first := true }}}}\n{{{{- range .Messages }}}}\n"
        '{{- if eq .Role "user" }}{{ if not $first }}'
        f"{turns.turn}{'' if turns.drops else told}"
        f"{asked}{{{{ end }}}}{{{{ .Content }}}}{{{{ $first = false }}}}\n"
        f'{{{{- else if eq .Role "assistant" }}}}{turns.answer}{{{{ .Content }}}}\n'
        f"{{{{- end }}}}\n{{{{- end }}}}{_ending(turns.end)}"
    )


def _at_last(turns: Turns) -> str:
    asked, noted = "", ""
    if turns.empty:
        asked, noted = f"{{{{ else if $told }}}}{turns.empty}", _NOTED
    return (
        f"{noted}{{{{- $first := true }}}}\n{{{{- range $i, $m := .Messages }}}}\n"
        '{{- if eq $m.Role "user" }}{{ if $first }}'
        f"{turns.first}{{{{ else }}}}{turns.turn}{{{{ end }}}}"
        "{{ if eq (len (slice $.Messages $i)) 1 }}{{ if $.System }}"
        f"{turns.told}{{{{ $.System }}}}{turns.after}{asked}{{{{ end }}}}{{{{ end }}}}"
        "{{ $m.Content }}{{ $first = false }}\n"
        f'{{{{- else if eq $m.Role "assistant" }}}}{turns.answer}{{{{ $m.Content }}}}\n'
        f"{{{{- end }}}}\n{{{{- end }}}}{_ending(turns.end)}"
    )


#: Notes a system message that is there and empty; `.System` is the same as without one.
_NOTED = (
    "{{- $told := false }}\n"
    '{{- range .Messages }}{{ if eq .Role "system" }}{{ $told = true }}{{ end }}{{ end }}\n'
)


def _ending(text: str) -> str:
    """A template's last text; a line end there would not be seen."""
    shown = text.rstrip(" \t\n")
    blanks = text[len(shown) :].replace("\n", "\\n").replace("\t", "\\t")
    return f'{shown}{{{{ "{blanks}" -}}}}' if blanks else shown
