"""llama-imatrix in process: its statistics through llama.cpp's callback, its file through ggml.

`collect` follows `IMatrixCollector::collect_imatrix` and `compute_imatrix` of llama.cpp's
`tools/imatrix/imatrix.cpp` for dense models in a CPU's memory; `write` follows `save_imatrix`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path

import llama_cpp
import numpy as np

from dus_edge.quant import ggml

_F32 = 0
#: Smaller batches are passed over, as by llama-imatrix.
_FEWEST_ROWS = 16


class _Tensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml/include/ggml.h."""


_Tensor._fields_ = (
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
)


def collect(
    gguf_path: Path,
    token_chunks: np.ndarray,
    *,
    process_output: bool = False,
    add_bos: bool = False,
    n_threads: int = 1,
) -> dict[str, tuple[np.ndarray, int]]:
    """Squared inputs of every weight matrix, added up over the tokens of all chunks.

    Args:
        gguf_path: a dense model.
        token_chunks: ``(n_chunks, n_ctx)`` int32; every chunk is a text of its own, evaluated in
            one batch. At least 16 tokens each.
        process_output: collect for ``output.weight`` too (llama-imatrix's `--process-output`).
        add_bos: put the vocabulary's BOS in the place of every chunk's first token, as
            llama-imatrix does for vocabularies that want one.
        n_threads: threads of the evaluation.

    Returns:
        by GGUF tensor name: Σx² as ``(n_cols,)`` float32, and the number of tokens.
    """
    token_chunks = np.array(token_chunks, np.int32, ndmin=2)
    n_chunks, n_ctx = token_chunks.shape
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    errors: list[BaseException] = []
    op_name = ggml.library().ggml_op_name
    op_name.restype = ctypes.c_char_p

    def on_eval(address: int, ask: bool, _: int) -> bool:
        try:
            node = _Tensor.from_address(address)
            if op_name(node.op) != b"MUL_MAT":
                return False
            name = _filtered(node.src[0].contents.name.decode())
            x = node.src[1].contents
            wanted = name.startswith("blk.") or (process_output and name == "output.weight")
            if not wanted or x.ne[1] < _FEWEST_ROWS or x.type != _F32:
                return False
            if not ask:
                rows = _rows(x)
                sums[name] = sums.get(name, 0) + np.square(rows, dtype=np.float64).sum(0)
                counts[name] = counts.get(name, 0) + len(rows)
        except BaseException as e:
            # Raised here it would only be printed.
            errors.append(e)
        return True

    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(gguf_path).encode(), params)
    assert model, gguf_path
    try:
        if add_bos:
            vocab = llama_cpp.llama_model_get_vocab(model)
            if llama_cpp.llama_vocab_get_add_bos(vocab):
                token_chunks[:, 0] = llama_cpp.llama_vocab_bos(vocab)
        callback = llama_cpp.ggml_backend_sched_eval_callback(on_eval)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = n_ctx
        options.n_threads = options.n_threads_batch = n_threads
        options.cb_eval = callback
        context = llama_cpp.llama_init_from_model(model, options)
        assert context, gguf_path
        batch = llama_cpp.llama_batch_init(n_ctx, 0, 1)
        try:
            for chunk in token_chunks:
                llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
                batch.n_tokens = n_ctx
                for i, token in enumerate(chunk.tolist()):
                    batch.token[i] = token
                    batch.pos[i] = i
                    batch.n_seq_id[i] = 1
                    batch.seq_id[i][0] = 0
                    # Else the last layer would compute only the last token's row.
                    batch.logits[i] = 1
                assert llama_cpp.llama_decode(context, batch) == 0
                if errors:
                    raise errors[0]
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)
    finally:
        llama_cpp.llama_model_free(model)
    assert all(count == n_chunks * n_ctx for count in counts.values()), counts
    return {name: (sums[name].astype(np.float32), counts[name]) for name in sums}


def _filtered(name: str) -> str:
    """``CUDA0#blk.0.attn_k.weight#0`` → ``blk.0.attn_k.weight``."""
    return name.split("#")[1] if "#" in name else name


def _rows(x: _Tensor) -> np.ndarray:
    """An F32 tensor's rows, ``(n_rows, n_cols)``, whatever its strides."""
    shape = tuple(x.ne)[::-1]
    strides = tuple(x.nb)[::-1]
    extent = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + 4
    raw = (ctypes.c_char * extent).from_address(x.data)
    return np.ndarray(shape, np.float32, raw, strides=strides).reshape(-1, shape[-1])


def write(
    path: Path,
    entries: Mapping[str, tuple[np.ndarray, float]],
    *,
    n_chunks: int,
    chunk_size: int,
    datasets: tuple[str, ...],
) -> None:
    """Write an importance matrix by the same calls of ggml as llama-imatrix."""
    lib = ggml.library()
    for name in ("ggml_init", "ggml_new_tensor_2d", "ggml_get_data", "gguf_init_empty"):
        getattr(lib, name).restype = ctypes.c_void_p
    lib.gguf_write_to_file.restype = ctypes.c_bool

    class Params(ctypes.Structure):
        """`struct ggml_init_params`."""

        _fields_ = (
            ("mem_size", ctypes.c_size_t),
            ("mem_buffer", ctypes.c_void_p),
            ("no_alloc", ctypes.c_bool),
        )

    n_values = sum(sums.size for sums, _ in entries.values())
    context = lib.ggml_init(Params(4 * n_values + 2048 * len(entries) + 4096, None, False))
    context = ctypes.c_void_p(context)
    out = ctypes.c_void_p(lib.gguf_init_empty())
    texts = (ctypes.c_char_p * len(datasets))(*(d.encode() for d in datasets))
    lib.gguf_set_val_str(out, b"general.type", b"imatrix")
    lib.gguf_set_arr_str(out, b"imatrix.datasets", texts, ctypes.c_size_t(len(datasets)))
    lib.gguf_set_val_u32(out, b"imatrix.chunk_count", ctypes.c_uint32(n_chunks))
    lib.gguf_set_val_u32(out, b"imatrix.chunk_size", ctypes.c_uint32(chunk_size))

    def tensor(name: str, values: np.ndarray) -> ctypes.c_void_p:
        values = np.ascontiguousarray(values, np.float32)
        made = ctypes.c_void_p(
            lib.ggml_new_tensor_2d(context, _F32, ctypes.c_int64(values.size), ctypes.c_int64(1))
        )
        lib.ggml_set_name(made, name.encode())
        ctypes.memmove(lib.ggml_get_data(made), values.ctypes.data, values.nbytes)
        return made

    for name in sorted(entries):
        sums, count = entries[name]
        lib.gguf_add_tensor(out, tensor(f"{name}.in_sum2", sums))
        lib.gguf_add_tensor(out, tensor(f"{name}.counts", np.array([count])))
    written = lib.gguf_write_to_file(out, str(path).encode(), False)
    lib.gguf_free(out)
    lib.ggml_free(context)
    assert written, path
