"""How many bytes a GPTQ or bitsandbytes model takes under transformers: predicted.

Weights are what the loaders keep, the cache is one row of keys and values a token and layer. The
compute is the most that `LlamaModel.forward` (transformers 5.23, attention by sdpa) holds at once
beside them, while it reads a prompt that fills the context: it takes a prompt whole, and
`generate` makes logits of its last token only. That is found by replaying the forward, every
tensor made and dropped where Python does. What torch's caching allocator holds in reserve beyond
live tensors is not predicted; neither is what accelerate would leave on the host.

Kernels: bitsandbytes 0.50.2; for GPTQ what GPTQModel 7.7.0 chooses (`AUTO`): on CUDA Marlin or a
like kernel, which multiplies codes as they are, for symmetric codes of 4 and 8 bits. ExLlamaV2,
which other loaders prefer, keeps room for the largest matrix in 16 bits beside that.
"""

from __future__ import annotations

from dus_edge.errors import UsageError
from dus_edge.predict.stored_model import MIB, MemoryUse, RunSettings, StoredModel, TorchForm

#: What a CUDA process of torch takes beside its tensors, mostly the context; assumed, not measured
#: here. "Around 400MB" since CUDA 11.7, says a developer of PyTorch in
#: https://github.com/pytorch/pytorch/issues/109888; it differs by card and driver. Llama 3.1 8B
#: was read to take 6,319 MB under GPTQModel and 6,440 as NF4
#: (huggingface.co/datasets/derekl35/quantization-benchmarks, prompt not stated): less weights,
#: cache and compute of 512 tokens, 458 and 503 MB are left, the allocator's reserve among them.
CUDA_OVERHEAD_BYTES = 400_000_000
#: What a process has resident on a CPU that generated with a tiny Llama: torch 2.13, transformers
#: 5.23, Linux, read from /proc/self/status (`VmRSS`).
_CPU_OVERHEAD = 348 * MIB
#: Bytes of a value.
VALUE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
#: Weights that share an absmax in bitsandbytes' 4-bit formats.
_BLOCK = 64
#: Bytes a weight that GPTQModel's torch kernel has at its peak while it dequantizes a matrix to 16
#: bits, by bits of a code: counted in GPTQModel 7.7.0 over matrices of 512 × 1,408.
_DEQUANTIZING = {2: 6, 3: 14, 4: 6, 8: 8}
_F32 = 4
_I64 = 8


def memory_use(model: StoredModel, settings: RunSettings) -> MemoryUse:
    """Bytes on the device: everything, or nothing where not all layers are offloaded.

    Args:
        model: one with a `TorchForm`.
        settings: context and backend count; ubatches, eras and flash attention are llama.cpp's.

    Raises:
        UsageError: a type of cache other than the model's own, or several sequences.
    """
    form = _form(model)
    if settings.n_parallel > 1:
        raise UsageError(
            f"{model.name} runs under transformers, for which one sequence at a time is predicted; "
            f"{settings.n_parallel} are asked for."
        )
    for kind in (settings.type_k, settings.type_v):
        if kind not in ("f16", form.values.lower()):
            raise UsageError(
                f"{model.name} runs under transformers, whose cache is predicted in the model's "
                f"own {form.values} only, not in {kind}; leave the cache's type as it is."
            )
    n = settings.n_gpu_layers
    if settings.backend != "CPU" and n is not None and n <= model.n_layers:
        return MemoryUse(0, 0, 0, 0)
    return MemoryUse(
        weights_bytes=model.weights_bytes,
        kv_cache_bytes=kv_cache_bytes(model, settings.context),
        compute_buffer_bytes=forward_bytes(model, settings.context, settings.backend),
        overhead_bytes={"CUDA": CUDA_OVERHEAD_BYTES, "CPU": _CPU_OVERHEAD}.get(settings.backend, 0),
    )


def kv_cache_bytes(model: StoredModel, context: int) -> int:
    """Bytes of keys and values of all layers; `DynamicCache` rounds nothing up.

    A window saves nothing of a prompt's: the cache is a part of a tensor that stays whole.
    """
    return 2 * model.n_layers * model.kv_width * context * VALUE_BYTES[_form(model).values]


def kernel_note(model: StoredModel, backend: str) -> str | None:
    """One sentence where a backend has no kernel of its own for a model; None elsewhere."""
    form = model.torch
    if form is None:
        return None
    if form.method == "GPTQ":
        if backend == "Metal":
            return (
                "GPTQModel has no torch kernel for GPTQ on Apple GPUs: it dequantizes every matrix "
                "before it multiplies, which is slow; MLX, which it can convert to, is not "
                "predicted."
            )
        if _gptq_kernel(form, backend) != "fused":
            return (
                f"GPTQModel has no kernel that multiplies codes of {form.bits} bits like these on "
                f"{'this GPU' if backend == 'CUDA' else 'a CPU'}: it dequantizes every matrix "
                "before, which is slow."
            )
    elif backend == "Metal":
        if form.method == "INT8":
            return "bitsandbytes multiplies INT8 on Apple GPUs in float32, which is slow."
        return (
            "bitsandbytes has kernels for Apple GPUs since macOS 26 (with the package `kernels`); "
            "without them it dequantizes every matrix."
        )
    return None


def forward_bytes(model: StoredModel, n_tokens: int, backend: str) -> int:
    """Bytes that the forward of a prompt has at its peak beside weights and a full cache.

    Args:
        model: one with a `TorchForm`.
        n_tokens: length of the prompt.
        backend: whose kernels multiply.
    """
    return _Forward(model, n_tokens, backend).peak()


def _form(model: StoredModel) -> TorchForm:
    if model.torch is None:
        raise ValueError(f"{model.name} does not run under transformers")
    return model.torch


def _gptq_kernel(form: TorchForm, backend: str) -> str:
    """What GPTQModel multiplies with: ``fused`` takes codes as they are; ``triton`` and ``torch``
    dequantize a matrix before, torch in several steps.
    """
    if backend == "CUDA":
        if form.symmetric and form.bits in (4, 8) and form.group_size in (-1, 32, 64, 128):
            return "fused"
        return "torch" if form.bits == 3 else "triton"
    return "fused" if backend == "CPU" and form.bits == 4 and form.group_size > 0 else "torch"


class _Forward:
    """The last layer's tensors as they come and go, with all caches but its own filled.

    No layer holds more at once: earlier ones have less of the cache beside them.
    """

    def __init__(self, model: StoredModel, n_tokens: int, backend: str) -> None:
        self._model, self._form, self._backend, self._n = model, _form(model), backend, n_tokens
        self._value = VALUE_BYTES[self._form.values]
        # Without a mask sdpa goes by a flag; a prompt that outgrows a window needs one.
        self._masked = bool(self._form.window and n_tokens >= self._form.window)
        self._live = self._peak = 0

    def peak(self) -> int:
        model, n, value = self._model, self._n, self._value
        row = n * model.hidden_size * value
        one_layer = 2 * n * model.kv_width * value
        # The callers': tokens, their mask and positions; cosines and sines; embeddings, which are
        # never dropped; and the layer's input, held until the layer returns.
        self._new(3 * n * _I64 + 2 * n * model.head_dim * value)
        self._new(n * n if self._masked else 0)
        self._new(row if model.n_layers == 1 else 2 * row)
        self._live -= one_layer  # counted with the cache, and not there before `_attention`
        self._norm()
        normed = row
        self._attention()
        self._drop(normed)
        self._new(row)  # residual + attention
        self._drop(row)  # attention
        self._norm()
        self._mlp()
        self._drop(normed)
        self._new(row)  # residual + MLP
        self._drop(2 * row)  # MLP and residual
        self._drop(row if model.n_layers > 1 else 0)  # the layer's input
        self._norm()
        # Logits of the last token, which `generate` copies as float32 when all else is gone.
        self._new(model.vocab_size * value)
        return max(self._peak, model.vocab_size * (value + _F32))

    def _attention(self) -> None:
        model, n, value = self._model, self._n, self._value
        q, kv = n * model.q_width * value, n * model.kv_width * value
        for width in (model.q_width, model.kv_width, model.kv_width):
            self._linear(model.hidden_size, width)
        for size in (q, kv):  # x·cos + rotate_half(x)·sin
            self._new(size)
            self._new(size // 2)
            self._new(size)
            self._drop(size // 2)
            self._new(size)
            self._drop(size)
            self._new(size)
            self._drop(2 * size)
        self._drop(q + kv)  # what was not turned
        self._new(2 * kv)  # the cache is concatenated, and so copied
        self._drop(2 * kv)
        # With a mask, keys and values are repeated for every head, and it becomes numbers.
        masked = 2 * (q if q > kv else 0) + n * n * value if self._masked else 0
        self._new(masked)
        self._new(q + n * model.n_heads * _F32)  # result and log-sum-exp
        self._drop(masked + n * model.n_heads * _F32)
        self._linear(model.q_width, model.hidden_size)
        self._drop(2 * q)

    def _mlp(self) -> None:
        hidden, ff = self._model.hidden_size, self._model.intermediate_size
        wide = self._n * ff * self._value
        self._linear(hidden, ff)
        self._new(wide)  # silu
        self._drop(wide)
        self._linear(hidden, ff)
        self._new(wide)  # product
        self._drop(2 * wide)
        self._linear(ff, hidden)
        self._drop(wide)

    def _norm(self) -> None:
        """`LlamaRMSNorm`, in float32; its result stays."""
        row, wide = (self._n * self._model.hidden_size * size for size in (self._value, _F32))
        cast = row != wide
        self._new(wide if cast else 0)
        self._new(wide)  # squares
        self._drop(wide)
        self._new(wide)  # x / rms
        self._drop(wide if cast else 0)
        self._new(row if cast else 0)
        self._new(row)
        self._drop(wide + (row if cast else 0))

    def _linear(self, n_in: int, n_out: int) -> None:
        """A product with a quantized matrix; its result stays."""
        n, value = self._n, self._value
        weights = n_in * n_out
        out = n * n_out * value
        method = self._form.method
        if method == "GPTQ":
            self._gptq(weights, out)
        elif method == "INT8":
            self._int8(n_in, n_out)
        else:
            cast = self._form.compute != self._form.values
            size = VALUE_BYTES[self._form.compute]
            self._new(n * n_in * size if cast else 0)
            absmax = weights // _BLOCK * _F32 if self._form.nested else 0
            self._new(2 * absmax)  # codes times scale, then plus the offset
            self._drop(absmax)
            self._new(weights * size)
            self._new(n * n_out * size)
            self._drop(weights * size + absmax)
            if cast:
                self._new(out)
                self._drop(n * (n_in + n_out) * size)

    def _gptq(self, weights: int, out: int) -> None:
        kernel = _gptq_kernel(self._form, self._backend)
        matrix = 0 if kernel == "fused" else weights * self._value
        on_the_way = weights * _DEQUANTIZING[self._form.bits] if kernel == "torch" else 0
        self._new(on_the_way)
        self._drop(on_the_way)
        self._new(matrix + out)
        self._drop(matrix)

    def _int8(self, n_in: int, n_out: int) -> None:
        n, value, on_cuda = self._n, self._value, self._backend == "CUDA"
        x, y = n * n_in, n * n_out
        half = 0 if self._form.values == "F16" else 2 * x
        self._new(half)
        # Inputs become codes; their magnitudes tell outliers, a byte each.
        if on_cuda:
            self._new(x + 2 * x + x)
            self._drop(3 * x)
        else:
            self._new(x)
            self._new(4 * x)  # divided by their rows' scales
            self._new(4 * x)  # rounded
            self._drop(4 * x)
            self._new(x)
            self._drop(5 * x)
        self._drop(half)
        if on_cuda:
            self._new(4 * y)  # int32
            self._new(2 * y)
            if self._form.values != "F16":
                self._new(value * y)
                self._drop(2 * y)
        else:
            self._new(4 * (x + n_in * n_out + y))  # both factors and the product in float32
            self._drop(4 * (x + n_in * n_out))
            self._new(4 * y)  # int32
            self._drop(4 * y)
            # Outer product of the scales, int32 as float32, and the two multiplied.
            self._new(12 * y)
            self._drop(8 * y)
            self._new(4 * y)
            self._drop(4 * y)
            self._new(value * y)
            self._drop(4 * y)
        self._drop(4 * y + x)  # int32 and the inputs' codes

    def _new(self, n_bytes: int) -> None:
        self._live += n_bytes
        self._peak = max(self._peak, self._live)

    def _drop(self, n_bytes: int) -> None:
        self._live -= n_bytes
