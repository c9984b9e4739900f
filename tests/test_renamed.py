"""EXAONE 3.5: Llama's form under other names, read as a Llama. Nothing of it is in transformers.

The oracle is llama.cpp's own graph of EXAONE, on a file that gguf-py's table of names makes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from dus_edge.checkpoint.config import load_config
from dus_edge.errors import CheckpointError, UnsupportedError
from dus_edge.families.renamed import renamed_forms
from dus_edge.jobs.export.checkpoint import export_checkpoint
from dus_edge.jobs.export.gguf import export_gguf
from dus_edge.quant.recipe import PRESETS
from dus_edge.run.open import inspect_source
from dus_edge.upscale.model import find_model, plan_chooser

from .cases import check_each
from .family_models import Form, write_model
from .forms import deep_copied, load
from .test_family_models import F32_CACHE
from .test_logits import llama_log_probs, log_probs

PLAN, SOURCES = "0:6,2:8", (*range(6), *range(2, 8))
AS_IT_IS = plan_chooser(None, None, (), False)
#: As config.json of EXAONE-3.5-7.8B-Instruct has its keys, and small.
CONFIG = {
    "activation_function": "silu",
    "architectures": ["ExaoneForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_exaone.ExaoneConfig"},
    "bos_token_id": 1,
    "embed_dropout": 0.0,
    "eos_token_id": 361,
    "head_dim": 32,
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 256,
    "model_type": "exaone",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_layers": 8,
    "pad_token_id": 0,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    },
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 4096,
}
#: Names of its tensors, as the published index has them, by Llama's.
NAMES = {
    "model.embed_tokens": "transformer.wte",
    "input_layernorm": "ln_1",
    "self_attn.q_proj": "attn.attention.q_proj",
    "self_attn.k_proj": "attn.attention.k_proj",
    "self_attn.v_proj": "attn.attention.v_proj",
    "self_attn.o_proj": "attn.attention.out_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.gate_proj": "mlp.c_fc_0",
    "mlp.up_proj": "mlp.c_fc_1",
    "mlp.down_proj": "mlp.c_proj",
    "model.norm": "transformer.ln_f",
    "model.layers": "transformer.h",
}


def exaones(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


@pytest.fixture(scope="module", params=["7.8B", "2.4B"])
def folders(request, tmp_path_factory) -> tuple[Path, Path]:
    """A model as EXAONE has it, and as a Llama; the smallest one's head is tied."""
    folder = tmp_path_factory.mktemp("exaone")
    raw = CONFIG | {"tie_word_embeddings": request.param == "2.4B"}
    known = {key: raw[key] for key in ("rope_scaling", "rope_theta", "head_dim")}
    known |= {"rms_norm_eps": 1e-5, "tie_word_embeddings": raw["tie_word_embeddings"]}
    form = Form("llama", known)
    llama = write_model(form, folder / "llama")
    theirs = folder / "EXAONE-3.5"
    shutil.copytree(llama, theirs)
    weights = load_file(llama / "model.safetensors")
    named = {exaones(name): tensor for name, tensor in weights.items()}
    assert not any(name.startswith("model.") for name in named)
    save_file(named, theirs / "model.safetensors", metadata={"format": "pt"})
    (theirs / "config.json").write_text(json.dumps(raw))
    return theirs, llama


def own_gguf(folder: Path, path: Path) -> Path:
    """A GGUF of the architecture `exaone`: rows as they are, names by gguf-py's table."""
    raw = json.loads((folder / "config.json").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.EXAONE, raw["num_layers"])
    writer = gguf.GGUFWriter(path, "exaone")
    writer.add_block_count(raw["num_layers"])
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_key_length(raw["head_dim"])
    writer.add_value_length(raw["head_dim"])
    writer.add_rope_dimension_count(raw["head_dim"])
    writer.add_layer_norm_rms_eps(raw["layer_norm_epsilon"])
    writer.add_rope_freq_base(raw["rope_theta"])
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(raw["vocab_size"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor)
    writer.add_tensor("rope_freqs.weight", divisors(raw))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def divisors(raw: dict) -> np.ndarray:
    """What Llama 3's scaling divides frequencies by, from transformers' own code."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    keys = ("rope_scaling", "rope_theta", "head_dim", "max_position_embeddings")
    config = LlamaConfig(**{key: raw[key] for key in keys})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = raw["rope_theta"] ** (-torch.arange(0, raw["head_dim"], 2) / raw["head_dim"])
    return (plain / scaled).float().numpy()


def test_our_gguf_computes_what_llama_cpps_exaone_does(folders, tmp_path):
    theirs, llama = folders
    (written,) = export_gguf(str(theirs), AS_IT_IS, [PRESETS["f32"]], tmp_path / "out").outputs
    found = llama_log_probs(written.path, **F32_CACHE)
    own = llama_log_probs(own_gguf(theirs, tmp_path / "own.gguf"), **F32_CACHE)
    assert np.abs(found - own).max() < 1e-3
    assert np.abs(found - log_probs(load(llama))).max() < 1e-3


def test_an_upscaled_folder_is_a_llama(folders, tmp_path):
    """Any transformers loads it: no code of the base's is needed."""
    theirs, llama = folders
    choose = plan_chooser(None, None, (PLAN,), True)
    export_checkpoint(str(theirs), choose, tmp_path / "up")
    config = json.loads((tmp_path / "up" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert not {"auto_map", "num_layers", "layer_norm_epsilon"} & config.keys()
    wanted = log_probs(deep_copied(load(llama), SOURCES))
    np.testing.assert_array_equal(log_probs(load(tmp_path / "up")), wanted)


def test_what_is_made_of_it_is_what_is_made_of_the_llama(folders, tmp_path):
    made = []
    for base in folders:
        choose = plan_chooser(None, None, (PLAN,), True)
        out = tmp_path / base.name
        (written,) = export_gguf(str(base), choose, [PRESETS["q4_k_m"]], out).outputs
        reader = gguf.GGUFReader(written.path)
        made.append({t.name: (t.tensor_type, t.data.tobytes()) for t in reader.tensors})
    assert made[0] == made[1]


def test_names_go_both_ways(folders):
    theirs, llama = folders
    (form,) = renamed_forms()
    stored, known = (load_file(f / "model.safetensors") for f in (theirs, llama))
    assert {form.read_name(name) for name in stored} == known.keys()
    assert {form.stored_name(name) for name in known} == stored.keys()
    assert form.read_name("transformer.h.3.novelty.weight") == "transformer.h.3.novelty.weight"


def test_what_needs_transformers_says_what_to_do(folders, tmp_path, run):
    theirs, _ = folders
    with pytest.raises(UnsupportedError, match="no code for ExaoneForCausalLM; make a Llama"):
        inspect_source(theirs)
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    for words in (("chat", theirs), ("sft", theirs, "--data", data, "-o", tmp_path / "tuned")):
        code, _, err = run(*words)
        assert code == 3 and "dus-edge upscale --no-upscale" in err, err
    assert not (tmp_path / "tuned").exists()


def test_what_is_no_such_model(folders, tmp_path):
    theirs, _ = folders
    cases = {
        "activation": ({"activation_function": "gelu"}, UnsupportedError, "activation_function is"),
        "layers": ({"num_layers": 9}, CheckpointError, "layers.8.* is missing"),
        "rope": ({"rope_scaling": {"rope_type": "su"}}, UnsupportedError, "rope type 'longrope'"),
    }

    def check(name: str) -> None:
        changes, error, message = cases[name]
        folder = tmp_path / name
        shutil.copytree(theirs, folder)
        (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
        with pytest.raises(error, match=message):
            find_model(str(folder), AS_IT_IS, weights=True, say=print).open()

    check_each(check, cases)
    raw = json.loads((theirs / "config.json").read_text())
    del raw["layer_norm_epsilon"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert load_config(tmp_path / "config.json").rms_norm_eps == 1e-5
