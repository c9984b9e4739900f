"""Which chat format a checkpoint uses, found by what its template renders.

A chat template is a program in Jinja; Ollama runs programs in Go's text/template. Two are
taken for one format only if they give the same text for the same conversations. Comparing
the programs' texts, as Ollama does by edit distance when a Modelfile has no TEMPLATE,
mistakes short templates for others.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib import resources
from itertools import islice

from dus_edge.ollama.edges import EDGES
from dus_edge.ollama.gotemplate import Message, render_conversation
from dus_edge.ollama.turns import TURN_PROBES
from dus_edge.text.jinja import render_apart


def _talk(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return (*([{"role": "system", "content": system}] if system is not None else []), *turns)


_WITHOUT_SYSTEM = (
    _talk("Hello there."),
    _talk("Who are you?", "A model & a <test>.", "What is 2 + 2?"),
    _talk(
        "깊이를 늘린다는 것은?", "층을 복사하는 것입니다.", "How many?\n\nSay it.", "16.", "Why?"
    ),
)
_WITH_SYSTEM = (
    _talk("Hello there.", system="Answer in one line."),
    _talk("하나.", "둘.", "셋?", system='You count.\n"Slowly".'),
)
_MARK = "the system message goes here"


@dataclass(frozen=True)
class ChatFamily:
    """A chat format: its Go template, its stops, and where it is defined.

    `system` is the system message that the checkpoint's template puts in where a
    conversation has none; None where it puts in nothing.
    """

    name: str
    title: str
    template: str
    stops: tuple[str, ...]
    source: str
    notes: str = ""
    system: str | None = None


@cache
def families() -> tuple[ChatFamily, ...]:
    """Every known family, in the order of `templates/families.toml`."""
    entries = tomllib.loads(template_text("families.toml"))["family"]
    return tuple(
        ChatFamily(
            name=entry["name"],
            title=entry["title"],
            template=template_text(f"{entry['name']}.gotmpl"),
            stops=tuple(entry["stops"]),
            source=entry["source"],
            notes=entry.get("notes", ""),
        )
        for entry in entries
    )


def family(name: str) -> ChatFamily:
    """The family called `name`. Raises KeyError."""
    return {known.name: known for known in families()}[name]


@cache
def template_text(file_name: str) -> str:
    """A file of the `templates` folder, without its last line end."""
    path = resources.files(__package__) / "templates" / file_name
    return path.read_text(encoding="utf-8").removesuffix("\n")


def identify(jinja_template: str | None, special_tokens: Mapping[str, str]) -> ChatFamily | None:
    """The family that renders as a checkpoint's chat template does, or None.

    `special_tokens` is the tokenizer's (`bos_token`, `eos_token`, …). A template may refuse
    system messages; it must render every other probe, and equal the family's wherever it
    renders. A system message of its own is found and kept in `ChatFamily.system`. A template that
    takes more time or memory than any that is meant is not known.
    """
    texts = rendered(jinja_template, special_tokens)
    match = texts and match_family(texts, special_tokens)
    return match[0] if match else None


@dataclass(frozen=True)
class Rendered:
    """What a chat template makes of conversations; None where it refuses one.

    Attributes:
        plain: of those without a system message.
        told: of those with one.
        turns: of `TURN_PROBES`.
        edges: of `EDGES`, in their order.
    """

    plain: tuple[str | None, ...]
    told: tuple[str | None, ...]
    turns: tuple[str | None, ...]
    edges: tuple[str | None, ...]


def rendered(jinja_template: str | None, special_tokens: Mapping[str, str]) -> Rendered | None:
    """The texts of a checkpoint's chat template; None if it has none that runs."""
    if not jinja_template:
        return None
    return _rendered(jinja_template, tuple(sorted(special_tokens.items())))


@lru_cache(maxsize=8)
def _rendered(jinja_template: str, tokens: tuple[tuple[str, str], ...]) -> Rendered | None:
    """The same; kept, for a process is started for it and several files may have one template."""
    groups = (_WITHOUT_SYSTEM, _WITH_SYSTEM, TURN_PROBES, tuple(EDGES.values()))
    texts = render_apart(jinja_template, [talk for talks in groups for talk in talks], dict(tokens))
    if texts is None:
        return None
    rest = iter(texts)
    return Rendered(*(tuple(islice(rest, len(talks))) for talks in groups))


def without_begin(texts: Rendered, special_tokens: Mapping[str, str]) -> Rendered | None:
    """The texts without the begin-of-text token at their front; None if one has none there."""
    begin = special_tokens.get("bos_token")
    every = (*texts.plain, *texts.told, *texts.turns, *texts.edges)
    if not begin or not all(text.startswith(begin) for text in every if text is not None):
        return None
    return Rendered(
        *(
            tuple(None if text is None else text.removeprefix(begin) for text in group)
            for group in (texts.plain, texts.told, texts.turns, texts.edges)
        )
    )


def match_family(
    texts: Rendered, special_tokens: Mapping[str, str]
) -> tuple[ChatFamily, Rendered] | None:
    """The family that renders as a template does; and the texts without a begin-of-text token
    that the template spells out, as text that the tokenizer reads as the token."""
    if None in texts.plain:
        return None
    for shown in (texts, without_begin(texts, special_tokens)):
        if shown and (found := _family_of(shown, special_tokens)):
            return found, shown
    return None


def renders_alike(known: ChatFamily, texts: Rendered) -> bool:
    """Whether a family renders the probes as a template does, without a default system message."""
    return _agrees(known, _WITHOUT_SYSTEM, texts.plain) and _agrees(known, _WITH_SYSTEM, texts.told)


def _family_of(texts: Rendered, special_tokens: Mapping[str, str]) -> ChatFamily | None:
    """The family that renders the probes, without and with a system message, to these texts."""
    plain, told = texts.plain, texts.told
    for known in families():
        candidate = _with_tokens(known, special_tokens)
        if not _agrees(candidate, _WITH_SYSTEM, told):
            continue
        if _agrees(candidate, _WITHOUT_SYSTEM, plain):
            return candidate
        system = None if None in told else _default_system(candidate, str(plain[0]))
        if system is not None:
            prepended = [(_system(system), *talk) for talk in _WITHOUT_SYSTEM]
            if _agrees(candidate, prepended, plain):
                return replace(candidate, system=system)
    return None


def _with_tokens(known: ChatFamily, special_tokens: Mapping[str, str]) -> ChatFamily:
    """The family with a checkpoint's token texts in place of Llama's."""
    begin = special_tokens.get("bos_token") or "<s>"
    end = special_tokens.get("eos_token") or "</s>"
    if "{" in begin + end:  # could be, with what stands beside it, an action of the Go template
        return known

    def put(text: str) -> str:
        return end.join(part.replace("<s>", begin) for part in text.split("</s>"))

    return replace(known, template=put(known.template), stops=tuple(map(put, known.stops)))


def _agrees(
    known: ChatFamily, talks: Sequence[Sequence[Message]], texts: Sequence[str | None]
) -> bool:
    """Whether the Go template gives these texts, leaving out those that Jinja refused."""
    return all(
        text is None or render_conversation(known.template, talk) == text
        for talk, text in zip(talks, texts, strict=True)
    )


def _default_system(known: ChatFamily, text: str) -> str | None:
    """What stands in `text` (the first probe) where the family's system message goes."""
    marked = render_conversation(known.template, (_system(_MARK), *_WITHOUT_SYSTEM[0]))
    before, found, after = marked.partition(_MARK)
    fits = len(text) > len(before) + len(after)
    if found and fits and text.startswith(before) and text.endswith(after):
        return text[len(before) : len(text) - len(after)]
    return None


def _system(content: str) -> Message:
    return {"role": "system", "content": content}
