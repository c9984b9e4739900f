"""The GGUF sink: any checkpoint, quantized as it streams, several presets in one pass.

Every source tensor is read once, quantized once per type that any place of any output needs, and
written to all those places. With an importance matrix, places of the same type whose importance
differs are quantized each for itself. Blocks that somebody else has made are copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np

from dus_edge.checkpoint.config import ModelConfig, tensor_shapes
from dus_edge.checkpoint.spec import Checkpoint, TensorSpec
from dus_edge.errors import CheckpointError
from dus_edge.export import finite
from dus_edge.export.chunks import chunks
from dus_edge.export.gguf.format import (
    KeyValue,
    TensorInfo,
    data_size,
    encode_header,
    lay_out,
)
from dus_edge.export.gguf.metadata import with_file_type
from dus_edge.export.gguf.tensors import (
    file_order,
    rope_factors,
    to_interleaved,
)
from dus_edge.families.family import Family
from dus_edge.files import (
    check_absent,
    check_free_space,
    check_writable,
    output_files,
    pwrite_all,
)
from dus_edge.quant.imatrix import takes_importance
from dus_edge.quant.quantizer import Conversion, Quantizer
from dus_edge.quant.recipe import ModelShape, Preset, tensor_type
from dus_edge.quant.types import QuantType
from dus_edge.stream import run_tasks

#: Stored dtypes that are a GGUF type already: their bytes pass through unchanged.
_SAME = {("F32", "F32"), ("F16", "F16"), ("BF16", "BF16")}


@dataclass(frozen=True)
class GGUFFile:
    """One output, planned to the byte before anything is written."""

    path: Path
    preset: Preset
    header: bytes
    tensors: tuple[TensorInfo, ...]

    @property
    def nbytes(self) -> int:
        """Size of the finished file."""
        return len(self.header) + data_size(self.tensors)


#: A type and the bytes of an importance vector, or None where there is none: places that agree in
#: both get the same bytes.
_Target: TypeAlias = tuple[QuantType, bytes | None]
#: Blocks that are there already, of one file, by GGUF name: each gives ``(out, row_bytes)`` uint8,
#: the rows in transformers' order.
Made: TypeAlias = Mapping[str, Callable[[], np.ndarray]]


@dataclass
class _Job:
    """One source tensor and all the places that want it, by type and importance."""

    spec: TensorSpec
    heads: int | None
    shift: float
    scale: float
    places: dict[_Target, list[tuple[int, int]]] = field(default_factory=dict)

    @property
    def is_changed(self) -> bool:
        """Whether llama.cpp wants other values than are stored."""
        return self.shift != 0 or self.scale != 1


def model_shape(config: ModelConfig, has_imatrix: bool = False) -> ModelShape:
    """What the presets' rules need of a configuration, and whether importance is given."""
    return ModelShape(
        config.n_layers,
        config.n_heads,
        config.n_kv_heads,
        config.tied_head,
        has_imatrix,
        llama_cpp_type=config.family.llama_cpp_type(config),
    )


def gguf_shapes(
    family: Family, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes to GGUF's names and the same shapes, in the file's order."""
    named = {family.gguf_name(name): shape for name, shape in shapes.items()}
    return {name: named[name] for name in sorted(named, key=file_order)}


def plan_tensors(
    config: ModelConfig,
    shapes: dict[str, tuple[int, ...]],
    preset: Preset,
    has_imatrix: bool = False,
) -> list[TensorInfo]:
    """Every tensor of the file with type and offset; no weight is read.

    Args:
        config: of the model to be written.
        shapes: Hugging Face names and shapes of its tensors.
        preset: the mix.
        has_imatrix: whether importance is given, which some mixes look at.
    """
    named = gguf_shapes(config.family, shapes)
    named |= {name: factors.shape for name, factors in rope_factors(config).items()}
    model = model_shape(config, has_imatrix)
    return lay_out(
        [
            (name, named[name], tensor_type(preset, name, named[name], model))
            for name in sorted(named, key=file_order)
        ]
    )


def plan_file(
    config: ModelConfig,
    shapes: dict[str, tuple[int, ...]],
    metadata: list[KeyValue],
    preset: Preset,
    path: Path,
    imatrix: Sequence[KeyValue] | None = None,
) -> GGUFFile:
    """Lay out one output file.

    Args:
        config: of the model to be written.
        shapes: Hugging Face names and shapes of its tensors.
        metadata: entries that do not depend on the preset.
        preset: the mix.
        path: where the file will be.
        imatrix: what the file says of the importance matrix that it is quantized with
            (`imatrix.quantize_metadata`); None without one.
    """
    tensors = plan_tensors(config, shapes, preset, imatrix is not None)
    header = encode_header([*with_file_type(metadata, preset), *(imatrix or ())], tensors)
    return GGUFFile(path, preset, header, tuple(tensors))


def total_work(
    checkpoint: Checkpoint,
    files: Sequence[GGUFFile],
    importance: Mapping[str, np.ndarray] | None = None,
    made: Mapping[Path, Made] | None = None,
) -> int:
    """Weights to be quantized: a source tensor counts once per type and importance it needs."""
    jobs = _jobs(checkpoint, files, importance, made)
    copied = sum(info.n_weights for _, info in _made_places(files, made))
    return copied + sum(job.spec.n_elements * len(job.places) for job in jobs)


def conversions(
    checkpoint: Checkpoint,
    files: Sequence[GGUFFile],
    importance: Mapping[str, np.ndarray] | None = None,
    made: Mapping[Path, Made] | None = None,
) -> list[Conversion]:
    """What `write_files` will ask of its quantizer, each once: (type, stored dtype, weighted).

    Tensors whose bytes pass through unchanged are not among them. No weight is read.
    """
    wanted: dict[Conversion, None] = {}
    for job in _jobs(checkpoint, files, importance, made):
        stored = checkpoint.read(job.spec.name, 0, 0).dtype  # of no rows: nothing is read
        stored = np.dtype(np.float32) if job.is_changed else stored
        for kind, weights in job.places:
            if not _passes_through(job, kind):
                wanted[kind, stored, weights is not None] = None
    return list(wanted)


def write_files(
    checkpoint: Checkpoint,
    files: Sequence[GGUFFile],
    quantizer: Quantizer,
    *,
    n_threads: int,
    importance: Mapping[str, np.ndarray] | None = None,
    made: Mapping[Path, Made] | None = None,
    allow_nonfinite: bool = False,
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Write all files in one pass over the checkpoint.

    Args:
        checkpoint: the model, a base or a view of one.
        files: planned outputs.
        quantizer: prepared for `conversions`.
        n_threads: worker threads.
        importance: by GGUF name, ``(n_cols,)`` float32: how much an error in each column of that
            tensor counts (`quant.imatrix.match`). Tensors not named are quantized without.
        made: by file, blocks that are copied.
        allow_nonfinite: go on although a weight is NaN or infinite.
        advance: told of weights done, out of `total_work`.

    Raises:
        CheckpointError: a weight is NaN or infinite, or too large for the type.
        OutputError: a file cannot be written. Nothing half-written stays in either case.
    """
    with output_files([(f.path, f.nbytes) for f in files]) as fds:
        for fd, file in zip(fds, files, strict=True):
            pwrite_all(fd, file.header, 0)
            _write_rope_factors(fd, file, checkpoint.config)
        quantizing = (
            task
            for job in _jobs(checkpoint, files, importance, made)
            for task in _tasks(checkpoint, job, fds, quantizer, allow_nonfinite)
        )
        tasks = itertools.chain(quantizing, _copies(checkpoint.config, files, made, fds))
        run_tasks(tasks, n_threads=n_threads, advance=advance)
        checkpoint.check_unchanged()


def _jobs(
    checkpoint: Checkpoint,
    files: Sequence[GGUFFile],
    importance: Mapping[str, np.ndarray] | None,
    made: Mapping[Path, Made] | None,
) -> list[_Job]:
    """One job per stored tensor, in the order in which the first file wants them."""
    jobs: dict[str, _Job] = {}
    config = checkpoint.config
    by_gguf_name = {config.family.gguf_name(s.name): s for s in checkpoint.specs().values()}
    factors = rope_factors(config)
    for index, file in enumerate(files):
        for info in file.tensors:
            if info.name in factors:
                continue  # no tensor of the checkpoint
            if made and info.name in made.get(file.path, ()):
                continue
            spec = by_gguf_name[info.name]
            heads = config.family.rope_heads(spec.name, config)
            shift = config.family.shift(spec.name)
            scale = config.family.folded_scale(spec.name, config, config.attention_scale)
            job = jobs.setdefault(spec.source, _Job(spec, heads, shift, scale))
            place = (index, len(file.header) + info.offset)
            target = (info.kind, _weights(info, importance))
            job.places.setdefault(target, []).append(place)
    return list(jobs.values())


def _made_places(
    files: Sequence[GGUFFile], made: Mapping[Path, Made] | None
) -> Iterator[tuple[int, TensorInfo]]:
    """Tensors whose blocks are there already, with the number of their file."""
    for index, file in enumerate(files):
        there = (made or {}).get(file.path, {})
        yield from ((index, info) for info in file.tensors if info.name in there)


def _copies(
    config: ModelConfig,
    files: Sequence[GGUFFile],
    made: Mapping[Path, Made] | None,
    fds: list[int],
) -> Iterator[Callable[[], int]]:
    """Write blocks that are there already."""
    names = {config.family.gguf_name(name): name for name in tensor_shapes(config)}

    def copy(index: int, info: TensorInfo) -> int:
        assert made is not None
        data = made[files[index].path][info.name]()
        heads = config.family.rope_heads(names[info.name], config)
        if heads:
            data = to_interleaved(data, len(data) // heads)
        offset = len(files[index].header) + info.offset
        pwrite_all(fds[index], np.ascontiguousarray(data).data.cast("B"), offset)
        return info.n_weights

    for index, info in _made_places(files, made):
        yield lambda index=index, info=info: copy(index, info)


def _weights(info: TensorInfo, importance: Mapping[str, np.ndarray] | None) -> bytes | None:
    """The importance that a place is quantized with; None where it would change nothing."""
    if importance is None or info.name not in importance or not takes_importance(info.kind):
        return None
    return np.asarray(importance[info.name], np.float32).tobytes()


def _tasks(
    checkpoint: Checkpoint,
    job: _Job,
    fds: list[int],
    quantizer: Quantizer,
    allow_nonfinite: bool,
) -> Iterator[Callable[[], int]]:
    spec = job.spec
    for start, stop in chunks(spec, spec.n_rows // job.heads if job.heads else 1):
        yield lambda start=start, stop=stop: _convert(
            checkpoint, job, start, stop, fds, quantizer, allow_nonfinite
        )


def _convert(
    checkpoint: Checkpoint,
    job: _Job,
    start: int,
    stop: int,
    fds: list[int],
    quantizer: Quantizer,
    allow_nonfinite: bool,
) -> int:
    """Read rows, bring them to every type and importance wanted, write them to every place."""
    spec = job.spec
    rows = checkpoint.read(spec.name, start, stop)
    if not allow_nonfinite:
        finite.check(rows, spec, start)
    if job.heads:
        rows = to_interleaved(rows, spec.n_rows // job.heads)
    if job.is_changed:
        rows = (widened(rows) + np.float32(job.shift)) * np.float32(job.scale)
    n_cols = spec.shape[-1]
    ready: np.ndarray | None = None
    for (kind, weights), places in job.places.items():
        if _passes_through(job, kind):
            data = rows
        else:
            ready = quantizer.as_input(rows.reshape(-1, n_cols)) if ready is None else ready
            data = _quantize(quantizer, ready, kind, weights, spec, allow_nonfinite)
        skip = start * kind.row_bytes(n_cols)
        for index, offset in places:
            pwrite_all(fds[index], data.data, offset + skip)
    return rows.size * len(job.places)


def _passes_through(job: _Job, kind: QuantType) -> bool:
    """Whether what is read is what is written; a changed tensor has become float32."""
    return ("F32" if job.is_changed else job.spec.dtype, kind.name) in _SAME


def _quantize(
    quantizer: Quantizer,
    rows: np.ndarray,
    kind: QuantType,
    weights: bytes | None,
    spec: TensorSpec,
    allow_nonfinite: bool,
) -> np.ndarray:
    importance = None if weights is None else np.frombuffer(weights, np.float32)
    try:
        return quantizer.quantize(rows, kind, importance=importance, validate=not allow_nonfinite)
    except OverflowError:
        raise CheckpointError(
            f"tensor {spec.name} has values too large for {kind.name} "
            f"(the largest is {_largest(rows):.3g}); choose bf16 or f32."
        ) from None


def widened(rows: np.ndarray) -> np.ndarray:
    """Stored rows as float32; bf16, which comes as ``uint16``, is its upper half."""
    if rows.dtype == np.uint16:
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float32, copy=False)


def _largest(rows: np.ndarray) -> float:
    """The largest absolute weight of stored rows."""
    return float(np.abs(widened(rows)).max())


def _write_rope_factors(fd: int, file: GGUFFile, config: ModelConfig) -> None:
    factors = rope_factors(config)
    for info in file.tensors:
        if info.name in factors:
            pwrite_all(fd, factors[info.name].data, len(file.header) + info.offset)


def check_outputs(files: Sequence[GGUFFile], overwrite: bool) -> None:
    """Refuse what can be refused before the first byte: names taken, folder, disk.

    Raises:
        OutputError: an output exists, its folder cannot be written, or the disk is too full.
    """
    check_absent([f.path for f in files], overwrite)
    for folder in {f.path.parent for f in files}:
        check_writable(folder)
        check_free_space(folder, sum(f.nbytes for f in files if f.path.parent == folder))
