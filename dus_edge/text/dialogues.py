"""Dialogues to tune on, and pairs of answers to prefer between, read strictly from JSON lines.

Three forms of a row, as trl and the hub's data sets have them:

- ``{"messages": [{"role": …, "content": …}, …]}``
- ``{"prompt": …, "completion": …}``, each a text or a list of messages
- ``{"prompt": …, "chosen": …, "rejected": …}``, likewise

Other fields of a row are not looked at, but for its ``language``. Blanks around a message are no
part of it: half of the chat formats take them away.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, TypeVar

from dus_edge.errors import UsageError
from dus_edge.jsonfile import parse_strict

#: What `--data` calls the dialogues and pairs that come with the program.
BUILTIN_DATA = "built-in"
BUILTIN_LICENCE = "apache-2.0"
_SYSTEM, _USER, _ASSISTANT = "system", "user", "assistant"
#: Fewest rows that are split: one to be held out, one to train on.
_FEWEST = 2
_UNKNOWN = "unknown"

Turn = Mapping[str, str]
_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Dialogue:
    """A conversation that ends in an answer.

    Attributes:
        messages: with ``role`` and ``content``: at most one ``system`` first, then ``user`` and
            ``assistant`` in turn.
        language: what the row says; ``unknown`` if nothing.
        origin: file and line, for people.
    """

    messages: tuple[Turn, ...]
    language: str
    origin: str

    @property
    def texts(self) -> tuple[str, ...]:
        """Contents of all messages."""
        return tuple(m["content"] for m in self.messages)


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt.

    Attributes:
        prompt: messages up to the last of the user.
        chosen: the better answer.
        rejected: the worse one.
        language: see `Dialogue`.
        origin: see `Dialogue`.
    """

    prompt: tuple[Turn, ...]
    chosen: str
    rejected: str
    language: str
    origin: str

    @property
    def texts(self) -> tuple[str, ...]:
        """Contents of all messages."""
        return (*(m["content"] for m in self.prompt), self.chosen, self.rejected)

    def with_answer(self, answer: str) -> tuple[Turn, ...]:
        """The prompt's messages and an answer."""
        return (*self.prompt, {"role": _ASSISTANT, "content": answer})


@dataclass(frozen=True)
class TuningData:
    """Rows of one file.

    Attributes:
        rows: dialogues or preferences, in the file's order.
        name: of the file.
        digest: SHA-256 of its bytes, in hex.
        licence: identifier, or None where it is not known.
    """

    rows: tuple[Any, ...]
    name: str
    digest: str
    licence: str | None


def read_dialogues(data: str) -> TuningData:
    """Dialogues of a ``.jsonl`` file, or the ``built-in`` ones.

    Raises:
        UsageError: it cannot be read, has fewer than two rows, or one of another form; file and
            line are named.
    """
    return _read(data, "chat.jsonl", _dialogue)


def read_preferences(data: str) -> TuningData:
    """Pairs of answers of a ``.jsonl`` file, or the ``built-in`` ones; see `read_dialogues`."""
    return _read(data, "preferences.jsonl", _preference)


def split_held_out(rows: Sequence[_Row], share: float) -> tuple[list[_Row], list[_Row]]:
    """Rows to train on and rows held out: a tenth holds out every tenth row.

    Raises:
        UsageError: a share that leaves nothing on one of the two sides.
    """
    kept: tuple[list[_Row], list[_Row]] = ([], [])
    for i, row in enumerate(rows):
        kept[int((i + 1) * share) > int(i * share)].append(row)
    if not all(kept):
        raise UsageError(
            f"a share of {share:g} of {len(rows)} rows leaves {len(kept[0])} to train on and "
            f"{len(kept[1])} held out; choose another --eval-share."
        )
    return kept


def _read(data: str, builtin: str, parse: Callable[[dict[str, Any], str], Any]) -> TuningData:
    if data == BUILTIN_DATA and not Path(data).exists():
        place = files("dus_edge.data").joinpath("dialogues", builtin)
        with as_file(place) as path:
            return _read_file(path, f"{BUILTIN_DATA} {builtin}", BUILTIN_LICENCE, parse)
    return _read_file(Path(data), Path(data).name, None, parse)


def _read_file(
    path: Path, name: str, licence: str | None, parse: Callable[[dict[str, Any], str], Any]
) -> TuningData:
    try:
        data = path.read_bytes()
        # With -sig, a byte order mark at the start is not text.
        text = data.decode("utf-8-sig")
    except OSError as e:
        raise UsageError(f"{path}: cannot be read ({e.strerror or e}); name another.") from None
    except UnicodeDecodeError as e:
        raise UsageError(
            f"{path}: byte {e.start} is not UTF-8 text; convert the file to UTF-8."
        ) from None
    rows = tuple(parse(row, where) for row, where in _objects(path, text))
    if len(rows) < _FEWEST:
        raise UsageError(
            f"{path}: {len(rows)} rows are too few, one must be held out and one trained on; "
            "add more."
        )
    return TuningData(rows, name, hashlib.sha256(data).hexdigest(), licence)


def _objects(path: Path, text: str) -> Iterator[tuple[dict[str, Any], str]]:
    # Not splitlines: JSON strings may hold U+2028 and its kin as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = parse_strict(line)
        except (ValueError, RecursionError) as e:
            raise UsageError(
                f"{where}: not valid JSON ({e}); a .jsonl file has one object per line."
            ) from None
        if not isinstance(row, dict):
            raise UsageError(
                f"{where}: a JSON object is expected, not {type(row).__name__}; "
                "a .jsonl file has one object per line."
            )
        yield row, where


def _dialogue(row: dict[str, Any], where: str) -> Dialogue:
    if "messages" in row:
        messages = _messages(row["messages"], f"{where}: messages")
    elif "prompt" in row and "completion" in row:
        messages = (
            *_messages(row["prompt"], f"{where}: prompt", _USER),
            *_messages(row["completion"], f"{where}: completion", _ASSISTANT),
        )
    else:
        raise UsageError(
            f"{where}: neither messages nor prompt and completion are there (the row's fields: "
            f"{', '.join(row) or 'none'}); rename them."
        )
    _check_turns(messages, where)
    if messages[-1]["role"] != _ASSISTANT:
        raise UsageError(
            f"{where}: the last message is not the assistant's, so nothing in it is learnt; "
            "add the answer, or leave the row out."
        )
    return Dialogue(messages, _language(row), where)


def _preference(row: dict[str, Any], where: str) -> Preference:
    for name in ("prompt", "chosen", "rejected"):
        if name not in row:
            raise UsageError(
                f"{where}: the field {name!r} is missing (the row's fields: "
                f"{', '.join(row) or 'none'}); a pair has prompt, chosen and rejected."
            )
    prompt = _messages(row["prompt"], f"{where}: prompt", _USER)
    _check_turns(prompt, where)
    if prompt[-1]["role"] != _USER:
        raise UsageError(f"{where}: the prompt's last message is not the user's; correct it.")
    answers = [_answer(row[name], prompt, f"{where}: {name}") for name in ("chosen", "rejected")]
    if answers[0] == answers[1]:
        raise UsageError(f"{where}: chosen and rejected are the same; leave the row out.")
    return Preference(prompt, *answers, _language(row), where)


def _answer(value: Any, prompt: tuple[Turn, ...], where: str) -> str:
    """The one answer in a text, in a message, or in a conversation that repeats the prompt."""
    messages = _messages(value, where, _ASSISTANT)
    if messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    if len(messages) != 1 or messages[0]["role"] != _ASSISTANT:
        raise UsageError(
            f"{where} is not one message of the assistant behind the prompt; put what comes "
            "before the answer into prompt."
        )
    return messages[0]["content"]


def _messages(value: Any, where: str, role: str | None = None) -> tuple[Turn, ...]:
    """A list of messages; where a role is given, a text is one message of it."""
    if isinstance(value, str) and role is not None:
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise UsageError(f"{where} is {_kind(value)}, not a list of messages; correct it.")
    return tuple(_message(m, f"{where}[{i}]") for i, m in enumerate(value))


def _message(value: Any, where: str) -> Turn:
    if not isinstance(value, dict) or not {"role", "content"} <= value.keys():
        raise UsageError(f"{where} is no message; each has a role and a content.")
    # Tools, images, names: silence about them would train on half of a message.
    if more := sorted(name for name in value.keys() - {"role", "content"} if value[name]):
        raise UsageError(
            f"{where} has {', '.join(more)}, which is not trained on; leave it out, or the row."
        )
    role, content = value["role"], value["content"]
    if role not in (_SYSTEM, _USER, _ASSISTANT):
        raise UsageError(
            f"{where}: the role {json.dumps(role, ensure_ascii=False)} is not known; "
            "it is system, user or assistant."
        )
    if not isinstance(content, str):
        raise UsageError(f"{where}: the content is {_kind(content)}, not text; correct it.")
    if not content.strip():
        raise UsageError(f"{where}: the content is empty; write it, or leave the row out.")
    return {"role": role, "content": content.strip()}


def _check_turns(messages: Sequence[Turn], where: str) -> None:
    turns = messages[1:] if messages[0]["role"] == _SYSTEM else messages
    start = len(messages) - len(turns)
    for i, message in enumerate(turns):
        expected = (_USER, _ASSISTANT)[i % 2]
        if message["role"] != expected:
            raise UsageError(
                f"{where}: message {start + i} is of the {message['role']} where the {expected} "
                "is next; user and assistant take turns behind at most one system message."
            )
    if not turns:
        raise UsageError(f"{where}: there is only a system message; add the turns.")


def _kind(value: Any) -> str:
    if isinstance(value, list) and not value:
        return "empty"
    return "null" if value is None else type(value).__name__


def _language(row: dict[str, Any]) -> str:
    value = row.get("language", row.get("lang"))
    return value if isinstance(value, str) and value else _UNKNOWN
