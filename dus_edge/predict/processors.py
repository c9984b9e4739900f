"""Processors without a graphics card, as `--device` spells them: ``cpu-ddr5-5600-8c-avx512``.

Speed follows from the memory, its rate and channels, and from cores and instructions; so these are
named, and no list of processors is needed.
"""

from __future__ import annotations

import re

from dus_edge.errors import UsageError
from dus_edge.predict.devices import Device

#: What every spelling starts with.
CPU_PREFIX = "cpu-"
#: GiB of memory that `--memory` may name; the first unless it is named.
_MEMORY_GB = (16, 24, 32, 48, 64, 96, 128, 192, 256)
#: Channels of a desktop's or laptop's memory, and bytes that each moves at once.
_CHANNELS = 2
_CHANNEL_BYTES = 8
_MEMORY = re.compile(r"ddr([345])-(\d{3,5})")
_SPELLING = re.compile(
    r"cpu-(?P<memory>ddr[345]-\d{3,5})(-(?P<cores>\d{1,3})c)?(-(?P<simd>avx2|avx512))?"
    r"(?P<laptop>-laptop)?"
)


def memory_gbps(name: str, channels: int = _CHANNELS) -> float:
    """Nominal rate of a memory such as ``DDR4-3200`` (megatransfers a second), in GB/s.

    Raises:
        UsageError: the name is not of that form.
    """
    found = _MEMORY.fullmatch(name.strip().lower())
    if found is None:
        raise UsageError(f"A memory is named like ddr4-3200, not {name!r}.")
    return int(found[2]) * _CHANNEL_BYTES * channels / 1000


def find_processor(name: str) -> Device:
    """The processor of that spelling, in any case.

    Raises:
        UsageError: it is not spelt so, or has no core.
    """
    found = _SPELLING.fullmatch(name.strip().lower())
    if found is None or found["cores"] == "0":
        raise UsageError(
            f"There is no device {name!r}; a processor alone is named by its memory, cores and "
            "instructions: cpu-ddr4-3200, cpu-ddr5-5600-8c-avx512, cpu-ddr4-2400-4c-avx2-laptop."
        )
    memory = found["memory"].upper()
    words = [f"{found['cores']} cores" if found["cores"] else "", found["simd"] or "", memory]
    return Device(
        id=name.strip().lower(),
        name="Processor, " + ", ".join(w for w in (*words, "two channels") if w),
        vendor="",
        family="cpu-laptop" if found["laptop"] else "cpu-desktop",
        architecture="",
        backend="CPU",
        memory_kind="system",
        memory_gb_options=_MEMORY_GB,
        bandwidth_gbps=memory_gbps(memory),
        cpu_cores=int(found["cores"]) if found["cores"] else None,
        simd=found["simd"],
        source="its own name",
    )
