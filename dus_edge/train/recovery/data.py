"""The text of `heal`: tokenized once, held out from, and mixed by weight."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dus_edge.checkpoint.card import read_licence
from dus_edge.errors import UsageError
from dus_edge.jsonfile import find_object
from dus_edge.progress import progress
from dus_edge.text.documents import read_documents
from dus_edge.text.tokenizers import load_tokenizer
from dus_edge.train.heal.parallel import World
from dus_edge.train.packing.batches import Batch, Batches, heldout_batches
from dus_edge.train.packing.tokens import Stream, read_streams, split_heldout, write_tokens
from dus_edge.train.recovery.options import HealOptions, TextPart
from dus_edge.upscale.model import Model

#: No more than this share of a text is held out.
_MOST_HELD_OUT = 0.2


@dataclass(frozen=True)
class HealData:
    """What a run trains and is measured on.

    Attributes:
        batches: to train on.
        heldout: windows with their languages.
        streams: that are trained on.
        weights: of each, adding up to 1.
        held: streams that are held out.
    """

    batches: Batches
    heldout: list[tuple[str, Batch]]
    streams: list[Stream]
    weights: list[float]
    held: list[Stream]


def text_digest(options: HealOptions) -> str:
    """Digest of all texts of a run; changed text is another run."""
    digest = hashlib.sha256()
    for paths in _groups(options):
        for document in read_documents(paths, options.field):
            digest.update(document.language.encode() + b"\0" + document.text.encode() + b"\0")
    return digest.hexdigest()


def licence_of(part: TextPart) -> str:
    """What is known of a text's licence: what was said, or what its folder says."""
    if part.licence:
        return part.licence
    return (read_licence(part.path) if part.path.is_dir() else None) or "unknown"


def prepare_data(model: Model, options: HealOptions, work: Path, world: World) -> HealData:
    """Tokenize what is not yet, hold out, and lay out the run's batches.

    Raises:
        UsageError: a text is missing, empty or too short.
    """
    sources = [
        *((part, False) for part in options.texts),
        *((part, True) for part in options.replay),
    ]
    if world.first:
        tokenizer = load_tokenizer(model.source.folder, model.config.vocab_size)
        end = _end_id(model)
        for number, paths in enumerate(_groups(options)):
            documents = read_documents(paths, options.field)
            total = sum(len(d.text) for d in documents)
            with progress("Reading text", total, unit="characters") as tick:
                write_tokens(documents, tokenizer, end, work / f"text-{number}", tick)
    world.wait()
    kept: list[Stream] = []
    held: list[Stream] = []
    weights: list[float] = []
    rest = 1.0 - sum(part.share or 0.0 for part in options.replay)
    plain = [read_streams(work / f"text-{i}", p.path.name) for i, (p, _) in enumerate(sources)]
    n_plain = sum(s.n_tokens for i, found in enumerate(plain) if not sources[i][1] for s in found)
    for (part, is_replay), found in zip(sources, plain, strict=True):
        n_own = sum(s.n_tokens for s in found)
        share = (part.share or 0.0) if is_replay else rest * n_own / n_plain
        train, out = found, []
        if not options.heldout_texts:
            train, out = split_heldout(
                found, int(options.heldout_tokens * share) or 1, _MOST_HELD_OUT, options.seed
            )
        kept += train
        held += out
        weights += [share * s.n_tokens / n_own for s in found]
    for number in range(len(sources), len(sources) + len(options.heldout_texts)):
        name = options.heldout_texts[number - len(sources)].name
        held += read_streams(work / f"text-{number}", name)
    if not held:
        raise UsageError(
            f"{options.texts[0].path}: the text is one document, so none can be held out; name "
            "another with --heldout-text."
        )
    batches = Batches(kept, weights, options.length, options.batch, options.seed)
    return HealData(batches, heldout_batches(held, options.length, 1), kept, weights, held)


def _groups(options: HealOptions) -> list[Sequence[Path]]:
    """The paths of each token folder."""
    parts = [*options.texts, *options.replay]
    return [*([part.path] for part in parts), *([path] for path in options.heldout_texts)]


def _end_id(model: Model) -> int | None:
    """The token that ends a text: the first that the configuration names."""
    raw: Any = model.config.raw.get("eos_token_id")
    if raw is None:
        raw = (find_object(model.source.folder / "generation_config.json") or {}).get(
            "eos_token_id"
        )
    first = raw[0] if isinstance(raw, list) and raw else raw
    return first if type(first) is int and 0 <= first < model.config.vocab_size else None
