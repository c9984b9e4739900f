"""The model that is tuned: opened whole or in four bits, and read again as a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dus_edge.checkpoint.names import ADAPTER_CONFIG
from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.errors import CheckpointError
from dus_edge.run.folders import NO_CODE, NO_CODE_WEIGHTS
from dus_edge.train.heal.trained import TrainedCheckpoint, in_stored_dtype
from dus_edge.train.tune.settings import TuneSettings


def open_tokenizer(folder: Path) -> Any:
    """A checkpoint's fast tokenizer, with something to pad by.

    Raises:
        CheckpointError: transformers cannot read it.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **NO_CODE)
    except Exception as e:  # of any kind
        raise CheckpointError(f"{folder}: transformers cannot read the tokenizer ({e}).") from None
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"{folder}: the tokenizer has no fast form, which says where a token stands in the "
            "text; put a tokenizer.json into the folder."
        )
    if tokenizer.pad_token is None:
        # Padding is masked out and learnt by nobody; what it is called does not matter.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def open_trainable(checkpoint: Checkpoint, settings: TuneSettings) -> Any:
    """A checkpoint folder as transformers' model, ready to be trained.

    In float32 where its own weights learn or a CPU computes, else in bfloat16; for QLoRA in NF4
    with double quantization.
    """
    import transformers

    dtype = torch.float32
    if settings.is_adapter and settings.device == "cuda":
        dtype = torch.bfloat16
    more: dict[str, Any] = {}
    if settings.method == "qlora":
        more["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if settings.method == "qlora" or settings.device != "cpu":
        more["device_map"] = {"": settings.device}
    kind = getattr(transformers, checkpoint.config.architecture)
    model = kind.from_pretrained(checkpoint.source.folder, dtype=dtype, **more, **NO_CODE_WEIGHTS)
    model.config.use_cache = False
    for module in model.modules():
        # On some CPUs bitsandbytes repacks a layer in place when it first runs without gradients:
        # its scales are rounded to bfloat16, and no gradient goes through it any more.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def adapter_config(settings: TuneSettings) -> Any:
    """LoRA on all linear layers but the head; None for full training."""
    if not settings.is_adapter:
        return None
    import peft

    return peft.LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        lora_dropout=0.0,
        bias="none",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def round_to_stored(model: Any, checkpoint: Checkpoint) -> None:
    """Round a model's weights to the dtypes that they will be written in.

    What is measured then is what is written.
    """
    weights = model.state_dict()
    with torch.no_grad():
        for spec in checkpoint.specs().values():
            weights[spec.name].copy_(in_stored_dtype(weights[spec.name], spec))


def tuned_checkpoint(base: Checkpoint, model: Any) -> TrainedCheckpoint:
    """A base checkpoint with the weights of a model in memory: same names, shapes and dtypes."""
    weights = model.state_dict()
    stored = {name: in_stored_dtype(weights[name], spec) for name, spec in base.specs().items()}
    return TrainedCheckpoint(base, stored)


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Write peft's two files of an adapter into a folder.

    Args:
        model: peft's.
        folder: there already.
        base: what the adapter's base is called; a folder's own place would say too much.
    """
    # Embeddings are not trained; peft would look for the base on the hub to see whether they are.
    model.save_pretrained(folder, save_embedding_layers=False)
    path = folder / ADAPTER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    # A set in peft: in another order each time.
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    # peft writes a card of its own, which says nothing.
    (folder / "README.md").unlink(missing_ok=True)
