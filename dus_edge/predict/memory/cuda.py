"""What a CUDA process of llama.cpp takes beside llama.cpp's own buffers.

Two parts. The context of CUDA, there as soon as a process touches the card, grows with the threads
that the card can have resident at once: 38 MiB and 1.85 MiB for every 1,024 of them, from Pascal to
Blackwell. That it grows with the multiprocessors is also what llama.cpp's developers say
(ggml-org/llama.cpp#23137, #23604). The rest comes with use: cuBLAS's handle (12 MiB on an RTX
4090), an instantiated graph (16 MiB), the pool of temporary buffers after a prompt (about 20 MiB).
It is more with large ubatches, which is not predicted: 144 to 192 MiB on an RTX PRO 6000.

The constants are a fit to the readings under Linux in `benchmarks/published/overhead.json`, made by
`benchmarks/fit_overhead.py`, which shows every card beside it. Of 18 cards 16 have a context within
13 MiB of the rule; an A100 has 57 MiB more, a P100 264, which nothing explains. Loaded, the five
cards that were read without a large ubatch are within 30 MiB of the sum.

What Windows or a desktop holds is not counted here: that is the platform's (`memory.usable_bytes`).
"""

from __future__ import annotations

from dus_edge.errors import UsageError
from dus_edge.predict.stored_model import MIB

#: Threads a multiprocessor can have resident, by compute capability: CUDA C++ Programming Guide,
#: "Technical Specifications per Compute Capability".
THREADS = {
    "6.0": 2048,
    "6.1": 2048,
    "7.0": 2048,
    "7.5": 1024,
    "8.0": 2048,
    "8.6": 1536,
    "8.7": 1536,
    "8.9": 1536,
    "9.0": 2048,
    "10.0": 2048,
    "12.0": 1536,
}
#: FP32 cores of a multiprocessor ("CUDA cores"), from the same guide's "Arithmetic Instructions".
CORES = {
    "6.0": 64,
    "6.1": 128,
    "7.0": 64,
    "7.5": 64,
    "8.0": 64,
    "8.6": 128,
    "8.7": 128,
    "8.9": 128,
    "9.0": 128,
    "10.0": 128,
    "12.0": 128,
}
#: The context's rule: MiB, and MiB for 1,024 resident threads.
CONTEXT_MIB = 38.33
CONTEXT_MIB_PER_1024_THREADS = 1.853
#: What comes with use, MiB: the median of six cards.
LOADED_MIB = 45.1
#: What an unknown card is taken for: the median of the GeForce RTX 30 and 40 cards of desktops and
#: laptops, an RTX 3070 or 4070.
DEFAULT_MULTIPROCESSORS = 46
DEFAULT_CAPABILITY = "8.6"


def multiprocessors(cuda_cores: int | None, compute_capability: str | None) -> int | None:
    """A card's streaming multiprocessors; None where cores or capability are not known.

    Args:
        cuda_cores: FP32 cores of the whole card.
        compute_capability: such as ``8.6``.
    """
    per_multiprocessor = CORES.get(compute_capability or "")
    if cuda_cores is None or per_multiprocessor is None:
        return None
    return cuda_cores // per_multiprocessor


def context_bytes(n_sm: int | None = None, compute_capability: str | None = None) -> int:
    """Bytes of the CUDA context of one process on one card.

    Args:
        n_sm: streaming multiprocessors; None means the usual card's.
        compute_capability: such as ``8.6``; one that is not known, or None, counts as 1,536
            threads a multiprocessor.

    Raises:
        UsageError: `n_sm` is not positive.
    """
    if n_sm is None:
        n_sm, compute_capability = DEFAULT_MULTIPROCESSORS, DEFAULT_CAPABILITY
    if n_sm < 1:
        raise UsageError(f"A card has {n_sm} multiprocessors; at least 1 is needed.")
    threads = n_sm * THREADS.get(compute_capability or "", THREADS[DEFAULT_CAPABILITY])
    return int((CONTEXT_MIB + CONTEXT_MIB_PER_1024_THREADS * threads / 1024) * MIB)


def cuda_overhead_bytes(n_sm: int | None = None, compute_capability: str | None = None) -> int:
    """Bytes that a process of llama.cpp with a loaded model takes beside its buffers.

    Arguments and errors are those of `context_bytes`.
    """
    return context_bytes(n_sm, compute_capability) + int(LOADED_MIB * MIB)
