"""How the models of each family read text: the kind of their tokenizer, with its special tokens.

The vocabularies are trained here and small. What stands around them is the published files': how
text is cut and normalized, which tokens are added, in which places and whether they are special,
what begins a text, and the chat templates.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from .family_models import FAMILY_FORMS, Form, write_model
from .vocab_cases import (
    GPT_4O,
    LLAMA3,
    QWEN2,
    TEKKEN,
    beyond_tekken,
    byte_level,
    llama_pieces,
    newer_unicode,
    not_nfc,
    regex_then_bytes,
    train_spm,
    write_folder,
)

#: Rows of an embedding are padded to a multiple of this.
ROWS = 64


@dataclass(frozen=True)
class TextCase:
    """A model's tokenizer.

    Attributes:
        name: of a model that has it.
        form: in `FAMILY_FORMS`; ``llama`` is Llama's own.
        words: how text is cut: a kind of `WORDS`, or ``llama-2``, ``gemma`` or ``phi-3``.
        special: texts of special tokens, in their order.
        plain: texts of added tokens that are not special.
        bos: the token that begins a text; None for none.
        eos: the token that ends a text.
        before: whether special tokens stand before all others.
        formats: cases of chat templates that such models have.
    """

    name: str
    form: str
    words: str
    special: tuple[str, ...]
    plain: tuple[str, ...] = ()
    bos: str | None = None
    eos: str = "<|endoftext|>"
    before: bool = False
    formats: tuple[str, ...] = ()

    def differs(self, text: str) -> bool:
        """Whether llama.cpp is known to read a text otherwise, whatever a file says.

        Its tables are of an older Unicode; it composes no characters; its expressions for GPT-4o's
        words and Tekken's know case in ASCII only. Where ▁▁ is a token, that is two blanks to it,
        and of runs longer than any token it cuts the longest first, as SentencePiece does. Phi-3's
        </s> is special in one of its files, and in another it is not.
        """
        return (
            newer_unicode(text)
            or (self.words == "qwen2" and not_nfc(text))
            or (self.words in ("tekken", "gpt-4o") and beyond_tekken(text))
            or (self.words == "gemma" and ("▁" in text or " " * 32 in text))
            or (self.words == "phi-3" and "</s>" in text)
        )

    @property
    def special_texts(self) -> tuple[str, ...]:
        """Texts with added tokens in them."""
        every = (*self.special, *self.plain)
        around = [f"{t} x{t}y {t}{t}  \n{t}" for t in every]
        return (*every, *around, "".join(every), *(t[:-1] for t in every))


_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
#: Pre-tokenizers, and whether a word that is a token is taken whole.
WORDS: dict[str, tuple[Any, bool]] = {
    "llama-bpe": (regex_then_bytes(LLAMA3), True),
    "cl100k": (regex_then_bytes(LLAMA3), False),
    "qwen2": (regex_then_bytes(QWEN2), False),
    "gpt-4o": (regex_then_bytes(GPT_4O), False),
    "tekken": (regex_then_bytes(TEKKEN), True),
    "gpt-2": (_BYTES, False),
    "digits": (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), _BYTES]), False),
}
_LLAMA3 = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
)
_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TOOLS = ("<tool_call>", "</tool_call>")
_MISTRAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[TOOL_CALLS]")
_GEMMA_TURNS = ("<start_of_turn>", "<end_of_turn>")
_GEMMA_RUNS = (
    *("\n" * n for n in range(1, 32)),
    *("▁" * n for n in range(2, 32)),
    *("<table>", "</table>", "<h1>", "</h1>"),
)
_PHI3 = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
_PHI4 = ("<|endoftext|>", "<|fim_prefix|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>")
_GRANITE = ("<|end_of_text|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>")
_GRANITE_ROLES = ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>")
_GLM = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>"),
    *("<|assistant|>", "<|observation|>"),
)
_EXAONE = (
    *("[PAD]", "[BOS]", "[EOS]", "[UNK]", "[|endofturn|]", "[|system|]", "[|user|]"),
    "[|assistant|]",
)

#: Every family, in each kind of tokenizer that its models have.
TEXT_CASES = (
    TextCase("SOLAR", "llama", "llama-2", (), bos="<s>", eos="</s>", formats=("solar-instruct",)),
    TextCase(
        "Llama-3.1", "llama", "llama-bpe", _LLAMA3, (), "<|begin_of_text|>", "<|eot_id|>",
        formats=("llama3", "llama3_1", "llama3_2"),
    ),
    TextCase("Midm-2.0", "llama", "llama-bpe", _LLAMA3, (), "<|begin_of_text|>", "<|eot_id|>"),
    TextCase(
        "Mistral-v0.3", "mistral", "llama-2", ("[INST]", "[/INST]"), (), "<s>", "</s>",
        formats=("mistral-instruct-v0.3",),
    ),
    TextCase(
        "Mistral-Nemo", "nemo", "tekken", _MISTRAL, (), "<s>", "</s>", True,
        ("Mistral Nemo", "Mistral Small", "Mistral Small, dated"),
    ),
    TextCase(
        "Qwen2.5", "qwen2", "qwen2", _CHATML, _TOOLS, eos="<|im_end|>", formats=("qwen2_5",)
    ),
    TextCase("A.X-4.0", "qwen2", "gpt-2", _CHATML, _TOOLS, eos="<|im_end|>"),
    TextCase(
        "Qwen3", "qwen3", "qwen2", _CHATML, (*_TOOLS, "<think>", "</think>"), eos="<|im_end|>",
        formats=("qwen3", "qwen3_instruct_2507"),
    ),
    TextCase(
        "SmolLM3", "smollm3", "llama-bpe", (*_LLAMA3, "<|im_start|>", "<|im_end|>"),
        ("<think>", "</think>"), None, "<|im_end|>", formats=("SmolLM3",),
    ),
    TextCase(
        "Granite-3.3", "granite", "digits", (*_GRANITE, *_GRANITE_ROLES), eos="<|end_of_text|>",
        before=True, formats=("Granite 3.0", "Granite 3.3"),
    ),
    TextCase("OLMo-2", "olmo2", "cl100k", ("<|endoftext|>", "<|pad|>"), formats=("OLMo 2",)),
    TextCase(
        "Gemma-2", "gemma2", "gemma", _GEMMA_TURNS, _GEMMA_RUNS, "<bos>", "<eos>",
        formats=("gemma",),
    ),
    TextCase(
        "Gemma-3", "gemma3", "gemma", _GEMMA_TURNS, _GEMMA_RUNS, "<bos>", "<eos>",
        formats=("gemma3",),
    ),
    TextCase("Phi-3-mini-4k-instruct", "phi3", "phi-3", _PHI3, formats=("phi3", "phi3_5")),
    TextCase("Phi-4", "phi3", "cl100k", _PHI4, eos="<|endoftext|>", formats=("Phi-4",)),
    TextCase("Phi-4-mini", "phi4-mini", "gpt-4o", _PHI3, formats=("Phi-4-mini",)),
    TextCase("GLM-4-0414", "glm4", "cl100k", _GLM, formats=("GLM-4",)),
    TextCase(
        "EXAONE-3.5", "llama", "digits", _EXAONE, eos="[|endofturn|]", before=True,
        formats=("EXAONE 3.5",),
    ),
)  # fmt: skip


def write_text_model(case: TextCase, folder: Path, lines: list[str]) -> Tokenizer:
    """A checkpoint of the case's family with its tokenizer; gives the tokenizers library's."""
    proto, tokenizer = _made(case, lines)
    n = -(-tokenizer.get_vocab_size() // ROWS) * ROWS
    ids = {"eos_token_id": tokenizer.token_to_id(case.eos), "bos_token_id": None}
    if case.bos:
        ids["bos_token_id"] = tokenizer.token_to_id(case.bos)
    form = FAMILY_FORMS.get(case.form) or Form(case.form)
    # Small: only the vocabulary is looked at.
    small = {"vocab_size": n, **ids, "hidden_size": 32, "intermediate_size": 32}
    write_model(replace(form, config={**form.config, **small}), folder)
    for file in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink(missing_ok=True)
    named = {"bos_token": case.bos, "eos_token": case.eos}
    about: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    if case.words == "phi-3":
        about["add_bos_token"] = False
    files: dict[str, Any] = {"tokenizer": tokenizer, "tokenizer_config": about}
    write_folder(folder, **files, **({"model": proto} if proto else {}))
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == n
    return tokenizer


def _made(case: TextCase, lines: list[str]) -> tuple[bytes | None, Tokenizer]:
    """tokenizer.model, of kinds that come with one, and tokenizer.json."""
    if case.words in WORDS:
        return None, _of_bytes(case, lines)
    if case.words == "gemma":
        return _gemma(case, lines)
    proto = train_spm(lines)
    return proto, _of_pieces(case, proto)


def _of_bytes(case: TextCase, lines: list[str]) -> Tokenizer:
    words, whole = WORDS[case.words]
    first, then = (case.special, ()) if case.before else ((), case.special)
    made = byte_level(
        lines,
        words,
        list(case.special),
        ignore_merges=whole,
        normalizer=normalizers.NFC() if case.words == "qwen2" else None,
        first=list(first),
    )
    assert all(made.token_to_id(text) is not None for text in (*first, *then))
    made.add_tokens([AddedToken(text, normalized=False) for text in case.plain])
    if case.bos:
        made.post_processor = processors.Sequence(
            [processors.ByteLevel(trim_offsets=False), _begins(case.bos, made)]
        )
    return made


def _begins(bos: str, tokenizer: Tokenizer) -> processors.PostProcessor:
    named = [(bos, tokenizer.token_to_id(bos))]
    return processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", special_tokens=named)


def _of_pieces(case: TextCase, proto: bytes) -> Tokenizer:
    """As transformers 4 converted Llama 2's, and Phi-3's, whose tokens swallow what follows."""
    vocab, merges = llama_pieces(proto)
    made = Tokenizer(
        models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    phi = case.words == "phi-3"
    for text in ("<unk>", "<s>", "</s>", *case.special):
        after = phi and text not in ("<unk>", "<s>", "<|endoftext|>")
        token = AddedToken(text, normalized=False, special=text != "</s>" or not phi, rstrip=after)
        (made.add_special_tokens if token.special else made.add_tokens)([token])
    if case.bos:
        made.post_processor = _begins(case.bos, made)
    return made


def _gemma(case: TextCase, lines: list[str]) -> tuple[bytes, Tokenizer]:
    """No space before a text; runs of newlines and blanks, and tags, as tokens of their own."""
    names = {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "unk": "<unk>"}
    places = {f"{kind}_id": i for i, kind in enumerate(names)}
    pieces = {f"{kind}_piece": text for kind, text in names.items()}
    symbols = ["<mask>", *case.special, *case.plain]
    proto = train_spm(
        lines, **places, **pieces, user_defined_symbols=symbols, add_dummy_prefix=False
    )
    vocab, merges = llama_pieces(proto)
    made = Tokenizer(
        models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = (*names.values(), "<mask>", *case.special)
    made.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    made.add_tokens([AddedToken(text, normalized=False) for text in case.plain])
    made.post_processor = _begins("<bos>", made)
    return proto, made
