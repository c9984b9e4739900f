"""The GGUF sink: any checkpoint, quantized as it streams, several presets in one pass.

Every source tensor is read once, quantized once per type that any place of any output needs, and
written to all those places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dus_edge.checkpoint.config import ModelConfig
from dus_edge.checkpoint.spec import Checkpoint, TensorSpec
from dus_edge.errors import CheckpointError
from dus_edge.export import finite
from dus_edge.export.chunks import chunks
from dus_edge.export.gguf_format import (
    KeyValue,
    TensorInfo,
    data_size,
    encode_header,
    lay_out,
)
from dus_edge.export.gguf_metadata import with_file_type
from dus_edge.export.gguf_tensors import (
    ROPE_FREQS,
    file_order,
    gguf_name,
    rope_factors,
    rope_heads,
    to_interleaved,
)
from dus_edge.files import (
    check_absent,
    check_free_space,
    check_writable,
    output_files,
    pwrite_all,
)
from dus_edge.quant.quantizer import Conversion, Quantizer
from dus_edge.quant.recipe import ModelShape, Preset, tensor_type
from dus_edge.quant.types import QuantType
from dus_edge.stream import run

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


@dataclass
class _Job:
    """One source tensor and all the places that want it, by type."""

    spec: TensorSpec
    heads: int | None
    places: dict[QuantType, list[tuple[int, int]]] = field(default_factory=dict)


def model_shape(config: ModelConfig) -> ModelShape:
    """What the presets' rules need of a configuration."""
    return ModelShape(config.n_layers, config.n_heads, config.n_kv_heads, config.tied_head)


def plan_tensors(
    config: ModelConfig, shapes: dict[str, tuple[int, ...]], preset: Preset
) -> list[TensorInfo]:
    """Every tensor of the file with type and offset; no weight is read.

    Args:
        config: of the model to be written.
        shapes: Hugging Face names and shapes of its tensors.
        preset: the mix.
    """
    named = {gguf_name(name): shape for name, shape in shapes.items()}
    if (factors := rope_factors(config)) is not None:
        named[ROPE_FREQS] = factors.shape
    model = model_shape(config)
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
) -> GGUFFile:
    """Lay out one output file."""
    tensors = plan_tensors(config, shapes, preset)
    header = encode_header(with_file_type(metadata, preset), tensors)
    return GGUFFile(path, preset, header, tuple(tensors))


def total_work(checkpoint: Checkpoint, files: Sequence[GGUFFile]) -> int:
    """Weights to be quantized: each source tensor counts once per type it is needed in."""
    return sum(job.spec.n_elements * len(job.places) for job in _jobs(checkpoint, files))


def conversions(checkpoint: Checkpoint, files: Sequence[GGUFFile]) -> list[Conversion]:
    """What `write_files` will ask of its quantizer, each once: (type, stored dtype, weighted).

    Tensors whose bytes pass through unchanged are not among them. No weight is read.
    """
    wanted: dict[Conversion, None] = {}
    for job in _jobs(checkpoint, files):
        stored = checkpoint.read(job.spec.name, 0, 0).dtype  # of no rows: nothing is read
        for kind in job.places:
            if not _passes_through(job.spec, kind):
                wanted[kind, stored, False] = None
    return list(wanted)


def write_files(
    checkpoint: Checkpoint,
    files: Sequence[GGUFFile],
    quantizer: Quantizer,
    *,
    n_threads: int,
    allow_nonfinite: bool = False,
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Write all files in one pass over the checkpoint.

    Args:
        checkpoint: the model, a base or a view of one.
        files: planned outputs.
        quantizer: prepared for `conversions`.
        n_threads: worker threads.
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
        tasks = (
            task
            for job in _jobs(checkpoint, files)
            for task in _tasks(checkpoint, job, fds, quantizer, allow_nonfinite)
        )
        run(tasks, n_threads=n_threads, advance=advance)


def _jobs(checkpoint: Checkpoint, files: Sequence[GGUFFile]) -> list[_Job]:
    """One job per stored tensor, in the order in which the first file wants them."""
    jobs: dict[str, _Job] = {}
    by_gguf_name = {gguf_name(s.name): s for s in checkpoint.specs().values()}
    for index, file in enumerate(files):
        for info in file.tensors:
            if info.name == ROPE_FREQS:
                continue
            spec = by_gguf_name[info.name]
            heads = rope_heads(spec.name, checkpoint.config)
            job = jobs.setdefault(spec.source, _Job(spec, heads))
            place = (index, len(file.header) + info.offset)
            job.places.setdefault(info.kind, []).append(place)
    return list(jobs.values())


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
    """Read rows, bring them to every type wanted, write them to every place."""
    spec = job.spec
    rows = checkpoint.read(spec.name, start, stop)
    if not allow_nonfinite:
        finite.check(rows, spec, start)
    if job.heads:
        rows = to_interleaved(rows, spec.n_rows // job.heads)
    n_cols = spec.shape[-1]
    ready: np.ndarray | None = None
    for kind, places in job.places.items():
        if _passes_through(spec, kind):
            data = rows
        else:
            ready = quantizer.as_input(rows.reshape(-1, n_cols)) if ready is None else ready
            data = _quantize(quantizer, ready, kind, spec, allow_nonfinite)
        skip = start * kind.row_bytes(n_cols)
        for index, offset in places:
            pwrite_all(fds[index], data.data, offset + skip)
    return rows.size * len(job.places)


def _passes_through(spec: TensorSpec, kind: QuantType) -> bool:
    return (spec.dtype, kind.name) in _SAME


def _quantize(
    quantizer: Quantizer,
    rows: np.ndarray,
    kind: QuantType,
    spec: TensorSpec,
    allow_nonfinite: bool,
) -> np.ndarray:
    try:
        return quantizer.quantize(rows, kind, validate=not allow_nonfinite)
    except OverflowError:
        raise CheckpointError(
            f"tensor {spec.name} has values too large for {kind.name} "
            f"(the largest is {_largest(rows):.3g}); choose bf16 or f32."
        ) from None


def _largest(rows: np.ndarray) -> float:
    """The largest absolute weight of stored rows."""
    if rows.dtype == np.uint16:  # bf16 is the upper half of float32
        rows = (rows.astype(np.uint32) << 16).view(np.float32)
    return float(np.abs(rows).max())


def _write_rope_factors(fd: int, file: GGUFFile, config: ModelConfig) -> None:
    factors = rope_factors(config)
    if factors is None:
        return
    info = next(i for i in file.tensors if i.name == ROPE_FREQS)
    pwrite_all(fd, factors.data, len(file.header) + info.offset)


def check_outputs(files: Sequence[GGUFFile], overwrite: bool) -> None:
    """Refuse what can be refused before the first byte: names taken, folder, disk.

    Raises:
        OutputError: an output exists, its folder cannot be written, or the disk is too full.
    """
    check_absent([f.path for f in files], overwrite)
    for folder in {f.path.parent for f in files}:
        check_writable(folder)
        check_free_space(folder, sum(f.nbytes for f in files if f.path.parent == folder))
