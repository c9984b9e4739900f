"""Read safetensors files by rows, trusting nothing that the header says until it is checked.

Format: https://github.com/huggingface/safetensors (README, "Format"): 8 bytes little-endian
header length, a JSON header, then the tensors' bytes back to back.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from dus_edge.checkpoint.config import ModelConfig, load_config, tensor_shapes
from dus_edge.checkpoint.names import CONFIG, INDEX, SINGLE
from dus_edge.checkpoint.spec import DTYPE_BYTES, Checkpoint, Source, TensorSpec
from dus_edge.errors import CheckpointError, UnsupportedError
from dus_edge.jsonfile import MAX_BYTES, parse_strict, read_regular
from dus_edge.stream import OpenFiles

#: The reference implementation's own limit on a header's length.
MAX_HEADER_BYTES = 100_000_000

_NUMPY = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
#: Buffers that old checkpoints carry and that can be computed from the config.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor's bytes lie: file, dtype, shape and absolute offset."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """All tensors of one safetensors file, checked against the file's real size.

    Raises:
        CheckpointError: truncated file, or a header that lies about its length, an offset, a
            dtype or a shape, or whose tensors overlap or leave holes.
    """
    size = _file_size(path)
    if size < 8:
        raise CheckpointError(f"{path} has {size} bytes, too few for safetensors; fetch it again.")
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{path}: the header claims {length} bytes but the file has {size}; "
                "it is truncated or no safetensors file, fetch it again."
            )
        blob = f.read(length)
    try:
        header = parse_strict(blob.decode())
    except (ValueError, RecursionError) as e:  # also what is no UTF-8
        raise CheckpointError(f"{path}: the header is not JSON ({e}); fetch it again.") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object; fetch it again.")
    data_start = 8 + length
    tensors = {
        name: _entry(path, name, entry, data_start, size)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    _check_layout(path, tensors, data_start, size)
    return tensors


def _entry(path: Path, name: str, entry: object, data_start: int, size: int) -> StoredTensor:
    where = f"{path}: tensor {name}"
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]  # type: ignore[index]
        sound = isinstance(dtype, str) and isinstance(shape, list)
        sound = sound and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{where} has no sound dtype, shape and data_offsets in the header.")
    if begin > end or data_start + end > size:
        raise CheckpointError(
            f"{where} is said to lie at bytes {begin}–{end} of {size - data_start}; "
            "the file is truncated or its header lies, fetch it again."
        )
    width = DTYPE_BYTES.get(dtype)
    if width is not None and math.prod(shape) * width != end - begin:
        raise CheckpointError(
            f"{where} has {end - begin} bytes, but dtype {dtype} and shape {list(shape)} "
            f"need {math.prod(shape) * width}; fetch the file again."
        )
    return StoredTensor(path, str(dtype), tuple(shape), data_start + begin, end - begin)


def _check_layout(path: Path, tensors: Mapping[str, StoredTensor], start: int, size: int) -> None:
    position, previous = start, None
    for name, t in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if t.offset < position:
            raise CheckpointError(
                f"{path}: tensors {previous} and {name} overlap; the header lies, "
                "fetch the file again."
            )
        if t.offset > position:
            raise CheckpointError(
                f"{path}: {t.offset - position} bytes before tensor {name} belong to no tensor; "
                "the header lies, fetch the file again."
            )
        position, previous = t.offset + t.nbytes, name
    if position != size:
        raise CheckpointError(
            f"{path} has {size - position} bytes after its last tensor; fetch it again."
        )


def check_embedding(folder: Path, config: ModelConfig) -> None:
    """See that the vocabulary of a configuration is the embedding's, where the weights are there.

    One header is read, before lists as long as the vocabulary are made.

    Raises:
        CheckpointError: it is not, or the header is damaged.
    """
    name = config.family.name("embedding")
    shape = tensor_shapes(config)[name]
    if config.renamed is not None:
        name = config.renamed.stored_name(name)
    file = folder / SINGLE
    if (folder / INDEX).is_file():
        file = folder / _read_index(folder / INDEX).get(name, SINGLE)
    stored = read_header(file).get(name) if file.is_file() else None
    if stored is not None:
        _check_shape(name, stored, shape)


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read ({e.strerror}).") from None


def shard_files(folder: Path) -> tuple[list[Path], Mapping[str, str] | None]:
    """The folder's weight files, and the index's ``weight_map`` if there is an index.

    Raises:
        CheckpointError: no safetensors, a shard missing, or an index that points outside.
        UnsupportedError: only pickled weights.
    """
    index = folder / INDEX
    if index.is_file():
        weight_map = _read_index(index)
        names = sorted(set(weight_map.values()))
        missing = [n for n in names if not (folder / n).is_file()]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(
                f"{index} names {missing[0]}{more}, which is not in the folder; "
                "fetch the missing shards."
            )
        return [folder / n for n in names], weight_map
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], None
    if pickled := sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pth")):
        raise UnsupportedError(
            f"{folder} holds only pickled weights ({pickled[0].name}), which can run code when "
            "they are opened; convert them once with transformers: "
            "AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(DST)."
        )
    raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}; nothing to read.")


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = parse_strict(read_regular(index, MAX_BYTES).decode())["weight_map"]
        if not (isinstance(weight_map, dict) and weight_map):
            raise ValueError("weight_map is empty")
        if not all(isinstance(v, str) for v in weight_map.values()):
            raise ValueError("weight_map holds something other than file names")
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{index} is no index of shards ({e}); fetch it again.") from None
    for name, file in weight_map.items():
        if not is_plain_name(file):
            raise CheckpointError(
                f"{index}: tensor {name} points to {file!r}, outside the folder; refused."
            )
    return weight_map


def is_plain_name(name: str) -> bool:
    """Whether a file name from an index stays in the folder that holds the index."""
    return (
        bool(name)
        and name not in (".", "..")
        and PurePosixPath(name).name == name
        and "\\" not in name
        and "\0" not in name
        and len(name.encode()) <= 255  # no file system has longer ones
    )


class SafetensorsCheckpoint(Checkpoint):
    """A checkpoint folder: `config.json` and one safetensors file, or shards with an index.

    Opening it reads headers only, and checks every tensor's name and shape against the
    configuration, so that a job can be refused before its first byte is written.
    """

    def __init__(self, source: Source, config: ModelConfig | None = None) -> None:
        self.source = source
        self.config = config or load_config(source.folder / CONFIG)
        folder = source.weights_folder
        # Before the headers are read: a change after this is seen at the end.
        self._identities = {file: file_identity(file) for file in shard_files(folder)[0]}
        self._stored = _collect(folder)
        if (form := self.config.renamed) is not None:
            self._stored = {form.read_name(name): t for name, t in self._stored.items()}
        self._specs = _check_against_config(folder, self.config, self._stored)
        self._files = OpenFiles(os.O_RDONLY)

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        spec, stored = self._specs[name], self._stored[name]
        stop = spec.n_rows if stop is None else stop
        n_bytes = (stop - start) * spec.row_bytes
        buffer = np.empty(n_bytes, np.uint8)
        view, done = memoryview(buffer), 0
        try:
            # pread has no file position: threads read from one descriptor without a lock.
            with self._files.use(stored.file) as fd:
                while done < n_bytes:
                    at = stored.offset + start * spec.row_bytes + done
                    got = os.preadv(fd, [view[done:]], at)
                    if got <= 0:
                        raise CheckpointError(
                            f"{stored.file}: tensor {name} ended early; the file changed while it "
                            "was read."
                        )
                    done += got
        except OSError as e:  # the disk's fault, not the output's
            raise CheckpointError(
                f"{stored.file}: tensor {name} cannot be read ({e.strerror or e}); check the "
                "disk, or fetch the file again."
            ) from None
        return buffer.view(_NUMPY[spec.dtype]).reshape(stop - start, *spec.shape[1:])

    def check_unchanged(self) -> None:
        for file, before in self._identities.items():
            if file_identity(file) != before:
                raise CheckpointError(
                    f"{file} changed while it was read; start again when nothing writes to it."
                )

    def close(self) -> None:
        """Close the files; reading again opens them again."""
        self._files.close()

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()


def file_identity(file: Path) -> tuple[int, ...]:
    """What differs when a file was replaced or written to."""
    try:
        found = file.stat()
    except OSError as e:
        raise CheckpointError(f"{file} cannot be read ({e.strerror or e}).") from None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _collect(folder: Path) -> dict[str, StoredTensor]:
    files, weight_map = shard_files(folder)
    stored: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if weight_map is not None and weight_map.get(name) != file.name:
                continue  # a shard may carry what the index places elsewhere
            stored[name] = tensor
    if weight_map is not None:
        for name in weight_map:
            if name not in stored:
                raise CheckpointError(
                    f"{folder / weight_map[name]}: tensor {name}, which {INDEX} places there, "
                    "is missing; fetch the shard again."
                )
    return stored


def _check_against_config(
    folder: Path, config: ModelConfig, stored: dict[str, StoredTensor]
) -> dict[str, TensorSpec]:
    shapes = tensor_shapes(config)
    _check_extra(folder, config, shapes, stored)
    return dict(_checked_specs(folder, shapes, stored))


def _checked_specs(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, TensorSpec]]:
    for name, shape in shapes.items():
        if name not in stored:
            raise CheckpointError(
                f"{folder}: tensor {name} is missing from the weights; "
                "fetch the checkpoint again or correct config.json."
            )
        t = stored[name]
        if t.dtype not in DTYPE_BYTES:
            raise UnsupportedError(
                f"{t.file}: tensor {name} has dtype {t.dtype}; "
                f"known are {', '.join(DTYPE_BYTES)}: convert the checkpoint to bf16 first."
            )
        _check_shape(name, t, shape)
        yield name, TensorSpec(name, t.dtype, t.shape, source=name)


def _check_shape(name: str, stored: StoredTensor, shape: tuple[int, ...]) -> None:
    if stored.shape != shape:
        raise CheckpointError(
            f"{stored.file}: tensor {name} has shape {list(stored.shape)}, "
            f"but config.json means {list(shape)}."
        )


def _check_extra(
    folder: Path,
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, StoredTensor],
) -> None:
    for name, tensor in stored.items():
        if name in shapes or name.endswith(_IGNORED_SUFFIXES):
            continue
        if config.tied_head and name == config.family.name("head"):
            continue  # saved although tied: the embedding is what counts, as in transformers
        place = config.family.layer_of(name)
        if place is not None and place[0] >= config.n_layers:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} belongs to layer {place[0]}, but config.json says "
                f"{config.n_layers} layers (0–{config.n_layers - 1}); correct num_hidden_layers."
            )
        raise UnsupportedError(
            f"{tensor.file}: tensor {name} has no place in a {config.architecture}; "
            "adapters must be merged and other architectures converted first."
        )
