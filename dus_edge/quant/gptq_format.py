"""GPTQ checkpoints, version 1 of the format: codes of a matrix ↔ the tensors that are stored.

Of a matrix ``(out, in)`` with b-bit codes q, scales s and zero points z of its groups g:
``weight[o, i] = s[g, o] · (q[o, i] − z[g, o])`` with ``g = g_idx[i]``. Stored are

- ``qweight`` int32 ``(in·b/32, out)``: codes packed along the inputs;
- ``qzeros`` int32 ``(groups, out·b/32)``: z − 1, packed along the outputs;
- ``scales`` float16 ``(groups, out)``;
- ``g_idx`` int32 ``(in,)``: the group of every input.

References: `QuantLinear.pack` in auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py (AutoGPTQ 0.7.1)
and gptqmodel/nn_modules/qlinear (GPTQModel). NumPy only, so that any checkpoint can be read and
planned without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

import dus_edge
from dus_edge.errors import UsageError

GPTQ_BITS = (2, 3, 4, 8)
#: Inputs that share a scale; −1 is all of them.
GROUP_SIZES = (32, 64, 128, -1)
#: Codes are packed in units of 32: `bits` words of 32 bits.
_UNIT = 32


@dataclass(frozen=True)
class GPTQSettings:
    """How matrices are quantized.

    Attributes:
        bits: bits of a code: 2, 3, 4 or 8.
        group_size: inputs that share a scale and a zero point: 32, 64, 128, or −1 for all.
        sym: zero points are all 2^(bits − 1); else each group has its own.
        desc_act: groups are of inputs alike in importance, not of neighbours (act-order).
        act_group_aware: without `desc_act`, still visit important groups, and important inputs in
            a group, first; readers see no difference. Gafni et al., arXiv:2505.14638.
        damp: what is added to the Hessian's diagonal, as a share of its mean.
        block: columns after which errors are passed on to all the others. Speed only.
        candidates: scales tried for every group.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    act_group_aware: bool = True
    damp: float = 0.01
    block: int = 128
    candidates: int = 12

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def group_width(self, n_in: int) -> int:
        """Inputs in a group of a matrix with `n_in`."""
        return n_in if self.group_size == -1 else self.group_size

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse what the format or its readers cannot hold.

        Args:
            name: the tensor, for the message.
            shape: its ``(out, in)``.

        Raises:
            UsageError: unknown bits or group size, a number out of range, or a shape that does
                not divide.
        """
        if self.bits not in GPTQ_BITS:
            raise UsageError(
                f"GPTQ has no {self.bits}-bit codes; choose one of {_list(GPTQ_BITS)}."
            )
        if self.group_size not in GROUP_SIZES:
            raise UsageError(
                f"GPTQ group size {self.group_size} is not known; "
                f"choose one of {_list(GROUP_SIZES)} (-1: the whole row)."
            )
        if not 0 < self.damp < 1:
            raise UsageError(f"GPTQ damping {self.damp} must lie between 0 and 1; 0.01 is usual.")
        if self.block < 1 or self.block % _UNIT or self.candidates < 1:
            raise UsageError(
                f"GPTQ needs a block that is a multiple of {_UNIT}, and at least one candidate."
            )
        if len(shape) != 2:
            raise UsageError(f"{name}: GPTQ quantizes matrices, and this has shape {shape}.")
        n_out, n_in = shape
        if n_in % _UNIT or n_out % _UNIT or not n_in or not n_out:
            raise UsageError(
                f"{name}: GPTQ packs {_UNIT} codes at a time and cannot store "
                f"{n_out} × {n_in}; use a GGUF preset for this model."
            )
        if n_in % self.group_width(n_in):
            usable = [g for g in GROUP_SIZES if g == -1 or n_in % g == 0]
            raise UsageError(
                f"{name}: groups of {self.group_size} do not divide its {n_in} inputs; "
                f"use --group-size {_list(usable)}."
            )


class Codes(Protocol):
    """A quantized matrix: arrays or tensors, see `dus_edge.quant.gptq.Solution`."""

    codes: Any
    scales: Any
    zeros: Any
    g_idx: Any


def pack(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Codes ``0 … 2^bits − 1`` of a 2-D array as int32, lowest bits first along `axis`.

    The length along `axis` must be a multiple of 32; it becomes ``length · bits / 32``. Codes of
    2, 4 and 8 bits fill words evenly. 3-bit codes run through three words: the 11th and the 22nd
    of 32 lie across a border.
    """
    rows = np.moveaxis(codes, axis, 0)
    n, width = rows.shape
    packed = np.zeros((n * bits // 32, width), np.uint32)
    for i in range(_UNIT):
        part = rows[i::_UNIT].astype(np.uint32)
        word, shift = divmod(i * bits, 32)
        packed[word::bits] |= part << np.uint32(shift)
        if shift + bits > 32:
            packed[word + 1 :: bits] |= part >> np.uint32(32 - shift)
    return np.ascontiguousarray(np.moveaxis(packed, 0, axis)).view(np.int32)


def unpack(packed: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """The inverse of `pack`: uint8 codes."""
    words = np.moveaxis(np.ascontiguousarray(packed).view(np.uint32), axis, 0)
    n, width = words.shape
    codes = np.empty((n * 32 // bits, width), np.uint8)
    for i in range(_UNIT):
        word, shift = divmod(i * bits, 32)
        part = words[word::bits] >> np.uint32(shift)
        if shift + bits > 32:
            part = part | words[word + 1 :: bits] << np.uint32(32 - shift)
        codes[i::_UNIT] = part & np.uint32(2**bits - 1)
    return np.ascontiguousarray(np.moveaxis(codes, 0, axis))


def tensor_specs(
    shape: tuple[int, ...], settings: GPTQSettings
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(NumPy dtype name, shape) of every stored tensor of a matrix ``(out, in)``."""
    n_out, n_in = shape
    n_groups = n_in // settings.group_width(n_in)
    return {
        "qweight": ("int32", (n_in * settings.bits // 32, n_out)),
        "qzeros": ("int32", (n_groups, n_out * settings.bits // 32)),
        "scales": ("float16", (n_groups, n_out)),
        "g_idx": ("int32", (n_in,)),
    }


def stored(solution: Codes, settings: GPTQSettings) -> dict[str, np.ndarray]:
    """What `tensor_specs` promises, C-contiguous, of codes and their groups.

    Args:
        solution: ``codes`` ``(out, in)``, ``scales`` and ``zeros`` ``(groups, out)`` and ``g_idx``
            ``(in,)``; arrays, or tensors on any device.
        settings: what it was made with.

    Raises:
        ValueError: a zero point that version 1 cannot hold: 0 would be stored as −1, whose bits
            many readers carry into the next zero point.
    """
    zeros = _array(solution.zeros)
    if zeros.min() < 1 or zeros.max() > settings.top:
        raise ValueError(f"zero points must lie in 1 … {settings.top}")
    return {
        "qweight": pack(_array(solution.codes).T, settings.bits, axis=0),
        "qzeros": pack(zeros - 1, settings.bits, axis=1),
        "scales": np.ascontiguousarray(_array(solution.scales), np.float16),
        "g_idx": np.ascontiguousarray(_array(solution.g_idx), np.int32),
    }


def dequantized(
    qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, g_idx: np.ndarray, bits: int
) -> np.ndarray:
    """The weights ``(out, in)`` float32 that the stored tensors mean."""
    codes = unpack(qweight, bits, axis=0).astype(np.float32)
    # A stored −1 (all bits set) means 2^bits here as in AutoGPTQ's kernels, not 0.
    zeros = unpack(qzeros, bits, axis=1).astype(np.float32) + np.float32(1)
    codes -= zeros[g_idx]
    codes *= scales.astype(np.float32)[g_idx]
    return np.ascontiguousarray(codes.T)


def quantize_config(settings: GPTQSettings) -> dict[str, Any]:
    """``quantize_config.json``, and ``quantization_config`` of ``config.json``.

    The keys that AutoGPTQ, GPTQModel, transformers and llama.cpp's converter all take.
    """
    config: dict[str, Any] = {
        "bits": settings.bits,
        "group_size": settings.group_size,
        "desc_act": settings.desc_act,
        "sym": settings.sym,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "damp_percent": settings.damp,
        "static_groups": False,
        "true_sequential": True,
    }
    if not settings.sym:
        # GPTQModel takes zero points of version 1 only from writers it knows to keep them above 0.
        config["meta"] = {"quantizer": [f"dus-edge:{dus_edge.__version__}", "gptqmodel:0.9.0"]}
    return config


def _array(values: Any) -> np.ndarray:
    return values.cpu().numpy() if hasattr(values, "cpu") else np.asarray(values)


def _list(values: Any) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last
