"""A GGUF up-scaled as it is: ranges of its layers copied, byte for byte, into a new file.

Nothing is dequantized, so nothing is lost, and it takes as long as copying does. Metadata is
carried over; what counts layers, or has an entry for each, follows the plan.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFValueType as Kind

from dus_edge.checkpoint.gguf.file import GGUFModel, PlacedTensor, in_layer, layer_of
from dus_edge.checkpoint.gguf.rope import DIVISORS, LONGROPE_DIVISORS
from dus_edge.errors import OutputError, UnsupportedError
from dus_edge.export.gguf.format import (
    KeyValue,
    RawValue,
    TensorInfo,
    data_size,
    encode_header,
    lay_out,
)
from dus_edge.export.gguf.metadata import (
    base_model_metadata,
    general_name,
    plan_metadata,
    upscaled_description,
)
from dus_edge.export.gguf.tensors import file_order
from dus_edge.files import output_files, pwrite_all
from dus_edge.stream import run_tasks
from dus_edge.upscale.model import Model
from dus_edge.upscale.plan import DepthPlan

#: Bytes in one piece of work.
_PIECE = 1 << 22
#: Tensors outside layers that are computed from the metadata, in families whose rope needs them.
_COMPUTED = (DIVISORS, *LONGROPE_DIVISORS)
#: Keys of a file's layout, which the new one has its own of.
_LAYOUT = ("general.alignment", "split.no", "split.count", "split.tensors.count")
#: Arrays whose length is another thing's than the layers'.
_NOT_BY_LAYER = ("rope.dimension_sections",)
_TAG = "depth-up-scaling"


@dataclass(frozen=True)
class CopiedFile:
    """The output, planned to the byte.

    Attributes:
        path: where it will be.
        header: all before the tensors.
        tensors: the directory.
        sources: for each of `tensors`, what it is a copy of.
    """

    path: Path
    header: bytes
    tensors: tuple[TensorInfo, ...]
    sources: tuple[PlacedTensor, ...]

    @property
    def nbytes(self) -> int:
        """Size of the finished file."""
        return len(self.header) + data_size(self.tensors)


def plan_copies(model: Model, path: Path) -> CopiedFile:
    """Lay out the output; no weight is read.

    Args:
        model: a GGUF base and a plan of plain copies.
        path: where the file will be.

    Raises:
        UnsupportedError: a tensor outside layers that the family does not have: images are read.
        OutputError: the output is the base itself.
    """
    gguf = model.source.gguf
    assert gguf is not None
    if path.resolve() in [file.resolve() for file in gguf.files]:
        raise OutputError(f"{path} is the base itself; choose another folder with -o.")
    _check_scale(gguf, model)
    placed = dict(_copies(gguf, model.plan))
    names = sorted(placed, key=file_order)
    infos = lay_out([(n, placed[n].shape, placed[n].kind) for n in names])
    header = encode_header(list(_metadata(gguf, model)), infos)
    return CopiedFile(path, header, tuple(infos), tuple(placed[n] for n in names))


def _check_scale(gguf: GGUFModel, model: Model) -> None:
    """See that llama.cpp takes both depths for models with one scale of attention."""
    family = gguf.family
    if family.scale_role is None:
        return
    name = family.name(family.scale_role, 0)
    scales = [family.folded_scale(name, c, 1.0) for c in (model.base_config, model.config)]
    if not math.isclose(*scales):
        raise UnsupportedError(
            f"{gguf.label}: llama.cpp divides the attention of a {family.gguf_architecture} of "
            f"{model.plan.depth} layers by another number than that of {model.plan.n_base}; choose "
            "another depth, or up-scale the checkpoint that the file was made from."
        )


def write_copies(
    gguf: GGUFModel,
    file: CopiedFile,
    *,
    n_threads: int,
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Copy the tensors: each is read once, and written to all its places.

    Args:
        gguf: the base.
        file: of `plan_copies`.
        n_threads: worker threads.
        advance: told of bytes written.

    Raises:
        CheckpointError: the base cannot be read, or changed.
        OutputError: the output cannot be written. Nothing half-written stays in either case.
    """
    places: dict[str, list[int]] = {}
    for info, source in zip(file.tensors, file.sources, strict=True):
        places.setdefault(source.name, []).append(len(file.header) + info.offset)

    def tasks(fd: int) -> Iterator[Callable[[], int]]:
        for name, offsets in places.items():
            tensor = gguf.tensors[name]
            for start in range(0, tensor.nbytes, _PIECE):
                n_bytes = min(_PIECE, tensor.nbytes - start)
                yield lambda t=tensor, o=offsets, a=start, n=n_bytes: _copy(gguf, t, a, n, fd, o)

    with output_files([(file.path, file.nbytes)]) as (fd,):
        pwrite_all(fd, file.header, 0)
        run_tasks(tasks(fd), n_threads=n_threads, advance=advance)
        gguf.check_unchanged()


def _copy(
    gguf: GGUFModel, tensor: PlacedTensor, start: int, n_bytes: int, fd: int, places: Sequence[int]
) -> int:
    data = gguf.read(tensor.file, tensor.offset + start, n_bytes)
    for place in places:
        pwrite_all(fd, data, place + start)
    return n_bytes * len(places)


def _copies(gguf: GGUFModel, plan: DepthPlan) -> Iterator[tuple[str, PlacedTensor]]:
    """Names in the result, and what each is a copy of."""
    layers: dict[int, list[PlacedTensor]] = {}
    for tensor in gguf.tensors.values():
        layer = layer_of(tensor.name)
        if layer is not None:
            layers.setdefault(layer, []).append(tensor)
            continue
        if tensor.name not in _known(gguf):
            raise UnsupportedError(
                f"{gguf.label}: tensor {tensor.name} has no place in a model of text of the "
                f"architecture {gguf.family.gguf_architecture}; only such can be up-scaled."
            )
        yield tensor.name, tensor
    for i, source in enumerate(plan.sources):
        for tensor in layers[source]:
            yield in_layer(tensor.name, i), tensor


def _known(gguf: GGUFModel) -> set[str]:
    """Tensors outside layers that a model of the family may have."""
    outside = [rule.gguf for rule in gguf.family.tensors if not rule.per_layer]
    return {f"{name}.{part}" for name in outside for part in ("weight", "bias")} | {*_COMPUTED}


def _metadata(gguf: GGUFModel, model: Model) -> Iterator[KeyValue | RawValue]:
    """The base's entries in their order, changed where they must be, and the plan."""
    source, plan = model.source, model.plan
    if plan.is_identity:
        for key in gguf.values:
            if key not in _LAYOUT:
                yield RawValue(key, gguf.entry(key))
        return
    changed = _changed(gguf, model)
    for key in gguf.values:
        if key in _LAYOUT or key.startswith(("dus.", "general.base_model.")):
            continue
        entry = changed.pop(key, None) or _by_layer(gguf, plan, key)
        yield entry or RawValue(key, gguf.entry(key))
    yield from changed.values()
    yield from base_model_metadata(source, plan)
    yield from plan_metadata(source, plan)


def _changed(gguf: GGUFModel, model: Model) -> dict[str, KeyValue]:
    """Entries with a value of the result's own."""
    name, plan = model.name, model.plan
    said = (gguf.text("general.name") or "").lower()
    texts = {
        "general.name": general_name(name.title, "phi-3" in said or "phi3" in said),
        "general.basename": name.base,
        "general.size_label": name.size,
        "general.description": upscaled_description(model.source, plan, None),
    }
    found = {key: KeyValue(key, text, Kind.STRING) for key, text in texts.items()}
    tags = [tag for tag in gguf.array("general.tags") or () if tag != _TAG]
    found["general.tags"] = KeyValue("general.tags", [*tags, _TAG], Kind.ARRAY, Kind.STRING)
    for entry in gguf.family.gguf_keys:
        # Where the base has none, llama.cpp takes a pattern for granted that the plan may break.
        members = getattr(model.config, entry.value) if entry.type == "bools" else None
        if members is not None:
            key = f"{gguf.family.gguf_architecture}.{entry.key}"
            found[key] = KeyValue(key, list(members), Kind.ARRAY, Kind.BOOL)
    count = gguf.family.gguf_key("n_layers")
    found[count] = KeyValue(count, plan.depth, Kind.UINT32)
    return found


def _by_layer(gguf: GGUFModel, plan: DepthPlan, key: str) -> KeyValue | None:
    """An array with an entry for each layer, as the plan has them; None of all else."""
    architecture = f"{gguf.family.gguf_architecture}."
    if not key.startswith(architecture) or key.removeprefix(architecture) in _NOT_BY_LAYER:
        return None
    if gguf.values[key] is not None:
        return None
    items = gguf.array(key)
    if items is None or len(items) != plan.n_base:
        return None
    (item,) = struct.unpack_from("<I", gguf.entry(key), 4)
    return KeyValue(key, [items[i] for i in plan.sources], Kind.ARRAY, Kind(item))
