"""What is no base among GGUF files, and Ollama's folder: one sentence each, and nothing written."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from dus_edge.checkpoint.config import load_config
from dus_edge.checkpoint.gguf.file import GGUFModel
from dus_edge.checkpoint.gguf.ollama import find_ollama, short_name
from dus_edge.checkpoint.gguf.source import gguf_source
from dus_edge.checkpoint.gguf.weights import GGUFCheckpoint
from dus_edge.errors import CheckpointError, DusEdgeError, UnsupportedError, UsageError

from .cases import check_each

SIZES = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 64,
    "attention.head_count": 2,
    "attention.head_count_kv": 2,
    "rope.dimension_count": 16,
}
SHAPES = {
    "token_embd.weight": (40, 32),
    "output.weight": (40, 32),
    "output_norm.weight": (32,),
    **{
        f"blk.{i}.{name}.weight": shape
        for i in range(2)
        for name, shape in {
            "attn_norm": (32,),
            "attn_q": (32, 32),
            "attn_k": (32, 32),
            "attn_v": (32, 32),
            "attn_output": (32, 32),
            "ffn_norm": (32,),
            "ffn_gate": (64, 32),
            "ffn_up": (64, 32),
            "ffn_down": (32, 64),
        }.items()
    },
}


def write(path: Path, architecture: str = "llama", without: str = "", **more) -> Path:
    """A model of noise, with keys and tensors changed; a value of ... leaves an entry out."""
    writer = gguf.GGUFWriter(path, architecture)
    keys = {f"{architecture}.{k}": v for k, v in SIZES.items()}
    keys |= {f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5}
    keys |= {k.replace("__", "."): v for k, v in more.items() if not isinstance(v, np.ndarray)}
    for key, value in keys.items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not ...:
            writer.add_uint32(key, value)
    rng = np.random.default_rng(3)
    for name, shape in SHAPES.items():
        if name != without:
            writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))
    for name, array in more.items():
        if isinstance(array, np.ndarray):
            writer.add_tensor(name.replace("__", "."), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_sound_one_is_a_base(tmp_path, run):
    code, out, err = run("gguf", write(tmp_path / "x.gguf"), "--drop", "0", "-o", tmp_path / "o")
    assert code == 0, err
    assert "2 → 4 layers (0:2,0:2)" in out


#: What is wrong, and words of the sentence.
WRONG: dict[str, tuple[dict, str]] = {
    "architecture": ({"architecture": "rwkv7"}, "the architecture is 'rwkv7', which is not"),
    "experts": ({"llama__expert_count": 8}, "a mixture of experts"),
    "no depth": ({"llama__block_count": ...}, "llama.block_count is None, and there are tensors"),
    "another depth": ({"llama__block_count": 3}, "llama.block_count is 3, and there are tensors"),
    "layers apart": ({"llama__block_count": [1, 2]}, "llama.block_count differs from layer to"),
    "no embedding": ({"without": "token_embd.weight"}, "token_embd.weight is missing"),
    "images": ({"v__patch": np.ones((4, 4), np.float32)}, "v.patch has no place in a model of"),
    "no width": ({"llama__embedding_length": ...}, "hidden_size is missing"),
    "two widths": (
        {"llama__attention__key_length": 8, "llama__rope__dimension_count": 16},
        "another key means",
    ),
    "kv by layer": ({"llama__attention__head_count_kv": [1, 2]}, "differs from layer to layer"),
}
#: The same for what takes the weights apart; copying does not look at it.
UNREAD: dict[str, tuple[dict, str]] = {
    "another tensor": ({"blk__0__novelty": np.ones(4, np.float32)}, "blk.0.novelty has no place"),
    "another key": ({"llama__logit_scale": 2.0}, "llama.logit_scale is not understood"),
    "another shape": ({"llama__feed_forward_length": 96}, "but the metadata means [96, 32]"),
    "no norm": ({"without": "output_norm.weight"}, "output_norm.weight is missing"),
    "rope": (
        {"rope_freqs__weight": np.linspace(1, 9, 8, dtype=np.float32)},
        "has divisors of no rotary embedding",
    ),
    "another rope": ({"llama__rope__scaling__type": "longrope"}, "scaling.type is 'longrope'"),
    "no tokenizer": ({}, "its tokenizer is of the kind None"),
}


def test_what_is_no_base_is_told_by_one_sentence(tmp_path, run):
    def check(name: str) -> None:
        changes, words = WRONG[name]
        path = write(tmp_path / f"{name}.gguf".replace(" ", "-"), **changes)
        for more in ((), ("-q", "q8_0")):
            if name == "images" and more:
                continue
            code, _, err = run("gguf", path, "--drop", "0", *more, "-o", tmp_path / "out")
            assert code in (2, 3) and words in err, err
            assert err.count("\n") == 1 and path.name in err
        assert not (tmp_path / "out").exists()

    check_each(check, WRONG)


def test_what_can_only_be_copied_is_told(tmp_path, run):
    def check(name: str) -> None:
        changes, words = UNREAD[name]
        path = write(tmp_path / f"{name}.gguf".replace(" ", "-"), **changes)
        code, _, err = run("upscale", path, "--drop", "0", "-o", tmp_path / "out")
        # These have no tokenizer either, which is looked for first.
        assert code == 3 and (words in err or "is of the kind None" in err), err
        with pytest.raises(CheckpointError) as caught:
            source = gguf_source(str(path), path, "if known")
            GGUFCheckpoint(source, load_config(source.folder / "config.json"))
            gguf_source(str(path), path)
        assert words in str(caught.value)
        code, _, err = run("gguf", path, "--drop", "0", "-o", tmp_path / f"out-{name}")
        assert code == 0, err

    check_each(check, UNREAD)


def test_damaged_files(tmp_path, run):
    sound = write(tmp_path / "sound.gguf").read_bytes()
    at = GGUFModel(tmp_path / "sound.gguf").tensors["blk.1.ffn_up.weight"].offset

    def tensor_entry(name: str, kind: int) -> bytes:
        """The file with another type of a tensor."""
        place = sound.index(name.encode()) + len(name) + 4 + 2 * 8
        return sound[:place] + struct.pack("<I", kind) + sound[place + 4 :]

    files = {
        "empty": (b"", "is no GGUF file of a model"),
        "another": (b"PK\x03\x04" + sound[4:], "does not start with GGUF"),
        "cut in the header": (sound[:700], "ends within its header"),
        "cut in a tensor": (sound[: at + 100], "is said to end at byte"),
        "cut at the end": (sound[:-64], "is said to end at byte"),
        "unknown type": (tensor_entry("blk.1.ffn_up.weight", 99), "is of the unknown type 99"),
        "no whole blocks": (tensor_entry("blk.1.ffn_up.weight", 12), "no whole number of Q4_K"),
        "big-endian": (sound[:4] + struct.pack(">I", 3) + sound[8:], "its GGUF version is"),
    }

    def check(name: str) -> None:
        data, words = files[name]
        path = tmp_path / "damaged.gguf"
        path.write_bytes(data)
        for command in ("gguf", "upscale", "inspect"):
            more = () if command == "inspect" else ("-o", tmp_path / "out")
            code, _, err = run(command, path, *more)
            assert code == 3 and words in err and str(path) in err, err
        assert not (tmp_path / "out").exists()

    check_each(check, files)


def test_parts_of_a_split_file(tmp_path, run):
    path = write(tmp_path / "m-00001-of-00003.gguf", split__no=0, split__count=3)
    code, _, err = run("gguf", path)
    assert code == 3
    assert "is one of 3 parts, and m-00002-of-00003.gguf and 1 more is not beside it" in err
    shutil.copy(path, tmp_path / "m-00002-of-00003.gguf")
    shutil.copy(path, tmp_path / "m-00003-of-00003.gguf")
    code, _, err = run("gguf", path)
    assert code == 3 and "says that it is part 0 of 3" in err and "1 of 3" in err
    alone = tmp_path / "alone.gguf"
    path.rename(alone)
    code, _, err = run("gguf", alone)
    assert code == 3 and "give the parts back their names" in err


def test_what_is_beside_a_gguf(tmp_path, run):
    path = write(tmp_path / "x.gguf")
    code, _, err = run("gguf", tmp_path)
    assert code == 3 and f"name the GGUF file itself, {path}" in err
    code, _, err = run("gguf", tmp_path / "y.gguf")
    assert code == 2 and "There is no folder or file" in err
    code, _, err = run("gguf", path, "--imatrix", "auto")
    assert code == 2 and "add -q PRESET" in err
    code, out, _ = run("gguf", path, "--drop", "0", "-o", tmp_path / "out")
    own = Path(out.splitlines()[1])
    code, _, err = run("gguf", own, "--no-upscale", "-o", tmp_path / "out", "--overwrite")
    assert code == 4 and "is the base itself" in err, err


def test_mlx_folders_are_refused(make_checkpoint, run, tmp_path):
    folder = make_checkpoint()
    config = json.loads((folder / "config.json").read_text())
    mlx = {"quantization": {"group_size": 64, "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config | mlx))
    code, _, err = run("gguf", folder, "-o", tmp_path / "out")
    assert code == 3 and "quantized (MLX)" in err and "mlx_lm.convert --dequantize" in err
    assert err.count("\n") == 1


# -- Ollama -------------------------------------------------------------------------------------

DIGEST = "ab" * 32


@pytest.fixture
def ollama(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Add a model to a folder of Ollama's: name, layers besides its weights."""
    folder = tmp_path / "models"
    monkeypatch.setenv("OLLAMA_MODELS", str(folder))

    def add(place: str, *kinds: str, digest: str = f"sha256:{DIGEST}") -> Path:
        manifest = folder / "manifests" / place
        manifest.parent.mkdir(parents=True, exist_ok=True)
        layers = [
            {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": digest, "size": 1}
            for kind in kinds
        ]
        manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
        (folder / "blobs").mkdir(exist_ok=True)
        return write(folder / "blobs" / f"sha256-{DIGEST}")

    return add


def test_a_model_of_ollamas(ollama, run, tmp_path):
    blob = ollama("registry.ollama.ai/library/solar/latest", "model", "template", "license")
    for name in ("solar", "solar:latest", "library/solar"):
        assert find_ollama(name) == blob
    code, out, err = run("gguf", "ollama:solar", "--drop", "0", "-o", tmp_path / "out")
    assert code == 0, err
    (made,) = (tmp_path / "out").glob("*.gguf")
    assert made.name.startswith("solar-DUS-") and out.startswith("solar: 2 → 4 layers")
    code, out, _ = run("inspect", "ollama:solar")
    assert code == 0 and "ollama:solar" in out
    ollama("registry.ollama.ai/me/mine/7b-q4_K_M", "model")
    assert find_ollama("me/mine:7b-q4_K_M") == blob
    assert short_name("me/mine:7b-q4_K_M") == "mine-7b-q4_K_M"
    ollama("hf.co/org/repo/Q4_0", "model")
    assert find_ollama("hf.co/org/repo:Q4_0") == blob


def test_no_such_model_of_ollamas(ollama, run, tmp_path):
    blob = ollama("registry.ollama.ai/library/solar/10.7b", "model")
    ollama("registry.ollama.ai/library/eyes/latest", "model", "projector")
    ollama("registry.ollama.ai/library/tuned/latest", "model", "adapter")
    ollama("registry.ollama.ai/library/two/latest", "model", "model")
    ollama("registry.ollama.ai/library/odd/latest", "model", digest="sha256:../../x")
    (tmp_path / "models/manifests/registry.ollama.ai/library/broken").mkdir()
    (tmp_path / "models/manifests/registry.ollama.ai/library/broken/latest").write_text("{}")
    cases = [
        ("nothing", UsageError, "Ollama has no model nothing:latest in"),
        ("solar", UsageError, "there is solar:10.7b"),
        ("../x", UsageError, "is no name of a model"),
        ("", UsageError, "is no name of a model"),
        ("a/b/c/d", UsageError, "is no name of a model"),
        ("eyes", UnsupportedError, "reads images too"),
        ("tuned", UnsupportedError, "has a LoRA adapter on it"),
        ("two", UnsupportedError, "names 2 files of weights"),
        ("odd", CheckpointError, "is no digest"),
        ("broken", CheckpointError, "lists no layers"),
    ]

    def check(case: tuple[str, type[DusEdgeError], str]) -> None:
        name, error, words = case
        with pytest.raises(error) as caught:
            find_ollama(name)
        assert words in str(caught.value)
        code, _, err = run("gguf", f"ollama:{name}", "-o", tmp_path / "out")
        assert code == error.exit_code and words in err and err.count("\n") == 1, err

    check_each(check, cases)
    blob.unlink()
    with pytest.raises(CheckpointError, match=r"ollama pull solar:10\.7b"):
        find_ollama("solar:10.7b")
