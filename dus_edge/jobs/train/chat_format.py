"""In which chat format a checkpoint is trained, and what its result must say of it."""

from __future__ import annotations

import json
from pathlib import Path

from gguf import TokenType

from dus_edge.checkpoint.config import ModelConfig
from dus_edge.checkpoint.names import GENERATION_CONFIG
from dus_edge.errors import UnsupportedError, UsageError
from dus_edge.export.vocab.vocab import Vocab, read_vocab
from dus_edge.jsonfile import find_object
from dus_edge.ollama import chat
from dus_edge.text.jinja import render_apart
from dus_edge.train.tune.formats import TrainingFormat, known_format, own_format

DEFAULT_FORMAT = "solar"
_TEMPLATE = "chat_template.jinja"
_SPECIAL = (TokenType.CONTROL, TokenType.USER_DEFINED)


def find_format(
    folder: Path, config: ModelConfig, asked: str | None
) -> tuple[TrainingFormat, Vocab]:
    """The chat format that a checkpoint is trained in, and its vocabulary.

    Args:
        folder: the checkpoint.
        config: its configuration.
        asked: a format for a checkpoint that has no chat template.

    Raises:
        UsageError: a format is asked for where the checkpoint has one.
        UnsupportedError: its template is not known and marks no answers, or does not end.
    """
    vocab = read_vocab(folder, config.vocab_size)
    tokens = {f"{kind}_token": vocab.tokens[i] for kind, i in vocab.special_ids.items()}
    texts = {text: i for i, text in enumerate(vocab.tokens)}
    if vocab.chat_template is None:
        return known_format(asked or DEFAULT_FORMAT, tokens, texts), vocab
    family = chat.identify(vocab.chat_template, tokens)
    if asked and (family is None or family.name != asked):
        has = f" ({family.name})" if family else ""
        raise UsageError(
            f"the checkpoint has a chat template of its own{has}; leave out --chat-format."
        )
    if family is not None:
        return known_format(family.name, tokens, texts, family.system), vocab
    probe = ({"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"})
    if render_apart(vocab.chat_template, [probe], tokens) in (None, [None]):
        raise UnsupportedError(
            f"{folder}: the chat template fails, or takes too long, for a question and its "
            "answer; mend it."
        )
    kinds = zip(vocab.tokens, vocab.token_types, strict=True)
    specials = [text for text, kind in kinds if kind in _SPECIAL]
    return own_format(vocab.chat_template, tokens, specials), vocab


def template_files(
    folder: Path, vocab: Vocab, form: TrainingFormat, adds_begin: bool
) -> dict[str, str]:
    """Files that a tuned checkpoint has beside its base's, by name.

    A template where the base has none, and a generation config that knows what ends an answer.
    """
    more = {}
    if vocab.chat_template is None:
        more[_TEMPLATE] = form.saved_template(adds_begin) + "\n"
    end = vocab.tokens.index(form.end)
    config = find_object(folder / GENERATION_CONFIG) or {}
    known = config.get("eos_token_id", vocab.special_ids.get("eos"))
    ends = known if isinstance(known, list) else [] if known is None else [known]
    if end not in ends:
        config["eos_token_id"] = [end, *ends]
        more[GENERATION_CONFIG] = json.dumps(config, indent=2) + "\n"
    return more
