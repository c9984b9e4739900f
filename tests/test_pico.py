"""The shipped ``pico`` checkpoint: shape, size, tokenizer, and what it has learned."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from dus_edge.checkpoint import builtin
from dus_edge.train.pico import corpus

torch = pytest.importorskip("torch")
pytest.importorskip("sentencepiece")

MODEL = builtin.model_dir()
MAX_BYTES = 11_900_000
REQUIRED_BITS_PER_BYTE = 1.8
MARGIN = 0.25  # a few files score further from the mean than all of them together
SCORED_FILES = ("copy.py", "fileinput.py", "json/scanner.py", "secrets.py", "textwrap.py")
ODD_STRINGS = (
    "",
    " ",
    "   leading",
    "trailing   ",
    "\n",
    "\n\n    \n",
    "\tif x:\r\n\t\treturn\n",
    "a  b   c    d",
    "naïve café ½ ﬁ",
    "日本語 🙂 a\u0301\u200b",
    "\x01\x7f\x80",
    "1234567890 0x1F",
    "def f(self, *args):\n    return {**self.x}\n",
)


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads((MODEL / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def processor():
    from dus_edge.train.pico.tokenizer import load_sentencepiece

    return load_sentencepiece((MODEL / "tokenizer.model").read_bytes())


@pytest.fixture(scope="module")
def model(config):
    from safetensors.torch import load_file

    from dus_edge.train.pico.model import Pico, PicoConfig

    loaded = Pico(PicoConfig())
    weights = load_file(MODEL / "model.safetensors")
    assert all(weight.dtype == torch.bfloat16 for weight in weights.values())
    loaded.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return loaded


@pytest.fixture(scope="module")
def heldout() -> tuple[corpus.SourceFile, ...]:
    """The listed held-out files that this Python has, read as the corpus reads them."""
    root = corpus.stdlib_dir()
    listed = [path for path in card_files() if (root / path).is_file()]
    found = [corpus.read_source(root, path) for path in listed]
    return tuple(source for source in found if source is not None)


def card() -> str:
    return (MODEL / "README.md").read_text(encoding="utf-8")


def card_files() -> list[str]:
    return re.findall(r"^- `(\S+\.py)`$", card(), flags=re.MULTILINE)


def card_figure() -> float:
    return float(re.search(r"\*\*pico, 8 layers\*\* \| \*\*([\d.]+)\*\*", card())[1])


def test_folder_is_complete_and_small_enough():
    names = {path.name for path in MODEL.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= MAX_BYTES


def test_shape_suits_up_scaling_and_k_quants(config):
    assert config["num_hidden_layers"] == 8
    assert config["hidden_size"] % 256 == 0
    assert config["intermediate_size"] % 256 == 0
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["max_position_embeddings"] >= 256
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_heldout_files_are_those_of_the_rule():
    listed = card_files()
    assert len(listed) >= 40
    for path in listed:
        assert corpus.is_drawn(path)
        assert not corpus.is_test(path)
        assert not corpus.is_table(path)


def test_split_keeps_duplicates_and_tests_out_of_the_heldout_part():
    name = next(f"m{i}.py" for i in range(999) if corpus.is_drawn(f"m{i}.py"))
    text = "".join(f"a_rather_long_name_{i} = {i}\n" for i in range(99))
    held = corpus.SourceFile(name, text)
    copy = corpus.SourceFile("zz.py", text)
    near = corpus.SourceFile("zz.py", text + "x = 1\n")
    assert corpus.split_sources([held]).heldout == (held,)
    assert corpus.split_sources([held, copy]).library == ()
    assert corpus.split_sources([held, near]).heldout == ()
    assert corpus.is_test("test/" + name)
    assert not corpus.split_sources([corpus.SourceFile("test/" + name, text)]).heldout


def test_tokenizer_round_trips_and_falls_back_to_bytes(processor):
    for text in ODD_STRINGS:
        assert processor.decode(processor.encode(text)) == text
    assert processor.encode("é", out_type=str)[-2:] == ["<0xC3>", "<0xA9>"]
    assert [processor.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    assert processor.pad_id() == -1


def test_auto_tokenizer_gives_the_sentencepiece_ids(processor, heldout):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    lines = [line for source in heldout for line in source.text.splitlines(keepends=True)]
    texts = [*ODD_STRINGS, *lines[:: max(1, len(lines) // 1200)]]
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert ids == [1, *processor.encode(text)], repr(text)


def test_transformers_computes_the_same_logits(model, processor):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids = torch.tensor([[1, *processor.encode("import os\n\n\nclass Thing(object):\n    ")]])
    with torch.inference_mode():
        assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4


def test_windows_score_every_position_once():
    from dus_edge.train.pico.evaluate import windows

    for length in (1, 2, 255, 256, 511, 512, 513, 768, 769, 2000):
        scored = [i for _, stop, first in windows(length) for i in range(first, stop)]
        assert scored == list(range(1, length))
        assert all(stop - start <= 512 for start, stop, _ in windows(length))


def test_muon_orthogonalises():
    from dus_edge.train.pico.optim import orthogonalise

    torch.manual_seed(0)
    for shape in ((2, 24, 40), (2, 40, 24)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.4
        assert values.max() < 1.4


def test_heldout_bits_per_byte(model, processor, heldout):
    from dus_edge.train.pico.evaluate import bits_per_byte

    chosen = [source for source in heldout if source.path in SCORED_FILES]
    if not chosen:
        pytest.skip("this Python lacks the held-out files")
    ids = [np.array([1, *processor.encode(source.text)]) for source in chosen]
    scored = bits_per_byte(model, ids, corpus.total_bytes(chosen))
    assert scored < card_figure() + MARGIN
    assert scored < REQUIRED_BITS_PER_BYTE


@pytest.mark.parametrize("layers", [8, 12])
def test_continues_a_line_of_python(model, layers):
    from dus_edge.train.pico.package import continue_text
    from dus_edge.upscale.plan import from_drop

    plan = None if layers == 8 else from_drop(8, 2).sources
    prompt = "def __init__(self"
    tokenizer = (MODEL / "tokenizer.model").read_bytes()
    text = continue_text(model, tokenizer, prompt, 24, plan)
    assert text.startswith(prompt)
    assert re.match(r"\)|, ?\w", text.removeprefix(prompt))
