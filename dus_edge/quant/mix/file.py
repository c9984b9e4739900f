"""A mix kept in a file, to be used again: JSON of our own, or any GGUF, by its tensors' types."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dus_edge.checkpoint.gguf.file import GGUFModel, is_gguf
from dus_edge.checkpoint.gguf.origin import MIX_PREFIX
from dus_edge.errors import CheckpointError, UnsupportedError
from dus_edge.files import write_text
from dus_edge.jsonfile import read_object
from dus_edge.quant.mix.matrices import Matrix
from dus_edge.quant.recipe import Preset, is_matrix
from dus_edge.quant.types import TYPES, QuantType

#: What a file says it is.
FORMAT_KEY, MIX_FORMAT = "format", "dus-edge mix 1"
#: What is said of where a mix comes from: the goal that was asked for, the divergence expected in
#: nats per token, and of which text and how many tokens that is the expectation.
SAID: Mapping[str, type] = {"goal": str, "expected_kl": float, "text": str, "tokens": int}
#: The ending of a mix's file. Not ``.json``: Ollama takes all of these in a folder for a model's.
MIX_SUFFIX = ".mix"


def mix_path(gguf: Path) -> Path:
    """Where the mix of a GGUF file is kept: beside it."""
    return gguf.with_suffix(MIX_SUFFIX)


def write_mix(path: Path, preset: Preset) -> None:
    """Write the types of a mix, whole or not at all; a file that is there is replaced.

    Raises:
        OutputError: it cannot be written.
    """
    types = {name: kind.name for name, kind in preset.chosen.items()}
    found = {FORMAT_KEY: MIX_FORMAT, "said": dict(preset.said), "types": types}
    write_text(path, json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_mix(
    path: Path, matrices: Sequence[Matrix]
) -> tuple[dict[str, QuantType], dict[str, str | int | float]]:
    """The mix in a file, for a model: the type of each matrix, and what the file says of it.

    Args:
        path: what `write_mix` wrote, or a GGUF file of whatever origin.
        matrices: of the model; the file must speak of just these.

    Raises:
        CheckpointError: it is missing, damaged, or of another model.
        UnsupportedError: it has a type that is not written here.
    """
    path = path.expanduser()
    said, types = _of_gguf(path) if is_gguf(path) else _of_json(path)
    named = {m.name: m for m in matrices}
    for other, verb in (
        (sorted(named.keys() - types.keys()), "does not speak of"),
        (sorted(types.keys() - named.keys()), "speaks of"),
    ):
        if other:
            raise CheckpointError(
                f"{path} is the mix of another model: it {verb} {other[0]}; name one of a model of "
                f"this shape and depth."
            )
    chosen: dict[str, QuantType] = {}
    for matrix in matrices:
        kind = TYPES.get(types[matrix.name])
        if kind is None:
            raise UnsupportedError(
                f"{path}: {matrix.name} is of type {types[matrix.name]}, which is not written "
                f"here; types are {', '.join(TYPES)}."
            )
        if matrix.n_cols % kind.block_weights:
            raise CheckpointError(
                f"{path}: {matrix.name} cannot be {kind.name}, whose blocks of "
                f"{kind.block_weights} do not divide its rows of {matrix.n_cols:,}; name a mix of "
                "a model of this shape."
            )
        chosen[matrix.name] = kind
    return chosen, said


def _of_json(path: Path) -> tuple[dict[str, str | int | float], Mapping[str, str]]:
    """Origin and types of a file of ours."""
    found = read_object(path, missing="name a mix that dus-edge gguf wrote, or a GGUF")
    types, said = found.get("types"), found.get("said", {})
    if found.get(FORMAT_KEY) != MIX_FORMAT or not isinstance(types, dict):
        raise CheckpointError(f"{path} is no mix; name one that dus-edge gguf wrote, or a GGUF.")
    if wrong := [key for key, kind in types.items() if not isinstance(kind, str)]:
        raise CheckpointError(f"{path}: the type of {wrong[0]} is {types[wrong[0]]!r}, not a name.")
    return _known(said if isinstance(said, dict) else {}), types


def _of_gguf(path: Path) -> tuple[dict[str, str | int | float], Mapping[str, str]]:
    model = GGUFModel(path)
    said = {
        key.removeprefix(MIX_PREFIX): value
        for key, value in model.values.items()
        if key.startswith(MIX_PREFIX)
    }
    types = {t.name: t.kind.name for t in model.tensors.values() if is_matrix(t.name, t.shape)}
    return _known(said), types


def _known(said: Mapping[str, Any]) -> dict[str, str | int | float]:
    """What of a mix's origin is kept: what `SAID` has, of the types there."""
    return {
        key: said[key]
        for key, kind in SAID.items()
        if type(said.get(key)) is kind and _is_small(said[key])
    }


def _is_small(value: str | int | float) -> bool:
    """Whether a GGUF's key can hold it."""
    return len(value) < 500 if isinstance(value, str) else 0 <= value < 1 << 31
