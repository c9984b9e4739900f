"""Documents and chunks, against llama.cpp's, transformers' and SentencePiece's tokenizers."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st

from dus_edge.checkpoint.builtin import model_dir
from dus_edge.errors import CheckpointError, UsageError
from dus_edge.export.vocab.vocab import read_vocab
from dus_edge.jobs.export.gguf import export_gguf
from dus_edge.quant.recipe import PRESETS
from dus_edge.text.chunks import Chunks, cut_stream, make_chunks, shares
from dus_edge.text.documents import (
    BUILTIN_LANGUAGES,
    Document,
    builtin_documents,
    read_documents,
)
from dus_edge.text.tokenizers import load_tokenizer
from dus_edge.upscale.model import plan_chooser

from .draws import examples

VOCAB_SIZE = 4096
SPLITS = ("calibration", "evaluation")
TEXT = "".join(Path(__file__).read_text("utf-8")) + " 다람쥐 헌 쳇바퀴에 타고파 </s> <s>\n"


class Letters:
    """One token per character; BOS is a number that no character has."""

    def __init__(self, bos_id: int | None = None) -> None:
        self.bos_id = bos_id

    def encode(self, text: str) -> list[int]:
        return [ord(char) for char in text]


def document(text: str, language: str = "en") -> Document:
    return Document(text, language, "here")


# -- the tokenizer ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[llama_cpp.Llama]:
    """llama.cpp's tokenizer, by way of a GGUF file of pico."""
    choose = plan_chooser(None, None, ("0:1",), True)
    out = tmp_path_factory.mktemp("pico")
    result = export_gguf("pico", choose, [PRESETS["q4_0"]], out)
    model = llama_cpp.Llama(str(result.outputs[0].path), vocab_only=True, verbose=False)
    yield model
    model.close()


def by_hand(ids: Sequence[int], bos_id: int, n_ctx: int) -> list[list[int]]:
    """What ``compute_imatrix`` feeds to the model, of ids that begin with BOS."""
    n = len(ids) // n_ctx
    return [[bos_id, *ids[i * n_ctx + 1 : (i + 1) * n_ctx]] for i in range(n)]


@pytest.mark.parametrize("n_ctx", [2, 100, 512])
def test_chunks_of_a_document_equal_llama_cpps(llama: llama_cpp.Llama, n_ctx: int) -> None:
    ids = llama.tokenize(TEXT.encode(), add_bos=True, special=False)
    assert ids[0] == llama.token_bos()
    chunks = make_chunks([document(TEXT)], load_tokenizer(model_dir(), VOCAB_SIZE), n_ctx)
    assert chunks.tokens.dtype == np.int32
    assert chunks.tokens.tolist() == by_hand(ids, llama.token_bos(), n_ctx)
    assert chunks.n_left_over == len(ids) % n_ctx
    assert chunks.languages == ("en",) * len(chunks.tokens)


@pytest.mark.parametrize("language", BUILTIN_LANGUAGES)
def test_builtin_streams_equal_llama_cpps(llama: llama_cpp.Llama, language: str) -> None:
    documents = [d for d in builtin_documents("evaluation") if d.language == language]
    ids = llama.tokenize("\n\n".join(d.text for d in documents).encode(), special=False)
    chunks = make_chunks(documents, load_tokenizer(model_dir(), VOCAB_SIZE), 128)
    assert chunks.tokens.tolist() == by_hand(ids, llama.token_bos(), 128)


@pytest.mark.parametrize("kept", [("tokenizer.json",), ("tokenizer.model",)])
def test_ids_equal_transformers_and_sentencepieces(tmp_path: Path, kept: tuple[str, ...]) -> None:
    for name in (*kept, "tokenizer_config.json", "config.json"):
        shutil.copy(model_dir() / name, tmp_path)
    tokenizer = load_tokenizer(tmp_path, VOCAB_SIZE)
    theirs = transformers.AutoTokenizer.from_pretrained(model_dir())
    text = TEXT.replace("<", "{")  # no special token is spelled out in it
    assert [tokenizer.bos_id, *tokenizer.encode(text)] == theirs(text)["input_ids"]
    processor = sentencepiece.SentencePieceProcessor(str(model_dir() / "tokenizer.model"))
    assert tokenizer.encode(TEXT) == processor.encode(TEXT)


def test_limits_of_a_training_run_are_not_kept(tmp_path: Path) -> None:
    model = tokenizers.Tokenizer.from_file(str(model_dir() / "tokenizer.json"))
    model.enable_truncation(8)
    model.enable_padding(length=100_000)
    model.save(str(tmp_path / "tokenizer.json"))
    expected = load_tokenizer(model_dir(), VOCAB_SIZE).encode(TEXT)
    assert load_tokenizer(tmp_path, VOCAB_SIZE).encode(TEXT) == expected


def template(*tokens: str) -> dict[str, Any]:
    """A post-processor that puts `tokens` around the text ``$A``."""
    ids = {"<s>": 1, "</s>": 2}
    special = {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in tokens if t in ids}
    single = [
        {"SpecialToken": {"id": t, "type_id": 0}}
        if t in ids
        else {"Sequence": {"id": "A", "type_id": 0}}
        for t in tokens
    ]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": special,
    }


BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
#: What is changed of pico's folder: the post-processor, the config, files that are removed.
BOS_CASES: dict[str, tuple[Any, dict[str, Any] | None, tuple[str, ...]]] = {
    "pico": (..., {}, ()),
    "bos": (template("<s>", "A"), {}, ("tokenizer.model",)),
    "bos and eos": (template("<s>", "A", "</s>"), {}, ("tokenizer.model",)),
    "eos only": (template("A", "</s>"), {"add_bos_token": None}, ("tokenizer.model",)),
    "nothing by template": (template("A"), {"add_bos_token": None}, ("tokenizer.model",)),
    "in a sequence": (
        {"type": "Sequence", "processors": [BYTE_LEVEL, template("<s>", "A")]},
        {},
        ("tokenizer.model",),
    ),
    "bytes only": (BYTE_LEVEL, {"tokenizer_class": "LlamaTokenizer"}, ("tokenizer.model",)),
    "asked": (None, {"add_bos_token": True}, ("tokenizer.model",)),
    "not asked": (None, {"add_bos_token": False}, ("tokenizer.model",)),
    "silent": (None, {"add_bos_token": None}, ("tokenizer.model",)),
    "silent Llama": (
        None,
        {"add_bos_token": None, "tokenizer_class": "LlamaTokenizer"},
        ("tokenizer.model",),
    ),
    "SentencePiece": (None, {}, ("tokenizer.json",)),
    "SentencePiece, not asked": (None, {"add_bos_token": False}, ("tokenizer.json",)),
    "SentencePiece, silent": (None, {"add_bos_token": None}, ("tokenizer.json",)),
    "SentencePiece alone": (None, None, ("tokenizer.json", "config.json")),
}


@pytest.mark.parametrize("name", BOS_CASES)
def test_bos_is_what_the_gguf_file_says(tmp_path: Path, name: str) -> None:
    post, changes, removed = BOS_CASES[name]
    for path in model_dir().glob("*.json"):
        shutil.copy(path, tmp_path)
    shutil.copy(model_dir() / "tokenizer.model", tmp_path)
    if post is not ...:
        parsed = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
        (tmp_path / "tokenizer.json").write_text(json.dumps(parsed | {"post_processor": post}))
    config_path = tmp_path / "tokenizer_config.json"
    if changes is None:
        config_path.unlink()
    else:
        config = json.loads(config_path.read_text("utf-8")) | changes
        config_path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    for file in removed:
        (tmp_path / file).unlink()
    vocab = read_vocab(tmp_path, VOCAB_SIZE)
    adds = vocab.flags.get("add_bos_token", vocab.model == "llama")
    expected = vocab.special_ids.get("bos", 1) if adds else None
    assert load_tokenizer(tmp_path, VOCAB_SIZE).bos_id == expected


def test_pico_adds_its_bos() -> None:
    assert load_tokenizer(model_dir(), VOCAB_SIZE).bos_id == 1


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ({}, "neither tokenizer.json nor tokenizer.model"),
        ({"tokenizer.json": b"{"}, "tokenizers package cannot read"),
        ({"tokenizer.model": b"\xff\xfe"}, "sentencepiece cannot read"),
        ({"tokenizer.model": None, "tokenizer_config.json": b"[]"}, "not a JSON object"),
        ({"tokenizer.model": None, "config.json": b"{"}, "cannot be read as JSON"),
    ],
)
def test_damaged_tokenizers_are_refused(
    tmp_path: Path, contents: dict[str, bytes | None], words: str
) -> None:
    for name, data in contents.items():
        source = model_dir() / name
        (tmp_path / name).write_bytes(source.read_bytes() if data is None else data)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_tokenizer(tmp_path, VOCAB_SIZE)
    assert str(tmp_path) in str(caught.value)


def test_tokens_beyond_the_embedding_are_refused() -> None:
    tokenizer = load_tokenizer(model_dir(), 300)
    with pytest.raises(UsageError, match="embedding has 300 rows"):
        make_chunks([document(TEXT)], tokenizer, 16)
    with pytest.raises(UsageError, match="token 1, and the model's embedding has 1 rows"):
        load_tokenizer(model_dir(), 1)


# -- cutting ------------------------------------------------------------------------------------


@examples(200)
@given(
    parts=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 60)), min_size=1, max_size=6),
    n_ctx=st.integers(2, 20),
    n_chunks=st.none() | st.integers(1, 12),
    bos_id=st.sampled_from([None, 1]),
    seed=st.integers(0, 5),
)
def test_no_token_is_lost(
    parts: list[tuple[str, int]], n_ctx: int, n_chunks: int | None, bos_id: int | None, seed: int
) -> None:
    # Every token of the text is another number, so that its place can be told from it.
    code = iter(range(0x1000, 0x9000))
    documents = [document("".join(chr(next(code)) for _ in range(n)), lang) for lang, n in parts]
    streams: dict[str, list[int]] = {}
    for doc in documents:
        before = [ord("\n")] * 2 if doc.language in streams else []
        streams.setdefault(doc.language, []).extend([*before, *map(ord, doc.text)])
    full = {lang: [bos_id] * (bos_id is not None) + ids for lang, ids in streams.items()}
    available = {lang: len(ids) // n_ctx for lang, ids in full.items()}
    arguments: Any = (documents, Letters(bos_id), n_ctx)
    if not any(streams.values()) or not any(available.values()):
        with pytest.raises(UsageError):
            make_chunks(*arguments, n_chunks=n_chunks, seed=seed)
        return
    chunks = make_chunks(*arguments, n_chunks=n_chunks, seed=seed)
    total = sum(available.values())
    assert len(chunks.tokens) == len(chunks.languages) == min(total, n_chunks or total)
    assert chunks.tokens.size + chunks.n_left_over == sum(map(len, full.values()))
    every = [
        (lang, chunk)
        for lang, ids in full.items()
        for chunk in (
            by_hand(ids, bos_id, n_ctx)
            if bos_id is not None
            else [ids[i * n_ctx : (i + 1) * n_ctx] for i in range(len(ids) // n_ctx)]
        )
    ]
    # Chunks can be equal only where they are all line feeds; the text's order is kept.
    rest = iter(every)
    for pair in zip(chunks.languages, chunks.tokens.tolist(), strict=True):
        assert pair in rest
    counts = Counter(chunks.languages)
    n = len(chunks.tokens)
    has_some = sum(a > 0 for a in available.values())
    for lang, a in available.items():
        assert counts[lang] <= a
        if n >= has_some:
            assert bool(counts[lang]) == bool(a)
        if total:
            assert counts[lang] <= n * a / total + 1


def test_a_stream_is_cut_in_order() -> None:
    assert cut_stream(range(10, 17), None, 3).tolist() == [[10, 11, 12], [13, 14, 15]]
    assert cut_stream(range(10, 17), 1, 3).tolist() == [[1, 10, 11], [1, 13, 14]]
    assert cut_stream([], 1, 3).shape == (0, 3)


@pytest.mark.parametrize(
    ("available", "total", "expected"),
    [
        ([60, 30, 10], 10, [6, 3, 1]),
        ([6, 3, 1], 10, [6, 3, 1]),
        ([50, 49, 1], 10, [5, 4, 1]),  # 5, 4.9, 0.1: the remainder would give 5, 5, 0
        ([98, 1, 1], 3, [1, 1, 1]),
        ([98, 1, 1], 2, [2, 0, 0]),
        ([0, 5, 5], 2, [0, 1, 1]),
        ([3, 3, 3], 4, [2, 1, 1]),
    ],
)
def test_shares(available: list[int], total: int, expected: list[int]) -> None:
    assert shares(available, total) == expected


def test_the_draw_is_the_seeds() -> None:
    documents = [document("".join(map(chr, range(0x1000, 0x1800)))), document("y" * 300, "ko")]

    def draw(seed: int, n: int = 20) -> Chunks:
        return make_chunks(documents, Letters(1), 16, n_chunks=n, seed=seed)

    assert np.array_equal(draw(3).tokens, draw(3).tokens)
    assert draw(3).digest == draw(3).digest
    assert draw(3).digest != draw(4).digest
    firsts = draw(3).tokens[np.array(draw(3).languages) == "en", 1]
    assert np.all(np.diff(firsts) > 0)
    everything = make_chunks(documents, Letters(1), 16)
    assert draw(3, 10_000).digest == draw(4, 10_000).digest == everything.digest


def test_the_digest_sees_tokens_shape_and_languages() -> None:
    cases = [
        make_chunks([document("abcdefgh", lang)], Letters(bos), n_ctx).digest
        for lang in ("en", "ko")
        for bos in (None, 1)
        for n_ctx in (2, 4)
    ]
    assert len(set(cases)) == len(cases)


@pytest.mark.parametrize(
    ("documents", "options", "words"),
    [
        ([], {}, "no text"),
        ([document("")], {}, "finds no token"),
        ([document("abc"), document("d", "ko")], {}, "4 in 'en', 2 in 'ko', and 8 .* --ctx"),
        ([document("a" * 99)], {"n_ctx": 1}, "--ctx 1"),
        ([document("a" * 99)], {"n_ctx": 0}, "at least 2"),
        ([document("a" * 99)], {"n_chunks": 0}, "--chunks 0"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    documents: list[Document], options: dict[str, int], words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        make_chunks(documents, Letters(1), **({"n_ctx": 8} | options))
    assert "\n" not in str(caught.value)


# -- the user's files ---------------------------------------------------------------------------


def write(folder: Path, **contents: str | bytes) -> None:
    for name, content in contents.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_a_folder_is_read_in_order_without_hidden_and_other_files(tmp_path: Path) -> None:
    write(
        tmp_path,
        b_txt="second\r\n",
        a_PY="x = 1\n",
        sub__c_md="# Third",
        sub__d_jsonl='{"text": "fourth", "lang": "ko"}\n',
        _hidden_txt="no",
        sub___git__e_txt="no",
        blank_txt=" \n",
        image_png=b"\x89PNG\xff",
    )
    read = read_documents([tmp_path], None)
    assert [(d.text, d.language, d.origin) for d in read] == [
        ("x = 1\n", "code", str(tmp_path / "a.PY")),
        ("second\r\n", "text", str(tmp_path / "b.txt")),
        ("# Third", "text", str(tmp_path / "sub/c.md")),
        ("fourth", "ko", f"{tmp_path / 'sub/d.jsonl'}:1"),
    ]


def test_files_are_read_in_the_order_given_whatever_their_suffix(tmp_path: Path) -> None:
    write(tmp_path, b_odd=b"\xef\xbb\xbftwo", a_cpp="int x;")
    read = read_documents([tmp_path / "b.odd", tmp_path / "a.cpp"], None)
    assert [(d.text, d.language) for d in read] == [("two", "text"), ("int x;", "code")]


def test_rows(tmp_path: Path) -> None:
    rows = [
        {"body": "one\u2028still one", "language": "en"},
        {"body": "two", "lang": "ko", "language": None},
        {"body": " "},
        {"body": "three", "language": 7},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write(tmp_path, rows_jsonl="\n\n".join(lines))
    read = read_documents([tmp_path / "rows.jsonl"], "body")
    assert [(d.text, d.language, d.origin.rpartition(":")[2]) for d in read] == [
        ("one\u2028still one", "en", "1"),
        ("two", "ko", "3"),
        ("three", "text", "7"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.txt", b"caf\xe9", "byte 3 is not UTF-8"),
        ("x.txt", b"a\0b", "character 1 is NUL"),
        ("x.txt", b"", "has no text"),
        ("x.txt", b" \n\t", "has no text"),
        ("x.jsonl", b"\n", "has no text"),
        ("x.jsonl", b'{"text": "a"}\n{"body": "b", "id": 1}\n', "x.jsonl:2.*missing.*body, id"),
        ("x.jsonl", b'{"text": 5}', "x.jsonl:1.*is int, not text"),
        ("x.jsonl", b"{}", "fields: none"),
        ("x.jsonl", b'{"text": "a"}\n{', "x.jsonl:2: not valid JSON"),
        ("x.jsonl", b"[1]", "x.jsonl:1: a JSON object is expected, not list"),
    ],
)
def test_files_that_cannot_be_used_are_refused(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=words) as caught:
        read_documents([path], None)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_and_folders_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.txt: cannot be read"):
        read_documents([tmp_path / "absent.txt"], None)
    write(tmp_path, blank_txt="", image_png=b"\x89PNG")
    with pytest.raises(UsageError, match="no text is in this folder"):
        read_documents([tmp_path], None)
    write(tmp_path, bad_txt=b"\xff")
    with pytest.raises(UsageError, match=r"bad\.txt: byte 0"):
        read_documents([tmp_path], None)


# -- the built-in mix ---------------------------------------------------------------------------


def sizes(split: Any) -> dict[str, int]:
    """UTF-8 bytes by language."""
    counts: Counter[str] = Counter()
    for d in builtin_documents(split):
        counts[d.language] += len(d.text.encode())
    return dict(counts)


def test_the_mix_has_its_languages_and_sizes() -> None:
    calibration, evaluation = sizes("calibration"), sizes("evaluation")
    assert tuple(calibration) == tuple(evaluation) == BUILTIN_LANGUAGES
    least = {"en": 25_000, "ko": 15_000, "code": 25_000}
    for language, n in least.items():
        assert calibration[language] >= n
        assert evaluation[language] >= n // 3


def test_every_builtin_file_is_read() -> None:
    root = Path(str(files("dus_edge.data") / "texts"))
    stored = {p.relative_to(root).as_posix() for p in root.rglob("*.txt")}
    read = [d.origin for split in SPLITS for d in builtin_documents(split)]  # type: ignore[arg-type]
    assert sorted(read) == sorted(stored)
    readme = (root / "README.md").read_text("utf-8")
    assert "Apache-2.0" in readme[:600]


def lines_of(split: Any, languages: Sequence[str] = BUILTIN_LANGUAGES) -> list[str]:
    """Lines of 40 characters or more."""
    documents = [d for d in builtin_documents(split) if d.language in languages]
    lines = (line.strip() for d in documents for line in d.text.splitlines())
    return [line for line in lines if len(line) >= 40]


def test_the_splits_share_no_line() -> None:
    assert not set(lines_of("calibration")) & set(lines_of("evaluation"))


@pytest.mark.parametrize("split", SPLITS)
def test_no_line_of_prose_is_there_twice(split: Any) -> None:
    prose = lines_of(split, ("en", "ko"))
    assert [line for line, n in Counter(prose).items() if n > 1] == []


@pytest.mark.parametrize("split", SPLITS)
def test_builtin_text_is_clean(split: Any) -> None:
    for d in builtin_documents(split):
        bad = {c for c in d.text if not c.isprintable()} - {"\n", "\t"}
        assert not bad, (d.origin, bad)
        assert d.text.endswith("\n") and not d.text.startswith("\n"), d.origin
        hangul = sum("가" <= c <= "힣" for c in d.text) / len(d.text)
        assert hangul > 0.3 if d.language == "ko" else hangul < 0.05, d.origin


@pytest.mark.parametrize("split", SPLITS)
def test_builtin_text_survives_picos_tokenizer(split: Any) -> None:
    tokenizer = load_tokenizer(model_dir(), VOCAB_SIZE)
    processor = sentencepiece.SentencePieceProcessor(str(model_dir() / "tokenizer.model"))
    for d in builtin_documents(split):
        ids = tokenizer.encode(d.text)
        assert 0 not in ids  # <unk>
        assert processor.decode(ids) == d.text
    chunks = make_chunks(builtin_documents(split), tokenizer, 512, n_chunks=8)
    assert set(chunks.languages) == set(BUILTIN_LANGUAGES)
