"""What mlx-lm does with folders: converts plain ones, loads quantized ones, runs them.

Runs in the environment of mlx.txt:

    python mlx_side.py JOBS.json

JOBS.json is a list of objects. Where one has ``theirs``, `mlx_lm.convert` makes that folder of the
``plain`` one with ``bits`` and ``group_size``, and a ``dtype`` if there is one. Where one has
``logits``, the folder ``ours`` is loaded and its logits of `token_batch` go to that .npy file; of a
``text``, the ids by the folder's tokenizer and what the model says next go beside it, as .json.
Weights stay as they are stored; scales, biases and what is computed are widened to float32, so
that a difference of logits is one of reading.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from batch import token_batch
from mlx_lm import convert, generate, load


def run(job: dict[str, Any]) -> None:
    """Do what a job asks for."""
    if "theirs" in job:
        convert(
            job["plain"],
            job["theirs"],
            quantize=True,
            q_bits=job["bits"],
            q_group_size=job["group_size"],
            dtype=job.get("dtype"),
        )
    if "logits" not in job:
        return
    model, tokenizer = load(job["ours"])
    path = Path(job["logits"])
    if "text" in job:
        ids = tokenizer.encode(job["text"])
        said = generate(model, tokenizer, job["text"], max_tokens=8)
        path.with_suffix(".json").write_text(json.dumps({"ids": ids, "said": said}))
    model.set_dtype(mx.float32)
    np.save(path, np.array(model(mx.array(token_batch(model.args.vocab_size)))))


def main() -> None:
    """Run all jobs."""
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        run(job)


if __name__ == "__main__":
    main()
