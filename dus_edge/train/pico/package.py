"""Turn a finished run into a checkpoint folder: weights, configuration, tokenizer, card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from dus_edge.train.pico import corpus, evaluate
from dus_edge.train.pico.model import Pico, PicoConfig
from dus_edge.train.pico.tokenizer import (
    BOS,
    EOS,
    encode_documents,
    load_sentencepiece,
    write_tokenizer,
)
from dus_edge.upscale.plan import from_drop

TRANSFORMERS_VERSION = "5.23.0"
"""The transformers whose ``save_pretrained`` the configuration files follow."""


@dataclass(frozen=True)
class PicoScores:
    """Bits per UTF-8 byte of the whole held-out text."""

    pico: float
    upscaled: float
    unigram_bytes: float
    unigram_tokens: float
    xz: float


def config_json(config: PicoConfig) -> dict:
    """Return ``config.json`` as transformers 5 writes it, and what transformers 4 reads."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BOS,
        "dtype": "bfloat16",
        "eos_token_id": EOS,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "initializer_range": 0.02,
        "intermediate_size": config.ffn,
        "max_position_embeddings": config.context,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "pad_token_id": None,
        "pretraining_tp": 1,
        "rms_norm_eps": config.eps,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": TRANSFORMERS_VERSION,
        "use_cache": True,
        "vocab_size": config.vocab,
    }


def generation_json() -> dict:
    """Return ``generation_config.json``."""
    return {
        "_from_model_config": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "transformers_version": TRANSFORMERS_VERSION,
    }


def round_to_bf16(model: Pico) -> None:
    """Round the weights in place to what bf16 can hold, so that scores are the file's own."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16().float())


def write_pico(folder: Path, model: Pico, tokenizer: bytes) -> None:
    """Write everything but the card into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.bfloat16().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private
    for name, content in (
        ("config.json", config_json(model.config)),
        ("generation_config.json", generation_json()),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(folder, tokenizer, model.config.context)


def score(model: Pico, split: corpus.Split, tokenizer: bytes, pool: Executor) -> PicoScores:
    """Measure the model, its up-scaled plan and the baselines on whole held-out files."""
    processor = load_sentencepiece(tokenizer)
    texts = [source.text for source in split.heldout]
    size = corpus.total_bytes(split.heldout)
    train = [source.text for source in (*split.library, *split.tests)]
    heldout = [ids[:-1] for ids in encode_documents(processor, texts)]
    plan = from_drop(model.config.layers, 2).sources

    def plain_bits(ids: np.ndarray) -> float:
        return evaluate.document_bits(model, ids)

    def upscaled_bits(ids: np.ndarray) -> float:
        return evaluate.document_bits(lambda tokens: model(tokens, plan), ids)

    return PicoScores(
        pico=sum(pool.map(plain_bits, heldout)) / size,
        upscaled=sum(pool.map(upscaled_bits, heldout)) / size,
        unigram_bytes=evaluate.unigram_byte_bits(train, texts),
        unigram_tokens=evaluate.unigram_token_bits(
            encode_documents(processor, train), heldout, model.config.vocab, size
        ),
        xz=evaluate.xz_bits(texts),
    )


@torch.inference_mode()
def continue_text(
    model: Pico,
    tokenizer: bytes,
    prompt: str,
    tokens: int,
    plan: Sequence[int] | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """Return the prompt and ``tokens`` tokens after it, as text: greedy at temperature 0."""
    processor = load_sentencepiece(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    ids = [BOS, *processor.encode(prompt)]
    for _ in range(tokens):
        window = torch.tensor([ids[-model.config.context :]])
        logits = model(window, plan)[0, -1]
        if temperature > 0:
            chances = (logits / temperature).softmax(dim=-1)
            ids.append(int(torch.multinomial(chances, 1, generator=generator)))
        else:
            ids.append(int(logits.argmax()))
        if ids[-1] == EOS:
            break
    return processor.decode(ids)
