"""Ids from llama.cpp, given our metadata, against ids from the tokenizers that we read.

The source tokenizers are trained here, in the shapes that real models have; llama.cpp loads a
vocabulary-only GGUF file made of `vocab_metadata`.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import io
import json
import random
import shutil
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from dus_edge.errors import CheckpointError, UnsupportedError
from dus_edge.export.vocab import special as vocab_special
from dus_edge.export.vocab import spm as vocab_spm
from dus_edge.export.vocab.vocab import Vocab, read_vocab, vocab_metadata

from .draws import examples

VOCAB_SIZE = 1400  # of the SentencePiece models
MULTILINGUAL = Path(__file__).parent / "data" / "multilingual.txt"

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

# -- texts --------------------------------------------------------------------------------------


def corpus() -> list[str]:
    """Lines to train on: a few modules that every Python has, and the multilingual file."""
    code = [inspect.getsource(module) for module in (argparse, textwrap, difflib)]
    return [line for text in [MULTILINGUAL.read_text("utf-8") * 6, *code] for line in _lines(text)]


def _lines(text: str) -> Iterator[str]:
    return (line for line in text.splitlines() if line.strip())


def sample_texts() -> list[str]:
    """Texts to compare: hand-picked corners, the corpus's lines, and seeded mixtures."""
    # fmt: off
    corners = [
        "", " ", "  ", "   ", " " * 17, "\n", "\n\n", "\n \n\n \n\n\n \t \t\t \t\n  \n   \n",
        "\t", "\t\t x", "\r", "\r\n", "a\r\nb\r\n\r\nc", "\x00", "a\x00b",
        "\x01\x02\x1f\x7f\x80\x9f", "\x0b\x0c", "\u0085x\u0085", "Hello", " Hello", "  Hello",
        "Hello ", "Hello  ", "hello world", " hello  world  ", "Hello\n", "\nHello", "▁", "▁a",
        "a▁b", "▁▁", " ▁ ", "\u00a0x\u00a0\u00a0y", "\u2003em\u2003", "\u3000全角\u3000",
        "\u200b\u200c\u200d\ufeff", "0", "1", "12", "123", "1234", "12345", "1 2 3", "3.14159",
        "1,000,000", "٣٢٤", "①②③½Ⅷ", "x1y22z333", "0x1F",
        "I'm you're he's we've they'll she'd don't", "I'M YOU'RE HE'S WE'VE THEY'LL",
        "'s't're've'm'll'd", "'S 'T 'Re 'vE", "''s", "' s", "it’s don’t", "😀", "😀😀", "👍🏽",
        "👩‍💻", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇰🇷🇯🇵", "❤️‍🔥", "a😀b", " 😀 ",
        "🦙" * 7, "안녕하세요", "안녕 하세요",
        "값이 얼마예요? ㅋㅋㅋ", "각", "ㄱㅏㄱ", "こんにちは世界", "你好，世界！", "臺灣",
        "مرحبا بالعالم",
        "اَلْعَرَبِيَّةُ", "שלום עולם", "\u202eabc\u202c", "abc אבג 123", "Привет, мир",
        "Γειά", "ไทย", "हिन्दी", "தமிழ்", "e\u0301", "é", "a\u0300\u0301\u0302", "\u0301",
        " \u0301", "Å", "ﬁ", "ﬀ ﬃ", "ß ẞ", "İı", "ǅ", "𝒜𝔅ℭ", "𐍈", "𠜎", "\U0010ffff", "\ue000",
        "\ufffd", "\ufffe", "def f(x):\n    return x**2\n", "if (a && b) {\n\t\tc();\n}",
        "    indented", "\tindented", "x = 'it''s'", "/* c */ // d", "<div>&amp;</div>",
        "a.b.c", "...", "!!!???", "------", "======", "#!/bin/sh", "C:\\dir\\file", "\\n",
        "\"quoted\"", "$100 €5 £3", "50%", "a_b__c", "@user #tag",
        "https://example.org/a?b=c&d=%20", "name@example.org", "x" * 100, "ab" * 64,
        "The the THE tHe", "camelCaseString", "SCREAMING_SNAKE", "a\n\n\nb", "a \n b",
        "a  \n\n  b", "x\t\ty", "trailing\t", "trailing \n ", " \n", "\n ", "a\u2028b\u2029c",
        "\u1680\u180e\u202f\u205f", "1st 2nd 3rd", "²³¹", "x²+y²", "Ⅳ", "〇一二三", "۱۲۳", "१२३",
        "½", "㍿", "ｶﾞﾊﾟ", "Ａｂｃ１２３", "…—–‘’“”", "<s>", "</s>", "<unk>", "<0x0A>",
        "[PAD1402]", "</s", "<s", "s>", "< s >", "<unk", "[PAD",
        "<0x0A", "<|", "|>", "<|eot", "[INST", "INST]",
    ]
    # fmt: on
    lines = list(dict.fromkeys(_lines(MULTILINGUAL.read_text("utf-8"))))
    code = inspect.getsource(textwrap).splitlines()
    rng = random.Random(7)
    mixed = ["".join(rng.sample(corners, 4)) for _ in range(60)]
    cut = [line[rng.randrange(len(line)) :] for line in lines]
    noise = [
        bytes(rng.randrange(256) for _ in range(rng.randrange(1, 40))).decode(errors="replace")
        for _ in range(40)
    ]
    blocks = ["\n".join(lines[i : i + 5]) for i in range(0, len(lines), 5)]
    return list(dict.fromkeys(corners + lines + code[:60] + cut + mixed + noise + blocks))


TEXTS = sample_texts()

#: Random text: any scalar value, with the characters that tokenizers treat specially made likely.
random_text = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.text(
        st.sampled_from(" \n\t\r'sStTlLdDmMrReE19.,!▁aÀ한日😀\u0301\u200d\u00a0<>|_-"), max_size=40
    ),
    st.binary(max_size=40).map(lambda data: data.decode(errors="replace")),
)

# -- llama.cpp ----------------------------------------------------------------------------------


class LlamaVocab:
    """llama.cpp's tokenizer on a vocabulary-only file."""

    def __init__(self, path: Path) -> None:
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert self._model, path
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`."""
        data = text.encode()
        ids = (llama_cpp.llama_token * (len(data) + 4))()
        n = llama_cpp.llama_tokenize(
            self._vocab, data, len(data), ids, len(ids), add_special, parse_special
        )
        assert n >= 0
        return list(ids[:n])

    def free(self) -> None:
        """Release the model."""
        llama_cpp.llama_model_free(self._model)


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Vocab], LlamaVocab]]:
    """Load a vocabulary into llama.cpp by way of a GGUF file."""
    loaded: list[LlamaVocab] = []

    def load_vocab(vocab: Vocab) -> LlamaVocab:
        path = tmp_path_factory.mktemp("gguf") / "vocab.gguf"
        write_gguf(vocab, path)
        loaded.append(LlamaVocab(path))
        return loaded[-1]

    yield load_vocab
    for model in loaded:
        model.free()


def write_gguf(vocab: Vocab, path: Path) -> None:
    """A GGUF file with the vocabulary and the least that llama.cpp asks of a llama model."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocab.tokens))
    for kv in vocab_metadata(vocab):
        writer.add_key_value(kv.key, kv.value, kv.kind, kv.item)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


# -- source tokenizers --------------------------------------------------------------------------


@pytest.fixture(scope="session")
def lines() -> list[str]:
    """The training text."""
    return corpus()


def train_spm(lines: list[str], **options: Any) -> bytes:
    """A SentencePiece model with the settings of Llama 2, changed by `options`."""
    out = io.BytesIO()
    settings = {
        "vocab_size": VOCAB_SIZE,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.999,
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, **settings | options
    )
    return out.getvalue()


#: The added tokens of the Llama folders: content and whether they are special.
ADDED = (("<|im_start|>", True), ("<|im_end|>", True), ("<tool>", False), ("<｜pad｜>", False))


def llama_pieces(proto: bytes) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a SentencePiece model as transformers converts them."""
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    vocab = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    special = {piece for piece, i in vocab.items() if model.is_control(i) or model.is_unknown(i)}
    merges = []
    for piece, i in vocab.items():
        if piece not in special and not model.is_byte(i):
            for cut in range(1, len(piece)):
                left, right = piece[:cut], piece[cut:]
                if left in vocab and right in vocab and not {left, right} & special:
                    merges.append((-model.get_score(i), len(left), left, right))
    merges.sort(key=lambda merge: merge[:2])
    return vocab, [(left, right) for _, _, left, right in merges]


def llama_json(proto: bytes, shape: str, added: Iterable[tuple[str, bool]] = ADDED) -> Tokenizer:
    """A fast tokenizer of a SentencePiece model, in one of the shapes that real files have.

    ``prepend``: transformers 4, legacy=True; ``first``: legacy=False and transformers 5;
    ``always``: files of before that; ``never``: add_prefix_space=False.
    """
    vocab, merges = llama_pieces(proto)
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    if shape == "prepend":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", shape, split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    names = [("<unk>", True), ("<s>", True), ("</s>", True), *added]
    for content, special in names:
        token = AddedToken(content, normalized=False, special=special)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    return tokenizer


def byte_level(
    lines: list[str], pre_tokenizer: Any, specials: list[str], **options: Any
) -> Tokenizer:
    """A byte-level BPE tokenizer trained with `pre_tokenizer`."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=options.get("ignore_merges", False)))
    tokenizer.normalizer = options.get("normalizer")
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=options.get("first", []),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in specials])
    tokenizer.post_processor = options.get("post_processor") or processors.ByteLevel(
        trim_offsets=False
    )
    return tokenizer


def regex_then_bytes(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Llama 3's and Qwen 2's pre-tokenizer."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# -- folders to convert -------------------------------------------------------------------------

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA_IDS = {"bos_token_id": 1, "eos_token_id": 2}
#: Text with the added tokens of the Llama folders in it.
LLAMA_SPECIAL = [
    "<s>", "</s>", "<unk>", "<s><s>", "<s> hi", "a<s>b</s> c", "x<|im_end|>", "x <tool>",
    "<|im_start|>user\nhi<|im_end|>\n", "<tool>x <tool> y<tool>", "<｜pad｜>z", "<tool><tool>  ",
]  # fmt: skip
BYTE_SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>"]
BYTE_SPECIAL = [
    "<|begin_of_text|>", "<|begin_of_text|>a<|eot_id|>\n\n", "<|im_end|> x", "<tool>", "a <tool> b",
    "<|im_end|><|im_end|>", "\n<|eot_id|>\n", " <|end_of_text|> ",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A tokenizer folder, the tokenizer it was made of, and where the two may differ."""

    folder: Path
    size: int
    encode: Callable[[str, bool, bool], list[int]]  # text, add_special, parse_special
    special_texts: tuple[str, ...] = ()
    #: Texts that llama.cpp is known to cut differently, for reasons given at each predicate.
    excluded: Callable[[str, bool], bool] = lambda text, parse_special: False


def write_folder(folder: Path, **files: Any) -> Path:
    """Write `name=content` as ``name.json``, or ``tokenizer.model`` for bytes."""
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / "tokenizer.model").write_bytes(content)
        elif isinstance(content, Tokenizer):
            content.save(str(folder / f"{name}.json"))
        else:
            text = json.dumps(content, ensure_ascii=False)
            (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


def sentencepiece_encoder(proto: bytes) -> Callable[[str, bool, bool], list[int]]:
    """SentencePiece itself; it knows no special tokens in text."""
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    return lambda text, add_special, _: [1] * add_special + model.encode(text)


def fast_encoder(tokenizer: Tokenizer) -> Callable[[str, bool, bool], list[int]]:
    """The tokenizers library; without `parse_special` it reads special tokens as text."""

    def encode(text: str, add_special: bool, parse_special: bool) -> list[int]:
        tokenizer.encode_special_tokens = not parse_special
        return tokenizer.encode(text, add_special_tokens=add_special).ids

    return encode


def looks_special_only(text: str, parse_special: bool) -> bool:
    """``<｜pad｜>`` is not marked special, but llama.cpp's converter and we take it so."""
    return "<｜pad｜>" in text and not parse_special


def newer_unicode(text: str, parse_special: bool = False) -> bool:
    """Characters of Unicode 16 (unassigned in Python 3.13 and before).

    llama.cpp's tables are of Unicode 15.1, those of the tokenizers library of 16: an exhaustive
    run over all code points found differences at 4395 of them, every one new in 16.0.
    """
    return any(unicodedata.category(char) == "Cn" for char in text)


def _llama_case(folder: Path, proto: bytes, shape: str, **files: Any) -> Case:
    tokenizer = llama_json(proto, shape)
    write_folder(folder, config=LLAMA_IDS, **files or {"tokenizer": tokenizer})
    specials = [content for content, _ in ADDED] + ["<s>", "</s>", "<unk>"]

    def excluded(text: str, parse_special: bool) -> bool:
        if looks_special_only(text, parse_special):
            return True
        if shape in ("prepend", "never"):
            return False
        for token in specials:
            text = text.replace(token, "\0|")
        pieces = text.split("\0|")
        # Metaspace adds no ▁ where there is a space already; with "first", only to the text.
        return any(piece.startswith((" ", "▁")) for piece in pieces) or (
            shape == "first" and len(pieces) > 1
        )

    size = VOCAB_SIZE + len(ADDED) + (9 if "model" in files else 0)
    return Case(folder, size, fast_encoder(tokenizer), tuple(LLAMA_SPECIAL), excluded)


def _added_decoder() -> dict[str, Any]:
    decoder = {
        str(i): {"content": text, "special": True}
        for i, text in enumerate(("<unk>", "<s>", "</s>"))
    }
    for i, (text, special) in enumerate(ADDED[1:], VOCAB_SIZE + 1):
        decoder[str(i)] = {"content": text, "special": special}
    # <|im_start|> is in added_tokens.json, which alone would make it user-defined.
    return decoder | {str(VOCAB_SIZE): {"content": "<|im_start|>", "special": True}}


def _byte_case(folder: Path, tokenizer: Tokenizer, **options: Any) -> Case:
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    names = {"bos_token": BYTE_SPECIALS[0], "eos_token": {"content": BYTE_SPECIALS[1]}}
    write_folder(folder, tokenizer=tokenizer, tokenizer_config=names, config={})
    size = tokenizer.get_vocab_size() + 3
    excluded = options.get("excluded", newer_unicode)
    return Case(folder, size, fast_encoder(tokenizer), tuple(BYTE_SPECIAL), excluded)


def build_case(name: str, folder: Path, lines: list[str]) -> Case:
    """The case called `name`."""
    if name.startswith("spm"):
        options = {
            "spm-no-prefix": {"add_dummy_prefix": False},
            "spm-user-defined": {"user_defined_symbols": USER_DEFINED},
            "spm-user-defined-no-prefix": {
                "user_defined_symbols": USER_DEFINED,
                "add_dummy_prefix": False,
            },
        }
        proto = train_spm(lines, **options.get(name, {}))
        if name == "spm-added":
            added = {"<|im_start|>": VOCAB_SIZE}
            config = NAMES | {"added_tokens_decoder": _added_decoder(), "add_bos_token": True}
            return _llama_case(
                folder, proto, "prepend", model=proto, added_tokens=added, tokenizer_config=config
            )
        if name == "spm-transformers-5":  # added tokens in tokenizer.json only
            tokenizer = llama_json(proto, "prepend")
            return _llama_case(
                folder, proto, "prepend", model=proto, tokenizer=tokenizer, tokenizer_config=NAMES
            )
        write_folder(folder, config=LLAMA_IDS, model=proto)
        encode = sentencepiece_encoder(proto)
        if "user-defined" not in name:
            return Case(folder, VOCAB_SIZE + 7, encode)
        texts = (
            "x<custom>y <custom> z",
            "<custom>",
            "cab \n\n\n\n\nx      y 11",
            " <custom>\n\n\n",
        )
        if name == "spm-user-defined":
            return Case(folder, VOCAB_SIZE, encode, texts, lambda text, _: "<custom>" in text)
        return Case(folder, VOCAB_SIZE, encode, texts)
    if name.startswith("fast"):
        return _llama_case(folder, train_spm(lines), name.removeprefix("fast-"))
    if name == "llama-bpe":
        template = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single="<|begin_of_text|> $A",
                    pair="<|begin_of_text|> $A <|begin_of_text|> $B",
                    special_tokens=[("<|begin_of_text|>", 1500)],
                ),
            ]
        )
        return _byte_case(
            folder,
            byte_level(
                lines,
                regex_then_bytes(LLAMA3),
                BYTE_SPECIALS,
                ignore_merges=True,
                post_processor=template,
            ),
        )
    if name == "smaug-bpe":
        return _byte_case(folder, byte_level(lines, regex_then_bytes(LLAMA3), BYTE_SPECIALS))
    if name == "tekken":
        tokenizer = byte_level(lines, regex_then_bytes(TEKKEN), BYTE_SPECIALS, ignore_merges=True)
        return _byte_case(
            folder, tokenizer, excluded=lambda text, _: newer_unicode(text) or beyond_tekken(text)
        )
    if name == "qwen2":
        tokenizer = byte_level(
            lines, regex_then_bytes(QWEN2), BYTE_SPECIALS, normalizer=normalizers.NFC()
        )
        return _byte_case(
            folder, tokenizer, excluded=lambda text, _: newer_unicode(text) or not_nfc(text)
        )
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":  # its special tokens come first, and no post-processor follows
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer = byte_level(
            lines, pre_tokenizers.Sequence([digits, by_bytes]), BYTE_SPECIALS, first=BYTE_SPECIALS
        )
        return _byte_case(folder, tokenizer)
    assert name == "gpt-2"
    return _byte_case(folder, byte_level(lines, by_bytes, BYTE_SPECIALS))


TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
USER_DEFINED = ["<custom>", "▁▁", "▁▁▁▁", "\n\n", "\n\n\n", "1"]
SPM_CASES = [
    "spm-llama2",
    "spm-no-prefix",
    "spm-user-defined",
    "spm-user-defined-no-prefix",
    "spm-added",
    "spm-transformers-5",
]
FAST_CASES = ["fast-prepend", "fast-first", "fast-always", "fast-never"]
BYTE_CASES = ["llama-bpe", "smaug-bpe", "qwen2", "smollm", "gpt-2", "tekken"]
CASES = SPM_CASES + FAST_CASES + BYTE_CASES


def not_nfc(text: str) -> bool:
    """Text that Qwen 2's normalizer changes; llama.cpp normalizes nothing."""
    return unicodedata.normalize("NFC", text) != text


def beyond_tekken(text: str) -> bool:
    """What llama.cpp's substitute for the tekken expression cannot tell: case and marks.

    It writes "upper case" as "a letter, not a-z" (src/llama-vocab.cpp, PRE_TYPE_TEKKEN).
    """
    return any(
        unicodedata.category(char) in ("Lu", "Ll", "Lt", "Mn", "Mc", "Me")
        for char in text
        if not char.isascii()
    )


@pytest.fixture(scope="session")
def cases(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[str],
    load: Callable[[Vocab], LlamaVocab],
) -> Callable[[str], tuple[Case, Vocab, LlamaVocab]]:
    """Build a case once: the case, what we read of it, and llama.cpp with that."""
    built: dict[str, tuple[Case, Vocab, LlamaVocab]] = {}

    def get(name: str) -> tuple[Case, Vocab, LlamaVocab]:
        if name not in built:
            case = build_case(name, tmp_path_factory.mktemp(name), lines)
            vocab = read_vocab(case.folder, case.size)
            built[name] = case, vocab, load(vocab)
        return built[name]

    return get


# -- ids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("add_special", [False, True])
@pytest.mark.parametrize("parse_special", [False, True])
def test_ids_equal_the_source(
    cases: Any, name: str, add_special: bool, parse_special: bool
) -> None:
    case, _, llama = cases(name)
    if parse_special and name in SPM_CASES[:4]:
        parse_special = False  # SentencePiece has no such mode
    texts = [t for t in [*TEXTS, *case.special_texts] if not case.excluded(t, parse_special)]
    assert len(texts) >= 300
    for text in texts:
        ids = llama.encode(text, add_special=add_special, parse_special=parse_special)
        assert ids == case.encode(text, add_special, parse_special), text


@pytest.mark.parametrize("name", CASES)
def test_ids_equal_the_source_for_random_text(cases: Any, name: str) -> None:
    case, _, llama = cases(name)
    marks = st.sampled_from([*case.special_texts, "a", " ", "\n", "한국", "1"])
    parses = name not in SPM_CASES[:4]

    @examples(120)
    @given(random_text | st.lists(marks, max_size=8).map("".join))
    def check(text: str) -> None:
        if not case.excluded(text, parses):
            ids = llama.encode(text, add_special=True, parse_special=parses)
            assert ids == case.encode(text, True, parses)

    check()


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "smollm", "gpt-2"])
def test_every_class_of_characters_splits_alike(
    name: str, tmp_path: Path, load: Callable[[Vocab], LlamaVocab]
) -> None:
    # Merges of a, 1, ! and space with any byte show whether the next character is of their word.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    merges = [(head, char) for head in "a1!Ġ" for char in alphabet]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=name == "llama-bpe"))
    tokenizer.pre_tokenizer = {
        "llama-bpe": regex_then_bytes(LLAMA3),
        "qwen2": regex_then_bytes(QWEN2),
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), by_bytes]),
        "gpt-2": by_bytes,
    }[name]
    read = read_vocab(write_folder(tmp_path, tokenizer=tokenizer), len(vocab))
    assert read.pre == name
    llama = load(read)
    rng = random.Random(3)
    points = [*range(0x3000), *rng.sample(range(0x3000, 0x20000), 6000)]
    chars = [c for c in map(chr, points) if unicodedata.category(c) not in ("Cs", "Cn")]
    for i in range(0, len(chars), 64):
        text = "\nb".join(f"a{c}\na1{c}\na!{c}\na {c}a" for c in chars[i : i + 64])
        ids = llama.encode(text, add_special=False, parse_special=False)
        assert ids == tokenizer.encode(text).ids, chars[i : i + 64]


@pytest.mark.parametrize("name", ["fast-first", "fast-always"])
def test_metaspace_differs_by_its_prefix_rule_only(cases: Any, name: str) -> None:
    # llama.cpp has one rule: a space before the text and after each special token. That is the
    # rule of "prepend"; on the texts left out for Metaspace it gives exactly those ids.
    case, _, llama = cases(name)
    prepend = cases("fast-prepend")[0]
    left_out = [t for t in [*TEXTS, *case.special_texts] if case.excluded(t, True)]
    assert left_out
    for text in left_out:
        assert llama.encode(text, add_special=True, parse_special=True) == prepend.encode(
            text, True, True
        )


def test_nfc_is_the_only_difference_of_qwen2(cases: Any) -> None:
    case, vocab, llama = cases("qwen2")
    left_out = [text for text in TEXTS if not_nfc(text)]
    assert left_out and any("NFC" in note for note in vocab.notes)
    for text in left_out:
        composed = unicodedata.normalize("NFC", text)
        ids = llama.encode(composed, add_special=False, parse_special=True)
        assert ids == case.encode(text, False, True)


def test_a_space_follows_user_defined_pieces(cases: Any) -> None:
    # SPM + space prefix: llama_vocab::impl::tokenize sets is_prev_special after USER_DEFINED.
    case, vocab, llama = cases("spm-user-defined")
    ids = llama.encode("x<custom>y", add_special=False, parse_special=False)
    assert [vocab.tokens[i] for i in ids] == ["▁", "x", "<custom>", "▁y"]
    assert any("<custom>" in note for note in vocab.notes)
    assert case.encode("x<custom>", False, False) == ids[:-1]


def test_the_converters_scores_would_give_other_ids(
    cases: Any, load: Callable[[Vocab], LlamaVocab]
) -> None:
    _, vocab, ours = cases("fast-prepend")
    flat = load(replace(vocab, scores=[-1000.0] * len(vocab.tokens)))
    wrong = sum(
        flat.encode(text, add_special=False, parse_special=False)
        != ours.encode(text, add_special=False, parse_special=False)
        for text in TEXTS
    )
    assert wrong > 50
    assert not vocab.notes


# -- metadata -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_special_tokens_equal_the_converters(cases: Any, name: str) -> None:
    case, vocab, _ = cases(name)
    theirs = gguf.SpecialVocab(case.folder, load_merges=vocab.merges is not None, n_vocab=case.size)
    # Ours may know more: the converter finds names only among added tokens of tokenizer.json.
    assert theirs.special_token_ids.items() <= vocab.special_ids.items()
    ours = {key.split("_")[1]: value for key, value in vocab.flags.items() if key[:3] == "add"}
    assert theirs.add_special_token.items() <= ours.items()
    assert vocab.merges is None or theirs.merges == vocab.merges
    assert vocab.chat_template == theirs.chat_template


def test_sentencepiece_tokens_equal_the_converters(cases: Any) -> None:
    case, vocab, _ = cases("spm-llama2")
    rows = list(zip(vocab.tokens, vocab.scores, vocab.token_types, strict=True))
    theirs = list(gguf.SentencePieceVocab(case.folder).all_tokens())
    assert rows[:VOCAB_SIZE] == [(text.decode(), score, kind) for text, score, kind in theirs]
    unused = int(gguf.TokenType.UNUSED)
    assert rows[VOCAB_SIZE:] == [
        (f"[PAD{i}]", -10000.0, unused) for i in range(VOCAB_SIZE, VOCAB_SIZE + 7)
    ]


def test_added_tokens_of_sentencepiece_folders(cases: Any) -> None:
    _, vocab, _ = cases("spm-added")
    control, user = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
    assert vocab.token_types[:3] == [control] * 3  # added_tokens_decoder says so
    rows = list(zip(vocab.tokens, vocab.token_types, vocab.scores, strict=True))[VOCAB_SIZE:]
    assert rows[:4] == [
        ("<|im_start|>", control, -1000.0),
        ("<|im_end|>", control, -1000.0),
        ("<tool>", user, -1000.0),
        ("<｜pad｜>", control, -1000.0),
    ]
    assert len(rows) == 13 and rows[-1][0] == f"[PAD{VOCAB_SIZE + 12}]"
    assert vocab.flags == {"add_bos_token": True}
    assert vocab.special_ids == {"bos": 1, "eos": 2, "unk": 0}


def test_folders_without_added_tokens_decoder_keep_their_own_specials(cases: Any) -> None:
    _, vocab, _ = cases("spm-transformers-5")
    kind = gguf.TokenType
    assert vocab.token_types[:3] == [kind.UNKNOWN, kind.CONTROL, kind.CONTROL]
    assert vocab.scores[:3] == [0.0] * 3
    added = [kind.CONTROL, kind.CONTROL, kind.USER_DEFINED, kind.CONTROL]
    assert vocab.token_types[VOCAB_SIZE : VOCAB_SIZE + 4] == added


def test_fast_tokens_equal_the_converters(cases: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    case, vocab, _ = cases("fast-prepend")
    names = NAMES | {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_folder(tmp_path, tokenizer_config=names | {"pad_token": "<｜pad｜>"})
    shutil.copy(case.folder / "tokenizer.json", tmp_path)
    theirs = list(gguf.LlamaHfVocab(tmp_path).all_tokens())
    assert [text.decode() for text, _, _ in theirs] == vocab.tokens
    kinds = [kind for _, _, kind in theirs]
    # The converter misses special tokens that have no name in tokenizer_config.json.
    kinds[VOCAB_SIZE : VOCAB_SIZE + 2] = [gguf.TokenType.CONTROL] * 2
    assert kinds == vocab.token_types


def test_folders_saved_by_transformers_5(tmp_path: Path, lines: list[str], load: Any) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    tokenizer = transformers.TokenizersBackend(
        tokenizer_object=llama_json(train_spm(lines), "prepend"),
        **NAMES,
        pad_token="<｜pad｜>",
        extra_special_tokens=["<|im_end|>"],
    )
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path)
    vocab = read_vocab(tmp_path, VOCAB_SIZE + 4)
    assert vocab.special_ids == {"bos": 1, "eos": 2, "unk": 0, "pad": VOCAB_SIZE + 3}
    assert vocab.flags == {"add_bos_token": True, "add_sep_token": False}
    assert vocab.chat_template == "{{ messages }}"
    llama = load(vocab)
    for text in [*TEXTS, *LLAMA_SPECIAL]:
        assert llama.encode(text, add_special=True, parse_special=True) == tokenizer.encode(text)


def test_metadata_keys_types_and_order(cases: Any) -> None:
    _, vocab, _ = cases("spm-added")
    vocab = replace(
        vocab,
        flags={"add_space_prefix": False, "add_bos_token": True},
        chat_template="A",
        chat_templates={"tool_use": "B"},
    )
    entries = vocab_metadata(vocab)
    kind = gguf.GGUFValueType
    assert [(e.key, e.kind, e.item) for e in entries] == [
        ("tokenizer.ggml.add_space_prefix", kind.BOOL, None),
        ("tokenizer.ggml.model", kind.STRING, None),
        ("tokenizer.ggml.pre", kind.STRING, None),
        ("tokenizer.ggml.tokens", kind.ARRAY, kind.STRING),
        ("tokenizer.ggml.scores", kind.ARRAY, kind.FLOAT32),
        ("tokenizer.ggml.token_type", kind.ARRAY, kind.INT32),
        ("tokenizer.ggml.bos_token_id", kind.UINT32, None),
        ("tokenizer.ggml.eos_token_id", kind.UINT32, None),
        ("tokenizer.ggml.unknown_token_id", kind.UINT32, None),
        ("tokenizer.ggml.add_bos_token", kind.BOOL, None),
        ("tokenizer.chat_template.tool_use", kind.STRING, None),
        ("tokenizer.chat_templates", kind.ARRAY, kind.STRING),
        ("tokenizer.chat_template", kind.STRING, None),
    ]


def test_every_key_is_one_that_gguf_names() -> None:
    names = set(vars(gguf.Keys.Tokenizer).values())
    further = ("eot", "eom", "prefix", "suffix", "middle")
    flags = ("add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix")
    ids = dict.fromkeys(vocab_special.KINDS + further, 0)
    vocab = Vocab("gpt2", "gpt-2", ["a"], [0.0], [1], ["a b"], ids, dict.fromkeys(flags, True), "T")
    assert {entry.key for entry in vocab_metadata(vocab)} <= names


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template.json": '{"chat_template": "J"}'}, ("J", {})),
        ({"chat_template.json": '{"chat_template": "J"}', "chat_template.jinja": "F"}, ("F", {})),
        (
            {"chat_template.jinja": "F", "additional_chat_templates/tool use.jinja": "T"},
            ("F", {"tool_use": "T"}),
        ),
        (
            {"chat_template.jinja": "F", "tokenizer_config.json": '{"chat_template": "C"}'},
            ("C", {}),
        ),
        (
            {
                "tokenizer_config.json": json.dumps(
                    {
                        "chat_template": [
                            {"name": "default", "template": "D"},
                            {"name": "rag", "template": "R"},
                        ]
                    }
                )
            },
            ("D", {"rag": "R"}),
        ),
        ({}, (None, {})),
    ],
)
def test_chat_templates(tmp_path: Path, files: dict[str, str], expected: Any) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    vocab = read_vocab(write_folder(tmp_path, tokenizer=TINY), 300)
    assert (vocab.chat_template, vocab.chat_templates) == expected
    if (tmp_path / "tokenizer_config.json").is_file() and expected[0] == "C":
        assert gguf.SpecialVocab(tmp_path).chat_template == "C"


def test_code_llama_has_infill_tokens(tmp_path: Path, lines: list[str]) -> None:
    write_folder(tmp_path, config=LLAMA_IDS, model=train_spm(lines))
    ids = read_vocab(tmp_path, 32016).special_ids
    assert ids == LLAMA_SPECIAL_IDS | {
        "prefix": 32007,
        "suffix": 32008,
        "middle": 32009,
        "eot": 32010,
    }


LLAMA_SPECIAL_IDS = {"bos": 1, "eos": 2}


def test_special_ids_from_the_less_usual_files(tmp_path: Path) -> None:
    tokenizer = tiny(added_tokens=[added(256, "<s>"), added(257, "</s>"), added(258, "<p>")])
    write_folder(
        tmp_path,
        tokenizer=tokenizer,
        config={"bos_token_id": -1, "pad_token_id": 999, "eos_token_id": [257, 256]},
        special_tokens_map={"bos_token": {"content": "<s>"}, "pad_token": "<p>"},
        generation_config={"eos_token_id": [257, 256]},
    )
    vocab = read_vocab(tmp_path, 260)
    assert vocab.special_ids == {"bos": 256, "eos": 257, "pad": 258}
    assert any("pad token 999" in note for note in vocab.notes)
    assert vocab.flags == {"add_bos_token": False}


def test_the_post_processor_outweighs_the_config(tmp_path: Path) -> None:
    # As in the converter: the template is what transformers runs. (gguf 0.19 has it reversed.)
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}],
        "pair": [],
    }
    tokenizer = tiny(added_tokens=[added(256, "<s>")], post_processor=template)
    write_folder(tmp_path, tokenizer=tokenizer, tokenizer_config={"add_bos_token": False})
    vocab = read_vocab(tmp_path, 257)
    assert vocab.flags == {"add_bos_token": True} and vocab.special_ids == {"bos": 256}


def test_a_flag_without_its_token_is_not_written_as_set(tmp_path: Path) -> None:
    write_folder(tmp_path, tokenizer=TINY, tokenizer_config={"add_bos_token": True})
    vocab = read_vocab(tmp_path, 256)
    assert vocab.flags == {"add_bos_token": False}  # llama.cpp would add its default, token 11
    assert any("no bos token" in note for note in vocab.notes)


def test_a_template_that_ends_with_another_token_makes_eos_the_end_of_turn(tmp_path: Path) -> None:
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>"}},
            {"Sequence": {"id": "A"}},
            {"SpecialToken": {"id": "<p>"}},
        ],
        "pair": [
            {"SpecialToken": {"id": "<s>"}},
            {"Sequence": {"id": "A"}},
            {"SpecialToken": {"id": "</s>"}},
            {"Sequence": {"id": "B"}},
            {"SpecialToken": {"id": "<p>"}},
        ],
    }
    tokens = [added(256, "<s>"), added(257, "</s>"), added(258, "<p>")]
    write_folder(
        tmp_path,
        tokenizer=tiny(added_tokens=tokens, post_processor=template),
        tokenizer_config={"bos_token": "<s>", "eos_token": "</s>", "add_eos_token": True},
    )
    vocab = read_vocab(tmp_path, 260)
    theirs = gguf.SpecialVocab(tmp_path)
    assert vocab.special_ids == theirs.special_token_ids == {"bos": 256, "eos": 258, "eot": 257}
    assert vocab.flags == {
        f"add_{kind}_token": value for kind, value in theirs.add_special_token.items()
    }


# -- shapes of tokenizer.json -------------------------------------------------------------------


def split(pattern: dict[str, str], behavior: str, invert: bool) -> dict[str, Any]:
    """A pre-tokenizer of the Llama 3 kind."""
    steps = [
        {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]
    return {"type": "Sequence", "pretokenizers": steps}


@pytest.mark.parametrize(
    ("behavior", "invert", "pre"),
    [("Isolated", False, "smaug-bpe"), ("Removed", True, "smaug-bpe"), ("Removed", False, None)],
)
def test_spellings_of_one_split(
    tmp_path: Path, behavior: str, invert: bool, pre: str | None
) -> None:
    tokenizer = tiny(pre_tokenizer=split({"Regex": LLAMA3}, behavior, invert))
    write_folder(tmp_path, tokenizer=tokenizer)
    if pre is None:
        with pytest.raises(UnsupportedError, match="removed"):
            read_vocab(tmp_path, 256)
        return
    assert read_vocab(tmp_path, 256).pre == pre


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


@pytest.mark.parametrize(
    ("shape", "prefix", "n_notes"),
    [
        ({"normalizer": REPLACE, "pre_tokenizer": None}, False, 0),
        (
            {
                "normalizer": REPLACE,
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"String": " "},
                    "behavior": "MergedWithPrevious",
                },
            },
            False,
            0,
        ),
        (
            {
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE],
                },
                "pre_tokenizer": None,
            },
            True,
            0,
        ),
        (
            {"pre_tokenizer": {"type": "Metaspace", "add_prefix_space": True, "split": False}},
            True,
            1,
        ),
        ({"pre_tokenizer": {"type": "Metaspace", "add_prefix_space": False}}, False, 1),
        ({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "never"}}, False, 1),
        ({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first"}}, True, 3),
    ],
)
def test_shapes_of_the_space_prefix(
    tmp_path: Path, shape: dict[str, Any], prefix: bool, n_notes: int
) -> None:
    vocab = {f"<0x{i:02X}>": i for i in range(256)}
    for text in ("▁", "a", "▁▁"):  # the last needs merging across words
        vocab[text] = len(vocab)
    model = {"vocab": vocab, "merges": ["▁ ▁"]}
    read = read_vocab(write_folder(tmp_path, tokenizer=fallback(model=model, **shape)), 260)
    assert read.flags.get("add_space_prefix", True) is prefix
    assert len(read.notes) == n_notes


def test_the_config_decides_on_the_space_prefix(tmp_path: Path) -> None:
    config = {"add_prefix_space": False}
    write_folder(tmp_path, tokenizer=fallback(), tokenizer_config=config)
    assert read_vocab(tmp_path, 260).flags["add_space_prefix"] is False


@pytest.mark.parametrize(
    ("files", "adds"),
    [
        ({}, False),
        ({"tokenizer_config": {"tokenizer_class": "LlamaTokenizerFast"}}, None),
        ({"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"}}, False),
        ({"tokenizer_config": {"add_bos_token": True}}, True),
    ],
)
def test_bos_of_folders_without_a_template(
    tmp_path: Path, files: dict[str, Any], adds: bool | None
) -> None:
    write_folder(tmp_path, tokenizer=fallback(), **files)
    assert read_vocab(tmp_path, 260).flags.get("add_bos_token") is adds


def test_merges_may_be_strings_or_pairs(tmp_path: Path) -> None:
    for merges in (["a b", "ab c"], [["a", "b"], ["ab", "c"]]):
        write_folder(tmp_path, tokenizer=tiny(model={"merges": merges}))
        assert read_vocab(tmp_path, 256).merges == ["a b", "ab c"]


def test_tokens_that_swallow_spaces_carry_a_note(tmp_path: Path) -> None:
    write_folder(tmp_path, tokenizer=tiny(added_tokens=[added(256, "<s>") | {"rstrip": True}]))
    assert any("'<s>' swallow spaces" in note for note in read_vocab(tmp_path, 257).notes)


# -- refusals -----------------------------------------------------------------------------------


def added(token_id: Any, content: Any) -> dict[str, Any]:
    """An entry of ``added_tokens``."""
    return {"id": token_id, "content": content, "special": True, "normalized": False}


def tiny(**changes: Any) -> dict[str, Any]:
    """A byte-level ``tokenizer.json`` with two merges; `changes` are top-level or of the model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Two bytes that are never used make room for the merged tokens.
    vocab = {char: i for i, char in enumerate(alphabet[:254])} | {"ab": 254, "abc": 255}
    model = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"], ["ab", "c"]]}
    model |= changes.pop("model", {})
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    return {"added_tokens": [], "pre_tokenizer": by_bytes, "model": model} | changes


TINY = tiny()


def fallback(**changes: Any) -> dict[str, Any]:
    """A ``tokenizer.json`` of the Llama 2 kind."""
    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {"▁": 256, "a": 257, "▁a": 258, "<unk>": 259}
    model = {"type": "BPE", "vocab": vocab, "merges": ["▁ a"], "byte_fallback": True}
    model |= changes.pop("model", {}) | {"unk_token": "<unk>"}
    return {
        "pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first"},
        "model": model,
    } | changes


REFUSED = {
    "no tokenizer": ({}, "neither tokenizer.model nor tokenizer.json"),
    "tekken only": ({"tekken": {}}, "Mistral's own format"),
    "broken json": ({"tokenizer.json": "{"}, "cannot be read as JSON"),
    "not an object": ({"tokenizer": []}, "not a JSON object"),
    "not utf-8": ({"tokenizer.json": b"\xff\xfe"}, "UTF-8"),
    "no model": ({"tokenizer": {"model": None}}, "no model object"),
    "broken config": ({"tokenizer": TINY, "tokenizer_config.json": "[}"}, "tokenizer_config.json"),
    "unigram": ({"tokenizer": tiny(model={"type": "Unigram"})}, "'Unigram'"),
    "suffix": ({"tokenizer": tiny(model={"end_of_word_suffix": "</w>"})}, "end_of_word_suffix"),
    "no vocab": ({"tokenizer": tiny(model={"vocab": None})}, "model.vocab"),
    "id not int": ({"tokenizer": tiny(model={"vocab": {"a": "0"}, "merges": []})}, "token id '0'"),
    "id negative": ({"tokenizer": tiny(model={"vocab": {"a": -1}, "merges": []})}, "token id -1"),
    "id twice": (
        {"tokenizer": tiny(model={"vocab": {"a": 0, "b": 0}, "merges": []})},
        "id 0 to both 'a' and 'b'",
    ),
    "id too high": (
        {"tokenizer": tiny(model={"vocab": {"a": 300}, "merges": []})},
        "no row in the model's embedding, which has 300",
    ),
    "merges": ({"tokenizer": tiny(model={"merges": None})}, "model.merges is not a list"),
    "merge of one": ({"tokenizer": tiny(model={"merges": ["ab"]})}, "merges[0] is not a pair"),
    "merge unknown": ({"tokenizer": tiny(model={"merges": ["a c"]})}, "names 'ac'"),
    "added id": ({"tokenizer": tiny(added_tokens=[added(None, "<s>")])}, "'<s>'"),
    "added empty": ({"tokenizer": tiny(added_tokens=[added(256, "")])}, "added_tokens[0]"),
    "added list": ({"tokenizer": tiny(added_tokens={})}, None),
    "added twice": (
        {"tokenizer": tiny(added_tokens=[added(256, "<s>"), added(257, "<s>")])},
        "tokens 256 and 257 are both '<s>'",
    ),
    "surrogate": ({"tokenizer": tiny(added_tokens=[added(256, "\ud800")])}, "not valid Unicode"),
    "lower case": ({"tokenizer": tiny(normalizer={"type": "Lowercase"})}, "normalizer Lowercase"),
    "unknown split": (
        {
            "tokenizer": tiny(
                pre_tokenizer={"type": "Split", "pattern": {"Regex": r"\d+"}}
            )
        },
        r"regex=\d+",
    ),
    "prefix space": ({"tokenizer": tiny(pre_tokenizer={"type": "ByteLevel"})}, "prefix_space=True"),
    "ignore_merges": ({"tokenizer": tiny(model={"ignore_merges": True})}, "the known kinds are"),
    "no bytes": ({"tokenizer": fallback(model={"vocab": {"a": 0}, "merges": []})}, "0 of the 256"),
    "fallback normalizer": ({"tokenizer": fallback(normalizer={"type": "NFKC"})}, "NFKC"),
    "fallback words": ({"tokenizer": fallback(pre_tokenizer={"type": "Whitespace"})}, "Whitespace"),
    "fallback mark": (
        {"tokenizer": fallback(pre_tokenizer={"type": "Metaspace", "replacement": "_"})},
        "'_'",
    ),
    "template": (
        {"tokenizer": TINY, "tokenizer_config": {"chat_template": [{"name": "x"}]}},
        "lacks its name or template",
    ),
    "template type": ({"tokenizer": TINY, "tokenizer_config": {"chat_template": 1}}, "neither"),
    "tiktoken": ({"model": b"IQ== 0\nIg== 1\n"}, "tiktoken"),
    "truncated model": ({"model": b"\n\x0e\n\x05"}, "not a SentencePiece model"),
    "empty model": ({"model": b""}, "not a SentencePiece model"),
    "added_tokens": ({"tokenizer": TINY, "added_tokens": {"<x>": "1"}}, "added_tokens.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_damage_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    files, words = REFUSED[name]
    for key, content in files.items():
        if "." in key:
            data = content if isinstance(content, bytes) else content.encode()
            (tmp_path / key).write_bytes(data)
        elif name == "surrogate":
            (tmp_path / f"{key}.json").write_text(json.dumps(content))
        else:
            write_folder(tmp_path, **{key: content})
    if words is None:  # an empty object is as good as an empty list
        read_vocab(tmp_path, 300)
        return
    with pytest.raises(CheckpointError) as caught:
        read_vocab(tmp_path, 300)
    message = str(caught.value)
    assert words in message and str(tmp_path) in message and "\n" not in message.strip()


@pytest.mark.parametrize(
    ("options", "size", "words"),
    [
        ({"model_type": "unigram"}, 2000, "Unigram"),
        ({"byte_fallback": False}, 2000, "0 of the 256 byte tokens"),
        ({"treat_whitespace_as_suffix": True}, 2000, "treat_whitespace_as_suffix"),
        ({}, VOCAB_SIZE - 1, f"has {VOCAB_SIZE} tokens"),
    ],
)
def test_sentencepiece_models_that_llama_cpp_cannot_follow(
    tmp_path: Path, lines: list[str], options: dict[str, Any], size: int, words: str
) -> None:
    write_folder(tmp_path, model=train_spm(lines, **options))
    error = CheckpointError if size < VOCAB_SIZE else UnsupportedError
    with pytest.raises(error, match=words):
        read_vocab(tmp_path, size)


def test_added_token_beyond_the_embedding_is_refused(tmp_path: Path, lines: list[str]) -> None:
    write_folder(tmp_path, model=train_spm(lines), added_tokens={"<pad>": VOCAB_SIZE})
    with pytest.raises(CheckpointError, match=r"added_tokens\.json: token 1400 \('<pad>'\)"):
        read_vocab(tmp_path, VOCAB_SIZE)


def test_normalizing_models_carry_notes(tmp_path: Path, lines: list[str]) -> None:
    proto = train_spm(lines, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    notes = " ".join(read_vocab(write_folder(tmp_path, model=proto), VOCAB_SIZE).notes)
    assert "nmt_nfkc" in notes and "repeated, leading and trailing spaces" in notes


def test_merges_that_are_not_complete_carry_a_note(tmp_path: Path) -> None:
    vocab = {f"<0x{i:02X}>": i for i in range(256)}
    for text in ("▁", "a", "b", "c", "ab", "bc", "abc"):
        vocab[text] = len(vocab)
    model = {"vocab": vocab, "merges": ["a b", "b c", "ab c"]}  # not "a bc"
    read = read_vocab(write_folder(tmp_path, tokenizer=fallback(model=model)), len(vocab))
    assert any("merges do not list" in note for note in read.notes)
    assert read.scores[-3:] == [0.0, -1.0, -2.0]


def test_the_protobuf_reader_agrees_with_sentencepiece(tmp_path: Path, lines: list[str]) -> None:
    proto = train_spm(lines, user_defined_symbols=USER_DEFINED, control_symbols=["<c>"])
    theirs = sentencepiece.SentencePieceProcessor(model_proto=proto)
    write_folder(tmp_path, model=proto)
    model = vocab_spm.read_model(tmp_path / "tokenizer.model")
    assert len(model.pieces) == theirs.vocab_size()
    for i, piece in enumerate(model.pieces):
        assert piece.text == theirs.id_to_piece(i)
        assert piece.score == theirs.get_score(i)
        assert (piece.type == vocab_spm.CONTROL) == theirs.is_control(i)
        assert (piece.type == vocab_spm.UNKNOWN) == theirs.is_unknown(i)
        assert (piece.type == vocab_spm.BYTE) == theirs.is_byte(i)
        assert (piece.type == vocab_spm.UNUSED) == theirs.is_unused(i)
        assert (piece.type == vocab_spm.USER_DEFINED) == (piece.text in USER_DEFINED)


@examples(200)
@given(data=st.data())
def test_damaged_sentencepiece_bytes_never_crash(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.model"
    proto = bytearray(SMALL_MODEL)
    for _ in range(data.draw(st.integers(1, 4))):
        proto[data.draw(st.integers(0, len(proto) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(proto[: data.draw(st.integers(0, len(proto)))]))
    try:
        vocab_spm.read_model(path)
    except CheckpointError as error:
        assert "damaged.model" in str(error)


#: Three pieces, a trainer_spec with model_type BPE, a normalizer_spec named "identity".
SMALL_MODEL = (
    b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"
    b"\n\x0a\n\x03\xe2\x96\x81\x15\x00\x00\x80\xbf"
    b"\n\x08\n\x01a\x15\x00\x00\x00\xc0"
    b"\x12\x02\x18\x02\x1a\x0e\n\x08identity\x18\x01\x20\x00"
)
