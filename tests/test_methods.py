"""How copies are made: against transformers with layers changed by hand, and against files."""

from __future__ import annotations

import importlib
import itertools
import json
import tomllib
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from dus_edge.checkpoint.safetensors import SafetensorsCheckpoint
from dus_edge.checkpoint.spec import Source
from dus_edge.errors import UsageError
from dus_edge.export.gguf import sink
from dus_edge.jobs.export.calibration import Machine, TextChoice
from dus_edge.jobs.export.checkpoint import export_checkpoint
from dus_edge.jobs.export.gguf import export_gguf
from dus_edge.jobs.export.gptq import export_gptq
from dus_edge.jobs.export.imatrix import export_imatrix
from dus_edge.jobs.train.heal import healed_plan
from dus_edge.quant.gptq_format import GPTQSettings
from dus_edge.quant.imatrix import read_imatrix
from dus_edge.quant.recipe import PRESETS
from dus_edge.train.heal.network import empty_network, load_weights
from dus_edge.upscale.methods import Method, made_rows, parse_scale
from dus_edge.upscale.model import find_model, plan_chooser
from dus_edge.upscale.plan import (
    DepthPlan,
    check_averaged,
    check_pattern,
    from_block,
    from_drop,
    identity,
    parse,
)
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


PRESETS_TESTED = ("f16", "q8_0", "q4_k_m")
METHODS = {
    "scale 0": {"branch_scale": "0"},
    "scale 0.5": {"branch_scale": "0.5"},
    "scale 1": {"branch_scale": "1"},
    "interleaved": {"place": "interleaved"},
    "averaged": {"method": "averaged"},
    "all at once": {"place": "interleaved", "method": "averaged", "branch_scale": "0.3"},
}


def by_detour(base: Path, folder: Path, choose) -> None:
    """GGUF files straight from the base, and from the up-scaled checkpoint that was written."""
    export_checkpoint(str(base), choose, folder / "up")
    direct = written(base, folder / "direct", PRESETS_TESTED, choose)
    detour = written(folder / "up", folder / "detour", PRESETS_TESTED, AS_IT_IS)
    for preset in PRESETS_TESTED:
        assert data_of(direct[preset]) == data_of(detour[preset]), preset


def test_gguf_is_that_of_the_written_checkpoint(make_checkpoint, tmp_path):
    """Every tensor's bytes; the headers differ in what they tell of the base."""
    base = make_checkpoint(hidden_size=256, intermediate_size=256)

    def check(name: str) -> None:
        by_detour(base, tmp_path / name.replace(" ", "-"), chooser(**METHODS[name]))

    check_each(check, METHODS)


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_gguf_of_other_dtypes(make_checkpoint, tmp_path, dtype):
    base = make_checkpoint(dtype=dtype, hidden_size=256, intermediate_size=256)
    by_detour(base, tmp_path, chooser(**METHODS["all at once"]))


@pytest.mark.parametrize("place", ["stacked", "interleaved"])
@pytest.mark.parametrize("bias", [False, True])
def test_averaged_copies_are_those_of_transformers(make_checkpoint, tmp_path, place, bias):
    base = make_checkpoint(dtype="F32", attention_bias=bias, mlp_bias=bias)
    choose = plan_chooser(None, None, (), True, blocks=("1:4",), place=place, method="averaged")
    export_checkpoint(str(base), choose, tmp_path / "up")
    sources = {"stacked": (0, 1, 2, 3, 1, 2, 3), "interleaved": (0, 1, 1, 2, 2, 3, 3)}[place]
    originals, expected = load(base), deep_copied(load(base), sources)
    for at, source in {"stacked": ((4, 1), (5, 2)), "interleaved": ((2, 1), (4, 2))}[place]:
        following = dict(originals.model.layers[source + 1].named_parameters())
        for name, parameter in expected.model.layers[at].named_parameters():
            parameter.data = (parameter.data + following[name].data) / 2
    assert torch.equal(logits(load(tmp_path / "up")), logits(expected))


def test_quantized_checkpoints_are_those_of_the_written_one(make_checkpoint, tmp_path):
    """bitsandbytes, GPTQ and importance matrices take the views as they take files."""
    bnb = pytest.importorskip("bitsandbytes") and importlib.import_module(
        "dus_edge.jobs.export.bnb"
    )
    base, text = make_checkpoint(hidden_size=256, intermediate_size=256), tmp_path / "text.txt"
    text.write_text(Path(__file__).read_text())
    choice, cpu = TextChoice((text,), None, 64, 2, 0), Machine("cpu")
    choose = chooser(**METHODS["all at once"])
    export_checkpoint(str(base), choose, tmp_path / "up")
    settings = GPTQSettings(bits=4, group_size=64)
    for name, model, how in (("direct", base, choose), ("detour", tmp_path / "up", AS_IT_IS)):
        out = tmp_path / name
        out.mkdir()
        bnb.export_bnb(str(model), how, out / "nf4", scheme_name="nf4")
        export_gptq(str(model), how, out / "gptq", settings, choice, cpu)
        export_imatrix(str(model), how, out / "i.gguf", choice, cpu)
    for name in ("nf4/model.safetensors", "gptq/model.safetensors"):
        direct, detour = (load_file(tmp_path / way / name) for way in ("direct", "detour"))
        assert direct.keys() == detour.keys() and len(direct) > 40
        assert all(torch.equal(direct[key], detour[key]) for key in direct), name
    direct, detour = (read_imatrix(tmp_path / way / "i.gguf") for way in ("direct", "detour"))
    assert len(direct.sums) == 6 * 7
    for name, sums in direct.sums.items():
        np.testing.assert_array_equal(sums, detour.sums[name], name)


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
        ours = made_rows([stored], dtype, scale)
        theirs = (wide.float() * torch.tensor(scale, dtype=torch.float32)).to(kind)
        bits = theirs.view(torch.int16).numpy().view(np.uint16) if dtype == "BF16" else theirs
        np.testing.assert_array_equal(ours, np.asarray(bits))


def test_healing_starts_from_the_scaled_copies(make_checkpoint):
    """Frozen layers share a tensor in memory with their copies, but for what is scaled."""
    folder = make_checkpoint(dtype="F32")
    view_ = view(folder, from_drop(4), branch_scale=0.0)
    network = empty_network(view_.config)
    load_weights(network, view_, [], torch.float32, torch.device("cpu"))
    assert torch.equal(logits(network.model.eval()), logits(load(folder)))
    layers = network.model.model.layers
    assert layers[3].self_attn.q_proj.weight is layers[1].self_attn.q_proj.weight
    assert layers[1].mlp.down_proj.weight.any() and not layers[3].mlp.down_proj.weight.any()


def test_averaged_tensors_are_made_once(make_checkpoint):
    view_ = view(make_checkpoint(), parse(4, "0:3,1:4,2:4"), kind="averaged")
    specs, below = view_.specs(), {s.source for s in view_.base.specs().values()}
    norm = "model.layers.{}.input_layernorm.weight"
    mean = "mean of " + " and ".join(norm.format(i) for i in (2, 3))
    assert [specs[norm.format(i)].source for i in (4, 6)] == [mean, mean]
    # The last layer of the base has no next one: its copy is a copy.
    assert specs[norm.format(7)].source == norm.format(3)
    made = {s.source for s in specs.values()} - below
    assert len(made) == 2 * 9


def test_what_was_done_is_told(make_checkpoint, tmp_path):
    base, choose = make_checkpoint(), chooser(branch_scale="0.5", method="averaged")
    export_checkpoint(str(base), choose, tmp_path / "up")
    told = json.loads((tmp_path / "up" / "config.json").read_text())["dus_edge"]
    sources = [0, 1, 2, 1, 2, 3]
    assert told == {
        "n_base_layers": 4,
        "sources": sources,
        "method": "averaged",
        "branch_scale": 0.5,
    }
    said = find_model(str(tmp_path / "up"), AS_IT_IS, weights=False, say=print)
    assert healed_plan(said) == choose(4)
    card = (tmp_path / "up" / "README.md").read_text()
    what = "the mean of its source and the base's next layer; what their attention and FFN add is"
    assert f"| Copies | 2 layers; each is {what} then times 0.5 |" in card
    fields = gguf.GGUFReader(written(base, tmp_path, ("f16",), choose)["f16"]).fields
    assert fields["dus.branch_scale"].contents() == 0.5
    assert fields["dus.method"].contents() == "averaged"
    assert list(fields["dus.layer_sources"].contents()) == sources
    assert "times 0.5" in fields["general.description"].contents()


@pytest.mark.parametrize("wrong", [{"branch_scale": "a"}, {"branch_scale": -1}, {"method": "x"}])
def test_a_folder_that_says_nonsense(make_checkpoint, tmp_path, wrong):
    export_checkpoint(str(make_checkpoint()), chooser(), tmp_path / "up")
    path = tmp_path / "up" / "config.json"
    raw = json.loads(path.read_text())
    raw["dus_edge"] |= wrong
    path.write_text(json.dumps(raw))
    model = find_model(str(tmp_path / "up"), AS_IT_IS, weights=False, say=print)
    with pytest.raises(UsageError, match=r"the plan in config.json .* does not fit"):
        healed_plan(model)


@pytest.mark.parametrize("text", ["", "a", "-1", "-0.01", "nan", "inf", "-inf", "1e39", "0,5"])
def test_no_number_to_scale_by(text):
    with pytest.raises(UsageError, match=r"--branch-scale .*: a number from 0 on is needed"):
        parse_scale(text)


def test_no_copies_to_change():
    with pytest.raises(UsageError, match=r"changed \(branches × 0.5\), and the plan 0:4 has none"):
        plan_chooser(None, None, (), False, branch_scale="0.5")(4)
    with pytest.raises(UsageError, match=r"changed \(averaged\), and the plan 0:2,3:4 has none"):
        plan_chooser(None, None, ("0:2,3:4",), True, method="averaged")(4)
    with pytest.raises(UsageError, match="--place interleaved is for copies"):
        plan_chooser(None, None, (), False, place="interleaved")(4)
    assert plan_chooser(None, None, (), False, branch_scale="1")(4) == identity(4)


def test_copies():
    assert from_drop(32, 8).copies == tuple(range(24, 40))
    assert parse(4, "0:3,1:4,2:4").copies == (3, 4, 6, 7)
    assert identity(4).copies == ()


@given(st.integers(1, 30), st.data())
def test_interleaving_keeps_the_layers(n, data):
    sources = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=60))
    plan = DepthPlan(n, tuple(sources))
    found = plan.interleaved()
    assert sorted(found.sources) == sorted(sources)
    # Once its copies are left out, either plan is the same.
    first = [plan.sources[i] for i in range(plan.depth) if i not in plan.copies]
    assert [found.sources[i] for i in range(plan.depth) if i not in found.copies] == first
    assert all(found.sources[i] == found.sources[i - 1] for i in found.copies)
    assert parse(n, found.spelled) == found


def test_blocks():
    choose = plan_chooser(None, None, (), True, blocks=("8:22",))
    assert choose(32) == parse(32, "0:22,8:32") and choose(32).block == (8, 22)
    assert from_drop(32, 8).block == (8, 24)
    assert [parse(8, p).block for p in ("0:8", "0:3,2:5", "0:2,1:3,2:8", "0:2,4:8")] == [None] * 4
    thrice = plan_chooser(None, None, (), True, blocks=("2:4", "2:4"))(6)
    assert thrice.sources == (0, 1, 2, 3, 2, 3, 2, 3, 4, 5)
    for text in ("8:40", "3:3", "5:2", "-1:4"):
        with pytest.raises(UsageError, match="does not fit a model of 32 layers"):
            from_block(32, text)
    for text in ("", "8", "a:b", "8:22,3:4", "8:22:30"):
        with pytest.raises(UsageError, match="not of the form 8:22"):
            from_block(32, text)
    with pytest.raises(UsageError, match="--plan and --block"):
        plan_chooser(None, None, ("0:4",), True, blocks=("1:2",))(4)


def test_what_breaks_a_pattern_is_told_what_would_not():
    for n, blocks, hint in (
        (32, ("8:21",), r"such as --block 8:20\."),
        (32, ("8:9",), r"such as --block 8:12\."),
        (10, ("7:9",), r"choose ranges that keep the pattern\."),
    ):
        plan = plan_chooser(None, None, (), True, blocks=blocks)(n)
        with pytest.raises(UsageError, match=hint):
            check_pattern(plan, 4, "X")
    check_pattern(plan_chooser(None, None, (), True, blocks=("8:20",))(32), 4, "X")
    with pytest.raises(UsageError, match="--place interleaved cannot"):
        check_pattern(from_drop(32, 8).interleaved(), 4, "X")
    averaged = from_drop(32, 8).with_method(Method("averaged"))
    check_pattern(averaged, 1, "X")
    with pytest.raises(UsageError, match=r"averaged copies would mix .* choose --method copy\."):
        check_pattern(averaged, 4, "X")


def test_layers_that_differ_are_not_averaged():
    """Of a family without a period, such as Gemma 3, whose windows a file lists."""
    averaged = from_block(12, "2:8").with_method(Method("averaged"))
    full = [i % 6 == 5 for i in range(12)]
    with pytest.raises(UsageError) as refused:
        check_averaged(averaged, {"has a window": full}, "X")
    assert str(refused.value) == (
        "Layer 10 would be the mean of layers 4 and 5, and only one of the two has a window in "
        "this X; choose --method copy."
    )
    check_averaged(from_block(12, "2:8"), {"has a window": full}, "X")
    check_averaged(averaged, {"has a window": [True] * 12}, "X")
    # The last layer's copy is a copy; a copy of layer 4 would be the mean with layer 5.
    check_averaged(from_block(12, "6:10").with_method(Method("averaged")), {"x": full}, "X")


# Plans in files

TOML = 'plan = "0:3,1:4"\nplace = "interleaved"\nmethod = "averaged"\nbranch_scale = 0.5\n'


@pytest.mark.parametrize("ending", ["toml", "json"])
def test_a_plan_in_a_file(tmp_path, ending):
    path = tmp_path / f"plan.{ending}"
    path.write_text(TOML if ending == "toml" else json.dumps(tomllib.loads(TOML)))
    expected = parse(4, "0:2,1:3,2:4").with_method(Method("averaged", 0.5))
    assert plan_chooser(None, None, (str(path),), True)(4) == expected


def test_a_file_and_options_say_one_plan_together(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text('plan = ["0:3,1:4", "0:5,1:6"]\n')
    found = plan_chooser(None, None, (str(path),), True, branch_scale="0.5")(4)
    twice = plan_chooser(None, None, ("0:3,1:4", "0:5,1:6"), True)(4)
    assert found == twice.with_method(Method(branch_scale=0.5))
    path.write_text("drop = 1\nbranch_scale = 1\n")
    assert plan_chooser(None, None, (str(path),), True)(4) == from_drop(4, 1)
    for how, said in (
        ({"branch_scale": "0.5"}, "branch-scale"),
        ({"blocks": ("1:2",)}, "--drop and --block"),
    ):
        with pytest.raises(UsageError, match=said):
            plan_chooser(None, None, (str(path),), True, **how)(4)
    with pytest.raises(UsageError, match="give no other --plan"):
        plan_chooser(None, None, (str(path), "0:4"), True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("plan = ", "cannot be read"),
        ("x = 1", "the entry 'x' is not known; there are drop, layers, plan"),
        ("plan = 3", "plan is 3; ranges such as"),
        ("plan = []", "ranges such as"),
        ('plan = "a.toml"', "ranges such as"),
        ("block = [1, 2]", "ranges such as"),
        ('drop = "8"', "drop is '8'; a whole number"),
        ("layers = true", "a whole number"),
        ("branch_scale = nan", "--branch-scale nan: a number"),
        ("branch_scale = true", "--branch-scale True: a number"),
        ("branch_scale = []", "a number"),
        ('place = "x"', "choose stacked or interleaved"),
        ("place = 1", "choose stacked or interleaved"),
        ("method = []", "choose copy or averaged"),
    ],
)
def test_bad_plan_files(tmp_path, text, said):
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=said) as caught:
        plan_chooser(None, None, (str(path),), True)
    assert str(path) in str(caught.value)


def test_plan_files_that_are_no_tables(tmp_path):
    path = tmp_path / "plan.json"
    for text, said in (("[1]", "holds no table"), ('{"drop": NaN}', "cannot be read")):
        path.write_text(text)
        with pytest.raises(UsageError, match=said):
            plan_chooser(None, None, (str(path),), True)
    with pytest.raises(UsageError, match="there is no such file"):
        plan_chooser(None, None, (str(tmp_path / "none.toml"),), True)


@pytest.mark.parametrize("command", ["inspect", "fit", "gguf", "upscale", "imatrix", "gptq"])
def test_every_command_refuses_in_one_sentence(run, tmp_path, command):
    more = {"fit": ("--device", "auto"), "inspect": ()}.get(command, ("-o", tmp_path / "out"))
    for option, value, said in (
        ("--branch-scale", "x", "a number from 0 on is needed"),
        ("--block", "3:9", "does not fit a model of 8 layers"),
        ("--plan", "none.toml", "there is no such file"),
    ):
        code, _, err = run(command, "pico", option, value, *more)
        assert code == 2 and said in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()
