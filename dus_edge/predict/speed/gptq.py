"""GPTQ models on NVIDIA cards: sizes of their weights, and what their kernels change in the speed.

llama.cpp does not run GPTQ folders. Two kernels do that most people meet:

- ``exllamav2``: ExLlamaV2, alone or in text-generation-webui and TabbyAPI; the kernel whose speed
  is predicted if none is named, because it is the one with published single-user runs on several
  GeForce cards (RTX 3090, 3090 Ti and 4090);
- ``marlin``: Marlin in vLLM, which chooses it for 4 bits and symmetric groups on cards of compute
  capability 8.0 and up. The server's own time for every token is part of its speed.

Both read the same bytes for a token, so both have the formula of `dus_edge.predict.speed.roofline`
with the constants of llama.cpp's 4-bit kernels of the latest era, and the deviations in
`data/gptq_speed.toml`: none for ExLlamaV2, a longer time for every layer for Marlin.
`benchmarks/fit_gptq_speed.py` checks and fits them on published runs,
`benchmarks/published/gptq.json`.
Prompts are not predicted: published rates lie up to 75 % from llama.cpp's, in both directions, and
are of three cards. Through transformers the same files are slower than through vLLM by a factor of
2.9 to 5 in the one document that has both (Qwen2.5, 1.5 B to 32 B, A100).
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass

from dus_edge import data

#: Kernels whose speed is known, and the engine that it was measured in; the first is the default.
ENGINES = {"exllamav2": "ExLlamaV2", "marlin": "vLLM (Marlin)"}
KERNELS = tuple(ENGINES)
#: Kernels whose products with a vector run on the matrix units too.
MATRIX_UNITS = ("marlin",)
#: Bits of a code of which runs are published.
PREDICTED_BITS = (4,)
#: A scale is a float16, and a zero point has the bits of a code.
_SCALE_BITS = 16
_KIND = re.compile(r"GPTQ(?P<bits>[2348])_(?P<group>[1-9]\d*|ROW)")


def kind_name(bits: int, group_size: int | None) -> str:
    """The name of a GPTQ tensor's type, e.g. ``GPTQ4_128``; no group size: ``GPTQ4_ROW``."""
    return f"GPTQ{bits}_{group_size or 'ROW'}"


def is_gptq(type_name: str) -> bool:
    """Whether a type name is that of GPTQ weights."""
    return _KIND.fullmatch(type_name) is not None


def code_bits(type_name: str) -> int:
    """Bits of a code of a GPTQ type."""
    return int(_KIND.fullmatch(type_name)["bits"])


def bits_per_weight(type_name: str) -> float:
    """Bits that a weight of a GPTQ type takes: its code and its share of a scale and a zero point.

    Those of a whole row count nothing beside its codes.
    """
    parts = _KIND.fullmatch(type_name)
    bits = int(parts["bits"])
    if parts["group"] == "ROW":
        return float(bits)
    return bits + (_SCALE_BITS + bits) / int(parts["group"])


@dataclass(frozen=True, slots=True)
class KernelSpeed:
    """How a kernel's generation deviates from llama.cpp's.

    Attributes:
        terms: named deviations, beside llama.cpp's constants.
        half_width: of the 80 % interval of log(measured / predicted), from held-out runs.
    """

    terms: Mapping[str, float]
    half_width: float


@functools.cache
def kernel_speeds() -> Mapping[str, KernelSpeed]:
    """The fitted deviations of every kernel."""
    table = tomllib.loads(data.read_text("gptq_speed.toml"))
    return {
        name: KernelSpeed(table[name]["terms"], table[name]["interval"]["half_width"])
        for name in KERNELS
    }
