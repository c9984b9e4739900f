"""The small files of a model with an adapter: what the merged folder will hold, made ahead.

An export that merges on the way reads tokenizer, chat template, card and licence from here, so that
it says what an export of the merged folder says.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from string import Template
from weakref import finalize

from dus_edge import __version__
from dus_edge.adapter.adapter import Adapter
from dus_edge.checkpoint.card import CARD, languages, read_licence, tags
from dus_edge.checkpoint.config import ModelConfig
from dus_edge.checkpoint.contained import CHAT_TEMPLATES, carried_files
from dus_edge.checkpoint.names import CONFIG, TOKENIZER_FILES
from dus_edge.checkpoint.resolve import parse_hub_id
from dus_edge.checkpoint.spec import Source
from dus_edge.data import read_text
from dus_edge.errors import CheckpointError, OutputError, UsageError
from dus_edge.jsonfile import read_object

#: Files of which one makes a tokenizer.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def own_tokenizer(adapter: Adapter) -> bool:
    """Whether an adapter's folder has a tokenizer, which then counts instead of the base's.

    Raises:
        CheckpointError: it has parts of one, such as a chat template alone.
    """
    there = [n for n in (*TOKENIZER_FILES, CHAT_TEMPLATES) if (adapter.folder / n).exists()]
    if there and not set(there) & set(_TOKENIZERS):
        raise CheckpointError(
            f"{adapter.folder} has {there[0]} and no tokenizer; put the tokenizer's other files "
            "beside it, or take it out to go on with the base's."
        )
    return bool(there)


def check_tokenizer(adapter: Adapter, config: ModelConfig) -> None:
    """See that an adapter's own tokenizer knows no token beyond the base's embedding.

    Raises:
        CheckpointError: tokens were added in training, and the base has no rows for them.
    """
    path = adapter.folder / "tokenizer.json"
    if not own_tokenizer(adapter) or not path.is_file():
        return
    raw = read_object(path)
    model, added = raw.get("model"), raw.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocab.values()) if isinstance(vocab, dict) else [len(vocab or ()) - 1]
    ids += [t.get("id") for t in added or () if isinstance(t, dict)]
    highest = max((i for i in ids if isinstance(i, int)), default=-1)
    if highest >= config.vocab_size:
        raise CheckpointError(
            f"{path} has a token {highest}, but the base's embedding has {config.vocab_size} rows; "
            "bring the base to that size first, with transformers' resize_token_embeddings and "
            "save_pretrained."
        )


def with_adapter(source: Source, adapter: Adapter, *, of_base: bool) -> Source:
    """A source whose small files are those of the merged model.

    Args:
        source: the base.
        adapter: what is merged.
        of_base: whether into the base; if not, the base's own name, card and licence stay, and
            only the tokenizer may be the adapter's.

    Returns:
        a source with a temporary folder, which is gone when the adapter is.
    """
    folder = _new_folder(adapter)
    try:
        shutil.copyfile(source.folder / CONFIG, folder / CONFIG)
        own = own_tokenizer(adapter)
        for name in carried_files(source.folder):
            if not (own and _is_tokenizer(name)):
                _copy(source.folder, folder, name)
        if own:
            for name in filter(_is_tokenizer, carried_files(adapter.folder)):
                _copy(adapter.folder, folder, name)
        if of_base:
            (folder / CARD).write_text(_card(source, adapter), encoding="utf-8")
        elif (source.folder / CARD).is_file():
            _copy(source.folder, folder, Path(CARD))
    except OSError as e:
        raise OutputError(f"{folder} cannot be written ({e.strerror or e}).") from None
    found = replace(source, folder=folder, weights=source.weights_folder)
    if not of_base:
        return found
    return replace(
        found,
        label=f"{source.label} with {adapter.folder}",
        name=merged_name(source.name, adapter),
        repo_id=None,
        revision=None,
        licence=read_licence(folder),
    )


def merged_name(base: str, adapter: Adapter) -> str:
    """What a base with an adapter is called: ``pico-sft``."""
    return f"{base}-{adapter.name}"


def _new_folder(adapter: Adapter) -> Path:
    try:
        folder = Path(tempfile.mkdtemp(prefix="dus-edge-adapter-"))
    except OSError as e:
        raise OutputError(
            f"No temporary folder can be made ({e.strerror or e}); set TMPDIR to another place."
        ) from None
    finalize(adapter, shutil.rmtree, folder, ignore_errors=True)
    return folder


def _is_tokenizer(name: Path) -> bool:
    return name.name in TOKENIZER_FILES or CHAT_TEMPLATES in name.parts


def _copy(source: Path, folder: Path, name: Path) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    shutil.copyfile(source / name, folder / name)


def _card(source: Source, adapter: Adapter) -> str:
    """The merged model's card: base, adapter, licences."""
    base = source.repo_id or source.name
    theirs = read_licence(adapter.folder)
    front = {
        "license": source.licence or "unknown",
        "base_model": source.repo_id,
        "language": languages(source.folder),
        "tags": _tags(source.folder),
    }
    if source.licence and theirs not in (None, source.licence):
        front |= {"license": "other", "license_name": f"{source.licence}, {theirs}"}
    config = adapter.config
    return Template(read_text("merged_card.md")).substitute(
        front="".join(f"{k}: {json.dumps(v)}\n" for k, v in front.items() if v),
        title=merged_name(source.name, adapter),
        base=base + (f" at revision `{source.revision}`" if source.revision else ""),
        adapter=adapter.name,
        # Of a path only the end: the rest is of somebody's machine.
        trained_on=(
            f",\nwhich says that it was trained on `{_public(config.base)}`" if config.base else ""
        ),
        n_added=len(adapter.added),
        rank=_ranks(adapter),
        n_replaced=len(adapter.replaced),
        licence=(
            f"The base's licence is `{source.licence}`."
            if source.licence
            else "The base does not say its licence: ask its authors before you pass this on."
        ),
        adapter_licence=(
            f"The adapter's is `{theirs}`; both hold."
            if theirs
            else "The adapter does not say one of its own."
        ),
        version=__version__,
    )


def _public(base: str) -> str:
    """A hub id as it is, and the last part of a path."""
    try:
        return parse_hub_id(base)[0]
    except UsageError:
        return Path(base).name


def _tags(folder: Path) -> Sequence[str]:
    return [*(t for t in tags(folder) if t != "lora"), "lora"]


def _ranks(adapter: Adapter) -> str:
    ranks = sorted({pair.a.shape[0] for pair in adapter.added.values()})
    if not ranks:
        return "0"
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
