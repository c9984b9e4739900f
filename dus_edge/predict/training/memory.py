"""How much memory a training step takes at its peak: planned, from shapes alone.

What is always there (weights, moments), and the largest of three moments: the loss, the backward
pass of one layer, the optimizer's step. Gradients grow while activations are dropped, so none of
them is the largest for all models. The loop that is planned for is `train.heal.loop`: gradients set
to None after a step, documents packed by position ids, the head in chunks, layers checkpointed one
by one from the lowest that learns. On a CPU glibc's heap may hold more than what is alive: 5 to
57 % in 25 runs, unless it maps every large tensor by itself, which the runs of
`benchmarks/check_training_memory.py` have it do.

FSDP2 shards weights, gradients and moments over the cards. What is gathered in full, in the
precision of the computing: embedding, last norm and head through the step, and two layers, the
present one and the next; and one layer's gradients before they are scattered. Not predicted: what
NCCL takes, and what torch's caching allocator holds in reserve beyond live tensors.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from dus_edge.checkpoint.config import ModelConfig
from dus_edge.predict.memory.folder import model_of_bnb_config
from dus_edge.predict.memory.torch import CUDA_OVERHEAD_BYTES
from dus_edge.predict.stored_model import MIB
from dus_edge.predict.training.activations import OUT, PASSED, TRAINED, Activations
from dus_edge.predict.training.parameters import Parameters, count_parameters
from dus_edge.predict.training.work import (
    COMPUTE_BYTES,
    KEPT_BYTES,
    MOMENTS_BYTES,
    TrainingWork,
)

#: What a process has resident on a CPU that trained a tiny Llama for three steps; with peft for its
#: adapters; what kernels of bf16 add; and what scipy adds, which transformers imports where it is
#: installed: torch 2.13, transformers 5.23, peft 0.21, scipy 1.17, Linux (`VmHWM`,
#: benchmarks/check_training_memory.py).
_CPU_OVERHEAD = 357 * MIB
_CPU_OVERHEAD_PEFT = 415 * MIB
_CPU_OVERHEAD_BF16 = 15 * MIB
_CPU_OVERHEAD_SCIPY = 37 * MIB


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes on each card, or in the process on a CPU, at the peak of a step.

    Attributes:
        weights_bytes: the model's and its adapters'.
        optimizer_bytes: the moments.
        gradients_bytes: those that are there at the peak.
        activations_bytes: what the forward pass keeps, and what the layer in question has beside.
        logits_bytes: logits and what the loss makes of them, if the peak is there.
        gathered_bytes: bf16 copies of weights: autocast's, or what FSDP2 gathers.
        overhead_bytes: CUDA's context, or the interpreter and its libraries.
        peak: where the peak is: ``loss``, ``layer 24`` or ``step``.
        parameters: of the model, without adapters.
        trained_parameters: of these, or of adapters, those that learn.
        checkpoint_bytes: what one saved state of the training takes on disk.
        result_bytes: what the finished model or adapter takes on disk.
    """

    weights_bytes: int
    optimizer_bytes: int
    gradients_bytes: int
    activations_bytes: int
    logits_bytes: int
    gathered_bytes: int
    overhead_bytes: int
    peak: str
    parameters: int
    trained_parameters: int
    checkpoint_bytes: int
    result_bytes: int

    @property
    def tensors_bytes(self) -> int:
        """All that torch allocates."""
        return (
            self.weights_bytes
            + self.optimizer_bytes
            + self.gradients_bytes
            + self.activations_bytes
            + self.logits_bytes
            + self.gathered_bytes
        )

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.tensors_bytes + self.overhead_bytes


def plan_training(config: ModelConfig, work: TrainingWork) -> TrainingMemory:
    """The memory of a training step.

    Args:
        config: of the model that is trained, up-scaled already.
        work: what is trained, and how.
    """
    return _Plan(config, work).memory()


@dataclass(frozen=True, slots=True)
class _Moment:
    """What is there at one moment of a step beside weights and moments."""

    name: str
    gradients: int
    activations: int
    logits: int = 0

    @property
    def total(self) -> int:
        return self.gradients + self.activations + self.logits


class _Plan:
    """The moments of a step, and the largest of them."""

    def __init__(self, config: ModelConfig, work: TrainingWork) -> None:
        self._config, self._work = config, work
        self._n: Parameters = count_parameters(config, work.lora_rank)
        self._made = Activations(config, work)
        kept = KEPT_BYTES[work.precision]
        adapter = {"f32": 4, "bf16": 2}[work.adapter_precision]
        self._trained_bytes = adapter if work.lora_rank else kept

    def memory(self) -> TrainingMemory:
        n, work = self._n, self._work
        weights, moments = self._weights(), self._moments_of(n.trained(work))
        peak = max(self._moments(), key=lambda m: m.total)
        gathered = self._gathered()
        saved = n.trained(work) * self._trained_bytes
        stored = 4 if self._config.dtype == "F32" else 2
        return TrainingMemory(
            weights_bytes=weights,
            optimizer_bytes=moments,
            gradients_bytes=peak.gradients,
            activations_bytes=peak.activations,
            logits_bytes=peak.logits,
            gathered_bytes=gathered,
            overhead_bytes=self._overhead(),
            peak=peak.name,
            parameters=n.total,
            trained_parameters=n.trained(work),
            checkpoint_bytes=saved + self._moments_of(n.trained(work), sharded=False),
            # The trainer merges its adapters, which NF4's weights cannot take in.
            result_bytes=saved if work.quantized else n.total * stored,
        )

    def _weights(self) -> int:
        n, work = self._n, self._work
        adapters = n.n_layers * n.adapter * self._trained_bytes
        if work.quantized:
            return model_of_bnb_config(self._config, "nf4").weights_bytes + adapters
        frozen = n.total - (0 if work.lora_rank else n.trained(work))
        # What is frozen is kept as it is computed with.
        own = frozen * COMPUTE_BYTES[work.precision]
        own += (n.total - frozen) * KEPT_BYTES[work.precision]
        return self._shard(own + adapters)

    def _moments_of(self, trained: int, *, sharded: bool = True) -> int:
        each = MOMENTS_BYTES[self._work.optimizer]
        total = int(trained * each)
        return self._shard(total) if sharded else total

    def _moments(self) -> list[_Moment]:
        """The loss, each layer's backward pass, the embedding's, and the optimizer's step."""
        n, work, made = self._n, self._work, self._made
        layers = range(n.n_layers)
        # With several micro-batches the gradients of those before are there all the time.
        standing = work.micro_batches > 1
        all_gradients = self._shard(n.trained(work) * self._trained_bytes)
        kept = made.before_layers() + sum(map(made.kept, layers))
        head = self._computed(n.head or n.embedding) if work.ends and not work.lora_rank else 0
        so_far = all_gradients if standing else 0
        kept += made.last_norm()
        # In chunks the head's gradient is made in f32 with the loss, and brought to its weight's
        # dtype in the backward pass; transformers' loss makes it after the logits' gradient.
        if work.chunk is None:
            found = [
                _Moment("loss", so_far, kept, made.head()),
                _Moment("loss", so_far + 2 * head, kept, made.held()),
            ]
        else:
            found = [
                _Moment("loss", so_far + head, kept, made.head()),
                _Moment("loss", so_far + 2 * head, kept, 2 * made.row),
            ]
            if head:
                found.append(_Moment("loss", so_far + head, kept, made.head_gradient()))
        kept += made.held() - made.last_norm()
        if OUT in map(made.kind, layers):
            at = made.before_layers() + made.forward_extra()
            found.append(_Moment("frozen layers", all_gradients if standing else 0, at))
        gradients = all_gradients if standing else self._shard(head)
        for i in reversed(layers):
            kind = made.kind(i)
            if kind == OUT:
                break
            kept -= made.kept(i)
            new = self._computed(n.down) if kind == TRAINED else 0
            at = kept + made.saved(i) + made.backward_extra(i)
            found.append(_Moment(f"layer {i}", gradients + new, at))
            if not standing and kind != PASSED:
                mine = n.layer if kind == TRAINED else n.adapter
                gradients += self._shard(mine * self._trained_bytes)
        if work.ends and not work.lora_rank:
            # The embedding's gradient is dense; where it is tied, the head's is there already.
            new = self._computed(n.embedding)
            before = all_gradients - (0 if n.head == 0 or standing else self._shard(new))
            found.append(_Moment("embedding", before + new, made.held() + made.row))
        copies = 0 if work.fused or work.optimizer == "adamw8bit" else 4 * n.trained(work)
        found.append(_Moment("step", all_gradients + self._shard(copies), 0))
        return found

    def _computed(self, parameters: int) -> int:
        """A gradient as the backward pass makes it, before it is scattered."""
        precision = self._work.precision
        return parameters * (
            COMPUTE_BYTES[precision] if self._work.gpus > 1 else KEPT_BYTES[precision]
        )

    def _gathered(self) -> int:
        n, work = self._n, self._work
        if work.gpus == 1:
            # autocast's copies of what learns, but of norms and the embedding
            autocast = work.precision == "mixed" and not work.lora_rank
            layers = n.n_layers if work.layers is None else len(work.layers)
            return layers * n.linear * 2 if autocast else 0
        value = COMPUTE_BYTES[work.precision]
        return (n.ends + 2 * n.layer + (n.layer if work.layers != () else 0)) * value

    def _shard(self, n_bytes: int) -> int:
        return -(-n_bytes // self._work.gpus)

    def _overhead(self) -> int:
        if self._work.backend == "CUDA":
            return CUDA_OVERHEAD_BYTES
        own = _CPU_OVERHEAD_PEFT if self._work.lora_rank else _CPU_OVERHEAD
        own += _CPU_OVERHEAD_SCIPY if importlib.util.find_spec("scipy") else 0
        return own + (_CPU_OVERHEAD_BF16 if self._work.precision != "f32" else 0)
