"""The Hugging Face sink: any checkpoint as safetensors shards that transformers loads as they are.

Headers are computed from dtypes and shapes and written first; the weights' bytes follow in chunks,
unchanged. A layer that stands at several places is read once and written to all of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dus_edge.checkpoint.names import CONFIG, GENERATION_CONFIG, INDEX, SINGLE, TOKENIZER_FILES
from dus_edge.checkpoint.spec import Checkpoint, TensorSpec
from dus_edge.errors import OutputError
from dus_edge.export import finite
from dus_edge.export.chunks import chunks
from dus_edge.files import (
    check_free_space,
    check_replaceable,
    check_writable,
    output_files,
    output_folder,
    pwrite_all,
)
from dus_edge.stream import run

#: transformers' own default for `save_pretrained`.
SHARD_BYTES = 5_000_000_000

#: What a folder may hold for `--overwrite` to replace it.
REPLACEABLE = (
    CONFIG,
    GENERATION_CONFIG,
    "model*.safetensors",
    INDEX,
    *TOKENIZER_FILES,
    "additional_chat_templates",
    "README.md",
    "LICENSE*",
    "NOTICE*",
)
#: Files of the source that belong to the result as they are.
_CARRIED = (
    GENERATION_CONFIG,
    *TOKENIZER_FILES,
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its header and, by tensor, the absolute offset of the bytes."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    nbytes: int


def plan_shards(specs: Sequence[TensorSpec], limit: int = SHARD_BYTES) -> list[Shard]:
    """Distribute tensors over files of at most `limit` bytes of weights, in order."""
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
    return [_shard(name, group) for name, group in zip(names, groups, strict=True)]


def _shard(name: str, specs: Sequence[TensorSpec]) -> Shard:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for s in specs:
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


def check_outputs(checkpoint: Checkpoint, folder: Path, overwrite: bool) -> None:
    """Refuse what can be refused before the first byte.

    Raises:
        OutputError: the folder exists or holds other things, or the disk is too full.
    """
    if folder.resolve() == checkpoint.source.folder.resolve():
        raise OutputError(f"{folder} is the source itself; choose another folder with -o.")
    check_replaceable(folder, overwrite, REPLACEABLE)
    check_writable(folder.parent)
    check_free_space(folder, sum(s.nbytes for s in checkpoint.specs().values()))


def write_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    card: str,
    *,
    n_threads: int,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Write a checkpoint folder; it appears under its name when it is whole.

    Args:
        checkpoint: the model, a base or a view of one.
        folder: the result.
        card: text of the model card (`README.md`).
        n_threads: worker threads.
        overwrite: replace an older checkpoint folder of that name.
        allow_nonfinite: go on although a weight is NaN or infinite.
        advance: told of bytes written.

    Raises:
        CheckpointError: a weight is NaN or infinite.
        OutputError: the folder cannot be written. Nothing half-written stays in either case.
    """
    specs = list(checkpoint.specs().values())
    shards = plan_shards(specs)
    with output_folder(folder, overwrite, REPLACEABLE) as partial:
        _write_small_files(checkpoint, partial, card)
        if len(shards) > 1:
            _write_json(partial / INDEX, _index(shards, specs))
        with output_files([(partial / s.name, s.nbytes) for s in shards]) as fds:
            places = _places(checkpoint, shards, fds)
            for fd, shard in zip(fds, shards, strict=True):
                pwrite_all(fd, shard.header, 0)
            run(_tasks(checkpoint, places, allow_nonfinite), n_threads=n_threads, advance=advance)


def _places(
    checkpoint: Checkpoint, shards: Sequence[Shard], fds: Sequence[int]
) -> dict[str, tuple[TensorSpec, list[tuple[int, int]]]]:
    """Per stored tensor: one spec to read it by, and every (descriptor, offset) that wants it."""
    places: dict[str, tuple[TensorSpec, list[tuple[int, int]]]] = {}
    specs = checkpoint.specs()
    for fd, shard in zip(fds, shards, strict=True):
        for name, offset in shard.offsets.items():
            spec = specs[name]
            places.setdefault(spec.source, (spec, []))[1].append((fd, offset))
    return places


def _tasks(
    checkpoint: Checkpoint,
    places: Mapping[str, tuple[TensorSpec, list[tuple[int, int]]]],
    allow_nonfinite: bool,
) -> Iterator[Callable[[], int]]:
    for spec, targets in places.values():
        for start, stop in chunks(spec):
            yield lambda s=spec, t=targets, a=start, b=stop: _copy(
                checkpoint, s, t, a, b, allow_nonfinite
            )


def _copy(
    checkpoint: Checkpoint,
    spec: TensorSpec,
    targets: Sequence[tuple[int, int]],
    start: int,
    stop: int,
    allow_nonfinite: bool,
) -> int:
    rows = checkpoint.read(spec.name, start, stop)
    if not allow_nonfinite:
        finite.check(rows, spec, start)
    for fd, offset in targets:
        pwrite_all(fd, rows.data, offset + start * spec.row_bytes)
    return rows.nbytes * len(targets)


def _write_small_files(checkpoint: Checkpoint, folder: Path, card: str) -> None:
    source = checkpoint.source.folder
    for name in _CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", folder / "additional_chat_templates")
    _write_json(folder / CONFIG, both_spellings(checkpoint.config.raw))
    (folder / "README.md").write_text(card, encoding="utf-8")


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


def _index(shards: Sequence[Shard], specs: Sequence[TensorSpec]) -> dict[str, object]:
    return {
        "metadata": {
            "total_parameters": sum(s.n_elements for s in specs),
            "total_size": sum(s.nbytes for s in specs),
        },
        "weight_map": {name: shard.name for shard in shards for name in shard.offsets},
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
