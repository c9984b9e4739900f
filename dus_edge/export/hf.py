"""The Hugging Face sink: any checkpoint as safetensors shards that transformers loads as they are.

Headers are computed from dtypes and shapes and written first; the weights' bytes follow in chunks,
unchanged. A layer that stands at several places is read once and written to all of them.

Quantized checkpoints are written by the same means: their exporters plan tensors of their own and
put them, in any order, with the `TensorWriter` that `checkpoint_folder` opens.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dus_edge.checkpoint.contained import carried_files, check_small_files
from dus_edge.checkpoint.names import (
    CONFIG,
    DIGESTS,
    GENERATION_CONFIG,
    INDEX,
    QUANTIZE_CONFIG,
    RECOVERY_PLOT,
    SINGLE,
    TOKENIZER_FILES,
    TRAINING_LOG,
)
from dus_edge.checkpoint.spec import DTYPE_BYTES, Checkpoint, TensorSpec
from dus_edge.errors import OutputError
from dus_edge.export import finite
from dus_edge.export.chunks import chunks
from dus_edge.files import (
    Write,
    check_free_space,
    check_replaceable,
    check_writable,
    new_files,
    output_folder,
)
from dus_edge.stream import run_tasks
from dus_edge.upscale.view import UpscaledCheckpoint

#: transformers' own default for `save_pretrained`.
SHARD_BYTES = 5_000_000_000

#: Key of config.json under which an up-scaled checkpoint says its plan.
PLAN_KEY = "dus_edge"

#: What a folder may hold for `--overwrite` to replace it.
REPLACEABLE = (
    CONFIG,
    GENERATION_CONFIG,
    "model*.safetensors",
    INDEX,
    QUANTIZE_CONFIG,
    *TOKENIZER_FILES,
    "additional_chat_templates",
    "README.md",
    RECOVERY_PLOT,
    DIGESTS,
    TRAINING_LOG,
    "LICENSE*",
    "NOTICE*",
)


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its header and, by tensor, the absolute offset of the bytes."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    nbytes: int


def plan_shards(
    specs: Sequence[TensorSpec], limit: int = SHARD_BYTES, *, framework: str = "pt"
) -> list[Shard]:
    """Distribute tensors over files of at most `limit` bytes of weights, in order.

    `framework` is what the files say they were made by: ``pt`` or ``mlx``.

    Within a file the widest dtypes come first, as the safetensors library has them: every tensor
    begins at a multiple of its item's size, which readers that map the file rely on.
    """
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if groups[-1] and size + spec.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.nbytes
    n = len(groups)
    names = [SINGLE] if n == 1 else [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    return [_shard(name, group, framework) for name, group in zip(names, groups, strict=True)]


def _shard(name: str, specs: Sequence[TensorSpec], framework: str) -> Shard:
    entries: dict[str, object] = {"__metadata__": {"format": framework}}
    position = 0
    for s in sorted(specs, key=lambda s: -s.item_bytes):
        entries[s.name] = {
            "dtype": s.dtype,
            "shape": list(s.shape),
            "data_offsets": [position, position + s.nbytes],
        }
        position += s.nbytes
    blob = json.dumps(entries, separators=(",", ":")).encode()
    blob += b" " * (-len(blob) % 8)  # the format asks for data aligned to 8 bytes
    header = len(blob).to_bytes(8, "little") + blob
    offsets = {s.name: len(header) + entries[s.name]["data_offsets"][0] for s in specs}  # type: ignore[index]
    return Shard(name, header, offsets, len(header) + position)


def check_outputs(
    checkpoint: Checkpoint,
    folder: Path,
    overwrite: bool,
    specs: Iterable[TensorSpec] | None = None,
) -> None:
    """Refuse what can be refused before the first byte.

    Args:
        checkpoint: the model to be written.
        folder: the result.
        overwrite: whether an older checkpoint folder of that name may be replaced.
        specs: what will be written, if that is not the checkpoint's own tensors.

    Raises:
        OutputError: the folder exists or holds other things, or the disk is too full.
    """
    if folder.resolve() == checkpoint.source.weights_folder.resolve():
        raise OutputError(f"{folder} is the source itself; choose another folder with -o.")
    check_replaceable(folder, overwrite, REPLACEABLE)
    check_writable(folder.parent)
    specs = checkpoint.specs().values() if specs is None else specs
    check_free_space(folder, sum(s.nbytes for s in specs))


def write_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    card: str,
    *,
    n_threads: int,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    advance: Callable[[int], None] = lambda n: None,
    config_extra: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint folder; it appears under its name when it is whole.

    Args:
        checkpoint: the model, a base or a view of one; a view's tensors may be of integer dtypes.
        folder: the result.
        card: text of the model card (`README.md`).
        n_threads: worker threads.
        overwrite: replace an older checkpoint folder of that name.
        allow_nonfinite: go on although a weight is NaN or infinite.
        advance: told of bytes written.
        config_extra: see `checkpoint_folder`.
        extra_files: see `checkpoint_folder`.

    Raises:
        CheckpointError: a weight is NaN or infinite.
        OutputError: the folder cannot be written. Nothing half-written stays in either case.
    """
    specs = checkpoint.specs()
    with checkpoint_folder(
        checkpoint,
        folder,
        card,
        list(specs.values()),
        overwrite=overwrite,
        config_extra=config_extra,
        extra_files=extra_files,
    ) as writer:
        tasks = copy_tasks(checkpoint, specs, writer, allow_nonfinite)
        run_tasks(tasks, n_threads=n_threads, advance=advance)


class TensorWriter:
    """Puts tensors where the planned files want them: in any order, from any thread."""

    def __init__(
        self, specs: Iterable[TensorSpec], shards: Sequence[Shard], writes: Sequence[Write]
    ) -> None:
        self._specs = {s.name: s for s in specs}
        self._places = {
            name: (write, offset)
            for write, shard in zip(writes, shards, strict=True)
            for name, offset in shard.offsets.items()
        }

    def put(self, name: str, rows: np.ndarray, start: int = 0) -> int:
        """Write rows of a tensor.

        Args:
            name: one of the planned tensors.
            rows: C-contiguous, of the planned dtype (``uint16`` for BF16): rows from `start` on.
            start: index of the first of them.

        Returns:
            Bytes written.

        Raises:
            ValueError: the rows are not of the planned width, or reach beyond the tensor.
        """
        spec = self._specs[name]
        skip = start * spec.row_bytes if start else 0
        if rows.itemsize != spec.item_bytes or skip + rows.nbytes > spec.nbytes:
            raise ValueError(
                f"{rows.dtype} {rows.shape} from row {start} on do not fit "
                f"tensor {name}, {spec.dtype} {spec.shape}"
            )
        write, offset = self._places[name]
        write(rows.reshape(-1).view(np.uint8).data, offset + skip)
        return rows.nbytes


@contextlib.contextmanager
def checkpoint_folder(
    checkpoint: Checkpoint,
    folder: Path,
    card: str,
    specs: Sequence[TensorSpec],
    *,
    overwrite: bool = False,
    config_extra: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, str] | None = None,
    framework: str = "pt",
) -> Iterator[TensorWriter]:
    """Lay out a checkpoint folder and open its tensors for writing.

    The folder appears under its name when the block ends; whoever opens it puts every tensor.

    Args:
        checkpoint: whose configuration, tokenizer and licence the folder gets.
        folder: the result.
        card: text of the model card (`README.md`).
        specs: the tensors to be written, in the order in which shards are filled.
        overwrite: replace an older checkpoint folder of that name.
        config_extra: keys of `config.json` that are added or replaced.
        extra_files: more text files by name; `REPLACEABLE` must know the names.
        framework: see `plan_shards`; MLX has an index even of one file.

    Raises:
        OutputError: the folder cannot be written. Nothing half-written stays.
    """
    shards = plan_shards(specs, framework=framework)
    with output_folder(folder, overwrite, REPLACEABLE) as partial:
        _write_small_files(checkpoint, partial, card, config_extra or {})
        for name, text in (extra_files or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        if len(shards) > 1 or framework == "mlx":
            _write_json(partial / INDEX, _index(shards, specs, checkpoint))
        with new_files([(partial / s.name, s.nbytes) for s in shards]) as writes:
            for write, shard in zip(writes, shards, strict=True):
                write(shard.header, 0)
            yield TensorWriter(specs, shards, writes)
        checkpoint.check_unchanged()


def by_source(specs: Iterable[TensorSpec]) -> list[list[TensorSpec]]:
    """Tensors that hold the same stored weights, together; in order of the first of each."""
    groups: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.source, []).append(spec)
    return list(groups.values())


def copy_tasks(
    checkpoint: Checkpoint,
    names: Iterable[str],
    writer: TensorWriter,
    allow_nonfinite: bool,
) -> Iterator[Callable[[], int]]:
    """Pieces of work that write tensors as they are stored, each stored one read once.

    Args:
        checkpoint: the model.
        names: of its tensors, to be copied under the same names.
        writer: of a folder that was planned with their specs.
        allow_nonfinite: go on although a weight is NaN or infinite.
    """
    specs = checkpoint.specs()
    for group in by_source(specs[name] for name in names):
        for start, stop in chunks(group[0]):
            yield lambda g=group, a=start, b=stop: _copy(
                checkpoint, g, writer, a, b, allow_nonfinite
            )


def _copy(
    checkpoint: Checkpoint,
    group: Sequence[TensorSpec],
    writer: TensorWriter,
    start: int,
    stop: int,
    allow_nonfinite: bool,
) -> int:
    spec = group[0]
    rows = checkpoint.read(spec.name, start, stop)
    if not allow_nonfinite and spec.dtype in DTYPE_BYTES:  # integers are always finite
        finite.check(rows, spec, start)
    return sum(writer.put(s.name, rows, start) for s in group)


def _write_small_files(
    checkpoint: Checkpoint, folder: Path, card: str, config_extra: Mapping[str, Any]
) -> None:
    source = checkpoint.source.folder
    check_small_files(source)
    for name in carried_files(source):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    raw = {**checkpoint.config.raw, **_plan_entry(checkpoint), **config_extra}
    _write_json(folder / CONFIG, both_spellings(raw))
    (folder / "README.md").write_text(card, encoding="utf-8")


def _plan_entry(checkpoint: Checkpoint) -> dict[str, Any]:
    """What config.json says of a view's plan; transformers carries what it does not know."""
    while not isinstance(checkpoint, UpscaledCheckpoint):
        below = getattr(checkpoint, "below", None)
        if below is None:
            return {}
        checkpoint = below
    plan = checkpoint.plan
    said = {"n_base_layers": plan.n_base, "sources": list(plan.sources)}
    return {PLAN_KEY: {**said, **plan.method.as_json()}}


def both_spellings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config that transformers 4 and 5 read alike.

    transformers 4 does not know `rope_parameters` and `dtype`: it would silently take
    rope_theta for 10,000 and the weights for float32. transformers 5 reads both spellings.
    """
    config = dict(raw)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict):
        if "rope_theta" in rope:
            config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
            config.setdefault("rope_scaling", scaling)
    if config.get("dtype") is not None:
        config.setdefault("torch_dtype", config["dtype"])
    return config


def _index(
    shards: Sequence[Shard], specs: Sequence[TensorSpec], checkpoint: Checkpoint
) -> dict[str, object]:
    return {
        "metadata": {
            # Of the model: what is stored of a quantized one has another number of elements.
            "total_parameters": sum(s.n_elements for s in checkpoint.specs().values()),
            "total_size": sum(s.nbytes for s in specs),
        },
        "weight_map": {name: shard.name for shard in shards for name in shard.offsets},
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
