"""What a run really takes: peak memory of this process, and energy where a driver counts it.

Nothing is sampled in the background, which would slow what is measured. The kernel keeps the
high-water mark of resident memory itself; on a GPU, and for macOS' footprint, a reading after
each repetition is the peak, since llama.cpp and torch keep what they once took.

Sources: proc(5) (``VmHWM``, ``clear_refs``), NVML's API reference (nvmlDeviceGetCompute-
RunningProcesses, nvmlDeviceGetTotalEnergyConsumption), the kernel's power capping framework
(``energy_uj``), and ``<libproc.h>`` with ``struct rusage_info_v0`` of ``<sys/resource.h>``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

_RAPL = Path("/sys/class/powercap")
_PROC = Path("/proc/self")
#: NVML's counter moves in steps of some 20 to 100 ms, RAPL's in steps of 1 ms: below this
#: much measured time the figure would be the steps'.
MIN_ENERGY_S = 0.5

#: Counters by name, in joules; each only grows.
Counters = Mapping[str, float]


@dataclass(frozen=True)
class MeasuredMemory:
    """Memory of this process over a span.

    Attributes:
        baseline_bytes: at its start, before a model was loaded.
        peak_bytes: the most there was, baseline included.
        source: ``rss`` (files mapped into memory count as far as they were read), ``footprint``
            (macOS; mapped files do not count), ``nvml`` (GPU memory of this process) or
            ``nvml-device`` (growth of the GPU's memory in use: drivers inside containers do not
            know the process).
    """

    baseline_bytes: int
    peak_bytes: int
    source: str


class _Memory(Protocol):
    source: str

    def restart_peak(self) -> None:
        """Forget the peak, where the system lets one."""
        ...

    def peak(self) -> int:
        """Bytes at most since `restart_peak`, or where that is not known, at present."""
        ...


class Meter:
    """Peak memory since it was made, and energy counters.

    Make it before the model is loaded, call `poll` after each repetition.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        """Args: on_gpu: whether the model will be on an NVIDIA GPU; without NVML, as if not."""
        self._gpus = _Gpus.open() if on_gpu else None
        self._memory: _Memory = self._gpus or _process_memory()
        self._memory.restart_peak()
        self._baseline = self._peak = self._memory.peak()

    def restart_peak(self) -> None:
        """Look for a new peak from here on; the baseline stays."""
        self._memory.restart_peak()
        self._peak = 0

    def poll(self) -> None:
        """Look at the memory; cheap, but not for inside what is timed."""
        self._peak = max(self._peak, self._memory.peak())

    def memory(self) -> MeasuredMemory:
        """Memory since the meter was made."""
        self.poll()
        return MeasuredMemory(self._baseline, self._peak, self._memory.source)

    def counters(self) -> Counters:
        """Energy so far, joules by counter; none where no driver counts it."""
        if self._gpus:
            return self._gpus.counters()
        return {name: joules for name, joules, _ in rapl_counters(_RAPL)}

    def joules(self, before: Counters, after: Counters) -> float | None:
        """Energy between two readings; None where there is no counter."""
        if self._gpus:
            return joules_between(before, after, {})
        return joules_between(before, after, {n: wrap for n, _, wrap in rapl_counters(_RAPL)})

    @property
    def energy_source(self) -> str | None:
        """``nvml`` (the boards), ``rapl`` (the processor's packages) or None."""
        if not self.counters():
            return None
        return "nvml" if self._gpus else "rapl"


def joules_between(before: Counters, after: Counters, wraps: Counters) -> float | None:
    """Sum of what the counters of both readings grew by; None if there are none.

    Args:
        before: the first reading.
        after: the second one, before any counter wrapped twice.
        wraps: joules at which a counter starts again at zero.
    """
    grown = [
        after[name] - start + (wraps.get(name, 0.0) if after[name] < start else 0.0)
        for name, start in before.items()
        if name in after
    ]
    return sum(grown) if grown else None


def joules_per_token(joules: float | None, seconds: float, n_tokens: int) -> float | None:
    """None where nothing was counted, or for too short a time to be a figure."""
    if joules is None or seconds < MIN_ENERGY_S or not n_tokens:
        return None
    return joules / n_tokens


def rapl_counters(root: Path) -> list[tuple[str, float, float]]:
    """Name, joules and wrap-around in joules of each processor package.

    Kernels since 5.10 let only root read them; then there are none.
    """
    found = []
    for folder in sorted(root.glob("intel-rapl:*")):
        # intel-rapl:0:1 is a part of intel-rapl:0.
        if folder.name.count(":") != 1:
            continue
        with contextlib.suppress(OSError, ValueError):
            if (folder / "name").read_text().startswith("package"):
                joules, wrap = (
                    int((folder / file).read_text()) / 1e6
                    for file in ("energy_uj", "max_energy_range_uj")
                )
                found.append((folder.name, joules, wrap))
    return found


def high_water_bytes(status: str) -> int:
    """``VmHWM`` of the text of ``/proc/…/status``, bytes."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _process_memory() -> _Memory:
    if sys.platform == "darwin":
        return _Footprint()
    return _Resident() if (_PROC / "status").exists() else _Lifetime()


class _Resident:
    """Linux: the kernel's own mark, set back by writing 5 to ``clear_refs``."""

    source = "rss"

    def restart_peak(self) -> None:
        with contextlib.suppress(OSError):  # a kernel without page monitoring: the life's peak
            (_PROC / "clear_refs").write_text("5")

    def peak(self) -> int:
        return high_water_bytes((_PROC / "status").read_text())


class _Lifetime:
    """Other Unix: the mark of the process's life."""

    source = "rss"

    def restart_peak(self) -> None:
        """It cannot be set back."""

    def peak(self) -> int:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _RusageV0(ctypes.Structure):
    """`struct rusage_info_v0` of macOS; times in ticks, sizes in bytes."""

    _fields_ = (
        ("uuid", ctypes.c_uint8 * 16),
        *(
            (name, ctypes.c_uint64)
            for name in (
                "user_time",
                "system_time",
                "package_idle_wakeups",
                "interrupt_wakeups",
                "pageins",
                "wired_size",
                "resident_size",
                "phys_footprint",
                "proc_start_abstime",
                "proc_exit_abstime",
            )
        ),
    )


class _Footprint:
    """macOS: what Activity Monitor shows as the memory of a process; Metal's buffers count."""

    source = "footprint"

    def restart_peak(self) -> None:
        """It cannot be set back."""

    def peak(self) -> int:
        info = _RusageV0()
        library = ctypes.CDLL("/usr/lib/libSystem.B.dylib")
        status = library.proc_pid_rusage(os.getpid(), 0, ctypes.byref(info))
        return info.phys_footprint if status == 0 else 0


class _Gpus:
    """All NVIDIA GPUs, by NVML."""

    def __init__(self, nvml: ModuleType) -> None:
        self._nvml = nvml
        self._handles = [
            nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())
        ]
        self._at_start = self._used()
        self.source = "nvml"

    @classmethod
    def open(cls) -> _Gpus | None:
        """None where nvidia-ml-py, the driver or a GPU is missing."""
        try:
            import pynvml

            pynvml.nvmlInit()
            return cls(pynvml) if pynvml.nvmlDeviceGetCount() else None
        except Exception:  # NVMLError, and whatever a package of the same name raises
            return None

    def restart_peak(self) -> None:
        """There is none to forget: `Meter` keeps it."""

    def peak(self) -> int:
        own = self._own()
        self.source = "nvml" if own else "nvml-device"
        return sum((own or self._grown()).values())

    def counters(self) -> Counters:
        """Of the boards that hold memory of ours, in joules."""
        held = {i for i, n in (self._own() or self._grown()).items() if n > 0}
        return dict(self._energy(held))

    def _energy(self, held: set[int]) -> Iterator[tuple[str, float]]:
        for i in sorted(held):
            with contextlib.suppress(self._nvml.NVMLError):  # boards before Volta do not count
                mj = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handles[i])
                yield f"gpu{i}", mj / 1e3

    def _own(self) -> dict[int, int]:
        """Bytes of this process by board; empty where the driver does not know it."""
        pid, found = os.getpid(), {}
        for i, handle in enumerate(self._handles):
            with contextlib.suppress(self._nvml.NVMLError):
                for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                    if process.pid == pid and process.usedGpuMemory:
                        found[i] = found.get(i, 0) + process.usedGpuMemory
        return found

    def _used(self) -> list[int]:
        return [self._nvml.nvmlDeviceGetMemoryInfo(handle).used for handle in self._handles]

    def _grown(self) -> dict[int, int]:
        pairs = zip(self._used(), self._at_start, strict=True)
        return {i: max(0, now - then) for i, (now, then) in enumerate(pairs)}
