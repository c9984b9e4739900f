"""How a model is tuned: settings and their defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Parameters from which a model is tuned by an adapter unless asked otherwise: full training takes
#: 16 bytes for each.
ADAPTER_FROM = 1_000_000_000
#: Defaults that fit SOLAR's shape, 10.7 B parameters, into 12 GB with `--qlora`.
DEFAULT_RANK = 16
DEFAULT_MAX_TOKENS = 2048
#: Share of the steps over which the learning rate rises; it falls as a cosine behind them.
WARM_UP = 0.03
#: Checkpoints of a whole run, beside the one that Ctrl-C makes.
_N_CHECKPOINTS = 10


@dataclass(frozen=True)
class TuneSettings:
    """Settings of one run; two runs with the same ones and the same data give the same result.

    Attributes:
        goal: ``sft`` or ``dpo``.
        method: ``full``, ``lora`` or ``qlora``.
        device: ``cpu`` or ``cuda``.
        n_ctx: the most tokens of an example.
        n_steps: optimizer steps.
        batch: examples of a step.
        micro_batch: examples that are computed at once; it divides `batch`.
        learning_rate: its highest.
        rank: of adapters; alpha is twice that.
        beta: of DPO, how much the distance from the reference counts.
        seed: of order and of adapters.
        save_every: steps from one checkpoint to the next.
    """

    goal: str
    method: str
    device: str
    n_ctx: int
    n_steps: int
    batch: int
    micro_batch: int
    learning_rate: float
    rank: int
    beta: float
    seed: int
    save_every: int

    @property
    def is_adapter(self) -> bool:
        """Whether an adapter is trained, and not the model itself."""
        return self.method != "full"

    @property
    def n_warm_up(self) -> int:
        """Steps over which the learning rate rises."""
        return max(1, round(WARM_UP * self.n_steps))


def default_method(n_parameters: int) -> str:
    """``lora`` for what is large, ``full`` for what is small."""
    return "lora" if n_parameters >= ADAPTER_FROM else "full"


def default_learning_rate(goal: str, method: str, n_parameters: int) -> float:
    """The learning rate where none is given.

    Adapters: 2e-4 as in QLoRA (arXiv:2305.14314, table 9); full training 2e-5, and more for small
    models. DPO takes a fortieth of that. The small models' were tried on the built-in base alone.
    """
    sft = 2e-4
    if method == "full":
        sft = 2e-5 if n_parameters >= ADAPTER_FROM else 1e-4 if n_parameters >= 1e8 else 1e-3
    return sft if goal == "sft" else sft / 40


def step_count(n_examples: int, batch: int, epochs: float) -> int:
    """Steps that go over all examples so many times, the last of each time perhaps smaller."""
    return max(1, math.ceil(math.ceil(n_examples / batch) * epochs))


def checkpoint_interval(n_steps: int) -> int:
    """Steps from one checkpoint to the next where it is not given."""
    return max(1, math.ceil(n_steps / _N_CHECKPOINTS))
