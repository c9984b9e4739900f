"""What is known of a device that its speed follows from."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dus_edge.errors import UsageError
from dus_edge.predict.devices import Device

BACKENDS = ("cuda", "metal", "vulkan")
#: For cards whose rates are not published: a usual boost clock, and the ratio of FP16 tensor cores
#: to shaders of GeForce cards (Ampere and Ada whitepapers).
_CLOCK_GHZ = 1.6
_TENSOR_CORES = 4
#: An assumption after Apple's announcement of M5; the three published M5 prompt rates fit it.
_M5_MATRIX_UNITS = 4
#: GA100 and GH100.
_HBM_CAPABILITIES = ("8.0", "9.0")


@dataclass(frozen=True, slots=True)
class DeviceSpeed:
    """The facts of a device that its speed follows from.

    Attributes:
        backend: ``cuda``, ``metal`` or ``vulkan``.
        architecture: lower case, e.g. ``ampere``, ``ada``, ``m3``.
        family: of `devices.toml`, e.g. ``nvidia-40-desktop``; the interval goes by it.
        bandwidth_gbps: memory bandwidth, decimal GB/s.
        matmul_tflops: dense matrix products: FP16 tensor cores with FP16 accumulation on CUDA,
            the shader rate or that of the matrix units on Metal.
        shader_tflops: FP32 outside the matrix units, where products with a vector are computed.
        hbm: memory is stacked (A100, H100, H200): one chip cannot keep it busy with small kernels.
        estimated: the compute rates were estimated from the number of cores.
    """

    backend: str
    architecture: str
    family: str
    bandwidth_gbps: float
    matmul_tflops: float
    shader_tflops: float
    hbm: bool = False
    estimated: bool = False

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UsageError(
                f"There is no speed model for backend {self.backend!r}; "
                f"it is one of {', '.join(BACKENDS)}."
            )
        for name in ("bandwidth_gbps", "matmul_tflops", "shader_tflops"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} of the device must be positive, not {value}.")


def device_speed(device: Device, backend: str | None = None) -> DeviceSpeed:
    """What the speed of an entry of `data/devices.toml` follows from.

    Args:
        device: see `dus_edge.predict.devices.find_device`.
        backend: another one than the device's own, e.g. ``vulkan``.

    Raises:
        UsageError: its bandwidth, or everything on its compute, is unknown, or nothing is known of
            its backend.
    """
    if not device.bandwidth_gbps:
        raise UsageError(
            f"The memory bandwidth of {device.id} is unknown, and its speed follows from it; "
            "measure with `dus-edge bench run` instead."
        )
    kind = (backend or device.backend).lower()
    fp32 = device.fp32_tflops
    if not fp32 and not device.cuda_cores:
        raise UsageError(f"Neither fp32_tflops nor cuda_cores of {device.id} is known.")
    rate = fp32 or (device.cuda_cores or 0) * 2 * _CLOCK_GHZ / 1000
    if kind == "metal":
        matmul = rate * (_M5_MATRIX_UNITS if device.family == "apple-m5" else 1)
    else:
        matmul = device.fp16_tflops_dense_fp16acc or rate * _TENSOR_CORES
    return DeviceSpeed(
        backend=kind,
        architecture=_architecture(device),
        family=device.family,
        bandwidth_gbps=device.bandwidth_gbps,
        matmul_tflops=matmul,
        shader_tflops=rate,
        hbm=device.compute_capability in _HBM_CAPABILITIES,
        estimated=not fp32,
    )


def _architecture(device: Device) -> str:
    if device.family.startswith("apple-"):
        return device.family.removeprefix("apple-")
    return device.architecture.lower().split(" ")[0]
