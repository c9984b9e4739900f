"""A finished GGUF as a base: its layers copied as they are, dequantized, or quantized again."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
import torch

from dus_edge.checkpoint.gguf.file import GGUFModel
from dus_edge.checkpoint.gguf.types import stored_type
from dus_edge.quant import types
from dus_edge.quant.imatrix import read_imatrix
from dus_edge.quant.native import quantize
from dus_edge.upscale.model import find_model, plan_chooser

from .cases import check_each
from .forms import FORMS, LLAMA3_ROPE, load
from .gguf_cases import export
from .test_logits import llama_log_probs, log_probs

AS_IT_IS = plan_chooser(None, None, (), False)
#: Llama 3's real numbers: what a GGUF has of others cannot be told apart.
ROPE = {"rope_scaling": LLAMA3_ROPE | {"original_max_position_embeddings": 8192}}


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}


def values(path: Path) -> dict[str, object]:
    fields = gguf.GGUFReader(path).fields
    return {key: f.contents() for key, f in fields.items() if not key.startswith("GGUF.")}


def made(out: str) -> Path:
    """The file that a command says it wrote."""
    # A message may name the base before.
    named = [Path(line) for line in out.splitlines() if line.endswith(".gguf")]
    return [path for path in named if path.is_file()][-1]


# -- copied as they are -------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["q4_0", "q8_0", "f16", "f32"])
def test_copied_layers_are_what_an_export_of_the_deeper_model_has(pico, tmp_path, run, preset):
    """Of presets that look at no layer's place: the same tensors, in the same order."""
    base = export(pico, tmp_path / "base", preset, plan="0:8")[preset]
    deep = export(pico, tmp_path / "deep", preset, plan="0:6,2:8")[preset]
    code, out, _ = run("gguf", base, "--drop", "2", "-o", tmp_path / "out")
    assert code == 0 and "8 → 12 layers (0:6,2:8)" in out
    found = made(out)
    assert found.name == "pico-DUS-8.13M-v1.0-" + preset.upper() + ".gguf"
    assert list(tensors(found).items()) == list(tensors(deep).items())
    ours, theirs = values(found), values(deep)
    assert ours == theirs | {"general.base_model.0.name": "pico-8.13M-v1.0"} | {
        key: ours[key]
        for key in ("dus.base", "general.description", "general.name", "general.basename")
    } | {key: ours[key] for key in theirs if key.startswith("general.base_model")}
    assert ours["dus.plan"] == "0:6,2:8" and ours["dus.layer_sources"] == [*range(6), *range(2, 8)]
    assert ours["dus.drop"] == 2 and ours["dus.base_block_count"] == 8
    assert found.with_suffix(".Modelfile").read_text().startswith("# pico DUS 8.13M v1.0, made by")


@pytest.mark.parametrize("preset", ["q4_k_m", "iq3_m"])
def test_llama_cpp_computes_what_the_plan_says(pico, tmp_path, run, preset):
    """A mix with several types: against the same layers dequantized and run by transformers."""
    base = export(pico, tmp_path, preset, plan="0:8")[preset]
    code, out, _ = run("gguf", base, "--block", "2:5", "-o", tmp_path / "out")
    assert code == 0
    code, *_ = run("upscale", base, "--block", "2:5", "-o", tmp_path / "folder")
    assert code == 0
    theirs, ours = llama_log_probs(made(out)), log_probs(load(tmp_path / "folder"))
    divergence = (np.exp(ours) * (ours - theirs)).sum(-1)
    # llama.cpp rounds activations to 8 bits where weights are quantized.
    assert divergence.mean() < 2e-3
    assert tensors(made(out))["blk.7.attn_v.weight"] == tensors(base)["blk.4.attn_v.weight"]


def test_entries_of_layers_follow_the_plan(pico, tmp_path, run):
    """And unknown tensors of layers, keys and alignments are carried; splits are joined."""
    base = export(pico, tmp_path / "base", "q4_0", plan="0:8")["q4_0"]
    reader = gguf.GGUFReader(base)
    parts = [tmp_path / f"odd-{i:05}-of-00002.gguf" for i in (1, 2)]
    writers = [gguf.GGUFWriter(part, "llama") for part in parts]
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writers[0].add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
    writers[0].add_array("llama.of_layers", [i * 10 for i in range(8)])
    writers[0].add_array("llama.rope.dimension_sections", list(range(8)))
    writers[0].add_array("llama.of_nothing", [1, 2, 3])
    for i, writer in enumerate(writers):
        writer.add_custom_alignment(64)
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(reader.tensors))
    for i, t in enumerate(reader.tensors):
        kind = {"raw_dtype": t.tensor_type} if t.tensor_type else {}
        writers[i % 2].add_tensor(t.name, t.data, **kind)
    for i in range(8):
        writers[1].add_tensor(f"blk.{i}.novelty", np.full(4, i, np.float32))
    for writer in writers:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    code, out, err = run("gguf", parts[1], "--plan", "0:3,1:8", "-o", tmp_path / "out")
    assert code == 0, err
    found, order = made(out), [0, 1, 2, *range(1, 8)]
    assert found.name.startswith("odd-DUS-")
    said, there = values(found), tensors(found)
    assert said["llama.of_layers"] == [i * 10 for i in order]
    assert said["llama.rope.dimension_sections"] == list(range(8))
    assert said["llama.of_nothing"] == [1, 2, 3]
    assert not {"split.no", "split.count", "general.alignment"} & said.keys()
    assert said["llama.block_count"] == 10
    for i, source in enumerate(order):
        assert np.frombuffer(there[f"blk.{i}.novelty"][1], np.float32).tolist() == [source] * 4
    original = {name: tensor for name, tensor in there.items() if "novelty" not in name}
    deep = export(pico, tmp_path / "deep", "q4_0", plan="0:3,1:8")["q4_0"]
    assert original == tensors(deep)


def test_a_copy_of_the_same_depth_is_the_same_file(pico, tmp_path, run):
    base = export(pico, tmp_path, "q4_0", plan="0:8")["q4_0"]
    code, out, _ = run("gguf", base, "--no-upscale", "-o", tmp_path / "out", "--alias", "same")
    assert code == 0
    assert made(out).read_bytes() == base.read_bytes()
    assert (tmp_path / "out" / "same.gguf").resolve() == made(out).resolve()


def test_an_upscaled_gguf_is_a_base_again(pico, tmp_path, run):
    base = export(pico, tmp_path, "q4_0", plan="0:8")["q4_0"]
    _, out, _ = run("gguf", base, "--drop", "3", "-o", tmp_path / "once")
    code, out, _ = run("gguf", made(out), "--drop", "4", "-o", tmp_path / "twice")
    assert code == 0
    assert values(made(out))["dus.plan"] == "0:6,4:10"
    deep = export(pico, tmp_path / "deep", "q4_0", plan="0:5,3:6,2:3,3:8")["q4_0"]
    # 0:5,3:8 of pico, then 0:6,4:10 of that.
    once = [*range(5), *range(3, 8)]
    twice = [once[i] for i in [*range(6), *range(4, 10)]]
    spelled = ",".join(str(i) for i in twice)
    deep = export(pico, tmp_path / "deep", "q4_0", plan=spelled)["q4_0"]
    assert tensors(made(out)) == tensors(deep)


# -- dequantized --------------------------------------------------------------------------------

_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _Traits(ctypes.Structure):
    """The head of ``struct ggml_type_traits`` (ggml.h)."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _TO_FLOAT),
    )


def ggml_floats(kind: int, data: np.ndarray, n: int) -> np.ndarray:
    """Weights as ggml's own code dequantizes them."""
    library = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base*"))))
    library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    traits = library.ggml_get_type_traits(kind).contents
    out = np.empty(n, np.float32)
    traits.to_float(data.ctypes.data, out.ctypes.data, n)
    return out


def test_blocks_are_dequantized_as_ggml_does(compiled):
    rows = np.random.default_rng(1).standard_normal((3, 512)).astype(np.float32)

    def check(kind: types.QuantType) -> None:
        blocks = quantize(rows, kind).reshape(3, -1)
        found = stored_type(kind.ggml_id)
        assert (found.name, found.row_bytes(512)) == (kind.name, kind.row_bytes(512))
        ours = found.dequantized(blocks)
        theirs = ggml_floats(kind.ggml_id, blocks, rows.size).reshape(rows.shape)
        # ggml's code may contract a product and a sum, which rounds once.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)

    check_each(check, [t for t in types.TYPES.values() if t.block_weights > 1])


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_comes_back_from_its_gguf(make_checkpoint, tmp_path, run, form):
    """Every form of model: weights bit for bit, and what transformers computes."""
    changes = FORMS[form]
    if "llama-3" in form:
        changes = changes | ROPE
    elif "rope_parameters" in changes:
        scaling = changes["rope_parameters"] | ROPE["rope_scaling"]
        changes = changes | {"rope_parameters": scaling}
    base = make_checkpoint(dtype="F32", **changes)
    made = export(base, tmp_path / "gguf", "f32", plan="0:4")["f32"]
    code, _, err = run("upscale", made, "--no-upscale", "-o", tmp_path / "back")
    assert code == 0, err
    before = find_model(str(base), AS_IT_IS, weights=True, say=print).open()
    after = find_model(str(tmp_path / "back"), AS_IT_IS, weights=True, say=print).open()
    assert after.specs() == before.specs()
    for name in before.specs():
        np.testing.assert_array_equal(after.read(name), before.read(name), name)
    np.testing.assert_array_equal(log_probs(load(tmp_path / "back")), log_probs(load(base)))


def test_rows_of_heads_are_read_in_any_pieces(pico, tmp_path):
    path = export(pico, tmp_path, "q4_0", plan="0:8")["q4_0"]
    model = find_model(str(path), AS_IT_IS, weights=True, say=print)
    checkpoint = model.open()
    name = model.config.family.name("q", 3)
    whole = checkpoint.read(name)
    for start, stop in ((0, 1), (5, 6), (3, 67), (60, len(whole)), (7, 7)):
        np.testing.assert_array_equal(checkpoint.read(name, start, stop), whole[start:stop])


@pytest.fixture(scope="module")
def quantized(pico, tmp_path_factory) -> Path:
    """pico in a mix of types."""
    return export(pico, tmp_path_factory.mktemp("quantized"), "q4_k_m", plan="0:8")["q4_k_m"]


def test_a_dequantized_checkpoint_is_a_base_like_any_other(quantized, pico, tmp_path, run):
    code, out, err = run("upscale", quantized, "--drop", "2", "-o", tmp_path / "up")
    assert code == 0, err
    assert "become float16" in " ".join(out.split())
    config = json.loads((tmp_path / "up" / "config.json").read_text())
    assert config["dtype"] == "float16" and config["num_hidden_layers"] == 12
    assert config["dus_edge"]["sources"] == [*range(6), *range(2, 8)]
    found = find_model(str(tmp_path / "up"), AS_IT_IS, weights=True, say=print).open()
    stored = GGUFModel(quantized)
    embedding = stored.tensors["token_embd.weight"]
    data = stored.read(embedding.file, embedding.offset, embedding.nbytes)
    exact = ggml_floats(
        embedding.kind.ggml_id, np.frombuffer(data, np.uint8), embedding.n_elements
    ).reshape(embedding.shape)
    np.testing.assert_array_equal(found.read("model.embed_tokens.weight"), exact.astype(np.float16))
    assert {s.dtype for s in found.specs().values()} == {"F16", "F32"}
    # And on: a GGUF of it, without loss by way of its own quantizer.
    code, out, err = run(
        "gguf", "--no-upscale", tmp_path / "up", "-q", "q8_0", "-o", tmp_path / "gguf"
    )
    assert code == 0, err
    theirs, ours = llama_log_probs(made(out)), log_probs(load(tmp_path / "up"))
    assert (np.exp(ours) * (ours - theirs)).sum(-1).mean() < 2e-3
    with torch.no_grad():
        assert torch.isfinite(load(tmp_path / "up")(torch.tensor([[1, 5, 9]])).logits).all()


def test_quantizing_again_says_what_it_costs(quantized, tmp_path, run):
    code, out, err = run("gguf", quantized, "--drop", "2", "-q", "q8_0", "-o", tmp_path)
    assert code == 0, err
    told = " ".join(out.split())
    assert "is quantized already (48 Q4_K, 17 F32, 9 Q6_K): quantizing again adds its own" in told
    # The same as by way of a checkpoint that loses nothing.
    reader = {t.name: t for t in gguf.GGUFReader(made(out)).tensors}
    model = find_model(str(quantized), AS_IT_IS, weights=True, say=print)
    rows = model.open().read(model.config.family.name("gate", 3))
    blocks = quantize(rows, types.Q8_0)
    assert reader["blk.3.ffn_gate.weight"].data.tobytes() == blocks.tobytes()
    assert reader["blk.7.ffn_gate.weight"].data.tobytes() == blocks.tobytes()


def test_changed_copies_need_a_preset(quantized, tmp_path, run):
    for more in (["--branch-scale", "0.5"], ["--method", "averaged"]):
        code, _, err = run("gguf", quantized, "--drop", "2", *more, "-o", tmp_path / "no")
        assert code == 2 and "add -q PRESET to quantize them anew" in err
        assert not (tmp_path / "no").exists()
    code, out, err = run(
        *("gguf", quantized, "--drop", "2", "--branch-scale", "0.5"),
        *("-q", "f16", "-o", tmp_path / "yes"),
    )
    assert code == 0, err
    there = {t.name: t.data for t in gguf.GGUFReader(made(out)).tensors}
    first, copy = (there[f"blk.{i}.ffn_down.weight"] for i in (2, 6))
    np.testing.assert_allclose(copy, first / 2, rtol=1e-3, atol=1e-6)


def test_commands_that_read_weights_take_a_gguf(quantized, tmp_path, run):
    text = tmp_path / "text.txt"
    text.write_text("The layers of a model are copied, and the copies run again. " * 60)
    few = ("--text", text, "--ctx", "64", "--chunks", "2")
    code, out, err = run("inspect", quantized, "--drop", "2")
    assert code == 0 and "Stored as" in out and "as it is" in out and "8 → 12" in out, err
    told = json.loads(run("inspect", quantized, "--drop", "2", "--json")[1])
    run("gguf", quantized, "--drop", "2", "-o", tmp_path / "copied")
    (copied,) = (tmp_path / "copied").glob("*.gguf")
    assert told["copied_bytes"] == copied.stat().st_size
    code, _, err = run("imatrix", quantized, "--drop", "2", *few, "-o", tmp_path / "i.gguf")
    assert code == 0, err
    assert "blk.11.ffn_down.weight" in read_imatrix(tmp_path / "i.gguf").sums
    code, out, err = run("seam", quantized, "--drop", "2", *few, "--json")
    assert code == 0, err
    code, out, err = run("quality", quantized, copied, *few, "--json")
    assert code == 0, err
    for command in (("sft",), ("dpo",), ("heal", "--text", text)):
        data = () if "heal" in command else ("--data", text)
        code, _, err = run(*command, quantized, *data, "-o", tmp_path / "tuned")
        assert code == 2 and "dus-edge upscale --no-upscale" in err, err


def test_copying_loses_nothing_of_a_text(pico, tmp_path, run):
    """Perplexity: the copied layers in llama.cpp, and the same dequantized, run in float32."""
    base = export(pico, tmp_path, "q4_1", plan="0:8")["q4_1"]
    code, out, err = run("gguf", base, "--drop", "2", "-o", tmp_path / "copied")
    assert code == 0, err
    assert run("upscale", base, "--drop", "2", "-o", tmp_path / "folder")[0] == 0
    few = ("--ctx", "256", "--chunks", "4", "--threads", "1", "--json")
    code, said, err = run("quality", tmp_path / "folder", made(out), *few)
    assert code == 0, err
    total = json.loads(said.splitlines()[-1])["candidates"][0]["total"]
    # llama.cpp rounds activations to 8 bits where weights are quantized.
    assert total["perplexity"] / total["perplexity_reference"] == pytest.approx(1, abs=1e-2)
    assert total["kl_nats"] < 2e-3
