"""How many bytes llama.cpp takes on a device for a model: predicted, without running it.

Weights are the tensors' exact sizes, the key/value cache follows from the shape, and the compute
buffer is what ggml's graph allocator would reserve: the Llama graph's tensors in the order in
which they are made, put through the same best-fit search (`ggml/src/ggml-alloc.c`,
`src/models/llama.cpp` and `src/llama-graph.cpp` of the llama.cpp that `recipe.LLAMA_CPP_COMMIT`
names). Nothing is fitted to measurements but the runtime's own overhead on CUDA.
"""

from __future__ import annotations

import functools
import math
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dus_edge.bench.devices import Device, load_rules
from dus_edge.checkpoint.config import ModelConfig, tensor_shapes
from dus_edge.checkpoint.gguf_header import GGUFTensor, read_header
from dus_edge.errors import CheckpointError, UnsupportedError, UsageError
from dus_edge.export.gguf import plan_tensors
from dus_edge.quant import types as t
from dus_edge.quant.recipe import Preset

MIB = 1 << 20

#: Cache types by llama.cpp's name.
KV_TYPES = {"f32": t.F32, "f16": t.F16, "bf16": t.BF16, "q8_0": t.Q8_0, "q4_0": t.Q4_0}
BACKENDS = ("CUDA", "Metal", "CPU")
#: Builds that allocate differently. 2023: Metal maps the whole file. Until mid-2025 the product of
#: gate and up is made in place, and `n_gpu_layers` counts the output last; since then neither.
ERAS = ("2023", "2024", "2025+")
PLATFORMS = ("windows", "linux", "linux-headless", "macos15", "macos26")

_F32 = 4
_F16 = 2
_I32 = 4
_I64 = 8
_ALIGNMENT = {"CUDA": 128, "Metal": 32, "CPU": 32}
#: CUDA pads the rows of quantized tensors to this many weights (`MATRIX_ROW_PADDING`).
_CUDA_ROW = 512
#: What a CUDA process takes beside llama.cpp's buffers. One reading: RTX 4060 Laptop, Windows,
#: b10121, Qwen-7B Q4_K_M at 4,096: 7,339 MiB by nvidia-smi, 739 of it the desktop's, and
#: 4,332.75 + 2,048 + 84.5 MiB of buffers (data/published_memory.json).
_CUDA_OVERHEAD = 135 * MIB
#: Metal's flash attention: columns of the cache and rows of queries in a simdgroup, and the
#: workgroups whose partial results it keeps (`ggml-metal-ops.cpp`).
_METAL_COLUMNS, _METAL_ROWS, _METAL_GROUPS, _METAL_MAX_ROWS = 64, 8, 32, 32


@dataclass(frozen=True, slots=True)
class TensorSize:
    """One stored tensor.

    Attributes:
        name: GGUF name.
        kind: ggml's name of its type.
        n_rows: product of all dimensions but the last.
        n_cols: the last dimension, which blocks divide.
        nbytes: bytes without padding.
    """

    name: str
    kind: str
    n_rows: int
    n_cols: int
    nbytes: int

    @property
    def layer(self) -> int | None:
        """Number of its layer; None if it belongs to none."""
        parts = self.name.split(".")
        return int(parts[1]) if parts[0] == "blk" else None


@dataclass(frozen=True)
class StoredModel:
    """What memory depends on: the shape of a model and its tensors as stored.

    Attributes:
        name: what messages call it.
        context_length: tokens that the model was made for.
        tensors: all of them; a tied head is none of its own.
    """

    name: str
    n_layers: int
    hidden_size: int
    intermediate_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    tensors: tuple[TensorSize, ...] = field(repr=False)

    def __post_init__(self) -> None:
        for key in (
            "n_layers",
            "hidden_size",
            "intermediate_size",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "vocab_size",
            "context_length",
        ):
            if getattr(self, key) < 1:
                raise UsageError(
                    f"{self.name}: {key} is {getattr(self, key)}; at least 1 is needed."
                )

    @property
    def q_width(self) -> int:
        """Width of the queries: heads × head size."""
        return self.n_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of the keys, and of the values: KV heads × head size."""
        return self.n_kv_heads * self.head_dim

    @property
    def tied_head(self) -> bool:
        """Whether the embedding is the output matrix too."""
        return self.head.name != "output.weight"

    @functools.cached_property
    def head(self) -> TensorSize:
        """The matrix that makes the logits."""
        named = {x.name: x for x in self.tensors}
        return named.get("output.weight", named["token_embd.weight"])

    @functools.cached_property
    def weights_bytes(self) -> int:
        """Bytes of all tensors, without padding."""
        return sum(x.nbytes for x in self.tensors)


@dataclass(frozen=True, slots=True)
class Settings:
    """How llama.cpp is told to run.

    Attributes:
        context: tokens of the context (`-c`).
        batch: logical batch (`-b`).
        ubatch: tokens computed at once (`-ub`).
        type_k: type of the key cache, one of `KV_TYPES`.
        type_v: of the value cache; quantized only with flash attention.
        flash_attn: whether flash attention is on.
        n_gpu_layers: `-ngl`; None means all. Nothing to a CPU.
        backend: one of `BACKENDS`.
        era: one of `ERAS`.
        n_outputs: tokens of a ubatch whose logits are kept; None means all, which is what
            llama-bench, llama-perplexity and llama-cpp-python reserve. llama-server reserves one
            per slot since mid-2026.
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

    def __post_init__(self) -> None:
        for key, low in (("context", 1), ("batch", 1), ("ubatch", 1), ("n_outputs", 1)):
            value = getattr(self, key)
            if value is not None and value < low:
                raise UsageError(f"{key} is {value}; at least {low} is needed.")
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


def model_of_config(config: ModelConfig, preset: Preset, name: str = "the model") -> StoredModel:
    """The model that an export of this configuration would be; no weight is needed."""
    infos = plan_tensors(config, tensor_shapes(config), preset)
    return StoredModel(
        name=name,
        n_layers=config.n_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        context_length=config.context_length,
        tensors=tuple(
            TensorSize(
                i.name,
                i.kind.name,
                i.nbytes // i.kind.row_bytes(i.shape[-1]),
                i.shape[-1],
                i.nbytes,
            )
            for i in infos
        ),
    )


def read_gguf(path: Path) -> StoredModel:
    """The model in a GGUF file; only its header is read.

    Raises:
        CheckpointError: no such file, no GGUF file, a truncated one, or a field is missing.
        UnsupportedError: split over several files, or of an architecture that is not Llama's.
    """
    try:
        with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as view:
            values, entries = read_header(view)
            size = len(view)
        tensors = [(_stored(entry), entry.offset) for entry in entries]
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (OSError, ValueError) as e:  # ValueError: an empty file, or what is wrong
        raise CheckpointError(f"{path} is no whole GGUF file ({e}); fetch it again.") from None
    architecture = values.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedError(
            f"{path}: the architecture is {architecture}; memory is predicted for llama only."
        )
    if values.get("split.count", 0) > 1:
        raise UnsupportedError(
            f"{path} is one of {values['split.count']} parts; merge them with llama-gguf-split."
        )
    ends = [offset + tensor.nbytes for tensor, offset in tensors]
    if ends and max(ends) > size:
        raise CheckpointError(
            f"{path} is truncated: {size:,} of at least {max(ends):,} bytes; fetch it again."
        )

    def number(key: str, default: int | None = None) -> int:
        value = values.get(f"llama.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{path}: llama.{key} is {value!r}; a positive one is needed.")
        return value

    named = {tensor.name: tensor for tensor, _ in tensors}
    if "token_embd.weight" not in named:
        raise CheckpointError(f"{path}: the tensor token_embd.weight is missing.")
    hidden, heads = number("embedding_length"), number("attention.head_count")
    return StoredModel(
        name=path.name,
        n_layers=number("block_count"),
        hidden_size=hidden,
        intermediate_size=number("feed_forward_length"),
        n_heads=heads,
        n_kv_heads=number("attention.head_count_kv", heads),
        head_dim=number("attention.key_length", hidden // heads),
        vocab_size=named["token_embd.weight"].n_rows,
        context_length=number("context_length"),
        tensors=tuple(named.values()),
    )


def check_context(model: StoredModel, context: int) -> None:
    """See that the model was made for so many tokens.

    Raises:
        UsageError: it was not, or the number is not positive.
    """
    if context < 1:
        raise UsageError(f"A context of {context} tokens is asked for; at least 1 is needed.")
    if context > model.context_length:
        raise UsageError(
            f"{model.name} was made for {model.context_length:,} tokens, "
            f"and a context of {context:,} is asked for."
        )


def memory_use(model: StoredModel, settings: Settings) -> MemoryUse:
    """Bytes on the device for a model run so.

    With a CPU the device is the computer's memory: everything is on it. On CUDA and Metal the
    embedding stays on the host, as do layers that are not offloaded.
    """
    on_device, head_on_device = offloaded(model, settings)
    return MemoryUse(
        weights_bytes=weights_on_device(model, settings),
        kv_cache_bytes=kv_cache_bytes(model, settings, on_device),
        compute_buffer_bytes=compute_buffer_bytes(model, settings),
        overhead_bytes=_overhead(model, settings) if on_device or head_on_device else 0,
    )


def offloaded(model: StoredModel, settings: Settings) -> tuple[int, bool]:
    """How many layers are on the device, counted from the last, and whether the output is.

    Since late 2025 the output is the first that `n_gpu_layers` counts; before, it was the last
    (`llama_model::load_tensors`, `i_gpu_start`).
    """
    n = model.n_layers
    if settings.backend == "CPU" or settings.n_gpu_layers is None:
        return n, True
    if settings.era == "2025+":
        return min(max(settings.n_gpu_layers - 1, 0), n), settings.n_gpu_layers > 0
    return min(settings.n_gpu_layers, n), settings.n_gpu_layers > n


def weights_on_device(model: StoredModel, settings: Settings) -> int:
    """Bytes of the tensors on the device, with the padding of its buffers."""
    layers, head = offloaded(model, settings)
    if settings.backend == "CPU":
        return _padded_sizes(model.tensors, settings)
    if settings.backend == "Metal" and settings.era == "2023":
        return model.weights_bytes  # one mapping of the whole file
    first = model.n_layers - layers
    chosen = [x for x in model.tensors if x.layer is not None and x.layer >= first]
    if head:
        chosen += [x for x in model.tensors if x.name.startswith("output")]
        if model.tied_head:
            chosen.append(model.head)  # a second copy; the host keeps its own for the input
    return _padded_sizes(chosen, settings)


def _padded_sizes(tensors: Iterable[TensorSize], settings: Settings) -> int:
    alignment = _ALIGNMENT[settings.backend]
    total = 0
    for x in tensors:
        size = x.nbytes
        row_bytes = x.nbytes // x.n_rows
        if settings.backend == "CUDA" and row_bytes < x.n_cols * _F16 and x.n_cols % _CUDA_ROW:
            missing = _CUDA_ROW - x.n_cols % _CUDA_ROW
            size += row_bytes * missing // x.n_cols
        total += _up(size, alignment)
    return total


def padded_context(settings: Settings) -> int:
    """Cells of the cache: the context rounded up as that build does.

    2023: not at all; 2024: to 32, with flash attention 256; since 2025: to 256.
    """
    if settings.era == "2023":
        return settings.context
    wide = settings.era == "2025+" or settings.flash_attn
    return _up(settings.context, 256 if wide else 32)


def kv_cache_bytes(model: StoredModel, settings: Settings, layers: int | None = None) -> int:
    """Exact bytes of the key/value cache of so many layers; None means all."""
    cells = padded_context(settings)
    k, v = KV_TYPES[settings.type_k], KV_TYPES[settings.type_v]
    for key, kind in (("keys", k), ("values", v)):
        if model.kv_width % kind.block_weights or model.head_dim % kind.block_weights:
            raise UsageError(
                f"{model.name}: {key} of head size {model.head_dim} are no whole blocks of "
                f"{kind.name.lower()}; use f16."
            )
    per_layer = cells * (k.row_bytes(model.kv_width) + v.row_bytes(model.kv_width))
    return per_layer * (model.n_layers if layers is None else layers)


def compute_buffer_bytes(model: StoredModel, settings: Settings) -> int:
    """Bytes of the device's compute buffer: the peak of ggml's allocator over the graph."""
    layers, head = offloaded(model, settings)
    sizes = [0]
    if layers or head:
        # A layer's holes are the next one's: after a few layers nothing changes any more.
        sizes.append(_graph_bytes(_shape_only(model), min(layers, 4), head, settings))
    if layers < model.n_layers or not head:
        sizes.append(_host_weights_bytes(model, layers, head, settings))
    n_host = model.vocab_size * _F32 if settings.backend == "CPU" else 0  # one row of logits
    return max(sizes) + n_host


def _shape_only(model: StoredModel) -> StoredModel:
    """The same shape without its tensors: all that the graph depends on, and quick to hash."""
    return replace(model, name="", context_length=1, tensors=())


def usable_bytes(
    device: Device, platform: str | None = None, memory_gb: float | None = None
) -> int:
    """How much of a device's memory a model may take.

    Args:
        device: one of `load_devices`, or the machine's own.
        platform: one of `PLATFORMS`; None means the usual one of the device's family.
        memory_gb: which of the device's memory sizes; None means the smallest.

    Raises:
        UsageError: the device is not made with that memory, or the platform is not one it runs on.
    """
    if device.usable_mib is not None:
        return int(device.usable_mib * MIB)
    platform = platform or usual_platform(device)
    if platform not in PLATFORMS:
        raise UsageError(f"There is no platform {platform!r}; known are {', '.join(PLATFORMS)}.")
    if (device.backend == "Metal") != platform.startswith("macos"):
        raise UsageError(f"{device.id} does not run on {platform}.")
    gb = device.memory(memory_gb)
    rules = load_rules()
    if device.backend == "Metal":
        return rules.apple[platform].usable(gb)
    windows = platform == "windows"
    total = device.total_mib("windows" if windows else "linux", gb)
    if total is None:
        total = gb * 1024 * (1 if windows else rules.nvidia_linux_share)
    return int((total - rules.nvidia_reserved_mib[platform]) * MIB)


def usual_platform(device: Device) -> str:
    """Where such a device is found most: a Windows desktop, a server, or macOS 26."""
    if device.backend == "Metal":
        return "macos26"
    return "linux-headless" if device.family in ("nvidia-pro", "nvidia-datacenter") else "windows"


def _overhead(model: StoredModel, settings: Settings) -> int:
    """What the runtime takes beside llama.cpp's buffers."""
    if settings.backend == "CUDA":
        return _CUDA_OVERHEAD
    if settings.backend == "Metal":
        return 0  # the working set counts Metal's buffers, and llama.cpp's are all there are
    # ggml's work buffer on a CPU: the widest input of a product, as blocks of 256 in 292 bytes.
    tokens = _tokens(settings)
    return tokens * max(model.intermediate_size, model.q_width) * 292 // 256


def _tokens(settings: Settings) -> int:
    """Tokens of the largest ubatch; the context counts before it is rounded up."""
    return min(settings.context, settings.batch, settings.ubatch)


def _host_weights_bytes(model: StoredModel, layers: int, head: bool, settings: Settings) -> int:
    """What the device needs for products whose weights are on the host.

    With batches of 32 tokens and more llama.cpp copies such a matrix over and multiplies on the
    device (`op_offload`).
    """
    tokens = _tokens(settings)
    if tokens < 32 or (layers == 0 and not head):
        return 0
    first = model.n_layers - layers
    sizes = [
        x.nbytes + tokens * (x.n_cols + x.n_rows) * _F32
        for x in model.tensors
        if x.layer is not None and x.layer < first and x.n_rows > 1
    ]
    if not head:
        outputs = min(tokens, settings.n_outputs or tokens)
        sizes.append(model.head.nbytes + outputs * (model.hidden_size + model.vocab_size) * _F32)
    return max(sizes, default=0)


@functools.lru_cache(maxsize=4096)
def _graph_bytes(model: StoredModel, n_layers: int, head: bool, settings: Settings) -> int:
    """Peak of the compute buffer over the graph of so many layers on the device."""
    new = settings.era == "2025+"
    on_cpu = settings.backend == "CPU"
    tokens, cells = _tokens(settings), padded_context(settings)
    outputs = min(tokens, settings.n_outputs or tokens) if new else tokens
    hidden = tokens * model.hidden_size * _F32
    q_bytes, kv_bytes = tokens * model.q_width * _F32, tokens * model.kv_width * _F32
    fa = settings.flash_attn
    g = _Graph(_ALIGNMENT[settings.backend])

    # Inputs come first. A GPU gets copies of those that its layers read.
    ids = g.input(tokens * _I32) if on_cpu else None
    if on_cpu and new:
        g.input(hidden)  # embeddings given instead of tokens: reserved and never freed
    x = None if on_cpu else g.input(hidden)
    position = g.input(tokens * _I32)
    rows_k = rows_v = None
    if new:
        rows_k = g.input(tokens * _I64)
        rows_v = g.input(tokens * _I64 * (1 if fa else model.kv_width))
    mask = g.input(cells * tokens * (_F16 if fa and new else _F32))
    chosen = g.input(outputs * _I32) if new else None
    turn_k = turn_v = None
    if new:
        if _turned(model, settings.type_k):
            turn_k = g.input(_rotation(model.head_dim))
        if _turned(model, settings.type_v):
            turn_v = g.input(64 * 64 * _F32)
    if x is None:
        x = g.op(hidden, ids)

    for i in range(n_layers):
        normed = g.op(hidden, x, in_place=True)
        # A view stands between a product and its rotary embedding, and what a view looks at is
        # never written in place; in 2023 it was.
        q = g.op(q_bytes, g.op(q_bytes, normed), position, in_place=settings.era == "2023")
        if turn_k is not None:
            q = g.op(q_bytes, q, turn_k)
        v = g.op(kv_bytes, normed)
        if turn_v is not None:
            v = g.op(kv_bytes, v, turn_v)
        k = g.op(kv_bytes, g.op(kv_bytes, normed), position, in_place=settings.era == "2023")
        if turn_k is not None:
            k = g.op(kv_bytes, k, turn_k)
        g.use(k, rows_k)
        g.use(v, rows_v)
        if fa:
            attended = g.op(q_bytes + _flash_extra(model, settings, tokens, cells), q, mask)
        else:
            scores = g.op(cells * tokens * model.n_heads * _F32, q)
            g.use(mask)  # softmax, in place
            mixed = g.op(q_bytes, scores)
            attended = g.op(q_bytes, mixed)  # the heads side by side again
        if turn_v is not None:
            attended = g.op(q_bytes, attended, turn_v)
        out = g.op(hidden, attended)
        width = tokens
        if head and i == n_layers - 1 and chosen is not None:
            width = outputs
            out = g.op(outputs * model.hidden_size * _F32, out, chosen)
            x = g.op(outputs * model.hidden_size * _F32, x, chosen)
        row = width * model.hidden_size * _F32
        wide = width * model.intermediate_size * _F32
        x = g.op(row, out, x, in_place=True)
        normed = g.op(row, x, in_place=True)
        gate, up = g.op(wide, normed), g.op(wide, normed)
        product = g.op(wide, gate, up, in_place=not new)
        down = g.op(row, product)
        x = g.op(row, down, x, in_place=True)
    if head:
        normed = g.op(outputs * model.hidden_size * _F32, x, in_place=True)
        g.op(outputs * model.vocab_size * _F32, normed)
    return g.peak()


def _turned(model: StoredModel, kind: str) -> bool:
    """Whether llama.cpp rotates what goes into a cache of that type (`attn_rot_k`, `_v`)."""
    return KV_TYPES[kind].block_weights > 1 and model.head_dim % 64 == 0


def _rotation(head_dim: int) -> int:
    """Bytes of the rotation of keys: the largest power of two that divides the head."""
    size = head_dim & -head_dim
    return size * size * _F32


def _flash_extra(model: StoredModel, settings: Settings, tokens: int, cells: int) -> int:
    """What a backend's flash attention wants behind its result."""
    kinds = (settings.type_k, settings.type_v)
    f16_rows = cells * model.kv_width * _F16
    if settings.backend == "CUDA":
        return sum(f16_rows for kind in kinds if kind != "f16")  # the cache as f16
    if settings.backend == "CPU" or settings.era != "2025+":
        return 0
    rows = sum(KV_TYPES[kind].row_bytes(model.kv_width) for kind in kinds)
    if any(KV_TYPES[kind].block_weights > 1 for kind in kinds):
        rows = 2 * model.kv_width * _F16
    pad = _METAL_COLUMNS * (rows + tokens * _F16)
    blocks = -(-tokens // _METAL_ROWS) * -(-cells // _METAL_COLUMNS)
    partial = min(tokens, _METAL_MAX_ROWS) * model.n_heads * _METAL_GROUPS
    return pad + blocks + partial * (model.head_dim + 2) * _F32 + 2 * f16_rows


def _stored(tensor: GGUFTensor) -> TensorSize:
    """The size of a tensor of a header; ValueError where there can be none."""
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(tensor.kind)
        weights, nbytes = gguf.GGML_QUANT_SIZES[kind]
    except (KeyError, ValueError):
        raise ValueError(f"{tensor.name} is of type {tensor.kind}, which is not known") from None
    dims = tensor.dims
    if not dims or dims[0] % weights or not all(dims):
        raise ValueError(f"{tensor.name} has a shape of {dims}, which its type cannot hold")
    rows = math.prod(dims[1:])
    return TensorSize(tensor.name, kind.name, rows, dims[0], rows * (dims[0] // weights) * nbytes)


class _Graph:
    """A graph as ggml's allocator sees it: sizes, who reads whom, and what is made in place.

    Built in the order of execution, then laid out by `peak`. Views are what they look at.
    """

    def __init__(self, alignment: int) -> None:
        self._alignment = alignment
        self._sizes: list[int] = []
        self._uses: list[int] = []
        self._n_inputs = 0
        #: (result or None, read, whether a read tensor's place may be taken)
        self._steps: list[tuple[int | None, tuple[int, ...], bool]] = []

    def input(self, nbytes: int) -> int:
        """A tensor that is there from the start."""
        assert self._n_inputs == len(self._sizes)
        self._n_inputs += 1
        return self._tensor(nbytes)

    def op(self, nbytes: int, *read: int | None, in_place: bool = False) -> int:
        """An operation with a result of its own, or in the place of one that it reads last."""
        sources = self._read(read)
        result = self._tensor(nbytes)
        self._steps.append((result, sources, in_place))
        return result

    def use(self, *read: int | None) -> None:
        """An operation whose result is elsewhere: the cache, or in place of what it reads."""
        self._steps.append((None, self._read(read), False))

    def peak(self) -> int:
        """Bytes that the buffer must have."""
        space = _FreeSpace()
        uses, sizes = list(self._uses), [_up(n, self._alignment) for n in self._sizes]
        places = [-1] * len(sizes)
        for i in range(self._n_inputs):
            places[i] = space.take(sizes[i])
        for result, sources, in_place in self._steps:
            if result is not None:
                same = [s for s in sources if sizes[s] == sizes[result] and uses[s] == 1]
                if in_place and same:
                    places[result], places[same[0]] = places[same[0]], -1
                else:
                    places[result] = space.take(sizes[result])
            for s in sources:
                uses[s] -= 1
                if uses[s] == 0 and places[s] >= 0:
                    space.give(places[s], sizes[s])
        return space.peak

    def _tensor(self, nbytes: int) -> int:
        self._sizes.append(nbytes)
        self._uses.append(0)
        return len(self._sizes) - 1

    def _read(self, read: Sequence[int | None]) -> tuple[int, ...]:
        sources = tuple(s for s in read if s is not None)
        for s in sources:
            self._uses[s] += 1
        return sources


class _FreeSpace:
    """The free stretches of a buffer that grows at its end (`ggml_dyn_tallocr`)."""

    def __init__(self) -> None:
        self.peak = 0
        self._end = 0  # from here on all is free
        self._holes: list[tuple[int, int]] = []  # offset and size, by offset

    def take(self, size: int) -> int:
        """The smallest hole that holds it, the last of equals; else the end."""
        fitting = [(n, -i) for i, (_, n) in enumerate(self._holes) if n >= size]
        if not fitting:
            offset, self._end = self._end, self._end + size
            self.peak = max(self.peak, self._end)
            return offset
        i = -min(fitting)[1]
        offset, n = self._holes[i]
        self._holes[i : i + 1] = [(offset + size, n - size)] if n > size else []
        return offset

    def give(self, offset: int, size: int) -> None:
        """Free a stretch and join it with its neighbours."""
        joined: list[tuple[int, int]] = []
        for start, n in sorted([*self._holes, (offset, size)]):
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + n)
            else:
                joined.append((start, n))
        if joined and sum(joined[-1]) == self._end:
            self._end = joined.pop()[0]
        self._holes = joined


def _up(n: int, step: int) -> int:
    return -(-n // step) * step
