"""Special token ids, the add_* flags and the chat templates of a tokenizer folder.

They come from where ``SpecialVocab`` in llama.cpp's ``gguf-py/gguf/vocab.py`` (0c1e57098) takes
them, in its order: names in ``tokenizer_config.json`` found among the added tokens of
``tokenizer.json``, then ids in ``config.json``. It stops there, and so misses ids that are
plainly named elsewhere; three more sources follow here, which never change an id it would find.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from gguf import TokenType

from dus_edge.errors import CheckpointError
from dus_edge.export.vocab.files import TokenizerFiles, token_text
from dus_edge.jsonfile import find_object

#: Kinds of special tokens, in the converter's order.
KINDS = ("bos", "eos", "unk", "sep", "pad", "mask")

#: Kinds for which the three further sources are asked.
_COMMON_KINDS = ("bos", "eos", "unk", "pad")

#: ``add_{kind}_token`` exists in GGUF for these.
_ADDED_KINDS = ("bos", "eos", "sep")


@dataclass
class SpecialTokens:
    """What is found: ids by kind, flags by kind, and what had to be left out.

    ``names`` are the texts by kind, after the post-processor had its say.
    """

    ids: dict[str, int] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def special_tokens(files: TokenizerFiles, ids_by_text: Mapping[str, int], n: int) -> SpecialTokens:
    """The special tokens of a folder.

    Args:
        files: its parsed files.
        ids_by_text: all tokens that are or may be special, with their ids.
        n: the number of rows of the embedding; ids from there on are left out with a note.
    """
    config = files.tokenizer_config or {}
    special = SpecialTokens(names=_names(config))
    if files.tokenizer is not None:
        _apply_post_processor(files.tokenizer, special, bool(config))
    kinds = [*KINDS, *(kind for kind in ("eot", "eom") if kind in special.names)]
    for kind in kinds:
        asked = config.get(f"add_{kind}_token")
        if kind in _ADDED_KINDS and isinstance(asked, bool):
            special.flags.setdefault(kind, asked)  # the post-processor is what really happens
    added = {token.content: token.id for token in reversed(files.added)}
    for kind in kinds:
        if special.names.get(kind) in added:
            _set(special, kind, added[special.names[kind]], n, "tokenizer.json")
    for kind in kinds:
        _set(special, kind, _config_id(files.config, kind), n, "config.json")
    # From here on beyond the converter.
    mapped = _names(files.special_tokens_map or {})
    for kind in _COMMON_KINDS:
        for names, source in (
            (special.names, "tokenizer_config.json"),
            (mapped, "special_tokens_map.json"),
        ):
            _set(special, kind, ids_by_text.get(names.get(kind, "")), n, source)
        generation_id = (files.generation_config or {}).get(f"{kind}_token_id")
        if isinstance(generation_id, list):
            generation_id = next(iter(generation_id), None)
        _set(special, kind, generation_id, n, "generation_config.json")
    return special


@cache
def end_texts() -> frozenset[str]:
    """Texts by which llama.cpp knows tokens that end a turn or a text (`data/end_tokens.toml`)."""
    text = (package_files("dus_edge") / "data" / "end_tokens.toml").read_text(encoding="utf-8")
    return frozenset(tomllib.loads(text)["texts"])


def end_notes(tokens: Sequence[str], types: Sequence[int]) -> list[str]:
    """One sentence where ordinary tokens have such a text, as ``</s>`` of Qwen 3 is one."""
    listed = zip(tokens, types, strict=True)
    plain = [text for text, kind in listed if kind == TokenType.NORMAL and text in end_texts()]
    if not plain:
        return []
    return [
        f"the ordinary token {plain[0]!r} is one that ends text for llama.cpp, which knows it by "
        "its text: in a prompt it becomes that one token, and where the model writes it the answer "
        "ends."
    ]


def has_template(tokenizer: Mapping[str, Any] | None) -> bool:
    """Whether ``tokenizer.json`` lists what stands around a text."""
    return any(step.get("type") == "TemplateProcessing" for step in _post_steps(tokenizer))


def code_llama_ids(files: TokenizerFiles, n: int) -> dict[str, int]:
    """The infill tokens, which the converter knows by the vocabulary size 32016 of Code Llama."""
    if n != 32016:
        return {}
    special = SpecialTokens(names=_names(files.tokenizer_config or {}))
    added = {token.content: token.id for token in reversed(files.added)}
    for kind, default in (("prefix", 32007), ("suffix", 32008), ("middle", 32009), ("eot", 32010)):
        for token_id in (
            added.get(special.names.get(kind, "")),
            _config_id(files.config, kind),
            default,
        ):
            _set(special, kind, token_id, n, "config.json")
    return special.ids


def chat_templates(files: TokenizerFiles) -> tuple[str | None, dict[str, str]]:
    """The default chat template and the named ones.

    ``tokenizer_config.json`` wins; else ``chat_template.jinja`` (with
    ``additional_chat_templates/*.jinja``), else ``chat_template.json``.

    Raises:
        CheckpointError: a template is not text.
    """
    value: Any = (files.tokenizer_config or {}).get("chat_template")
    where = files.folder / "tokenizer_config.json"
    if value is None:
        value, where = _template_files(files.folder)
    if value is None or isinstance(value, str):
        return value, {}
    if not isinstance(value, Sequence):
        raise CheckpointError(f"{where}: chat_template is neither text nor a list of templates.")
    named: dict[str, str] = {}
    for entry in value:
        name = entry.get("name") if isinstance(entry, Mapping) else None
        template = entry.get("template") if isinstance(entry, Mapping) else None
        if not isinstance(name, str) or not isinstance(template, str):
            raise CheckpointError(f"{where}: a chat_template lacks its name or template.")
        named[_key_name(name)] = template
    default = named.pop("default", None)
    return default, named


def _template_files(folder: Path) -> tuple[Any, Path]:
    path = folder / "chat_template.jinja"
    if not path.is_file():
        path = folder / "chat_template.json"
        return (find_object(path) or {}).get("chat_template"), path
    additional = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    default = _read_template(path)
    if not additional:
        return default, path
    entries = [{"name": "default", "template": default}]
    entries += [{"name": extra.stem, "template": _read_template(extra)} for extra in additional]
    return entries, path


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as UTF-8 text ({error}).") from error


def _key_name(name: str) -> str:
    """A template's name as part of a GGUF key; only ASCII letters and digits stay."""
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in name)


def _names(config: Mapping[str, Any]) -> dict[str, str]:
    kinds = (*KINDS, "cls", "prefix", "suffix", "middle", "eot")
    named = {kind: token_text(config.get(f"{kind}_token")) for kind in kinds}
    return {kind: text for kind, text in named.items() if text is not None}


def _config_id(config: Mapping[str, Any] | None, kind: str) -> Any:
    key = f"{kind}_token_id"
    value = (config or {}).get(key)
    if value is None and isinstance(nested := (config or {}).get("text_config"), Mapping):
        value = nested.get(key)
    return value


def _set(special: SpecialTokens, kind: str, token_id: Any, n: int, source: str) -> None:
    """Take `token_id` for `kind` unless it has one; −1 and lists mean "none" in configs."""
    if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
        return
    if token_id >= n:
        special.notes.append(
            f"{source} has {kind} token {token_id}, beyond the {n} tokens of the model: left out."
        )
        return
    special.ids.setdefault(kind, token_id)


# -- post-processor -----------------------------------------------------------------------------


def _apply_post_processor(
    tokenizer: Mapping[str, Any], special: SpecialTokens, has_config: bool
) -> None:
    """Read from the post-processor which special tokens it puts around the text.

    Like the converter, and for templates of its kind only: at most one special token before
    and after the text, a separator between two.
    """
    names = special.names
    if "bos" not in names and "cls" in names:
        names["bos"] = names["cls"]
    if "eos" not in names and "sep" in names:
        names["eos"] = names["sep"]
    for step in _post_steps(tokenizer):
        if step.get("type") == "ByteLevel":
            special.flags.setdefault("bos", False)
            special.flags.setdefault("eos", False)
        elif step.get("type") == "TemplateProcessing":
            _apply_template(step, special, has_config)


def _post_steps(tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    post = (tokenizer or {}).get("post_processor")
    steps = (post.get("processors") or [post]) if isinstance(post, Mapping) else []
    if not isinstance(steps, list):
        return []
    return [step for step in steps if isinstance(step, Mapping)]


def _apply_template(step: Mapping[str, Any], special: SpecialTokens, has_config: bool) -> None:
    names, flags = special.names, special.flags
    single = _pieces(step, "single")
    first = _template_token(single[0]) if len(single) > 1 else None
    last = _template_token(single[-1]) if len(single) > 1 else None
    if first:
        if not has_config:
            names["bos"] = first
        elif first not in (names.get("bos"), names.get("cls")):
            names.setdefault("bos", first)
            names.setdefault("cls", first)
        flags["bos"] = first in (names.get("bos"), names.get("cls"))
    if last:
        if has_config and "eos" in names and names["eos"] != last:
            # The text ends with another token than eos_token: that one ends a turn, then.
            names["eom" if "eot" in names else "eot"] = names["eos"]
        names["eos"] = last
        flags["eos"] = True
    _apply_pair(_pieces(step, "pair"), first, last, special)


def _apply_pair(
    pair: Sequence[Any], first: str | None, last: str | None, special: SpecialTokens
) -> None:
    if first and pair and _template_token(pair[0]) == first:
        pair = pair[1:]
    if last and pair and _template_token(pair[-1]) == last:
        pair = pair[:-1]
    if len(pair) < 3 or (_sequence(pair[0]), _sequence(pair[-1])) != ("A", "B"):
        return
    names = special.names
    separators = {names[kind] for kind in ("sep", "eos") if kind in names}
    between = [_template_token(entry) for entry in pair[1:-1]]
    adds = between[0] in separators and not last
    if len(between) == 2 and between[1] in separators:
        adds = True
    special.flags["sep"] = adds
    if adds and "eos" in names:
        names.setdefault("sep", names["eos"])


def _pieces(step: Mapping[str, Any], key: str) -> Sequence[Any]:
    """What a template puts together; anything but a list of pieces is no template."""
    found = step.get(key)
    return found if isinstance(found, list) else []


def _template_token(entry: Any) -> str | None:
    return _piece_id(entry, "SpecialToken")


def _sequence(entry: Any) -> str | None:
    return _piece_id(entry, "Sequence")


def _piece_id(entry: Any, kind: str) -> str | None:
    piece = entry.get(kind) if isinstance(entry, Mapping) else None
    found = piece.get("id") if isinstance(piece, Mapping) else None
    return found if isinstance(found, str) else None
