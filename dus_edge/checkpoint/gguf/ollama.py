"""The weights of a model in Ollama's folder, found by its name; the server is not asked.

Layout (Ollama's ``types/model/name.go``, ``manifest/paths.go``): ``manifests/HOST/NAMESPACE/MODEL/
TAG`` is JSON whose layers name files of ``blobs/`` by their SHA-256.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dus_edge.checkpoint.names import OLLAMA
from dus_edge.errors import CheckpointError, UnsupportedError, UsageError
from dus_edge.jsonfile import read_object

_HOST, _NAMESPACE, _TAG = "registry.ollama.ai", "library", "latest"
_PART = re.compile(r"[A-Za-z0-9_][\w.-]{0,255}(:\d{1,5})?", re.ASCII)
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_MEDIA = "application/vnd.ollama.image."
#: Layers that a model's weights are not all without.
_MORE = {
    "adapter": "has a LoRA adapter on it, which a GGUF of its base does not have",
    "projector": "reads images too; only models of text can be up-scaled",
    "tensor": "holds no GGUF; name the checkpoint that it was made from",
}
#: Where the service that Ollama's installer sets up keeps its models.
_SERVICE = Path("/usr/share/ollama/.ollama/models")


def find_ollama(name: str) -> Path:
    """The GGUF file of a model.

    Args:
        name: as ``ollama list`` has it, without `OLLAMA` before it; the tag is ``latest`` if none
            is given.

    Raises:
        UsageError: there is no such model, or no such name.
        CheckpointError: its manifest is damaged, or the file is gone.
        UnsupportedError: its weights are more, or other, than one GGUF.
    """
    host, namespace, model, tag = _parts(name)
    folders = list(_folders())
    for folder in folders:
        manifest = folder / "manifests" / host / namespace / model / tag
        if manifest.is_file():
            return _weights(folder, manifest, name)
    tags = sorted({p.name for f in folders for p in _tags(f, host, namespace, model)})
    there = f"; there is {', '.join(f'{model}:{t}' for t in tags[:5])}" if tags else ""
    raise UsageError(
        f"Ollama has no model {model}:{tag} in {' or '.join(map(str, folders))}{there}; `ollama "
        "list` shows those it has, and OLLAMA_MODELS says where they lie."
    )


def short_name(name: str) -> str:
    """What such a model is called: its name, and its tag if that says something."""
    _, _, model, tag = _parts(name)
    return model if tag == _TAG else f"{model}-{tag}"


def _parts(name: str) -> tuple[str, str, str, str]:
    """Host, namespace, model and tag."""
    path, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:
        path, tag = name, _TAG
    parts = path.split("/")
    full = [_HOST, _NAMESPACE][: max(0, 3 - len(parts))] + parts
    if len(full) != 3 or not all(_PART.fullmatch(part) for part in (*full, tag)):
        raise UsageError(
            f"{OLLAMA}{name} is no name of a model; one is like {OLLAMA}solar or "
            f"{OLLAMA}solar:10.7b."
        )
    return full[0], full[1], full[2], tag


def _folders() -> Iterator[Path]:
    if named := os.environ.get("OLLAMA_MODELS"):
        yield Path(named).expanduser()
        return
    yield Path.home() / ".ollama" / "models"
    if _SERVICE.is_dir():
        yield _SERVICE


def _tags(folder: Path, host: str, namespace: str, model: str) -> list[Path]:
    try:
        return list((folder / "manifests" / host / namespace / model).iterdir())
    except OSError:
        return []


def _weights(folder: Path, manifest: Path, name: str) -> Path:
    layers = read_object(manifest, missing=f"`ollama pull {name}` brings it back").get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise CheckpointError(f"{manifest} lists no layers; `ollama pull {name}` mends it.")
    for kind, why in _MORE.items():
        if any(layer.get("mediaType") == _MEDIA + kind for layer in layers):
            raise UnsupportedError(f"Ollama's model {name} {why}.")
    models = [layer for layer in layers if layer.get("mediaType") == f"{_MEDIA}model"]
    if len(models) != 1:
        raise UnsupportedError(
            f"{manifest} names {len(models)} files of weights; one GGUF is needed."
        )
    blob = folder / "blobs" / _blob(models[0], manifest)
    if not blob.is_file():
        raise CheckpointError(
            f"{blob}, the weights of Ollama's model {name}, is not there; `ollama pull {name}` "
            "brings it back."
        )
    return blob


def _blob(layer: Mapping[str, Any], manifest: Path) -> str:
    found = _DIGEST.fullmatch(str(layer.get("digest")))
    if found is None:
        raise CheckpointError(f"{manifest}: {layer.get('digest')!r} is no digest; pull it again.")
    return f"sha256-{found[1]}"
