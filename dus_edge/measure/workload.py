"""What to measure: llama-bench's settings, and the tests that they ask for."""

from __future__ import annotations

from dataclasses import dataclass

from dus_edge.errors import UsageError

ALL_LAYERS = -1
FLASH_ATTN = {"auto": -1, "off": 0, "on": 1}
#: Formats that llama.cpp keeps keys and values in.
LLAMA_KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")


@dataclass(frozen=True)
class BenchSettings:
    """How to measure; names and defaults are llama-bench's.

    Attributes:
        n_prompt: tokens of the prompt; 0 measures no prompt processing.
        n_gen: tokens that are generated; 0 measures no generation.
        repetitions: of each test, after its warm-up.
        depths: tokens that are in the cache before a test.
        n_batch: tokens that are handed over at once.
        n_ubatch: tokens that are computed at once.
        n_threads: of the CPU; None for its physical cores.
        n_gpu_layers: layers on the GPU; -1 for all.
        type_k: what keys are kept in, one of `LLAMA_KV_TYPES`.
        type_v: the same of values.
        flash_attn: ``auto``, ``on`` or ``off``.
        device: torch's device for folders; None for a GPU where there is one.

    Raises:
        UsageError: a value that cannot be.
    """

    n_prompt: int = 512
    n_gen: int = 128
    repetitions: int = 5
    depths: tuple[int, ...] = (0,)
    n_batch: int = 2048
    n_ubatch: int = 512
    n_threads: int | None = None
    n_gpu_layers: int = ALL_LAYERS
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attn: str = "auto"
    device: str | None = None

    def __post_init__(self) -> None:
        least = {"n_prompt": 0, "n_gen": 0, "repetitions": 1, "n_batch": 1, "n_ubatch": 1}
        sizes = [(name, getattr(self, name), n) for name, n in least.items()]
        sizes += [("depth", depth, 0) for depth in self.depths]
        sizes += [("n_gpu_layers", self.n_gpu_layers, ALL_LAYERS)]
        if self.n_threads is not None:
            sizes.append(("n_threads", self.n_threads, 1))
        for name, value, n in sizes:
            if value < n:
                raise UsageError(f"{name} is {value}; it must be at least {n}.")
        if not self.depths or not self.n_prompt + self.n_gen:
            raise UsageError("there is nothing to measure; give -p, -n or both above 0.")
        for name, value in (("type_k", self.type_k), ("type_v", self.type_v)):
            if value not in LLAMA_KV_TYPES:
                raise UsageError(f"{name} is {value!r}; take one of {', '.join(LLAMA_KV_TYPES)}.")
        if self.flash_attn not in FLASH_ATTN:
            raise UsageError(f"flash_attn is {self.flash_attn!r}; take auto, on or off.")

    def tests(self) -> tuple[Workload, ...]:
        """All tests, in llama-bench's order."""
        return tuple(
            Workload(n_prompt, n_gen, depth)
            for depth in self.depths
            for n_prompt, n_gen in ((self.n_prompt, 0), (0, self.n_gen))
            if n_prompt + n_gen
        )


@dataclass(frozen=True)
class Workload:
    """A prompt to process or tokens to generate, after `n_depth` tokens that are there."""

    n_prompt: int
    n_gen: int
    n_depth: int = 0

    @property
    def name(self) -> str:
        """``pp512``, ``tg128``, ``tg128 @ d4096``, as llama-bench calls it."""
        parts = [f"{kind}{n}" for kind, n in (("pp", self.n_prompt), ("tg", self.n_gen)) if n]
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def n_tokens(self) -> int:
        """Tokens that are timed."""
        return self.n_prompt + self.n_gen

    @property
    def n_ctx(self) -> int:
        """Tokens that the cache must hold."""
        return self.n_tokens + self.n_depth


def check_test_context(name: str, limit: int, settings: BenchSettings) -> None:
    """See that every test fits the context that a model was made for; 0 is not known.

    Raises:
        UsageError: one does not.
    """
    longest = max(settings.tests(), key=lambda test: test.n_ctx)
    if 0 < limit < longest.n_ctx:
        raise UsageError(
            f"{name}: {longest.name} needs a context of {longest.n_ctx} tokens and the model's "
            f"ends at {limit}; give a smaller -p, -n or --depth."
        )
