"""Where a finished model goes next: commands to paste into a shell."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from dus_edge.checkpoint.names import ADAPTER_CONFIG
from dus_edge.jsonfile import find_object
from dus_edge.words import WIDTH

#: Models of Ollama that are spoken of, of those written last.
_MOST = 3
_TEMPLATES = ("chat_template.jinja", "chat_template.json")


def after_gguf(path: Path, creates: Sequence[str], chats: bool) -> list[str]:
    """What can be done with GGUF files.

    Args:
        path: of the one that was written last.
        creates: the commands that make Ollama's models of them.
        chats: whether it has a chat template.
    """
    file = shlex.quote(str(path))
    return [
        *creates[-_MOST:],
        *([f"dus-edge chat {file}"] if chats else []),
        _with_remark(f"dus-edge serve {file}", "or llama-server -m"),
        _with_remark(f"lms import --copy {file}", "into LM Studio"),
    ]


def after_folder(folder: Path, *, plain: bool) -> list[str]:
    """What can be done with a checkpoint folder.

    Args:
        folder: with its card; an adapter's too.
        plain: whether its weights are not quantized.
    """
    place = shlex.quote(str(folder))
    name = shlex.quote(folder.absolute().name)
    upload = _with_remark(f"hf upload YOU/{name} {place}", "to the hub")
    adapter = find_object(folder / ADAPTER_CONFIG)
    if adapter is not None:
        base = shlex.quote(str(adapter.get("base_model_name_or_path") or "BASE"))
        return [f"dus-edge merge {base} {place} -o {name}-merged", upload]
    return [
        *([f"dus-edge gguf --no-upscale {place}"] if plain else []),
        *([f"dus-edge chat {place}"] if can_chat(folder) else []),
        f"dus-edge serve {place}",
        upload,
    ]


def after_mlx(folder: Path) -> list[str]:
    """What can be done with an MLX folder, on a Mac."""
    place = shlex.quote(str(folder))
    name = shlex.quote(folder.absolute().name)
    return [
        _with_remark(f"mlx_lm.chat --model {place}", "pip install mlx-lm"),
        _with_remark(f"mlx_lm.server --model {place}", "the OpenAI API"),
        _with_remark(f"cp -r {place} ~/.lmstudio/models/YOU/", "into LM Studio"),
        _with_remark(f"hf upload YOU/{name} {place}", "to the hub"),
    ]


def can_chat(folder: Path) -> bool:
    """Whether a folder has a chat template."""
    told = find_object(folder / "tokenizer_config.json") or {}
    return bool(told.get("chat_template")) or any((folder / x).is_file() for x in _TEMPLATES)


def _with_remark(command: str, remark: str) -> str:
    """A command, and what it is for, where a line has room for that."""
    line = f"{command}  # {remark}"
    return line if len(line) + 2 <= WIDTH else command
