"""From what the user calls a base to a folder: a path, the built-in base, a hub id, or a GGUF.

Of a hub repository only the files that up-scaling and export need are fetched: never pickles,
never other formats. The small files come first, so that a model of an unknown kind is refused
before gigabytes are downloaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dus_edge.checkpoint.builtin import BUILTIN, model_dir
from dus_edge.checkpoint.card import read_licence
from dus_edge.checkpoint.contained import check_small_files
from dus_edge.checkpoint.hub.fetch import from_hub
from dus_edge.checkpoint.names import ADAPTER_CONFIG, CONFIG, OLLAMA
from dus_edge.checkpoint.spec import Source
from dus_edge.errors import CheckpointError, UsageError

if TYPE_CHECKING:  # this imports numpy
    from dus_edge.checkpoint.gguf.source import Wanted

"""The built-in base's name on the command line."""

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@(\w[\w./-]*))?")


Progress = Callable[[str], None]


def resolve_base(
    base: str,
    *,
    weights: bool = True,
    cache_dir: Path | None = None,
    progress: Progress = lambda line: None,
    on_config: Callable[[Path], None] | None = None,
    tokenizer: Wanted = "always",
) -> Source:
    """Find a base checkpoint, fetching what is missing of it.

    Args:
        base: a folder, ``pico`` (the built-in base), ``org/name[@revision]`` on the hub, a GGUF
            file, or ``ollama:`` and a model of Ollama's. An existing folder wins over a hub id of
            the same spelling, and a folder ``pico`` with a checkpoint in it over the built-in base.
        weights: whether the weights are wanted; without them the small files still come.
        cache_dir: the hub cache; None means the hub client's own default.
        progress: called with one line per file that is fetched.
        on_config: called once with the folder, when its small files are there and before any
            weight is fetched; what it raises passes through.
        tokenizer: of a GGUF, whether its tokenizer is wanted.

    Raises:
        UsageError: no such folder, repository or revision.
        CheckpointError: no config.json, a shard missing, an index that points outside, a damaged
            GGUF.
        UnsupportedError: no safetensors weights, a GGUF of a kind that is not known.
        OutputError: the cache cannot be written, or the disk is too small.
        DusEdgeError: gated, unreachable, offline and not cached, or broken off on the way.
    """
    folder = _as_path(base)
    if base == BUILTIN and not _exists(folder / CONFIG):
        source = _builtin()
    elif base and _exists(folder, Path.is_dir):
        source = _local(base, folder)
    elif (found := _gguf(base, folder, tokenizer)) is not None:
        source = found
    else:
        repo, revision = parse_hub_id(base)
        return from_hub(base, repo, revision, weights, cache_dir, progress, on_config)
    if on_config is not None:
        on_config(source.folder)
    return source


def _gguf(base: str, path: Path, tokenizer: Wanted) -> Source | None:
    """A GGUF as a source, None where a base is none."""
    if not base.startswith(OLLAMA) and not (base and _exists(path, Path.is_file)):
        return None
    from dus_edge.checkpoint.gguf.source import gguf_path, gguf_source

    file = gguf_path(base)
    return None if file is None else gguf_source(base, file, tokenizer)


def parse_hub_id(base: str) -> tuple[str, str | None]:
    """Split ``org/name[@revision]``; the revision is None if it is not given.

    Raises:
        UsageError: it is a path to nothing, to a file, or neither a path nor an id.
    """
    path = _as_path(base)
    if base and _exists(path):
        raise UsageError(
            f"{base} is a file, and a base is a folder with {CONFIG} and safetensors weights, or a "
            "GGUF file."
        )
    if base.endswith(".gguf"):
        raise UsageError(f"There is no folder or file {base}.")
    if _looks_like_path(base):
        raise UsageError(f"There is no folder {base}.")
    found = _HUB_ID.fullmatch(base)
    if found is None or ".." in base or "--" in found[1] or len(found[1]) > 96:
        raise UsageError(
            f"There is no folder {base!r}, and that is not of the form org/name or "
            f"org/name@revision; the built-in base is called {BUILTIN}."
        )
    return found[1], found[2]


def _looks_like_path(base: str) -> bool:
    return (
        base.startswith((".", "~", os.sep))
        or base.endswith((os.sep, ".gguf", ".safetensors", ".json", ".bin"))
        or base.partition("@")[0].count(os.sep) > 1
    )


def _as_path(base: str) -> Path:
    try:
        return Path(base).expanduser()
    except RuntimeError:  # ~someone who is not there
        return Path(base)


def _exists(path: Path, test: Callable[[Path], bool] = Path.exists) -> bool:
    try:
        return test(path)
    except (OSError, ValueError):  # a name too long for the file system, a NUL
        return False


def _builtin() -> Source:
    folder = model_dir()
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"The built-in base is not in this installation ({folder}); reinstall dus-edge."
        )
    return Source(folder, label=BUILTIN, name=BUILTIN, licence=read_licence(folder))


def _local(base: str, folder: Path) -> Source:
    if not _exists(folder / CONFIG):
        hint = ""
        if _exists(folder / ADAPTER_CONFIG):
            hint = "; it is an adapter, name its base first: dus-edge merge BASE ADAPTER"
        elif files := sorted(folder.glob("*.gguf")):
            hint = f"; name the GGUF file itself, {files[0]}"
        elif _HUB_ID.fullmatch(base):
            hint = "; a folder wins over the hub's model of the same name, rename one to get that"
        raise CheckpointError(f"The folder {base} has no {CONFIG}{hint}.")
    check_small_files(folder)
    repo, commit = snapshot_origin(folder)
    name = repo.rpartition("/")[2] if repo else folder.resolve().name
    return Source(folder, base, name or "model", repo, commit, read_licence(folder))


def snapshot_origin(folder: Path) -> tuple[str | None, str | None]:
    """Repository and commit of a folder inside a hub cache, else ``(None, None)``."""
    *_, repo, snapshots, commit = ("", "", "", *folder.resolve().parts)
    if snapshots != "snapshots" or not repo.startswith("models--"):
        return None, None
    return repo.removeprefix("models--").replace("--", "/"), commit
