"""Which documents of test sets stand in a training text: any 13 words of theirs in a row.

The measure of GPT-3's appendix C (arXiv:2005.14165) as lm-evaluation-harness has it: words in small
letters without punctuation, 13-grams, and a document is dirty if one of its 13-grams occurs in the
training text. Words are Unicode's, so Korean counts as English does. Documents of fewer than 13
words cannot be judged, and are counted apart.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

#: Words in a row.
N_WORDS = 13
#: Examples that are kept of a task.
MOST_EXAMPLES = 3
#: Characters of training text that are looked at together.
_SLICE = 1 << 20


@dataclass(frozen=True)
class TaskOverlap:
    """What a training text has of a task's documents.

    Attributes:
        task: the harness's name.
        n_documents: of the task.
        too_short: those of fewer than 13 words, of which nothing can be said.
        dirty: numbers of the dirty documents, from 0, ascending.
        examples: number of a dirty document and its first 13 words in a row that were found.
    """

    task: str
    n_documents: int
    too_short: int
    dirty: tuple[int, ...]
    examples: tuple[tuple[int, str], ...]

    @property
    def share(self) -> float | None:
        """Dirty documents of those that can be judged, from 0 to 1; None if none can."""
        judged = self.n_documents - self.too_short
        return len(self.dirty) / judged if judged else None


def contaminated(
    documents: Mapping[str, Iterable[str]], training: Iterable[str]
) -> dict[str, TaskOverlap]:
    """Look for test documents in a training text.

    Memory is that of the test documents and of one training document. What looks the same
    by its hash is compared word by word, so nothing is called dirty by chance.

    Args:
        documents: texts of each task's documents, as they are asked.
        training: documents; words in a row are in one of them.
    """
    index = _Index(documents)
    for document in training:
        before = np.empty(0, np.int64)
        for text in _slices(document):
            ids = np.concatenate([before, index.known_ids(text)])
            index.mark(ids)
            before = ids[max(len(ids) - N_WORDS + 1, 0) :]
    return index.found()


def normal_words(text: str) -> list[str]:
    """The words of a text, in small letters, without punctuation and symbols."""
    return unicodedata.normalize("NFC", text).lower().translate(_REMOVED).split()


class _Removed(dict[int, int | None]):
    """Code points of punctuation and symbols to None, looked up when they are met."""

    def __missing__(self, code: int) -> int | None:
        removed = unicodedata.category(chr(code))[0] in "PS"
        self[code] = None if removed else code
        return self[code]


_REMOVED = _Removed()


class _Index:
    """The 13-grams of all test documents, and which of them were met."""

    def __init__(self, documents: Mapping[str, Iterable[str]]) -> None:
        self._ids: dict[str, int] = {}
        #: Of each document: its task, and where its words begin and end in `_words`.
        self._spans: list[tuple[str, int, int]] = []
        self._tasks = list(documents)
        parts: list[np.ndarray] = []
        n = 0
        for task, texts in documents.items():
            for text in texts:
                words = normal_words(text)
                # 0 is a word that no test document has.
                own = [self._ids.setdefault(word, len(self._ids) + 1) for word in words]
                parts.append(np.array(own, np.int64))
                self._spans.append((task, n, n + len(own)))
                n += len(own)
        self._words = np.concatenate(parts) if parts else np.empty(0, np.int64)
        # Whether 13 words of one document begin here.
        self._begins = np.zeros(n, bool)
        for _, start, end in self._spans:
            self._begins[start : max(end - N_WORDS + 1, start)] = True
        draw = np.random.default_rng(0)
        self._keys = draw.integers(0, 2**64, len(self._ids) + 1, np.uint64, endpoint=False)
        self._factor = draw.integers(0, 2**63, 1, np.uint64)[0] * np.uint64(2) + np.uint64(1)
        places = np.flatnonzero(self._begins)
        hashes = self._hashes(self._words)[places]
        self._unique, first, self._which = np.unique(hashes, return_index=True, return_inverse=True)
        self._first = places[first]
        self._met = np.zeros(len(self._unique), bool)

    def known_ids(self, text: str) -> np.ndarray:
        """A number for each word of a text; 0 for those that no test document has."""
        words = normal_words(text)
        get = self._ids.get
        return np.fromiter((get(word, 0) for word in words), np.int64, len(words))

    def mark(self, ids: np.ndarray) -> None:
        """Mark the 13-grams that a row of words has."""
        if len(ids) < N_WORDS or not len(self._unique):
            return
        unknown = np.concatenate([[0], np.cumsum(ids == 0)])
        places = np.flatnonzero(unknown[N_WORDS:] == unknown[:-N_WORDS])
        hashes = self._hashes(ids)[places]
        at = np.minimum(np.searchsorted(self._unique, hashes), len(self._unique) - 1)
        same = self._unique[at] == hashes
        at, places = at[same], places[same]
        steps = np.arange(N_WORDS)
        ours = self._words[self._first[at][:, None] + steps]
        theirs = ids[places[:, None] + steps]
        self._met[at[(ours == theirs).all(axis=1)]] = True

    def found(self) -> dict[str, TaskOverlap]:
        met = np.zeros(len(self._words), bool)
        met[self._begins] = self._met[self._which]
        words = list(self._ids)
        tables = {task: ([], [], [0, 0]) for task in self._tasks}
        for task, start, end in self._spans:
            dirty, examples, counts = tables[task]
            number = counts[0]
            counts[0] += 1
            counts[1] += end - start < N_WORDS
            if not (hits := np.flatnonzero(met[start:end])).size:
                continue
            dirty.append(number)
            if len(examples) < MOST_EXAMPLES:
                at = start + int(hits[0])
                row = self._words[at : at + N_WORDS]
                examples.append((number, " ".join(words[i - 1] for i in row)))
        return {
            task: TaskOverlap(task, counts[0], counts[1], tuple(dirty), tuple(examples))
            for task, (dirty, examples, counts) in tables.items()
        }

    def _hashes(self, ids: np.ndarray) -> np.ndarray:
        """Of the 13 words from each place on, ``(n,)`` uint64; those at the end mean nothing."""
        keys = self._keys[ids]
        total = np.zeros(len(ids), np.uint64)
        for i in range(min(N_WORDS, len(ids))):
            total *= self._factor
            total[: len(ids) - i] += keys[i:]
        return total


def _slices(text: str) -> Iterator[str]:
    """A long text in slices that begin with a new word."""
    start = 0
    while len(text) - start > _SLICE:
        end = start + _SLICE
        while end < len(text) and not text[end].isspace():
            end += 1
        yield text[start:end]
        start = end
    yield text[start:]
