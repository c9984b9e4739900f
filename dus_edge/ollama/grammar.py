"""A strict reading of Ollama's Modelfile grammar, to check what we render.

The rules are those of Ollama's `parser/parser.go` and of `FormatParams` in `api/types.go`,
read from the source of 2026-08-21. They differ from what a Modelfile looks like: a `#` is a
comment only where a command could begin, there are no escapes, a value that begins with a
quote swallows lines until one ends in that quote, and characters that do not print are
dropped without a word.

Stricter than Ollama in one way: a name after PARAMETER that is the name of a command
(`PARAMETER system x`) sets that command in Ollama and is refused here.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from dus_edge.errors import DusEdgeError

MODELFILE_COMMANDS = (
    "adapter", "draft", "from", "license", "message", "parameter", "parser", "renderer",
    "requires", "system", "template",
)  # fmt: skip
ROLES = ("system", "user", "assistant")

_INTS = (
    "draft_num_predict", "main_gpu", "num_batch", "num_ctx", "num_gpu", "num_keep",
    "num_predict", "num_thread", "repeat_last_n", "seed", "top_k",
)  # fmt: skip
_FLOATS = (
    "frequency_penalty", "min_p", "presence_penalty", "repeat_penalty", "temperature", "top_p",
    "typical_p",
)  # fmt: skip
_BOOLS = ("use_mmap",)
_STRINGS = ("stop",)
# Ollama prints "parameter … is deprecated" and goes on.
_IGNORED = (
    "f16_kv", "logits_all", "low_vram", "mirostat", "mirostat_eta", "mirostat_tau",
    "penalize_newline", "use_mlock", "vocab_only",
)  # fmt: skip
PARAMETERS = (*_INTS, *_FLOATS, *_BOOLS, *_STRINGS)

_INT = re.compile(r"([+-]?)0*([0-9]{1,19})")
_FLOAT = re.compile(
    r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|inf|infinity|nan)", re.IGNORECASE
)
_TRUE = ("1", "t", "T", "TRUE", "true", "True")
_FALSE = ("0", "f", "F", "FALSE", "false", "False")
_SEMVER = re.compile(
    r"v?(?:0|[1-9][0-9]*)(?:\.(?:0|[1-9][0-9]*)(?:\.(?:0|[1-9][0-9]*)"
    r"(?:-[0-9A-Za-z.-]+)?(?:\+[0-9A-Za-z.-]+)?)?)?"
)
_MAX_FLOAT32 = 3.4028235677973366e38  # larger rounds to infinity, which ParseFloat refuses
_BLANK = " \t"
_NEWLINE = "\r\n"
_SKIPPED = re.compile(r"[ \t\r\n]+|#[^\r\n]*")
_LINE_END = re.compile(r"[\r\n]")
#: Longer than any command or name of a parameter.
_LONGEST_WORD = 64

Value = str | int | float | bool


class ModelfileError(DusEdgeError):
    """A Modelfile that Ollama would refuse, or would read as something else than is written."""

    exit_code = 2


@dataclass(frozen=True)
class Command:
    """One command. `key` is a parameter's name or a message's role, None for the others.

    A parameter's value has its type (`num_ctx` an int, `stop` a str); every other value is
    text. `ignored` marks a parameter that Ollama warns about and drops.
    """

    name: str
    value: Value
    line: int
    key: str | None = None
    ignored: bool = False


def decode_modelfile(data: bytes) -> str:
    """The text of a Modelfile's bytes: UTF-8, or UTF-16 with a byte-order mark."""
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    return data.decode(encoding, "replace")


def parse_modelfile(text: str) -> list[Command]:
    """The commands of a Modelfile, in order.

    Raises ModelfileError, with the line where the command begins, for whatever
    `ollama create` refuses to read: an unknown command or parameter, a value of the wrong
    type, a quote that is never closed, a role that does not exist, no FROM.
    """
    scanner = _Scanner(text)
    commands = []
    while scanner.to_command():
        commands.append(_command(scanner))
    if not any(command.name == "from" for command in commands):
        raise ModelfileError("The Modelfile has no FROM line.")
    return commands


def resolve_from(modelfile: Path, value: str) -> Path | None:
    """The file that a FROM value names, or None where Ollama takes it for a model's name.

    Paths are relative to the Modelfile's folder, whatever the working directory is.
    Raises ModelfileError for a folder: Ollama picks among what lies in it (the last of
    several GGUFs, without saying so) and fails if a `.json` lies beside a GGUF.
    """
    try:
        expanded = Path(value).expanduser() if value.startswith("~") else Path(value)
        path = modelfile.parent / expanded
        there, is_folder = path.exists(), path.is_dir()
    except (OSError, ValueError, RuntimeError):  # no file can have such a name, nor a user
        return None
    if is_folder:
        raise ModelfileError(
            f"{modelfile}: FROM {value} names a folder; name the one .gguf file to run, because"
            " Ollama fails on a folder that also holds a .json file and takes the last of several"
            " GGUF files without saying so."
        )
    return path if value and there else None


def _command(scanner: "_Scanner") -> Command:
    line = scanner.line
    name = scanner.command_word()
    if name == "parameter":
        key = scanner.key("a parameter's name", lambda c: c.isascii() and (c.isalnum() or c == "_"))
        ignored = key in _IGNORED
        if not ignored and key not in PARAMETERS:
            raise ModelfileError(f"Line {line}: unknown parameter '{key}'.")
        raw = scanner.value(line)
        return Command(name, raw if ignored else _typed(key, raw, line), line, key, ignored)
    if name == "message":
        role = scanner.key("a role", lambda c: c.isascii() and c.isalpha())
        if role not in ROLES:
            raise ModelfileError(
                f"Line {line}: a message's role is system, user or assistant, not '{role}'."
            )
        return Command(name, scanner.value(line), line, role)
    value = scanner.value(line)
    if name == "requires" and not _SEMVER.fullmatch(value):
        raise ModelfileError(f"Line {line}: REQUIRES needs a version such as 0.14.0.")
    return Command(name, value, line)


class _Scanner:
    """A position in the text that knows its line."""

    def __init__(self, text: str) -> None:
        self._text = text.removeprefix("\ufeff")
        self._at = 0
        #: The line of a place that was asked for before; lines are counted from there on.
        self._known = (0, 1)

    @property
    def line(self) -> int:
        start, line = self._known
        text, at = self._text, min(self._at, len(self._text))
        line += text.count("\n", start, at) + text.count("\r", start, at)
        line -= text.count("\r\n", max(0, start - 1), at)
        self._known = at, line
        return line

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self) -> str:
        char = self._peek()
        self._at += 1
        return char

    def to_command(self) -> bool:
        """Skip blanks and comments; False at the end of the text."""
        while skipped := _SKIPPED.match(self._text, self._at):
            self._at = skipped.end()
        return self._at < len(self._text)

    def command_word(self) -> str:
        """The command in lower case, and the blank after it."""
        line, word = self.line, _printed(self._take())
        while (char := self._take()) and char not in _BLANK:
            if not (char.isascii() and char.isalpha()) or len(word) > _LONGEST_WORD:
                raise _not_a_command(line, word + char)
            word += char
        if word.lower() not in MODELFILE_COMMANDS:
            raise _not_a_command(line, word)
        if not char:
            raise ModelfileError(f"Line {line}: {word} has no value.")
        return word.lower()

    def key(self, what: str, allowed) -> str:
        """The name between PARAMETER or MESSAGE and its value, and the blank after it."""
        line, word = self.line, ""
        while (char := self._take()) not in _BLANK or not char:
            if not char or not allowed(char) or len(word) > _LONGEST_WORD:
                raise ModelfileError(
                    f"Line {line}: {what} must be followed by a blank and a value; found"
                    f" {word + char!r}."
                )
            word += char
        return word

    def value(self, line: int) -> str:
        """The text up to the first line end at which it is whole."""
        first, end = self._rest_of_line()
        value = _unquote(first)
        if value is not None:
            return value
        quote = '"""' if first.strip(_BLANK).startswith('"""') else '"'
        held = [first]
        while end:
            held.append(end)
            rest, end = self._rest_of_line()
            held.append(rest)
            if rest.rstrip(_BLANK).endswith(quote):
                return _unquote("".join(held)) or ""
        raise ModelfileError(
            f"Line {line}: the quote that opens this value is never closed at a line's end."
        )

    def _rest_of_line(self) -> tuple[str, str]:
        """What prints up to the line's end, and the character that ends it; none at the end."""
        found = _LINE_END.search(self._text, self._at)
        stop = found.start() if found else len(self._text)
        line, end = self._text[self._at : stop], self._text[stop : stop + 1]
        self._at = stop + 1
        if not line.isprintable():
            line = "".join(c if c in _BLANK else _printed(c) for c in line)
        return line, end


def _printed(char: str) -> str:
    """Ollama drops what does not print: controls, no-break and zero-width spaces, U+2028 …"""
    return char if char.isprintable() else ""


def _unquote(text: str) -> str | None:
    text = text.strip(_BLANK + _NEWLINE)
    for quote in ('"""', '"'):
        if text.startswith(quote):
            whole = len(text) >= 2 * len(quote) and text.endswith(quote)
            return text[len(quote) : -len(quote)] if whole else None
    return text


def _typed(key: str, raw: str, line: int) -> Value:
    if key in _INTS:
        found = _INT.fullmatch(raw)
        if found and -(2**63) <= (number := int(found[1] + found[2])) < 2**63:
            return number
        raise ModelfileError(f"Line {line}: {key} takes a whole number, not {raw!r}.")
    if key in _FLOATS:
        if _FLOAT.fullmatch(raw):
            real, is_word = float(raw), raw.lstrip("+-")[0].isalpha()
            if is_word or abs(real) < _MAX_FLOAT32:
                return real
        raise ModelfileError(f"Line {line}: {key} takes a number, not {raw!r}.")
    if key in _BOOLS:
        if raw in _TRUE or raw in _FALSE:
            return raw in _TRUE
        raise ModelfileError(f"Line {line}: {key} takes true or false, not {raw!r}.")
    return raw


def _not_a_command(line: int, word: str) -> ModelfileError:
    names = ", ".join(MODELFILE_COMMANDS).upper()
    return ModelfileError(f"Line {line}: {word!r} is not a command; Ollama knows {names}.")
