"""Small sound files of every format that is read, with where their parts lie."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .mutate import Length, Mark, Seed, gguf_string, json_marks, piece, varint

HIDDEN, FFN, LAYERS, TOKENS = 32, 32, 2, 262
#: The smallest Llama that a block of 32 divides.
CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": TOKENS,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": [2],
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
}


def _json_seed(name: str, files: Mapping[str, Any], **more: Any) -> Seed:
    texts = {file: json.dumps(value) for file, value in files.items()}
    return Seed(
        name,
        {file: text.encode() for file, text in texts.items()},
        {file: json_marks(text) for file, text in texts.items()},
        **more,
    )


def _joined(name: str, *seeds: Seed) -> Seed:
    """A folder with the files of several."""
    out: tuple[dict, dict, dict] = {}, {}, {}
    for seed in seeds:
        for whole, part in zip(out, (seed.files, seed.marks, seed.lengths), strict=True):
            whole |= part
    return Seed(name, *out)


# GGUF


class _Builder:
    """Bytes that remember where their parts are."""

    def __init__(self) -> None:
        self.data = b""
        self.marks: list[Mark] = []

    def add(self, data: bytes, kind: str = "", group: int = 0) -> None:
        if kind:
            self.marks.append(Mark(len(self.data), len(self.data) + len(data), kind, group))
        self.data += data

    def chunk(self, start: int, kind: str, group: int) -> None:
        self.marks.append(Mark(start, len(self.data), f"chunk:{kind}", group))


def _gguf_value(value: Any) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + gguf_string(value.encode())
        case [str(), *_]:
            items = b"".join(gguf_string(v.encode()) for v in value)
            return struct.pack("<IIQ", 9, 8, len(value)) + items
    return struct.pack(f"<IIQ{len(value)}f", 9, 6, len(value), *value)


def gguf_file(
    values: Mapping[str, Any], tensors: Mapping[str, tuple[tuple[int, ...], int, bytes]]
) -> _Builder:
    """A GGUF file; tensors by name are dimensions (a row's first), type and bytes."""
    out = _Builder()
    out.add(b"GGUF", "u32")
    out.add(struct.pack("<I", 3), "u32")
    out.add(struct.pack("<Q", len(tensors)), "u64")
    out.add(struct.pack("<Q", len(values)), "u64")
    for key, value in values.items():
        start = len(out.data)
        out.add(gguf_string(key.encode()), "gguf-string", 1)
        encoded = _gguf_value(value)
        if not isinstance(value, list):
            out.add(encoded, "gguf-value", 2)
        else:
            first = len(out.data)
            out.add(encoded[:4])
            out.add(encoded[4:8], "u32", 3)
            out.add(encoded[8:16], "u64", 3)
            out.add(encoded[16:])
            out.marks.append(Mark(first, len(out.data), "gguf-value", 2))
        out.chunk(start, "value", 4)
    offset = 0
    for name, (dims, kind, data) in tensors.items():
        start = len(out.data)
        out.add(gguf_string(name.encode()), "gguf-string", 5)
        out.add(struct.pack("<I", len(dims)), "u32", 6)
        for n in dims:
            out.add(struct.pack("<Q", n), "u64", 7)
        out.add(struct.pack("<I", kind), "u32", 8)
        out.add(struct.pack("<Q", offset), "u64", 9)
        out.chunk(start, "tensor", 10)
        offset += -(-len(data) // 32) * 32
    out.add(bytes(-len(out.data) % 32))
    for _, _, data in tensors.values():
        out.add(data + bytes(-len(data) % 32))
    return out


def _gguf_seed(name: str, file: str, built: _Builder) -> Seed:
    return Seed(name, {file: built.data}, {file: tuple(built.marks)})


def gguf_model(spare: str = "blk.0.spare") -> Seed:
    """A whole model of one layer; its matrices are of all the block types in turn."""
    f32, f16, q8, q4_0, q4_1 = (0, 4), (1, 2), (8, 34 / 32), (2, 18 / 32), (3, 20 / 32)
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {"token_embd": (HIDDEN, 3), "output": (HIDDEN, 3), "output_norm": (HIDDEN,)}
    shapes |= {f"blk.0.{m}": (HIDDEN, HIDDEN) for m in matrices}
    shapes |= {f"blk.0.{m}": (HIDDEN,) for m in ("attn_norm", "ffn_norm")}
    tensors = {}
    for i, (name, dims) in enumerate(shapes.items()):
        kind, width = f32 if len(dims) == 1 else (f16, q8, q4_0, q4_1)[i % 4]
        tensors[f"{name}.weight"] = dims, kind, bytes(int(np.prod(dims) * width))
    # Two that a model can do without: their names are free to be anything.
    tensors |= {name: ((1,), 0, bytes(4)) for name in ("rope_freqs.weight", spare)}
    values = {
        "general.architecture": "llama",
        "general.alignment": 32,
        "general.name": "x",
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": HIDDEN,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "a"],
        "tokenizer.ggml.scores": [0.0, 0.0, -1.0],
        "tokenizer.ggml.add_bos_token": True,
        "split.count": 0,
    }
    return _gguf_seed("gguf", "m.gguf", gguf_file(values, tensors))


def gguf_imatrix() -> Seed:
    tensors: dict[str, tuple[tuple[int, ...], int, bytes]] = {}
    for name in ("blk.0.attn_q.weight", "blk.0.ffn_up.weight"):
        tensors[f"{name}.in_sum2"] = (8, 1), 0, np.arange(8, dtype="<f4").tobytes()
        tensors[f"{name}.counts"] = (1, 1), 0, np.array([512], "<f4").tobytes()
    values = {
        "general.type": "imatrix",
        "imatrix.datasets": ["text.txt"],
        "imatrix.chunk_count": 1,
        "imatrix.chunk_size": 512,
    }
    return _gguf_seed("imatrix", "x.gguf", gguf_file(values, tensors))


def legacy_imatrix() -> Seed:
    out, names = _Builder(), ("blk.0.attn_q.weight", "blk.0.ffn_up.weight", "output.weight")
    out.add(struct.pack("<i", len(names)), "u32")
    for name in names:
        start = len(out.data)
        out.add(struct.pack("<i", len(name)), "u32", 1)
        out.add(name.encode(), "text", 2)
        out.add(struct.pack("<i", 3), "u32", 3)
        out.add(struct.pack("<i", 8), "u32", 4)
        for value in (0.0, 1.0, 2.0, 3.5) * 2:
            out.add(struct.pack("<f", value), "f32", 5)
        out.chunk(start, "entry", 6)
    out.add(struct.pack("<i", 3), "u32", 7)
    out.add(struct.pack("<i", 4), "u32", 7)
    out.add(b"text")
    return _gguf_seed("imatrix-legacy", "x.dat", out)


# safetensors, and folders of them


def safetensors(name: str, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> Seed:
    """A seed of one file, from dtype, shape and bytes by tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for key, (dtype, shape, data) in tensors.items():
        offsets = [at, at + len(data)]
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        at += len(data)
    text = json.dumps(header)
    blob = struct.pack("<Q", len(text)) + text.encode()
    whole = blob + b"".join(data for _, _, data in tensors.values())
    marks = (Mark(0, 8, "u64", 1), *json_marks(text, 8))
    return Seed(name, {name: whole}, {name: marks}, {name: (Length(0, 8, len(blob)),)})


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (TOKENS, HIDDEN)}
    for i in range(LAYERS):
        for part, rows in (("q", HIDDEN), ("k", HIDDEN // 2), ("v", HIDDEN // 2), ("o", HIDDEN)):
            shapes[f"model.layers.{i}.self_attn.{part}_proj.weight"] = (rows, HIDDEN)
        for part in ("gate", "up", "down"):
            shapes[f"model.layers.{i}.mlp.{part}_proj.weight"] = (FFN, HIDDEN)
        for part in ("input", "post_attention"):
            shapes[f"model.layers.{i}.{part}_layernorm.weight"] = (HIDDEN,)
    return shapes | {"model.norm.weight": (HIDDEN,)}


def _f16(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {k: ("F16", s, bytes(2 * int(np.prod(s)))) for k, s in shapes.items()}


def plain_weights(name: str = "model.safetensors") -> Seed:
    return safetensors(name, _f16(_shapes()))


def plain_folder() -> Seed:
    """Two shards and their index."""
    tensors, files = _f16(_shapes()), ("a.safetensors", "b.safetensors")
    parts = [
        safetensors(file, {k: v for i, (k, v) in enumerate(tensors.items()) if i % 2 == n})
        for n, file in enumerate(files)
    ]
    index = {"metadata": {}, "weight_map": {k: files[i % 2] for i, k in enumerate(tensors)}}
    small = _json_seed("", {"config.json": CONFIG, "model.safetensors.index.json": index})
    return _joined("plain folder", small, *parts)


def gptq_folder() -> Seed:
    tensors = {}
    for key, (dtype, shape, data) in _f16(_shapes()).items():
        stem = key.removesuffix("weight")
        if "_proj" not in key:
            tensors[key] = dtype, shape, data
            continue
        n_out, n_in = shape
        tensors[stem + "qweight"] = "I32", (n_in // 8, n_out), bytes(n_in * n_out // 2)
        tensors[stem + "qzeros"] = "I32", (1, n_out // 8), bytes(n_out // 2)
        tensors[stem + "scales"] = "F16", (1, n_out), bytes(2 * n_out)
        tensors[stem + "g_idx"] = "I32", (n_in,), bytes(4 * n_in)
    details = {
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": True,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
    }
    files = {
        "config.json": {**CONFIG, "quantization_config": details},
        "quantize_config.json": details,
    }
    return _joined("GPTQ folder", _json_seed("", files), safetensors("model.safetensors", tensors))


def old_gptq_folder() -> Seed:
    """Its settings stand in quantize_config.json alone."""
    whole = gptq_folder()
    files = {"config.json": CONFIG, "quantize_config.json": json.loads(_settings(whole))}
    weights = "model.safetensors"
    rest = Seed(
        "",
        {"gptq_model-4bit-32g.safetensors": whole.files[weights]},
        {"gptq_model-4bit-32g.safetensors": whole.marks[weights]},
        {"gptq_model-4bit-32g.safetensors": whole.lengths[weights]},
    )
    return _joined("old GPTQ folder", _json_seed("", files), rest)


def _settings(seed: Seed) -> bytes:
    return seed.files["quantize_config.json"]


def bnb_folder() -> Seed:
    tensors = {}
    for key, (dtype, shape, data) in _f16(_shapes()).items():
        if "_proj" not in key:
            tensors[key] = dtype, shape, data
            continue
        n = int(np.prod(shape))
        tensors[key] = "U8", (n // 2, 1), bytes(n // 2)
        tensors[f"{key}.absmax"] = "F32", (n // 64,), bytes(4 * (n // 64))
        tensors[f"{key}.quant_map"] = "F32", (16,), bytes(64)
        tensors[f"{key}.quant_state.bitsandbytes__nf4"] = "U8", (8,), bytes(8)
    details = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_use_double_quant": False,
    }
    config = _json_seed("", {"config.json": {**CONFIG, "quantization_config": details}})
    return _joined("bitsandbytes folder", config, safetensors("model.safetensors", tensors))


def configs() -> list[Seed]:
    ropes = {
        "plain": {},
        "scaled": {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32}},
        "five": {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "head_dim": 32,
            "attention_bias": True,
            "dtype": "bfloat16",
        },
        "mistral": {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "sliding_window": 32,
        },
    }
    return [_json_seed(name, {"config.json": {**CONFIG, **more}}) for name, more in ropes.items()]


# Tokenizers


_TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False},
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "add_prefix_space": None,
    "model_max_length": 64,
    "chat_template": [
        {"name": "default", "template": "{{ messages }}"},
        {"name": "tool use", "template": "x"},
    ],
    "added_tokens_decoder": {
        "0": {"content": "<unk>", "special": True},
        "1": {"content": "<s>", "special": True},
        "260": {"content": "<x>", "special": False, "lstrip": True},
    },
}
_AROUND = {
    "generation_config.json": {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 0},
    "special_tokens_map.json": {"pad_token": {"content": "</s>"}, "unk_token": "<unk>"},
}
_TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 1}},
    ],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}


def _added(token_id: int, content: str, **more: Any) -> dict[str, Any]:
    return {"id": token_id, "content": content, "special": True, "normalized": False, **more}


def byte_level() -> Seed:
    """Of the GPT-2 kind."""
    alphabet = [
        chr(b) if chr(b).isprintable() and b not in (32, 160, 173) else "" for b in range(256)
    ]
    spare = iter(range(256, 512))
    vocab = {char or chr(next(spare)): i for i, char in enumerate(alphabet)}
    vocab |= {"ab": 256, "abc": 257}
    tokenizer = {
        "added_tokens": [
            _added(258, "<s>"),
            _added(259, "</s>"),
            _added(260, "<unk>", lstrip=True),
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "post_processor": {"type": "Sequence", "processors": [{"type": "ByteLevel"}, _TEMPLATE]},
        "model": {"type": "BPE", "vocab": vocab, "merges": ["a b", ["ab", "c"]]},
    }
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": _TOKENIZER_CONFIG, **_AROUND}
    return _json_seed("byte-level BPE", files)


def byte_fallback() -> Seed:
    """Of the Llama 2 kind, without a tokenizer.model."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": i + 3 for i in range(256)}
    vocab |= {"▁": 259, "a": 260, "▁a": 261}
    tokenizer = {
        "added_tokens": [_added(i, t) for i, t in enumerate(("<unk>", "<s>", "</s>"))],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": _TEMPLATE,
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": ["▁ a"],
            "byte_fallback": True,
            "unk_token": "<unk>",
        },
    }
    meta = {"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first"}, "normalizer": None}
    files = {"tokenizer.json": tokenizer | meta, "added_tokens.json": {}, **_AROUND}
    return _json_seed("byte-fallback BPE", files)


def sentencepiece() -> Seed:
    out = _Builder()
    entries = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    entries += [(f"<0x{i:02X}>", 0.0, 6) for i in range(256)]
    entries += [("▁", -1.0, 1), ("a", -2.0, 1)]
    for i, (text, score, kind) in enumerate(entries):
        start, body = len(out.data), piece(text.encode(), score, kind)
        group = 1 if 3 <= i < 259 else 2
        out.add(body[:1], "u8", 10 + group)
        out.add(body[1:2], "varint", 20 + group)
        out.add(body[2:3], "u8", 30 + group)
        out.add(body[3:4], "varint", 40 + group)
        out.add(body[4:-7])
        out.add(body[-7:-6], "u8", 50 + group)
        out.add(body[-6:-2], "f32", 60 + group)
        out.add(body[-2:-1], "u8", 50 + group)
        out.add(body[-1:], "varint", 70 + group)
        out.marks.append(Mark(start, len(out.data), "piece", 80 + group))
        out.chunk(start, "free piece", 90 + group)
    for number, fields in (
        (2, ((3, 2), (4, 262), (24, 0), (35, 1))),
        (3, ((3, 1), (4, 0), (5, 1))),
    ):
        body = b"".join(varint(n << 3) + varint(value) for n, value in fields)
        start = len(out.data)
        out.add(varint(number << 3 | 2), "u8", 3)
        out.add(varint(len(body)), "varint", 4)
        for n, value in fields:
            out.add(varint(n << 3), "varint", 5)
            out.add(varint(value), "varint", 6)
        out.chunk(start, "free spec", 7)
    model = Seed("", {"tokenizer.model": out.data}, {"tokenizer.model": tuple(out.marks)})
    around = {"tokenizer_config.json": _TOKENIZER_CONFIG, "added_tokens.json": {"<y>": 261}}
    return _joined("SentencePiece", model, _json_seed("", {**around, **_AROUND}))


# Text


def _text_seed(name: str, file: str, text: str, parts: str) -> Seed:
    """Chunks are what a pattern finds; runs of word characters may become any other text."""
    marks: list[Mark] = []
    for start, end in _spans(parts, text):
        marks.append(Mark(start, end, "chunk:free", 1))
    for start, end in _spans(r"[\w.$]+", text):
        marks.append(Mark(start, end, "text", 2))
        marks.append(Mark(start, end, "chunk:free word", 3))
    return Seed(name, {file: text.encode()}, {file: tuple(marks)})


def _spans(pattern: str, text: str) -> Iterator[tuple[int, int]]:
    for found in re.finditer(pattern, text, re.DOTALL):
        start = len(text[: found.start()].encode())
        yield start, start + len(found[0].encode())


MODELFILE = '''# A comment
FROM ./model-Q4_K_M.gguf
TEMPLATE """{{ range .Messages }}<|{{ .Role }}|>
{{ .Content }}{{ end }}"""
SYSTEM "be brief"
PARAMETER stop "<|user|>"
PARAMETER num_ctx 4096
PARAMETER temperature 0.7
PARAMETER use_mmap true
PARAMETER mirostat 1
MESSAGE user hello
MESSAGE assistant """hi
there"""
LICENSE MIT
REQUIRES 0.14.0
'''

GO_TEMPLATE = """{{- /* ours */ -}}
{{- $last := "" }}{{ range $i, $m := .Messages }}
{{- if eq $m.Role "system" }}<|s|>{{ $m.Content }}
{{- else if and (ne .Role `x`) (not $.Response) }}{{ .Content }}{{ $last = .Role }}
{{- else }}{{ continue }}{{ end }}{{ if gt 1 2 }}{{ break }}{{ end }}
{{- if eq (len (slice $.Messages $i)) 1 }}<|a|>{{ end }}{{ end }}{{ $last }}{{ .System }} 1
"""

CARD = """---
license: apache-2.0
license_name: "x"
language: [en, de]
tags:
- a
model-index:
  - name: x
---
# Title
text
"""


def modelfile() -> Seed:
    return _text_seed("Modelfile", "Modelfile", MODELFILE, r"[^\n]*\n")


def go_template() -> Seed:
    text = GO_TEMPLATE.replace("gt 1 2", "eq 1 2")
    return _text_seed("Go template", "template", text, r"\{\{.*?\}\}")


def card() -> Seed:
    return _text_seed("model card", "README.md", CARD, r"[^\n]*\n")


def digests() -> Seed:
    lines = "".join(f"{c * 64}  {name}\n" for c, name in (("a", "x.gguf"), ("0", "ü y.json")))
    return _text_seed("digests", "SHA256SUMS", lines, r"[^\n]*\n")
