"""What a Modelfile says of a model: learnt from the model at hand or from a GGUF file."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf import TokenType

from dus_edge.checkpoint.gguf_header import read_header
from dus_edge.errors import CheckpointError
from dus_edge.export.vocab.special import end_texts
from dus_edge.export.vocab.vocab import Vocab
from dus_edge.ollama.modelfile import NUM_CTX_CAP, for_model, render_modelfile
from dus_edge.ollama.recognise import recognise_format
from dus_edge.upscale.model import Model


@dataclass(frozen=True)
class ModelFacts:
    """What a Modelfile says of a model, wherever it was learnt.

    Attributes:
        title: a name for people.
        context_length: tokens that the model was made for.
        licence: identifier or None.
        chat_template: Jinja text or None.
        special_tokens: texts by role: ``bos_token``, ``eos_token``, …
        ends: texts of the tokens that end a turn or a text.
        ours: whether this program made the GGUF file.
    """

    title: str
    context_length: int
    licence: str | None
    chat_template: str | None
    special_tokens: Mapping[str, str]
    ends: tuple[str, ...]
    ours: bool


def model_facts(model: Model, vocab: Vocab, *, ours: bool) -> ModelFacts:
    """What a Modelfile says of a checkpoint; `ours` if it is about to be exported."""
    config = model.config
    return ModelFacts(
        title=model.name.title,
        # Past a window that llama.cpp's graph does not have, the model is on its own.
        context_length=min(config.context_length, config.unheeded_window or config.context_length),
        licence=model.source.licence,
        chat_template=vocab.chat_template,
        special_tokens={f"{kind}_token": vocab.tokens[i] for kind, i in vocab.special_ids.items()},
        ends=_ends(vocab.tokens, vocab.token_types, vocab.special_ids),
        ours=ours,
    )


def gguf_facts(path: Path) -> ModelFacts:
    """What a Modelfile says of a GGUF file.

    Raises:
        CheckpointError: no GGUF file, or one without a Llama-form model's keys.
    """
    try:
        with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as view:
            values, _ = read_header(view)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (ValueError, OSError) as e:
        raise CheckpointError(f"{path} is no GGUF file of a model ({e}).") from None
    return facts_of_values(values, str(path), path.stem)


def copied_facts(model: Model) -> ModelFacts:
    """What a Modelfile says of a GGUF whose layers are about to be copied by the model's plan."""
    gguf = model.source.gguf
    assert gguf is not None
    facts = facts_of_values(gguf.values, gguf.label, model.name.title)
    return facts if model.plan.is_identity else replace(facts, title=model.name.title, ours=True)


def facts_of_values(values: Mapping[str, Any], where: str, title: str) -> ModelFacts:
    """What a Modelfile says of a GGUF's metadata.

    Args:
        values: by key, as `read_header` gives them.
        where: the file, for messages.
        title: a name for people, where the metadata has none.

    Raises:
        CheckpointError: they are not of a model.
    """
    key = f"{values.get('general.architecture')}.context_length"
    context_length = values.get(key)
    if type(context_length) is not int or context_length < 1:
        raise CheckpointError(f"{where} is no GGUF file of a model ({key} is {context_length!r}).")

    def text(key: str) -> str | None:
        value = values.get(key)
        return value if isinstance(value, str) else None

    tokens = values.get("tokenizer.ggml.tokens")
    tokens, ids = tokens if isinstance(tokens, list) else [], {}
    for kind in ("bos", *_END_KINDS):
        token_id = values.get(f"tokenizer.ggml.{kind}_token_id")
        if type(token_id) is int and 0 <= token_id < len(tokens):
            ids[kind] = token_id
    return ModelFacts(
        title=text("general.name") or title,
        context_length=context_length,
        licence=text("general.license"),
        chat_template=text("tokenizer.chat_template"),
        special_tokens={f"{k}_token": tokens[i] for k, i in ids.items() if k in ("bos", "eos")},
        ends=_ends(tokens, None, ids),
        ours=any(key.startswith("dus.") for key in values),
    )


_END_KINDS = ("eos", "eot", "eom")


def _ends(
    tokens: Sequence[str], types: Sequence[int] | None, ids: Mapping[str, int]
) -> tuple[str, ...]:
    """Texts of the tokens that end a turn or a text: those named so, and control tokens that
    llama.cpp knows by their text. Without types, any but ``</s>``, which may be ordinary text."""
    named = [tokens[ids[kind]] for kind in _END_KINDS if kind in ids]
    known = end_texts()
    if types is None:
        found = [text for text in tokens if text in known and text != "</s>"]
    else:
        listed = zip(tokens, types, strict=True)
        found = [text for text, kind in listed if kind == TokenType.CONTROL and text in known]
    return tuple(dict.fromkeys((*named, *found)))


def render_facts(facts: ModelFacts, from_path: str, num_ctx: int | None = None) -> str:
    """A Modelfile's text."""
    found = None
    if facts.chat_template is not None:
        found = recognise_format(facts.chat_template, facts.special_tokens, facts.ends)
    spec = for_model(
        from_path=from_path,
        context_length=facts.context_length,
        chat_format=found,
        licence=facts.licence,
        title=f"{facts.title}, made by dus-edge." if facts.ours else f"{facts.title}.",
        num_ctx_cap=num_ctx or NUM_CTX_CAP,
        eos_token=facts.special_tokens.get("eos_token", "</s>"),
    )
    return render_modelfile(spec)
