"""bitsandbytes folders against those that transformers and bitsandbytes save themselves."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dus_edge.checkpoint.config import load_config
from dus_edge.checkpoint.spec import Checkpoint, Source, TensorSpec
from dus_edge.errors import CheckpointError, DependencyError, OutputError
from dus_edge.export import bnb, hf
from dus_edge.jobs.export.checkpoint import export_checkpoint
from dus_edge.upscale.model import find_model, plan_chooser

from .draws import examples

UP_SCALED = plan_chooser(None, None, (), True)
SCHEMES = {"nf4": bnb.NF4, "nf4-single": bnb.Scheme("nf4", double_quant=False), "int8": bnb.INT8}
#: Rows of the down projection are seven and a half blocks; the gate has more absmaxes than one
#: block of double quantization.
WIDE = {"intermediate_size": 480, "vocab_size": 128}


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch):
    """bitsandbytes' kernel for AVX512-BF16 fails on widths that its block does not divide."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


def planned_tensors(checkpoint, scheme):
    return bnb.plan_tensors(checkpoint.config.family, checkpoint.specs(), scheme)


def open_model(folder: Path) -> Checkpoint:
    return find_model(str(folder), UP_SCALED, weights=True, say=lambda line: None).open()


def write(checkpoint: Checkpoint, out: Path, scheme: bnb.Scheme, **options) -> int:
    written: list[int] = []
    options = {"n_threads": 2, "advance": written.append} | options
    bnb.write_checkpoint(checkpoint, out, "A card.", scheme, **options)
    return sum(written)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, read by the safetensors package."""
    with safe_open(folder / "model.safetensors", framework="pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Bit for bit, but for the blanks that our JSON is padded with."""
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        ours_bytes = ours[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert ours[name].dtype == expected.dtype, name
        if "quant_state" in name:
            ours_bytes = ours_bytes.rstrip()
        else:
            assert ours[name].shape == expected.shape, name
        assert ours_bytes == expected.reshape(-1).view(torch.uint8).numpy().tobytes(), name


def transformers_config(scheme: bnb.Scheme) -> BitsAndBytesConfig:
    if scheme.name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=scheme.double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )


@pytest.mark.parametrize(
    ("scheme", "dtype", "overrides"),
    [
        ("nf4", "BF16", {}),
        ("nf4", "F16", {"attention_bias": True, "mlp_bias": True}),
        ("nf4-single", "F32", {"tie_word_embeddings": True}),
        ("int8", "BF16", {"attention_bias": True}),
        ("int8", "F32", {"torch_dtype": "float32"}),
    ],
)
def test_equal_to_what_transformers_saves(make_checkpoint, tmp_path, scheme, dtype, overrides):
    base = make_checkpoint(dtype=dtype, **WIDE | overrides)
    scheme = SCHEMES[scheme]
    export_checkpoint(str(base), UP_SCALED, tmp_path / "up")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "up", quantization_config=transformers_config(scheme), device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "theirs")
    checkpoint = open_model(base)
    written = write(checkpoint, tmp_path / "ours", scheme)
    assert written == sum(s.nbytes for s in planned_tensors(checkpoint, scheme))

    assert_equal(tensors(tmp_path / "ours"), tensors(tmp_path / "theirs"))
    configs = [load_json(tmp_path / d / "config.json") for d in ("ours", "theirs")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]

    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", device_map="cpu")
    assert ours.dtype == theirs.dtype
    assert ours.config.num_hidden_layers == 6
    ids = torch.arange(24)[None] * 5 % 128
    with torch.no_grad():
        expected = theirs(ids).logits
        assert torch.equal(ours(ids).logits, expected)
    assert expected.float().std() > 0.1
    # Saved again, nothing of ours is left: not even the blanks.
    ours.save_pretrained(tmp_path / "again", save_original_format=False)
    again, first = tensors(tmp_path / "again"), tensors(tmp_path / "theirs")
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_pico_answers_much_as_before(tmp_path, pico):
    """NF4 and INT8 of the up-scaled built-in base change its logits a little, not altogether."""
    export_checkpoint(str(pico), UP_SCALED, tmp_path / "up")
    ids = torch.arange(48)[None] * 37 % 4096
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "up", dtype=torch.float32)
        exact = model(ids).logits
        for name, most in (("nf4", 0.25), ("int8", 0.05)):
            write(open_model(pico), tmp_path / name, SCHEMES[name])
            model = AutoModelForCausalLM.from_pretrained(tmp_path / name, device_map="cpu")
            off = model(ids).logits.float() - exact
            assert 0 < off.norm() / exact.norm() < most


class ArrayCheckpoint(Checkpoint):
    """One linear layer's weight, in memory."""

    NAME = "model.layers.0.mlp.up_proj.weight"

    def __init__(self, folder: Path, dtype: str, array: np.ndarray, names: int = 1) -> None:
        self.source = Source(folder, "x", "x")
        self.config = load_config(folder / "config.json")
        self._array = array
        self._specs = {}
        for i in range(names):
            name = self.NAME.replace("0", str(i))
            self._specs[name] = TensorSpec(name, dtype, array.shape, self.NAME)
        self.n_read = 0

    def specs(self):
        return self._specs

    def read(self, name, start=0, stop=None):
        rows = self._array[start:stop]
        self.n_read += rows.size
        rows.flags.writeable = False
        return rows


@examples(25, suppress_health_check=list(HealthCheck))
@given(
    scheme=st.sampled_from(sorted(SCHEMES)),
    dtype=st.sampled_from(["BF16", "F16", "F32"]),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 150).map(lambda n: 2 * n)),
    piece=st.integers(1, 5000),
    seed=st.integers(0, 99),
)
def test_any_shape_in_any_pieces(
    make_checkpoint, tmp_path, monkeypatch, scheme, dtype, shape, piece, seed
):
    """As the layers of bitsandbytes quantize and save the whole weight at once."""
    import bitsandbytes

    monkeypatch.setattr("dus_edge.export.chunks.CHUNK_WEIGHTS", piece)
    base = tmp_path / "base"
    if not base.exists():
        make_checkpoint(torch_dtype="float32")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weight = weight.to({"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype])
    stored = weight.view(torch.int16).numpy().view(np.uint16) if dtype == "BF16" else weight.numpy()
    checkpoint = ArrayCheckpoint(base, dtype, stored.copy())
    write(checkpoint, tmp_path / "out", SCHEMES[scheme], overwrite=True)
    assert checkpoint.n_read == stored.size

    rows, columns = shape
    if scheme == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
        layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False)
    else:
        layer = bitsandbytes.nn.Linear4bit(columns, rows, bias=False)
        layer.weight = bitsandbytes.nn.Params4bit(
            weight,
            requires_grad=False,
            compress_statistics=SCHEMES[scheme].double_quant,
            quant_type="nf4",
            module=layer,
        )
    state = layer.to("cpu").state_dict()
    prefix = ArrayCheckpoint.NAME.removesuffix("weight")
    expected = {prefix + name: value for name, value in state.items()}
    if scheme == "int8":
        expected[f"{prefix}weight_format"] = torch.tensor(0, dtype=torch.uint8)
    assert_equal(tensors(tmp_path / "out"), expected)


def test_a_layer_at_several_places_is_quantized_once(make_checkpoint, tmp_path):
    weight = np.random.default_rng(0).standard_normal((96, 64), np.float32)
    checkpoint = ArrayCheckpoint(make_checkpoint(), "F32", weight, names=3)
    write(checkpoint, tmp_path / "out", bnb.NF4)
    assert checkpoint.n_read == weight.size
    found = tensors(tmp_path / "out")
    for ending in ("", ".absmax", ".quant_state.bitsandbytes__nf4"):
        first, *others = (found[name + ending] for name in checkpoint.specs())
        assert all(torch.equal(first, other) for other in others)


def test_the_result_does_not_depend_on_threads(make_checkpoint, tmp_path):
    base = make_checkpoint(**WIDE)
    before = torch.get_num_threads()
    for n in (1, 4):
        write(open_model(base), tmp_path / str(n), bnb.NF4, n_threads=n)
    one, four = ((tmp_path / n / "model.safetensors").read_bytes() for n in "14")
    assert one == four
    assert torch.get_num_threads() == before


def test_every_tensor_is_aligned(make_checkpoint, tmp_path):
    """A reader that maps the file looks at the bytes where they lie."""
    write(open_model(make_checkpoint()), tmp_path / "out", bnb.NF4)
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    assert n % 8 == 0
    assert {t["dtype"] for k, t in header.items() if k != "__metadata__"} == {"U8", "F32", "BF16"}
    for name, entry in header.items():
        if name != "__metadata__":
            width = {"U8": 1, "BF16": 2, "F32": 4}[entry["dtype"]]
            assert entry["data_offsets"][0] % width == 0, name


def test_shards_have_an_index(make_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(hf.plan_shards, "__defaults__", (60_000,))
    checkpoint = open_model(make_checkpoint(**WIDE))
    write(checkpoint, tmp_path / "out", bnb.NF4)
    index = load_json(tmp_path / "out" / "model.safetensors.index.json")
    planned = planned_tensors(checkpoint, bnb.NF4)
    assert set(index["weight_map"]) == {s.name for s in planned}
    assert len(set(index["weight_map"].values())) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_integer_tensors_and_extra_files_of_any_exporter(make_checkpoint, tmp_path):
    """What other quantized formats need of the same writer."""
    base = make_checkpoint()
    codes = np.arange(-8, 8, dtype=np.int32).reshape(4, 4)
    checkpoint = ArrayCheckpoint(base, "I32", codes, names=2)
    hf.write_checkpoint(
        checkpoint,
        tmp_path / "out",
        "A card.",
        n_threads=1,
        config_extra={"quantization_config": {"bits": 4}, "hidden_act": "gelu"},
        extra_files={"quantize_config.json": '{"bits": 4}'},
    )
    for found in tensors(tmp_path / "out").values():
        assert found.dtype == torch.int32
        np.testing.assert_array_equal(found.numpy(), codes)
    config = load_json(tmp_path / "out" / "config.json")
    assert config == load_json(base / "config.json") | {
        "quantization_config": {"bits": 4},
        "hidden_act": "gelu",
    }
    assert load_json(tmp_path / "out" / "quantize_config.json") == {"bits": 4}
    hf.check_outputs(checkpoint, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize(
    ("rows", "start"),
    [
        (np.zeros((2, 4), np.uint8), 0),
        (np.zeros((5, 4), np.int32), 0),
        (np.zeros((1, 4), np.int32), 4),
    ],
    ids=["narrow", "long", "beyond"],
)
def test_rows_that_do_not_fit_are_refused(make_checkpoint, tmp_path, rows, start):
    checkpoint = ArrayCheckpoint(make_checkpoint(), "I32", np.zeros((4, 4), np.int32))
    specs = list(checkpoint.specs().values())
    with (
        pytest.raises(ValueError, match="do not fit tensor"),
        hf.checkpoint_folder(checkpoint, tmp_path / "out", "", specs) as writer,
    ):
        writer.put(ArrayCheckpoint.NAME, rows, start)
    assert not (tmp_path / "out").exists()


def load_json(path: Path) -> dict:
    return json.loads(path.read_text())


def left_of(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def spoil(base: Path, value: float) -> None:
    """Put a value into the last layer's down projection, stored as F32."""
    from safetensors.numpy import load_file, save_file

    weights = load_file(base / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"][7, 5] = value
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("scheme", "value", "message"),
    [
        ("nf4", np.nan, r"down_proj.weight\[7, 5\] is NaN or infinite"),
        ("int8", np.inf, r"down_proj.weight\[7, 5\] is NaN or infinite"),
        ("int8", 1e6, r"down_proj.weight has values too large for INT8.*1e\+06.*choose nf4"),
    ],
)
def test_weights_that_cannot_be_stored(make_checkpoint, tmp_path, scheme, value, message):
    base = make_checkpoint(dtype="F32", **WIDE)
    spoil(base, value)
    with pytest.raises(CheckpointError, match=message):
        write(open_model(base), tmp_path / "out", SCHEMES[scheme])
    assert left_of(tmp_path) == ["base"]
    write(open_model(base), tmp_path / "out", SCHEMES[scheme], allow_nonfinite=True)
    assert set(tensors(tmp_path / "out")) == {
        s.name for s in planned_tensors(open_model(base), SCHEMES[scheme])
    }


def test_output_that_exists(make_checkpoint, tmp_path):
    base, out = make_checkpoint(), tmp_path / "out"
    checkpoint = open_model(base)
    write(checkpoint, out, bnb.NF4)
    before = (out / "model.safetensors").read_bytes()
    for refused in (
        lambda: bnb.check_outputs(checkpoint, out, bnb.INT8, False),
        lambda: write(checkpoint, out, bnb.INT8),
    ):
        with pytest.raises(OutputError, match="exists; add --overwrite"):
            refused()
    assert (out / "model.safetensors").read_bytes() == before
    with pytest.raises(OutputError, match="is the source itself"):
        bnb.check_outputs(checkpoint, base, bnb.NF4, True)
    bnb.check_outputs(checkpoint, out, bnb.INT8, True)
    write(checkpoint, out, bnb.INT8, overwrite=True)
    assert load_json(out / "config.json")["quantization_config"]["load_in_8bit"] is True
    assert left_of(tmp_path) == ["base", "out"]


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_interrupted(make_checkpoint, tmp_path, monkeypatch, scheme):
    """In the middle: an older folder of that name stays as it was."""
    from bitsandbytes import functional

    checkpoint, out = open_model(make_checkpoint()), tmp_path / "out"
    write(checkpoint, out, SCHEMES[scheme])
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    name = "quantize_4bit" if scheme == "nf4" else "int8_vectorwise_quant"
    real, calls = getattr(functional, name), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) > 9:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(functional, name, interrupted)
    for target in (out, tmp_path / "new"):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            write(checkpoint, target, SCHEMES[scheme], overwrite=True)
    assert left_of(tmp_path) == ["base", "out"]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_without_bitsandbytes(make_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(DependencyError, match=r"pip install 'dus-edge\[bnb\]'"):
        write(open_model(make_checkpoint()), tmp_path / "out", bnb.NF4)
    assert left_of(tmp_path) == ["base"]
