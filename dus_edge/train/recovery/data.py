"""The text of `heal`: tokenized once, held out from, and mixed by weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dus_edge.calibrate.world import World
from dus_edge.checkpoint.card import read_licence
from dus_edge.checkpoint.hub.dataset import HubDataset, dataset_documents, find_dataset
from dus_edge.errors import UsageError
from dus_edge.jsonfile import find_object
from dus_edge.progress import progress
from dus_edge.text.documents import read_documents
from dus_edge.text.tokenizers import Tokenizer, load_tokenizer
from dus_edge.train.packing.batches import Batch, Batches, heldout_batches
from dus_edge.train.packing.tokens import (
    Stream,
    are_written,
    read_streams,
    split_heldout,
    write_tokens,
)
from dus_edge.train.recovery.options import HealOptions, TextPart
from dus_edge.upscale.model import Model, Say

#: No more than this share of a text is held out.
_MOST_HELD_OUT = 0.2


@dataclass(frozen=True)
class HealTexts:
    """The texts of a run, found and looked through once.

    Attributes:
        digest: of all of them; changed text is another run. A dataset stands there as its commit.
        datasets: by the number of their text.
    """

    digest: str
    datasets: Mapping[int, HubDataset]


@dataclass(frozen=True)
class HealData:
    """What a run trains and is measured on.

    Attributes:
        batches: to train on.
        heldout: windows with their languages.
        streams: that are trained on.
        weights: of each, adding up to 1.
        held: streams that are held out.
        licences: of the texts by their labels; ``unknown`` where nothing is said.
    """

    batches: Batches
    heldout: list[tuple[str, Batch]]
    streams: list[Stream]
    weights: list[float]
    held: list[Stream]
    licences: Mapping[str, str]


def find_texts(options: HealOptions, say: Say) -> HealTexts:
    """Look through all texts of a run; of datasets nothing but what they have is asked.

    Raises:
        UsageError: a text is missing, empty or damaged, or there is no such dataset.
    """
    digest = hashlib.sha256()
    datasets: dict[int, HubDataset] = {}
    for number, part in enumerate(_parts(options)):
        if part.dataset:
            found = datasets[number] = find_dataset(part.dataset, say, None)
            # Not by which revision it was asked for: the commit may be named to go on.
            which = (found.repo.id, found.repo.commit, part.dataset.config, part.dataset.split)
            what = [*which, options.field, _enough(part, options)]
            digest.update(json.dumps(what).encode())
        else:
            for document in read_documents([part.path], options.field):
                digest.update(document.language.encode() + b"\0" + document.text.encode() + b"\0")
    return HealTexts(digest.hexdigest(), datasets)


def _licence_of(part: TextPart, dataset: HubDataset | None) -> str:
    """What is known of a text's licence: what was said, or what its folder or card says."""
    if part.licence:
        return part.licence
    if dataset:
        return dataset.licence or "unknown"
    return (read_licence(part.path) if part.path.is_dir() else None) or "unknown"


def prepare_data(
    model: Model,
    options: HealOptions,
    texts: HealTexts | None,
    work: Path,
    world: World,
    say: Say,
) -> HealData:
    """Tokenize what is not yet, hold out, and lay out the run's batches.

    Args:
        model: whose tokenizer it is.
        options: as asked.
        texts: from `find_texts`; None in other processes than the first.
        work: folder of the run.
        world: the processes.
        say: takes lines for the user.

    Raises:
        UsageError: a text is missing, empty or too short.
    """
    parts = _parts(options)
    key = world.told(texts.digest[:12] if texts else "")
    folders = [work / f"text-{key}-{number}" for number in range(len(parts))]
    if texts:
        tokenizer = load_tokenizer(model.source.folder, model.config.vocab_size)
        for number, part in enumerate(parts):
            if not are_written(folders[number]):
                found = texts.datasets.get(number)
                _tokenize(part, found, options, tokenizer, _end_id(model), folders[number], say)
    world.wait()
    n_sources = len(options.texts) + len(options.replay)
    kept: list[Stream] = []
    held: list[Stream] = []
    weights: list[float] = []
    rest = 1.0 - sum(part.share or 0.0 for part in options.replay)
    found = [read_streams(f, p.label) for f, p in zip(folders, parts, strict=True)]
    n_plain = sum(s.n_tokens for streams in found[: len(options.texts)] for s in streams)
    for number, part in enumerate(parts[:n_sources]):
        streams, is_replay = found[number], number >= len(options.texts)
        n_own = sum(s.n_tokens for s in streams)
        share = (part.share or 0.0) if is_replay else rest * n_own / n_plain
        train, out = streams, []
        if not options.heldout_texts:
            train, out = split_heldout(
                streams, int(options.heldout_tokens * share) or 1, _MOST_HELD_OUT, options.seed
            )
        kept += train
        held += out
        weights += [share * s.n_tokens / n_own for s in streams]
    held += [s for streams in found[n_sources:] for s in streams]
    if not held:
        raise UsageError(
            f"{options.texts[0].path}: the text is one document, so none can be held out; name "
            "another with --heldout-text."
        )
    batches = Batches(kept, weights, options.length, options.batch, options.seed)
    datasets = texts.datasets if texts else {}
    licences = {p.label: _licence_of(p, datasets.get(i)) for i, p in enumerate(parts[:n_sources])}
    return HealData(
        batches, heldout_batches(held, options.length, 1), kept, weights, held, licences
    )


def _tokenize(
    part: TextPart,
    dataset: HubDataset | None,
    options: HealOptions,
    tokenizer: Tokenizer,
    end_id: int | None,
    folder: Path,
    say: Say,
) -> None:
    if dataset is None:
        documents = read_documents([part.path], options.field)
        total = sum(len(d.text) for d in documents)
        with progress("Reading text", total, unit="characters") as tick:
            write_tokens(documents, tokenizer, end_id, folder, tick)
        return
    enough = _enough(part, options)
    rows = dataset_documents(dataset, options.field, say)
    with progress("Reading text", enough, unit="tokens") as tick:
        write_tokens(rows, tokenizer, end_id, folder, tick, enough=enough)
    streams = read_streams(folder, part.label)
    n_tokens, n_documents = (sum(s.n_tokens for s in streams), sum(len(s.places) for s in streams))
    if not n_tokens:
        raise UsageError(f"{part.label}: the dataset has no text; name another.")
    say(
        f"{part.label}: read {n_documents:,} documents, {n_tokens:,} tokens, at commit "
        f"{dataset.repo.commit[:12]}"
        + ("" if n_tokens >= enough else f"; that is all of it, and {enough:,} were wanted")
    )


def _parts(options: HealOptions) -> list[TextPart]:
    """All texts: to train on, to replay, to measure on."""
    return [*options.texts, *options.replay, *map(TextPart, options.heldout_texts)]


def _enough(part: TextPart, options: HealOptions) -> int:
    """Tokens to read of a dataset: of the run, and to hold out, of which a document may be more."""
    share = part.share or 1.0 - sum(p.share or 0.0 for p in options.replay)
    held = 0 if options.heldout_texts else 2 * options.heldout_tokens
    run = options.n_steps * options.batch * options.length
    return int(share * (run + held)) + options.length + 1


def _end_id(model: Model) -> int | None:
    """The token that ends a text: the first that the configuration names."""
    raw: Any = model.config.raw.get("eos_token_id")
    if raw is None:
        raw = (find_object(model.source.folder / "generation_config.json") or {}).get(
            "eos_token_id"
        )
    first = raw[0] if isinstance(raw, list) and raw else raw
    return first if type(first) is int and 0 <= first < model.config.vocab_size else None
