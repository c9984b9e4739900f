"""How many bytes a model takes on a device: predicted, without running it.

Under llama.cpp the weights are the tensors' exact sizes, the key/value cache follows from the
shape, and the compute buffer from `graph_memory`. GPTQ and bitsandbytes models run under
transformers: `torch_memory`. Nothing is fitted to measurements but the runtimes' own overhead.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable
from pathlib import Path

from dus_edge.checkpoint.config import ModelConfig, parse_config, tensor_shapes
from dus_edge.checkpoint.gguf.config import config_of
from dus_edge.checkpoint.gguf.file import GGUFModel
from dus_edge.checkpoint.gguf_header import GGUFTensor, read_header
from dus_edge.errors import CheckpointError, UnsupportedError, UsageError
from dus_edge.export.gguf.sink import plan_tensors
from dus_edge.families.family import Family, find_gguf_family, gguf_architectures
from dus_edge.predict.devices import Device, load_rules
from dus_edge.predict.memory import torch as torch_memory
from dus_edge.predict.memory.cuda import cuda_overhead_bytes
from dus_edge.predict.memory.graph import (
    BUFFER_ALIGNMENT,
    cache_streams,
    graph_bytes,
    outputs_at_once,
    round_up,
    shape_only,
    tokens_at_once,
    windowed_context,
)
from dus_edge.predict.stored_model import (
    EMBEDDING,
    KV_TYPES,
    MIB,
    MemoryUse,
    RunSettings,
    StoredModel,
    TensorSize,
)
from dus_edge.quant.recipe import Preset

PLATFORMS = ("windows", "linux", "linux-headless", "macos15", "macos26")

#: Longest context that any runtime can be asked for.
MAX_CONTEXT = 2**31

_F32 = 4
_F16 = 2
#: CUDA pads the rows of quantized tensors to this many weights (`MATRIX_ROW_PADDING`).
_CUDA_ROW = 512


def model_of_config(config: ModelConfig, preset: Preset, name: str = "the model") -> StoredModel:
    """The model that an export of this configuration would be; no weight is needed."""
    infos = plan_tensors(config, tensor_shapes(config), preset)
    tensors = (
        TensorSize(
            i.name,
            i.kind.name,
            i.nbytes // i.kind.row_bytes(i.shape[-1]),
            i.shape[-1],
            i.nbytes,
        )
        for i in infos
    )
    return StoredModel.of_shape(config, name, tensors, windows=_windows(config))


def _windows(config: ModelConfig) -> tuple[int | None, ...]:
    """Of each layer, the window that llama.cpp's graph of the family has; empty without any."""
    if config.sliding_window is None or not config.family.gguf_window:
        return ()
    return tuple(map(config.window, range(config.n_layers)))


def read_gguf(path: Path) -> StoredModel:
    """The model in a GGUF file; only its header is read.

    Raises:
        CheckpointError: no such file, no GGUF file, a truncated one, or a field is missing.
        UnsupportedError: split over several files, or of an architecture that is not known.
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
    family = find_gguf_family(architecture)
    if family is None:
        raise UnsupportedError(
            f"{path}: the architecture is {architecture}; memory is predicted for "
            f"{', '.join(gguf_architectures())} only."
        )
    parts = values.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise UnsupportedError(f"{path} is one of {parts} parts; merge them with llama-gguf-split.")
    ends = [offset + tensor.nbytes for tensor, offset in tensors]
    if ends and max(ends) > size:
        raise CheckpointError(
            f"{path} is truncated: {size:,} of at least {max(ends):,} bytes; fetch it again."
        )

    def number(field: str, default: int | None = None) -> int:
        key = family.gguf_key(field)
        value = values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
            raise CheckpointError(f"{path}: {key} is {value!r}; a positive one is needed.")
        return value

    named = {tensor.name: tensor for tensor, _ in tensors}
    if EMBEDDING not in named:
        raise CheckpointError(f"{path}: the tensor {EMBEDDING} is missing.")
    if number("n_layers") > len(tensors):
        raise CheckpointError(
            f"{path}: {number('n_layers'):,} layers are said to be in {len(tensors):,} tensors."
        )
    hidden, heads = number("hidden_size"), number("n_heads")
    return StoredModel(
        name=path.name,
        n_layers=number("n_layers"),
        hidden_size=hidden,
        intermediate_size=number("intermediate_size"),
        n_heads=heads,
        n_kv_heads=number("n_kv_heads", heads),
        head_dim=number("head_dim", hidden // heads),
        vocab_size=named[EMBEDDING].n_rows,
        context_length=number("context_length"),
        tensors=tuple(named.values()),
        windows=_stored_windows(path, family),
    )


def _stored_windows(path: Path, family: Family) -> tuple[int | None, ...]:
    """`_windows` of a file, of a family that llama.cpp gives windows."""
    if not family.gguf_window:
        return ()
    return _windows(parse_config(config_of(GGUFModel(path), copied=True), str(path)))


def check_context(context: int) -> None:
    """See that a runtime could be asked for a context of so many tokens.

    Raises:
        UsageError: the number is not positive, or above 2^31.
    """
    if context < 1:
        raise UsageError(f"A context of {context} tokens is asked for; at least 1 is needed.")
    if context > MAX_CONTEXT:
        raise UsageError(
            f"A context of {context:,} tokens is asked for; no more than {MAX_CONTEXT:,} can be."
        )


def context_warning(model: StoredModel, tokens: int) -> str | None:
    """A sentence where a model runs beyond what it was made for; llama.cpp only warns of it too."""
    if tokens <= model.context_length:
        return None
    return (
        f"{model.name} was made for {model.context_length:,} tokens; beyond them, up to "
        f"{tokens:,}, its text may be worthless."
    )


def memory_use(model: StoredModel, settings: RunSettings) -> MemoryUse:
    """Bytes on the device for a model run so.

    With a CPU the device is the computer's memory: everything is on it. On CUDA and Metal the
    embedding stays on the host, as do layers that are not offloaded. Under transformers all is on
    the device, or nothing.

    Raises:
        UsageError: a cache of a type that the runtime does not have, or that the heads' size does
            not allow.
    """
    if model.torch is not None:
        return torch_memory.memory_use(model, settings)
    on_device, head_on_device = offloaded(model, settings)
    return MemoryUse(
        weights_bytes=weights_on_device(model, settings),
        kv_cache_bytes=kv_cache_bytes(model, settings, on_device),
        compute_buffer_bytes=compute_buffer_bytes(model, settings),
        overhead_bytes=_overhead(model, settings) if on_device or head_on_device else 0,
    )


def offloaded(model: StoredModel, settings: RunSettings) -> tuple[int, bool]:
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


def weights_on_device(model: StoredModel, settings: RunSettings) -> int:
    """Bytes of the tensors on the device, with the padding of its buffers."""
    if settings.backend == "Metal" and settings.era == "2023":
        return model.weights_bytes  # one mapping of the whole file
    return padded_sizes(device_tensors(model, settings), settings)


def device_tensors(model: StoredModel, settings: RunSettings) -> list[TensorSize]:
    """The tensors on the device; one that is there beside the host's own copy is among them."""
    layers, head = offloaded(model, settings)
    if settings.backend == "CPU":
        return list(model.tensors)
    first = model.n_layers - layers
    chosen = [x for x in model.tensors if x.layer is not None and x.layer >= first]
    if head:
        chosen += [x for x in model.tensors if x.name.startswith("output")]
        if model.tied_head:
            chosen.append(model.head)  # a second copy; the host keeps its own for the input
    return chosen


def padded_sizes(tensors: Iterable[TensorSize], settings: RunSettings) -> int:
    """Bytes of tensors in a device's buffers: their rows and ends are padded there."""
    alignment = BUFFER_ALIGNMENT[settings.backend]
    total = 0
    for x in tensors:
        size = x.nbytes
        row_bytes = x.nbytes // x.n_rows
        if settings.backend == "CUDA" and row_bytes < x.n_cols * _F16 and x.n_cols % _CUDA_ROW:
            missing = _CUDA_ROW - x.n_cols % _CUDA_ROW
            size += row_bytes * missing // x.n_cols
        total += round_up(size, alignment)
    return total


def kv_cache_bytes(model: StoredModel, settings: RunSettings, layers: int | None = None) -> int:
    """Exact bytes of the key/value cache of so many layers, counted from the last; None means all.

    A layer with a window keeps the tokens that it looks at and those of a ubatch, as llama-server,
    Ollama and llama-bench ask for (`llama_kv_cache_iswa`; before 2025 it kept all).
    """
    k, v = KV_TYPES[settings.type_k], KV_TYPES[settings.type_v]
    for key, kind in (("keys", k), ("values", v)):
        if model.kv_width % kind.block_weights or model.head_dim % kind.block_weights:
            raise UsageError(
                f"{model.name}: {key} of head size {model.head_dim} are no whole blocks of "
                f"{kind.name.lower()}; use f16."
            )
    n = model.n_layers if layers is None else layers
    windows = model.windows[model.n_layers - n :] or (None,) * n
    cells = sum(windowed_context(settings, window) for window in windows)
    row = k.row_bytes(model.kv_width) + v.row_bytes(model.kv_width)
    return cells * cache_streams(settings) * row


def compute_buffer_bytes(model: StoredModel, settings: RunSettings) -> int:
    """Bytes of the device's compute buffer: the peak of ggml's allocator over the graph."""
    layers, head = offloaded(model, settings)
    sizes = [0]
    if layers or head:
        # A layer's holes are the next one's: after a few layers nothing changes any more.
        n = min(layers, 4)
        sizes.append(graph_bytes(shape_only(model), n, head, settings, model.fused_qkv))
    if layers < model.n_layers or not head:
        sizes.append(_host_weights_bytes(model, layers, head, settings))
    if settings.backend == "CPU":  # a row of logits for each sequence
        return max(sizes) + settings.n_parallel * model.vocab_size * _F32
    return max(sizes)


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
    if device.backend == "CPU":  # what the system takes of it is not known
        return int(device.memory(memory_gb) * 1024 * MIB)
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


def _overhead(model: StoredModel, settings: RunSettings) -> int:
    """What the runtime takes beside llama.cpp's buffers."""
    if settings.backend == "CUDA":
        return cuda_overhead_bytes(settings.n_sm, settings.compute_capability)
    if settings.backend == "Metal":
        return 0  # the working set counts Metal's buffers, and llama.cpp's are all there are
    # ggml's work buffer on a CPU: the widest input of a product, as blocks of 256 in 292 bytes.
    tokens = tokens_at_once(settings)
    return tokens * max(model.intermediate_size, model.q_width) * 292 // 256


def _host_weights_bytes(model: StoredModel, layers: int, head: bool, settings: RunSettings) -> int:
    """What the device needs for products whose weights are on the host.

    With batches of 32 tokens and more llama.cpp copies such a matrix over and multiplies on the
    device (`op_offload`).
    """
    tokens = tokens_at_once(settings)
    if tokens < 32 or (layers == 0 and not head):
        return 0
    first = model.n_layers - layers
    sizes = [
        x.nbytes + tokens * (x.n_cols + x.n_rows) * _F32
        for x in model.tensors
        if x.layer is not None and x.layer < first and x.n_rows > 1
    ]
    if not head:
        outputs = outputs_at_once(settings)
        sizes.append(model.head.nbytes + outputs * (model.hidden_size + model.vocab_size) * _F32)
    return max(sizes, default=0)


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
