"""A GGUF's vocabulary as the `tokenizer.json` that gives llama.cpp's ids.

The two kinds that llama.cpp has for Llama-form models (`src/llama-vocab.cpp` at 0c1e57098):

- ``gpt2``: byte-level BPE; words are cut as `data/pretokenizers.toml` says of the name;
- ``llama``: SentencePiece BPE, which has scores and no merges: of all neighbours whose joined text
  is a token, the pair with the highest score is joined first. The merges in that order are the
  same rule, as transformers' own converter of SentencePiece models has it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files as package_files
from typing import Any

from dus_edge.checkpoint.gguf.file import GGUFModel
from dus_edge.errors import CheckpointError, UnsupportedError

#: Numbers of llama.cpp's types of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
#: Tokens that are cut out of a text, and those that only the model's own templates may write.
_ADDED, _SPECIAL = (UNKNOWN, CONTROL, USER_DEFINED), (UNKNOWN, CONTROL)
#: Ids of special tokens where a SentencePiece vocabulary does not say them.
_SPM_IDS = {"bos": 1, "eos": 2, "unknown": 0}
#: GGUF's names of special tokens, and tokenizer_config.json's.
_ROLES = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
    "seperator": "sep_token",
    "mask": "mask_token",
}
#: What ends an answer beside the end of the text.
_ENDS = ("eos", "eot", "eom")
_PREFIX = "▁"


@dataclass(frozen=True)
class StoredVocab:
    """What a GGUF says of its tokenizer.

    Attributes:
        label: the file, for messages.
        kind: ``gpt2`` or ``llama``.
        pre: llama.cpp's name of how words are cut; None where the file has none.
        tokens: texts by id.
        types: numbers of llama.cpp's types, by id.
        scores: by id, of ``llama``; else empty.
        merges: of ``gpt2``; else empty.
        ids: of special tokens, by GGUF's names.
        flags: what the file says of ``add_bos_token`` and so on.
        chat_templates: by name; ``default`` is the one.
        context_length: tokens that the model was made for.
    """

    label: str
    kind: str
    pre: str | None
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    ids: Mapping[str, int]
    flags: Mapping[str, bool]
    chat_templates: Mapping[str, str]
    context_length: int | None = None

    @property
    def texts(self) -> dict[str, int]:
        """Ids by text, without the rows that only fill the embedding up.

        Raises:
            CheckpointError: the same text twice.
        """
        found: dict[str, int] = {}
        for i, text in enumerate(self.tokens):
            if self.types[i] == UNUSED and text == f"[PAD{i}]":
                continue
            if found.setdefault(text, i) != i:
                raise CheckpointError(
                    f"{self.label}: tokens {found[text]} and {i} are both {text!r}; fetch the file "
                    "again."
                )
        return found

    @property
    def prefixes(self) -> bool:
        """Whether a space is put before a text, of ``llama``."""
        return self.flags.get("add_space_prefix", True)

    def adds(self, role: str) -> bool:
        """Whether the token ``bos`` or ``eos`` is put around a text."""
        said = self.flags.get(f"add_{role}_token")
        if said is not None:
            return said and role in self.ids
        if role != "bos":
            return False
        return self.kind == "llama" or bool(_pretokenizer(self).get("adds_bos"))


def read_stored_vocab(gguf: GGUFModel) -> StoredVocab:
    """The tokenizer of a model.

    Raises:
        CheckpointError: a list is missing, or of another length than the others.
        UnsupportedError: a tokenizer of another kind.
    """
    values = gguf.values
    kind = gguf.text("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedError(
            f"{gguf.label}: its tokenizer is of the kind {kind!r}; known are llama (SentencePiece "
            "BPE) and gpt2 (byte-level BPE)."
        )
    tokens = gguf.array("tokenizer.ggml.tokens") or []
    n = len(tokens)
    lists = {
        "token_type": gguf.array("tokenizer.ggml.token_type") or [NORMAL] * n,
        "scores": gguf.array("tokenizer.ggml.scores") or [],
        "merges": gguf.array("tokenizer.ggml.merges") or [],
    }
    needed = "scores" if kind == "llama" else "merges"
    if not n or not lists[needed]:
        raise CheckpointError(
            f"{gguf.label}: tokenizer.ggml.{needed if n else 'tokens'} is missing; fetch the file "
            "again."
        )
    for name in ("token_type", "scores"):
        if lists[name] and len(lists[name]) != n:
            raise CheckpointError(
                f"{gguf.label}: tokenizer.ggml.{name} has {len(lists[name]):,} entries for {n:,} "
                "tokens; fetch the file again."
            )
    ids = dict(_SPM_IDS) if kind == "llama" else {}
    for name in (*_ROLES, *_ENDS):
        value = values.get(f"tokenizer.ggml.{name}_token_id")
        if type(value) is int:
            ids[name] = value
    flags = {
        name: value
        for name in ("add_bos_token", "add_eos_token", "add_space_prefix")
        if isinstance(value := values.get(f"tokenizer.ggml.{name}"), bool)
    }
    context = values.get(f"{values.get('general.architecture')}.context_length")
    return StoredVocab(
        label=gguf.label,
        kind=kind,
        pre=gguf.text("tokenizer.ggml.pre"),
        # llama.cpp's names of tokens without a text.
        tokens=[text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)],
        types=lists["token_type"],
        scores=lists["scores"] if kind == "llama" else [],
        merges=lists["merges"] if kind == "gpt2" else [],
        ids={name: i for name, i in ids.items() if 0 <= i < n},
        flags=flags,
        chat_templates=_templates(gguf),
        context_length=context if type(context) is int else None,
    )


def _templates(gguf: GGUFModel) -> dict[str, str]:
    found = {}
    if (default := gguf.text("tokenizer.chat_template")) is not None:
        found["default"] = default
    for name in gguf.array("tokenizer.chat_templates") or ():
        if (text := gguf.text(f"tokenizer.chat_template.{name}")) is not None:
            found[str(name)] = text
    return found


# -- tokenizer.json -----------------------------------------------------------------------------


def rebuilt_tokenizer(vocab: StoredVocab) -> dict[str, Any]:
    """The `tokenizer.json` whose ids are llama.cpp's.

    Raises:
        CheckpointError: a merge or a token that cannot be.
        UnsupportedError: words are cut in a way that is not known.
    """
    texts = vocab.texts
    formed = _formed(vocab, texts) if vocab.kind == "llama" else frozenset()
    how = _byte_level(vocab, texts) if vocab.kind == "gpt2" else _sentencepiece(vocab, texts)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                # In normalized text, which needs no space prefix behind them, unless there is one:
                # the normalizer would put it into the token as well.
                "normalized": text in formed and not vocab.prefixes,
                "special": vocab.types[i] in _SPECIAL,
            }
            for text, i in texts.items()
            if vocab.types[i] in _ADDED or text in formed
        ],
        **how,
        "post_processor": _post_processor(vocab),
    }


def rebuilt_tokenizer_config(vocab: StoredVocab) -> dict[str, Any]:
    """`tokenizer_config.json`: special tokens, what is added around a text, chat templates."""
    named = {role: vocab.tokens[vocab.ids[k]] for k, role in _ROLES.items() if k in vocab.ids}
    templates: Any = vocab.chat_templates.get("default")
    if set(vocab.chat_templates) - {"default"}:
        templates = [{"name": k, "template": v} for k, v in vocab.chat_templates.items()]
    return {
        # transformers 4 and 5 take tokenizer.json as it is for this class.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "add_bos_token": vocab.adds("bos"),
        "add_eos_token": vocab.adds("eos"),
        "clean_up_tokenization_spaces": False,
        **({"model_max_length": vocab.context_length} if vocab.context_length else {}),
        **({"chat_template": templates} if templates else {}),
    }


def end_ids(vocab: StoredVocab) -> list[int]:
    """Ids of the tokens that end an answer, each once."""
    return list(dict.fromkeys(vocab.ids[name] for name in _ENDS if name in vocab.ids))


@cache
def _pretokenizers() -> dict[str, Mapping[str, Any]]:
    """Kinds of `data/pretokenizers.toml`, by every name that llama.cpp has for each."""
    text = (package_files("dus_edge") / "data" / "pretokenizers.toml").read_text(encoding="utf-8")
    kinds = tomllib.loads(text)["kind"]
    return {name: kind for kind in kinds for name in (kind["pre"], *kind.get("also", ()))}


def _pretokenizer(vocab: StoredVocab) -> Mapping[str, Any]:
    found = _pretokenizers().get(vocab.pre or "")
    if found is None:
        known = ", ".join(dict.fromkeys(kind["pre"] for kind in _pretokenizers().values()))
        raise UnsupportedError(
            f"{vocab.label}: its tokenizer cuts words as {vocab.pre!r} does (tokenizer.ggml.pre), "
            f"which is not known; known are {known}. `dus-edge gguf` without -q needs no tokenizer."
        )
    return found


def _byte_level(vocab: StoredVocab, texts: Mapping[str, int]) -> dict[str, Any]:
    kind = _pretokenizer(vocab)
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [_cut(step) for step in kind["steps"]],
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            **_BPE,
            "ignore_merges": kind["ignore_merges"],
            "vocab": dict(texts),
            "merges": [_pair(vocab, merge, texts) for merge in vocab.merges],
        },
    }


_BPE = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}


def _cut(step: Mapping[str, Any]) -> dict[str, Any]:
    """A step of a pre-tokenizer as tokenizer.json spells it."""
    if step["type"] == "Split":
        pattern = {"Regex": step["regex"]}
        return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    if step["type"] == "Digits":
        return {"type": "Digits", "individual_digits": step["individual_digits"]}
    shown = {"add_prefix_space": False, "trim_offsets": True, "use_regex": step["use_regex"]}
    return {"type": "ByteLevel", **shown}


def _pair(vocab: StoredVocab, merge: str, texts: Mapping[str, int]) -> list[str]:
    # A part may begin with a space, so the one that parts them is looked for behind that.
    at = merge.find(" ", 1)
    left, right = merge[:at], merge[at + 1 :]
    if at < 0 or not {left, right, left + right} <= texts.keys():
        raise CheckpointError(
            f"{vocab.label}: the merge {merge!r} names what is no token; fetch the file again."
        )
    return [left, right]


def _sentencepiece(vocab: StoredVocab, texts: Mapping[str, int]) -> dict[str, Any]:
    n_bytes = sum(kind == BYTE for kind in vocab.types)
    if n_bytes != 256:
        raise UnsupportedError(
            f"{vocab.label}: {n_bytes} of the 256 byte tokens <0x00> … <0xFF> exist; a tokenizer "
            "without them is not supported."
        )
    prepend = [{"type": "Prepend", "prepend": _PREFIX}] if vocab.prefixes else []
    space = {"type": "Replace", "pattern": {"String": " "}, "content": _PREFIX}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if vocab.prefixes else []
    unknown = vocab.ids.get("unknown")
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, space]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _PREFIX}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            **_BPE,
            "unk_token": None if unknown is None else vocab.tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": dict(texts),
            "merges": _merges(vocab, texts),
        },
    }


def _formed(vocab: StoredVocab, texts: Mapping[str, int]) -> frozenset[str]:
    """Tokens that llama.cpp forms of characters which are no tokens themselves.

    Two newlines may be a token where one is but a byte. tokenizer.json's merges are of tokens, so
    these are cut out of the text instead, the longest first. Where there is a space prefix, one
    follows each of them, which llama.cpp does not put there.
    """
    apart = {
        text
        for text, i in texts.items()
        if len(text) > 1
        and vocab.types[i] not in (*_ADDED, BYTE)
        and any(char not in texts for char in text)
    }
    formed: set[str] = set()

    def is_part(text: str) -> bool:
        return len(text) == 1 or text in formed or (text in texts and text not in apart)

    for text in sorted(apart, key=len):
        if any(is_part(text[:cut]) and is_part(text[cut:]) for cut in range(1, len(text))):
            formed.add(text)
    return frozenset(formed)


def _merges(vocab: StoredVocab, texts: Mapping[str, int]) -> list[list[str]]:
    """Every pair of tokens that joins to one, those of the highest score first."""
    ranked = sorted(
        ((text, i) for text, i in texts.items() if len(text) > 1),
        key=lambda item: (-vocab.scores[item[1]], item[1]),
    )
    return [
        [text[:cut], text[cut:]]
        for text, _ in ranked
        for cut in range(1, len(text))
        if text[:cut] in texts and text[cut:] in texts
    ]


def _post_processor(vocab: StoredVocab) -> dict[str, Any]:
    first = [vocab.ids["bos"]] if vocab.adds("bos") and "bos" in vocab.ids else []
    last = [vocab.ids["eos"]] if vocab.adds("eos") else []
    if not first and not last and vocab.kind == "gpt2":
        return {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": False,
            "use_regex": True,
        }

    def pieces(sequence: str, type_id: int) -> list[dict[str, Any]]:
        around = [
            [{"SpecialToken": {"id": vocab.tokens[i], "type_id": type_id}} for i in ids]
            for ids in (first, last)
        ]
        return [*around[0], {"Sequence": {"id": sequence, "type_id": type_id}}, *around[1]]

    return {
        "type": "TemplateProcessing",
        "single": pieces("A", 0),
        "pair": [*pieces("A", 0), *pieces("B", 1)],
        "special_tokens": _templated(vocab, [*first, *last]),
    }


def _templated(vocab: StoredVocab, ids: Iterable[int]) -> dict[str, Any]:
    texts = {i: vocab.tokens[i] for i in ids}
    return {text: {"id": text, "ids": [i], "tokens": [text]} for i, text in texts.items()}
