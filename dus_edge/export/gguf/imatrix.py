"""Importance matrices as files of llama.cpp's GGUF format, and what a quantized model says of one.

The file is byte for byte what llama-imatrix writes for the same numbers (`save_imatrix` of
`tools/imatrix/imatrix.cpp`); `dus_edge.quant.imatrix` reads it back.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFValueType as Kind

from dus_edge.export.gguf.format import KeyValue, data_size, encode_header, lay_out
from dus_edge.files import output_files, pwrite_all
from dus_edge.quant import types as t
from dus_edge.quant.imatrix import (
    CHUNK_COUNT_KEY,
    CHUNK_SIZE_KEY,
    COUNTS,
    DATASETS_KEY,
    SUMS,
    TYPE,
    TYPE_KEY,
    Importance,
)

#: Bytes of a text that llama-quantize keeps (`llama_model_kv_override.val_str`).
_LONGEST_TEXT = 127


def write_imatrix(path: Path, importance: Importance) -> None:
    """Write an importance matrix whole or not at all.

    Args:
        path: the final name; what is there is replaced.
        importance: the statistics.

    Raises:
        OutputError: it cannot be written.
    """
    # Each sum is followed by its count; names are ordered by their bytes, as std::string is.
    arrays: dict[str, np.ndarray] = {}
    for name in sorted(importance.sums, key=str.encode):
        arrays[name + SUMS] = np.asarray(importance.sums[name], "<f4")
        arrays[name + COUNTS] = np.array([importance.counts[name]], "<f4")
    metadata = [
        KeyValue(TYPE_KEY, TYPE, Kind.STRING),
        KeyValue(DATASETS_KEY, [_utf8(d) for d in importance.datasets], Kind.ARRAY, Kind.STRING),
        KeyValue(CHUNK_COUNT_KEY, importance.n_chunks, Kind.UINT32),
        KeyValue(CHUNK_SIZE_KEY, importance.chunk_size, Kind.UINT32),
    ]
    infos = lay_out([(name, array.shape, t.F32) for name, array in arrays.items()])
    header = encode_header(metadata, infos)
    with output_files([(path, len(header) + data_size(infos))]) as (fd,):
        pwrite_all(fd, header, 0)
        for info in infos:
            data = np.ascontiguousarray(arrays[info.name])
            pwrite_all(fd, data.data, len(header) + info.offset)


def quantize_metadata(file: str, importance: Importance) -> list[KeyValue]:
    """What llama-quantize (not `llama_model_quantize`) adds to a model's metadata, in its order.

    Args:
        file: the importance matrix's name as the user gave it.
        importance: what was read from it; its entries count whether or not the model has them.
    """
    entries = [KeyValue("quantize.imatrix.file", _cut(file), Kind.STRING)]
    if importance.datasets:
        # Of several the first alone is named.
        dataset = _cut(importance.datasets[0])
        entries.append(KeyValue("quantize.imatrix.dataset", dataset, Kind.STRING))
    n_entries = len(importance.sums)
    entries.append(KeyValue("quantize.imatrix.entries_count", n_entries, Kind.UINT32))
    if importance.n_chunks > 0:
        chunks = importance.n_chunks
        entries.append(KeyValue("quantize.imatrix.chunks_count", chunks, Kind.UINT32))
    return entries


def _cut(text: str) -> bytes:
    # Unlike llama-quantize, never in the midst of a character: GGUF's strings are UTF-8.
    return _utf8(text)[:_LONGEST_TEXT].decode("utf-8", "ignore").encode()


def _utf8(text: str) -> bytes:
    # File names need not be UTF-8.
    return text.encode("utf-8", "replace")
