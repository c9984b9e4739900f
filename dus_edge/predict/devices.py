"""The devices that predictions are made for, and the one that the program runs on.

Figures and rules are those of `data/devices.toml`; what nobody stated is None.
"""

from __future__ import annotations

import difflib
import functools
import platform
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dus_edge import data
from dus_edge.errors import DusEdgeError, UsageError
from dus_edge.machine import command_output, meminfo_kib, processor_name

DEVICES_FILE = "devices.toml"
_BACKENDS = ("CUDA", "Metal", "CPU")
_POSITIVE = (
    "bandwidth_gbps",
    "fp32_tflops",
    "fp16_tflops_dense",
    "fp16_tflops_dense_fp16acc",
    "int8_tops_dense",
    "cuda_cores",
    "gpu_cores",
    "nvidia_smi_total_mib",
)


@dataclass(frozen=True)
class Device:
    """One device; see `[units]` in `data/devices.toml`.

    Attributes:
        id: what `--device` takes.
        backend: llama.cpp's: ``CUDA``, ``Metal`` or ``CPU``.
        memory_gb_options: GiB of memory it is made with, ascending.
        cpu_cores: of a processor alone; one thread runs on each.
        simd: its instructions: ``avx2`` or ``avx512``.
        usable_mib: what a model may take of this very machine; only the present one has it.
    """

    id: str
    name: str
    vendor: str
    family: str
    architecture: str
    backend: str
    memory_kind: str
    memory_gb_options: tuple[float, ...]
    compute_capability: str | None = None
    cuda_cores: int | None = None
    gpu_cores: int | None = None
    bandwidth_gbps: float | None = None
    fp32_tflops: float | None = None
    fp16_tflops_dense: float | None = None
    fp16_tflops_dense_fp16acc: float | None = None
    int8_tops_dense: float | None = None
    fp32_tflops_range_by_tgp: Mapping[str, float] = field(default_factory=dict, hash=False)
    tgp_w: tuple[float, ...] = ()
    nvidia_smi_total_mib: int | None = None
    total_mib_reported: Mapping[str, Any] = field(default_factory=dict, hash=False)
    free_mib_observed: Mapping[str, int] = field(default_factory=dict, hash=False)
    notes: str | None = None
    source: str = ""
    cpu_cores: int | None = None
    simd: str | None = None
    usable_mib: float | None = None

    @property
    def short_name(self) -> str:
        """Without the maker."""
        name = self.name.removeprefix("NVIDIA ").removeprefix("GeForce ")
        return name.removeprefix("Apple ")

    def memory(self, memory_gb: float | None = None) -> float:
        """GiB of memory: the smallest it is made with, or the one asked for.

        Raises:
            UsageError: it is not made with that much.
        """
        if memory_gb is None:
            return self.memory_gb_options[0]
        if memory_gb not in self.memory_gb_options:
            made = " or ".join(f"{gb:g}" for gb in self.memory_gb_options)
            raise UsageError(f"{self.id} has {made} GB of memory, not {memory_gb:g}.")
        return memory_gb

    def total_mib(self, system: str, memory_gb: float) -> float | None:
        """Memory that the driver reports under ``linux`` or ``windows``, if that was read."""
        if memory_gb != self.memory_gb_options[-1]:
            return None  # it was read from the larger variant
        read = self.total_mib_reported
        return read.get("cuda_visible", read.get(system)) if system == "linux" else read.get(system)


@dataclass(frozen=True)
class WorkingSet:
    """How much of a Mac's memory Metal lets the GPU use under one macOS.

    Attributes:
        shares: largest memory in GiB, and the share of memory up to it.
        measured_mib: sizes that were read, by GiB of memory.
    """

    shares: tuple[tuple[float, float], ...]
    measured_mib: Mapping[float, float]

    def usable(self, memory_gb: float) -> int:
        """Bytes of the working set."""
        if memory_gb in self.measured_mib:
            return int(self.measured_mib[memory_gb] * 2**20)
        share = next(s for most, s in self.shares if memory_gb <= most)
        return int(memory_gb * 2**30 * share)


@dataclass(frozen=True)
class Rules:
    """What a platform leaves of a device's memory.

    Attributes:
        apple: by macOS, ``macos15`` (and older) or ``macos26``.
        nvidia_reserved_mib: by platform: taken before a model is loaded.
        nvidia_linux_share: of the nominal memory, where what CUDA reports was not read.
        families: what families are called, in the order of tables.
    """

    apple: Mapping[str, WorkingSet]
    nvidia_reserved_mib: Mapping[str, float]
    nvidia_linux_share: float
    families: Mapping[str, str]


def load_devices() -> tuple[Device, ...]:
    """All devices of the database, checked, in its order."""
    return _tables()[0]


def load_rules() -> Rules:
    """The platforms' rules."""
    return _tables()[1]


def find_device(name: str) -> Device:
    """The device of that id, in any case.

    Raises:
        UsageError: no such device; the nearest id is suggested.
    """
    known = {device.id: device for device in load_devices()}
    key = re.sub(r"[\s_]+", "-", name.strip().lower())
    if key in known:
        return known[key]
    plain = re.sub(r"^(nvidia-|geforce-|apple-)+", "", key)
    near = difflib.get_close_matches(plain, known, n=1, cutoff=0.0)
    raise UsageError(
        f"There is no device {name!r}; did you mean {near[0]}? `dus-edge devices` lists them all."
    )


def parse_devices(text: str) -> tuple[tuple[Device, ...], Rules]:
    """Devices and rules of the text of a `devices.toml`.

    Raises:
        DusEdgeError: it is damaged: an entry without a needed field, a figure that is none, an
            id that stands there twice.
    """
    try:
        tables = tomllib.loads(text)
        devices = tuple(_device(entry) for entry in tables["devices"])
        apple = {
            name: WorkingSet(
                tuple((s["max_ram_gb"], s["numerator"] / s["denominator"]) for s in rule["shares"]),
                {float(gb): mib for gb, mib in rule.get("measured_mib", {}).items()},
            )
            for name, rule in tables["apple_working_set"].items()
            if isinstance(rule, dict)
        }
        reserved = {
            name: rule["mib"]
            for name, rule in tables["nvidia_reserved"].items()
            if isinstance(rule, dict)
        }
        share = tables["nvidia_total"]["linux"]["share"]
        rules = Rules(apple, reserved, share, tables["families"])
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as e:
        raise DusEdgeError(
            f"{DEVICES_FILE} is damaged ({e!r}); install the package again."
        ) from None
    if nameless := {d.family for d in devices} - set(rules.families):
        raise DusEdgeError(f"{DEVICES_FILE}: the family {min(nameless)} has no name in [families].")
    ids = [device.id for device in devices]
    if twice := {i for i in ids if ids.count(i) > 1}:
        raise DusEdgeError(f"{DEVICES_FILE}: the id {min(twice)} stands there twice.")
    return devices, rules


def recognise() -> Device:
    """The machine that this runs on: its NVIDIA card, its Apple chip, or its CPU.

    Raises:
        DusEdgeError: none of them can be told.
    """
    return _nvidia() or _apple() or _cpu()


def match_nvidia(name: str, total_mib: float) -> Device | None:
    """The database's entry of a card, by the driver's name and memory; None if it has none."""
    words = _words(name)
    for device in load_devices():
        if device.backend != "CUDA" or _words(device.name) != words:
            continue
        if any(abs(gb * 1024 - total_mib) < 0.08 * gb * 1024 for gb in device.memory_gb_options):
            return device
    return None


def match_apple(chip: str, gpu_cores: int) -> Device | None:
    """The database's entry of an Apple chip, e.g. ``Apple M3 Max`` with 40 GPU cores."""
    match = re.fullmatch(r"(?:Apple )?(M\d+)(?: (Pro|Max|Ultra))?", chip.strip())
    if match is None:
        return None
    wanted = "-".join([*(p.lower() for p in match.groups() if p), f"{gpu_cores}c"])
    return next((d for d in load_devices() if d.id == wanted), None)


@functools.cache
def _tables() -> tuple[tuple[Device, ...], Rules]:
    return parse_devices(data.read_text(DEVICES_FILE))


def _device(entry: Mapping[str, Any]) -> Device:
    device = Device(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()},
    )
    for key in _POSITIVE:
        value = getattr(device, key)
        if value is not None and (isinstance(value, bool) or not value > 0):
            raise DusEdgeError(
                f"{DEVICES_FILE}: {device.id}: {key} is {value!r}; it must be positive."
            )
    if device.backend not in _BACKENDS:
        raise DusEdgeError(
            f"{DEVICES_FILE}: {device.id}: the backend {device.backend!r} is not known."
        )
    options = device.memory_gb_options
    if not options or list(options) != sorted(options) or options[0] <= 0:
        raise DusEdgeError(
            f"{DEVICES_FILE}: {device.id}: memory_gb_options are not ascending sizes."
        )
    return device


def _words(name: str) -> frozenset[str]:
    """What tells cards apart in a name: without the maker and the memory."""
    name = re.sub(r"\b\d+\s*GB\b", " ", name, flags=re.IGNORECASE)
    noise = {"nvidia", "geforce", "gpu", "graphics", "generation", "with", "design"}
    return frozenset(re.findall(r"[a-z0-9]+", name.lower())) - noise


def _nvidia() -> Device | None:
    """The first card that the driver names; None without a card, driver or nvidia-ml-py."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        name = pynvml.nvmlDeviceGetName(handle)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
    name = name.decode() if isinstance(name, bytes) else name
    total, free = memory.total / 2**20, memory.free / 2**20
    known = match_nvidia(name, total)
    here = known or Device(
        id="auto",
        name=name,
        vendor="NVIDIA",
        family="nvidia",
        architecture="",
        backend="CUDA",
        memory_kind="dedicated",
        memory_gb_options=(round(total / 1024),),
        source="the driver",
    )
    return _present(here, round(total / 1024), free)


def _apple(run: Callable[[Sequence[str]], str] | None = None) -> Device | None:
    """The Apple chip of a Mac by `sysctl` and `ioreg`; None elsewhere."""
    if platform.system() != "Darwin" and run is None:
        return None
    ask = run or (lambda command: command_output(*command))
    chip = ask(("sysctl", "-n", "machdep.cpu.brand_string")).strip()
    ram_gb = int(ask(("sysctl", "-n", "hw.memsize")).strip() or 0) / 2**30
    cores = re.search(r'"gpu-core-count"\s*=\s*(\d+)', ask(("ioreg", "-rc", "AGXAccelerator")))
    device = match_apple(chip, int(cores[1]) if cores else 0)
    if device is None or not ram_gb:
        return None
    # 0 means the system's own rule.
    limit = ask(("sysctl", "-n", "iogpu.wired_limit_mb")).strip()
    usable = float(limit) if limit.isdecimal() and int(limit) else None
    if usable is None:
        version = ask(("sw_vers", "-productVersion")).strip().split(".")[0]
        rule = "macos26" if version.isdecimal() and int(version) >= 26 else "macos15"
        usable = load_rules().apple[rule].usable(ram_gb) / 2**20
    return _present(device, ram_gb, usable)


def _cpu() -> Device:
    """The processor, with the memory that is free now."""
    kib = meminfo_kib()
    total = kib.get("MemTotal", 0) / 2**20
    if not total:
        raise DusEdgeError("This machine's memory cannot be told; name a device with --device.")
    return Device(
        id="cpu",
        name=processor_name(),
        vendor="",
        family="cpu",
        architecture=platform.machine(),
        backend="CPU",
        memory_kind="system",
        memory_gb_options=(round(total, 1),),
        source="/proc/cpuinfo, /proc/meminfo",
        usable_mib=kib.get("MemAvailable", kib["MemTotal"]) / 1024,
    )


def _present(device: Device, memory_gb: float, usable_mib: float) -> Device:
    return replace(device, memory_gb_options=(memory_gb,), usable_mib=usable_mib)
