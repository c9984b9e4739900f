"""Tokenizers in the shapes that real models have, trained here; what llama.cpp makes of them.

llama.cpp loads a vocabulary-only GGUF file made of `vocab_metadata`.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import io
import json
import random
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import sentencepiece
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

from dus_edge.export.vocab.vocab import Vocab, vocab_metadata

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
        texts = tuple(USER_DEFINED_SPECIAL)
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
    if name in ("tekken", "gpt-4o"):
        words = regex_then_bytes(TEKKEN if name == "tekken" else GPT_4O)
        tokenizer = byte_level(lines, words, BYTE_SPECIALS, ignore_merges=name == "tekken")
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
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    + _SUFFIX
    + r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    + _SUFFIX
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
USER_DEFINED_SPECIAL = [
    "x<custom>y <custom> z", "<custom>", "cab \n\n\n\n\nx      y 11", " <custom>\n\n\n",
]  # fmt: skip
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
BYTE_CASES = ["llama-bpe", "smaug-bpe", "qwen2", "smollm", "gpt-2", "tekken", "gpt-4o"]
CASES = SPM_CASES + FAST_CASES + BYTE_CASES


def not_nfc(text: str) -> bool:
    """Text that Qwen 2's normalizer changes; llama.cpp normalizes nothing."""
    return unicodedata.normalize("NFC", text) != text


def beyond_tekken(text: str) -> bool:
    """What llama.cpp's substitute for the tekken expression cannot tell: case and marks.

    It writes "upper case" as "a letter, not a-z" (src/llama-vocab.cpp, PRE_TYPE_TEKKEN; GPT4O is
    alike).
    """
    return any(
        unicodedata.category(char) in ("Lu", "Ll", "Lt", "Mn", "Mc", "Me")
        for char in text
        if not char.isascii()
    )


# -- small files -----------------------------------------------------------------------------------


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
