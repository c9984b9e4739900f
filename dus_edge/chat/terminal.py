"""A conversation in a terminal, or with what is piped in."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TextIO

from dus_edge.chat.session import Answer, Conversation
from dus_edge.errors import DusEdgeError
from dus_edge.words import brief_time, printable, wrap

_PROMPT = ">>> "
_HELP = """\
/system TEXT  set the system message; alone: show it
/reset        forget what was said
/exit         leave; so does the end of input (Ctrl-D)
/help         show this
Ctrl-C ends an answer. Anything else is a message; // begins one with a slash."""


def talk(conversation: Conversation, source: TextIO, interactive: bool) -> int:
    """Read messages and answer them until the input ends.

    Answers go to standard output, everything else to standard error.

    Args:
        conversation: with a loaded model.
        source: one message a line.
        interactive: whether a person types: there is a prompt, and errors do not end it.

    Returns:
        how many messages could not be answered.
    """
    failed = 0
    for line in _lines(source, interactive):
        text = line.strip()
        if not text:
            continue
        if text.startswith("/") and not text.startswith("//"):
            if _command(conversation, text):
                break
            continue
        try:
            answer_once(conversation, text.removeprefix("/") if text[:2] == "//" else text)
        except DusEdgeError as e:
            failed += 1
            say(f"dus-edge: {e}")
            if not interactive:
                break
    return failed


def answer_once(conversation: Conversation, question: str) -> Answer:
    """Print the answer to one message as it is written, and below it how fast that was.

    Raises:
        DusEdgeError: it cannot be answered.
    """
    shown = _Shown(sys.stdout)
    with _until_interrupted() as wanted:
        answer = conversation.ask(question, shown.write, wanted)
    shown.end()
    for line in notes_of(answer, conversation.engine.n_ctx):
        say(line)
    return answer


def notes_of(answer: Answer, n_ctx: int) -> list[str]:
    """What there is to say below an answer."""
    ran = answer.ran
    rate = f", {answer.tokens_per_s:.1f} tok/s" if answer.tokens_per_s else ""
    cached = f" ({ran.n_reused:,} cached)" if ran.n_reused else ""
    lines = []
    if answer.n_dropped:
        lines.append(
            f"The context of {n_ctx:,} tokens is full: the oldest {answer.n_dropped} messages "
            "are forgotten."
        )
    if answer.why == "context":
        lines.append(f"The answer was cut: the context of {n_ctx:,} tokens is full.")
    if answer.why == "length":
        lines.append("The answer was cut at --max-tokens.")
    lines.append(
        f"[{ran.n_tokens:,} tokens{rate}; prompt {answer.n_prompt:,} tokens{cached}, "
        f"{brief_time(ran.prompt_s)}]"
    )
    return lines


def say(line: str) -> None:
    """A line about the conversation, on standard error."""
    print(wrap(printable(line)), file=sys.stderr, flush=True)


def _command(conversation: Conversation, text: str) -> bool:
    """Do what a line with a slash asks for; whether it ends the conversation."""
    name, _, rest = text.partition(" ")
    match name:
        case "/exit" | "/quit" | "/bye":
            return True
        case "/reset":
            conversation.reset()
            say("Forgotten.")
        case "/system" if rest.strip():
            conversation.system = rest.strip()
            say("The system message is set.")
        case "/system":
            say(conversation.system or "There is no system message.")
        case "/help" | "/?":
            print(_HELP, file=sys.stderr, flush=True)
        case _:
            say(f"There is no {name}; /help lists what there is.")
    return False


def _lines(source: TextIO, interactive: bool) -> Iterator[str]:
    if not interactive:
        yield from source
        return
    with contextlib.suppress(ImportError):  # arrow keys and history, where the system has them
        import readline  # noqa: F401
    while True:
        try:
            yield input(_PROMPT)
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:  # drops the line that was being typed
            print(file=sys.stderr)


@contextlib.contextmanager
def _until_interrupted() -> Iterator[Callable[[], bool]]:
    """Whether the answer is still wanted: the first Ctrl-C says no, the second ends the program."""
    pressed = False

    def press(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before: Any = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: not pressed
    finally:
        signal.signal(signal.SIGINT, before)


class _Shown:
    """An answer on its way to a stream: no blanks before it, one line end after it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._begun, self._last = stream, False, ""

    def write(self, text: str) -> None:
        """What a model writes cannot steer the terminal."""
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        if text:
            self._last = text[-1]
            self._stream.write("\t".join(printable(part) for part in text.split("\t")))
            self._stream.flush()

    def end(self) -> None:
        if self._last != "\n":
            self._stream.write("\n")
        self._stream.flush()
