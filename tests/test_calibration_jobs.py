"""Importance matrices, GPTQ, bitsandbytes and `quality` as a person types them, start to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from dus_edge.calibrate import engine
from dus_edge.checkpoint.hub import fetch as hub
from dus_edge.jobs.export.calibration import Machine, TextChoice, read_chunks
from dus_edge.jobs.export.checkpoint import export_checkpoint
from dus_edge.jobs.export.gptq import export_gptq
from dus_edge.jobs.job import Result
from dus_edge.quant import gptq_format
from dus_edge.quant.gptq_format import GPTQSettings
from dus_edge.quant.imatrix import read_imatrix
from dus_edge.upscale.model import plan_chooser

CPU = Machine("cpu")
CHOOSE = plan_chooser(None, None, (), True)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.py"
    path.write_text(Path(hub.__file__).read_text() + Path(engine.__file__).read_text())
    return path


def short(path: Path) -> tuple[str, ...]:
    return ("--text", str(path), "--ctx", "64", "--chunks", "4", "--device", "cpu")


# Importance matrices


def test_imatrix_command(run, text, tmp_path):
    code, out, err = run("imatrix", "pico", *short(text), "-o", tmp_path / "i.gguf")
    assert code == 0, err
    assert "84 matrices" in out
    found = read_imatrix(tmp_path / "i.gguf")
    assert len(found.sums) == 12 * 7
    assert set(found.counts.values()) == {4 * 64}
    assert (found.n_chunks, found.chunk_size, found.datasets) == (4, 64, ("text.py",))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["i.gguf", "text.py"]


def test_imatrix_now_and_from_a_file_give_the_same_tensors(run, text, tmp_path):
    assert run("imatrix", "pico", *short(text), "-o", tmp_path / "i.gguf")[0] == 0
    quants = ("-q", "q4_k_m", "-q", "q2_k")
    code, out, _ = run(
        "gguf", "pico", *quants, "--imatrix", tmp_path / "i.gguf", "-o", tmp_path / "a"
    )
    assert code == 0
    assert "note" not in out
    code, _, _ = run(
        "gguf", "pico", *quants, "--imatrix", "auto", *short(text), "-o", tmp_path / "b"
    )
    assert code == 0
    assert run("gguf", "pico", *quants, "-o", tmp_path / "c")[0] == 0
    for path in (tmp_path / "a").glob("*.gguf"):
        a, b, c = (GGUFReader(tmp_path / d / path.name) for d in "abc")
        assert "quantize.imatrix.file" in a.fields
        for x, y in zip(a.tensors, b.tensors, strict=True):
            np.testing.assert_array_equal(x.data, y.data, x.name)
        plain = {t.name: t.data for t in c.tensors}
        name = "blk.3.ffn_up.weight"
        weighted = next(t for t in a.tensors if t.name == name)
        assert not np.array_equal(weighted.data, plain[name])
    assert not list((tmp_path / "b").glob("*calibration*"))


def test_an_imatrix_of_another_model_is_refused(run, text, tmp_path, make_checkpoint):
    other = make_checkpoint("other")
    assert run("imatrix", other, *short(text), "-o", tmp_path / "i.gguf")[0] == 0
    code, _, err = run("gguf", "pico", "--imatrix", tmp_path / "i.gguf", "-o", tmp_path / "out")
    assert code == 3
    assert "i.gguf" in err and "blk.0." in err
    assert not (tmp_path / "out").exists()


def test_layers_without_an_entry_are_named(run, text, tmp_path):
    assert run("imatrix", "pico", *short(text), "--no-upscale", "-o", tmp_path / "i.gguf")[0] == 0
    code, out, _ = run("gguf", "pico", "--imatrix", tmp_path / "i.gguf", "-o", tmp_path / "out")
    assert code == 0
    assert "knows nothing of 28 matrices" in " ".join(out.split())
    assert "blk.8." in out


def test_two_bits_without_importance_are_refused(run, text, tmp_path):
    """As llama-quantize does: with no matrix, and with one that knows only some of the layers."""
    for preset, kind in (("iq2_m", "IQ2_S"), ("iq2_s", "IQ2_XS")):
        code, _, err = run("gguf", "pico", "-q", f"q4_k_m,{preset}", "-o", tmp_path / "out")
        assert code == 2
        assert f"{preset} stores blk.0.attn_k.weight as {kind}" in err and "--imatrix auto" in err
    by_hand = ("--tensor-type", "blk.*ffn_up=iq2_s", "-o", tmp_path / "out")
    code, _, err = run("gguf", "pico", "-q", "q4_k_m", *by_hand)
    assert code == 2 and "blk.0.ffn_up.weight as IQ2_S" in err
    assert run("imatrix", "pico", *short(text), "--no-upscale", "-o", tmp_path / "i.gguf")[0] == 0
    known = ("--imatrix", tmp_path / "i.gguf", "-o", tmp_path / "out")
    code, _, err = run("gguf", "pico", "-q", "iq2_m", *known)
    assert code == 3
    assert "i.gguf knows nothing of blk.8.attn_k.weight, which iq2_m stores as IQ2_S" in err
    assert not (tmp_path / "out").exists()
    assert run("gguf", "pico", "-q", "iq2_m", "--no-upscale", *known)[0] == 0


def test_entries_of_a_deeper_model_are_said(run, text, tmp_path):
    assert run("imatrix", "pico", *short(text), "-o", tmp_path / "i.gguf")[0] == 0
    options = ("--no-upscale", "--imatrix", tmp_path / "i.gguf", "-o", tmp_path / "out")
    code, out, _ = run("gguf", "pico", *options)
    assert code == 0
    assert "28 entries of matrices that are not in this model" in " ".join(out.split())


def test_a_file_that_is_no_imatrix(run, tmp_path):
    (tmp_path / "i.gguf").write_bytes(b"GGUF" + bytes(40))
    code, _, err = run("gguf", "pico", "--imatrix", tmp_path / "i.gguf", "-o", tmp_path / "out")
    assert code == 3
    assert "i.gguf" in err
    assert not (tmp_path / "out").exists()


# GPTQ


def gptq(folder: Path, text: Path, settings: GPTQSettings, machine: Machine = CPU) -> Result:
    choice = TextChoice((text,), None, 64, 8)
    return export_gptq("pico", CHOOSE, folder, settings, choice, machine)


def dequantized(folder: Path) -> transformers.PreTrainedModel:
    """The folder as a plain model: its codes read by our own reader of the format."""
    config = json.loads((folder / "config.json").read_text())
    bits = config.pop("quantization_config")["bits"]
    stored = load_file(folder / "model.safetensors")
    weights = {}
    for name in [n for n in stored if n.endswith(".qweight")]:
        stem = name.removesuffix(".qweight")
        parts = (
            stored.pop(f"{stem}.{p}").numpy() for p in ("qweight", "qzeros", "scales", "g_idx")
        )
        weights[f"{stem}.weight"] = torch.from_numpy(gptq_format.dequantized(*parts, bits))
    weights |= {name: tensor.float() for name, tensor in stored.items()}
    known = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(known).float()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def nll(model, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


@pytest.mark.parametrize(
    "settings",
    [
        GPTQSettings(bits=4, group_size=64),
        GPTQSettings(bits=4, group_size=128, desc_act=True),
        GPTQSettings(bits=8, group_size=-1, sym=False),
        GPTQSettings(bits=3, group_size=32),
    ],
    ids=str,
)
def test_a_gptq_folder_computes_nearly_what_the_model_does(text, tmp_path, settings):
    result = gptq(tmp_path / "out", text, settings)
    export_checkpoint("pico", CHOOSE, tmp_path / "plain")
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32
    )
    model = result.model
    chunks = read_chunks(model, TextChoice((text,), None, 64))
    tokens = torch.from_numpy(chunks.tokens[8:16]).long()
    reference, ours = nll(plain.eval(), tokens), nll(dequantized(tmp_path / "out"), tokens)
    assert ours < reference + {8: 0.01, 4: 0.12, 3: 0.4}[settings.bits]
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == (
        gptq_format.quantize_config(settings)
    )
    assert not list(tmp_path.glob("*.calibration"))


def test_codes_are_exactly_what_the_rest_of_the_model_was_calibrated_on(text, tmp_path):
    """Hidden states of the engine behind the last layer are those of the folder's own weights."""
    seen = []
    original = engine.run_layers

    def spy(*args, **kwargs):
        seen.append((args[1], original(*args, **kwargs)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "run_layers", spy)
        gptq(tmp_path / "out", text, GPTQSettings(group_size=64), Machine("cpu", "float32"))
    ((tokens, h),) = seen
    model = dequantized(tmp_path / "out")
    with torch.no_grad():
        states = model.model(torch.from_numpy(tokens).long()).last_hidden_state
        expected = model.model.norm(h)
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [1, 11])
def test_interrupted_and_resumed_gives_the_same_bytes(text, tmp_path, layer):
    settings = GPTQSettings(group_size=64)
    gptq(tmp_path / "whole", text, settings)
    original = engine.DecoderLayer.ffn
    calls = []

    def interrupting(self, x):
        calls.append(1)
        if len(calls) > layer:  # once a layer, of so little text
            raise KeyboardInterrupt
        return original(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.DecoderLayer, "ffn", interrupting)
        with pytest.raises(KeyboardInterrupt):
            gptq(tmp_path / "cut", text, settings)
    assert not (tmp_path / "cut").exists()
    kept = json.loads((tmp_path / "cut.calibration" / "state.json").read_text())
    assert kept["n_done"] == layer
    gptq(tmp_path / "cut", text, settings)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name
    assert not (tmp_path / "cut.calibration").exists()


# bitsandbytes, quality


def test_bnb_and_quality_commands(run, text, tmp_path):
    assert run("upscale", "pico", "-o", tmp_path / "plain")[0] == 0
    for scheme in ("nf4", "int8"):
        code, out, err = run("bnb", "pico", f"--{scheme}", "-o", tmp_path / scheme)
        assert code == 0, err
        assert "bits per weight" in out
    assert run("gguf", "pico", "-q", "q4_k_m", "-o", tmp_path, "--alias", "m")[0] == 0
    names = [tmp_path / name for name in ("nf4", "int8", "m.gguf")]
    options = ("--text", text, "--ctx", "64", "--chunks", "4", "-o", tmp_path / "quality")
    code, out, err = run("quality", tmp_path / "plain", *names, *options)
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= max(80, len(str(tmp_path / "quality/quality.json")))
    written = sorted(p.name for p in (tmp_path / "quality").iterdir())
    assert written == ["quality.json", "quality.md", "quality.png", "quality.svg"]
    found = json.loads((tmp_path / "quality" / "quality.json").read_text())
    kl = {c["name"]: c["total"]["kl_nats"] for c in found["candidates"]}
    assert len(kl) == 3
    assert kl["int8"] < min(kl[name] for name in kl if name != "int8")
    # The same again is refused, and what is there stays.
    before = (tmp_path / "quality" / "quality.md").read_bytes()
    code, _, err = run("quality", tmp_path / "plain", *names, *options)
    assert code == 4
    assert "quality.md" in err
    assert (tmp_path / "quality" / "quality.md").read_bytes() == before


# Bad input


@pytest.mark.parametrize("command", ["imatrix", "gptq", "sensitivity"])
@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ("", (), "text.py"),
        ("print(1)", (), "token"),
        ("   \n", (), "text.py"),
        ("x = 1\n" * 900, ("--ctx", "4096"), "context"),
        ("x = 1\n" * 900, ("--device", "gpu"), "no device 'gpu'"),
        ("x = 1\n" * 900, ("--text", "nowhere"), "nowhere"),
    ],
    ids=["empty", "short", "blank", "context", "device", "missing"],
)
def test_bad_text_is_one_sentence_and_leaves_nothing(
    run, tmp_path, command, content, options, said
):
    (tmp_path / "text.py").write_text(content)
    out = tmp_path / "out"
    code, _, err = run(command, "pico", "--text", tmp_path / "text.py", *options, "-o", out)
    assert code in (2, 3)
    assert said in err
    assert err.strip().count("\n") == 0
    assert [p.name for p in tmp_path.iterdir()] == ["text.py"]


def test_a_group_that_does_not_divide_a_width_names_the_tensor(
    run, text, tmp_path, make_checkpoint
):
    base = make_checkpoint()  # 64 and 96 wide
    code, _, err = run("gptq", base, *short(text), "--group-size", "64", "-o", tmp_path / "out")
    assert code == 2
    assert "mlp.down_proj.weight" in err
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_left_alone(run, text, tmp_path):
    path = tmp_path / "i.gguf"
    path.write_text("mine")
    code, _, err = run("imatrix", "pico", *short(text), "-o", path)
    assert code == 4
    assert "i.gguf" in err
    assert path.read_text() == "mine"
    folder = tmp_path / "g"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    code, _, err = run("gptq", "pico", *short(text), "-o", folder, "--overwrite")
    assert code == 4
    assert [p.name for p in folder.iterdir()] == ["thesis.txt"]


def test_activations_that_are_not_finite_name_the_layer(run, text, tmp_path, pico):
    base = tmp_path / "base"
    shutil.copytree(pico, base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"][:] = 3e38
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    for command in ("imatrix", "gptq", "sensitivity"):
        code, _, err = run(command, base, *short(text), "-o", tmp_path / "out")
        assert code == 3
        assert "behind layer 3 are not finite" in err
        assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "text.py"]
