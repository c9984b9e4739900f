"""Does a training fit a device, how long does it take there, and if it does not fit, what would?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dus_edge.checkpoint.config import ModelConfig
from dus_edge.errors import UsageError
from dus_edge.predict.devices import Device
from dus_edge.predict.fit import UNSURE
from dus_edge.predict.memory.llama import usable_bytes, usual_platform
from dus_edge.predict.training.memory import TrainingMemory, plan_training
from dus_edge.predict.training.speed import TrainingSpeed, training_speed
from dus_edge.predict.training.work import TrainingWork, work_of_mode
from dus_edge.upscale.plan import DepthPlan

#: Cards that are tried where one does not do.
_CARDS = (2, 4, 8, 16, 32, 64)
#: Shortest sequence that is proposed.
_SHORTEST = 256
#: States of a training that are kept on disk, beside the one that is being written.
KEPT_STATES = 2


@dataclass(frozen=True, slots=True)
class Change:
    """One change that makes a training fit.

    Attributes:
        words: what to do, as options.
        work: what is trained then.
        memory: what that takes.
    """

    words: str
    work: TrainingWork
    memory: TrainingMemory


@dataclass(frozen=True, slots=True)
class TrainingVerdict:
    """Whether a training fits a device.

    Attributes:
        name: of the model.
        device: the device; of several cards, each.
        memory_gb: which of its memory sizes.
        platform: which rule of usable memory; None for the present machine.
        work: what is trained, and how.
        memory: of each card.
        usable_bytes: memory that a training may take of each.
        speed: None where it is not predicted.
        why_no_speed: then one sentence that says why.
        tokens: how many are to be trained on; None if that was not said.
        price_per_hour: of one card, in any currency; None if that was not said.
        changes: what would make it fit; empty where it does.
    """

    name: str
    device: Device
    memory_gb: float
    platform: str | None
    work: TrainingWork
    memory: TrainingMemory
    usable_bytes: int
    speed: TrainingSpeed | None
    why_no_speed: str | None
    tokens: int | None
    price_per_hour: float | None
    changes: tuple[Change, ...]

    @property
    def fits(self) -> bool:
        """Whether all of it is in the memory."""
        return self.memory.total_bytes <= self.usable_bytes

    @property
    def close(self) -> bool:
        """Whether it may turn out the other way."""
        return abs(self.memory.total_bytes - self.usable_bytes) < UNSURE * self.usable_bytes

    @property
    def disk_bytes(self) -> int:
        """Disk for the states that are kept, the one that is being written, and the result."""
        return (KEPT_STATES + 1) * self.memory.checkpoint_bytes + self.memory.result_bytes

    @property
    def hours(self) -> tuple[float, float, float] | None:
        """Expected, least and most."""
        return self.speed.hours(self.tokens) if self.speed and self.tokens else None

    @property
    def cost(self) -> tuple[float, float, float] | None:
        """Expected, least and most, of all cards."""
        if self.hours is None or self.price_per_hour is None:
            return None
        expected, least, most = (h * self.work.gpus * self.price_per_hour for h in self.hours)
        return expected, least, most


def judge_training(
    name: str,
    config: ModelConfig,
    plan: DepthPlan,
    work: TrainingWork,
    device: Device,
    *,
    platform: str | None = None,
    memory_gb: float | None = None,
    tokens: int | None = None,
    price_per_hour: float | None = None,
) -> TrainingVerdict:
    """Whether a training fits a device, and what it takes there.

    Args:
        name: what the model is called.
        config: of the model that is trained, up-scaled already.
        plan: that it was or is made with.
        work: what is trained, and how; its backend is the device's.
        device: one of `load_devices`, or the machine's own.
        platform: rule of usable memory; None means the usual one.
        memory_gb: which of the device's memory sizes; None means the smallest.
        tokens: to be trained on, for the hours.
        price_per_hour: of one card.

    Raises:
        UsageError: Apple's GPUs, a memory size or platform that is not the device's.
    """
    usable = usable_bytes(device, platform, memory_gb)
    memory = plan_training(config, work)
    speed, why = None, None
    try:
        speed = training_speed(config, work, device)
    except UsageError as e:
        why = str(e)
    fits = memory.total_bytes <= usable
    return TrainingVerdict(
        name=name,
        device=device,
        memory_gb=device.memory(memory_gb),
        platform=None if device.usable_mib is not None else platform or usual_platform(device),
        work=work,
        memory=memory,
        usable_bytes=usable,
        speed=speed,
        why_no_speed=why,
        tokens=tokens,
        price_per_hour=price_per_hour,
        changes=() if fits else tuple(changes_that_fit(config, plan, work, usable)),
    )


def training_backend(device: Device) -> str:
    """``CUDA`` or ``CPU``.

    Raises:
        UsageError: an Apple GPU.
    """
    if device.backend not in ("CUDA", "CPU"):
        raise UsageError(
            f"Training is planned for NVIDIA cards and CPUs, not for {device.name}; "
            "`dus-edge devices` lists them."
        )
    return device.backend


def changes_that_fit(
    config: ModelConfig, plan: DepthPlan, work: TrainingWork, usable: int
) -> Iterator[Change]:
    """Of every kind of change the smallest that fits, from the one that changes least."""
    for tries in _tries(plan, work):
        for words, changed in tries:
            memory = plan_training(config, changed)
            if memory.total_bytes <= usable:
                yield Change(words, changed, memory)
                break


def _tries(plan: DepthPlan, work: TrainingWork) -> Iterator[Iterator[tuple[str, TrainingWork]]]:
    """Kinds of changes, each with its steps."""
    yield ((f"--batch {n}", replace(work, batch=n)) for n in _halves(work.batch, 1))
    if not work.checkpointing:
        yield iter([("--checkpointing", replace(work, checkpointing=True))])
    small = replace(work, batch=1)
    yield (
        (f"--batch 1 --sequence {n}", replace(small, sequence=n))
        for n in _halves(work.sequence, _SHORTEST)
    )
    if work.optimizer != "adamw8bit" and not work.lora_rank and work.backend == "CUDA":
        yield iter([("--optimizer adamw8bit", replace(work, optimizer="adamw8bit"))])
    if work.backend == "CUDA" and not work.quantized:
        yield ((f"--gpus {n}", replace(work, gpus=n)) for n in _CARDS if n > work.gpus)
    yield from (_other_modes(plan, work))


def _other_modes(
    plan: DepthPlan, work: TrainingWork
) -> Iterator[Iterator[tuple[str, TrainingWork]]]:
    order = ("all", "copies", "lora", "qlora")
    here = order.index(work.mode) if work.mode in order else 1
    for mode in order[here + 1 :]:
        try:
            other = work_of_mode(
                mode,
                plan,
                backend=work.backend,
                sequence=work.sequence,
                batch=work.batch,
                gpus=1 if mode == "qlora" else work.gpus,
                precision=work.precision if work.precision != "mixed" else None,
                checkpointing=work.checkpointing or None,
            )
        except UsageError:  # no copies
            continue
        small = replace(other, batch=1)
        yield iter(
            [
                (f"--train {mode}", other),
                (f"--train {mode} --batch 1", small),
                (f"--train {mode} --batch 1 --checkpointing", replace(small, checkpointing=True)),
            ]
        )


def _halves(n: int, least: int) -> Iterator[int]:
    while n // 2 >= least:
        n //= 2
        yield n
