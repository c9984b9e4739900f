"""Prompts for a server that takes text and counts tokens, of the length that is asked for."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from dus_edge.errors import DusEdgeError
from dus_edge.measure.workload import Workload
from dus_edge.progress import Advance

#: Prompt of a generation test without a depth, as short as prompts are.
_SHORT_WORDS = 4
_SAMPLE_WORDS = 64
#: Tokens that a word may have for the samples to fit a short context.
_TOKENS_OF_A_WORD = 8
#: Share by which a prompt may be longer or shorter than asked for.
_TOLERANCE = 0.01
#: Prompts of a test that are tried at most to correct its length.
_TRIES = 8
#: A word that most tokenizers have whole, for the last few tokens of a prompt.
_FILL = "a"
#: Context that two samples need.
SAMPLE_TOKENS = 2 * _SAMPLE_WORDS * _TOKENS_OF_A_WORD

_WORDS = (
    *("amber", "river", "stone", "cloud", "garden", "winter", "copper", "forest", "mirror"),
    *("silver", "candle", "bridge", "harbor", "meadow", "violin", "lantern", "orchard", "pepper"),
    *("saddle", "tunnel", "valley", "whistle", "yellow", "anchor", "basket", "carpet", "dragon"),
    *("engine", "feather", "glacier", "hammer", "island", "jungle", "kettle", "ladder", "needle"),
)


@dataclass(frozen=True)
class Timings:
    """What Ollama says of one answer; times in nanoseconds.

    Attributes:
        prompt_tokens, prompt_ns: the prompt; cached tokens count but take no time.
        tokens, ns: generated tokens.
        load_ns: until the model was ready.
        first_s: seconds from the request to the first piece of the answer, by our clock.
    """

    prompt_tokens: int
    prompt_ns: int
    tokens: int
    ns: int
    load_ns: int
    first_s: float


#: Has a prompt answered with so many tokens.
Ask = Callable[[str, int], Timings]


def near(counted: int, wanted: int) -> bool:
    """Whether a prompt is as long as wanted, within 1 %."""
    return abs(counted - wanted) <= _TOLERANCE * wanted


@dataclass(frozen=True)
class PromptSize:
    """Of a prompt: words, and short ones for its last few tokens."""

    words: int
    fill: int = 0

    def corrected(self, off: int, tokens_per_word: float) -> PromptSize:
        """The size for a prompt that came out `off` tokens too long."""
        fill = self.fill - off
        change = math.floor(fill / tokens_per_word)  # short words that a whole one stands for
        return PromptSize(
            max(0, self.words + change), max(0, round(fill - change * tokens_per_word))
        )


class Prompts:
    """Prompts of the length asked for, by what the server counts of them."""

    def __init__(self, ask: Ask, n_ctx: int, seed: int | None) -> None:
        """Two prompts are asked, which tell how many tokens a word is.

        Args:
            ask: has a prompt answered with so many tokens.
            n_ctx: tokens of the context.
            seed: of the words; None for new ones every time.

        Raises:
            DusEdgeError: the server does not count prompts.
        """
        self._answer, self._words = ask, _Words(random.Random(seed))
        # Both must fit the context: a longer prompt is cut, and counted as cut.
        n_words = min(_SAMPLE_WORDS, max(1, n_ctx // (2 * _TOKENS_OF_A_WORD)))
        first = self._ask(PromptSize(n_words), 2)
        second = self._ask(PromptSize(2 * n_words), 1)
        #: Nanoseconds until the model was loaded, if the first prompt did so.
        self.load_ns = first.load_ns
        self._per_word = (second.prompt_tokens - first.prompt_tokens) / n_words
        self._sampled = PromptSize(n_words), first.prompt_tokens
        if self._per_word <= 0:
            raise DusEdgeError(
                f"Ollama counts {second.prompt_tokens} tokens of a prompt twice as long as one of "
                f"{first.prompt_tokens}; update Ollama."
            )

    def measure(self, test: Workload, n: int, context: int, advance: Advance) -> list[Timings]:
        """`n` answers to a test, after prompts of the length asked for as far as that goes."""
        wanted, n_gen = test.n_prompt or test.n_depth, test.n_gen or 1
        size, redraws = PromptSize(_SHORT_WORDS), 0
        if wanted:
            sampled, counted = self._sampled
            size = sampled.corrected(counted - wanted, self._per_word)
        # What the context does not hold is cut, so its count would say nothing of the words.
        if wanted and wanted + n_gen <= context:
            size, found = self._corrected(size, wanted)
            redraws = _TRIES if found else 0
        samples: list[Timings] = []
        while len(samples) < n:
            timings = self._ask(size, n_gen)
            if redraws and not near(timings.prompt_tokens, wanted):
                redraws -= 1  # another start has another number of tokens
                continue
            samples.append(timings)
            advance(1)
        return samples

    def _corrected(self, size: PromptSize, wanted: int) -> tuple[PromptSize, bool]:
        """The size nearest to what is wanted among those tried, and whether it is near enough."""
        found: list[tuple[int, PromptSize]] = []
        for _ in range(_TRIES):
            counted = self._ask(size, 1).prompt_tokens
            found.append((abs(counted - wanted), size))
            if near(counted, wanted):
                return size, True
            size = size.corrected(counted - wanted, self._per_word)
        return min(found, key=lambda pair: pair[0])[1], False

    def _ask(self, size: PromptSize, n_gen: int) -> Timings:
        return self._answer(self._words.prompt(size), n_gen)


class _Words:
    """Prompts that begin differently each time; those of one size have the same words."""

    def __init__(self, chance: random.Random) -> None:
        self._random = chance
        self._starts: set[str] = set()
        self._drawn: list[str] = []

    def prompt(self, size: PromptSize) -> str:
        """Words that are known, in any order, after a start that no prompt had."""
        self._drawn += self._random.choices(_WORDS, k=max(0, size.words - len(self._drawn)))
        words = self._drawn[: size.words]
        self._random.shuffle(words)
        while (start := f"{self._random.getrandbits(24):06x}") in self._starts:
            pass
        self._starts.add(start)
        # The start is always as many characters, so that prompts differ little in tokens.
        return " ".join([start, *words, *[_FILL] * size.fill])
