"""Text as tokens on the disk: made once, in shards, memory-mapped.

A shard is a run of documents: their ids behind each other (raw little-endian ``uint32``), and an
array of where each begins. One that is whole is kept when a run is cut short. A stream is what
training draws from: the documents of one source in one language.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from dus_edge.files import write_text
from dus_edge.text.documents import Document
from dus_edge.text.tokenizers import Tokenizer

#: Tokens of a shard, 256 MiB; documents are not cut.
SHARD_TOKENS = 1 << 26
_IDS = np.dtype("<u4")
#: Written at the end of all.
_WHOLE = "whole.json"


@dataclass(frozen=True)
class Stream:
    """Documents of one source in one language.

    Attributes:
        source: the label of the text it is from.
        language: as its documents say.
        shards: memory-mapped ids, ``(n_tokens,)`` uint32 each.
        places: of each document: shard, first token, one behind the last; ``(n, 3)`` int64.
    """

    source: str
    language: str
    shards: tuple[np.ndarray, ...]
    places: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, ``(n,)`` int64."""
        return self.places[:, 2] - self.places[:, 1]

    @property
    def n_tokens(self) -> int:
        """Tokens of all its documents."""
        return int(self.lengths.sum())

    def document(self, index: int) -> np.ndarray:
        """The ids of one document, a view."""
        shard, start, stop = self.places[index]
        return self.shards[shard][start:stop]

    def only(self, which: np.ndarray) -> Stream:
        """The documents of these indices."""
        return Stream(self.source, self.language, self.shards, self.places[which])


def write_tokens(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    end_id: int | None,
    folder: Path,
    advance: Callable[[int], object] = lambda n: None,
    shard_tokens: int = SHARD_TOKENS,
    enough: int | None = None,
) -> None:
    """Tokenize documents into a folder, each behind BOS if the tokenizer adds one, before EOS.

    The same text a second time is left out: it could stand on both sides of the held-out split. A
    folder that is whole is left as it is.

    Args:
        documents: in their order; read once.
        tokenizer: the model's.
        end_id: its EOS token; None where it has none.
        folder: made if it is not there; shards of an interrupted run are kept.
        advance: told of characters; of tokens where some are enough.
        shard_tokens: of a shard, at least.
        enough: no more documents are read behind the one that makes so many tokens.
    """
    if are_written(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    left = _distinct(documents, advance if enough is None else lambda n: None)
    number = reached = 0
    while (whole := _languages_file(folder, number)).exists():
        kept = len(json.loads(whole.read_text(encoding="utf-8")))
        next(islice(left, kept, kept), None)
        reached += int(np.load(folder / f"{number:05}.starts.npy")[-1])
        number += 1
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    after = [] if end_id is None else [end_id]
    parts: list[np.ndarray] = []
    languages: list[str] = []
    size = 0
    while enough is None or reached < enough:
        document = next(left, None)
        if document is None:
            break
        ids = [*before, *tokenizer.encode(document.text), *after]
        parts.append(np.array(ids, _IDS))
        languages.append(document.language)
        size, reached = size + len(ids), reached + len(ids)
        if enough is not None:
            advance(len(ids))
        if size >= shard_tokens:
            _write_shard(folder, number, parts, languages)
            parts, languages, size, number = [], [], 0, number + 1
    if parts:
        _write_shard(folder, number, parts, languages)
    write_text(folder / _WHOLE, json.dumps({"tokens": reached}) + "\n")


def are_written(folder: Path) -> bool:
    """Whether `write_tokens` came to the end there."""
    return (folder / _WHOLE).exists()


def read_streams(folder: Path, source: str) -> list[Stream]:
    """The streams of a folder that `write_tokens` finished, by language in order."""
    shards: list[np.ndarray] = []
    places: dict[str, list[tuple[int, int, int]]] = {}
    while (file := _languages_file(folder, len(shards))).exists():
        number = len(shards)
        languages = json.loads(file.read_text(encoding="utf-8"))
        starts = np.load(folder / f"{number:05}.starts.npy").tolist()
        shards.append(np.memmap(folder / f"{number:05}.ids", _IDS, mode="r"))
        for language, start, stop in zip(languages, starts[:-1], starts[1:], strict=True):
            places.setdefault(language, []).append((number, start, stop))
    return [
        Stream(source, language, tuple(shards), np.array(found, np.int64))
        for language, found in sorted(places.items())
    ]


def split_heldout(
    streams: Sequence[Stream], tokens: int, most: float, seed: int
) -> tuple[list[Stream], list[Stream]]:
    """Keep whole documents from training, drawn from every stream by its share.

    Args:
        streams: of the text to train on.
        tokens: to be held out of all streams together, at least; fewer where `most` is reached.
        most: share of a stream's tokens that may be held out.
        seed: of the draw.

    Returns:
        streams to train on, and those held out; a stream of one document holds nothing out.
    """
    whole = sum(s.n_tokens for s in streams)
    kept, held = [], []
    for number, stream in enumerate(streams):
        wanted = min(tokens * stream.n_tokens / whole, most * stream.n_tokens)
        order = np.random.default_rng([seed, number]).permutation(len(stream.places))
        taken, reached = [], 0
        for index in order:
            length = int(stream.lengths[index])
            # A long document must not eat the training text; a shorter one will come.
            if reached < wanted and reached + length <= max(1.5 * wanted, most * stream.n_tokens):
                taken.append(int(index))
                reached += length
        out = np.zeros(len(order), bool)
        out[taken] = True
        if out.all():
            out[:] = False
        kept.append(stream.only(~out))
        if out.any():
            held.append(stream.only(out))
    return kept, held


def _distinct(
    documents: Iterable[Document], advance: Callable[[int], object]
) -> Iterator[Document]:
    seen: set[bytes] = set()
    for document in documents:
        digest = hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).digest()[:16]
        if digest not in seen:
            seen.add(digest)
            yield document
        advance(len(document.text))


def _languages_file(folder: Path, number: int) -> Path:
    """Written last: a shard that has it is whole."""
    return folder / f"{number:05}.languages.json"


def _write_shard(
    folder: Path, number: int, parts: Sequence[np.ndarray], languages: Sequence[str]
) -> None:
    with (folder / f"{number:05}.ids").open("wb") as f:
        for part in parts:
            f.write(part.tobytes())
    starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    np.save(folder / f"{number:05}.starts.npy", starts)
    write_text(_languages_file(folder, number), json.dumps(languages) + "\n")
