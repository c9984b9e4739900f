"""The file of sensitivities: read as it was written, refused in one sentence."""

from __future__ import annotations

import json

import pytest

from dus_edge.errors import CheckpointError
from dus_edge.quant.sensitivity import (
    Sensitivity,
    read_sensitivity,
    weights_identity,
    write_sensitivity,
)
from dus_edge.upscale.model import find_model, plan_chooser

from .cases import check_each

KL = {"blk.0.attn_q.weight": {"Q4_K": 0.5, "Q8_0": 0.0}, "output.weight": {"Q6_K": 1e-7}}
FOUND = Sensitivity("ab" * 32, 640, "the text", KL)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "s.json"
    write_sensitivity(path, FOUND)
    assert read_sensitivity(path) == read_sensitivity(path, FOUND.identity) == FOUND
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]


def test_a_damaged_file_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "s.json"
    write_sensitivity(path, FOUND)
    sound = json.loads(path.read_text())
    name = "blk.0.attn_q.weight"
    damaged = {
        "cannot be read as JSON": "{",
        "no sensitivity file": [1],
        "is no sensitivity file": {**sound, "format": "something"},
        "identity is no text": {**sound, "identity": 3},
        "n_tokens is no positive whole number": {**sound, "n_tokens": 0},
        "n_tokens is no positive": {**sound, "n_tokens": True},
        "kl holds no tensors": {**sound, "kl": {}},
        f"kl of {name} holds no types": {**sound, "kl": {name: {}}},
        "the type 'Q9_K', which is not known": {**sound, "kl": {name: {"Q9_K": 0.1}}},
        f"kl of {name} as Q4_K is no number": {**sound, "kl": {name: {"Q4_K": -0.1}}},
        f"of {name} as Q4_K is no number": {**sound, "kl": {name: {"Q4_K": "0.1"}}},
        f"{name} as Q4_K is no number from": {**sound, "kl": {name: {"Q4_K": True}}},
    }

    def check(said: str) -> None:
        value = damaged[said]
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        with pytest.raises(CheckpointError, match=said) as refused:
            read_sensitivity(path)
        assert "s.json" in str(refused.value) and "dus-edge sensitivity" in str(refused.value)

    check_each(check, damaged)


def test_a_missing_file_and_one_of_another_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"s\.json is missing; compute one"):
        read_sensitivity(tmp_path / "s.json")
    write_sensitivity(tmp_path / "s.json", FOUND)
    with pytest.raises(CheckpointError, match="of another model or another plan"):
        read_sensitivity(tmp_path / "s.json", "cd" * 32)


def test_a_model_is_known_by_its_weights_wherever_they_lie(make_checkpoint):
    def identity(base, *plan: str) -> str:
        choose = plan_chooser(None, None, plan, bool(plan))
        return weights_identity(find_model(str(base), choose, weights=True, say=print).open())

    first, again, other = (
        make_checkpoint(name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert identity(first) == identity(again)
    plans = [(), ("0:3,1:4",), ("0:2,2:4,3:4",)]
    found = {identity(base, *plan) for base in (first, other) for plan in plans}
    assert len(found) == 6
