"""The benchmark's random checkpoints, read back with the safetensors package."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from dus_edge.checkpoint.hub.fetch import indexed_shards

from .scripts import BENCHMARKS, load_script

SCRIPT = BENCHMARKS / "make_checkpoint.py"
SIZES = {"layers": 2, "hidden": 64, "intermediate": 176, "heads": 4, "kv-heads": 2, "vocab": 320}
TINY = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]

make = load_script("make_checkpoint")


def bits(folder: Path) -> dict[str, np.ndarray]:
    """All tensors by name as stored bits, read without help of the script under test."""
    found = {}
    for file in folder.glob("*.safetensors"):
        raw = file.read_bytes()
        n = int.from_bytes(raw[:8], "little")
        assert (8 + n) % 8 == 0
        for name, entry in json.loads(raw[8 : 8 + n]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                width = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}[entry["dtype"]]
                data = np.frombuffer(raw[8 + n + begin : 8 + n + end], width)
                found[name] = data.reshape(entry["shape"])
    return found


def values(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a bf16 checkpoint as float32."""
    return {n: (b.astype(np.uint32) << 16).view(np.float32) for n, b in bits(folder).items()}


def test_one_file_with_the_expected_tensors(tmp_path: Path) -> None:
    assert make.main([str(tmp_path / "m"), *TINY, "--tokenizer", "none"]) == 0
    files = sorted(p.name for p in (tmp_path / "m").iterdir())
    assert files == ["config.json", "generation_config.json", "model.safetensors"]
    with safe_open(tmp_path / "m" / "model.safetensors", "np") as f:
        shapes = {n: tuple(f.get_slice(n).get_shape()) for n in f.keys()}  # noqa: SIM118
        assert f.metadata() == {"format": "pt"}
        assert f.get_slice("model.norm.weight").get_dtype() == "BF16"
    assert len(shapes) == 2 * 9 + 3
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"] == (320, 64)
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (32, 64)
    assert shapes["model.layers.1.mlp.down_proj.weight"] == (64, 176)
    for name, value in values(tmp_path / "m").items():
        assert np.isfinite(value).all()
        assert 0.015 < value.std() < 0.025
        assert abs(value.mean() - (1 if "norm" in name else 0)) < 0.01


def test_the_program_and_transformers_names_agree(tmp_path: Path) -> None:
    config_module = pytest.importorskip("dus_edge.checkpoint.config")
    for architecture in make.ARCHITECTURES:
        folder = tmp_path / architecture
        make.main([str(folder), *TINY, "--tokenizer", "none", "--architecture", architecture])
        config = config_module.load_config(folder / "config.json")
        assert config.architecture == architecture
        shapes = config_module.tensor_shapes(config)
        assert {n: tuple(s) for n, s in shapes.items()} == {
            n: b.shape for n, b in bits(folder).items()
        }


def test_shards_threads_and_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "CHUNK", 1000)  # many pieces, none of them a whole row
    options = [*TINY, "--tokenizer", "none"]
    make.main([str(tmp_path / "one"), *options, "--threads", "1"])
    make.main([str(tmp_path / "many"), *options, "--threads", "5", "--shard-gb", "0.0001"])
    make.main([str(tmp_path / "other"), *options, "--seed", "1"])
    one, many, other = (bits(tmp_path / n) for n in ("one", "many", "other"))
    assert one.keys() == many.keys() == other.keys()
    assert all(np.array_equal(one[n], many[n]) for n in one)
    assert not any(np.array_equal(one[n], other[n]) for n in one)
    # No two tensors, and no two pieces of one, are alike.
    flat = [b.ravel()[:1000].tobytes() for b in one.values()]
    flat += [one["lm_head.weight"].ravel()[i : i + 1000].tobytes() for i in (1000, 2000)]
    assert len(set(flat)) == len(flat)

    index = json.loads((tmp_path / "many" / make.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(b.nbytes for b in one.values())
    shards = indexed_shards(tmp_path / "many" / make.INDEX, "many")
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "many" / file, "np") as f:
            assert tuple(f.get_slice(name).get_shape()) == one[name].shape


@pytest.mark.parametrize(("dtype", "numpy_dtype"), [("f16", np.float16), ("f32", np.float32)])
def test_other_dtypes(tmp_path: Path, dtype: str, numpy_dtype: type) -> None:
    make.main([str(tmp_path / "m"), *TINY, "--tokenizer", "none", "--dtype", dtype])
    with safe_open(tmp_path / "m" / "model.safetensors", "np") as f:
        tensor = f.get_tensor("lm_head.weight")
    assert tensor.dtype == numpy_dtype and 0.019 < tensor.std() < 0.021
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["torch_dtype"] == {"f16": "float16", "f32": "float32"}[dtype]


def test_rounding_to_bf16() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x = rng.standard_normal(100_000).astype(np.float32)
    ties = (rng.integers(0, 2**14, 10_000).astype(np.uint32) << 16 | 0x8000).view(np.float32)
    x = np.concatenate([x, ties, -ties, np.float32([0.0, -0.0, 1e-40])])
    expected = torch.from_numpy(x.copy()).to(torch.bfloat16).view(torch.int16).numpy()
    scratch, out = np.empty(x.size, np.uint32), np.empty(x.size, np.uint16)
    assert np.array_equal(make.to_bf16(x, scratch, out), expected.view(np.uint16))


def make_tokenizer(folder: Path, vocab: int) -> Path:
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "config.json").write_text(
        json.dumps({"vocab_size": vocab, "bos_token_id": 5, "eos_token_id": 6})
    )
    return folder


def test_tokenizer_is_copied(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "t", 300)
    make.main([str(tmp_path / "m"), *TINY, "--tokenizer", str(tokenizer)])
    assert (tmp_path / "m" / "tokenizer.model").read_bytes() == b"pieces"
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["vocab_size"]) == (5, 6, 320)


def test_the_built_in_tokenizer_is_the_default(tmp_path: Path) -> None:
    from dus_edge.checkpoint import builtin

    if not (builtin.model_dir() / "tokenizer.model").is_file():
        pytest.skip("the built-in base is not in this checkout")
    make.main([str(tmp_path / "m"), *TINY, "--vocab", "32000"])
    source = builtin.model_dir() / "tokenizer.model"
    assert (tmp_path / "m" / "tokenizer.model").read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layers", "0"], "--layers must be at least 1"),
        (["--heads", "3"], "must be --heads 3 times"),
        (["--kv-heads", "3"], "must be a multiple of --kv-heads 3"),
        (["--vocab", "200"], "is less than the tokenizer's 300"),
        (["--tokenizer", "nowhere"], "no tokenizer in nowhere"),
        (["--vocab", "9000000000000"], "GB are free"),
        (["--shard-gb", "0"], "--shard-gb must be positive"),
    ],
)
def test_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    tokenizer = make_tokenizer(tmp_path / "t", 300)
    with pytest.raises(SystemExit) as caught:
        make.main([str(tmp_path / "m"), *TINY, "--tokenizer", str(tokenizer), *options])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err
    assert not list((tmp_path / "m").glob("*"))


def test_a_full_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(SystemExit):
        make.main([str(tmp_path), *TINY, "--tokenizer", "none"])
    assert "not an empty folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_as_a_script(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "m", *TINY, "--tokenizer", "none"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.endswith("2 layers, 0.00 GB of bf16\n")
    assert done.stderr.count("\n") == 1 and "MB/s" in done.stderr and "s left" in done.stderr
