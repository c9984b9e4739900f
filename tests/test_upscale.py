"""The up-scaled checkpoint as a folder: shards, config, card, licence."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import safe_open

from dus_edge.checkpoint.config import load_config
from dus_edge.checkpoint.safetensors import SafetensorsCheckpoint
from dus_edge.checkpoint.spec import Source
from dus_edge.export import hf
from dus_edge.families.family import load_families
from dus_edge.jobs.export.checkpoint import export_checkpoint
from dus_edge.upscale.model import plan_chooser
from dus_edge.upscale.plan import from_drop
from dus_edge.upscale.view import UpscaledCheckpoint, base_tensor_name

DEFAULT = plan_chooser(None, None, (), True)


def tensors(folder):
    """All tensors as bytes, read by the safetensors package."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as f:
            for name in f.keys():  # noqa: SIM118
                found[name] = f.get_tensor(name).view(dtype=__import__("torch").uint8).numpy()
    return found


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("limit", [hf.SHARD_BYTES, 200_000])
def test_bytes_are_the_bases(make_checkpoint, tmp_path, monkeypatch, shards, limit):
    base = make_checkpoint(shards=shards)
    monkeypatch.setattr(hf.plan_shards, "__defaults__", (limit,))
    export_checkpoint(str(base), DEFAULT, tmp_path / "up")
    before, after = tensors(base), tensors(tmp_path / "up")
    plan = from_drop(4)
    assert len(after) == 3 + 9 * 6
    for name, array in after.items():
        np.testing.assert_array_equal(
            array, before[base_tensor_name(name, plan, load_families()["llama"])], name
        )
    files = sorted(p.name for p in (tmp_path / "up").glob("*.safetensors"))
    if limit == hf.SHARD_BYTES:
        assert files == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / "up" / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == files
        assert index["metadata"]["total_size"] == sum(a.nbytes for a in after.values())
        assert all((tmp_path / "up" / f).stat().st_size < limit * 8 for f in files)


def test_config_is_the_bases_but_for_the_depth(make_checkpoint, tmp_path):
    base = make_checkpoint(layer_types=["a", "b", "c", "d"], something_of_their_own={"x": 1})
    export_checkpoint(str(base), DEFAULT, tmp_path / "up")
    old = json.loads((base / "config.json").read_text())
    new = json.loads((tmp_path / "up" / "config.json").read_text())
    assert new.pop("num_hidden_layers") == 6
    assert new.pop("layer_types") == ["a", "b", "c", "b", "c", "d"]
    assert new.pop("dus_edge") == {"n_base_layers": 4, "sources": [0, 1, 2, 1, 2, 3]}
    old.pop("num_hidden_layers"), old.pop("layer_types")
    assert new == old


def test_transformers_5_configs_are_written_for_4_too():
    rope = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500000.0}
    config = hf.both_spellings({"rope_parameters": rope, "dtype": "bfloat16"})
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    assert config["torch_dtype"] == "bfloat16"
    old = {"rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "float16"}
    assert hf.both_spellings(old) == old


@pytest.mark.parametrize(
    ("front", "said"),
    [
        ("license: apache-2.0", "its licence holds: `apache-2.0`"),
        ("license: cc-by-nc-4.0", "its licence holds: `cc-by-nc-4.0`"),
        ("tags: [x]", "the licence is unknown"),
    ],
)
def test_licence_is_carried_over(make_checkpoint, tmp_path, front, said):
    base = make_checkpoint()
    (base / "README.md").write_text(f"---\n{front}\n---\n# Base\n")
    export_checkpoint(str(base), DEFAULT, tmp_path / "up")
    card = (tmp_path / "up" / "README.md").read_text()
    assert said in " ".join(card.split())
    assert "`0:3,1:4` (m = 1)" in card
    assert "source layers 2 and 1" in card
    from dus_edge.checkpoint.card import read_licence

    expected = front.removeprefix("license: ") if front.startswith("license") else None
    assert read_licence(tmp_path / "up") == expected


def test_view_reads_any_rows(make_checkpoint):
    folder = make_checkpoint()
    base = SafetensorsCheckpoint(Source(folder, "x", "x"))
    view = UpscaledCheckpoint(base, from_drop(4))
    assert load_config(folder / "config.json").n_layers == 4
    assert view.config.n_layers == 6
    name, origin = "model.layers.3.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    whole = base.read(origin)
    assert view.specs()[name].source == origin
    np.testing.assert_array_equal(view.read(name, 10, 20), whole[10:20])
    assert whole.dtype == np.uint16
    assert view.read(name, 5, 5).shape == (0, 64)


def test_pico_loads_with_nothing_special(tmp_path):
    transformers = pytest.importorskip("transformers")
    export_checkpoint("pico", DEFAULT, tmp_path / "up")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "up")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "up")
    assert model.config.num_hidden_layers == 12
    ids = tokenizer("def __init__(self", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4
