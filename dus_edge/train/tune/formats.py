"""Chat formats as they are trained: Jinja templates that mark what is learnt.

A checkpoint's own template says where an answer stands, not where it begins and ends for the loss.
For each format that is known we have one that renders the same text and marks answers, with the
token that ends them, by ``{% generation %}``. A template of another format is taken if it has such
marks itself.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from dus_edge.errors import UnsupportedError, UsageError

_TAG = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
_BEGIN = "\ue000begin\ue000"
_PROBE = ({"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"})

Span = tuple[int, int]


@dataclass(frozen=True)
class TrainingFormat:
    """A format for one checkpoint.

    Attributes:
        name: of the format; None for a checkpoint's own that is not known.
        template: Jinja, with marks.
        special_tokens: texts by role, ``eos_token`` among them.
        end: what every answer ends in, a token of the tokenizer.
        apart: whether each answer is an example of its own.
        system: the system message that stands where a conversation has none.
        front: the begin-of-text token, where the template spells it out at its front.
    """

    name: str | None
    template: str
    special_tokens: Mapping[str, str]
    end: str
    apart: bool = False
    system: str | None = None
    front: str = ""

    def complete(self, messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
        """Messages with the format's own system message, if they have none."""
        told = [dict(m) for m in messages]
        if self.system is not None and told[0]["role"] != "system":
            told.insert(0, {"role": "system", "content": self.system})
        return told

    def saved_template(self, adds_begin: bool) -> str:
        """The template without marks, for a checkpoint that had none.

        Args:
            adds_begin: whether the tokenizer puts the begin-of-text token before a text.
        """
        front = "{{- bos_token -}}\n" if adds_begin else ""
        return front + _TAG.sub("", self.template)


@cache
def _entries() -> dict[str, dict]:
    return {e["name"]: e for e in tomllib.loads(_file("formats.toml"))["format"]}


def format_names() -> tuple[str, ...]:
    """Every format that can be trained."""
    return tuple(_entries())


def known_format(
    name: str,
    special_tokens: Mapping[str, str],
    vocabulary: Sequence[str] | Mapping[str, int],
    system: str | None = None,
) -> TrainingFormat:
    """A known format, with a tokenizer's tokens in it.

    Args:
        name: one of `format_names`.
        special_tokens: texts by role: ``bos_token``, ``eos_token``, ….
        vocabulary: all tokens' texts.
        system: see `TrainingFormat`.

    Raises:
        UsageError: no format of that name, or a token of it is not in the vocabulary.
    """
    if name not in _entries():
        raise UsageError(
            f"there is no chat format {name!r}; choose one of {', '.join(format_names())}."
        )
    entry = _entries()[name]
    end = entry.get("end") or special_tokens.get("eos_token")
    if not end:
        raise UnsupportedError(
            "the tokenizer names no end-of-text token (eos_token), so no answer would end; name "
            "one in tokenizer_config.json."
        )
    for token in (end, *entry.get("tokens", ())):
        if token not in vocabulary:
            raise UsageError(
                f"the chat format {name} needs the token {token}, which the tokenizer does not "
                "have; choose another --chat-format, such as solar."
            )
    # The template of a format with several begins: a tokenizer without one renders nothing there.
    tokens = {"bos_token": "", **special_tokens}
    return TrainingFormat(
        name=name,
        template=_file(f"{name}.jinja"),
        special_tokens=tokens,
        end=end,
        apart="apart" in entry,
        system=system,
    )


def own_format(
    template: str, special_tokens: Mapping[str, str], specials: Sequence[str]
) -> TrainingFormat:
    """A checkpoint's own template, of a format that is not known.

    Args:
        template: Jinja; it must have been found to take little time and memory.
        special_tokens: texts by role.
        specials: texts of all special tokens.

    Raises:
        UnsupportedError: it marks no answers, or not their ends.
    """
    what = "the checkpoint's chat template is of no format that is known"
    if not _TAG.search(template):
        raise UnsupportedError(
            f"{what} and has no {{% generation %}} marks around answers; add them to "
            "chat_template.jinja, the token that ends an answer inside."
        )
    tokens = {"bos_token": "", **special_tokens}
    draft = TrainingFormat(None, template, tokens, "")
    text, spans = render_marked(draft, _PROBE)
    block = text[slice(*spans[-1])].rstrip() if spans else ""
    end = next((s for s in sorted(specials, key=len, reverse=True) if block.endswith(s)), None)
    if end is None:
        raise UnsupportedError(
            f"{what}, and its {{% generation %}} block does not hold the token that ends an "
            "answer, so the model would never stop; move that token into the block."
        )
    seen = TrainingFormat(None, template, {**tokens, "bos_token": _BEGIN}, end)
    marked, _ = render_marked(seen, _PROBE)
    front = tokens["bos_token"] if marked.startswith(_BEGIN) else ""
    return TrainingFormat(None, template, tokens, end, front=front)


def render_marked(
    form: TrainingFormat, messages: Sequence[Mapping[str, str]], *, prompt: bool = False
) -> tuple[str, list[Span]]:
    """The text of a conversation, and where in it the marked answers stand.

    Args:
        form: the format.
        messages: roles and contents.
        prompt: render what the model is given to answer to.

    Raises:
        UsageError: the template refuses the conversation.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            [form.complete(messages)],
            chat_template=form.template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=prompt,
            **form.special_tokens,
        )
    except Exception as e:  # a template's errors are of any kind
        raise UsageError(
            f"the chat template refuses a conversation ({e}); leave out what it does not take."
        ) from None
    n = len(form.front)
    return texts[0][n:], [(a - n, b - n) for a, b in spans[0]]


def _file(name: str) -> str:
    path = resources.files(__package__) / "templates" / name
    return path.read_text(encoding="utf-8").removesuffix("\n")
