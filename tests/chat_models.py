"""Pico with a chat template, as a folder and as a GGUF file: it talks, and makes no sense."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from dus_edge.checkpoint.builtin import model_dir
from dus_edge.jobs.export.gguf import export_gguf
from dus_edge.quant.recipe import find_preset
from dus_edge.upscale.model import plan_chooser

#: Begins with the begin-of-text token, and ends answers in the end-of-text token.
SOLAR_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}### {{ m['role'] | capitalize }}:\n{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
#: Refuses system messages, as Gemma's does.
STRICT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + SOLAR_TEMPLATE
)


def ending_in(end: str) -> str:
    """A template that ends answers in a text."""
    return SOLAR_TEMPLATE.replace("{{ eos_token }}", end)


def chat_folder(folder: Path, template: str | None, **generation: object) -> Path:
    """A copy of pico with a template, and fields of ``generation_config.json``."""
    shutil.copytree(model_dir(), folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def chat_gguf(folder: Path) -> Path:
    """The F16 GGUF file of a folder, in the folder."""
    as_it_is = plan_chooser(None, None, (), False)
    return export_gguf(str(folder), as_it_is, [find_preset("f16")], folder).outputs[0].path


def with_end_token(path: Path, token: int, to: Path) -> Path:
    """A copy of a GGUF file that names another end-of-text token."""
    data = bytearray(path.read_bytes())
    key = b"tokenizer.ggml.eos_token_id"
    at = data.index(key) + len(key) + 4  # behind the type of the value
    data[at : at + 4] = token.to_bytes(4, "little")
    to.write_bytes(data)
    return to
