"""Sensitivities: what storing each tensor in each type is expected to cost, and their file.

The cost is a Kullback-Leibler divergence: of the model whose one tensor is stored so from the
model as it is, in nats per token. Small costs add up over tensors, so a mix of types is judged
by a sum. The file is JSON and names the model by its weights, wherever they lie.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.errors import CheckpointError
from dus_edge.files import write_text
from dus_edge.jsonfile import MAX_BYTES, parse_strict, read_regular
from dus_edge.quant.types import TYPES

#: What a file says it is.
FORMAT = "dus-edge sensitivity 1"


@dataclass(frozen=True)
class Sensitivity:
    """Expected divergence by tensor and type.

    Attributes:
        identity: of the model's weights, see `weights_identity`.
        n_tokens: tokens of text that it was computed on.
        text: what the text is called.
        kl: GGUF tensor name → type name such as ``Q4_K`` → nats per token when that tensor alone
            is stored so.
    """

    identity: str
    n_tokens: int
    text: str
    kl: Mapping[str, Mapping[str, float]]


def weights_identity(checkpoint: Checkpoint) -> str:
    """A digest of a model's tensors: names, dtypes, shapes, and the first and last row of each.

    It is the same wherever and whenever the weights are stored, and another one for another plan,
    another adapter or after training. Two rows of a tensor are read, not all its bytes.
    """
    digest = hashlib.sha256()
    for spec in checkpoint.specs().values():
        digest.update(f"{spec.name} {spec.dtype} {spec.shape}\n".encode())
        for start in sorted({0, spec.n_rows - 1}):
            rows = checkpoint.read(spec.name, start, start + 1)
            digest.update(np.ascontiguousarray(rows).tobytes())
    return digest.hexdigest()


def write_sensitivity(path: Path, sensitivity: Sensitivity) -> None:
    """Write a file, whole or not at all; one that is there is replaced.

    Raises:
        OutputError: it cannot be written.
    """
    found = {
        "format": FORMAT,
        "unit": "nats per token",
        "identity": sensitivity.identity,
        "n_tokens": sensitivity.n_tokens,
        "text": sensitivity.text,
        "kl": {name: dict(costs) for name, costs in sensitivity.kl.items()},
    }
    write_text(path, json.dumps(found, indent=1, allow_nan=False) + "\n")


def read_sensitivity(path: Path, identity: str | None = None) -> Sensitivity:
    """Read a file.

    Args:
        path: the file.
        identity: of the model that it shall be of (`weights_identity`); None takes any.

    Raises:
        CheckpointError: it is missing, damaged, of another model, or names a type that this
            version does not know.
    """
    remedy = "compute one with dus-edge sensitivity"
    try:
        found = parse_strict(read_regular(path, MAX_BYTES).decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {remedy}.") from None
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} cannot be read as JSON ({e}); {remedy}.") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no sensitivity file; {remedy}.")
    try:
        read = Sensitivity(
            _text(found, "identity"), _count(found, "n_tokens"), _text(found, "text"), _costs(found)
        )
    except ValueError as e:
        raise CheckpointError(f"{path} is damaged: {e}; {remedy}.") from None
    if identity is not None and read.identity != identity:
        raise CheckpointError(
            f"{path} is of another model or another plan: its weights are not these; {remedy} "
            "for this model."
        )
    return read


def _text(found: Mapping[str, Any], field: str) -> str:
    value = found.get(field)
    if not isinstance(value, str):
        raise ValueError(f"{field} is no text")
    return value


def _count(found: Mapping[str, Any], field: str) -> int:
    value = found.get(field)
    if type(value) is not int or value < 1:
        raise ValueError(f"{field} is no positive whole number")
    return value


def _costs(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    kl = found.get("kl")
    if not isinstance(kl, dict) or not kl:
        raise ValueError("kl holds no tensors")
    return {name: _costs_of(name, costs) for name, costs in kl.items()}


def _costs_of(name: str, costs: Any) -> dict[str, float]:
    """One tensor's costs by type."""
    if not isinstance(costs, dict) or not costs:
        raise ValueError(f"kl of {name} holds no types")
    for kind, cost in costs.items():
        if kind not in TYPES:
            raise ValueError(f"kl of {name} names the type {kind!r}, which is not known")
        number = isinstance(cost, (int, float)) and not isinstance(cost, bool)
        if not number or not math.isfinite(cost) or cost < 0:
            raise ValueError(f"kl of {name} as {kind} is no number from 0 on")
    return {kind: float(cost) for kind, cost in costs.items()}
