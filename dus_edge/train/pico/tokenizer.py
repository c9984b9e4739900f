"""Train ``pico``'s SentencePiece tokenizer and write its Hugging Face twin."""

from __future__ import annotations

import io
import json
import string
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece as spm

VOCAB_SIZE = 4096
UNK, BOS, EOS = 0, 1, 2
SPECIALS = {UNK: "<unk>", BOS: "<s>", EOS: "</s>"}
SPACE = "\u2581"


def train_sentencepiece(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> bytes:
    """Train a Llama-style BPE model on whole files and return the ``.model`` bytes.

    Files go in whole, line ends included, so that line ends and indentation get pieces.
    """
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        split_digits=True,
        character_coverage=0.9999,
        required_chars=string.ascii_letters + string.digits + string.punctuation + "\n\t",
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        max_sentence_length=1 << 24,
        num_threads=2,
        minloglevel=2,
    )
    return model.getvalue()


def load_sentencepiece(model: bytes) -> spm.SentencePieceProcessor:
    """Load a processor from ``.model`` bytes."""
    return spm.SentencePieceProcessor(model_proto=model)


def pieces_of(processor: spm.SentencePieceProcessor) -> list[str]:
    """Return every piece of the vocabulary, by id."""
    return [processor.id_to_piece(i) for i in range(processor.get_piece_size())]


def is_normal(processor: spm.SentencePieceProcessor, token: int) -> bool:
    """Say whether a token is a piece of text (not a control, unknown or byte token)."""
    return not (
        processor.is_control(token) or processor.is_unknown(token) or processor.is_byte(token)
    )


def merges_of(processor: spm.SentencePieceProcessor) -> list[tuple[str, str]]:
    """Rebuild the BPE merges, best first, from the pieces' order.

    SentencePiece merges the adjacent pair whose joined piece has the best score; ids are in
    order of score. So every split of a piece into two pieces is a merge of that piece's rank.
    """
    pieces = pieces_of(processor)
    normal = {pieces[i]: i for i in range(len(pieces)) if is_normal(processor, i)}
    merges = []
    for piece, rank in normal.items():
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        found = [(a, b) for a, b in splits if a in normal and b in normal]
        merges += [(rank, normal[a], normal[b], a, b) for a, b in found]
    return [(a, b) for *_, a, b in sorted(merges)]


def tokenizer_json(processor: spm.SentencePieceProcessor) -> dict:
    """Return the ``tokenizer.json`` content that gives SentencePiece's ids after ``<s>``."""
    added = [
        {
            "id": token,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token, content in SPECIALS.items()
    ]
    bos = {"SpecialToken": {"id": SPECIALS[BOS], "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        # SentencePiece puts its dummy space in front of leading spaces too, which the
        # newer Metaspace pre-tokenizer does not; hence these two older normalizers.
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                bos,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": SPECIALS[BOS], "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {
                SPECIALS[BOS]: {"id": SPECIALS[BOS], "ids": [BOS], "tokens": [SPECIALS[BOS]]}
            },
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": SPECIALS[UNK],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces_of(processor))},
            "merges": [list(pair) for pair in merges_of(processor)],
        },
    }


def tokenizer_config(max_length: int) -> dict:
    """Return the ``tokenizer_config.json`` content for transformers 4 and 5."""
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": SPECIALS[BOS],
        "clean_up_tokenization_spaces": False,
        "eos_token": SPECIALS[EOS],
        "legacy": True,
        "model_max_length": max_length,
        "pad_token": None,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": SPECIALS[UNK],
        "use_default_system_prompt": False,
    }


def write_tokenizer(folder: Path, model: bytes, max_length: int) -> None:
    """Write ``tokenizer.model``, ``tokenizer.json`` and ``tokenizer_config.json``."""
    processor = load_sentencepiece(model)
    (folder / "tokenizer.model").write_bytes(model)
    for name, content in (
        ("tokenizer.json", tokenizer_json(processor)),
        ("tokenizer_config.json", tokenizer_config(max_length)),
    ):
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def encode_documents(
    processor: spm.SentencePieceProcessor, texts: Sequence[str]
) -> list[np.ndarray]:
    """Encode each text as int32 ids ``[<s>, ..., </s>]``, shape (tokens + 2,)."""
    return [
        np.array([BOS, *ids, EOS], dtype=np.int32)
        for ids in processor.encode(list(texts), num_threads=2)
    ]


def split_table(processor: spm.SentencePieceProcessor) -> dict[int, list[tuple[int, int]]]:
    """Map a token to the pairs of tokens that spell the same text.

    A pair which cuts right after the leading spaces comes first where there is one: that is
    how a prompt that ends in a space is cut.
    """
    pieces = pieces_of(processor)
    normal = {pieces[i]: i for i in range(len(pieces)) if is_normal(processor, i)}
    table = {}
    for piece, token in normal.items():
        spaces = len(piece) - len(piece.lstrip(SPACE))
        cuts = sorted(range(1, len(piece)), key=lambda cut, spaces=spaces: cut != spaces)
        pairs = [(normal.get(piece[:cut]), normal.get(piece[cut:])) for cut in cuts]
        found = [(a, b) for a, b in pairs if a is not None and b is not None]
        if found:
            table[token] = found
    return table


def split_some(
    ids: np.ndarray,
    table: dict[int, list[tuple[int, int]]],
    rate: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Replace a share ``rate`` of the tokens by a pair which spells the same text.

    A prompt may end inside a word or after a space; BPE then cuts it where the training text
    is never cut. A few such cuts in training keep the model sensible there.
    ``ids`` is int32 of shape (n,); the result is int32 of shape (n + cuts,).
    """
    out: list[int] = []
    draws = rng.random(len(ids))
    for token, draw in zip(ids.tolist(), draws.tolist(), strict=True):
        pairs = table.get(token) if draw < rate else None
        if pairs is None:
            out.append(token)
        else:
            # Half of the cuts take the first pair, the cut after leading spaces.
            pick = 0 if rng.random() < 0.5 else int(rng.integers(len(pairs)))
            out.extend(pairs[pick])
    return np.array(out, dtype=np.int32)
