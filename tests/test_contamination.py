"""Overlap with test sets, beside lm-evaluation-harness's own functions."""

from __future__ import annotations

import contextlib
import io
import itertools
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dus_edge.eval import contamination
from dus_edge.eval.contamination import contaminated, normal_words
from tests.draws import examples

with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    janitor = pytest.importorskip("lm_eval.decontamination.janitor")

#: Few words, so that rows of 13 meet by chance; with what is removed, and in large letters.
WORDS = st.sampled_from(["a", "b", "A,", "b.", "(a)", "사과", "'b'"])
TEXTS = st.lists(WORDS, max_size=40).map(" ".join)


def janitors_dirty(documents: list[str], training: str) -> list[int]:
    """By its own normalization, 13-grams and set."""
    own = janitor.Janitor()
    met = set(janitor.word_ngrams(own.normalize_string(training), 13))
    found = []
    for i, document in enumerate(documents):
        own.dirt_ngrams = set()
        own.register_contaminant_python(document)
        if own.dirt_ngrams & met:
            found.append(i)
    return found


@given(st.lists(TEXTS, max_size=4), TEXTS)
@examples(150)
def test_dirty_is_what_the_harness_finds(documents, training):
    found = contaminated({"t": documents}, [training])["t"]
    assert list(found.dirty) == janitors_dirty(documents, training)
    assert found.n_documents == len(documents)
    assert found.too_short == sum(len(d.split()) < 13 for d in documents)


def test_random_overlaps_are_found():
    """Texts of many words, of which some hold a piece of the training text."""
    rng = np.random.default_rng(0)
    words = np.array([f"w{i}" for i in range(500)])
    training = " ".join(rng.choice(words, 5000))
    rows = training.split()
    documents = []
    for n in range(60):
        own = list(rng.choice(words, 40))
        start, length = int(rng.integers(0, 4900)), int(rng.integers(8, 20))
        own[10 : 10 + length] = rows[start : start + length]
        documents.append(" ".join(own))
        if n % 10 == 0:
            documents[-1] = " ".join(own).upper().replace(" ", ", ")
    expected = janitors_dirty(documents, training)
    assert 10 < len(expected) < 50
    found = contaminated({"t": documents}, [training])["t"]
    assert list(found.dirty) == expected
    assert found.share == len(expected) / 60
    number, example = found.examples[0]
    assert example in training and example in " ".join(normal_words(documents[number]))


@given(st.lists(st.integers(1, 60), max_size=5))
@examples(30)
def test_words_in_a_row_are_in_one_document(cuts):
    words = [f"w{i}" for i in range(60)]
    places = [0, *sorted(cuts), 60]
    training = [" ".join(words[a:b]) for a, b in itertools.pairwise(places)]
    documents = [" ".join(words[i : i + 13]) for i in range(0, 48, 6)]
    whole = [k for k, i in enumerate(range(0, 48, 6)) if not any(i < c < i + 13 for c in cuts)]
    assert contaminated({"t": documents}, training)["t"].dirty == tuple(whole)


def test_long_pieces_are_cut_between_words(monkeypatch):
    monkeypatch.setattr(contamination, "_SLICE", 50)
    words = " ".join(f"word{i}" for i in range(100))
    documents = [" ".join(words.split()[i : i + 13]) for i in range(0, 88, 4)]
    assert len(contaminated({"t": documents}, [words])["t"].dirty) == 22


def test_korean_and_other_punctuation():
    text = "“대한민국의 수도는 어디인가?” 하나 둘 셋 넷 다섯 여섯 일곱 여덟 아홉 열…"
    plain = "대한민국의 수도는 어디인가 하나 둘 셋 넷 다섯 여섯 일곱 여덟 아홉 열"
    assert normal_words(text) == plain.split()
    apart, other = (unicodedata.normalize("NFD", t) for t in (plain, plain.replace("셋", "세")))
    found = contaminated({"ko": [text], "other": ["짧다"]}, [apart])
    assert found["ko"].dirty == (0,)
    assert (found["other"].too_short, found["other"].share) == (1, None)
    assert contaminated({"ko": [text]}, [other])["ko"].dirty == ()


def test_nothing_to_look_for():
    assert contaminated({}, ["a"]) == {}
    assert contaminated({"t": []}, ["a " * 20])["t"].n_documents == 0
    assert contaminated({"t": ["a " * 20]}, [])["t"].dirty == ()
