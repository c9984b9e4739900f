"""The tokenizer files of a checkpoint folder, read and checked before anyone interprets them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dus_edge.errors import CheckpointError
from dus_edge.jsonfile import find_object
from dus_edge.words import whole_number


@dataclass(frozen=True, slots=True)
class AddedToken:
    """One token that the tokenizer cuts out of the text before its model sees the rest.

    ``strips`` is true when the token swallows neighbouring white space (``lstrip``,
    ``rstrip``) or matches whole words only (``single_word``); ``strips_after`` where it swallows
    what follows and does no more.
    """

    id: int
    content: str
    special: bool
    normalized: bool
    strips: bool
    strips_after: bool = False


@dataclass(frozen=True)
class TokenizerFiles:
    """The parsed files of one folder; None where the folder has no such file.

    Attributes:
        folder: where they lie.
        config: ``config.json``.
        generation_config: ``generation_config.json``.
        tokenizer_config: ``tokenizer_config.json``.
        special_tokens_map: ``special_tokens_map.json``.
        tokenizer: ``tokenizer.json``.
        added_tokens_json: ``added_tokens.json``, content to id.
        added: the added tokens of ``tokenizer.json``.
        added_decoder: those of ``added_tokens_decoder`` in ``tokenizer_config.json``.
    """

    folder: Path
    config: Mapping[str, Any] | None = None
    generation_config: Mapping[str, Any] | None = None
    tokenizer_config: Mapping[str, Any] | None = None
    special_tokens_map: Mapping[str, Any] | None = None
    tokenizer: Mapping[str, Any] | None = None
    added_tokens_json: Mapping[str, int] = field(default_factory=dict)
    added: tuple[AddedToken, ...] = ()
    added_decoder: tuple[AddedToken, ...] = ()


def read_files(folder: Path) -> TokenizerFiles:
    """Parse every tokenizer file of `folder` that exists.

    Raises:
        CheckpointError: a file is not JSON, or a token in it has no usable id or content.
    """
    tokenizer = find_object(folder / "tokenizer.json")
    tokenizer_config = find_object(folder / "tokenizer_config.json")
    listed = (tokenizer or {}).get("added_tokens") or []
    decoder = (tokenizer_config or {}).get("added_tokens_decoder") or {}
    if not isinstance(listed, list):
        raise CheckpointError(f"{folder / 'tokenizer.json'}: added_tokens is not a list.")
    if not isinstance(decoder, dict):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: added_tokens_decoder is not an object."
        )
    added_json = find_object(folder / "added_tokens.json") or {}
    for content, token_id in added_json.items():
        check_id(token_id, f"{folder / 'added_tokens.json'}: {content!r}")
    return TokenizerFiles(
        folder=folder,
        config=find_object(folder / "config.json"),
        generation_config=find_object(folder / "generation_config.json"),
        tokenizer_config=tokenizer_config,
        special_tokens_map=find_object(folder / "special_tokens_map.json"),
        tokenizer=tokenizer,
        added_tokens_json=added_json,
        added=tuple(
            _added(entry, entry.get("id") if isinstance(entry, dict) else None, where)
            for where, entry in _enumerate(folder / "tokenizer.json", "added_tokens", listed)
        ),
        added_decoder=tuple(
            _added(entry, _int_key(key), f"{folder / 'tokenizer_config.json'}: {key!r}")
            for key, entry in decoder.items()
        ),
    )


def check_id(value: object, where: str) -> int:
    """`value` as a token id.

    Raises:
        CheckpointError: it is not an integer of at least 0; the message starts with `where`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(f"{where}: token id {value!r} is not an integer of at least 0.")
    return value


def token_text(entry: object) -> str | None:
    """The text of a special token in a config: a string, or an object with ``content``."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) and entry else None


def _added(entry: object, token_id: object, where: str) -> AddedToken:
    content = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(content, str) or not content:
        raise CheckpointError(f"{where}: this added token has no content.")
    return AddedToken(
        id=check_id(token_id, f"{where}: {content!r}"),
        content=content,
        special=bool(entry.get("special")),
        normalized=bool(entry.get("normalized")),
        strips=any(bool(entry.get(flag)) for flag in ("lstrip", "rstrip", "single_word")),
        strips_after=bool(entry.get("rstrip"))
        and not (entry.get("lstrip") or entry.get("single_word")),
    )


def _enumerate(path: Path, name: str, entries: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for index, entry in enumerate(entries):
        yield f"{path}: {name}[{index}]", entry


def _int_key(key: str) -> int | str:
    number = whole_number(key)
    return key if number is None else number
