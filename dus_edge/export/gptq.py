"""The GPTQ sink: a checkpoint folder in the v1 layout that AutoGPTQ made standard.

Sizes are known from the shapes alone; codes come from files that a calibration left, one a layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from dus_edge.checkpoint.names import QUANTIZE_CONFIG
from dus_edge.checkpoint.spec import Checkpoint, TensorSpec
from dus_edge.export import hf
from dus_edge.export.chunks import chunks
from dus_edge.quant import gptq_format
from dus_edge.quant.gptq_format import GPTQSettings
from dus_edge.stream import run_tasks

_DTYPES = {"int32": "I32", "float16": "F16"}


def check_settings(checkpoint: Checkpoint, settings: GPTQSettings) -> None:
    """Refuse settings that a tensor's shape does not allow; see `GPTQSettings.check`."""
    is_linear = checkpoint.config.family.is_linear
    for spec in checkpoint.specs().values():
        if is_linear(spec.name):
            settings.check(spec.name, spec.shape)


def code_specs(spec: TensorSpec, settings: GPTQSettings) -> Iterator[TensorSpec]:
    """What stands in the folder for a matrix that becomes codes."""
    stem = spec.name.removesuffix(".weight")
    for part, (dtype, shape) in gptq_format.tensor_specs(spec.shape, settings).items():
        name = f"{stem}.{part}"
        yield TensorSpec(name, _DTYPES[dtype], shape, name)


def plan_tensors(checkpoint: Checkpoint, settings: GPTQSettings) -> list[TensorSpec]:
    """Every tensor of the folder; no weight is read.

    A tied head is written too: auto-gptq leaves head and embedding uninitialized without it, and
    says nothing. Other loaders tie the two as before.
    """
    planned = []
    family = checkpoint.config.family
    for spec in checkpoint.specs().values():
        planned += code_specs(spec, settings) if family.is_linear(spec.name) else [spec]
    if checkpoint.config.tied_head:
        embedding = checkpoint.specs()[family.name("embedding")]
        planned.append(replace(embedding, name=family.name("head")))
    return planned


def write_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    card: str,
    settings: GPTQSettings,
    layer_files: list[Path],
    *,
    n_threads: int,
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Write the folder; it appears under its name when it is whole.

    Args:
        checkpoint: the model that was quantized.
        folder: the result.
        card: text of the model card.
        settings: what the codes were made with.
        layer_files: safetensors files with the codes of all layers.
        n_threads: worker threads.
        overwrite: replace an older checkpoint folder of that name.
        advance: told of bytes written.
    """
    config = gptq_format.quantize_config(settings)
    is_linear = checkpoint.config.family.is_linear
    plain = [name for name in checkpoint.specs() if not is_linear(name)]
    with hf.checkpoint_folder(
        checkpoint,
        folder,
        card,
        plan_tensors(checkpoint, settings),
        overwrite=overwrite,
        config_extra={"quantization_config": config},
        extra_files={QUANTIZE_CONFIG: json.dumps(config, indent=2) + "\n"},
    ) as writer:
        tasks = (
            *hf.copy_tasks(checkpoint, plain, writer, allow_nonfinite=False),
            *_head_tasks(checkpoint, writer),
            *_code_tasks(layer_files, writer),
        )
        run_tasks(iter(tasks), n_threads=n_threads, advance=advance)


def _head_tasks(checkpoint: Checkpoint, writer: hf.TensorWriter) -> Iterator[Callable[[], int]]:
    if not checkpoint.config.tied_head:
        return
    family = checkpoint.config.family
    embedding, head = family.name("embedding"), family.name("head")
    for start, stop in chunks(checkpoint.specs()[embedding]):
        yield lambda a=start, b=stop: writer.put(head, checkpoint.read(embedding, a, b), a)


def _code_tasks(files: list[Path], writer: hf.TensorWriter) -> Iterator[Callable[[], int]]:
    from safetensors import safe_open

    def copy(path: Path) -> int:
        with safe_open(path, "np") as file:
            return sum(writer.put(name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118

    for path in files:
        yield lambda path=path: copy(path)
