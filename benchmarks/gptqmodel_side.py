"""GPTQModel's side of bench_gptq.py; runs in the environment that `make interop` sets up for it.

    python gptqmodel_side.py MODEL TOKENS.npy BITS GROUP_SIZE OUT

Quantizes with GPTQModel's defaults, saves to OUT and prints seconds of `quantize` alone as JSON.
"""

import json
import sys
import time

import numpy as np
import torch
from gptqmodel import GPTQModel, QuantizeConfig


def main() -> None:
    model, tokens, bits, group_size, out = sys.argv[1:]
    rows = np.load(tokens)
    calibration = [
        {"input_ids": torch.from_numpy(r).long(), "attention_mask": torch.ones(len(r)).long()}
        for r in rows
    ]
    loaded = GPTQModel.load(model, QuantizeConfig(bits=int(bits), group_size=int(group_size)))
    start = time.perf_counter()
    loaded.quantize(calibration, batch_size=4)
    seconds = time.perf_counter() - start
    loaded.save(out)
    print(json.dumps({"quantize_s": seconds}))


if __name__ == "__main__":
    main()
