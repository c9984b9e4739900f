"""The machine that the program runs on: its processor, cores, memory, system and clock.

What a system does not tell is None, empty or the next best; nothing here raises but `deadline`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import platform
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

_OWN_GROUPS = Path("/proc/self/cgroup")
#: SYNC_FILE_RANGE_WRITE of linux/fs.h.
_START_WRITING = 2
#: Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def default_threads() -> int:
    """Cores that this process may use: those it may run on, and no more than its group's share."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return min([cores, *(max(1, math.ceil(share)) for share in _group_shares())])


def keep_freed_memory() -> None:
    """Let buffers of up to 32 MiB that are freed be used again, where the C library is glibc.

    It gives them back to the system else, and every activation of a layer begins with page faults:
    a layer of 135M parameters takes 55 µs a token with them and 50 without. Larger ones are still
    given back (mallopt(3); 32 MiB is the highest threshold that it takes).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # another C library
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    mallopt(_M_TRIM_THRESHOLD, 256 << 20)


def start_writing(fd: int) -> None:
    """Have the disk begin with what was written to a file, and do not wait for it.

    sync_file_range(2) of Linux; `os.fsync` elsewhere, which waits, and commits the file system's
    journal each time.

    Raises:
        OSError: fsync failed. An error met by what this starts is raised by a later fsync.
    """
    call = _sync_file_range()
    if call is None or call(fd, 0, 0, _START_WRITING):
        os.fsync(fd)


@functools.cache
def _sync_file_range() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        call = ctypes.CDLL(None).sync_file_range
    except (AttributeError, OSError, TypeError):
        return None  # a C library without it
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call  # type: ignore[no-any-return]


def _group_shares(root: Path = Path("/sys/fs/cgroup"), own: Path = _OWN_GROUPS) -> list[float]:
    """Cores' worth of time that Linux control groups leave, as containers have it.

    cgroup v2: ``cpu.max`` (quota and period in µs); v1: ``cpu.cfs_quota_us`` and its period
    (Documentation/admin-guide/cgroup-v2.rst and cgroup-v1 of the kernel).
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []
    shares = []
    for _, controllers, path in (parts for parts in lines if len(parts) == 3):
        if controllers == "":
            folders = [(root, path), (root / "unified", path)]
        elif "cpu" in controllers.split(","):
            folders = [(root / controllers, path), (root / "cpu", path)]
        else:
            continue
        for top, inner in folders:
            # Seen from inside a container its own group is the top.
            for folder in {top / inner.strip("/"), top}:
                shares += _share(folder)
    return shares


def _share(folder: Path) -> list[float]:
    try:
        if (file := folder / "cpu.max").exists():
            quota, period = file.read_text().split()
        else:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        return [int(quota) / int(period)] if int(quota) > 0 and int(period) > 0 else []
    except (OSError, ValueError):  # no such group, or "max"
        return []


def physical_cores() -> int:
    """Cores without their hyper-threads, no more than this process may use.

    llama-bench's default of threads. Linux: different lines of ``thread_siblings``. macOS: the
    performance cores.
    """
    n = 0
    if sys.platform == "darwin":
        for key in ("hw.perflevel0.physicalcpu", "hw.physicalcpu"):
            n = n or int(command_output("sysctl", "-n", key) or 0)
    else:
        files = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings")
        with contextlib.suppress(OSError):
            n = len({file.read_text() for file in files})
    return min(n, default_threads()) or default_threads()


def processor_name() -> str:
    """E.g. ``AMD Ryzen 7 5700X``; the architecture where the system has no name for it."""
    info = Path("/proc/cpuinfo")
    if sys.platform == "darwin":
        name = command_output("sysctl", "-n", "machdep.cpu.brand_string")
    else:
        name = cpu_name(info.read_text(encoding="utf-8")) if info.exists() else None
    return name or platform.processor() or platform.machine()


def cpu_name(cpuinfo: str) -> str | None:
    """The processor's name in the text of `/proc/cpuinfo`."""
    match = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return match[1].strip() if match else None


def memory_bytes() -> int | None:
    """The machine's memory."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def meminfo_kib() -> dict[str, int]:
    """Linux' ``/proc/meminfo``: ``MemTotal``, ``MemAvailable``, …; empty elsewhere."""
    file = Path("/proc/meminfo")
    text = file.read_text() if file.exists() else ""
    return {k: int(v) for k, v in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}


def system_name() -> str:
    """E.g. ``Debian GNU/Linux 13 (trixie)``, ``macOS 26.1``."""
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return f"{platform.system()} {platform.release()}"


def command_output(*command: str) -> str:
    """What a command prints, without the space around it; empty if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


class _Late(BaseException):
    """Raised wherever the main thread is; no library's ``except Exception`` swallows it."""


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """End what takes longer, even a read that waits for a byte now and then.

    By the system's alarm, so in the main thread alone; elsewhere, and where there is no alarm,
    there is no limit.

    Raises:
        TimeoutError: the time was up.
    """
    if not hasattr(signal, "setitimer") or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def late(signum: int, frame: FrameType | None) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _Late:
        raise TimeoutError(f"it took more than {seconds:.0f} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def user_cache() -> Path | None:
    """Where the system wants caches; None for a user without a home."""
    try:
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # neither HOME nor an entry in the list of users
        return None
