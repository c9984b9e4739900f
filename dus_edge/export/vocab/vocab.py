"""A checkpoint's tokenizer as the ``tokenizer.*`` metadata of a GGUF file.

What is written is what llama.cpp's converter writes for ``LlamaForCausalLM`` and
``MistralForCausalLM`` (``LlamaModel.set_vocab`` in ``conversion/llama.py`` at 0c1e57098, the
commit that llama-cpp-python 0.3.36 carries), read from the files alone: no transformers, no
tokenizers. It differs where the converter's result gives other ids than the source tokenizer:

- added tokens of folders that transformers 5 saved are found (`vocab_spm.added_tokens`);
- scores of tokenizers that exist as ``tokenizer.json`` only follow the merges
  (`vocab_bpe.byte_fallback_table`), and their vocabulary is padded to the embedding;
- special added tokens are CONTROL there whether or not ``tokenizer_config.json`` names them;
- user-defined pieces of SentencePiece models stay whole (`vocab_spm`);
- ``add_dummy_prefix = false`` of a SentencePiece model is kept;
- ``add_bos_token`` is written as false where llama.cpp would add one unasked;
- special ids that only further files name are found (`vocab_special`);
- more tokens than the embedding has rows are refused, not dropped.

Limits that are llama.cpp's own are listed in `Vocab.notes`. One has no note because every
byte-level tokenizer has it: llama.cpp sorts characters into letters, digits, … by Unicode 15.1,
the tokenizers library of today by Unicode 16, so words in the scripts new in 16 split otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFValueType as Kind

from dus_edge.errors import CheckpointError, UnsupportedError
from dus_edge.export.gguf.format import KeyValue
from dus_edge.export.vocab import bpe as vocab_bpe
from dus_edge.export.vocab import pretokenizers
from dus_edge.export.vocab import special as vocab_special
from dus_edge.export.vocab import spm as vocab_spm
from dus_edge.export.vocab.files import AddedToken, TokenizerFiles, read_files
from dus_edge.export.vocab.table import TokenTable

_ID_KEYS = {
    "bos": "bos",
    "eos": "eos",
    "eot": "eot",
    "eom": "eom",
    "unk": "unknown",
    "sep": "seperator",  # the spelling of the format
    "pad": "padding",
    "mask": "mask",
    "prefix": "prefix",
    "suffix": "suffix",
    "middle": "middle",
}


@dataclass(frozen=True)
class Vocab:
    """A tokenizer as GGUF stores it.

    Attributes:
        model: ``llama`` (SentencePiece BPE) or ``gpt2`` (byte-level BPE).
        pre: how byte-level BPE cuts words (`pretokenizers`); ``default`` for SentencePiece.
        tokens: text by id; ``▁`` for a space (llama), GPT-2's byte alphabet (gpt2).
        scores: by id, for ``llama`` only: the highest is merged first.
        token_types: by id, values of ``gguf.TokenType``.
        merges: for ``gpt2`` only.
        special_ids: ids by kind: bos, eos, unk, pad, … (keys of the table above).
        flags: add_bos_token, add_eos_token, add_sep_token, add_space_prefix; a flag that is
            absent has llama.cpp's default for the model.
        chat_template: the default chat template.
        chat_templates: further ones by name.
        notes: what llama.cpp cannot do as the source tokenizer does, one sentence each.
        strips_as_phi3: whether added tokens swallow blanks as llama.cpp has them do in a model
            whose name says that it is a Phi-3.
    """

    model: str
    pre: str
    tokens: list[str]
    scores: list[float] | None
    token_types: list[int]
    merges: list[str] | None
    special_ids: dict[str, int]
    flags: dict[str, bool]
    chat_template: str | None = None
    chat_templates: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    strips_as_phi3: bool = False


#: Tokens that swallow no blanks in a Phi-3 (`llama_vocab::impl::load`).
_NOT_IN_PHI3 = ("<unk>", "<s>", "<|endoftext|>")


def read_vocab(folder: Path, vocab_size: int) -> Vocab:
    """Read the tokenizer of a checkpoint folder.

    Args:
        folder: with ``tokenizer.model`` or ``tokenizer.json``, and the config files beside it.
        vocab_size: rows of the embedding; rows without a token become ``[PAD{id}]``.

    Raises:
        CheckpointError: files are missing, damaged, or have more tokens than the embedding.
        UnsupportedError: llama.cpp has no tokenizer that works like this one.
    """
    files = read_files(folder)
    spm_path = folder / "tokenizer.model"
    if spm_path.is_file() and vocab_spm.is_sentencepiece(spm_path):
        return _read_spm(files, vocab_size)
    if files.tokenizer is not None:
        model = vocab_bpe.read_bpe(files)
        if model.byte_fallback:
            return _read_byte_fallback(files, model, vocab_size)
        return _read_byte_level(files, model, vocab_size)
    if spm_path.is_file():
        raise UnsupportedError(
            f"{spm_path}: not a SentencePiece model (a tiktoken table?); put the tokenizer.json "
            "of the same model beside it."
        )
    if (folder / "tekken.json").is_file():
        raise UnsupportedError(
            f"{folder / 'tekken.json'}: Mistral's own format is not read; put the "
            "tokenizer.json of the same model beside it."
        )
    raise CheckpointError(
        f"{folder}: neither tokenizer.model nor tokenizer.json is there; copy the tokenizer "
        "files of the base model into the folder."
    )


def vocab_metadata(vocab: Vocab) -> list[KeyValue]:
    """The ``tokenizer.*`` entries in the order in which llama.cpp's converter writes them."""
    entries: list[KeyValue] = []

    def add(key: str, value: Any, kind: Kind) -> None:
        if isinstance(value, list):
            entries.append(KeyValue(f"tokenizer.{key}", value, Kind.ARRAY, kind))
        else:
            entries.append(KeyValue(f"tokenizer.{key}", value, kind))

    flags = dict(vocab.flags)
    if (prefix := flags.pop("add_space_prefix", None)) is not None:
        add("ggml.add_space_prefix", prefix, Kind.BOOL)
    add("ggml.model", vocab.model, Kind.STRING)
    add("ggml.pre", vocab.pre, Kind.STRING)
    add("ggml.tokens", list(vocab.tokens), Kind.STRING)
    if vocab.scores is not None:
        add("ggml.scores", list(vocab.scores), Kind.FLOAT32)
    add("ggml.token_type", list(vocab.token_types), Kind.INT32)
    if vocab.merges is not None:
        add("ggml.merges", list(vocab.merges), Kind.STRING)
    for kind, token_id in vocab.special_ids.items():
        add(f"ggml.{_ID_KEYS[kind]}_token_id", token_id, Kind.UINT32)
    for name, value in flags.items():
        add(f"ggml.{name}", value, Kind.BOOL)
    for name, template in vocab.chat_templates.items():
        add(f"chat_template.{name}", template, Kind.STRING)
    if vocab.chat_templates:
        add("chat_templates", list(vocab.chat_templates), Kind.STRING)
    if vocab.chat_template is not None:
        add("chat_template", vocab.chat_template, Kind.STRING)
    return entries


def _read_spm(files: TokenizerFiles, vocab_size: int) -> Vocab:
    model = vocab_spm.read_model(files.folder / "tokenizer.model", vocab_size)
    prefix = _asked_prefix(files)
    space_prefix = model.dummy_prefix if prefix is None else prefix
    table = vocab_spm.spm_table(files, model, vocab_size)
    added, _ = vocab_spm.added_tokens(files)
    notes = [
        *vocab_spm.contradiction_notes(files, model),
        *vocab_spm.spm_notes(model, space_prefix),
        *_added_notes(added),
    ]
    return _finish(files, table, "llama", "default", space_prefix, notes)


def _read_byte_fallback(files: TokenizerFiles, model: vocab_bpe.BpeModel, n: int) -> Vocab:
    space_prefix, notes = pretokenizers.space_prefix(files.tokenizer or {}, model.path)
    prefix = _asked_prefix(files)
    space_prefix = space_prefix if prefix is None else prefix
    table = vocab_bpe.byte_fallback_table(files, model, n)
    notes += [*vocab_bpe.byte_fallback_notes(files, model), *_added_notes(files.added)]
    return _finish(files, table, "llama", "default", space_prefix, notes)


def _read_byte_level(files: TokenizerFiles, model: vocab_bpe.BpeModel, n: int) -> Vocab:
    pre, notes = pretokenizers.byte_level_pre(files.tokenizer or {}, model.path)
    table = vocab_bpe.byte_level_table(files, model, n)
    notes += _added_notes(files.added)
    merges = vocab_bpe.gguf_merges(model)
    return _finish(files, table, "gpt2", pre, False, notes, merges)


def _finish(
    files: TokenizerFiles,
    table: TokenTable,
    model: str,
    pre: str,
    space_prefix: bool,
    notes: list[str],
    merges: list[str] | None = None,
) -> Vocab:
    """Add what all kinds have: special tokens, flags and templates."""
    ids_by_text = {text: token_id for token_id, text in enumerate(table.tokens)}
    special = vocab_special.special_tokens(files, ids_by_text, table.size)
    special.ids.update(
        {
            kind: token_id
            for kind, token_id in vocab_special.code_llama_ids(files, table.size).items()
            if kind not in special.ids
        }
    )
    flags: dict[str, bool] = {}
    if (asked := _asked_prefix(files)) is not None:
        flags["add_space_prefix"] = asked
    elif model == "llama" and not space_prefix:
        flags["add_space_prefix"] = False  # llama.cpp's default is true
    flags.update({f"add_{kind}_token": value for kind, value in special.flags.items()})
    if "add_bos_token" not in flags and not _adds_bos_unasked(files, model):
        # llama.cpp adds one by default for Llama's tokenizers. (The converter has this for
        # vocab_size 49152 only, where it means Granite.)
        flags["add_bos_token"] = False
    for kind in ("bos", "eos"):
        if flags.get(f"add_{kind}_token") and kind not in special.ids and model == "gpt2":
            flags[f"add_{kind}_token"] = False
            notes.append(f"add_{kind}_token is set but no {kind} token is named: not added.")
    template, named = vocab_special.chat_templates(files)
    return Vocab(
        model=model,
        pre=pre,
        tokens=table.tokens,
        scores=table.scores if model == "llama" else None,
        token_types=table.types,
        merges=merges,
        special_ids=special.ids,
        flags=flags,
        chat_template=template,
        chat_templates=named,
        notes=(*notes, *vocab_special.end_notes(table.tokens, table.types), *special.notes),
        strips_as_phi3=_strips_as_phi3(files.added),
    )


def _adds_bos_unasked(files: TokenizerFiles, model: str) -> bool:
    """Whether the source adds a bos token though no file asks for one.

    transformers 4's Llama class did, whenever it was free to; a ``tokenizer.json`` with a
    template adds what the template lists, and any other class adds nothing.
    """
    if model == "gpt2" or vocab_special.has_template(files.tokenizer):
        return False
    kind = (files.tokenizer_config or {}).get("tokenizer_class")
    return (
        files.tokenizer is None
        or (files.folder / "tokenizer.model").is_file()
        or (isinstance(kind, str) and "Llama" in kind)
    )


def _asked_prefix(files: TokenizerFiles) -> bool | None:
    asked = (files.tokenizer_config or {}).get("add_prefix_space")
    return asked if isinstance(asked, bool) else None


def _strips_as_phi3(added: tuple[AddedToken, ...]) -> bool:
    stripping = any(token.strips for token in added)
    return stripping and all(
        (token.strips, token.strips_after) == (token.content not in _NOT_IN_PHI3,) * 2
        for token in added
    )


def _added_notes(added: tuple[AddedToken, ...]) -> list[str]:
    stripping = [token.content for token in added if token.strips]
    if not stripping:
        return []
    if _strips_as_phi3(added):
        return [
            f"added tokens such as {stripping[0]!r} swallow the blanks behind them; llama.cpp does "
            "so where general.name says Phi-3, as it does if the base's name does."
        ]
    return [
        f"added tokens such as {stripping[0]!r} swallow spaces beside them or match whole words "
        "only (lstrip, rstrip, single_word); llama.cpp matches the bare text."
    ]
