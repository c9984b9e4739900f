"""Text to calibrate and to evaluate on: the built-in mix, or the user's own files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from dus_edge.errors import UsageError

#: What kinds of text the built-in mix has.
BUILTIN_LANGUAGES = ("en", "ko", "code")
CODE = "code"
TEXT = "text"

DEFAULT_FIELD = "text"
#: Fields of a JSONL row that may name its language, the first that does wins.
LANGUAGE_FIELDS = ("language", "lang")

_CODE_SUFFIXES = (
    ".asm .bash .c .cc .clj .cpp .cs .css .cu .cuh .cxx .dart .el .erl .ex .exs .f90 .go .h .hh "
    ".hpp .hs .java .jl .js .jsx .kt .kts .lua .m .ml .mm .php .pl .pm .proto .ps1 .py .pyi .r "
    ".rb .rs .s .scala .sh .sql .swift .tcl .ts .tsx .v .vhd .vue .zig .zsh"
)
_TEXT_SUFFIXES = (
    ".adoc .cfg .conf .csv .htm .html .ini .json .log .markdown .md .org .raw .rst .tex .text "
    ".toml .tsv .txt .xml .yaml .yml"
)
_ROWS_SUFFIX = ".jsonl"


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        text: not blank.
        language: the stream that it belongs to: ``en``, ``ko``, ``code``, ``text``, or what a
            JSONL row says.
        origin: for people: the file, and the line of a JSONL row.
    """

    text: str
    language: str
    origin: str


def builtin_documents(split: Literal["calibration", "evaluation"]) -> list[Document]:
    """The text that comes with the package, in English, Korean and program code.

    Written for this project (``dus_edge/data/texts/README.md``). The two splits are on different
    subjects and share no paragraph, so that a file which was calibrated on the one can be
    evaluated on the other.

    Returns:
        One document per file, languages one after the other, in the same order every time.
    """
    folder = files("dus_edge.data").joinpath("texts", split)
    found = sorted((f for f in folder.iterdir() if f.name.endswith(".txt")), key=lambda f: f.name)
    documents = [
        Document(f.read_text(encoding="utf-8"), f.name.partition("-")[0], f"{split}/{f.name}")
        for f in found
    ]
    return sorted(documents, key=lambda d: BUILTIN_LANGUAGES.index(d.language))


def read_documents(paths: Sequence[Path], field: str | None) -> list[Document]:
    """The documents in files and folders.

    Args:
        paths: a file is one document, by its suffix in the language ``code`` or ``text``; a
            ``.jsonl`` file is one document per row that is not blank. A folder is all files in
            it and below that have a suffix of text, in order of their paths; hidden ones and
            blank ones are passed over.
        field: where a row has its text; ``text`` by default. A row's language is its own
            ``language`` or ``lang`` if that is a string, else ``text``.

    Raises:
        UsageError: a path does not exist or has no text, a file is not UTF-8, a row is not an
            object with the field.
    """
    field = DEFAULT_FIELD if field is None else field
    documents: list[Document] = []
    for path in paths:
        if path.is_dir():
            found = [d for file in _files_below(path) for d in _read_file(file, field)]
            if not found:
                raise UsageError(
                    f"{path}: no text is in this folder (files such as .txt, .md, .py or .jsonl); "
                    "name another folder, or the files themselves."
                )
        else:
            found = _read_file(path, field)
            if not found:
                raise UsageError(f"{path}: the file has no text; name another.")
        documents += found
    return documents


def _files_below(folder: Path) -> Iterator[Path]:
    known = {*_CODE_SUFFIXES.split(), *_TEXT_SUFFIXES.split(), _ROWS_SUFFIX}
    below: list[Path] = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below += [Path(root, name) for name in names if not name.startswith(".")]
    return (path for path in sorted(below) if path.suffix.lower() in known and path.is_file())


def _read_file(path: Path, field: str) -> list[Document]:
    """A file's documents; none if it is blank."""
    text = _read_utf8(path)
    suffix = path.suffix.lower()
    if suffix == _ROWS_SUFFIX:
        return list(_read_rows(path, text, field))
    language = CODE if suffix in _CODE_SUFFIXES.split() else TEXT
    return [Document(text, language, str(path))] if text.strip() else []


def _read_utf8(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UsageError(f"{path}: cannot be read ({e.strerror or e}); name another.") from None
    try:
        # With -sig, a byte order mark at the start is not text.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UsageError(
            f"{path}: byte {e.start} is not UTF-8 text; convert the file to UTF-8 or leave it out."
        ) from None
    if (at := text.find("\0")) >= 0:
        raise UsageError(
            f"{path}: character {at} is NUL, so this is no text file; convert it to UTF-8 "
            "or leave it out."
        )
    return text


def _read_rows(path: Path, text: str, field: str) -> Iterator[Document]:
    # Not splitlines: JSON strings may hold U+2028 and its kin as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        row = _parse_row(line, where)
        value = row.get(field)
        if not isinstance(value, str):
            problem = f"is {type(value).__name__}, not text" if field in row else "is missing"
            names = ", ".join(row) or "none"
            raise UsageError(
                f"{where}: the field {field!r} {problem}; name the one with the text "
                f"(the row's fields: {names})."
            )
        if value.strip():
            yield Document(value, _row_language(row), where)


def _parse_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as e:
        raise UsageError(
            f"{where}: not valid JSON ({e}); a .jsonl file has one object per line."
        ) from None
    if not isinstance(row, dict):
        raise UsageError(
            f"{where}: a JSON object is expected, not {type(row).__name__}; "
            "a .jsonl file has one object per line."
        )
    return row


def _row_language(row: dict[str, Any]) -> str:
    values = (row.get(name) for name in LANGUAGE_FIELDS)
    return next((value for value in values if isinstance(value, str) and value), TEXT)
