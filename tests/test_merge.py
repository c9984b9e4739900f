"""Adapters merged as rows are read: peft's bits, in folders and on the way to other formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from dus_edge.adapter.adapter import Adapter
from dus_edge.adapter.kernel import low_rank
from dus_edge.adapter.merged import MergedCheckpoint
from dus_edge.adapter.numbers import as_floats, as_stored
from dus_edge.checkpoint.config import load_config
from dus_edge.checkpoint.safetensors import SafetensorsCheckpoint
from dus_edge.checkpoint.spec import Source
from dus_edge.errors import DusEdgeError, UsageError
from dus_edge.jobs.export.bnb import export_bnb
from dus_edge.jobs.export.checkpoint import export_checkpoint
from dus_edge.jobs.export.gguf import export_gguf
from dus_edge.jobs.export.merge import export_merged
from dus_edge.quant.recipe import find_preset
from dus_edge.upscale.model import find_model, plan_chooser
from dus_edge.upscale.plan import identity

from .cases import check_each

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

DEFAULT = plan_chooser(None, None, (), True)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KIND = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def load(folder: Path, dtype: str = "auto") -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def train(base: Path, folder: Path, *, dtype: str = "float32", seed: int = 0, **lora: Any) -> Path:
    """An adapter of a base as peft saves it, with random weights instead of trained ones."""
    lora = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR} | lora
    model = peft.get_peft_model(load(base), peft.LoraConfig(task_type="CAUSAL_LM", **lora))
    torch.manual_seed(seed)
    for name, weights in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            weights.data = (torch.randn(weights.shape) / 8).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder


def by_peft(base: Path, adapter: Path) -> dict[str, Any]:
    """What peft makes of base and adapter."""
    merged = peft.PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    return merged.state_dict()


def bits(tensor: Any) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()


def stored(folder: Path) -> dict[str, Any]:
    """All tensors of a folder, read by the safetensors package."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as f:
            found |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    return found


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        np.testing.assert_array_equal(bits(tensor), bits(theirs[name]), name)


# The same as peft


CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "attention": {"target_modules": ["q_proj", "v_proj"], "r": 8, "lora_alpha": 16},
    "odd scale": {"r": 3, "lora_alpha": 7, "use_rslora": True},
    "patterns": {
        "rank_pattern": {
            "q_proj": 2,
            r"layers.1.mlp.up_proj": 5,
            r"^model\.layers\.0.*down_proj": 1,
        },
        "alpha_pattern": {"v_proj": 3, "layers.[02].self_attn.o_proj": 32},
    },
    "head": {"target_modules": [*LINEAR, "lm_head"], "r": 64},
    "some layers": {"layers_to_transform": [1, 3], "layers_pattern": "layers"},
    "excluded": {"exclude_modules": ["layers.2.mlp.up_proj", "k_proj"]},
    "a pattern": {"target_modules": r".*\.layers\.[0-2]\..*_proj"},
    "saved": {"modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"]},
    "gaussian": {"init_lora_weights": "gaussian", "target_modules": "all-linear"},
}


def test_every_tensor_is_peft_s(make_checkpoint, tmp_path):
    bases = {dtype: make_checkpoint(dtype, dtype=dtype) for dtype in KIND}

    def check(case: str, dtype: str, own: str) -> None:
        name = f"{case}-{dtype}-{own}".replace(" ", "-")
        adapter = train(bases[dtype], tmp_path / name, dtype=own, **CASES[case])
        export_merged(str(bases[dtype]), adapter, tmp_path / f"{name}-merged")
        assert_same(stored(tmp_path / f"{name}-merged"), by_peft(bases[dtype], adapter))

    check_each(check, CASES, ["BF16"], ["float32"])
    check_each(check, ["gaussian"], ["F16", "F32"], KIND.values())
    check_each(check, ["saved"], ["F16", "F32"], KIND.values())
    check_each(check, ["all"], ["BF16"], ["bfloat16", "float16"])


def test_the_adapter_changes_what_it_should(make_checkpoint, tmp_path):
    base = make_checkpoint()
    adapter = train(base, tmp_path / "a", target_modules=["q_proj"], layers_to_transform=[2])
    export_merged(str(base), adapter, tmp_path / "merged")
    before, after = stored(base), stored(tmp_path / "merged")
    changed = [n for n in before if not torch.equal(before[n], after[n])]
    assert changed == ["model.layers.2.self_attn.q_proj.weight"]


def test_biases_stay(make_checkpoint, tmp_path):
    base = make_checkpoint(attention_bias=True, mlp_bias=True)
    adapter = train(base, tmp_path / "a")
    export_merged(str(base), adapter, tmp_path / "merged")
    assert_same(stored(tmp_path / "merged"), by_peft(base, adapter))


def test_a_tied_head_stays_the_embedding(make_checkpoint, tmp_path):
    base = make_checkpoint(tie_word_embeddings=True)
    adapter = train(base, tmp_path / "a")
    export_merged(str(base), adapter, tmp_path / "merged")
    theirs = by_peft(base, adapter)
    assert torch.equal(theirs.pop("lm_head.weight"), theirs["model.embed_tokens.weight"])
    assert_same(stored(tmp_path / "merged"), theirs)


def test_transformers_loads_the_folder(make_checkpoint, tmp_path):
    base = make_checkpoint()
    adapter = train(base, tmp_path / "a")
    export_merged(str(base), adapter, tmp_path / "merged")
    theirs = peft.PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    ids = torch.arange(16)[None]
    assert torch.equal(load(tmp_path / "merged")(ids).logits, theirs(ids).logits)


def test_the_product_is_pytorch_s_whatever_rows_are_asked_for():
    rng = np.random.default_rng(0)

    def check(shape: tuple[int, int], rank: int) -> None:
        b = rng.standard_normal((shape[0], rank), np.float32)
        a = rng.standard_normal((rank, shape[1]), np.float32)
        scale = 32 / rank**0.5
        theirs = (torch.from_numpy(b) @ torch.from_numpy(a) * scale).numpy()
        np.testing.assert_array_equal(low_rank(b, a, scale), theirs)
        for start in range(0, shape[0], 13):
            part = low_rank(b[start : start + 13], a, scale)
            np.testing.assert_array_equal(part, theirs[start : start + 13])

    # Shapes of real matrices. Below some 16 rows MKL has other kernels, which no model meets.
    check_each(check, [(96, 64), (192, 576), (33, 35), (1024, 512)], [1, 3, 8, 16, 64, 128])


def test_rounding_is_pytorch_s():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(np.float32)
    ties = (np.arange(1 << 12, dtype=np.uint32) << 15) | 0x3F000000
    for x in (
        values,
        ties.view(np.float32),
        np.array([np.nan, np.inf, -np.inf, 65520, -0.0], "f4"),
    ):
        for dtype, kind in KIND.items():
            theirs = torch.from_numpy(x).to(getattr(torch, kind)).float().numpy()
            np.testing.assert_array_equal(as_floats(as_stored(x, dtype)), theirs, dtype)


# The view


def test_rows_are_those_of_the_whole(make_checkpoint, tmp_path):
    base = make_checkpoint()
    adapter = Adapter(train(base, tmp_path / "a", modules_to_save=["lm_head"]))
    view = MergedCheckpoint(SafetensorsCheckpoint(Source(base, "x", "x")), adapter)
    for name in ("model.layers.3.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"):
        whole = view.read(name)
        assert whole.dtype == np.uint16
        np.testing.assert_array_equal(view.read(name, 7, 20), whole[7:20])
        assert view.read(name, 5, 5).shape == (0, *whole.shape[1:])


def sources(model: Any) -> dict[str, str]:
    return {name: spec.source for name, spec in model.open().specs().items()}


def test_copies_are_one_source_exactly_if_they_are_changed_alike(make_checkpoint, tmp_path):
    base = make_checkpoint()
    below = train(base, tmp_path / "below", target_modules=["up_proj"])
    name = "model.layers.{}.mlp.up_proj.weight".format
    found = sources(find_model(str(base), DEFAULT, weights=True, say=print, adapter=below))
    # 0:3,1:4: layers 1 and 3 are copies of one, changed before they were copied.
    assert found[name(1)] == found[name(3)] != found[name(0)]
    export_checkpoint(str(base), DEFAULT, tmp_path / "up")
    above = train(tmp_path / "up", tmp_path / "above", target_modules=["up_proj"])
    found = sources(find_model(str(base), DEFAULT, weights=True, say=print, adapter=above))
    assert found[name(1)] != found[name(3)]
    other = "model.layers.{}.mlp.down_proj.weight".format
    assert found[other(1)] == found[other(3)] == other(1)


# On the way to other formats


def gguf(base: Path | str, folder: Path, choose: Any = identity, **options: Any) -> Path:
    result = export_gguf(str(base), choose, [find_preset("q4_k_m")], folder, **options)
    return result.outputs[0].path


def test_gguf_on_the_way_is_merge_then_gguf(make_checkpoint, tmp_path):
    base = make_checkpoint(hidden_size=256, intermediate_size=512)
    (base / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: [en, ko]\ntags: [x]\nbase_model: a/b\n---\n"
    )
    (base / "generation_config.json").write_text('{"temperature": 0.5}')
    adapter = train(base, tmp_path / "sft")
    (adapter / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, adapter / name)
    (adapter / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    merged = tmp_path / "base-sft"
    export_merged(str(base), adapter, merged)

    def check(choose: Any) -> None:
        one = gguf(base, tmp_path / f"one-{choose is identity}", choose, adapter=adapter)
        two = gguf(merged, tmp_path / f"two-{choose is identity}", choose)
        assert one.name == two.name
        assert one.read_bytes() == two.read_bytes()
        said = [p.with_suffix(".Modelfile").read_text() for p in (one, two)]
        assert said[0] == said[1]
        assert b"apache-2.0, cc-by-4.0" in one.read_bytes()
        assert b"messages[0]['content']" in one.read_bytes()

    check_each(check, [identity, DEFAULT])
    plain = gguf(base, tmp_path / "plain")
    assert plain.stat().st_size > 0 and plain.name != "base-sft"


def test_an_adapter_of_the_result_is_merged_into_it(make_checkpoint, tmp_path):
    base = make_checkpoint()
    export_checkpoint(str(base), DEFAULT, tmp_path / "up")
    adapter = train(tmp_path / "up", tmp_path / "dpo")
    result = export_checkpoint(str(base), DEFAULT, tmp_path / "one", adapter=adapter)
    assert result.model.on_result
    export_merged(str(tmp_path / "up"), adapter, tmp_path / "two")
    assert_same(stored(tmp_path / "one"), by_peft(tmp_path / "up", adapter))
    assert_same(stored(tmp_path / "one"), stored(tmp_path / "two"))
    card = (tmp_path / "one" / "README.md").read_text()
    assert "adapter `dpo` was merged" in card and "nothing has been trained" not in card


def test_an_adapter_of_the_base_is_merged_below_the_copies(make_checkpoint, tmp_path):
    base = make_checkpoint()
    adapter = train(base, tmp_path / "sft")
    result = export_checkpoint(str(base), DEFAULT, tmp_path / "one", adapter=adapter)
    assert not result.model.on_result
    export_merged(str(base), adapter, tmp_path / "base-sft")
    export_checkpoint(str(tmp_path / "base-sft"), DEFAULT, tmp_path / "two")
    assert_same(stored(tmp_path / "one"), stored(tmp_path / "two"))
    assert (tmp_path / "one/README.md").read_text() == (tmp_path / "two/README.md").read_text()


def test_bitsandbytes_on_the_way(make_checkpoint, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = make_checkpoint()
    adapter = train(base, tmp_path / "sft")
    export_merged(str(base), adapter, tmp_path / "merged")
    export_bnb(str(base), DEFAULT, tmp_path / "one", "nf4", adapter=adapter)
    export_bnb(str(tmp_path / "merged"), DEFAULT, tmp_path / "two", "nf4")
    assert_same(stored(tmp_path / "one"), stored(tmp_path / "two"))


def test_the_commands_take_it(make_checkpoint, tmp_path, run):
    base = make_checkpoint()
    adapter = train(base, tmp_path / "sft")
    code, out, err = run("merge", base, adapter, "-o", tmp_path / "merged", "--json")
    assert code == 0, err
    assert json.loads(out)["adapter"] == str(adapter)
    code, out, err = run("gguf", base, "-q", "f16", "--adapter", adapter, "-o", tmp_path / "g")
    assert code == 0, err
    assert "base-sft: 4 → 6 layers" in out
    code, out, err = run("merge", base, tmp_path / "none", "-o", tmp_path / "x")
    assert code == 2 and "There is no adapter folder" in err
    for text in (out, err):
        assert all(len(line) <= 80 or str(tmp_path) in line for line in text.splitlines())


def test_the_calibrated_formats_on_the_way(make_checkpoint, tmp_path, run):
    base = make_checkpoint()
    adapter = train(base, tmp_path / "sft")
    export_merged(str(base), adapter, tmp_path / "base-sft")
    few = ("--no-upscale", "--chunks", "1", "--ctx", "32")
    one, two = tmp_path / "one", tmp_path / "two"
    for command, size in (("imatrix", ()), ("gptq", ("--group-size", "32"))):
        for source, out in (((base, "--adapter", adapter), one), ((tmp_path / "base-sft",), two)):
            code, _, err = run(command, *source, *few, *size, "-o", out.with_suffix(f".{command}"))
            assert code == 0, err
    assert one.with_suffix(".imatrix").read_bytes() == two.with_suffix(".imatrix").read_bytes()
    assert_same(stored(one.with_suffix(".gptq")), stored(two.with_suffix(".gptq")))


# The folder


def test_an_adapter_s_own_tokenizer_counts(make_checkpoint, tmp_path):
    base = make_checkpoint()
    adapter = train(base, tmp_path / "sft")
    shutil.copy(base / "tokenizer.json", adapter)
    (adapter / "chat_template.jinja").write_text("theirs")
    export_merged(str(base), adapter, tmp_path / "merged")
    assert (tmp_path / "merged/chat_template.jinja").read_text() == "theirs"
    assert (tmp_path / "merged/tokenizer.json").is_file()
    # The base's belong to another tokenizer.
    assert not (tmp_path / "merged/tokenizer.model").exists()


def test_the_card_says_base_adapter_and_licences(make_checkpoint, tmp_path):
    base = make_checkpoint()
    adapter = train(base, tmp_path / "sft")

    def check(ours: str | None, theirs: str | None, said: str, front: str) -> None:
        for folder, licence in ((base, ours), (adapter, theirs)):
            card = f"---\nlicense: {licence}\n---\n" if licence else ""
            (folder / "README.md").write_text(card)
        export_merged(str(base), adapter, tmp_path / "merged", overwrite=True)
        card = (tmp_path / "merged/README.md").read_text()
        assert "adapter `sft`, which says that it was trained on `base`, merged" in " ".join(
            card.split()
        )
        assert str(tmp_path) not in card
        assert said in card and front in card

    check("mit", None, "The base's licence is `mit`. The adapter does not say", 'license: "mit"')
    check("mit", "mit", "The adapter's is `mit`; both hold.", 'license: "mit"')
    check("mit", "gpl", "The adapter's is `gpl`; both hold.", 'license_name: "mit, gpl"')
    check(None, "gpl", "The base does not say its licence", 'license: "unknown"')


def test_the_temporary_folder_goes_with_the_model(make_checkpoint, tmp_path):
    base = make_checkpoint()
    adapter = train(base, tmp_path / "sft")
    model = find_model(str(base), identity, weights=True, say=print, adapter=adapter)
    folder = model.source.folder
    assert (folder / "README.md").is_file() and model.source.weights_folder == base
    del model
    assert not folder.exists()


# Bad input


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "adapter_config.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def edit_tensors(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"

BAD_CONFIGS: dict[str, tuple[Any, str]] = {
    "another kind": ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    "DoRA": ({"use_dora": True}, "use_dora is 'True'"),
    "a bias": ({"bias": "all"}, "bias is 'all'"),
    "a bias in B": ({"lora_bias": True}, "lora_bias"),
    "fan in": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "changes the base's own weights"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "what is to come": ({"use_novelty": True}, "use_novelty"),
    "replication": ({"layer_replication": [[0, 3], [1, 4]]}, "layer_replication"),
    "no rank": ({"r": None}, "r says None"),
    "rank 0": ({"r": 0}, "r says 0"),
    "another rank": ({"r": 5}, "the rank is 5"),
    "alpha": ({"lora_alpha": "16"}, "lora_alpha says '16'"),
    "alpha true": ({"lora_alpha": True}, "lora_alpha says True"),
    "no targets": ({"target_modules": None}, "target_modules is missing"),
    "targets": ({"target_modules": [1]}, "target_modules is no list"),
    "more targets": ({"target_modules": [*LINEAR, "lm_head"]}, "means lm_head too"),
    "fewer targets": ({"target_modules": LINEAR[1:]}, "target_modules in"),
    "more saved": ({"modules_to_save": ["norm"]}, "means model.norm.weight too"),
    "slow pattern": ({"rank_pattern": {"(a+)+q_proj": 2}}, "too involved"),
    "no pattern": ({"alpha_pattern": {"(": 2}}, "is no pattern"),
    "patterns": ({"alpha_pattern": [1]}, "is no JSON object"),
    "layers": ({"layers_to_transform": ["0"]}, "layers_to_transform is no list"),
    "flag": ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
}


def refused(base: Path, adapter: Path, out: Path) -> str:
    with pytest.raises(DusEdgeError) as error:
        export_merged(str(base), adapter, out)
    assert not out.exists() and error.value.exit_code != 0
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text
    return text


def test_configurations_that_are_not_merged_are_refused(make_checkpoint, tmp_path):
    base = make_checkpoint()
    good = train(base, tmp_path / "good")

    def check(case: str) -> None:
        changes, said = BAD_CONFIGS[case]
        adapter = shutil.copytree(good, tmp_path / case)
        edit(adapter, lambda raw: raw.update(changes))
        text = refused(base, adapter, tmp_path / "out")
        assert said in text and str(adapter) in text

    check_each(check, BAD_CONFIGS)


BAD_TENSORS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "half a pair": (lambda t: t.pop(f"{Q0}.lora_B.weight"), "has no lora_B.weight"),
    "no pair": (
        lambda t: [t.pop(f"{Q0}.lora_{x}.weight") for x in "AB"],
        "means model.layers.0.self_attn.q_proj too",
    ),
    "another module": (
        lambda t: t.update({"base_model.model.model.layers.9.x.weight": torch.ones(2)}),
        "model.layers.9.x.weight has no place",
    ),
    "unknown half": (
        lambda t: t.update({f"{Q0}.lora_magnitude_vector": torch.ones(2)}),
        "lora_magnitude_vector",
    ),
    "an embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2)}),
        "lora_embedding_A",
    ),
    "without a prefix": (lambda t: t.update({"x": torch.ones(2)}), "tensor x"),
    "not meant": (
        lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(64)}),
        "model.norm.weight is saved whole",
    ),
    "integers": (
        lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 64, dtype=torch.int32)}),
        "has dtype I32",
    ),
    "NaN": (lambda t: t[f"{Q0}.lora_B.weight"].fill_(float("nan")), "lora_B with NaN"),
    "wide": (
        lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 66)}),
        "make one of [64, 66], but the base's is [64, 64]",
    ),
    "more tokens": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(4100, 64)}),
        "resize_token_embeddings",
    ),
    "nothing": (lambda t: t.clear(), "holds no tensor"),
}


def test_weights_that_are_not_the_base_s_are_refused(make_checkpoint, tmp_path):
    base = make_checkpoint()
    good = train(base, tmp_path / "good")

    def check(case: str) -> None:
        change, said = BAD_TENSORS[case]
        adapter = shutil.copytree(good, tmp_path / case)
        edit_tensors(adapter, change)
        text = refused(base, adapter, tmp_path / "out")
        assert said in text and str(adapter) in text

    check_each(check, BAD_TENSORS)


def test_an_adapter_of_another_base_is_refused(make_checkpoint, tmp_path):
    base, up = make_checkpoint(), tmp_path / "up"
    export_checkpoint(str(base), DEFAULT, up)
    adapter = train(up, tmp_path / "deep")
    text = refused(base, adapter, tmp_path / "out")
    assert "layers.4.mlp.down_proj has no place in a LlamaForCausalLM of 4 layers" in text
    assert f"it was made for another base, as it says for {up}" in text
    text = refused(up, train(base, tmp_path / "shallow"), tmp_path / "out")
    assert "means model.layers.4.self_attn.q_proj too" in text
    wide = make_checkpoint("wide", intermediate_size=128)
    assert "[64, 128], but" in refused(base, train(wide, tmp_path / "w"), tmp_path / "out")


def test_an_adapter_in_the_base_s_place_is_known(make_checkpoint, tmp_path):
    adapter = train(make_checkpoint(), tmp_path / "a")
    with pytest.raises(DusEdgeError, match="it is an adapter, name its base first"):
        export_checkpoint(str(adapter), DEFAULT, tmp_path / "out")


def test_an_adapter_that_could_be_of_either_is_refused(make_checkpoint, tmp_path):
    base = make_checkpoint()
    adapter = train(base, tmp_path / "a", layers_to_transform=[0, 1])
    with pytest.raises(UsageError, match="fits the base and the up-scaled model"):
        export_checkpoint(str(base), DEFAULT, tmp_path / "out", adapter=adapter)
    export_merged(str(base), adapter, tmp_path / "merged")


def test_files_that_are_no_adapter_s_are_refused(make_checkpoint, tmp_path):
    base = make_checkpoint()
    good = train(base, tmp_path / "good")
    weights = "adapter_model.safetensors"

    def cut(folder: Path) -> None:
        data = (folder / weights).read_bytes()
        (folder / weights).write_bytes(data[:-5])

    def token(folder: Path) -> None:
        raw = json.loads((base / "tokenizer.json").read_text())
        raw["added_tokens"].append({"id": 4096, "content": "<|new|>", "special": True})
        (folder / "tokenizer.json").write_text(json.dumps(raw))

    bad: dict[str, tuple[Callable[[Path], object], str]] = {
        "no weights": (lambda f: (f / weights).unlink(), "adapter_model.safetensors is missing"),
        "pickled": (
            lambda f: (f / weights).rename(f / "adapter_model.bin"),
            "only pickled weights",
        ),
        "no config": (lambda f: (f / "adapter_config.json").unlink(), "config.json is missing"),
        "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "as JSON"),
        "cut": (cut, "fetch it again"),
        "a new token": (token, "has a token 4096, but the base's embedding has 4096 rows"),
        "template alone": (lambda f: (f / "chat_template.jinja").write_text("x"), "no tokenizer"),
        "a link": (
            lambda f: (f / "tokenizer.json").symlink_to("/etc/hostname"),
            "leads out of the checkpoint's folder",
        ),
    }

    def check(case: str) -> None:
        spoil, said = bad[case]
        adapter = shutil.copytree(good, tmp_path / case)
        spoil(adapter)
        text = refused(base, adapter, tmp_path / "out")
        assert said in text and str(adapter) in text

    check_each(check, bad)


def test_tied_heads_are_not_parted(make_checkpoint, tmp_path):
    base = make_checkpoint(tie_word_embeddings=True)
    loose = make_checkpoint("loose")
    adapter = train(loose, tmp_path / "head", target_modules=["q_proj", "lm_head"])
    assert "is the embedding (tied)" in refused(base, adapter, tmp_path / "out")
    adapter = train(loose, tmp_path / "saved", modules_to_save=["embed_tokens"])
    assert "peft would part them" in refused(base, adapter, tmp_path / "out")


def test_an_adapter_that_changes_meanwhile_is_seen(make_checkpoint, tmp_path):
    base = make_checkpoint()
    adapter = train(base, tmp_path / "a")

    def touch(line: str) -> None:
        edit_tensors(adapter, lambda t: t[f"{Q0}.lora_A.weight"].zero_())

    with pytest.raises(DusEdgeError, match="changed while it was read"):
        export_merged(str(base), adapter, tmp_path / "out", say=touch)
    assert not (tmp_path / "out").exists()


def test_outputs_are_not_the_adapter_s_folder(make_checkpoint, tmp_path):
    base = make_checkpoint()
    adapter = train(base, tmp_path / "a")
    for folder in (base, adapter):
        with pytest.raises(DusEdgeError):
            export_merged(str(base), adapter, folder, overwrite=True)
    assert load_config(base / "config.json").n_layers == 4
    assert (adapter / "adapter_config.json").is_file()
