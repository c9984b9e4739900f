"""What is trained, and how: everything that the memory and the time of training depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dus_edge.errors import UsageError
from dus_edge.train.heal.mode import learned_layers, parse_mode
from dus_edge.upscale.plan import DepthPlan

#: How weights are kept and computed with. ``mixed`` keeps those that learn in f32 and computes in
#: bf16: by autocast on one card, which keeps a copy of them in bf16 through a step.
PRECISIONS = ("f32", "bf16", "mixed")
#: AdamW with its two moments in f32, in bf16 (what torch makes of bf16 weights), or in 8 bits.
ADAMS = ("adamw", "adamw-bf16", "adamw8bit")
MODES = ("all", "copies", "seam:K", "lora", "qlora")
#: The most that is believed of a number of tokens, sequences or cards.
_MOST = 1 << 24


@dataclass(frozen=True, slots=True)
class TrainingWork:
    """How a model is trained.

    Attributes:
        mode: what it is called: ``all``, ``copies``, ``seam:8``, ``lora``, ``qlora``.
        layers: layers whose own weights are trained; None means every layer.
        ends: whether embedding, last norm and head are trained.
        lora_rank: rank of adapters on all linear matrices of all layers; 0 means none, and then
            `layers` and `ends` say what is trained, else nothing of the model itself is.
        quantized: whether the linear matrices are kept as NF4 with double quantization.
        sequence: tokens of a sequence.
        batch: sequences of a micro-batch on each card.
        micro_batches: micro-batches whose gradients are added up before a step.
        precision: one of `PRECISIONS`.
        adapter_precision: ``f32`` or ``bf16``: of adapters. peft's own choice is f32, and then
            every input of an adapter is copied to f32; trl makes QLoRA's bf16.
        optimizer: one of `ADAMS`.
        fused: whether a step of the optimizer makes no copies, as heal's AdamW does; torch's
            foreach AdamW, which trl runs, makes an f32 one of all that learns.
        checkpointing: whether layers keep their input alone and are computed again.
        chunk: tokens whose logits are computed at once; None means all, by transformers' own loss.
        packed: whether several documents share a sequence, which needs a mask.
        gpus: cards that FSDP2 shards everything over.
        backend: ``CUDA`` or ``CPU``.
    """

    mode: str = "all"
    layers: tuple[int, ...] | None = None
    ends: bool = True
    lora_rank: int = 0
    quantized: bool = False
    sequence: int = 2048
    batch: int = 1
    micro_batches: int = 1
    precision: str = "bf16"
    adapter_precision: str = "f32"
    optimizer: str = "adamw"
    fused: bool = True
    checkpointing: bool = True
    chunk: int | None = 512
    packed: bool = True
    gpus: int = 1
    backend: str = "CUDA"

    def __post_init__(self) -> None:
        for key in ("sequence", "batch", "micro_batches", "gpus", "chunk"):
            value = getattr(self, key)
            if value is not None and not 1 <= value <= _MOST:
                raise UsageError(f"{key} is {value}; it must be from 1 to {_MOST:,}.")
        for key, known in (
            ("precision", PRECISIONS),
            ("adapter_precision", ("f32", "bf16")),
            ("optimizer", ADAMS),
            ("backend", ("CUDA", "CPU")),
        ):
            if getattr(self, key) not in known:
                raise UsageError(
                    f"{key} is {getattr(self, key)!r}, which is none of {', '.join(known)}."
                )
        if not 0 <= self.lora_rank <= 4096:
            raise UsageError(f"lora_rank is {self.lora_rank}; it must be from 0 to 4,096.")
        if self.quantized and not self.lora_rank:
            raise UsageError("Quantized weights cannot be trained; give them adapters.")
        if self.quantized and self.gpus > 1:
            raise UsageError(
                "qlora is planned for one card; FSDP does not shard bitsandbytes' codes as they "
                "are stored. Train with lora on several."
            )
        if self.layers is not None and not self.layers and not self.ends and not self.lora_rank:
            raise UsageError("No layer is trained; choose another mode.")

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on each card."""
        return self.sequence * self.batch


def work_of_mode(mode: str, plan: DepthPlan, *, backend: str, **fields: Any) -> TrainingWork:
    """The work that a word for it stands for, with the trainer's defaults on that backend.

    Args:
        mode: one of `MODES`, with a number for K.
        plan: of the model, which names its copies and seams.
        backend: ``CUDA`` or ``CPU``.
        fields: of `TrainingWork`, in place of the defaults; None leaves a default as it is.

    Raises:
        UsageError: no such mode, or the plan has no copies or no seam.
    """
    on_card = backend == "CUDA"
    chosen: dict[str, Any] = {
        "precision": "mixed" if on_card else "f32",
        "checkpointing": on_card,
        "packed": mode != "qlora",
        "fused": mode != "qlora",  # that one is trl's
    }
    if mode in ("lora", "qlora"):
        chosen |= {"ends": False, "layers": (), "lora_rank": 16}
        if mode == "qlora":
            chosen |= {"quantized": True, "adapter_precision": "bf16" if on_card else "f32"}
    elif mode != "all":
        chosen |= {"ends": False, "layers": layers_of_mode(mode, plan)}
    chosen |= {key: value for key, value in fields.items() if value is not None}
    return TrainingWork(mode=mode, backend=backend, **chosen)


def layers_of_mode(mode: str, plan: DepthPlan) -> tuple[int, ...]:
    """Layers whose weights a mode trains, 0-based, ascending.

    ``copies`` are those whose source stands further down already; ``seam:K`` are the K nearest to
    every seam, the odd one behind it: what `train.heal.mode` has learn.

    Raises:
        UsageError: no such mode, or the plan has no copies or no seam.
    """
    return learned_layers(parse_mode(mode), plan)


#: Bytes of a value of each precision as it is computed with.
COMPUTE_BYTES: Mapping[str, int] = {"f32": 4, "bf16": 2, "mixed": 2}
#: Bytes of a weight that is trained, as it is kept.
KEPT_BYTES: Mapping[str, int] = {"f32": 4, "bf16": 2, "mixed": 4}
#: Bytes of both moments of a weight. 8-bit AdamW has an f32 scale for every 256 values
#: (bitsandbytes 0.50.2, blockwise); tensors below 4,096 values stay in f32, which are nothing.
MOMENTS_BYTES: Mapping[str, float] = {"adamw": 8, "adamw-bf16": 4, "adamw8bit": 2 + 8 / 256}
