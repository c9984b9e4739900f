"""Bad input: one clear sentence, a non-zero exit, nothing left behind, what was there untouched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dus_edge.errors import DusEdgeError
from dus_edge.quant.choose import QUANTIZERS

SINGLE = "model.safetensors"


def header(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def rewrite(path: Path, head: dict, body: bytes) -> None:
    blob = json.dumps(head).encode()
    path.write_bytes(len(blob).to_bytes(8, "little") + blob + body)


def edit_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def truncate(folder):
    path = folder / SINGLE
    os.truncate(path, path.stat().st_size - 100)


def empty_file(folder):
    (folder / SINGLE).write_bytes(b"")


def header_too_long(folder):
    path = folder / SINGLE
    path.write_bytes((1 << 40).to_bytes(8, "little") + path.read_bytes()[8:])


def header_not_json(folder):
    path = folder / SINGLE
    data = path.read_bytes()
    path.write_bytes(data[:8] + b"x" + data[9:])


def lying_offsets(folder):
    head, body = header(folder / SINGLE)
    entry = head["model.norm.weight"]
    entry["data_offsets"] = [len(body) - 128, len(body) + 128]
    rewrite(folder / SINGLE, head, body)


def negative_offsets(folder):
    head, body = header(folder / SINGLE)
    head["model.norm.weight"]["data_offsets"] = [-128, 0]
    rewrite(folder / SINGLE, head, body)


def lying_dtype(folder):
    head, body = header(folder / SINGLE)
    head["model.norm.weight"]["dtype"] = "F32"
    rewrite(folder / SINGLE, head, body)


def unknown_dtype(folder):
    head, body = header(folder / SINGLE)
    head["model.norm.weight"]["dtype"] = "F8_E4M3"
    rewrite(folder / SINGLE, head, body)


def overlapping(folder):
    head, body = header(folder / SINGLE)
    names = [n for n in head if n.endswith("norm.weight")]
    head[names[1]]["data_offsets"] = head[names[0]]["data_offsets"]
    rewrite(folder / SINGLE, head, body)


def missing_tensor(folder):
    head, body = header(folder / SINGLE)
    a, b = head.pop("lm_head.weight")["data_offsets"]
    assert b == len(body)
    rewrite(folder / SINGLE, head, body[:a])


def wrong_shape(folder):
    edit_config(folder, intermediate_size=128)


def extra_layer(folder):
    edit_config(folder, num_hidden_layers=3)


def stranger(folder):
    head, body = header(folder / SINGLE)
    head["model.layers.0.mlp.experts.weight"] = head.pop("model.layers.0.mlp.up_proj.weight")
    rewrite(folder / SINGLE, head, body)


def not_a_number(folder):
    head, body = header(folder / SINGLE)
    a, _ = head["model.layers.2.mlp.up_proj.weight"]["data_offsets"]
    body = bytearray(body)
    body[a + 2 * 64 * 5 : a + 2 * 64 * 5 + 2] = b"\xc0\x7f"  # bf16 NaN in row 5
    rewrite(folder / SINGLE, head, bytes(body))


def infinite(folder):
    head, body = header(folder / SINGLE)
    a, _ = head["model.norm.weight"]["data_offsets"]
    body = bytearray(body)
    body[a : a + 2] = b"\x80\xff"  # bf16 −∞
    rewrite(folder / SINGLE, head, bytes(body))


def pickled_only(folder):
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def no_weights(folder):
    (folder / SINGLE).unlink()


def no_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text("{")


def other_architecture(folder):
    edit_config(folder, architectures=["GPT2LMHeadModel"])


def quantized(folder):
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def absurd_field(folder):
    edit_config(folder, num_hidden_layers="four")


def odd_heads(folder):
    edit_config(folder, num_key_value_heads=3)


def odd_rope(folder):
    edit_config(folder, rope_scaling={"rope_type": "longrope", "factor": 2.0})


SPOILED = {
    truncate: r"model\.safetensors.*truncated.*fetch",
    empty_file: r"model\.safetensors has 0 bytes",
    header_too_long: r"model\.safetensors: the header claims 1099511627776 bytes",
    header_not_json: r"model\.safetensors: the header is not JSON",
    lying_offsets: r"tensor model\.norm\.weight is said to lie at bytes",
    negative_offsets: r"tensor model\.norm\.weight has no sound",
    lying_dtype: r"tensor model\.norm\.weight has 128 bytes.*F32.*need 256",
    unknown_dtype: r"tensor model\.norm\.weight has dtype F8_E4M3; known are BF16, F16, F32",
    overlapping: r"tensors \S+norm\.weight and \S+norm\.weight overlap",
    missing_tensor: r"tensor lm_head\.weight is missing",
    wrong_shape: r"gate_proj\.weight has shape \[96, 64\].*means \[128, 64\]",
    extra_layer: r"layers\.3\.\S+ belongs to layer 3.*says 3 layers \(0–2\)",
    stranger: r"experts\.weight has no place in a LlamaForCausalLM",
    not_a_number: r"tensor model\.layers\.2\.mlp\.up_proj\.weight\[5, 0\] is NaN.*--allow-nonfin",
    infinite: r"tensor model\.norm\.weight\[0\] is NaN or infinite",
    pickled_only: r"only pickled weights \(pytorch_model\.bin\).*save_pretrained",
    no_weights: r"neither model\.safetensors nor",
    no_config: r"config\.json",
    broken_config: r"config\.json cannot be read as JSON",
    other_architecture: r"GPT2LMHeadModel.*known are .*LlamaForCausalLM, MistralForCausalLM",
    quantized: r"already quantized \(gptq\)",
    absurd_field: r"num_hidden_layers is 'four'",
    odd_heads: r"num_attention_heads \(4\) is not a multiple of num_key_value_heads \(3\)",
    odd_rope: r"rope type 'longrope' is not supported; known are",
}


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("job", ["gguf", "upscale"])
@pytest.mark.parametrize("spoil", SPOILED, ids=lambda f: f.__name__)
def test_spoiled_checkpoint(make_checkpoint, tmp_path, run_job, spoil, job):
    base = make_checkpoint()
    out = tmp_path / "out"
    run_job(job, base, out)
    before = files_of(out)
    spoil(base)
    with pytest.raises(DusEdgeError, match=SPOILED[spoil]) as refusal:
        run_job(job, base, out, overwrite=True)
    assert "\n" not in str(refusal.value)
    assert refusal.value.exit_code != 0
    assert files_of(out) == before
    assert not list(tmp_path.rglob("*.partial"))


@pytest.fixture
def run_job():
    from dus_edge.jobs.export.checkpoint import export_checkpoint
    from dus_edge.jobs.export.gguf import export_gguf
    from dus_edge.quant.recipe import PRESETS
    from dus_edge.upscale.model import plan_chooser

    def run(job, base, out, overwrite=False, **options):
        choose = plan_chooser(None, None, (), True)
        if job == "gguf":
            presets = [PRESETS["q8_0"]]
            export_gguf(str(base), choose, presets, out, overwrite=overwrite, **options)
        else:
            export_checkpoint(str(base), choose, out, overwrite=overwrite, **options)

    return run


def missing_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def outside(folder):
    edit_index(folder, lambda m: m.update({"lm_head.weight": "../other.safetensors"}))


def absolute(folder):
    edit_index(folder, lambda m: m.update({"lm_head.weight": "/etc/passwd"}))


def misplaced(folder):
    edit_index(folder, lambda m: m.update({"lm_head.weight": "model-00001-of-00003.safetensors"}))


def broken_index(folder):
    (folder / "model.safetensors.index.json").write_text("[]")


SPOILED_SHARDS = {
    missing_shard: r"names model-00002-of-00003\.safetensors, which is not in the folder",
    outside: r"lm_head\.weight points to '\.\./other\.safetensors', outside the folder",
    absolute: r"lm_head\.weight points to '/etc/passwd', outside the folder",
    misplaced: r"00001-of-00003\.safetensors: tensor lm_head\.weight.*is missing",
    broken_index: r"index\.json is no index of shards",
}


@pytest.mark.parametrize("spoil", SPOILED_SHARDS, ids=lambda f: f.__name__)
def test_spoiled_shards(make_checkpoint, tmp_path, run_job, spoil):
    base = make_checkpoint(shards=3)
    spoil(base)
    with pytest.raises(DusEdgeError, match=SPOILED_SHARDS[spoil]):
        run_job("gguf", base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_of_a_first_export_that_fails(make_checkpoint, tmp_path, run_job):
    base = make_checkpoint()
    not_a_number(base)
    for job in ("gguf", "upscale"):
        with pytest.raises(DusEdgeError, match="is NaN"):
            run_job(job, base, tmp_path / "deep" / "er" / "out")
        assert not (tmp_path / "deep").exists()


def test_nonfinite_weights_can_be_allowed(make_checkpoint, tmp_path, run_job):
    base = make_checkpoint()
    not_a_number(base)
    run_job("gguf", base, tmp_path / "a", allow_nonfinite=True)
    run_job("upscale", base, tmp_path / "b", allow_nonfinite=True)
    assert list((tmp_path / "a").glob("*.gguf"))
    assert (tmp_path / "b" / SINGLE).exists()


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_values_too_large_for_f16(make_checkpoint, tmp_path, quantizer):
    from dus_edge.jobs.export.gguf import export_gguf
    from dus_edge.quant.recipe import PRESETS
    from dus_edge.upscale.model import plan_chooser

    base = make_checkpoint()
    head, body = header(base / SINGLE)
    a, _ = head["lm_head.weight"]["data_offsets"]
    body = bytearray(body)
    body[a : a + 2] = np.array([0x4880], np.uint16).tobytes()  # bf16 2¹⁸, beyond f16's 65,504
    rewrite(base / SINGLE, head, bytes(body))
    choose = plan_chooser(None, None, (), True)
    message = r"lm_head\.weight has values too large for F16 \(the largest is 2\.62e\+05\).*bf16"
    for presets in (["f16"], ["q4_k_m", "f16"]):
        with pytest.raises(DusEdgeError, match=message):
            export_gguf(
                str(base), choose, [PRESETS[p] for p in presets], tmp_path, quantizer=quantizer
            )
    export_gguf(str(base), choose, [PRESETS["bf16"]], tmp_path, quantizer=quantizer)


def test_same_message_on_the_command_line(make_checkpoint, tmp_path, cli):
    base = make_checkpoint()
    truncate(base)
    run = cli("gguf", base, "-o", tmp_path / "out")
    assert run.returncode == 3
    assert run.stderr.startswith("dus-edge: ")
    assert "Traceback" not in run.stderr
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--drop", "4"], 2, "m = 4 is out of range"),
        (["--drop", "-1"], 2, "m = -1 is out of range"),
        (["--layers", "18"], 2, "18 layers cannot be made of a base of 8"),
        (["--plan", "0:9"], 2, "range 0:9 does not fit a base of 8 layers"),
        (["-q", "q4km"], 2, "no preset 'q4km'; did you mean q4_k_m"),
        (["--quantizer", "exact"], 2, "'exact' is not one of 'native', 'ggml'"),
        (["--threads", "0"], 2, "0 is not in the range"),
    ],
)
def test_bad_options(tmp_path, cli, args, code, message):
    run = cli("gguf", "pico", "-o", tmp_path / "out", *args)
    assert run.returncode == code
    assert message in run.stderr
    assert not list(tmp_path.rglob("*.gguf*"))


def test_output_that_exists(tmp_path, cli, make_checkpoint):
    base = make_checkpoint()
    out = tmp_path / "out"
    assert cli("gguf", base, "-q", "q8_0", "-o", out).returncode == 0
    before = files_of(out)
    run = cli("gguf", base, "-q", "q8_0", "-o", out)
    assert run.returncode == 4
    assert "exists; add --overwrite" in run.stderr
    assert files_of(out) == before
    assert cli("gguf", base, "-q", "q8_0", "-o", out, "--overwrite").returncode == 0
    assert files_of(out) == before


def test_a_folder_of_other_things_is_not_replaced(tmp_path, make_checkpoint, run_job):
    base = make_checkpoint()
    out = tmp_path / "home"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(DusEdgeError, match=r"holds thesis\.tex, which is no part of a checkpoint"):
        run_job("upscale", base, out, overwrite=True)
    assert (out / "thesis.tex").read_text() == "years of work"
    with pytest.raises(DusEdgeError, match="is the source itself"):
        run_job("upscale", base, base, overwrite=True)


def test_folder_that_cannot_be_written(tmp_path, make_checkpoint, run_job):
    """A file where the folder should be: refused for root as for anybody."""
    blocker = tmp_path / "file"
    blocker.write_text("")
    base = make_checkpoint()
    for job in ("gguf", "upscale"):
        with pytest.raises(DusEdgeError, match="cannot be written"):
            run_job(job, base, blocker / "out")
    assert blocker.read_text() == ""


def test_too_little_room_is_said_before_writing(tmp_path, make_checkpoint, run_job, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    base = make_checkpoint()
    for job in ("gguf", "upscale"):
        with pytest.raises(DusEdgeError, match=r"are needed and 1000 B are free"):
            run_job(job, base, tmp_path / job)
        assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk")
def test_disk_that_fills_up(tmp_path, make_checkpoint, run_job, monkeypatch):
    """A really full disk, met while writing: the check beforehand is put out of action."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk]).returncode:
        pytest.skip("no mounts in this sandbox")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    base = make_checkpoint()
    try:
        for job in ("gguf", "upscale"):
            with pytest.raises(DusEdgeError, match="the disk is full"):
                run_job(job, base, disk / job)
            assert not files_of(disk)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_interrupted(tmp_path):
    """Ctrl-C in the middle leaves nothing behind, and exits as shells expect."""
    import signal
    import time

    out = tmp_path / "out"
    code = (
        "import signal, sys, time\n"
        # A test run in the background of a shell passes on that Ctrl-C is ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from dus_edge.quant import native\n"
        "slow = native.quantize\n"
        "def quantize(*a, **k): time.sleep(0.3); return slow(*a, **k)\n"
        "native.quantize = quantize\n"
        "sys.argv = ['dus-edge', 'gguf', 'pico', '-o', sys.argv[1]]\n"
        "from dus_edge.cli.main import main; main()"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not list(out.glob("*.partial")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(out.glob("*.partial"))
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=300)
    assert run.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not out.exists()
