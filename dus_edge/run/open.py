"""Models of any format, found and loaded: the one place that knows which engine runs what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dus_edge.checkpoint.config import (
    parse_config,
    quantized_by,
    refuse_renamed,
    tensor_shapes,
)
from dus_edge.checkpoint.contained import check_small_files
from dus_edge.checkpoint.gguf.origin import Origin, file_origin
from dus_edge.checkpoint.gguf_header import GGUF_MAGIC
from dus_edge.checkpoint.names import CONFIG
from dus_edge.errors import CheckpointError, UnsupportedError, UsageError
from dus_edge.run.llama_logits import GGUFSource, inspect_gguf
from dus_edge.run.source import (
    Kind,
    LogitSource,
    SourceInfo,
    read_config,
    split_files,
    weight_files,
)
from dus_edge.run.torch_logits import FolderSource


def inspect_source(path: Path, name: str | None = None) -> SourceInfo:
    """Look at a model without loading its weights; a truncated GGUF file is found here.

    Args:
        path: a GGUF file or a folder.
        name: what people call it; None for the file's name without its ending, or the folder's.

    Raises:
        UsageError: nothing is there, or it is neither a GGUF file nor a checkpoint folder.
        CheckpointError: it is damaged.
        UnsupportedError: no Llama-form model, or weights of a kind that is not known.
        DependencyError: a GGUF file, and llama-cpp-python is not installed.
    """
    if path.is_dir():
        return _inspect_folder(path, name or path.absolute().name)
    if not path.is_file():
        raise UsageError(f"{path} does not exist; name a GGUF file or a checkpoint folder.")
    try:
        with path.open("rb") as f:
            magic = f.read(len(GGUF_MAGIC))
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read ({e.strerror}).") from None
    if magic != GGUF_MAGIC:
        raise UsageError(f"{path} is no GGUF file; name one, or a checkpoint's folder.")
    n_bytes = sum(file.stat().st_size for file in split_files(path))
    return replace(inspect_gguf(path, name or path.stem, n_bytes), origin=file_origin(path))


def open_source(info: SourceInfo, device: str = "cpu", n_threads: int | None = None) -> LogitSource:
    """Load a model.

    Args:
        info: of `inspect_source`.
        device: where transformers runs folders: ``cpu``, ``cuda``, ``mps``, …; for anything but
            ``cpu`` llama.cpp puts all layers on its GPU, if it was built for one.
        n_threads: of the CPU; None for all cores.

    Raises:
        CheckpointError: the weights are damaged or incomplete.
        DependencyError: a package that reads this kind is not installed.
        UsageError: there is no such device.
    """
    if info.kind == "gguf":
        return GGUFSource(info, device, n_threads)
    return FolderSource(info, device, n_threads)


def _inspect_folder(folder: Path, name: str) -> SourceInfo:
    check_small_files(folder)
    raw = read_config(folder)
    kind = _kind(raw, folder / CONFIG)
    plain = {k: v for k, v in raw.items() if k != "quantization_config"}
    config = parse_config(plain, str(folder / CONFIG))
    refuse_renamed(config, folder)
    return SourceInfo(
        path=folder,
        name=name,
        kind=kind,
        vocab_size=config.vocab_size,
        n_bytes=sum(file.stat().st_size for file in weight_files(folder, kind)),
        n_parameters=sum(int(np.prod(shape)) for shape in tensor_shapes(config).values()),
        context_length=config.context_length,
        origin=Origin(_folder_types(raw, kind)),
    )


def _folder_types(raw: Mapping[str, Any], kind: Kind) -> str:
    """How a folder's weights are stored: ``GPTQ 4 bits``, ``NF4``, ``bfloat16``."""
    details = raw.get("quantization_config")
    details = details if isinstance(details, Mapping) else {}
    if kind == "gptq":
        bits = details.get("bits")
        return f"GPTQ {bits} bits" if type(bits) is int else "GPTQ"
    if kind == "bitsandbytes":
        four = details.get("bnb_4bit_quant_type", "fp4") if details.get("load_in_4bit") else None
        return str(four).upper()[:8] if four else "INT8" if details.get("load_in_8bit") else kind
    dtype = raw.get("dtype") or raw.get("torch_dtype")
    return dtype[:16] if isinstance(dtype, str) else "safetensors"


def _kind(raw: Mapping[str, Any], where: Path) -> Kind:
    method = quantized_by(raw)
    if method is None:
        return "hf"
    if method not in ("gptq", "bitsandbytes"):
        raise UnsupportedError(
            f"{where}: the weights are quantized by {method!r}; plain, gptq and bitsandbytes "
            "folders can be measured."
        )
    return method
