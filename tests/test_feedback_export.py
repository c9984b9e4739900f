"""`gguf --feedback` as a person types it, start to end."""

from __future__ import annotations

import json
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from gguf import GGUFReader, dequantize

from dus_edge.calibrate import engine, head_feedback
from dus_edge.calibrate.imatrix import ImatrixCollector
from dus_edge.checkpoint.builtin import BUILTIN
from dus_edge.checkpoint.hub import fetch as hub
from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.jobs.export.calibration import Machine, TextChoice
from dus_edge.jobs.export.feedback import FeedbackChoice
from dus_edge.jobs.export.gguf import export_gguf
from dus_edge.jobs.job import quiet
from dus_edge.quant.recipe import PRESETS
from dus_edge.upscale.model import find_model, plan_chooser

from .cases import ONE_THREAD

CHOOSE = plan_chooser(None, None, ("0:3,1:4",), True)
pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_text(Path(hub.__file__).read_text() + Path(engine.__file__).read_text())
    return path


def short(path: Path) -> tuple[str, ...]:
    return ("--text", str(path), "--ctx", "64", "--chunks", "16", "--device", "cpu")


def export(text: Path, folder: Path, *presets: str, feedback: bool = True):
    choice = FeedbackChoice(TextChoice((text,), None, 64, 16), Machine("cpu"))
    chosen = [PRESETS[p] for p in presets]
    more = {"feedback": choice} if feedback else {}
    return export_gguf(BUILTIN, CHOOSE, chosen, folder, n_threads=1, **more)


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a run that nothing cut short."""
    folder = tmp_path_factory.mktemp("whole")
    export(text, folder, "q4_k_m")
    return only(folder)


def only(folder: Path) -> Path:
    (path,) = folder.glob("*.gguf")
    return path


def weights_of(path: Path) -> dict[str, np.ndarray]:
    return {x.name: dequantize(x.data, x.tensor_type) for x in GGUFReader(path).tensors}


def test_the_command_says_what_was_kept_and_llama_cpp_runs_the_file(run, text, tmp_path):
    plan = ("--plan", "0:3,1:4")
    common = ("gguf", "pico", *plan, "-q", "q3_k_m", "--threads", "1")
    code, out, err = run(*common, "--feedback", *short(text), "-o", tmp_path / "fed")
    assert code == 0, err
    said = " ".join(out.split())
    assert "error feedback is kept in" in said and "of 43 matrices" in said
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 80
    code, _, err = run(*common, "--imatrix", "auto", *short(text), "-o", tmp_path / "plain")
    assert code == 0, err
    assert run("gguf", "pico", *plan, "-q", "f32", "-o", tmp_path / "f32")[0] == 0
    fed, plain, f32 = (only(tmp_path / name) for name in ("fed", "plain", "f32"))
    a, b = GGUFReader(fed), GGUFReader(plain)
    assert [(x.name, x.tensor_type, x.n_bytes) for x in a.tensors] == [
        (x.name, x.tensor_type, x.n_bytes) for x in b.tensors
    ]
    kept = int(a.fields["dus.feedback.kept"].contents())
    assert int(a.fields["dus.feedback.tried"].contents()) == 43
    assert f"kept in {kept} of 43" in said and kept > 21
    assert "dus.feedback.kept" not in b.fields
    assert int(a.fields["quantize.imatrix.entries_count"].contents()) == 42
    # Rows of q and k are where llama.cpp wants them: near the original's, matrix by matrix.
    original, now = weights_of(f32), weights_of(fed)
    for name, weight in original.items():
        error = np.square(now[name] - weight).mean() / np.square(weight).mean()
        assert error < 0.2, name  # rows out of order: 2
    # And what llama.cpp computes is nearer to the original with feedback than without.
    expected, found, before = (log_probs(path) for path in (f32, fed, plain))
    kl = [(np.exp(expected) * (expected - x)).sum(-1).mean() for x in (found, before)]
    assert kl[0] < 0.9 * kl[1]
    assert not list((tmp_path / "fed").glob("*calibration*"))


def log_probs(path: Path) -> np.ndarray:
    tokens = np.random.default_rng(7).integers(3, 4096, 48).tolist()
    options = {"n_ctx": 64, "logits_all": True, "verbose": False}
    model = llama_cpp.Llama(str(path), n_gpu_layers=0, **ONE_THREAD, **options)
    try:
        model.eval(tokens)
        logits = np.array(model.scores[: len(tokens)], np.float64)
    finally:
        model.close()
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_layers_go_on_with_what_is_stored(text, tmp_path):
    """Hidden states of the engine behind the last layer are those of the file's own weights."""
    seen = []
    original = engine.run_layers

    def spy(*args, **kwargs):
        seen.append((args[1], original(*args, **kwargs)))
        return seen[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "run_layers", spy)
        export(text, tmp_path / "out", "q4_k_m")
    _, (tokens, h) = seen  # first the states that tokens are weighed by
    as_it_is = plan_chooser(None, None, (), False)
    stored, base = (
        find_model(name, choose, weights=True, say=quiet).open()
        for name, choose in ((str(only(tmp_path / "out")), as_it_is), (BUILTIN, CHOOSE))
    )
    # The embedding is quantized after the layers are: they were shown the original's.
    mixed = WithEmbedding(stored, base)
    again = original(mixed, tokens, ImatrixCollector(), engine.choose_settings("cpu"))
    np.testing.assert_allclose(again.numpy(), h.numpy(), rtol=1e-3, atol=1e-3)


class WithEmbedding(Checkpoint):
    """A checkpoint with another one's embedding."""

    def __init__(self, below: Checkpoint, other: Checkpoint) -> None:
        self.below, self.other, self.config = below, other, below.config

    def specs(self):
        return self.below.specs()

    def read(self, name, start=0, stop=None):
        source = self.other if "embed" in name else self.below
        return source.read(name, start, stop)


def test_two_presets_at_once_are_those_of_two_runs(text, tmp_path):
    export(text, tmp_path / "both", "q4_0", "q2_k")
    for preset in ("q4_0", "q2_k"):
        export(text, tmp_path / preset, preset)
        path = only(tmp_path / preset)
        assert path.read_bytes() == (tmp_path / "both" / path.name).read_bytes()


def test_importance_of_a_file_is_used_where_feedback_is_not_kept(run, text, tmp_path):
    assert run("imatrix", "pico", *short(text), "-o", tmp_path / "i.gguf")[0] == 0
    options = ("--imatrix", tmp_path / "i.gguf", "--feedback", *short(text))
    code, _, err = run("gguf", "pico", "-q", "q4_k_m", *options, "-o", tmp_path / "out")
    assert code == 0, err
    fields = GGUFReader(only(tmp_path / "out")).fields
    assert fields["quantize.imatrix.file"].contents().endswith("i.gguf")
    assert int(fields["dus.feedback.tried"].contents()) == 85


def test_types_without_feedback_get_the_texts_importance(run, text, tmp_path, make_checkpoint):
    """IQ3_S, and types of two bits that are nothing without."""
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8}
    base = make_checkpoint(num_hidden_layers=4, vocab_size=4097, **shape)
    common = ("gguf", base, "--no-upscale")
    for preset, kind in (("iq3_s", "IQ3_S"), ("iq2_m", "IQ2_S")):
        options = ("-q", preset, "--feedback", "--imatrix", "auto", *short(text))
        code, _, err = run(*common, *options, "-o", tmp_path / preset)
        assert code == 0, err
        fed = {x.name: x for x in GGUFReader(only(tmp_path / preset)).tensors}
        assert fed["blk.1.ffn_up.weight"].tensor_type.name == kind
        assert fed["blk.1.attn_v.weight"].tensor_type.name == "Q4_K"
    assert run(*common, "-q", "iq3_s", "-o", tmp_path / "plain")[0] == 0
    fed, plain = (GGUFReader(only(tmp_path / name)) for name in ("iq3_s", "plain"))
    for a, b in zip(fed.tensors, plain.tensors, strict=True):
        if a.tensor_type.name == "IQ3_S":
            changed = not np.array_equal(a.data, b.data)
            assert changed == a.name.startswith("blk."), a.name


#: Six layers forward, six down, then six with feedback: how often `ffn` is called before
#: the run is cut short, where its state lies, and how many steps are kept.
CUTS = {
    "forward": (3, ".tokens.calibration", "state.json", 3),
    "down": (6 + 4, ".tokens.calibration", "downward.json", 1 + 4),
    "first layer fed": (12 + 1, ".gguf.calibration", "state.json", 1),
    "last but one": (12 + 5, ".gguf.calibration", "state.json", 5),
    "head": (12 + 6, ".gguf.calibration", "state.json", 6),
}


@pytest.mark.parametrize("where", CUTS)
def test_interrupted_and_resumed_gives_the_same_bytes(text, whole, tmp_path, where):
    allowed, folder, index, n_done = CUTS[where]
    original, calls = engine.DecoderLayer.ffn, []

    def interrupting(self, x):
        calls.append(1)
        if len(calls) > allowed:
            raise KeyboardInterrupt
        return original(self, x)

    def no_head(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.DecoderLayer, "ffn", interrupting)
        patch.setattr(head_feedback, "feed_head", no_head)
        with pytest.raises(KeyboardInterrupt):
            export(text, tmp_path / "cut", "q4_k_m")
    assert not list((tmp_path / "cut").glob("*.gguf"))
    (state,) = (tmp_path / "cut").glob(f"*{folder}")
    assert json.loads((state / index).read_text())["n_done"] == n_done
    calls.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.DecoderLayer, "ffn", lambda *a: calls.append(1) or original(*a))
        result = export(text, tmp_path / "cut", "q4_k_m")
    assert len(calls) == 6 + 6 + 6 - allowed
    assert whole.read_bytes() == only(tmp_path / "cut").read_bytes()
    assert any("of 43 matrices" in note for note in result.notes)
    assert not list((tmp_path / "cut").glob("*.calibration"))


def test_a_head_of_another_run_is_not_taken(text, whole, tmp_path):
    """Cut short behind the head, then started with another text: nothing of the first is left."""
    other = tmp_path / "other.py"
    other.write_text(Path(head_feedback.__file__).read_text() * 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_feedback, "read_head", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            export(other, tmp_path / "cut", "q4_k_m")
    assert list((tmp_path / "cut").glob("*.gguf.calibration/head.safetensors"))
    export(text, tmp_path / "cut", "q4_k_m")
    assert whole.read_bytes() == only(tmp_path / "cut").read_bytes()


def _interrupt(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("base", "options", "said"),
    [
        ("pico", ("-q", "f16", "--feedback"), "nothing to do in f16"),
        ("pico", ("-q", "q4_k_m", "--feedback", "--ctx", "64", "--chunks", "1"), "two chunks"),
    ],
)
def test_refused_before_anything_is_written(run, tmp_path, base, options, said):
    code, _, err = run("gguf", base, *options, "-o", tmp_path / "out")
    assert code == 2
    assert said in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_a_gguf_that_is_copied_takes_no_feedback(run, tmp_path):
    assert run("gguf", "pico", "-q", "q8_0", "-o", tmp_path)[0] == 0
    code, _, err = run("gguf", only(tmp_path), "--feedback", "-o", tmp_path / "out")
    assert code == 2 and "--feedback" in err
