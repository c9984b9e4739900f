"""GPTQ and bitsandbytes models: what a folder holds, or would hold, as it is resident once loaded.

Of a folder only `config.json` and the headers of its safetensors files are read. A bare
configuration and a preset give the same sizes: the tensors that our own exports plan.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dus_edge.checkpoint.config import ModelConfig, parse_config, quantized_by, tensor_shapes
from dus_edge.checkpoint.names import CONFIG, QUANTIZE_CONFIG
from dus_edge.checkpoint.safetensors import StoredTensor, read_header
from dus_edge.checkpoint.spec import TensorSpec
from dus_edge.errors import CheckpointError, UnsupportedError, UsageError
from dus_edge.export import bnb
from dus_edge.export.gptq import code_specs
from dus_edge.jsonfile import read_object
from dus_edge.predict.memory.torch import VALUE_BYTES
from dus_edge.predict.speed.gptq import kind_name
from dus_edge.predict.stored_model import StoredModel, TensorSize, TorchForm
from dus_edge.quant import gptq_format
from dus_edge.run.source import read_config, weight_files

METHODS = ("gptq", "bitsandbytes")

_TORCH_TYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
#: Parts of a quantized matrix beside its name; of bitsandbytes' after ``.weight``.
_GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_4BIT_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_QUANT_STATE = re.compile(r"\.quant_state\.bitsandbytes__\w+$")
#: Buffers that old checkpoints carry, and what loaders read and drop.
_DROPPED = (".rotary_emb.inv_freq", ".weight_format")

_NO_MLX = (
    "memory and speed of MLX models are not predicted, for no run of one is among the published "
    "measurements; ask for a GGUF of the same base, such as -q q4_0."
)

Header = Mapping[str, TensorSpec | StoredTensor]


@dataclass(frozen=True)
class TorchPreset:
    """A way to quantize a model for transformers.

    Attributes:
        name: what `--quant` takes, e.g. ``gptq-int4`` or ``bnb-nf4``.
        method: ``GPTQ``, ``NF4`` or ``INT8``.
        bits: of a GPTQ code.
        group_size: inputs of a GPTQ group; −1 is a whole row.
    """

    name: str
    method: str
    bits: int = 4
    group_size: int = 128

    @property
    def label(self) -> str:
        """The name as model names spell it, e.g. ``GPTQ-INT4``."""
        return self.name.upper()


#: The usual ones. GPTQ's also take a group size: ``gptq-int4-g32``, ``-g64``, ``-grow``.
TORCH_PRESETS: Mapping[str, TorchPreset] = {
    p.name: p
    for p in (
        *(TorchPreset(f"gptq-int{bits}", "GPTQ", bits) for bits in (8, 4, 3, 2)),
        TorchPreset("bnb-int8", "INT8"),
        TorchPreset("bnb-nf4", "NF4"),
    )
}
_PRESET = re.compile(r"(gptq-int\d+)-g(\d+|row)")


def is_torch_preset(name: str) -> bool:
    """Whether a name is meant as one of these, and not as a GGUF preset."""
    return _spelled(name).startswith(("gptq", "bnb", "mlx"))


def find_torch_preset(name: str) -> TorchPreset:
    """The preset of that name, in any case.

    Raises:
        UsageError: no such preset, the nearest one is suggested; or one of MLX.
    """
    key = _spelled(name)
    if key.startswith("mlx"):
        raise UsageError(f"{name}: {_NO_MLX}")
    if key in TORCH_PRESETS:
        return TORCH_PRESETS[key]
    match = _PRESET.fullmatch(key)
    if match and match[1] in TORCH_PRESETS:
        size = -1 if match[2] == "row" else int(match[2])
        if size in gptq_format.GROUP_SIZES:
            return replace(TORCH_PRESETS[match[1]], name=key, group_size=size)
        raise UsageError(f"GPTQ group size {size} is not known; choose g32, g64, g128 or grow.")
    near = difflib.get_close_matches(key, TORCH_PRESETS, n=1, cutoff=0.0)
    raise UsageError(
        f"There is no preset {name!r}; did you mean {near[0]}? For transformers there are "
        f"{', '.join(TORCH_PRESETS)}, and group sizes such as gptq-int4-g32 or gptq-int4-grow."
    )


def model_of_preset(config: ModelConfig, preset: TorchPreset, name: str) -> StoredModel:
    """The model that an export of this configuration would be; see `model_of_gptq_config`.

    Raises:
        UsageError: GPTQ's groups or units do not divide a matrix.
    """
    if preset.method == "GPTQ":
        for key, shape in tensor_shapes(config).items():
            if (
                config.family.is_linear(key)
                and preset.group_size > 0
                and shape[1] % preset.group_size
            ):
                raise UsageError(
                    f"{key}: groups of {preset.group_size} do not divide its {shape[1]} inputs; "
                    f"choose a smaller group, such as gptq-int{preset.bits}-g32, or whole rows, "
                    f"gptq-int{preset.bits}-grow."
                )
        return model_of_gptq_config(config, preset.bits, preset.group_size, name)
    return model_of_bnb_config(config, preset.method.lower(), name)


def models_of_torch_presets(config: ModelConfig, name: str) -> dict[str, StoredModel]:
    """The model as each of `TORCH_PRESETS` that its shape allows would store it."""
    models = {}
    for key, preset in TORCH_PRESETS.items():
        try:
            models[key] = model_of_preset(config, preset, name)
        except UsageError:  # GPTQ's units do not divide its matrices
            continue
    return models


def model_of_gptq_config(
    config: ModelConfig, bits: int = 4, group_size: int = 128, name: str = "the model"
) -> StoredModel:
    """The model that GPTQ with symmetric codes makes of a configuration; no weight is needed.

    Args:
        config: of the model to be quantized.
        bits: of a code, one of `gptq_format.GPTQ_BITS`.
        group_size: one of `gptq_format.GROUP_SIZES`; −1 is a whole row.
        name: what messages call it.

    Raises:
        UsageError: no such bits or group size, or a matrix that they do not divide.
    """
    values = _gptq_values(config.dtype)
    form = TorchForm("GPTQ", values, values, bits=bits, group_size=group_size)
    return _model(config, form, _planned(config, form), name, name)


def model_of_bnb_config(
    config: ModelConfig, scheme: str = "nf4", name: str = "the model"
) -> StoredModel:
    """The model that bitsandbytes makes of a configuration, as `bnb.write_checkpoint` would.

    Args:
        config: of the model to be quantized.
        scheme: ``nf4`` or ``int8``.
        name: what messages call it.
    """
    chosen = {"nf4": bnb.NF4, "int8": bnb.INT8}[scheme]
    form = _bnb_form(bnb.quantization_config(chosen), config.dtype or "F16")
    return _model(config, form, _planned(config, form), name, name)


def is_quantized_folder(folder: Path) -> bool:
    """Whether a folder's config says that its weights are quantized; False if there is none."""
    try:
        return (folder / QUANTIZE_CONFIG).is_file() or bool(
            (folder / CONFIG).is_file() and quantized_by(read_config(folder))
        )
    except (OSError, ValueError):  # a name that no file can have
        return False


def read_folder(folder: Path, name: str | None = None) -> StoredModel:
    """The model in a GPTQ or bitsandbytes folder, by its config and the headers of its weights.

    Without weights in the folder they are taken to be what its config says.

    Args:
        folder: with `config.json`, and for old GPTQ folders `quantize_config.json`.
        name: what messages call it; None for the folder's.

    Raises:
        CheckpointError: a file is damaged, a field or tensor missing or of another size.
        UnsupportedError: quantized by another method, or not a Llama-form model.
        UsageError: there is no `config.json`.
    """
    raw, where = read_config(folder), str(folder / CONFIG)
    if quantized_by(raw) == "MLX":
        raise UnsupportedError(f"{where}: {_NO_MLX}")
    plain = {k: v for k, v in raw.items() if k != "quantization_config"}
    config = parse_config(plain, where)
    name = name or folder.absolute().name
    details, said_in = _details(raw, folder)
    method = details.get("quant_method", "gptq" if said_in.endswith(QUANTIZE_CONFIG) else None)
    if method not in METHODS:
        raise UnsupportedError(
            f"{said_in}: the weights are quantized by {method!r}; memory is predicted for "
            f"{' and '.join(METHODS)}, and for GGUF files."
        )
    header = _headers(folder, method) if any(folder.glob("*.safetensors")) else None
    if method == "gptq":
        form = _gptq_form(config, details, said_in)
    else:
        stored = header.get(config.family.name("embedding")) if header else None
        values = config.dtype or (stored.dtype if stored and stored.dtype in VALUE_BYTES else "F16")
        form = _bnb_form(details, values, said_in)
    return _model(config, form, header or _planned(config, form), name, str(folder))


def _spelled(name: str) -> str:
    return name.strip().lower().replace("_", "-")


def _details(raw: Mapping[str, Any], folder: Path) -> tuple[Mapping[str, Any], str]:
    """What is said of the quantization, and in which file."""
    details, where = raw.get("quantization_config"), folder / CONFIG
    if not details:
        where = folder / QUANTIZE_CONFIG
        details = read_object(where)
    if not isinstance(details, dict):
        raise CheckpointError(f"{where}: the quantization's settings are {details!r}, no object.")
    return details, str(where)


def _gptq_form(config: ModelConfig, details: Mapping[str, Any], where: str) -> TorchForm:
    bits, group = details.get("bits"), details.get("group_size", 128)
    if type(bits) is not int or bits not in gptq_format.GPTQ_BITS:
        raise CheckpointError(
            f"{where}: bits is {bits!r}; GPTQ has {', '.join(map(str, gptq_format.GPTQ_BITS))}."
        )
    if type(group) is not int or (group < 1 and group != -1):
        raise CheckpointError(
            f"{where}: group_size is {group!r}; a positive number is needed, or -1 for whole rows."
        )
    values = _gptq_values(config.dtype)
    symmetric = details.get("sym", True) is not False
    return TorchForm("GPTQ", values, values, bits=bits, group_size=group, symmetric=symmetric)


def _gptq_values(dtype: str | None) -> str:
    """GPTQ's kernels compute in 16 bits, whatever the folder's other tensors are stored in."""
    return dtype if dtype in ("F16", "BF16") else "F16"


def _bnb_form(details: Mapping[str, Any], values: str, where: str = CONFIG) -> TorchForm:
    if details.get("load_in_8bit") or details.get("_load_in_8bit"):
        return TorchForm("INT8", values, values)
    if not (details.get("load_in_4bit") or details.get("_load_in_4bit")):
        raise CheckpointError(
            f"{where}: neither load_in_4bit nor load_in_8bit is set; bitsandbytes has no other."
        )
    kind = str(details.get("bnb_4bit_quant_type", "fp4"))
    compute = str(details.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch.")
    if kind not in ("nf4", "fp4") or compute not in _TORCH_TYPES:
        raise CheckpointError(
            f"{where}: bnb_4bit_quant_type is {kind!r} and bnb_4bit_compute_dtype {compute!r}; "
            f"nf4 or fp4, and {', '.join(_TORCH_TYPES)} are known."
        )
    nested = bool(details.get("bnb_4bit_use_double_quant"))
    return TorchForm(kind.upper(), values, _TORCH_TYPES[compute], nested=nested)


def _planned(config: ModelConfig, form: TorchForm) -> dict[str, TensorSpec]:
    """The tensors that our own exports would write; UsageError where they cannot."""
    specs = {k: TensorSpec(k, form.values, size, k) for k, size in tensor_shapes(config).items()}
    if form.method != "GPTQ":
        scheme = bnb.INT8 if form.method == "INT8" else bnb.Scheme("nf4", form.nested)
        planned = bnb.plan_tensors(config.family, specs, scheme)
        return {spec.name: spec for spec in planned}
    settings = gptq_format.GPTQSettings(bits=form.bits, group_size=form.group_size)
    header: dict[str, TensorSpec] = {}
    for key, spec in specs.items():
        if config.family.is_linear(key):
            settings.check(key, spec.shape)
            header |= {code.name: code for code in code_specs(spec, settings)}
        else:
            header[key] = spec
    return header


def _headers(folder: Path, method: str) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    kind = "gptq" if method == "gptq" else "bitsandbytes"
    for file in weight_files(folder, kind):
        stored |= read_header(file)
    return stored


def _model(
    config: ModelConfig, form: TorchForm, header: Header, name: str, where: str
) -> StoredModel:
    tensors = _resident(config, form, dict(header), where)
    return StoredModel.of_shape(config, name, tensors, replace(form, window=config.sliding_window))


def _resident(
    config: ModelConfig, form: TorchForm, left: dict[str, TensorSpec | StoredTensor], where: str
) -> Iterator[TensorSize]:
    """What is on the device once loaded: one entry a tensor of the unquantized model."""
    shapes, gguf_name = tensor_shapes(config), config.family.gguf_name
    for name, shape in shapes.items():
        parts = _take_parts(form, left, name)
        if parts:
            size = _matrix(form, name, shape, parts, where)
        else:
            size = _plain(form, name, shape, left.pop(name, None), where)
        yield replace(size, name=gguf_name(name))
        # AutoGPTQ gives every matrix a bias of zeros.
        bias = name.removesuffix("weight") + "bias"
        if parts and bias not in shapes and bias in left:
            size = _plain(form, bias, shape[:1], left.pop(bias), where)
            yield replace(size, name=gguf_name(bias))
    if config.tied_head:
        left.pop(config.family.name("head"), None)  # saved although tied
    for name in left:
        if not name.endswith(_DROPPED) and not _QUANT_STATE.search(name):
            raise UnsupportedError(
                f"{where}: tensor {name} has no place in a {config.architecture} of "
                f"{config.n_layers} layers quantized by {form.method}."
            )


def _take_parts(
    form: TorchForm, left: dict[str, TensorSpec | StoredTensor], name: str
) -> dict[str, TensorSpec | StoredTensor]:
    """A quantized matrix's tensors, codes first, taken out; none if it is not quantized."""
    stem = name.removesuffix("weight")
    if form.method == "GPTQ":
        keys = [stem + part for part in _GPTQ_PARTS]
    elif form.method == "INT8":
        keys = [name, stem + "SCB"]
    else:
        keys = [name, *(f"{name}.{part}" for part in _4BIT_PARTS)]
    if (keys[0] if form.method == "GPTQ" else keys[1]) not in left:
        return {}
    return {key: left.pop(key) for key in keys if key in left}


def _matrix(
    form: TorchForm, name: str, shape: tuple[int, ...], parts: Header, where: str
) -> TensorSize:
    n_out, n_in = shape
    stem, kind, n_codes = name.removesuffix("weight"), form.method, n_out * n_in
    expected = {name: n_codes if kind == "INT8" else math.ceil(n_codes / 2)}
    scales: set[str] = set()
    if kind == "GPTQ":
        width = n_in if form.group_size == -1 else form.group_size
        if n_in % width:
            raise CheckpointError(
                f"{where}: {name}: groups of {width} do not divide its {n_in} inputs."
            )
        groups = n_in // width
        kind = kind_name(form.bits, None if form.group_size == -1 else width)
        scales = {stem + "scales"}
        expected = {
            stem + "qweight": n_codes * form.bits // 8,
            stem + "qzeros": groups * n_out * form.bits // 8,
            stem + "scales": groups * n_out * VALUE_BYTES[form.values],
        }
    # Loaders turn scales of GPTQ into the type of the activations.
    sizes = {
        key: math.prod(part.shape) * VALUE_BYTES[form.values] if key in scales else part.nbytes
        for key, part in parts.items()
    }
    for key, nbytes in expected.items():
        if sizes.get(key) != nbytes:
            raise CheckpointError(
                f"{where}: tensor {key} {_has(sizes.get(key))}, but the config means {nbytes:,} "
                f"for {n_out} × {n_in}; correct the config, or fetch the weights again."
            )
    return TensorSize(name, kind, n_out, n_in, sum(sizes.values()))


def _plain(
    form: TorchForm,
    name: str,
    shape: tuple[int, ...],
    stored: TensorSpec | StoredTensor | None,
    where: str,
) -> TensorSize:
    if stored is None:
        raise CheckpointError(
            f"{where}: tensor {name} is missing from the weights; fetch them again or correct "
            "the config."
        )
    if stored.shape != shape or stored.dtype not in VALUE_BYTES:
        raise CheckpointError(
            f"{where}: tensor {name} is {stored.dtype} {list(stored.shape)}, but the config means "
            f"{list(shape)} in one of {', '.join(VALUE_BYTES)}."
        )
    nbytes = math.prod(shape) * VALUE_BYTES[form.values]
    return TensorSize(name, form.values, math.prod(shape[:-1]), shape[-1], nbytes)


def _has(nbytes: int | None) -> str:
    return "is missing" if nbytes is None else f"has {nbytes:,} bytes"
