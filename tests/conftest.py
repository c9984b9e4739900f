"""What several test modules share: checkpoints of any shape, pico, the CLI; how tests draw.

Hypothesis draws the same cases on every run, unless its profile is "fuzz" (`make fuzz`, or
``--hypothesis-profile=fuzz``, or ``HYPOTHESIS_PROFILE=fuzz`` in the environment).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

from dus_edge.checkpoint.builtin import model_dir
from dus_edge.checkpoint.config import parse_config, tensor_shapes
from dus_edge.machine import default_threads

# Nothing here depends on the clock: a slow machine fails no test.
settings.register_profile(
    "default",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=False,
)
settings.register_profile(
    "fuzz", settings.get_profile("default"), derandomize=False, max_examples=500, print_blob=True
)
# Before test modules are imported: their own settings take the rest from the profile of then.
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Tell `fuzz.py` of a failure while it is still made small."""
    if report.failed and (mark := os.environ.get("FUZZ_FAILED")):
        Path(mark).touch()


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores, since tests wait for disks and processes of their own."""
    return default_threads() + 1


def pytest_collection_modifyitems() -> None:
    """Keep draws apart from what else ran.

    Hypothesis mixes in constants that it reads in the sources of the modules imported so far,
    and which these are depends on the tests that ran before in the same process.
    """
    if settings().derandomize:
        providers._get_local_constants = lambda: providers.Constants()


TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")

#: The smallest Llama that is still Llama: used where only the machinery matters.
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

MakeCheckpoint = Callable[..., Path]


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 → bf16 bit patterns, rounding to nearest even."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_safetensors(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    """Write a file from (dtype name, array) pairs; bf16 arrays are uint16 bit patterns."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs, position = [], 0
    for name, (dtype, array) in tensors.items():
        blob = array.tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [position, position + len(blob)],
        }
        blobs.append(blob)
        position += len(blob)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def random_tensors(
    config: dict[str, Any], dtype: str, seed: int, rows: int | None = None
) -> dict[str, tuple[str, Any]]:
    """Gaussian weights of every tensor that a configuration means; norms near one.

    Of matrices only so many rows, where given; the others are zeros, which are quantized fast.
    """
    rng = np.random.default_rng(seed)
    cast = {"BF16": to_bf16, "F16": lambda x: x.astype(np.float16), "F32": lambda x: x}[dtype]
    tensors = {}
    for name, shape in tensor_shapes(parse_config(config)).items():
        scale = 0.1 if "norm" in name else 0.5 / np.sqrt(config["hidden_size"])
        x = rng.standard_normal(shape, np.float32) * np.float32(scale)
        if rows is not None and x.ndim == 2:
            x[rows:] = 0
        tensors[name] = (dtype, cast(x + 1 if "norm" in name else x))
    return tensors


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """A function that writes a random checkpoint: config overrides, dtype, shards."""

    def make(
        name: str = "base",
        *,
        dtype: str = "BF16",
        seed: int = 0,
        shards: int = 1,
        rows: int | None = None,
        **overrides: Any,
    ) -> Path:
        config = {k: v for k, v in (TINY | overrides).items() if v is not ...}
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        for file in TOKENIZER_FILES:
            shutil.copy(model_dir() / file, folder / file)
        tensors = random_tensors(config, dtype, seed, rows)
        if shards == 1:
            write_safetensors(folder / "model.safetensors", tensors)
            return folder
        names = np.array_split(list(tensors), shards)
        weight_map = {}
        for i, part in enumerate(names, start=1):
            file = f"model-{i:05}-of-{shards:05}.safetensors"
            write_safetensors(folder / file, {str(n): tensors[str(n)] for n in part})
            weight_map |= {str(n): file for n in part}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return make


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """What a test sets for PyTorch's threads ends with it: tests run side by side on all cores."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and (wanted := os.environ.get("OMP_NUM_THREADS")):
        torch.set_num_threads(int(wanted))


@pytest.fixture(scope="session")
def pico() -> Path:
    """The built-in base's folder."""
    return model_dir()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> None:
    """All kernels are compiled: each by whichever process of pytest-xdist comes to it first.

    The others take what that one left in the cache.
    """
    from .native_cases import compile_once

    folder = tmp_path_factory.getbasetemp()
    compile_once(folder if worker_id == "master" else folder.parent)


@pytest.fixture(scope="session")
def vocab_lines() -> list[str]:
    """What tokenizers are trained on."""
    from .vocab_cases import corpus

    return corpus()


@pytest.fixture(scope="session")
def load_vocab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Any], Any]]:
    """Load a vocabulary into llama.cpp by way of a GGUF file."""
    from .vocab_cases import LlamaVocab, write_gguf

    loaded: list[LlamaVocab] = []

    def load(vocab: Any) -> LlamaVocab:
        path = tmp_path_factory.mktemp("gguf") / "vocab.gguf"
        write_gguf(vocab, path)
        loaded.append(LlamaVocab(path))
        return loaded[-1]

    yield load
    for model in loaded:
        model.free()


@pytest.fixture(scope="session")
def vocab_case(
    tmp_path_factory: pytest.TempPathFactory,
    vocab_lines: list[str],
    load_vocab: Callable[[Any], Any],
) -> Callable[[str], tuple[Any, Any, Any]]:
    """Build a case once: the case, what we read of it, and llama.cpp with that."""
    from dus_edge.export.vocab.vocab import read_vocab

    from .vocab_cases import build_case

    built: dict[str, tuple[Any, Any, Any]] = {}

    def get(name: str) -> tuple[Any, Any, Any]:
        if name not in built:
            case = build_case(name, tmp_path_factory.mktemp(name), vocab_lines)
            vocab = read_vocab(case.folder, case.size)
            built[name] = case, vocab, load_vocab(vocab)
        return built[name]

    return get


@pytest.fixture
def cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `dus-edge` as a person would, in a process of its own."""

    def run(*args: str | Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "from dus_edge.cli.main import main; main()", *map(str, args)],
            capture_output=True,
            text=True,
            timeout=300,
            **kwargs,
        )

    return run


@pytest.fixture
def run(monkeypatch, capfd) -> Callable[..., tuple[int, str, str]]:
    """Run `dus-edge` in this process, where imports are paid for once: code, output, errors."""
    from dus_edge.cli.main import main

    def run(*args: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["dus-edge", *map(str, args)])
        with pytest.raises(SystemExit) as done:
            main()
        out, err = capfd.readouterr()
        return done.value.code or 0, out, err

    return run
