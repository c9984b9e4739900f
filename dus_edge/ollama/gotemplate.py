"""A small evaluator of Go's text/template, and the way Ollama feeds it a conversation.

It covers what our templates use: `if`/`else if`/`else`, `range` with `break`/`continue` and
loop variables, variables and assignment, fields, parentheses, trim markers, comments and the
functions in `gofunctions`. Everything else is refused, so a template that passes here means
the same to Go (the tests compare the two where Go is installed).

References: text/template's documentation, and Ollama's `template/template.go`
(`Execute`, `collate`; source of 2026-08-21).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dus_edge.ollama.gofunctions import FUNCTIONS, GoTemplateError, takes
from dus_edge.words import cut_end, whole_number

Message = Mapping[str, str]


def render_conversation(template: str, messages: Sequence[Message]) -> str:
    """The prompt that Ollama makes of `messages` (dicts with role and content).

    As Ollama does, neighbours of one role are joined by a blank line first, and `.System`
    is all system messages together. Raises GoTemplateError, also for a template that does
    not use `.Messages`: Ollama feeds those one turn at a time, which we have no use for.
    """
    if not re.search(r"\.Messages\b", template):
        raise GoTemplateError("The template does not use .Messages.")
    merged: list[dict[str, str]] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if merged and merged[-1]["Role"] == role:
            merged[-1]["Content"] += "\n\n" + content
        else:
            merged.append({"Role": role, "Content": content})
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    return render(template, {"Messages": merged, "System": system, "Response": ""})


def render(template: str, data: Mapping[str, Any]) -> str:
    """Run `template` on `data`, a map whose missing keys are nil, as Ollama sets it.

    Maps inside `data` stand for Go structs: a field that they lack is an error.
    """
    out: list[str] = []
    try:
        _run(_parsed(template), _Scope(data, data, {"$": data}), out)
    except _Left as left:
        raise GoTemplateError(f"A {left} stands outside a range.") from None
    except RecursionError:
        raise GoTemplateError("The template is nested too deeply.") from None
    return "".join(out)


@lru_cache(maxsize=64)
def _parsed(template: str) -> list:
    return _block(iter(_split(template)), ())[0]


# --- reading ----------------------------------------------------------------------------

_SPACE = " \t\r\n"
#: Of one action; each parenthesis copies those that follow it.
_MOST_TOKENS = 1000
_ACTION = re.compile(r"\{\{(-(?=[ \t\r\n]))?(.*?)((?<=[ \t\r\n])-)?\}\}", re.DOTALL)
_TOKEN = re.compile(
    r"""\s*(:=|[=(),]|(?:"(?:[^"\\\n]|\\["\\nrt])*"|`[^`]*`|-?[0-9]+"""
    r"""|\$[A-Za-z_0-9]*(?:\.\w+)*|(?:\.\w+)+|\.|[A-Za-z_]\w*)(?=[\s(),=:]|$))""",
    re.ASCII,
)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}


@dataclass
class _Scope:
    """The dot and the variables of one block, inside those of the block around it."""

    root: Mapping[str, Any]
    dot: Any
    variables: dict[str, Any]
    outer: "_Scope | None" = None

    def inner(self, dot: Any, **variables: Any) -> "_Scope":
        return _Scope(self.root, dot, variables, self)

    def holder(self, name: str) -> dict[str, Any]:
        if name in self.variables:
            return self.variables
        if self.outer is None:
            raise GoTemplateError(f"The variable {name} is not declared.")
        return self.outer.holder(name)


_Expression = Callable[[_Scope], Any]


@dataclass(frozen=True)
class _Output:
    expression: _Expression


@dataclass(frozen=True)
class _Assign:
    name: str
    declares: bool
    expression: _Expression


@dataclass(frozen=True)
class _If:
    condition: _Expression
    body: list
    otherwise: list


@dataclass(frozen=True)
class _Range:
    names: list[str]
    over: _Expression
    body: list
    otherwise: list


@dataclass(frozen=True)
class _Leave:
    word: str  # break or continue


@dataclass
class _Action:
    tokens: list[str]


def _split(template: str) -> list[str | _Action]:
    """Text and actions in turn, with the trim markers applied and comments dropped."""
    pieces: list[str | _Action] = []
    at, trimmed = 0, False
    for action in _ACTION.finditer(template):
        text = template[at : action.start()]
        text = text.lstrip(_SPACE) if trimmed else text
        pieces.append(text.rstrip(_SPACE) if action[1] else text)
        if not (action[2].strip().startswith("/*") and action[2].strip().endswith("*/")):
            pieces.append(_Action(_tokens(action[2].strip())))
        at, trimmed = action.end(), action[3] is not None
    rest = template[at:]
    if "{{" in rest:
        raise GoTemplateError("An action is not closed by }}.")
    return [*pieces, rest.lstrip(_SPACE) if trimmed else rest]


def _tokens(body: str) -> list[str]:
    tokens, at = [], 0
    while at < len(body):
        match = _TOKEN.match(body, at)
        if not match:
            raise GoTemplateError(f"Cannot read {cut_end(body[at:], 60)!r} in an action.")
        if len(tokens) == _MOST_TOKENS:
            raise GoTemplateError(f"An action has more than {_MOST_TOKENS} words.")
        tokens.append(match[1])
        at = match.end()
    return tokens


def _block(pieces, ends: tuple[str, ...]) -> tuple[list, list[str]]:
    """The nodes up to one of `ends`, and the tokens of the action that ended them."""
    nodes: list = []
    for piece in pieces:
        if isinstance(piece, str):
            nodes.append(piece)
        elif piece.tokens[:1] in (["else"], ["end"]):
            if piece.tokens[0] not in ends:
                raise GoTemplateError(f"Unexpected {piece.tokens[0]}.")
            return nodes, piece.tokens
        else:
            nodes.append(_node(pieces, piece.tokens))
    if ends:
        raise GoTemplateError("An if or a range has no end.")
    return nodes, []


def _node(pieces, tokens: list[str]):
    match tokens:
        case ["if", *condition]:
            body, ended = _block(pieces, ("else", "end"))
            return _If(_whole(condition), body, _otherwise(pieces, ended))
        case ["range", *rest]:
            names = []
            if ":=" in rest:
                names = [t for t in rest[: rest.index(":=")] if t != ","]
                rest = rest[rest.index(":=") + 1 :]
            body, ended = _block(pieces, ("else", "end"))
            return _Range(names, _whole(rest), body, _otherwise(pieces, ended))
        case ["break" | "continue" as word]:
            return _Leave(word)
        case [name, ":=" | "=" as operator, *rest] if name.startswith("$"):
            return _Assign(name, operator == ":=", _whole(rest))
    return _Output(_whole(tokens))


def _otherwise(pieces, ended: list[str]) -> list:
    match ended:
        case ["end"]:
            return []
        case ["else", "if", *condition]:  # shares the end of the if that it continues
            return [_node(pieces, ["if", *condition])]
        case ["else"]:
            return _block(pieces, ("end",))[0]
    raise GoTemplateError(f"Cannot read {' '.join(ended)!r}.")


def _whole(tokens: list[str]) -> _Expression:
    expression, rest = _command(tokens)
    if rest:
        raise GoTemplateError(f"Unexpected {rest[0]!r} in an action.")
    return expression


def _command(tokens: list[str]) -> tuple[_Expression, list[str]]:
    """A function with its operands, or one operand, up to a closing parenthesis."""
    function = FUNCTIONS.get(tokens[0]) if tokens else None
    operands, rest = [], tokens[1:] if function else tokens
    while rest and rest[0] != ")":
        operand, rest = _operand(rest)
        operands.append(operand)
    if function:
        if not takes(function, len(operands)):
            raise GoTemplateError(f"{tokens[0]} does not take {len(operands)} values.")
        return lambda scope: function(*(lambda o=o: o(scope) for o in operands)), rest
    if len(operands) != 1:
        raise GoTemplateError("An action needs one value or a known function.")
    return operands[0], rest


def _operand(tokens: list[str]) -> tuple[_Expression, list[str]]:
    token, rest = tokens[0], tokens[1:]
    if token == "(":
        expression, rest = _command(rest)
        if not rest:
            raise GoTemplateError("A parenthesis is not closed.")
        return expression, rest[1:]
    if token[0] in "$.":
        start, *names = token.split(".")
        names = [name for name in names if name]
        return lambda scope: _fields(scope, start, names), rest
    value = _literal(token)
    return lambda scope: value, rest


def _literal(token: str) -> Any:
    if token in ("true", "false"):
        return token == "true"
    if token[0] == "`":
        return token[1:-1]
    if token[0] == '"':
        return re.sub(r"\\(.)", lambda escape: _ESCAPES[escape[1]], token[1:-1])
    if (number := whole_number(token.removeprefix("-"))) is not None:
        return -number if token[0] == "-" else number
    raise GoTemplateError(f"Unknown function or word {token!r}.")


# --- running ----------------------------------------------------------------------------


class _Left(Exception):
    """A break or continue on its way to its range."""


def _run(nodes: list, scope: _Scope, out: list[str]) -> None:
    for node in nodes:
        match node:
            case str():
                out.append(node)
            case _Output(expression):
                out.append(_printed(expression(scope)))
            case _Assign(name, declares, expression):
                value = expression(scope)
                (scope.variables if declares else scope.holder(name))[name] = value
            case _If(condition, body, otherwise):
                _run(body if condition(scope) else otherwise, scope.inner(scope.dot), out)
            case _Range():
                _run_range(node, scope, out)
            case _Leave(word):
                raise _Left(word)


def _run_range(node: _Range, scope: _Scope, out: list[str]) -> None:
    items = node.over(scope)
    if items is not None and not isinstance(items, list | tuple):
        raise GoTemplateError(f"A range over a {type(items).__name__} is not supported.")
    for index, item in enumerate(items or ()):
        # One name takes the item, two the index and the item.
        values = dict(zip(node.names[::-1], (item, index), strict=False))
        try:
            _run(node.body, scope.inner(item, **values), out)
        except _Left as left:
            if left.args == ("break",):
                break
    if not items:
        _run(node.otherwise, scope.inner(scope.dot), out)


def _fields(scope: _Scope, start: str, names: list[str]) -> Any:
    value = scope.holder(start)[start] if start else scope.dot
    for name in names:
        if not isinstance(value, Mapping) or (name not in value and value is not scope.root):
            raise GoTemplateError(f"There is no field {name}.")
        value = value.get(name)
    return value


def _printed(value: Any) -> str:
    if value is None:
        return "<no value>"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int):
        return str(value)
    raise GoTemplateError(f"Printing a {type(value).__name__} is not supported.")
