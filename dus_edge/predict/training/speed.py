"""How fast a device trains: predicted, from the operations of a token and published efficiencies.

Operations of a token, with P weights in linear matrices of a layer, L layers, a head of V × d, and
attention of 2 × (heads × head size) × sequence a layer (a causal token looks back on half of them):

    forward    Σ 2P + attention, and 2Vd
    backward   the same again for the gradient of inputs of every layer from the lowest trained one
               up, twice attention's; 2P for every trained layer's weights; 2Vd for the head's
               inputs, and 2Vd if it is trained
    again      the forward of the layers that are checkpointed
    adapters   2A forward, 4A backward

The device does a share of its dense matrix rate in 16 bits with f32 sums (`fp16_tflops_dense`),
which is also that of bf16. The share is an interval, the lowest to the highest of the published
runs in `benchmarks/published/training.json`, by method; `data/training_speed.toml` keeps it. Those
ran on A100, H100 and RTX 4090 only. What cards on several sockets or nodes lose is not predicted.
"""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass

from dus_edge import data
from dus_edge.checkpoint.config import ModelConfig
from dus_edge.errors import DusEdgeError, UsageError
from dus_edge.predict.devices import Device
from dus_edge.predict.training.activations import OUT, TRAINED, Activations
from dus_edge.predict.training.parameters import count_parameters
from dus_edge.predict.training.work import TrainingWork

SPEED_FILE = "training_speed.toml"
#: Tokens of a micro-batch from which a card is busy; with fewer the low end falls in proportion.
#: In the published runs of Qwen-1.8B to 14B the rate at 256 is 0.21 to 0.66 of that at 2,048.
BUSY_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Share of the dense matrix rate that published runs reached.

    Attributes:
        low: the lowest.
        middle: the geometric mean.
        high: the highest.
        rows: number of runs.
    """

    low: float
    middle: float
    high: float
    rows: int


@dataclass(frozen=True, slots=True)
class TrainingSpeed:
    """Tokens a second of all cards together: predicted."""

    tokens_per_s: float
    tokens_per_s_low: float
    tokens_per_s_high: float
    flops_per_token: float

    def hours(self, tokens: int) -> tuple[float, float, float]:
        """Hours for so many tokens: expected, least, most."""
        rates = (self.tokens_per_s, self.tokens_per_s_high, self.tokens_per_s_low)
        expected, least, most = (tokens / rate / 3600 for rate in rates)
        return expected, least, most


def flops_per_token(config: ModelConfig, work: TrainingWork) -> float:
    """Floating point operations that a token costs; see the module's text."""
    n, made = count_parameters(config, work.lora_rank), Activations(config, work)
    attention = 2 * config.q_width * work.sequence
    forward = 2 * n.linear + attention
    head = 2 * config.vocab_size * config.hidden_size
    total = float(2 * head + (head if work.ends and not work.lora_rank else 0))
    for i in range(n.n_layers):
        kind = made.kind(i)
        total += forward
        if kind == OUT:
            continue
        total += forward + attention + (forward if work.checkpointing else 0)
        total += 2 * n.linear if kind == TRAINED else 0
        total += 6 * n.adapter
    return total


def cost_in_forwards(config: ModelConfig, work: TrainingWork) -> float:
    """Operations of a token that is trained on, in those of one that only runs forward."""
    n = count_parameters(config, work.lora_rank)
    layer = 2 * n.linear + 2 * config.q_width * work.sequence
    forward = n.n_layers * layer + 2 * config.vocab_size * config.hidden_size
    return flops_per_token(config, work) / forward


def load_efficiencies() -> dict[str, Efficiency]:
    """By method: ``full``, ``lora``, ``qlora``."""
    return dict(_efficiencies())


def training_speed(config: ModelConfig, work: TrainingWork, device: Device) -> TrainingSpeed:
    """The rate at which a device, or several like it, train.

    Args:
        config: of the model that is trained.
        work: what is trained, and how; `gpus` are all counted.
        device: one of `load_devices`, or the machine's own.

    Raises:
        UsageError: the device's matrix rate is not known, or it is no NVIDIA card.
    """
    if device.backend != "CUDA" or not device.fp16_tflops_dense:
        raise UsageError(
            f"the matrix rate of {device.name} is not known; a short run tells tokens a second."
        )
    if work.precision == "f32":
        raise UsageError("published rates are of 16-bit training; a short run in f32 tells more.")
    method = "qlora" if work.quantized else "lora" if work.lora_rank else "full"
    share = load_efficiencies()[method]
    busy = min(1.0, work.tokens / BUSY_TOKENS)
    flops = flops_per_token(config, work)
    most = device.fp16_tflops_dense * 1e12 * work.gpus / flops
    return TrainingSpeed(
        tokens_per_s=most * share.middle * busy**0.5,
        tokens_per_s_low=most * share.low * busy,
        tokens_per_s_high=most * share.high,
        flops_per_token=flops,
    )


@functools.cache
def _efficiencies() -> tuple[tuple[str, Efficiency], ...]:
    try:
        tables = tomllib.loads(data.read_text(SPEED_FILE))
        found = tuple((name, Efficiency(**entry)) for name, entry in tables.items())
        missing = {"full", "lora", "qlora"} - {name for name, _ in found}
    except (tomllib.TOMLDecodeError, TypeError) as e:
        raise DusEdgeError(f"{SPEED_FILE} is damaged ({e!r}); install the package again.") from None
    if missing:
        raise DusEdgeError(f"{SPEED_FILE} has no table {min(missing)}; install the package again.")
    return found
