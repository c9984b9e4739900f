"""Conversations to tokens, and which of them are learnt.

The tokens are those that llama.cpp makes of the same text, special tokens read as such, behind a
begin-of-text token where the tokenizer adds one. What is learnt is each answer with the token that
ends it; what stands behind the last answer is cut off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dus_edge.errors import UsageError
from dus_edge.text.dialogues import Dialogue, Preference
from dus_edge.train.tune.formats import Span, TrainingFormat, render_marked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

#: What the loss passes over; PyTorch's own number for it.
IGNORED = -100


@dataclass(frozen=True)
class Coder:
    """A format and the tokenizer that reads its texts.

    Attributes:
        form: the format.
        tokenizer: a fast one of transformers'.
        begin: id of the token that goes before every text, or None.
        n_ctx: the most tokens that an example may have.
    """

    form: TrainingFormat
    tokenizer: PreTrainedTokenizerFast
    begin: int | None
    n_ctx: int


@dataclass(frozen=True)
class Example:
    """Tokens of one example.

    Attributes:
        ids: token ids.
        learnt: for each, whether the loss is taken on it.
    """

    ids: tuple[int, ...]
    learnt: tuple[bool, ...]

    @property
    def labels(self) -> list[int]:
        """Ids where learnt, else `IGNORED`."""
        return [i if x else IGNORED for i, x in zip(self.ids, self.learnt, strict=True)]


@dataclass(frozen=True)
class Pair:
    """Tokens of a prompt and of two answers, each with its end."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        """Of the prompt and the longer answer."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def marked_texts(
    form: TrainingFormat, messages: Sequence[dict[str, str]]
) -> Iterator[tuple[str, list[Span]]]:
    """The texts that a conversation is trained as, each with the places of what is learnt."""
    whole = [list(messages)]
    if form.apart:
        whole = [
            list(messages[: i + 1]) for i, m in enumerate(messages) if m["role"] == "assistant"
        ]
    for talk in whole:
        text, spans = render_marked(form, talk)
        if form.apart:
            answer = text[slice(*spans[-1])]
            text, _ = render_marked(form, talk[:-1], prompt=True)
            spans = [(len(text), len(text) + len(answer))]
            text += answer
        start, stop = spans[-1]
        text = text[:stop]
        if not text.rstrip().endswith(form.end):
            text += form.end
            spans = [*spans[:-1], (start, len(text))]
        yield text, spans


def encode_text(coder: Coder, text: str, spans: Sequence[Span]) -> Example:
    """Tokens of a text, and which of them lie in the spans."""
    found = coder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    learnt = [
        any(start <= a < stop and b <= stop for start, stop in spans)
        for a, b in found["offset_mapping"]
    ]
    front = [] if coder.begin is None else [coder.begin]
    return Example((*front, *found["input_ids"]), (*(False for _ in front), *learnt))


def dialogue_examples(coder: Coder, rows: Sequence[Dialogue]) -> tuple[list[Example], int]:
    """Examples of dialogues.

    Returns:
        the examples, and how many more were left out for being longer than the context.

    Raises:
        UsageError: a message spells out a special token.
    """
    found = []
    for row in rows:
        _check_plain(coder, row)
        texts = marked_texts(coder.form, row.messages)
        found += [encode_text(coder, text, spans) for text, spans in texts]
    short = [e for e in found if len(e.ids) <= coder.n_ctx]
    return short, len(found) - len(short)


def preference_pairs(coder: Coder, rows: Sequence[Preference]) -> tuple[list[Pair], int]:
    """Pairs of answers; see `dialogue_examples`."""
    found = []
    for row in rows:
        _check_plain(coder, row)
        ids = []
        for answer in (row.chosen, row.rejected):
            text, spans = list(marked_texts(coder.form, row.with_answer(answer)))[-1]
            ids.append(encode_text(coder, text, spans[-1:]))
        chosen, rejected = ids
        n = min(chosen.learnt.index(True), rejected.learnt.index(True))
        found.append(Pair(chosen.ids[:n], chosen.ids[n:], rejected.ids[n:]))
    short = [p for p in found if p.n_tokens <= coder.n_ctx]
    return short, len(found) - len(short)


def _check_plain(coder: Coder, row: Dialogue | Preference) -> None:
    """A special token in a message would end it, or begin another, wherever it is read."""
    for text in row.texts:
        for token in coder.tokenizer.all_special_tokens:
            if token in text:
                raise UsageError(
                    f"{row.origin}: a message holds the special token {token}, which is no text; "
                    "take it out, or leave the row out."
                )
