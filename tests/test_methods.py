"""How copies are made: against transformers with layers changed by hand, and against files."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from dus_edge.checkpoint.safetensors import SafetensorsCheckpoint
from dus_edge.checkpoint.spec import Source
from dus_edge.errors import UsageError
from dus_edge.export.gguf import sink
from dus_edge.jobs.export.checkpoint import export_checkpoint
from dus_edge.jobs.export.gguf import export_gguf
from dus_edge.quant.recipe import PRESETS
from dus_edge.upscale.methods import Method, parse_scale, scaled_rows
from dus_edge.upscale.model import plan_chooser
from dus_edge.upscale.plan import from_drop, identity, parse
from dus_edge.upscale.view import UpscaledCheckpoint

from .cases import check_each
from .forms import deep_copied, load

TOKENS = torch.tensor([[1, *np.random.default_rng(7).integers(3, 4096, 47).tolist()]])
#: Four layers become six, of which 3 and 4 are copies of 1 and 2.
COPIES = (3, 4)
AS_IT_IS = plan_chooser(None, None, (), False)


def chooser(**how):
    return plan_chooser(1, None, (), True, **how)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", ["0.5", "0", "3e-2"])
def test_scaled_copies_are_those_of_transformers(make_checkpoint, tmp_path, scale, bias):
    base = make_checkpoint(dtype="F32", attention_bias=bias, mlp_bias=bias)
    export_checkpoint(str(base), chooser(branch_scale=scale), tmp_path / "up")
    expected = deep_copied(load(base), (0, 1, 2, 1, 2, 3))
    for i, part in itertools.product(COPIES, ("weight", "bias") if bias else ("weight",)):
        layer = expected.model.layers[i]
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            getattr(linear, part).data *= float(scale)
    assert torch.equal(logits(load(tmp_path / "up")), logits(expected))


@pytest.mark.parametrize("bias", [False, True])
def test_scaled_by_nothing_the_logits_are_the_bases(make_checkpoint, tmp_path, bias):
    base = make_checkpoint(dtype="F32", attention_bias=bias, mlp_bias=bias)
    export_checkpoint(str(base), chooser(), tmp_path / "copied")
    assert not torch.equal(logits(load(tmp_path / "copied")), logits(load(base)))
    export_checkpoint(str(base), chooser(branch_scale="0"), tmp_path / "up")
    model = load(tmp_path / "up")
    assert model.config.num_hidden_layers == 6
    assert torch.equal(logits(model), logits(load(base)))


def written(base, folder: Path, presets, choose) -> dict[str, bytes]:
    """The tensors of GGUF files, by preset: all behind what the header says."""
    result = export_gguf(str(base), choose, [PRESETS[p] for p in presets], folder)
    return {w.preset: w.path for w in result.outputs}


def data_of(path: Path) -> bytes:
    return path.read_bytes()[gguf.GGUFReader(path).data_offset :]


METHODS = {
    "scale 0": {"branch_scale": "0"},
    "scale 0.5": {"branch_scale": "0.5"},
    "scale 1": {"branch_scale": "1"},
}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_gguf_is_that_of_the_written_checkpoint(make_checkpoint, tmp_path, dtype):
    """All tensors, byte for byte, and the headers but for what they tell of the base."""
    base = make_checkpoint(dtype=dtype, hidden_size=256, intermediate_size=256)
    presets = ("f16", "q8_0", "q4_k_m")

    def check(name: str) -> None:
        choose, folder = chooser(**METHODS[name]), tmp_path / name.replace(" ", "-")
        export_checkpoint(str(base), choose, folder / "up")
        direct = written(base, folder / "direct", presets, choose)
        detour = written(folder / "up", folder / "detour", presets, AS_IT_IS)
        for preset in presets:
            assert data_of(direct[preset]) == data_of(detour[preset]), preset

    check_each(check, METHODS)


def test_scaled_by_one_nothing_differs(make_checkpoint, tmp_path):
    base = make_checkpoint()
    for name, how in (("plain", {}), ("one", {"branch_scale": "1"})):
        export_checkpoint(str(base), chooser(**how), tmp_path / name / "up")
        written(base, tmp_path / name, ("q4_k_m",), chooser(**how))
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*"))
    assert len(files) > 6
    for file in files:
        one, plain = tmp_path / "one" / file, tmp_path / "plain" / file
        assert one.is_dir() or one.read_bytes() == plain.read_bytes(), file


def view(folder: Path, plan, **how) -> UpscaledCheckpoint:
    base = SafetensorsCheckpoint(Source(folder, "x", "x"))
    return UpscaledCheckpoint(base, plan.with_method(Method(**how)))


def test_what_is_not_changed_is_read_once(make_checkpoint, tmp_path):
    """Sinks go by sources: the copies' two matrices alone have some of their own."""
    view_ = view(make_checkpoint(), parse(4, "0:3,1:4,2:4"), branch_scale=0.5)
    below = view_.base.specs()
    own = [s for s in view_.specs().values() if s.source not in {b.source for b in below.values()}]
    assert {s.name for s in own} == {
        f"model.layers.{i}.{part}.weight"
        for i in (3, 4, 6, 7)
        for part in ("self_attn.o_proj", "mlp.down_proj")
    }
    # Layers 4 and 6 are both copies of layer 2, scaled alike.
    assert len({s.source for s in own}) == 6
    file = sink.plan_file(
        view_.config, {s.name: s.shape for s in view_.specs().values()}, [], PRESETS["q8_0"], Path()
    )
    n_scaled = sum(below[name].n_elements for name in below if "o_proj" in name)
    n_scaled += sum(below[name].n_elements for name in below if "down_proj" in name)
    n_base = sum(s.n_elements for s in below.values())
    assert sink.total_work(view_, [file]) == n_base + n_scaled * 3 // 4


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_products_are_rounded_once_as_torch_does(dtype):
    rng, kinds = np.random.default_rng(3), {"BF16": torch.bfloat16, "F16": torch.float16}
    kind = kinds.get(dtype, torch.float32)
    wide = torch.from_numpy(rng.standard_normal((64, 64), np.float32)).to(kind)
    stored = wide.view(torch.int16).numpy().view(np.uint16) if dtype == "BF16" else wide.numpy()
    for scale in (0.0, 0.1, 0.5, 1 / 3, 2.0, 1e-6):
        ours = scaled_rows(stored, dtype, scale)
        theirs = (wide.float() * torch.tensor(scale, dtype=torch.float32)).to(kind)
        bits = theirs.view(torch.int16).numpy().view(np.uint16) if dtype == "BF16" else theirs
        np.testing.assert_array_equal(ours, np.asarray(bits))


def test_what_was_done_is_told(make_checkpoint, tmp_path):
    base, choose = make_checkpoint(), chooser(branch_scale="0.5")
    export_checkpoint(str(base), choose, tmp_path / "up")
    told = json.loads((tmp_path / "up" / "config.json").read_text())["dus_edge"]
    assert told == {"n_base_layers": 4, "sources": [0, 1, 2, 1, 2, 3], "branch_scale": 0.5}
    card = (tmp_path / "up" / "README.md").read_text()
    assert "| Copies | 2 layers; their o_proj and down_proj are the base's times 0.5 |" in card
    fields = gguf.GGUFReader(written(base, tmp_path, ("f16",), choose)["f16"]).fields
    assert fields["dus.branch_scale"].contents() == 0.5
    assert "times 0.5" in fields["general.description"].contents()


@pytest.mark.parametrize("text", ["", "a", "-1", "-0.01", "nan", "inf", "-inf", "1e39", "0,5"])
def test_no_number_to_scale_by(text):
    with pytest.raises(UsageError, match=r"--branch-scale .*: a number from 0 on is needed"):
        parse_scale(text)


def test_nothing_to_scale():
    with pytest.raises(UsageError, match="changes copies, and the plan 0:4 has none"):
        plan_chooser(None, None, (), False, branch_scale="0.5")(4)
    with pytest.raises(UsageError, match="the plan 0:2,3:4 has none"):
        plan_chooser(None, None, ("0:2,3:4",), True, branch_scale="0.5")(4)
    assert plan_chooser(None, None, (), False, branch_scale="1")(4) == identity(4)


def test_copies():
    assert from_drop(32, 8).copies == tuple(range(24, 40))
    assert parse(4, "0:3,1:4,2:4").copies == (3, 4, 6, 7)
    assert identity(4).copies == ()
