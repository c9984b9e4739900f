"""What runs a model for a conversation, whatever the format of its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from dus_edge.chat.template import ChatTemplate

#: llama.cpp's own defaults.
TEMPERATURE, TOP_P, TOP_K, MIN_P = 0.8, 0.95, 40, 0.05
#: Tokens of context where none are asked for, if the model has so many: a cache of keys and values
#: that fits beside the weights on a small device.
DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest.
        top_p: share of the probability that is chosen from.
        seed: the same seed gives the same answer; None: another each time.
    """

    temperature: float = TEMPERATURE
    top_p: float = TOP_P
    seed: int | None = None


@dataclass(frozen=True)
class Pass:
    """What a model was run for.

    Attributes:
        n_reused: tokens of the prompt that were in the cache.
        n_tokens: tokens of the answer, without the one that ended it.
        prompt_s: seconds until the first token.
        answer_s: seconds from there to the end.
        ended: whether the model ended the answer itself.
    """

    n_reused: int
    n_tokens: int
    prompt_s: float
    answer_s: float
    ended: bool


class Engine(Protocol):
    """A loaded model. A context manager: leaving it frees the memory.

    Attributes:
        name: what people call it.
        template: its own; None for a base model.
        n_ctx: tokens of prompt and answer together.
        stops: texts that end an answer, beside the tokens that do.
    """

    name: str
    template: ChatTemplate | None
    n_ctx: int
    stops: tuple[str, ...]

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered prompt: special tokens are spelled out in it, none is added."""
        ...

    def answer(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        n_most: int,
        on_text: Callable[[str], bool],
    ) -> Pass:
        """Answer a prompt; what the cache already holds of it is not computed again.

        Args:
            ids: the prompt's tokens, fewer than `n_ctx`.
            sampling: how tokens are chosen.
            n_most: tokens of the answer.
            on_text: takes the text of each token, which may be empty; False ends the answer.

        Raises:
            DusEdgeError: the model cannot be run.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None: ...


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def context_of(asked: int | None, context_length: int) -> int:
    """Tokens of context: what is asked for, else the model's own up to `DEFAULT_CONTEXT`."""
    return asked or min(context_length or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
