"""Models of any format for a conversation: looked at before their weights are read, and loaded."""

from __future__ import annotations

from pathlib import Path

from dus_edge.chat.engine import Engine, context_of
from dus_edge.chat.folder import FolderEngine, folder_template, folder_tokenizer
from dus_edge.chat.gguf import GGUFEngine, gguf_template
from dus_edge.chat.template import ChatTemplate, no_template
from dus_edge.errors import UnsupportedError
from dus_edge.run.open import inspect_source
from dus_edge.run.source import SourceInfo


def inspect_chat(path: Path) -> tuple[SourceInfo, ChatTemplate | None]:
    """A model's kind and its chat template, before gigabytes are read.

    Raises:
        DusEdgeError: see `dus_edge.run.open.inspect_source`.
    """
    info = inspect_source(path)
    if info.kind == "gguf":
        return info, gguf_template(path)
    return info, folder_template(info, folder_tokenizer(info))


def open_chat(
    path: Path, n_ctx: int | None = None, n_threads: int | None = None, device: str = "cpu"
) -> tuple[Engine, list[str]]:
    """Load a model to talk with.

    Args:
        path: a GGUF file or a folder: plain, GPTQ or bitsandbytes.
        n_ctx: tokens of context; None for the model's own up to `DEFAULT_CONTEXT`.
        n_threads: of the CPU; None for all cores.
        device: see `dus_edge.run.open.open_source`.

    Returns:
        the model; and what there is to say about it.

    Raises:
        UnsupportedError: it has no chat template.
        DusEdgeError: it cannot be found, read or loaded.
    """
    info, template = inspect_chat(path)
    if template is None:
        raise UnsupportedError(no_template(path))
    asked = context_of(n_ctx, info.context_length)
    kind = GGUFEngine if info.kind == "gguf" else FolderEngine
    return kind(info, asked, n_threads, device), context_notes(asked, info)


def context_notes(n_ctx: int, info: SourceInfo) -> list[str]:
    """What there is to say of a context."""
    if not info.context_length or n_ctx <= info.context_length:
        return []
    return [
        f"a context of {n_ctx:,} tokens is beyond the {info.context_length:,} that the model was "
        "made for."
    ]
