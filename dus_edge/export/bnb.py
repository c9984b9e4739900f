"""bitsandbytes checkpoints: NF4 or INT8 folders that transformers loads and QLoRA trains on.

bitsandbytes' own functions quantize on the CPU, a piece of a tensor at a time, so the model is
never in memory; a layer that stands at several places is quantized once. Tensors, names and the
`quantization_config` are those of transformers' `save_pretrained` (its
`quantizers/quantizer_bnb_4bit.py` and `quantizer_bnb_8bit.py`; bitsandbytes' `QuantState.as_dict`
and `Linear8bitLt`). Every linear layer of the blocks is quantized; embeddings, norms, biases and
the head stay as they are stored.

NF4: Dettmers et al., "QLoRA", arXiv 2305.14314. INT8: Dettmers et al., "LLM.int8()",
arXiv 2208.07339.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dus_edge.checkpoint.spec import Checkpoint, TensorSpec
from dus_edge.errors import CheckpointError
from dus_edge.export import finite, hf
from dus_edge.export.chunks import chunks
from dus_edge.families.family import Family
from dus_edge.packages import cannot_import, require
from dus_edge.stream import run_tasks

if TYPE_CHECKING:
    import torch

#: Weights that share one absmax, and absmaxes that share one in double quantization: the sizes
#: that transformers has bitsandbytes use.
BLOCK = 64
NESTED_BLOCK = 256

_TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_QUANT_STATE = "quant_state.bitsandbytes__nf4"
#: As long as JSON spells a float; see `_quant_state`.
_LONGEST_FLOAT = -2.2250738585072014e-308


@dataclass(frozen=True)
class Scheme:
    """How the linear layers are stored.

    Attributes:
        name: ``nf4`` or ``int8``.
        double_quant: NF4 only: the blocks' absmaxes are themselves 8-bit codes, which saves 0.37
            bits per weight.
        compute_dtype: NF4 only: what loaders multiply in: ``float32``, ``bfloat16``, ``float16``.
    """

    name: str
    double_quant: bool = True
    compute_dtype: str = "float32"


NF4 = Scheme("nf4")
INT8 = Scheme("int8")


def check_available() -> None:
    """See that bitsandbytes can be used, before any work.

    Raises:
        DependencyError: it is not installed.
    """
    require("bnb", "this checkpoint needs", "torch", "bitsandbytes")
    try:
        import bitsandbytes  # noqa: F401
        import torch  # noqa: F401
    except ImportError as e:
        raise cannot_import("bnb", "this checkpoint needs bitsandbytes and torch", e) from None


def plan_tensors(
    family: Family, specs: Mapping[str, TensorSpec], scheme: Scheme
) -> list[TensorSpec]:
    """Every tensor of the folder, sizes known to the byte; no weight is read.

    Args:
        family: whose linear layers are quantized.
        specs: the checkpoint's tensors.
        scheme: how linear layers are stored.
    """
    parts = _nf4_parts if scheme.name == "nf4" else _int8_parts
    planned: list[TensorSpec] = []
    for spec in specs.values():
        planned += parts(spec, scheme) if family.is_linear(spec.name) else [spec]
    return planned


def quantization_config(scheme: Scheme) -> dict[str, Any]:
    """What `config.json` says, with the keys that transformers writes."""
    four = scheme.name == "nf4"
    return {
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": scheme.compute_dtype if four else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4" if four else "fp4",
        "bnb_4bit_use_double_quant": four and scheme.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "quant_method": "bitsandbytes",
    }


def check_outputs(checkpoint: Checkpoint, folder: Path, scheme: Scheme, overwrite: bool) -> None:
    """Refuse what can be refused before the first byte; see `hf.check_outputs`."""
    planned = plan_tensors(checkpoint.config.family, checkpoint.specs(), scheme)
    hf.check_outputs(checkpoint, folder, overwrite, planned)


def write_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    card: str,
    scheme: Scheme,
    *,
    n_threads: int,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Write a quantized checkpoint folder; it appears under its name when it is whole.

    Args:
        checkpoint: the model, a base or a view of one. Weights are quantized from their stored
            dtype.
        folder: the result.
        card: text of the model card (`README.md`).
        scheme: how linear layers are stored.
        n_threads: worker threads; each holds some ten megabytes and one quantized tensor.
        overwrite: replace an older checkpoint folder of that name.
        allow_nonfinite: go on although a weight is NaN or infinite, or too large for INT8.
        advance: told of bytes written, out of the sum over `plan_tensors`.

    Raises:
        CheckpointError: a weight is NaN or infinite, or too large for INT8.
        DependencyError: bitsandbytes is missing.
        OutputError: the folder cannot be written. Nothing half-written stays in any case.
    """
    check_available()
    specs = checkpoint.specs()
    planned = plan_tensors(checkpoint.config.family, specs, scheme)
    config: dict[str, Any] = {"quantization_config": quantization_config(scheme)}
    if checkpoint.config.dtype is None:
        # Left out, a loader takes the first floating tensor's, which may be an F32 absmax.
        stored = next(iter(specs.values())).dtype
        config |= dict.fromkeys(("dtype", "torch_dtype"), _TORCH_NAMES[stored])
    with (
        hf.checkpoint_folder(
            checkpoint, folder, card, planned, overwrite=overwrite, config_extra=config
        ) as writer,
        _one_torch_thread(),
    ):
        is_linear = checkpoint.config.family.is_linear
        copied = [name for name in specs if not is_linear(name)]
        groups = hf.by_source(s for s in specs.values() if is_linear(s.name))
        tasks = chain(
            hf.copy_tasks(checkpoint, copied, writer, allow_nonfinite),
            _tasks(checkpoint, groups, scheme, writer, allow_nonfinite),
        )
        run_tasks(tasks, n_threads=n_threads, advance=advance)


def _nf4_parts(spec: TensorSpec, scheme: Scheme) -> list[TensorSpec]:
    blocks = math.ceil(spec.n_elements / BLOCK)
    state = len(_quant_state(_state_fields(spec, scheme, _LONGEST_FLOAT)))
    parts: list[tuple[str, str, tuple[int, ...]]] = [
        ("", "U8", (math.ceil(spec.n_elements / 2), 1)),
        (".absmax", "U8" if scheme.double_quant else "F32", (blocks,)),
        (".quant_map", "F32", (16,)),
        (f".{_QUANT_STATE}", "U8", (state,)),
    ]
    if scheme.double_quant:
        parts += [
            (".nested_absmax", "F32", (math.ceil(blocks / NESTED_BLOCK),)),
            (".nested_quant_map", "F32", (256,)),
        ]
    return [
        TensorSpec(spec.name + ending, dtype, shape, spec.source + ending)
        for ending, dtype, shape in parts
    ]


def _int8_parts(spec: TensorSpec, scheme: Scheme) -> list[TensorSpec]:
    stem, source = spec.name.removesuffix("weight"), spec.source.removesuffix("weight")
    return [
        TensorSpec(stem + name, dtype, shape, source + name)
        for name, dtype, shape in (
            ("weight", "I8", spec.shape),
            ("SCB", "F32", (spec.n_rows,)),
            ("weight_format", "U8", ()),
        )
    ]


def _state_fields(spec: TensorSpec, scheme: Scheme, offset: float) -> dict[str, Any]:
    """What `QuantState.as_dict` packs as JSON, in its order."""
    fields = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": _TORCH_NAMES[spec.dtype],
        "shape": list(spec.shape),
    }
    if scheme.double_quant:
        fields |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": offset,
        }
    return fields


def _quant_state(fields: Mapping[str, Any]) -> bytes:
    """The JSON, padded with blanks, which readers ignore, to a length known beforehand.

    The one field that depends on the weights is a float, whose spelling varies in length.
    """
    longest = fields
    if "nested_offset" in fields:
        longest = {**fields, "nested_offset": _LONGEST_FLOAT}
    return json.dumps(fields).encode().ljust(len(json.dumps(longest)))


def _tasks(
    checkpoint: Checkpoint,
    groups: Sequence[Sequence[TensorSpec]],
    scheme: Scheme,
    writer: hf.TensorWriter,
    allow_nonfinite: bool,
) -> Iterator[Callable[[], int]]:
    if scheme.name == "nf4":
        for group in groups:
            # Double quantization wants all absmaxes of a tensor, so one task takes it whole.
            yield lambda g=group: _write_nf4(checkpoint, g, scheme, writer, allow_nonfinite)
        return
    for group in groups:
        for start, stop in chunks(group[0]):
            yield lambda g=group, a=start, b=stop: _write_int8(
                checkpoint, g, writer, a, b, allow_nonfinite
            )


def _write_nf4(
    checkpoint: Checkpoint,
    group: Sequence[TensorSpec],
    scheme: Scheme,
    writer: hf.TensorWriter,
    allow_nonfinite: bool,
) -> int:
    import torch
    from bitsandbytes import functional

    spec = group[0]
    absmaxes, written = [], 0
    # Blocks run on from row to row, so a piece is as many rows as make whole blocks.
    for start, stop in chunks(spec, BLOCK // math.gcd(spec.shape[1], BLOCK)):
        weights = _read(checkpoint, spec, start, stop, allow_nonfinite)
        packed, state = functional.quantize_4bit(weights, blocksize=BLOCK, quant_type="nf4")
        # The packed tensor is a column of bytes: its row index is the byte's.
        first = start * spec.shape[1] // 2
        written += sum(writer.put(s.name, packed.numpy(), first) for s in group)
        absmaxes.append(state.absmax)
    absmax, parts, offset = torch.cat(absmaxes), {}, 0.0
    if scheme.double_quant:
        mean = absmax.mean()
        codes, nested = functional.quantize_blockwise(absmax - mean, blocksize=NESTED_BLOCK)
        offset = mean.item()
        parts = {"nested_absmax": nested.absmax, "nested_quant_map": nested.code}
        absmax = codes
    parts |= {"absmax": absmax, "quant_map": state.code}
    arrays = {name: part.numpy() for name, part in parts.items()}
    fields = _state_fields(spec, scheme, offset)
    arrays[_QUANT_STATE] = np.frombuffer(_quant_state(fields), np.uint8)
    for s in group:
        written += sum(writer.put(f"{s.name}.{name}", a) for name, a in arrays.items())
    return written


def _write_int8(
    checkpoint: Checkpoint,
    group: Sequence[TensorSpec],
    writer: hf.TensorWriter,
    start: int,
    stop: int,
    allow_nonfinite: bool,
) -> int:
    import torch
    from bitsandbytes import functional

    spec = group[0]
    weights = _read(checkpoint, spec, start, stop, allow_nonfinite)
    # Int8Params goes through float16 too; with no threshold there are no outliers to keep.
    codes, largest, _ = functional.int8_vectorwise_quant(weights.to(torch.float16))
    if not allow_nonfinite and not torch.isfinite(largest).all():
        raise CheckpointError(
            f"tensor {spec.source} has values too large for INT8, which goes through F16 "
            f"(the largest is {weights.abs().max():.3g}); choose nf4."
        )
    written = 0
    for s in group:
        stem = s.name.removesuffix("weight")
        written += writer.put(s.name, codes.numpy(), start)
        written += writer.put(f"{stem}SCB", largest.numpy(), start)
        if start == 0:  # 0: rows as they are
            written += writer.put(f"{stem}weight_format", np.zeros((), np.uint8))
    return written


def _read(
    checkpoint: Checkpoint, spec: TensorSpec, start: int, stop: int, allow_nonfinite: bool
) -> torch.Tensor:
    """Rows of a weight as a tensor of their stored dtype, seen to be finite."""
    import torch

    rows = checkpoint.read(spec.name, start, stop)
    if not allow_nonfinite:
        finite.check(rows, spec, start)
    rows = np.require(rows, requirements="W")  # torch warns of arrays that are read-only
    if spec.dtype == "BF16":
        return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(rows)


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """The workers are the threads; and a sum's result must not depend on the number of cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
