"""Partly offloaded models: published generation rates beside what is predicted of them.

    python benchmarks/check_offload.py

The rates of what is left to the host come from one run, which states its layers (`fit_speed.py`);
these rows are others, by another tool. Their layers are those that this program says fit, at its
usual context, and their hosts' memory is unknown. Writes `results/offload.jsonl`.
"""

from __future__ import annotations

import json
import sys

from common import RESULTS, read_published
from fit_speed import shape_of

from dus_edge.checkpoint.config import config_of_shape
from dus_edge.families.shape import Shape
from dus_edge.files import write_text
from dus_edge.predict.devices import find_device
from dus_edge.predict.memory.llama import model_of_config
from dus_edge.predict.prediction import StorableModel, memory_settings, predict_on
from dus_edge.quant.recipe import find_preset
from dus_edge.words import markdown_table


def rows() -> list[dict]:
    """Rows of models larger than their card, of which a rate was published."""
    return [
        {**r, "row": i}
        for i, r in enumerate(read_published("runs"))
        if r["use"] == "over-memory" and r["metric"] == "llmfit bench"
    ]


def compare(row: dict) -> dict:
    """A row beside its prediction with the layers that fit."""
    n_layers, hidden, ffn, n_heads, n_kv_heads, head_dim, vocab, tied = shape_of(row["model"])
    shape = Shape(
        n_layers=n_layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        context_length=32768,
    )
    config = config_of_shape(shape, tied_head=tied)
    model = model_of_config(config, find_preset(row["quant"]), row["model"])
    found = predict_on(
        StorableModel(model, {}), find_device(row["device_id"]), memory_settings(model), depth=64
    )
    speed = found.speed
    return {
        "row": row["row"],
        "device": row["device_id"],
        "model": f"{row['model']} {row['quant']}",
        "layers": f"{found.verdict.offloaded_layers} of {n_layers + 1}",
        "measured": row["tg_tps"],
        "predicted": round(speed.tg_tokens_per_s, 2) if speed else None,
        "low": round(speed.tg_tokens_per_s_low, 2) if speed else None,
        "high": round(speed.tg_tokens_per_s_high, 2) if speed else None,
    }


def main() -> int:
    lines = [compare(r) for r in rows()]
    write_text(RESULTS / "offload.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
    head = ["device", "model", "layers predicted to fit", "measured", "predicted"]
    cells = (
        [
            x["device"],
            x["model"],
            x["layers"],
            f"{x['measured']:.4g}",
            f"{x['predicted']:.3g} ({x['low']:.3g}–{x['high']:.3g})" if x["predicted"] else "–",
        ]
        for x in lines
    )
    print(markdown_table(head, cells, left=range(2)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
