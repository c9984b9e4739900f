"""Ollama Modelfiles: what they say about a model, and their text.

Pure functions. Every text is read again by `grammar.parse_modelfile` and compared with what
it was made from before it is returned, so that a value the grammar cannot carry (a no-break
space, a line that ends in three quotes) is refused and never changed in silence.

A Modelfile here states its TEMPLATE and its stops, also for a base model: where TEMPLATE is
absent, Ollama takes the nearest of its own templates, and that one's stops, by edit distance
to the GGUF's (`autodetect`). The exceptions are chat templates that no Go template renders like,
and dated ones that Ollama runs itself: that is said in a comment, and their stops are given.
"""

import tomllib
import unicodedata
from dataclasses import dataclass

from dus_edge.ollama import chat
from dus_edge.ollama.grammar import Command, ModelfileError, Value, parse_modelfile
from dus_edge.ollama.recognise import ChatFormat
from dus_edge.ollama.remarks import format_remarks
from dus_edge.words import wrap

# A token of context costs 2 (K, V) x layers x KV heads x head size x 2 bytes of KV cache: for
# SOLAR's shape (48 layers, 8 KV heads of 128) 192 KiB. Beside the 6.0 GiB of its Q4_K_M, an
# 8 GiB card has room for 4096 tokens (0.75 GiB), not for 8192 and the compute buffers, let
# alone for the 32768 of a Mistral base (6 GiB). It is also SOLAR's own context length.
NUM_CTX_CAP = 4096

_QUOTES = ('"', '"""')
_COMMENT_WIDTH = 96
_UNKNOWN_LICENCES = ("", "other", "unknown")


@dataclass(frozen=True)
class ModelfileSpec:
    """What a Modelfile says. `from_path` is relative to the Modelfile's folder.

    None leaves a command out. `comment` holds paragraphs, which stand at the top, and
    `messages` pairs of role and text.
    """

    from_path: str
    template: str | None
    system: str | None
    parameters: tuple[tuple[str, Value], ...]
    licence: str | None
    comment: tuple[str, ...]
    messages: tuple[tuple[str, str], ...] = ()


def render_modelfile(spec: ModelfileSpec) -> str:
    """The Modelfile's text.

    Raises ModelfileError for a value that Ollama would not read as it is written, or would
    refuse: an unknown parameter, a value of the wrong type, text that cannot be quoted.
    """
    if spec.template == "":
        raise ModelfileError("An empty TEMPLATE counts as none in Ollama; leave it out instead.")
    if not spec.from_path:
        raise ModelfileError("FROM names no file.")
    sections = [
        _comment(spec.comment),
        [f"FROM {_from(spec.from_path)}"],
        [f"PARAMETER {name} {_parameter(name, value)}" for name, value in spec.parameters],
        _text("TEMPLATE", spec.template),
        _text("SYSTEM", spec.system),
        [line for role, text in spec.messages for line in _text(f"MESSAGE {role}", text)],
        _text("LICENSE", spec.licence),
    ]
    text = "\n\n".join("\n".join(section) for section in sections if section) + "\n"
    read = [(command.name, command.key, command.value) for command in _kept(text)]
    if read != _said(spec):
        raise ModelfileError("The Modelfile does not read back as it was meant.")
    return text


def completion_spec(
    *,
    from_path: str,
    num_ctx: int | None,
    licence: str | None,
    title: str,
    comment: tuple[str, ...] = (),
    eos_token: str = "</s>",
) -> ModelfileSpec:
    """A base model's Modelfile: it continues the text it is given, and nothing is added.

    `num_ctx` None leaves the context to Ollama.

    The turns of a chat are put together as they are; only a system message is set apart, by
    a blank line after it. The one stop is the tokenizer's end-of-text token.
    """
    what = (
        "A base model: it continues the text that it is given. The template adds nothing but a"
        " blank line after a system message."
    )
    return ModelfileSpec(
        from_path=from_path,
        template=chat.template_text("completion.gotmpl"),
        system=None,
        parameters=(*_context(num_ctx), ("stop", eos_token)),
        licence=licence_text(licence),
        comment=(title, what, *comment),
    )


def instruct_spec(
    *,
    from_path: str,
    family: chat.ChatFamily,
    num_ctx: int | None,
    licence: str | None,
    title: str,
    comment: tuple[str, ...] = (),
) -> ModelfileSpec:
    """The Modelfile of a model tuned on a known chat format; `num_ctx` None leaves it to Ollama."""
    notes = (family.notes,) if family.notes else ()
    said = (f"Chat format: {family.title} ({family.source}).", *notes)
    return _chat_spec(
        from_path=from_path,
        template=family.template,
        system=family.system,
        stops=family.stops,
        num_ctx=num_ctx,
        licence=licence,
        comment=(title, *said, *comment),
    )


def for_model(
    *,
    from_path: str,
    context_length: int,
    chat_format: ChatFormat | None,
    licence: str | None,
    title: str,
    comment: tuple[str, ...] = (),
    num_ctx_cap: int = NUM_CTX_CAP,
    eos_token: str = "</s>",
) -> ModelfileSpec:
    """The Modelfile of one exported model.

    `chat_format` is what `recognise_format` found; None for a checkpoint without a chat template,
    which is taken for a base model. A format without a family gets its stops and no TEMPLATE.
    `num_ctx` is the model's context length, at most `num_ctx_cap`.
    """
    num_ctx = min(context_length, num_ctx_cap)
    comment = (*comment, _num_ctx_comment(num_ctx, context_length))
    if licence_text(licence) is None:
        comment = (*comment, "Licence: unknown. The checkpoint names none, so LICENSE is left out.")
    if chat_format is None:
        return completion_spec(
            from_path=from_path,
            num_ctx=num_ctx,
            licence=licence,
            title=title,
            comment=comment,
            eos_token=eos_token,
        )
    family = None if chat_format.left else chat_format.family
    return _chat_spec(
        from_path=from_path,
        template=family.template if family else None,
        system=family.system if family else None,
        stops=tuple(stop for stop in chat_format.stops if _reads_as(f'"{stop}"', stop)),
        num_ctx=num_ctx,
        licence=licence,
        comment=(title, *format_remarks(chat_format), *comment),
    )


def _chat_spec(
    *,
    from_path: str,
    template: str | None,
    system: str | None,
    stops: tuple[str, ...],
    num_ctx: int | None,
    licence: str | None,
    comment: tuple[str, ...],
) -> ModelfileSpec:
    return ModelfileSpec(
        from_path=from_path,
        template=template,
        system=system,
        parameters=(*_context(num_ctx), *(("stop", stop) for stop in stops)),
        licence=licence_text(licence),
        comment=comment,
    )


def licence_text(licence: str | None) -> str | None:
    """What LICENSE says for a licence's identifier or text; None where it is not known.

    Text passes as it is, except that characters Ollama would drop become plain blanks or go.
    """
    if licence is None or licence.strip().lower() in _UNKNOWN_LICENCES:
        return None
    known = {
        entry["id"]: entry
        for entry in tomllib.loads(chat.template_text("licences.toml"))["licence"]
    }
    entry = known.get(licence.strip().lower())
    if entry:
        return f"{entry['title']} ({entry['id']})\n{entry['url']}"
    return "".join(_plain(char) for char in licence)


def _context(num_ctx: int | None) -> tuple[tuple[str, Value], ...]:
    return () if num_ctx is None else (("num_ctx", num_ctx),)


def _num_ctx_comment(num_ctx: int, context_length: int) -> str:
    if num_ctx == context_length:
        return f"num_ctx: {num_ctx}, the model's context length."
    return (
        f"num_ctx: {num_ctx} of the model's {context_length}, so that the KV cache fits beside"
        " the weights on a small device; raise it where there is memory."
    )


def _plain(char: str) -> str:
    if char.isprintable() or char in "\t\n":
        return char
    return " " if unicodedata.category(char) == "Zs" else ""


def _comment(paragraphs: tuple[str, ...]) -> list[str]:
    lines = []
    for paragraph in paragraphs:
        for line in paragraph.splitlines() or [""]:
            wrapped = wrap(
                line, _COMMENT_WIDTH, first="# ", rest="#   ", long_words=False, hyphens=False
            )
            lines += wrapped.splitlines() or ["#"]
    return lines


def _from(path: str) -> str:
    if _reads_as(path, path):
        return path
    return _quoted(path, "FROM")


def _parameter(name: str, value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return _quoted(value, f"The parameter {name}") if isinstance(value, str) else repr(value)


def _text(command: str, text: str | None) -> list[str]:
    """A command with free text, always in three quotes."""
    return [] if text is None else [f"{command} {_quoted(text, command, _QUOTES[1:])}"]


def _quoted(value: str, what: str, quotes: tuple[str, ...] = _QUOTES) -> str:
    for quote in quotes:
        if _reads_as(quote + value + quote, value):
            return quote + value + quote
    dropped = next((c for c in value if not c.isprintable() and c not in "\t\n\r"), None)
    if dropped:
        raise ModelfileError(
            f"{what} holds the character U+{ord(dropped):04X}, which Ollama drops from a"
            " Modelfile; remove it."
        )
    raise ModelfileError(
        f"{what} has a line that ends in three quotes, which would end the value there; change"
        " that line."
    )


def _reads_as(written: str, value: str) -> bool:
    """Whether a value written so is read as it was meant, and what follows it too."""
    try:
        read = parse_modelfile(f"SYSTEM {written}\nFROM x\n")
    except ModelfileError:
        return False
    return [command.value for command in read] == [value, "x"]


def _kept(text: str) -> list[Command]:
    return [command for command in parse_modelfile(text) if not command.ignored]


def _said(spec: ModelfileSpec) -> list[tuple[str, str | None, Value]]:
    """The commands of a specification as the grammar names them, in the order of rendering."""
    texts = [("template", spec.template), ("system", spec.system)]
    return [
        ("from", None, spec.from_path),
        *(("parameter", name, value) for name, value in spec.parameters),
        *((name, None, text) for name, text in texts if text is not None),
        *(("message", role, text) for role, text in spec.messages),
        *((("license", None, spec.licence),) if spec.licence is not None else ()),
    ]
