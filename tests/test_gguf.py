"""The GGUF sink against llama.cpp: what is quantized and when, sizes, metadata, text."""

from __future__ import annotations

import ast
import math
from collections import Counter
from pathlib import Path

import gguf as gguf_py
import llama_cpp
import numpy as np
import pytest

from dus_edge.checkpoint.config import load_config, tensor_shapes, with_layers
from dus_edge.export.gguf.sink import conversions, model_shape, plan_file
from dus_edge.families.family import load_families
from dus_edge.quant import types as t
from dus_edge.quant.choose import DEFAULT, QUANTIZERS, find_quantizer
from dus_edge.quant.recipe import PRESETS, tensor_type
from dus_edge.upscale.model import find_model, plan_chooser
from dus_edge.upscale.plan import from_drop
from dus_edge.upscale.view import base_tensor_name

from .cases import ONE_THREAD
from .gguf_cases import SHAPES, export

LLAMA = load_families()["llama"]


def test_a_tensor_is_quantized_once_per_type(make_checkpoint, tmp_path, monkeypatch):
    """12 layers of 8: as many weights are quantized as there are (source, type) pairs.

    And the quantizer was prepared for just the conversions that were then asked of it.
    """
    base = make_checkpoint(**SHAPES["gqa-256"])
    done, asked, prepared = Counter(), set(), []
    quantizer = find_quantizer(DEFAULT)
    quantize, prepare = quantizer.quantize, quantizer.prepare

    def counting(rows, kind, **options):
        asked.add((kind, rows.dtype, False))
        if kind is not t.F32:  # norms
            done[kind.name] += rows.size
        return quantize(rows, kind, **options)

    def noting(wanted, say):
        prepared.extend(wanted := list(wanted))
        prepare(wanted, say)

    monkeypatch.setattr(quantizer, "quantize", counting)
    monkeypatch.setattr(quantizer, "prepare", noting)
    files = export(base, tmp_path, "q4_k_m", "q5_k_m")
    assert len(prepared) == len(set(prepared))
    assert (
        asked
        == set(prepared)
        == {(kind, np.dtype(np.uint16), False) for kind in (t.F32, t.Q4_K, t.Q5_K, t.Q6_K)}
    )
    written = Counter()
    for path in files.values():
        for tensor in gguf_py.GGUFReader(path).tensors:
            written[tensor.tensor_type.name] += int(tensor.n_elements)
    config = load_config(base / "config.json")
    matrices = {n: math.prod(s) for n, s in tensor_shapes(config).items() if len(s) == 2}
    plan, pairs = from_drop(8), set()
    model = model_shape(with_layers(config, plan.sources))
    for preset in ("q4_k_m", "q5_k_m"):
        for name, shape in tensor_shapes(with_layers(config, plan.sources)).items():
            kind = tensor_type(PRESETS[preset], LLAMA.gguf_name(name), shape, model)
            if len(shape) == 2:
                pairs.add((base_tensor_name(name, plan, LLAMA), kind.name))
    assert sum(done.values()) == sum(matrices[name] for name, _ in pairs)
    assert sum(done.values()) < 0.75 * sum(written.values())


def test_bf16_does_not_pass_through_f16(make_checkpoint, tmp_path):
    """Weights beyond f16's range survive in bf16, f32 and the block formats' own arithmetic."""
    base = make_checkpoint(dtype="BF16")
    files = export(base, tmp_path, "bf16", "f32")
    as_bf16 = {t.name: t for t in gguf_py.GGUFReader(files["bf16"]).tensors}
    for tensor in gguf_py.GGUFReader(files["f32"]).tensors:
        bits = tensor.data.view(np.uint32)
        assert not (bits & 0xFFFF).any()
        if as_bf16[tensor.name].tensor_type == gguf_py.GGMLQuantizationType.BF16:
            half = as_bf16[tensor.name].data.view(np.uint16)
            np.testing.assert_array_equal((bits >> 16).astype(np.uint16), half)


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F16"])
def test_what_passes_through_is_asked_of_no_quantizer(make_checkpoint, tmp_path, dtype):
    """A stored type that is the wanted one is copied; another float type is converted exactly."""
    base = make_checkpoint(dtype=dtype)
    model = find_model(str(base), plan_chooser(None, None, (), True), weights=True, say=print)
    checkpoint = model.open()
    preset = PRESETS[dtype.lower()]
    file = plan_file(model.config, model.shapes, [], preset, tmp_path / "x.gguf")
    # llama.cpp keeps norms in f32 whatever the preset.
    norms = {(t.F32, checkpoint.read("model.norm.weight").dtype, False)}
    assert set(conversions(checkpoint, [file])) == (set() if dtype == "F32" else norms)


def test_both_quantizers_lay_out_the_same_file(pico, tmp_path):
    """Header, sizes and all that is not quantized; how good the blocks are is tested elsewhere."""
    files = {q: export(pico, tmp_path / q, "q4_k_m", "f32", quantizer=q) for q in QUANTIZERS}
    ours, theirs = files.values()
    assert ours["f32"].read_bytes() == theirs["f32"].read_bytes()
    assert ours["q4_k_m"].name == theirs["q4_k_m"].name
    a, b = (gguf_py.GGUFReader(f["q4_k_m"]) for f in (ours, theirs))
    start = a.tensors[0].data_offset
    assert a.data[:start].tobytes() == b.data[:start].tobytes()
    for x, y in zip(a.tensors, b.tensors, strict=True):
        assert (x.name, x.data_offset, x.n_bytes) == (y.name, y.data_offset, y.n_bytes)
        if x.tensor_type == gguf_py.GGMLQuantizationType.F32:
            np.testing.assert_array_equal(x.data, y.data)


def test_metadata_says_what_it_is(tmp_path):
    files = export("pico", tmp_path, "q4_k_m")
    fields = gguf_py.GGUFReader(files["q4_k_m"]).fields

    def value(key):
        return fields[key].contents()

    assert value("general.architecture") == "llama"
    assert value("general.file_type") == 15
    assert value("llama.block_count") == 12
    assert value("llama.attention.head_count_kv") == 2
    assert value("dus.plan") == "0:6,2:8"
    assert value("dus.drop") == 2
    assert value("dus.base_block_count") == 8
    assert list(value("dus.layer_sources")) == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7]
    assert value("general.base_model.0.name") == "pico"
    assert "depth-up-scaling" in value("general.tags")
    assert value("general.size_label") in files["q4_k_m"].name


def test_file_names_follow_the_convention(tmp_path):
    """The pattern is the one that ggml's docs/gguf.md gives for checking names."""
    import re

    pattern = re.compile(
        r"^(?P<BaseName>[A-Za-z0-9\s]*(?:(?:-(?:(?:[A-Za-z\s][A-Za-z0-9\s]*)|(?:[0-9\s]*)))*))"
        r"-(?:(?P<SizeLabel>(?:\d+x)?(?:\d+\.)?\d+[A-Za-z](?:-[A-Za-z]+(\d+\.)?\d+[A-Za-z]+)?)"
        r"(?:-(?P<FineTune>[A-Za-z0-9\s-]+))?)?-(?:(?P<Version>v\d+(?:\.\d+)*))"
        r"(?:-(?P<Encoding>(?!LoRA|vocab)[\w_]+))?(?:-(?P<Type>LoRA|vocab))?"
        r"(?:-(?P<Shard>\d{5}-of-\d{5}))?\.gguf$"
    )
    files = export("pico", tmp_path, "q4_k_m")
    match = pattern.match(files["q4_k_m"].name)
    assert match
    assert match["BaseName"] == "pico-DUS"
    assert match["Encoding"] == "Q4_K_M"


def test_aliases_point_to_the_files(pico, tmp_path, cli):
    run = cli("gguf", pico, "-q", "q4_0", "-q", "q8_0", "-o", tmp_path, "--alias", "solar-dus")
    assert run.returncode == 0, run.stderr
    # The name without a preset is the one made last, as modelfiles/solar says.
    assert (tmp_path / "solar-dus.gguf").resolve().name.endswith("-Q8_0.gguf")
    assert (tmp_path / "solar-dus-q4_0.gguf").resolve().name.endswith("-Q4_0.gguf")
    creates = [line.strip() for line in run.stdout.splitlines() if " create " in line]
    assert creates[0].startswith("ollama create solar-dus:q4_0 -f ")
    assert creates[1].startswith("ollama create solar-dus -f ")
    assert creates[1].endswith("-Q8_0.Modelfile")
    assert Path(creates[-1].split(" -f ")[1]).is_file()
    assert max(map(len, run.stdout.splitlines())) <= 80 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("quantizer", "unneeded"),
    [("native", {"dus_edge.quant.ggml"}), ("ggml", {"dus_edge.quant.native", "numba"})],
)
def test_an_export_imports_no_torch(pico, tmp_path, quantizer, unneeded):
    """Nor the other quantizer, nor llama_cpp, whose library alone is loaded."""
    import subprocess
    import sys

    unneeded = {"torch", "transformers", "llama_cpp"} | unneeded
    code = (
        "import sys; sys.argv=['dus-edge','gguf',*sys.argv[1:]]\n"
        "from dus_edge.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        f"bad = {unneeded} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    args = [str(pico), "-q", "q4_0", "-o", str(tmp_path), "--quantizer", quantizer]
    run = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("prompt", "closing"),
    [("def __init__(self", " pass"), ("import os\nimport", ""), ("class Reader(object", " pass")],
)
def test_up_scaled_pico_continues_a_line_of_python(tmp_path, prompt, closing):
    """The main job's own file, Q4_K_M at 12 layers, in llama.cpp: the line becomes valid Python."""
    files = export("pico", tmp_path, "q4_k_m")
    model = llama_cpp.Llama(str(files["q4_k_m"]), n_ctx=64, verbose=False, **ONE_THREAD)
    try:
        choice = model.create_completion(prompt, max_tokens=12, temperature=0)["choices"][0]
    finally:
        model.close()
    text = choice["text"]
    assert "\n" in text, text
    ast.parse(prompt + text.split("\n")[0] + closing)
