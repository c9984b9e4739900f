"""What memory depends on: a model's shape and tensors as stored, and how it is run.

Types only; `memory` predicts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

from dus_edge.errors import UsageError
from dus_edge.families.shape import Shape
from dus_edge.quant import types as t
from dus_edge.words import whole_number

MIB = 1 << 20
#: llama.cpp's names of two tensors, the same for every architecture (gguf-py/gguf/constants.py).
EMBEDDING, HEAD = "token_embd.weight", "output.weight"

#: Cache types by llama.cpp's name.
KV_TYPES = {"f32": t.F32, "f16": t.F16, "bf16": t.BF16, "q8_0": t.Q8_0, "q4_0": t.Q4_0}
BACKENDS = ("CUDA", "Metal", "CPU")
#: Builds that allocate differently. 2023: Metal maps the whole file. Until mid-2025 the product of
#: gate and up is made in place, and `n_gpu_layers` counts the output last; since then neither.
ERAS = ("2023", "2024", "2025+")


@dataclass(frozen=True, slots=True)
class TensorSize:
    """One stored tensor.

    Attributes:
        name: GGUF name.
        kind: ggml's name of its type; ``GPTQ4_128`` (bits, and group size or ``ROW``), ``NF4``,
            ``FP4`` or ``INT8`` of a matrix that transformers runs.
        n_rows: product of all dimensions but the last.
        n_cols: the last dimension, which blocks divide.
        nbytes: bytes without padding; of a matrix in several tensors, of all of them.
    """

    name: str
    kind: str
    n_rows: int
    n_cols: int
    nbytes: int

    @property
    def layer(self) -> int | None:
        """Number of its layer; None if it belongs to none."""
        return _layer_of(self.name)


@functools.lru_cache(maxsize=1 << 14)
def _layer_of(name: str) -> int | None:
    """Kept, since a table of predictions asks some twenty million times."""
    first, _, rest = name.partition(".")
    return whole_number(rest.partition(".")[0]) if first == "blk" else None


@dataclass(frozen=True, slots=True)
class TorchForm:
    """How a model that transformers runs is quantized and computed.

    Attributes:
        method: ``GPTQ``, or bitsandbytes' ``NF4``, ``FP4`` or ``INT8``.
        values: type of what is not quantized, of the cache and between layers: ``F16``, ``BF16`` or
            ``F32``.
        compute: type that bitsandbytes' 4-bit matrices are dequantized to; else as `values`.
        nested: whether the scales of 4-bit blocks are quantized themselves.
        bits: of a GPTQ code.
        group_size: inputs of a GPTQ group; −1 is a whole row.
        symmetric: whether GPTQ's zero points are all the middle.
        window: tokens that a token attends to, if they are fewer than all.
    """

    method: str
    values: str
    compute: str
    nested: bool = False
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class StoredModel(Shape):
    """What memory depends on: the shape of a model and its tensors as stored.

    Attributes:
        name: what messages call it.
        tensors: all of them; a tied head is none of its own.
        torch: of a model that transformers runs; None of one that llama.cpp runs.
        windows: of each layer, the tokens that llama.cpp keeps for its window; None for all. Empty
            where no layer has one.
    """

    name: str
    tensors: tuple[TensorSize, ...] = field(repr=False)
    torch: TorchForm | None = None
    windows: tuple[int | None, ...] = ()

    @classmethod
    def of_shape(
        cls,
        shape: Shape,
        name: str,
        tensors: Iterable[TensorSize],
        torch: TorchForm | None = None,
        windows: tuple[int | None, ...] = (),
    ) -> Self:
        """A model of that shape, a configuration's for one, stored in these tensors."""
        return cls(**shape.sizes(), name=name, tensors=tuple(tensors), torch=torch, windows=windows)

    @property
    def runtime(self) -> str:
        """What runs it: ``llama.cpp`` or ``transformers``."""
        return "transformers" if self.torch else "llama.cpp"

    @property
    def tied_head(self) -> bool:
        """Whether the embedding is the output matrix too."""
        return self.head.name != HEAD

    @functools.cached_property
    def head(self) -> TensorSize:
        """The matrix that makes the logits."""
        named = {x.name: x for x in self.tensors}
        return named.get(HEAD, named[EMBEDDING])

    @functools.cached_property
    def fused_qkv(self) -> bool:
        """Whether queries, keys and values are one matrix, as older conversions store them."""
        return any(x.name.endswith(".attn_qkv.weight") for x in self.tensors)

    @functools.cached_property
    def weights_bytes(self) -> int:
        """Bytes of all tensors, without padding."""
        return sum(x.nbytes for x in self.tensors)


@dataclass(frozen=True, slots=True)
class RunSettings:
    """How llama.cpp is told to run; transformers heeds context, types and backend.

    Attributes:
        context: tokens of the context that each sequence has (`-c` for one).
        batch: logical batch (`-b`).
        ubatch: tokens computed at once (`-ub`).
        type_k: type of the key cache, one of `KV_TYPES`.
        type_v: of the value cache; quantized only with flash attention.
        flash_attn: whether flash attention is on.
        n_gpu_layers: `-ngl`; None means all. Nothing to a CPU.
        backend: one of `BACKENDS`.
        era: one of `ERAS`.
        n_outputs: tokens of a ubatch whose logits are kept; None means all, which is what
            llama-bench, llama-perplexity and llama-cpp-python reserve, and every build until
            June 2026. Since then llama-server, and Ollama, which runs it, keep one per slot.
        n_parallel: sequences at once, each with a context of its own (`-np` without
            `--kv-unified`, where `-c` is the contexts' sum; `OLLAMA_NUM_PARALLEL`).
        n_sm: streaming multiprocessors of a CUDA card; None means a usual one.
        compute_capability: of a CUDA card, such as ``8.6``.
    """

    context: int = 4096
    batch: int = 2048
    ubatch: int = 512
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attn: bool = True
    n_gpu_layers: int | None = None
    backend: str = "CUDA"
    era: str = "2025+"
    n_outputs: int | None = None
    n_parallel: int = 1
    n_sm: int | None = None
    compute_capability: str | None = None

    def __post_init__(self) -> None:
        for key in ("context", "batch", "ubatch", "n_outputs", "n_parallel"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UsageError(f"{key} is {value}; at least 1 is needed.")
        if self.n_outputs is not None and self.n_outputs < self.n_parallel:
            raise UsageError(
                f"n_outputs is {self.n_outputs}; each of {self.n_parallel} sequences needs one."
            )
        if self.n_gpu_layers is not None and self.n_gpu_layers < 0:
            raise UsageError(f"n_gpu_layers is {self.n_gpu_layers}; at least 0 is needed.")
        for key, known in (
            ("type_k", tuple(KV_TYPES)),
            ("type_v", tuple(KV_TYPES)),
            ("backend", BACKENDS),
            ("era", ERAS),
        ):
            if getattr(self, key) not in known:
                raise UsageError(
                    f"{key} is {getattr(self, key)!r}, which is none of {', '.join(known)}."
                )
        if KV_TYPES[self.type_v].block_weights > 1 and not self.flash_attn:
            raise UsageError(
                f"A value cache of {self.type_v} needs flash attention; turn it on or use f16."
            )


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes on the device, by what they are for."""

    weights_bytes: int
    kv_cache_bytes: int
    compute_buffer_bytes: int
    overhead_bytes: int

    @property
    def buffers_bytes(self) -> int:
        """What llama.cpp's log adds up to: all but the runtime's overhead."""
        return self.weights_bytes + self.kv_cache_bytes + self.compute_buffer_bytes

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.buffers_bytes + self.overhead_bytes


def kv_types(kv_type: str, flash_attn: bool) -> tuple[str, str]:
    """Key and value type for one wish: without flash attention values cannot be quantized.

    Raises:
        UsageError: no such type.
    """
    if kv_type not in KV_TYPES:
        raise UsageError(f"There is no cache type {kv_type!r}; known are {', '.join(KV_TYPES)}.")
    quantized = KV_TYPES[kv_type].block_weights > 1
    return kv_type, "f16" if quantized and not flash_attn else kv_type
