"""`dus-edge gguf` with a mix: what is written, said, kept, drawn and refused."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from gguf import GGUFReader

from dus_edge.cli import export
from dus_edge.cli.quants.mix import made_mixes
from dus_edge.export.gguf.mix import model_matrices
from dus_edge.predict.memory.llama import read_gguf
from dus_edge.quant.sensitivity import Sensitivity, weights_identity, write_sensitivity
from dus_edge.upscale.model import find_model, plan_chooser

from .cases import ONE_THREAD
from .mix_cases import made_up

SIZED = ("--target-bpw", "4.6")


def sensitivity_of(base: str | Path, path: Path, drop: int | None = None, seed: int = 0) -> Path:
    """Made up, but of that very model."""
    choose = plan_chooser(drop, None, (), True)
    model = find_model(str(base), choose, weights=True, say=lambda line: None)
    found = made_up(model_matrices(model.config, model.shapes), seed=seed)
    identity = weights_identity(model.open())
    write_sensitivity(path, Sensitivity(identity, found.n_tokens, found.text, found.kl))
    return path


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> Path:
    """A sensitivity of up-scaled pico."""
    return sensitivity_of("pico", tmp_path_factory.mktemp("known") / "s.json")


def types(path: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in GGUFReader(path).tensors}


def made(run, folder: Path, *options: object) -> tuple[Path, dict]:
    """The file of a mix and what is said of it."""
    code, out, err = run("gguf", "pico", *options, "-o", folder, "--json")
    assert code == 0, err
    found = json.loads(out)
    return Path(found["outputs"][0]["path"]), found


def test_a_mix_is_written_said_and_kept(run, known, tmp_path):
    path, said = made(run, tmp_path, *SIZED, "--sensitivity", known)
    bits = 8 * path.stat().st_size / said["n_parameters"]
    assert 0.985 * 4.6 <= bits <= 4.6
    assert path.name == f"pico-DUS-8.13M-v1.0-MIX_{bits:.2f}BPW.gguf".replace(
        f"{bits:.2f}", f"{bits:.2f}".replace(".", "_")
    )
    mix = said["mixes"][0]
    assert mix["taken_bytes"] == path.stat().st_size <= mix["budget_bytes"]
    stored = types(path)
    assert mix["types"] == {name: kind for name, kind in stored.items() if name in mix["types"]}
    assert {kind for name, kind in stored.items() if name not in mix["types"]} == {"F32"}
    kl = json.loads(known.read_text())["kl"]
    expected = sum(kl[name][kind] for name, kind in mix["types"].items())
    assert mix["expected_kl"] == pytest.approx(expected)
    assert mix["gap_to_bound"] < 0.02 * expected
    assert all(expected < other for other in mix["presets_expected_kl"].values())
    fields = GGUFReader(path).fields
    assert fields["dus.mix.goal"].contents() == "4.6 bits per weight"
    assert fields["dus.mix.expected_kl"].contents() == pytest.approx(expected)
    assert fields["dus.mix.tokens"].contents() == 4096
    assert path.with_suffix(".Modelfile").read_text().startswith("# ")


def test_other_commands_take_such_a_file(run, known, tmp_path):
    path, _ = made(run, tmp_path, *SIZED, "--sensitivity", known, "--digest")
    assert run("verify", path)[0] == 0
    assert run("fit", path, "--device", "rtx-3060-12gb")[0] == 0
    assert read_gguf(path).n_layers == 12
    code, out, _ = run("inspect", path, "--no-upscale", "--json")
    assert code == 0 and json.loads(out)["name"] == "pico-DUS-8.13M-v1.0"
    assert run("modelfile", path, "-o", tmp_path / "again")[0] == 0


def test_llama_cpp_runs_it_and_quantizes_the_same(run, known, tmp_path):
    """With ggml's quantizer the tensors are those of llama-quantize told the same types."""
    llama_cpp = pytest.importorskip("llama_cpp")
    from .gguf_cases import llama_quantize_as

    path, said = made(
        run, tmp_path, *SIZED, "--sensitivity", known, "--quantizer", "ggml",
        "--tensor-type", r"blk\.[0-3]\.ffn_up=q5_k", "--keep", "embedding=q4_0",
    )  # fmt: skip
    assert run("gguf", "pico", "-q", "f32", "-o", tmp_path)[0] == 0
    theirs = tmp_path / "theirs.gguf"
    llama_quantize_as(tmp_path / "pico-DUS-8.13M-v1.0-F32.gguf", theirs, said["mixes"][0]["types"])
    ours = {t.name: (t.tensor_type, t.data.tobytes()) for t in GGUFReader(path).tensors}
    assert ours == {t.name: (t.tensor_type, t.data.tobytes()) for t in GGUFReader(theirs).tensors}
    assert {ours[f"blk.{i}.ffn_up.weight"][0].name for i in range(4)} == {"Q5_K"}
    assert ours["token_embd.weight"][0].name == "Q4_0"
    model = llama_cpp.Llama(str(path), n_ctx=32, verbose=False, **ONE_THREAD)
    assert model.metadata["dus.mix.goal"] == "4.6 bits per weight"
    model.close()


def test_like_a_preset_is_no_larger_than_it(run, known, tmp_path):
    path, said = made(run, tmp_path / "a", "--like", "q4_k_m", "--sensitivity", known)
    assert run("gguf", "pico", "-q", "q4_k_m", "-o", tmp_path / "b")[0] == 0
    (preset,) = (tmp_path / "b").glob("*.gguf")
    most = preset.stat().st_size
    assert 0.985 * most <= path.stat().st_size <= most
    mix = said["mixes"][0]
    assert mix["expected_kl"] < mix["presets_expected_kl"]["q4_k_m"]


def test_the_choice_counts_as_time(run, known, tmp_path, monkeypatch):
    """Most of all where what types cost is measured first."""
    clock = time.monotonic
    waited = 0.0

    def slow(*args):
        nonlocal waited
        waited = 1000.0
        return made_mixes(*args)

    monkeypatch.setattr(time, "monotonic", lambda: clock() + waited)
    monkeypatch.setattr(export, "made_mixes", slow)
    _, said = made(run, tmp_path, *SIZED, "--sensitivity", known)
    assert said["seconds"] >= 1000


def test_what_types_cost_is_measured_once(run, tmp_path):
    """By a little text; for another budget it is there, of other weights it is measured anew."""
    pytest.importorskip("torch")
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 40)
    short = ("--text", text, "--ctx", "64", "--chunks", "2", "-o", out)
    code, first, err = run("gguf", "pico", *SIZED, *short)
    assert code == 0 and "What each type costs is kept in " in first, err
    (kept,) = out.glob("*.sensitivity")
    costs = kept.read_bytes()
    code, second, err = run("gguf", "pico", "--target-bpw", "5", *short)
    assert code == 0 and "What each type costs is known from " in second, err
    assert kept.read_bytes() == costs
    assert len(list(out.glob("*-MIX_*BPW.gguf"))) == 2
    held = json.loads(costs)
    kept.write_text(json.dumps({**held, "identity": "another"}))
    code, third, err = run("gguf", "pico", *SIZED, *short, "--overwrite")
    assert code == 0 and "What each type costs is kept in " in third, err
    assert json.loads(kept.read_bytes())["kl"] == held["kl"]


def test_a_mix_is_replayed_from_its_file_and_from_a_gguf(run, known, tmp_path):
    path, said = made(run, tmp_path / "a", *SIZED, "--sensitivity", known)
    for source in (path.with_suffix(".mix"), path):
        folder = tmp_path / source.suffix
        again, told = made(run, folder, "--mix", source)
        assert again.read_bytes() == path.read_bytes()
        assert again.name == path.name
        assert told["mixes"][0]["types"] == said["mixes"][0]["types"]
    # Any GGUF will do, and types given by hand come first.
    assert run("gguf", "pico", "-q", "q3_k_m", "-o", tmp_path / "q")[0] == 0
    (preset,) = (tmp_path / "q").glob("*.gguf")
    other, _ = made(run, tmp_path / "o", "--mix", preset, "--keep", "embedding=q8_0")
    assert types(other) == types(preset) | {"token_embd.weight": "Q8_0"}


def test_a_preset_with_changes_says_so(run, tmp_path):
    options = ("-q", "q4_k_m,q8_0", "--tensor-type", "attn_v=q6_k", "--keep", "down=q5_k")
    code, out, err = run("gguf", "pico", *options, "-o", tmp_path, "--alias", "m", "--json")
    assert code == 0, err
    assert run("gguf", "pico", "-q", "q4_k_m", "-o", tmp_path / "plain")[0] == 0
    found = {o["preset"]: Path(o["path"]) for o in json.loads(out)["outputs"]}
    assert list(found) == ["q4_k_m_custom", "q8_0_custom"]
    path = found["q4_k_m_custom"]
    assert path.name.endswith("-Q4_K_M_CUSTOM.gguf") and path.with_suffix(".mix").exists()
    (plain,) = (tmp_path / "plain").glob("*.gguf")
    changed = {
        f"blk.{i}.{part}.weight": kind
        for i in range(12)
        for part, kind in (("attn_v", "Q6_K"), ("ffn_down", "Q5_K"))
    }
    assert types(path) == types(plain) | changed
    reader = GGUFReader(path)
    assert reader.fields["general.file_type"].contents() == 15
    goal = "q4_k_m, --tensor-type attn_v=q6_k, --keep down=q5_k"
    assert reader.fields["dus.mix.goal"].contents() == goal
    assert (tmp_path / "m-q4_k_m_custom.gguf").exists()


def test_a_device_is_fitted(run, known, tmp_path):
    """pico is far smaller than any card: the best of all types, and what is left is said."""
    code, out, err = run(
        "gguf", "pico", "--fit", "rtx-3060-12gb", "--at", "512", "--sensitivity", known,
        "-o", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    assert "Mix, rtx-3060-12gb, context 512: " in out and " left" in out
    shown = out[out.index("Mix, ") : out.index(str(tmp_path))]
    assert "embedding" in shown and max(map(len, shown.splitlines())) <= 80
    (path,) = tmp_path.glob("*.gguf")
    assert {k for n, k in types(path).items() if "norm" not in n} == {"Q8_0"}


def test_what_is_reserved_is_left(run, known, tmp_path):
    """Of pico's best types a MiB less than they take."""
    fit = ("--fit", "rtx-3060-12gb", "--at", "512", "--sensitivity", known)
    loose = made(run, tmp_path / "a", *fit)[1]["mixes"][0]
    reserve = loose["budget_bytes"] - loose["taken_bytes"] + 2**20
    path, said = made(run, tmp_path / "b", *fit, "--reserve", str(reserve))
    tight = said["mixes"][0]
    assert tight["budget_bytes"] == loose["budget_bytes"] - reserve
    assert tight["budget_bytes"] - 2**17 < tight["taken_bytes"] <= tight["budget_bytes"]
    assert tight["expected_kl"] > loose["expected_kl"]
    # What stays on the host takes its best type; see the device's memory by that of the file.
    assert types(path)["token_embd.weight"] == "Q8_0" or "output.weight" not in types(path)


def test_the_picture_is_drawn_the_same_each_time(run, known, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        made(
            run, tmp_path / name, *SIZED, "--sensitivity", known,
            "--mix-plot", tmp_path / f"{name}.svg",
        )  # fmt: skip
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text() and "bits per weight" in text


REFUSED = {
    "two goals": (
        ("--like", "q4_k_m", "--target-bpw", "4"),
        "--target-bpw and --like both say what the types are; give one.",
    ),
    "a budget and a preset": (
        ("-q", "q4_k_m", "--target-bpw", "4", "--sensitivity", "{known}"),
        "-q q4_k_m and --target-bpw both say what the types are; give one of them.",
    ),
    "too small": (
        ("--target-size", "1MiB", "--sensitivity", "{known}"),
        "No mix of this model is as small as 1.00 MiB (1,048,576 bytes): the smallest takes ",
    ),
    "no size": (("--target-size", "small"), "--target-size is 'small'; give a size such as 6GiB"),
    "no bits": (("--target-bpw", "0"), "--target-bpw is 0; a number of bits such as 4.5"),
    "a device too small": (
        ("--fit", "rtx-3060-12gb", "--reserve", "12GiB", "--sensitivity", "{known}"),
        "No mix fits rtx-3060-12gb at a context of ",
    ),
    "no device": (("--fit", "rtx-9999", "--sensitivity", "{known}"), "There is no device"),
    "another model": (
        ("--target-bpw", "4.6", "--drop", "3", "--sensitivity", "{known}"),
        "s.json is of another model or another plan",
    ),
    "another depth": (
        ("--target-bpw", "4.6", "--drop", "1", "--sensitivity", "{known}"),
        "s.json knows nothing of blk.12.attn_k.weight as ",
    ),
    "a sensitivity that is not there": (
        (*SIZED, "--sensitivity", "none.json"), "none.json is missing; "
    ),
    "a sensitivity for nothing": (
        ("--sensitivity", "{known}"), "--sensitivity is what types are chosen by; add a budget"
    ),
    "a regex that matches nothing": (
        ("--tensor-type", "ffn_dwon=q6_k"),
        "--tensor-type ffn_dwon=q6_k matches no matrix of this model; roles are ",
    ),
    "no regex": (("--tensor-type", "blk.(=q6_k"), "'blk.(' is no regular expression ("),
    "no type": (("--keep", "embedding=q9"), "--keep embedding=q9: there is no type 'q9'; types"),
    "a role that is not there": (
        ("--keep", "head=q6_k"), "--keep head=q6_k matches no matrix of this model; roles are "
    ),
    "an option without its own": (("--at", "512"), "--at belongs to --fit DEVICE; add that."),
    "a picture of nothing": (("--mix-plot", "a.svg"), "--mix-plot draws a mix; ask for one"),
    "a picture of no form": (
        (*SIZED, "--mix-plot", "a.pdf"), "--mix-plot a.pdf: pictures are written as .svg or .png."
    ),
    "no mix": (("--mix", "{known}"), "s.json is no mix; name one that dus-edge gguf wrote"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_sentence(run, known, tmp_path, case):
    options, message = REFUSED[case]
    words = [known if word == "{known}" else word for word in options]
    code, out, err = run("gguf", "pico", *words, "-o", tmp_path / "out")
    assert code in (2, 3), (out, err)
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_weight_errors_are_those_of_the_files(run, tmp_path):
    """Σ(ΔW)² beside what gguf-py reads back from files of the presets, up to their rounding."""
    import numpy as np
    from gguf import dequantize

    from dus_edge.export.gguf.weight_error import weight_errors
    from dus_edge.quant import choose

    assert run("gguf", "pico", "-q", "f32,q8_0,q4_0", "-o", tmp_path)[0] == 0
    plain, *others = (
        {t.name: t for t in GGUFReader(next(tmp_path.glob(f"*-{kind}.gguf"))).tensors}
        for kind in ("F32", "Q8_0", "Q4_0")
    )
    model = find_model(
        "pico", plan_chooser(None, None, (), True), weights=True, say=lambda line: None
    )
    matrices = [
        m for m in model_matrices(model.config, model.shapes) if m.layer in (0, 7) or not m.layer
    ]
    found = weight_errors(model.open(), matrices, choose.find_quantizer("native"))
    for matrix in matrices:
        exact = plain[matrix.name].data
        for file in others:
            tensor = file[matrix.name]
            error = np.square(dequantize(tensor.data, tensor.tensor_type) - exact, dtype=float)
            kind = tensor.tensor_type.name
            if kind in found[matrix.name]:
                assert found[matrix.name][kind] == pytest.approx(error.sum(), rel=1e-5), kind
    assert found["blk.7.ffn_down.weight"]["Q2_K"] > found["blk.7.ffn_down.weight"]["Q3_K"]
