"""MLX folders: quantized models that mlx-lm and LM Studio load on Macs.

The files are those that `mlx_lm.convert -q` writes, and on a CPU to the byte what it writes: every
matrix is quantized, embedding and head too; norms and biases stay; all in the dtype that
config.json names. Weights stream through, a piece of a matrix at a time, and a layer that stands
at several places is quantized once.

References: `convert` in mlx_lm/convert.py; `quantize_model`, `save_model` and `save_config` in
mlx_lm/utils.py (mlx-lm 0.32).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dus_edge.adapter.numbers import as_floats, as_stored
from dus_edge.checkpoint.config import ModelConfig
from dus_edge.checkpoint.spec import Checkpoint, TensorSpec
from dus_edge.errors import CheckpointError, UnsupportedError
from dus_edge.export import finite, hf
from dus_edge.export.chunks import chunks
from dus_edge.quant.mlx.affine import quantize_affine
from dus_edge.quant.mlx.format import MLXSettings, mlx_quantization, quantized_shapes
from dus_edge.stream import run_tasks

#: Kinds of rope whose factor of attention mlx-lm computes itself.
_SCALED = ("yarn", "longrope")
#: What `--dtype` takes: config.json's names, and safetensors'.
MLX_DTYPES: Mapping[str, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class MLXForm:
    """How a model is stored.

    Attributes:
        settings: of its matrices.
        dtype: of scales, biases and norms: ``BF16``, ``F16`` or ``F32``; None for each tensor's
            own, which is what a base without a ``dtype`` in config.json gets.
    """

    settings: MLXSettings
    dtype: str | None

    def of(self, spec: TensorSpec) -> str:
        """The dtype that a tensor is turned into."""
        return self.dtype or spec.dtype


def choose_form(config: ModelConfig, settings: MLXSettings, dtype: str | None) -> MLXForm:
    """The form that `mlx_lm.convert` gives a model.

    Args:
        config: of the model.
        settings: of its matrices.
        dtype: one of `MLX_DTYPES`; None for the configuration's.
    """
    return MLXForm(settings, MLX_DTYPES[dtype] if dtype else config.dtype)


def check_config(config: ModelConfig) -> None:
    """Refuse what mlx-lm would read and compute otherwise, silently.

    Raises:
        UnsupportedError: a scaling of rope that it does not know, a field that its code of the
            family ignores, or windows in other layers than it gives them to.
    """
    kind = config.rope.kind
    if kind in _SCALED and config.rope.params.get("attention_factor") is not None:
        raise UnsupportedError(
            f"mlx-lm computes {kind}'s attention_factor itself and would ignore the one in this "
            "model's config.json; use a GGUF preset for it."
        )
    family = config.family
    usual = {"head_dim": config.hidden_size // config.n_heads, "attention_bias": False}
    for name in family.mlx_ignores:
        value = getattr(config, name)
        if value != usual.get(name):
            raise UnsupportedError(
                f"mlx-lm's {family.model_type} does not know {family.fields[name].key}, which is "
                f"{value} in this model; use a GGUF preset for it."
            )
    if family.mlx_window and config.sliding_window is not None:
        usual_layers = family.patterns["full"].derived(config.raw, config.n_layers)
        if config.full_layers != usual_layers:
            raise UnsupportedError(
                f"mlx-lm's {family.model_type} reads no layer_types, and would give the window of "
                "this model to other layers; use a GGUF preset for it."
            )


def mlx_period(config: ModelConfig) -> int:
    """Layers after which mlx-lm's windows repeat: plans must keep it. 1 where it has none."""
    pattern = config.family.patterns.get("full")
    if not config.family.mlx_window or config.sliding_window is None or pattern is None:
        return 1
    said = config.raw.get(pattern.every_key) if pattern.every_key else None
    return said or pattern.every or 1


def plan_tensors(specs: Mapping[str, TensorSpec], form: MLXForm) -> list[TensorSpec]:
    """Every tensor of the folder, sizes known to the byte; no weight is read.

    Raises:
        UsageError: a matrix whose rows are not whole groups.
    """
    planned: list[TensorSpec] = []
    for spec in specs.values():
        dtype = form.of(spec)
        if len(spec.shape) != 2:
            planned.append(replace(spec, dtype=dtype))
            continue
        form.settings.check_matrix(spec.name, spec.shape)
        packed, groups = quantized_shapes(spec.shape, form.settings)
        planned += [
            TensorSpec(_part(spec.name, part), kind, shape, _part(spec.source, part))
            for part, kind, shape in (
                ("weight", "U32", packed),
                ("scales", dtype, groups),
                ("biases", dtype, groups),
            )
        ]
    return planned


def mlx_config(config: ModelConfig, form: MLXForm) -> dict[str, Any]:
    """Keys of config.json that are added or replaced.

    mlx-lm takes from config.json alone, and has defaults that are not transformers': a head is
    tied unless it says otherwise, a yarn's first context is 4,096. So what is left out is said.
    """
    quantization = mlx_quantization(form.settings)
    extra: dict[str, Any] = {"quantization": quantization, "quantization_config": quantization}
    extra["model_type"] = config.family.model_type
    for name, rule in config.family.fields.items():
        value = getattr(config, name, None)
        if config.raw.get(rule.key) is None and value is not None:
            extra[rule.key] = value
    if config.raw.get("rope_theta") is None:
        extra["rope_theta"] = config.rope.theta
    local = config.family.rope_local
    if local is not None and local.key and config.raw.get(local.key) is None:
        extra[local.key] = config.rope.theta_local
    if config.family.rope_share is not None:
        extra["partial_rotary_factor"] = config.rope.share
    if config.rope.kind != "default":
        scaling = {"rope_type": config.rope.kind, **config.rope.params}
        if config.rope.kind == "yarn":
            scaling.setdefault("original_max_position_embeddings", config.context_length)
        if config.rope.kind == "longrope":  # mlx-lm's Phi-3 knows it by this key
            scaling["type"] = "longrope"
            key = "original_max_position_embeddings"
            extra[key] = scaling[key]
        extra["rope_scaling"] = scaling
    if form.dtype:
        names = {stored: name for name, stored in MLX_DTYPES.items()}
        extra |= dict.fromkeys(("dtype", "torch_dtype"), names[form.dtype])
    return extra


def check_outputs(checkpoint: Checkpoint, folder: Path, form: MLXForm, overwrite: bool) -> None:
    """Refuse what can be refused before the first byte; see `hf.check_outputs`."""
    hf.check_outputs(checkpoint, folder, overwrite, plan_tensors(checkpoint.specs(), form))


def write_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    card: str,
    form: MLXForm,
    *,
    n_threads: int,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Write an MLX folder; it appears under its name when it is whole.

    Args:
        checkpoint: the model, a base or a view of one.
        folder: the result.
        card: text of the model card (`README.md`).
        form: how it is stored.
        n_threads: worker threads; each holds some fifteen megabytes.
        overwrite: replace an older checkpoint folder of that name.
        allow_nonfinite: go on although a weight is NaN or infinite, or too large for the dtype.
        advance: told of bytes written, out of the sum over `plan_tensors`.

    Raises:
        CheckpointError: a weight is NaN or infinite, or too large for the dtype.
        OutputError: the folder cannot be written. Nothing half-written stays in either case.
    """
    specs = checkpoint.specs()
    with hf.checkpoint_folder(
        checkpoint,
        folder,
        card,
        plan_tensors(specs, form),
        overwrite=overwrite,
        config_extra=mlx_config(checkpoint.config, form),
        framework="mlx",
    ) as writer:
        tasks = _tasks(checkpoint, form, writer, allow_nonfinite)
        run_tasks(tasks, n_threads=n_threads, advance=advance)


def _part(name: str, part: str) -> str:
    """The name of a part of a matrix; `name` may also be a source, which need not be a name."""
    return f"{name.removesuffix('.weight')}.{part}"


def _tasks(
    checkpoint: Checkpoint, form: MLXForm, writer: hf.TensorWriter, allow_nonfinite: bool
) -> Iterator[Callable[[], int]]:
    for group in hf.by_source(checkpoint.specs().values()):
        for start, stop in chunks(group[0]):
            yield lambda g=group, a=start, b=stop: _write(
                checkpoint, g, form, writer, a, b, allow_nonfinite
            )


def _write(
    checkpoint: Checkpoint,
    group: Sequence[TensorSpec],
    form: MLXForm,
    writer: hf.TensorWriter,
    start: int,
    stop: int,
    allow_nonfinite: bool,
) -> int:
    spec = group[0]
    dtype = form.of(spec)
    rows = checkpoint.read(spec.name, start, stop)
    if not allow_nonfinite:
        finite.check(rows, spec, start)
    if dtype != spec.dtype:
        rows = as_stored(as_floats(rows), dtype)
        if not allow_nonfinite:
            _check_range(rows, spec, dtype)
    if len(spec.shape) != 2:
        return sum(writer.put(s.name, rows, start) for s in group)
    packed, scales, biases = quantize_affine(rows, form.settings)
    parts = {
        "weight": packed,
        "scales": as_stored(scales, dtype),
        "biases": as_stored(biases, dtype),
    }
    return sum(
        writer.put(_part(s.name, p), array, start) for s in group for p, array in parts.items()
    )


def _check_range(rows: np.ndarray, spec: TensorSpec, dtype: str) -> None:
    if not np.isfinite(as_floats(rows)).all():
        raise CheckpointError(
            f"tensor {spec.source} has values too large for {dtype}; "
            "add --dtype bfloat16 or float32."
        )
