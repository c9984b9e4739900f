"""`verify`: sound models pass; each kind of damage is named, and the exit code says so."""

from __future__ import annotations

import json
import shutil
import subprocess

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from dus_edge.checkpoint.gguf_header import read_header
from dus_edge.errors import CheckpointError
from dus_edge.jobs.export.gguf import export_gguf
from dus_edge.quant.recipe import PRESETS
from dus_edge.quant.types import TYPES
from dus_edge.upscale.model import plan_chooser
from dus_edge.verify.digest import read_digests, write_digests
from dus_edge.verify.gguf import SCALES, verify_gguf

MIXES = ("f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_1", "q5_0", "q5_1", "q4_0", "q2_k")
MIXES += ("iq4_nl", "iq4_xs", "iq3_s")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    choose = plan_chooser(None, None, (), True)
    result = export_gguf("pico", choose, [PRESETS[p] for p in MIXES], folder)
    return {o.preset: o.path for o in result.outputs}


@pytest.fixture
def copy(files, tmp_path):
    def make(preset="q4_k_m"):
        path = tmp_path / "copy.gguf"
        shutil.copyfile(files[preset], path)
        return path

    return make


def tensors(path):
    return {t.name: t for t in read_header(memoryview(path.read_bytes()))[1]}


def poke(path, at, data):
    with path.open("r+b") as f:
        f.seek(at)
        f.write(data)


def test_every_mix_is_sound(run, files):
    code, out, _ = run("verify", "--json", *files.values())
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert all(line["sound"] for line in lines) and len(lines) == len(MIXES)
    for line, path in zip(lines, files.values(), strict=True):
        assert line["n_tensors"] == len(gguf.GGUFReader(path).tensors)
        assert line["bytes"] == path.stat().st_size


@pytest.mark.parametrize("kind", SCALES)
def test_a_block_is_finite_exactly_if_its_scales_are(kind):
    """gguf-py's dequantizer as oracle, for every two bytes of a block that are all ones."""
    t = TYPES[kind]
    rng = np.random.default_rng(0)
    block = rng.integers(0, 120, t.block_bytes, dtype=np.uint8)  # no f16 of these is NaN
    for offset in range(0, t.block_bytes - 1, 2):
        bad = block.copy()
        bad[offset : offset + 2] = 0xFF
        with np.errstate(all="ignore"):
            values = dequantize(bad[None], gguf.GGMLQuantizationType[kind])
        assert np.isfinite(values).all() == (offset not in SCALES[kind]), (kind, offset)


@pytest.mark.parametrize("preset", MIXES)
def test_a_value_that_is_no_number_is_found(copy, preset):
    path = copy(preset)
    found = tensors(path)["blk.7.ffn_down.weight"]
    kind = next(t for t in TYPES.values() if t.ggml_id == found.kind)
    row_bytes = kind.row_bytes(found.dims[0])
    at = found.offset + 3 * row_bytes + SCALES.get(kind.name, (0,))[-1]
    poke(path, at, b"\xff\xff")
    with pytest.raises(CheckpointError, match=r"blk\.7\.ffn_down\.weight .* row 3, from column 0"):
        verify_gguf(path)


def test_damage_is_named(run, copy, tmp_path):
    def said(path, *words):
        code, out, _ = run("verify", path)
        assert code == 3 and out.startswith("damaged: ") and len(out.splitlines()) == 1
        assert all(word in out for word in words), out

    path = copy()
    with path.open("r+b") as f:
        f.truncate(path.stat().st_size - 100)
    said(path, "truncated", "tensor")
    path = copy()
    with path.open("ab") as f:
        f.write(bytes(64))
    said(path, "64 bytes behind its last tensor")
    path = copy()
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.11.ffn_up.weight", b"blk.12.ffn_up.weight", 1))
    said(path, "blk.11.ffn_up.weight is missing")
    path.write_bytes(data.replace(b"blk.11.ffn_up.weight", b"blk.10.ffn_up.weight", 1))
    said(path, "two tensors blk.10.ffn_up.weight")
    path.write_bytes(data[:4000])
    said(path, "ends within its header")
    path.write_bytes(b"")
    said(path, "no whole GGUF file")
    code, _, err = run("verify", tmp_path / "gone.gguf")
    assert code == 2 and "does not exist" in err


def test_folders(run, make_checkpoint, tmp_path):
    base = make_checkpoint()
    code, out, _ = run("verify", base)
    assert code == 0 and out.startswith("sound: ")
    weights = base / "model.safetensors"
    poke(weights, weights.stat().st_size - 2, b"\x80\x7f")  # bf16's infinity
    code, out, _ = run("verify", base)
    assert code == 3
    assert "lm_head.weight[4095, 63] is NaN or infinite" in out


@pytest.mark.parametrize("part", ["scales", "g_idx", "qweight"])
def test_gptq_folders(run, tmp_path, part):
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x\n" * 400)
    folder = tmp_path / "gptq"
    code, _, err = run(
        "gptq", "pico", "-o", folder, "--no-upscale", "--text", text, "--ctx", "64",
        "--chunks", "2", "--group-size", "64",
    )  # fmt: skip
    assert code == 0, err
    code, out, _ = run("verify", folder)
    assert code == 0, out
    from dus_edge.checkpoint.safetensors import read_header as headers

    name = f"model.layers.0.mlp.up_proj.{part}"
    place = headers(folder / "model.safetensors")[name]
    poke(place.file, place.offset, b"\xff\xff\xff\x7f" if part == "g_idx" else b"\xff\x7f\xff\x7f")
    code, out, _ = run("verify", folder)
    # Codes are integers: any is sound.
    assert code == (0 if part == "qweight" else 3)
    assert part == "qweight" or name in out


def test_digests(run, copy, tmp_path):
    path = copy("q4_0")
    write_digests([path])
    sums = tmp_path / "SHA256SUMS"
    checked = subprocess.run(["sha256sum", "-c", sums.name], cwd=tmp_path, capture_output=True)
    assert checked.returncode == 0
    (tmp_path / "other").write_text("x")
    write_digests([tmp_path / "other"])
    assert set(read_digests(sums)) == {"copy.gguf", "other"}
    code, out, _ = run("verify", path)
    assert code == 0 and "digests agree: 1" in out
    # A flipped bit of a code is still a number: only the digest knows.
    poke(path, path.stat().st_size - 1, bytes([path.read_bytes()[-1] ^ 1]))
    code, out, _ = run("verify", path)
    assert code == 3 and "is not the file whose digest" in out
    sums.write_text("nonsense\n")
    code, out, _ = run("verify", path)
    assert code == 3 and "line 1 is no line of sha256sum" in out


@pytest.mark.parametrize("command", ["gguf", "upscale"])
def test_exports_keep_digests_if_asked(run, tmp_path, command):
    out = tmp_path / "out"
    words = (command, "pico", "-o", out, "--digest", "--overwrite")
    assert run(*words)[0] == 0
    assert run(*words)[0] == 0  # the digests are ours to replace
    model = out if command == "upscale" else next(out.glob("*.gguf"))
    code, said, _ = run("verify", model)
    assert code == 0 and "digests agree: " in said
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=out, capture_output=True)
    assert checked.returncode == 0
