"""What a Modelfile says of a model: learnt from the model at hand or from a GGUF file."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dus_edge.checkpoint.gguf_header import read_header
from dus_edge.errors import CheckpointError
from dus_edge.export.vocab.vocab import Vocab
from dus_edge.ollama import chat
from dus_edge.ollama.modelfile import NUM_CTX_CAP, for_model, render_modelfile
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
        ours: whether this program made the GGUF file.
    """

    title: str
    context_length: int
    licence: str | None
    chat_template: str | None
    special_tokens: Mapping[str, str]
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
    key = f"{values.get('general.architecture')}.context_length"
    context_length = values.get(key)
    if type(context_length) is not int or context_length < 1:
        raise CheckpointError(f"{path} is no GGUF file of a model ({key} is {context_length!r}).")

    def text(key: str) -> str | None:
        value = values.get(key)
        return value if isinstance(value, str) else None

    special, tokens = {}, values.get("tokenizer.ggml.tokens")
    for kind in ("bos", "eos"):
        token_id = values.get(f"tokenizer.ggml.{kind}_token_id")
        known = isinstance(tokens, list) and type(token_id) is int
        if known and 0 <= token_id < len(tokens):
            special[f"{kind}_token"] = tokens[token_id]
    return ModelFacts(
        title=text("general.name") or path.stem,
        context_length=context_length,
        licence=text("general.license"),
        chat_template=text("tokenizer.chat_template"),
        special_tokens=special,
        ours=any(key.startswith("dus.") for key in values),
    )


def render_facts(facts: ModelFacts, from_path: str, num_ctx: int | None = None) -> str:
    """A Modelfile's text."""
    spec = for_model(
        from_path=from_path,
        context_length=facts.context_length,
        family=chat.identify(facts.chat_template, facts.special_tokens),
        chat_template_present=facts.chat_template is not None,
        licence=facts.licence,
        title=f"{facts.title}, made by dus-edge." if facts.ours else f"{facts.title}.",
        num_ctx_cap=num_ctx or NUM_CTX_CAP,
        eos_token=facts.special_tokens.get("eos_token", "</s>"),
    )
    return render_modelfile(spec)
