"""A GGUF as the base that a user names: found, and its small files made as a folder has them."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal
from weakref import finalize

from dus_edge.checkpoint.card import CARD
from dus_edge.checkpoint.config import parse_config
from dus_edge.checkpoint.gguf.config import config_of
from dus_edge.checkpoint.gguf.file import GGUFModel, is_gguf, without_part
from dus_edge.checkpoint.gguf.ollama import find_ollama, short_name
from dus_edge.checkpoint.gguf.rope import exact
from dus_edge.checkpoint.gguf.vocab import (
    StoredVocab,
    end_ids,
    read_stored_vocab,
    rebuilt_tokenizer,
    rebuilt_tokenizer_config,
)
from dus_edge.checkpoint.names import CONFIG, GENERATION_CONFIG, OLLAMA
from dus_edge.checkpoint.spec import Source
from dus_edge.errors import OutputError, UnsupportedError, UsageError

_TOKENIZER = "tokenizer.json"
#: Whether a tokenizer is made too: always, never, or if it can be.
Wanted = Literal["always", "never", "if known"]
#: Types of tensors and of files at the end of a file's name.
_TYPES = re.compile(
    r"[-._](?:i?q\d\w*|mix_\d\w*|t[qm]\d\w*|mxfp4\w*|nvfp4|b?f16|fp16|f32|fp32)$",
    re.IGNORECASE | re.ASCII,
)
#: Suggested sampling: GGUF's keys, and generation_config.json's.
_SAMPLING = {
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "temp": "temperature",
    "penalty_repeat": "repetition_penalty",
}


def names_gguf(base: str) -> bool:
    """Whether a base is a GGUF file or a model of Ollama's."""
    return base.startswith(OLLAMA) or base.endswith(".gguf") or _is_gguf(Path(base))


def gguf_path(base: str) -> Path | None:
    """The file that a base names, there or not; None if it is no GGUF.

    Raises:
        UsageError: Ollama has no such model.
    """
    if base.startswith(OLLAMA):
        return find_ollama(base.removeprefix(OLLAMA))
    return Path(base).expanduser() if names_gguf(base) else None


def _is_gguf(path: Path) -> bool:
    try:
        path = path.expanduser()
        return path.is_file() and is_gguf(path)
    except (OSError, ValueError, RuntimeError):  # a name too long for the file system, a NUL
        return False


def refuse_gguf(base: str, what: str) -> None:
    """See that a base is no GGUF, for what starts from a folder.

    Args:
        base: as the user typed it.
        what: is to be done, as the message begins: ``Training``.

    Raises:
        UsageError: it is one.
    """
    if names_gguf(base):
        raise UsageError(
            f"{what} starts from a checkpoint's folder; make one of {base} first: dus-edge upscale "
            f"--no-upscale {base} -o FOLDER"
        )


def gguf_source(base: str, path: Path, tokenizer: Wanted = "always") -> Source:
    """A GGUF as a source.

    Args:
        base: what the user called it.
        path: the file, or one of the parts.
        tokenizer: whether a tokenizer is wanted; never: the layers are only copied.

    Returns:
        a source with a temporary folder of small files, which is gone when `Source.gguf` is.

    Raises:
        CheckpointError: the file is damaged.
        UnsupportedError: it is of a kind that is not known.
        OutputError: there is no room for the small files.
    """
    gguf = GGUFModel(path, base)
    files: dict[str, Any] = {CONFIG: config_of(gguf, copied=tokenizer == "never")}
    parse_config(files[CONFIG], base)  # here, where messages name the file
    if tokenizer != "never":
        try:
            files |= _tokenizer_files(read_stored_vocab(gguf), gguf)
        except UnsupportedError:
            if tokenizer == "always":
                raise
    folder = _new_folder(gguf)
    try:
        for name, value in files.items():
            (folder / name).write_text(_json(name, value), encoding="utf-8")
        (folder / CARD).write_text(_card(gguf), encoding="utf-8")
    except OSError as e:
        raise OutputError(f"{folder} cannot be written ({e.strerror or e}).") from None
    licence = gguf.text("general.license")
    return Source(folder, base, _name(base, path), licence=licence, weights=path.parent, gguf=gguf)


def _tokenizer_files(vocab: StoredVocab, gguf: GGUFModel) -> dict[str, Any]:
    generation: dict[str, Any] = {
        name: gguf.values[key]
        for kind, name in _SAMPLING.items()
        if type(gguf.values.get(key := f"general.sampling.{kind}")) in (int, float)
    }
    generation = {k: exact(v) if isinstance(v, float) else v for k, v in generation.items()}
    if generation:
        generation["do_sample"] = True
    for name, key in (("bos", "bos_token_id"), ("padding", "pad_token_id")):
        if name in vocab.ids:
            generation[key] = vocab.ids[name]
    if ends := end_ids(vocab):
        generation["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return {
        _TOKENIZER: rebuilt_tokenizer(vocab),
        "tokenizer_config.json": rebuilt_tokenizer_config(vocab),
        GENERATION_CONFIG: generation,
    }


def _name(base: str, path: Path) -> str:
    """What the model is called: its file's name without types, or Ollama's name of it."""
    if base.startswith(OLLAMA):
        stem = short_name(base.removeprefix(OLLAMA))
    else:
        stem = without_part(path.name.removesuffix(".gguf"))
    return _TYPES.sub("", stem) or stem


def _card(gguf: GGUFModel) -> str:
    """A card's front matter, for what is read from cards."""
    said = {
        "license": gguf.text("general.license"),
        "language": gguf.array("general.languages"),
        "tags": gguf.array("general.tags"),
    }
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in said.items() if value]
    return f"---\n{''.join(lines)}---\n"


def _json(name: str, value: object) -> str:
    # Without line ends a vocabulary is written several times as fast.
    indent = None if name == _TOKENIZER else 2
    return json.dumps(value, ensure_ascii=False, indent=indent) + "\n"


def _new_folder(gguf: GGUFModel) -> Path:
    try:
        folder = Path(tempfile.mkdtemp(prefix="dus-edge-gguf-"))
    except OSError as e:
        raise OutputError(
            f"No temporary folder can be made ({e.strerror or e}); set TMPDIR to another place."
        ) from None
    finalize(gguf, shutil.rmtree, folder, ignore_errors=True)
    return folder
