"""Predicted against published and measured memory.

    python benchmarks/check_memory.py                     # the published rows
    python benchmarks/check_memory.py --gguf FILE [...]   # and what llama.cpp allocates here

Prints a table of errors and says of every row beyond 3 % why it is; writes the rows to
`results/memory.jsonl`. A row is compared where it states its inputs: the model's shape, the type,
the context, and at least the cache or the compute buffer. A total is compared where all its parts
were published.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import RESULTS, append, machine, read, read_published

from dus_edge.checkpoint.config import parse_config
from dus_edge.predict.memory import llama as memory
from dus_edge.predict.stored_model import (
    BACKENDS,
    MIB,
    RunSettings,
    StoredModel,
    TensorSize,
    kv_types,
)
from dus_edge.quant import types as quant_types
from dus_edge.quant.recipe import Preset, find_preset
from dus_edge.words import markdown_table

LIMIT = 0.03

#: By row number of `published/memory.json`: what its notes say of the run beyond its fields.
SPECIAL: Mapping[int, Mapping[str, Any]] = {
    86: {"n_outputs": 1, "flash_attn": True},  # logits of one token: 84.5 MiB hold no 512 x 151,936
    102: {"n_outputs": 1, "flash_attn": True},  # Ollama's: one sequence; flash attention is "auto"
    103: {"flash_attn": True},  # "auto"
    90: {"n_gpu_layers": 5},  # "only 5 of 33 layers offloaded"
}
#: Rows of models whose queries, keys and values are one matrix.
FUSED = (86, 87)
#: The type of that matrix where it is not the preset's own.
FUSED_TYPES = {"q3_k_m": quant_types.Q4_K, "q4_k_m": quant_types.Q5_K, "q5_k_m": quant_types.Q6_K}
#: Why a row is off; by row number.
REASONS: Mapping[int, str] = {
    8: "August 2023: the cache's buffer holds 2 MiB for ggml's own headers; the cache is 256",
    9: "August 2023: the cache's buffer holds 2 MiB for ggml's own headers; the cache is 400",
    10: "August 2023: as row 9, and the file is mapped as two buffers that share 312 MiB",
    14: "the file is mapped as two buffers that share 500 MiB",
    67: "the file is mapped as two buffers that share 205 MiB",
}
CONTEXTS = (512, 2048, 4096, 16384)


def published() -> list[dict[str, Any]]:
    return read_published("memory")["rows"]


def states_inputs(row: Mapping[str, Any]) -> bool:
    """Whether the shape, the context and a buffer are there."""
    needed = ("n_layer", "n_embd", "n_head", "n_head_kv", "n_ff", "n_vocab")
    return (
        all(key in row.get("arch", {}) for key in needed)
        and "n_ctx" in row
        and row.get("backend") in BACKENDS
        and ("kv_cache_mib" in row or "compute_buffer_mib" in row)
    )


def model_of(row: Mapping[str, Any]) -> StoredModel:
    """The row's model; where its type is not stated, F16, whose weights are not compared."""
    arch = row["arch"]
    preset = find_preset(row.get("quant", "f16"))
    config = parse_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": arch["n_layer"],
            "hidden_size": arch["n_embd"],
            "num_attention_heads": arch["n_head"],
            "num_key_value_heads": arch["n_head_kv"],
            "intermediate_size": arch["n_ff"],
            "vocab_size": arch["n_vocab"],
            "max_position_embeddings": max(row["n_ctx"], 2048),
            **({"head_dim": arch["head_dim"]} if "head_dim" in arch else {}),
        }
    )
    model = memory.model_of_config(config, preset, row["model"])
    return fused(model, preset) if row["row"] in FUSED else model


def fused(model: StoredModel, preset: Preset) -> StoredModel:
    """The same model with one matrix for queries, keys and values.

    Files of the time had a rule of their own for it; llama-quantize treats it as v's now.
    """
    kept = [x for x in model.tensors if ".attn_" not in x.name or ".attn_output." in x.name]
    kept += [x for x in model.tensors if ".attn_norm." in x.name]
    rows, cols = model.q_width + 2 * model.kv_width, model.hidden_size
    for i in range(model.n_layers):
        name = f"blk.{i}.attn_qkv"
        kind = FUSED_TYPES.get(preset.name, preset.default)
        kept.append(
            TensorSize(f"{name}.weight", kind.name, rows, cols, rows * kind.row_bytes(cols))
        )
        kept.append(TensorSize(f"{name}.bias", "F32", 1, rows, rows * 4))
    return replace(model, tensors=tuple(kept))


def settings_of(row: Mapping[str, Any]) -> RunSettings:
    said = {
        "context": row["n_ctx"],
        "batch": row.get("n_batch", 2048),
        "ubatch": row.get("n_ubatch", 512),
        "flash_attn": bool(row.get("flash_attn", False)),
        "backend": row["backend"],
        "era": row["era"],
    }
    return RunSettings(**(said | dict(SPECIAL.get(row["row"], {}))))


def compare(row: Mapping[str, Any]) -> dict[str, Any]:
    """One published row beside its prediction, in MiB; errors are of the total."""
    use = memory.memory_use(model_of(row), settings_of(row))
    parts = {
        "model_buffer_mib": use.weights_bytes / MIB,
        "kv_cache_mib": use.kv_cache_bytes / MIB,
        "compute_buffer_mib": use.compute_buffer_bytes / MIB,
    }
    if "quant" not in row:
        del parts["model_buffer_mib"]
    known = [key for key in parts if key in row]
    # What was read of the buffers; where the log printed its own total, that.
    read = row.get("total_vram_mib", sum(row[key] for key in known))
    expected = sum(parts.values()) if "total_vram_mib" in row else sum(parts[k] for k in known)
    return {
        "row": row["row"],
        "model": row["model"],
        "quant": row.get("quant"),
        "device": row.get("device", row["backend"]),
        "n_ctx": row["n_ctx"],
        "era": row["era"],
        "published": {key: row[key] for key in (*known, "total_vram_mib") if key in row},
        "predicted": {key: round(parts[key], 2) for key in parts},
        "total_published_mib": round(read, 2),
        "total_predicted_mib": round(expected, 2),
        "error": round(expected / read - 1, 5),
        # Metal's buffers of 2023 hold ggml's headers, up to 0.06 MiB, beside the cache.
        "kv_exact": abs(parts["kv_cache_mib"] - row["kv_cache_mib"]) < 0.07
        if "kv_cache_mib" in row
        else None,
    }


def compute_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The compute buffer of a row, MiB: published, and as predicted with ever less known of it."""
    model, settings = model_of(row), settings_of(row)
    parted = replace(model, tensors=tuple(x for x in model.tensors if ".attn_qkv." not in x.name))

    def mib(model: StoredModel, **changes: Any) -> float:
        made = memory.compute_buffer_bytes(model, replace(settings, **changes))
        return round(made / MIB, 2)

    return {
        "row": row["row"],
        "model": row["model"],
        "published": row["compute_buffer_mib"],
        "all_outputs": mib(parted, n_outputs=None),
        "outputs_asked_for": mib(parted),
        "and_fused": mib(model),
    }


def print_compute(rows: Sequence[Mapping[str, Any]]) -> None:
    """Compute buffers of builds since 2025, before and after outputs and fusing were heeded."""
    head = ["row", "model", "published", "all logits", "those asked for", "fused q, k, v too"]
    keys = ("published", "all_outputs", "outputs_asked_for", "and_fused")
    cells = ([str(r["row"]), r["model"], *(f"{r[k]:.2f}" for k in keys)] for r in rows)
    print(f"\nCompute buffers since 2025 (MiB)\n\n{markdown_table(head, cells, left=range(2))}")


def measure(path: Path) -> Iterator[dict[str, Any]]:
    """What llama.cpp's log says of a file on this CPU, beside the prediction."""
    import llama_cpp as lib

    said: list[str] = []

    @lib.llama_log_callback
    def listen(level: int, text: bytes, user: object) -> None:
        said.append(text.decode(errors="replace"))

    def sizes(what: str) -> float:
        return sum(map(float, re.findall(rf"{what} size =\s*([\d.]+) MiB", "".join(said))))

    lib.llama_log_set(listen, ctypes.c_void_p(0))
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    # Read, not mapped: a mapping spans tensors that are then stored a second time, reordered.
    if hasattr(lib, "LLAMA_LOAD_MODE_NONE"):
        params.load_mode = lib.LLAMA_LOAD_MODE_NONE
    else:
        params.use_mmap = False
    params.n_gpu_layers = 0
    loaded = lib.llama_model_load_from_file(str(path).encode(), params)
    weights = sizes("model buffer")
    model = memory.read_gguf(path)
    types = {"f16": 1, "q8_0": 8}
    for context in CONTEXTS:
        for kind in types:
            for flash in (False, True):
                k, v = kv_types(kind, flash)
                said.clear()
                c = lib.llama_context_default_params()
                c.n_ctx, c.n_batch, c.n_ubatch = context, 2048, 512
                c.type_k, c.type_v, c.flash_attn_type = types[k], types[v], int(flash)
                made = lib.llama_init_from_model(loaded, c)
                lib.llama_free(made)
                use = memory.memory_use(
                    model,
                    RunSettings(
                        context=context, type_k=k, type_v=v, flash_attn=flash, backend="CPU"
                    ),
                )
                kv = sizes("KV buffer")
                compute = sizes("compute buffer") + sizes("output buffer")
                total = weights + kv + compute
                yield {
                    "file": path.name,
                    "n_ctx": context,
                    "type_k": k,
                    "type_v": v,
                    "flash_attn": flash,
                    "measured": {"model": weights, "kv": kv, "compute": round(compute, 2)},
                    "predicted": {
                        "model": round(use.weights_bytes / MIB, 2),
                        "kv": round(use.kv_cache_bytes / MIB, 2),
                        "compute": round(use.compute_buffer_bytes / MIB, 2),
                    },
                    "error": round(use.buffers_bytes / MIB / total - 1, 5),
                    "kv_exact": abs(use.kv_cache_bytes / MIB - kv) < 0.006,
                }
    lib.llama_model_free(loaded)


def print_published(rows: Sequence[Mapping[str, Any]], n_all: int) -> None:
    head = ["row", "model", "device", "ctx", "published MiB", "predicted MiB", "error", "KV"]
    print(
        markdown_table(
            head,
            (
                [
                    str(r["row"]),
                    f"{r['model']} {r['quant'] or ''}",
                    str(r["device"]),
                    str(r["n_ctx"]),
                    f"{r['total_published_mib']:,.1f}",
                    f"{r['total_predicted_mib']:,.1f}",
                    f"{r['error']:+.2%}",
                    {True: "exact", False: "off", None: "–"}[r["kv_exact"]],
                ]
                for r in rows
            ),
            left=range(3),
        )
    )
    worst = max(abs(r["error"]) for r in rows)
    off = [r for r in rows if abs(r["error"]) > LIMIT or r["kv_exact"] is False]
    off += [r for r in rows if r["row"] in REASONS and r not in off]
    print(f"\n{len(rows)} of {n_all} rows state their inputs; the largest error is {worst:.2%}.")
    for r in off:
        print(f"row {r['row']}: {REASONS.get(r['row'], 'no reason known')}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Predicted against published memory.")
    parser.add_argument("--gguf", type=Path, action="append", default=[], help="measure it here")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args(argv)
    rows = published()
    compared = [compare(r) for r in rows if states_inputs(r)]
    print_published(compared, len(rows))
    new = [r for r in rows if r["era"] == "2025+" and "compute_buffer_mib" in r]
    compute = [compute_of(r) for r in new if states_inputs(r)]
    print_compute(compute)
    lines = [{"kind": "published", **r} for r in compared]
    lines += [{"kind": "compute", **r} for r in compute]
    for path in args.gguf:
        here = list(measure(path))
        head = ["ctx", "K/V", "flash", "model", "KV", "compute", "KV", "compute", "error"]
        print(f"\n{path.name}: allocated here (MiB), then predicted")
        print(
            markdown_table(
                head,
                (
                    [
                        str(r["n_ctx"]),
                        f"{r['type_k']}/{r['type_v']}",
                        "on" if r["flash_attn"] else "off",
                        *(f"{r['measured'][k]:.2f}" for k in ("model", "kv", "compute")),
                        *(f"{r['predicted'][k]:.2f}" for k in ("kv", "compute")),
                        f"{r['error']:+.3%}",
                    ]
                    for r in here
                ),
                left=range(3),
            )
        )
        lines += [{"kind": "measured", **r, **machine()} for r in here]
    if not args.no_write:
        target = RESULTS / "memory.jsonl"
        # Figures of one version, not a log; what was measured stays until it is measured again.
        if not args.gguf:
            lines += [x for x in read(target) if x["kind"] == "measured"]
        target.unlink(missing_ok=True)
        append(target, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
