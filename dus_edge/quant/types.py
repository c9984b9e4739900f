"""GGML's tensor types: how many weights make a block, and how many bytes a block takes.

Sizes and numbers from `ggml/src/ggml-common.h` and `ggml/include/ggml.h` of the llama.cpp that
llama-cpp-python 0.3.36 carries (commit 0c1e57098); a test compares them with the library.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QuantType:
    """One storage type.

    Attributes:
        name: ggml's name in capitals, e.g. ``Q4_K``.
        ggml_id: its number in ``enum ggml_type``.
        block_weights: weights in a block; a row must be a whole number of blocks.
        block_bytes: bytes of a block.
    """

    name: str
    ggml_id: int
    block_weights: int
    block_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Average bits that one weight takes."""
        return 8 * self.block_bytes / self.block_weights

    def row_bytes(self, n_weights: int) -> int:
        """Bytes of a row of `n_weights` weights (a multiple of the block)."""
        blocks, rest = divmod(n_weights, self.block_weights)
        if rest:
            raise ValueError(f"{n_weights} weights are not whole {self.name} blocks")
        return blocks * self.block_bytes


F32 = QuantType("F32", 0, 1, 4)
F16 = QuantType("F16", 1, 1, 2)
BF16 = QuantType("BF16", 30, 1, 2)
Q4_0 = QuantType("Q4_0", 2, 32, 18)
Q4_1 = QuantType("Q4_1", 3, 32, 20)
Q5_0 = QuantType("Q5_0", 6, 32, 22)
Q5_1 = QuantType("Q5_1", 7, 32, 24)
Q8_0 = QuantType("Q8_0", 8, 32, 34)
Q2_K = QuantType("Q2_K", 10, 256, 84)
Q3_K = QuantType("Q3_K", 11, 256, 110)
Q4_K = QuantType("Q4_K", 12, 256, 144)
Q5_K = QuantType("Q5_K", 13, 256, 176)
Q6_K = QuantType("Q6_K", 14, 256, 210)
IQ2_XS = QuantType("IQ2_XS", 17, 256, 74)
IQ4_NL = QuantType("IQ4_NL", 20, 32, 18)
IQ3_S = QuantType("IQ3_S", 21, 256, 110)
IQ2_S = QuantType("IQ2_S", 22, 256, 82)
IQ4_XS = QuantType("IQ4_XS", 23, 256, 136)

#: What codes of IQ4_NL and IQ4_XS stand for: kvalues_iq4nl of ggml/src/ggml-common.h.
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

_SMALL = (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL)
_SUPER = (Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ2_XS, IQ2_S, IQ3_S, IQ4_XS)
TYPES = {t.name: t for t in (F32, F16, BF16, *_SMALL, *_SUPER)}
