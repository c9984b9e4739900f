"""MLX folders against `mlx_lm.convert` byte by byte, and as mlx-lm loads and runs them.

mlx-lm lives in an environment of its own, which `make test` sets up.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dus_edge.checkpoint.names import SINGLE
from dus_edge.errors import CheckpointError, OutputError, UnsupportedError, UsageError
from dus_edge.export import hf, mlx
from dus_edge.jobs.export.checkpoint import export_checkpoint
from dus_edge.jobs.export.mlx import export_mlx
from dus_edge.jobs.job import Result
from dus_edge.quant.mlx.affine import quantize_affine
from dus_edge.quant.mlx.format import MLX_BITS, MLX_GROUPS, MLXSettings, affine_weights
from dus_edge.upscale.model import plan_chooser

from .cases import check_each
from .draws import examples
from .family_models import FAMILY_FORMS, write_model

ROOT = Path(__file__).parents[1]
MLX_PYTHON = ROOT / ".venv-mlx" / "bin" / "python"
UP_SCALED = plan_chooser(None, None, (), True)
AS_IT_IS = plan_chooser(None, None, (), False)
#: Every width is a multiple of 128, the largest group.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 256}
TEXT = "def add(a, b):\n    return"


# The quantizer, against the formulas of MLX's own documentation, weight by weight


def by_the_book(group: np.ndarray, bits: int) -> tuple[list[int], np.float32, np.float32]:
    """Codes, scale and bias of one group of float32, as `affine_quantize` of mlx/ops.cpp has it."""
    f = np.float32
    low, high, top = group.min(), group.max(), f(2**bits - 1)
    scale = max((high - low) / top, f(1e-7))
    edge = low if abs(low) > abs(high) else high
    scale = scale if abs(low) > abs(high) else -scale
    steps = np.rint(edge / scale)
    scale, bias = (edge / steps, edge) if steps != 0 else (scale, f(0))
    codes = np.clip(np.rint((group - bias) / scale), f(0), top)
    return [int(code) for code in codes], scale, bias


KINDS = ("normal", "one-sided", "equal", "zero", "tiny", "wide")


def drawn_rows(kind: str, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    x = rng.standard_normal(shape).astype(np.float32)
    return {
        "normal": x * np.float32(0.02),
        "one-sided": -np.abs(x) - np.float32(0.5),
        "equal": np.full_like(x, x[0, 0]),
        "zero": np.zeros_like(x) * np.sign(x),
        "tiny": x * np.float32(1e-9),
        "wide": x * np.exp(8 * rng.standard_normal(shape)).astype(np.float32),
    }[kind]


@given(
    st.sampled_from(MLX_BITS),
    st.sampled_from(MLX_GROUPS),
    st.sampled_from(("F32", "F16", "BF16")),
    st.sampled_from(KINDS),
    st.integers(0, 2**32 - 1),
)
@examples(120)
def test_codes_are_those_of_the_formulas(bits, group_size, dtype, kind, seed):
    rng = np.random.default_rng(seed)
    rows = drawn_rows(kind, rng, (3, 2 * group_size))
    rows = rows.clip(-60000, 60000)
    stored = mlx.as_stored(np.ascontiguousarray(rows), dtype)
    rows = mlx.as_floats(stored)
    stored.flags.writeable = False  # as a checkpoint gives them
    packed, scales, biases = quantize_affine(stored, MLXSettings(bits, group_size))
    assert packed.dtype == np.uint32 and scales.dtype == biases.dtype == np.float32
    for i, row in enumerate(rows):
        found = bit_string(packed[i], bits)
        for g in range(2):
            codes, scale, bias = by_the_book(row[g * group_size : (g + 1) * group_size], bits)
            assert found[g * group_size : (g + 1) * group_size] == codes
            assert (scales[i, g], biases[i, g]) == (scale, bias)


def bit_string(words: np.ndarray, bits: int) -> list[int]:
    """The codes of one row: its words are one long number, lowest bits first."""
    number = int.from_bytes(words.astype("<u4").tobytes(), "little")
    return [number >> bits * k & 2**bits - 1 for k in range(32 * len(words) // bits)]


@pytest.mark.parametrize("bits", MLX_BITS)
def test_weights_are_within_half_a_step(bits):
    rows = np.random.default_rng(0).standard_normal((16, 256), np.float32)
    packed, scales, biases = quantize_affine(rows, MLXSettings(bits, 32))
    again = affine_weights(packed, scales, biases, bits)
    steps = np.abs(scales).repeat(32, axis=1)
    # The end that is not met exactly may lie up to one step beyond the codes.
    assert (np.abs(again - rows) <= 1.001 * steps).all()
    assert np.sqrt(np.mean(((again - rows) / steps) ** 2)) < 0.35
    # The end farther from zero is met exactly.
    groups, met = rows.reshape(16, -1, 32), again.reshape(16, -1, 32)
    far = np.abs(groups).argmax(axis=2)[..., None]
    np.testing.assert_array_equal(
        np.take_along_axis(groups, far, 2), np.take_along_axis(met, far, 2)
    )


# What mlx-lm makes of folders


@dataclass(frozen=True)
class Case:
    """One folder of ours, and what mlx-lm is asked of it.

    Attributes:
        name: of the case.
        settings: bits and group size.
        base: overrides of the tiny configuration; None for pico.
        stored: dtype of the base.
        dtype: what is asked for with `--dtype`.
        runs: whether its logits are computed too.
        converts: whether mlx-lm can read the checkpoint itself.
        form: in `FAMILY_FORMS`, whose model is the base.
    """

    name: str
    settings: MLXSettings
    base: dict[str, Any] | None
    stored: str = "BF16"
    dtype: str | None = None
    runs: bool = False
    converts: bool = True
    form: str = ""


#: Families whose code mlx-lm has. Windows are out of sight; Gemma 3's layers keep its pattern.
FAMILIES = (
    *("qwen2", "qwen3", "nemo", "smollm3-listed", "granite", "granite-biases", "olmo2", "gemma2"),
    *("gemma3", "phi3", "phi3-long", "phi4-mini", "glm4", "glm4-no-bias"),
)
FAMILY = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
GEMMA3 = {"num_hidden_layers": 12, "sliding_window": 4096}
CASES = (
    *(Case(f"b{bits}-g{g}", MLXSettings(bits, g), WIDE) for bits in MLX_BITS for g in MLX_GROUPS),
    Case("pico", MLXSettings(), None, runs=True),
    Case("f16", MLXSettings(5, 32), WIDE | {"torch_dtype": "float16"}, "F16", runs=True),
    Case("f32", MLXSettings(3, 64), WIDE | {"torch_dtype": "float32"}, "F32", runs=True),
    Case("narrowed", MLXSettings(4, 32), WIDE | {"torch_dtype": "float16"}, "F32"),
    Case("asked", MLXSettings(6, 64), WIDE, "F32", dtype="bfloat16"),
    Case("tied", MLXSettings(8, 64), WIDE | {"tie_word_embeddings": True}, runs=True),
    Case(
        "biases",
        MLXSettings(4, 128),
        WIDE | {"attention_bias": True, "mlp_bias": True, "head_dim": 64},
        runs=True,
    ),
    # The spelling of transformers 5, with all left out that may be: mlx-lm does not find
    # rms_norm_eps, and would take other defaults than transformers for the rest.
    Case(
        "spelled",
        MLXSettings(),
        WIDE
        | {"tie_word_embeddings": ..., "rope_theta": ..., "rms_norm_eps": ..., "hidden_act": ...}
        | {"num_key_value_heads": ...}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        runs=True,
        converts=False,
    ),
    Case(
        "llama3",
        MLXSettings(),
        WIDE
        | {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        runs=True,
    ),
    Case(
        "yarn",
        MLXSettings(),
        WIDE | {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        runs=True,
    ),
    Case(
        "mistral",
        MLXSettings(),
        WIDE
        | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
        | {"sliding_window": None},
        runs=True,
    ),
    *(Case(n, MLXSettings(), FAMILY, runs=True, converts=False, form=n) for n in FAMILIES),
)
RUNNING = tuple(case for case in CASES if case.runs)
CONVERTED = tuple(case for case in CASES if case.converts)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Iterator[Path]:
    """For every case ``<name>-ours``, ``-plain`` and ``-theirs``, and logits where it runs.

    One process of mlx-lm does all of it: importing is what takes its time.
    """
    if not MLX_PYTHON.exists():
        pytest.skip("mlx-lm is not set up: `make .venv-mlx/done.stamp`")
    from .conftest import make_checkpoint

    folder = tmp_path_factory.mktemp("mlx")
    make = make_checkpoint.__wrapped__(folder)
    jobs = []
    for case in CASES:
        base = "pico"
        if case.form:
            base = str(write_family(case, folder / f"{case.name}-base"))
        elif case.base is not None:
            base = str(make(f"{case.name}-base", dtype=case.stored, **case.base))
        if case.name == "spelled":
            config = load_json(Path(base) / "config.json") | {"dtype": "bfloat16"}
            (Path(base) / "config.json").write_text(json.dumps(config))
        plain, ours = folder / f"{case.name}-plain", folder / f"{case.name}-ours"
        export_checkpoint(base, UP_SCALED, plain)
        export_mlx(base, UP_SCALED, ours, case.settings, dtype=case.dtype, n_threads=2)
        job: dict[str, Any] = {
            "plain": str(plain),
            "ours": str(ours),
            "bits": case.settings.bits,
            "group_size": case.settings.group_size,
        }
        if case.converts:
            job["theirs"] = str(folder / f"{case.name}-theirs")
        if case.dtype:
            job["dtype"] = case.dtype
        if base == "pico":
            job["text"] = TEXT
        if case.runs:
            job["logits"] = str(folder / f"{case.name}.npy")
        jobs.append(job)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [MLX_PYTHON, ROOT / "interop" / "mlx_side.py", folder / "jobs.json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    yield folder


def write_family(case: Case, folder: Path) -> Path:
    """A family's model, as wide as groups need it."""
    form = FAMILY_FORMS[case.form]
    more = GEMMA3 if "gemma" in case.form else {}
    return write_model(replace(form, config={**form.config, **case.base, **more}), folder)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, read by the safetensors package."""
    with safe_open(folder / SINGLE, framework="pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118


def load_json(path: Path) -> dict:
    return json.loads(path.read_text())


def test_every_tensor_is_theirs_to_the_byte(made):
    def check(case: Case) -> None:
        ours, theirs = tensors(made / f"{case.name}-ours"), tensors(made / f"{case.name}-theirs")
        assert set(ours) == set(theirs)
        for name, expected in theirs.items():
            assert (ours[name].dtype, ours[name].shape) == (expected.dtype, expected.shape), name
            assert torch.equal(ours[name].view(torch.uint8), expected.view(torch.uint8)), name

    check_each(check, CONVERTED)


def test_config_and_index_are_theirs(made):
    def check(case: Case) -> None:
        ours, theirs = (made / f"{case.name}-{side}" for side in ("ours", "theirs"))
        config, expected = (load_json(folder / "config.json") for folder in (ours, theirs))
        for key in ("quantization", "quantization_config"):
            assert config[key] == expected[key]
        # What mlx-lm leaves as it is: all but what our folder says more.
        del expected["quantization"], expected["quantization_config"]
        changed = {k for k, v in expected.items() if config.get(k) != v}
        assert changed <= ({"rope_scaling"} if case.name in ("yarn", "phi3-long") else set()) | (
            {"torch_dtype", "dtype"} if case.dtype else set()
        )
        index, other = (load_json(f / "model.safetensors.index.json") for f in (ours, theirs))
        assert set(index["weight_map"]) == set(other["weight_map"])
        assert index["metadata"] == other["metadata"]
        with safe_open(ours / SINGLE, "np") as a, safe_open(theirs / SINGLE, "np") as b:
            assert a.metadata() == b.metadata() == {"format": "mlx"}

    check_each(check, CONVERTED)


def codes_of(words: np.ndarray, bits: int) -> np.ndarray:
    """The codes of rows of words, as float32: each from the two words that it may lie in."""
    first = np.arange(32 * words.shape[1] // bits) * bits
    padded = np.pad(words, ((0, 0), (0, 1))).astype(np.uint64)
    pairs = padded[:, first // 32] | padded[:, first // 32 + 1] << np.uint64(32)
    codes = pairs >> (first % 32).astype(np.uint64) & np.uint64(2**bits - 1)
    return codes.astype(np.float32)


def dequantized_model(folder: Path) -> Any:
    """transformers' model of a folder of ours, read and dequantized by code of this test alone."""
    stored, weights = tensors(folder), {}
    bits = load_json(folder / "config.json")["quantization"]["bits"]
    for name, tensor in stored.items():
        stem = name.removesuffix(".weight")
        if f"{stem}.scales" not in stored and not name.endswith((".scales", ".biases")):
            weights[name] = tensor.float()
        elif name.endswith(".weight"):
            scales, biases = (stored[f"{stem}.{p}"].float() for p in ("scales", "biases"))
            codes = torch.from_numpy(codes_of(tensor.numpy(), bits)).view(*scales.shape, -1)
            weights[name] = (codes * scales[..., None] + biases[..., None]).flatten(1)
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model


def token_batch(vocab_size: int) -> torch.Tensor:
    sys.path.insert(0, str(ROOT / "interop"))
    try:
        from batch import token_batch
    finally:
        sys.path.remove(str(ROOT / "interop"))
    return torch.from_numpy(token_batch(vocab_size))


def test_logits_of_mlx_lm_are_those_of_our_own_reading(made):
    def check(case: Case) -> None:
        model = dequantized_model(made / f"{case.name}-ours")
        with torch.no_grad():
            expected = model(token_batch(model.config.vocab_size)).logits.numpy()
        found = np.load(made / f"{case.name}.npy")
        assert expected.std() > 0.05
        assert np.abs(found - expected).max() < 1e-3

    check_each(check, RUNNING)


def test_mlx_lm_reads_text_as_the_base_does_and_goes_on(made, pico):
    told = load_json(made / "pico.json")
    assert told["ids"] == AutoTokenizer.from_pretrained(pico).encode(TEXT)
    assert told["said"].strip()


# The sink by itself


def write(base: Path, out: Path, settings: MLXSettings | None = None, **options: Any) -> Result:
    return export_mlx(str(base), UP_SCALED, out, settings or MLXSettings(), **options)


def test_shards_have_an_index(make_checkpoint, tmp_path, monkeypatch):
    base = make_checkpoint(**WIDE)
    write(base, tmp_path / "one")
    monkeypatch.setattr(hf.plan_shards, "__defaults__", (60_000,))
    write(base, tmp_path / "many")
    index = load_json(tmp_path / "many" / "model.safetensors.index.json")
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    found = {}
    for file in files:
        with safe_open(tmp_path / "many" / file, "pt") as f:
            assert f.metadata() == {"format": "mlx"}
            found |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    expected = tensors(tmp_path / "one")
    assert set(found) == set(expected) == set(index["weight_map"])
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_copies_are_quantized_once(make_checkpoint, tmp_path, monkeypatch):
    base, rows = make_checkpoint(**WIDE), []
    real = mlx.quantize_affine

    def counted(x, settings):
        rows.append(len(x))
        return real(x, settings)

    monkeypatch.setattr(mlx, "quantize_affine", counted)
    result = write(base, tmp_path / "up")
    assert result.model.plan.depth == 6
    up_scaled = sum(rows)
    rows.clear()
    export_mlx(str(base), AS_IT_IS, tmp_path / "plain", MLXSettings())
    assert up_scaled == sum(rows) > 0
    ours, plain = tensors(tmp_path / "up"), tensors(tmp_path / "plain")
    for layer, source in enumerate((0, 1, 2, 1, 2, 3)):
        for part in ("weight", "scales", "biases"):
            name = f"model.layers.{{}}.mlp.down_proj.{part}"
            assert torch.equal(ours[name.format(layer)], plain[name.format(source)])


def test_every_plan_is_taken(make_checkpoint, tmp_path):
    """Copies that a plan's method changes are quantized as they are changed."""
    base = make_checkpoint(**WIDE)
    choose = plan_chooser(None, None, ("0:3,1:4",), True, method="averaged", branch_scale=0.5)
    export_mlx(str(base), choose, tmp_path / "ours", MLXSettings())
    export_checkpoint(str(base), choose, tmp_path / "plain")
    export_mlx(str(tmp_path / "plain"), AS_IT_IS, tmp_path / "two-steps", MLXSettings())
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "two-steps")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def left_of(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (MLXSettings(7, 64), "^MLX has no 7-bit codes; choose one of 2, 3, 4, 5, 6 or 8.$"),
        (MLXSettings(4, 48), "^MLX has no groups of 48; choose one of 32, 64 or 128.$"),
        (MLXSettings(4, 128), "groups of 128 do not divide its 192 inputs; use --group-size 32 or"),
    ],
)
def test_what_mlx_has_not_is_refused(make_checkpoint, tmp_path, settings, message):
    base = make_checkpoint(hidden_size=192, intermediate_size=256)
    with pytest.raises(UsageError, match=message):
        write(base, tmp_path / "out", settings)
    assert left_of(tmp_path) == ["base"]


def test_a_width_that_no_group_divides(make_checkpoint, tmp_path):
    base = make_checkpoint(intermediate_size=172)
    with pytest.raises(UsageError, match=r"groups of 32 .* its 172 inputs; use a GGUF"):
        write(base, tmp_path / "out", MLXSettings(4, 32))
    assert left_of(tmp_path) == ["base"]


def test_a_rope_that_mlx_lm_would_compute_otherwise(make_checkpoint, tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5}
    base = make_checkpoint(**WIDE, rope_scaling=rope)
    with pytest.raises(UnsupportedError, match="mlx-lm computes yarn's attention_factor itself"):
        write(base, tmp_path / "out")
    assert left_of(tmp_path) == ["base"]


def test_what_mlx_lm_does_not_know_of_a_family_is_refused(tmp_path):
    """And plans that move windows which it would not, with an m that does not."""
    cases = {
        "head size": ("qwen2", {"head_dim": 32}, "mlx-lm's qwen2 does not know head_dim, which"),
        "biases": ("qwen3", {"attention_bias": True}, "qwen3 does not know attention_bias"),
        "factor": ("phi3-long", {"attention": 1.5}, "computes longrope's attention_factor itself"),
        "plan": ("gemma3", GEMMA3 | {"num_hidden_layers": 16}, "gemma3_text .* choose --drop 5"),
        "list": ("gemma3", {"layer_types": ["full_attention"] * 8}, "reads no layer_types"),
    }

    def check(name: str) -> None:
        form, changes, message = cases[name]
        config = {**FAMILY_FORMS[form].config, **FAMILY, **changes}
        if factor := config.pop("attention", None):
            config["rope_scaling"] = {**config["rope_scaling"], "attention_factor": factor}
        base = write_model(replace(FAMILY_FORMS[form], config=config), tmp_path / name)
        with pytest.raises((UnsupportedError, UsageError), match=message):
            write(base, tmp_path / f"{name}-out")
        assert not (tmp_path / f"{name}-out").exists()

    check_each(check, cases)


def test_what_mlx_lm_computes_otherwise_is_said(tmp_path):
    def notes(form: str, **changes: Any) -> str:
        config = {**FAMILY_FORMS[form].config, **FAMILY, **changes}
        name = f"{form}-{len(changes)}"
        base = write_model(replace(FAMILY_FORMS[form], config=config), tmp_path / name)
        return " ".join(write(base, tmp_path / f"{name}-out").notes)

    assert "long factors at every length: within 32 tokens" in notes("phi3-long")
    assert "no sliding window: beyond 8 tokens" in notes("gemma2")
    assert not notes("gemma3", num_hidden_layers=12)
    assert not notes("qwen3")


def spoil(base: Path, value: float) -> None:
    """Put a value into the last layer's down projection, stored as F32."""
    from safetensors.numpy import load_file, save_file

    weights = load_file(base / SINGLE)
    weights["model.layers.3.mlp.down_proj.weight"][7, 5] = value
    save_file(weights, base / SINGLE, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        (None, np.nan, r"down_proj.weight\[7, 5\] is NaN or infinite"),
        ("float16", 1e6, "down_proj.weight has values too large for F16; add --dtype bfloat16"),
    ],
)
def test_weights_that_cannot_be_stored(make_checkpoint, tmp_path, dtype, value, message):
    base = make_checkpoint(dtype="F32", **WIDE)
    spoil(base, value)
    with pytest.raises(CheckpointError, match=message):
        write(base, tmp_path / "out", dtype=dtype)
    assert left_of(tmp_path) == ["base"]
    write(base, tmp_path / "out", dtype=dtype, allow_nonfinite=True)
    assert left_of(tmp_path) == ["base", "out"]


def test_output_that_exists(make_checkpoint, tmp_path):
    base, out = make_checkpoint(**WIDE), tmp_path / "out"
    write(base, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(OutputError, match="exists; add --overwrite"):
        write(base, out, MLXSettings(8, 64))
    with pytest.raises(OutputError, match="is the source itself"):
        write(base, base, overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    write(base, out, MLXSettings(8, 64), overwrite=True)
    assert load_json(out / "config.json")["quantization"]["bits"] == 8
    assert left_of(tmp_path) == ["base", "out"]


def test_interrupted(make_checkpoint, tmp_path, monkeypatch):
    """In the middle: an older folder of that name stays as it was."""
    base, out = make_checkpoint(**WIDE), tmp_path / "out"
    write(base, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    real, calls = mlx.quantize_affine, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) > 9:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(mlx, "quantize_affine", interrupted)
    for target in (out, tmp_path / "new"):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            write(base, target, overwrite=True)
    assert left_of(tmp_path) == ["base", "out"]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_the_command(run, tmp_path):
    out = tmp_path / "out"
    code, said, _ = run("mlx", "pico", "--drop", "2", "--bits", "8", "-o", out)
    assert code == 0
    assert f"  mlx_lm.chat --model {out}" in said and "bits per weight" in said
    card = (out / "README.md").read_text()
    assert "library_name: mlx\n" in card and "tags:\n- mlx\n" in card
    assert "MLX, 8 bits in groups of 64" in card and "from mlx_lm import" in card
    assert {"tokenizer.json", "tokenizer_config.json", "config.json"} <= set(left_of(out))
    code, said, err = run("mlx", "pico", "--bits", "7", "-o", tmp_path / "no")
    assert code == 2 and err.count("\n") == 1 and "MLX has no 7-bit codes" in err
    code, said, _ = run("mlx", "pico", "-o", tmp_path / "json", "--json", "--group-size", "128")
    told = json.loads(said)
    assert told["outputs"][0]["tensor_types"] == {"U32": 85, "BF16": 195}
