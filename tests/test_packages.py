"""The extras: one sentence for what is not installed, and the same lists as the project file."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest

from dus_edge.errors import DependencyError
from dus_edge.packages import EXTRAS, cannot_import, require

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def test_what_is_installed_is_not_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    require("plots", "plots are drawn by")
    assert "matplotlib" not in sys.modules


def test_the_first_that_lacks_is_named(monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "safetensors" else there(name)
    )
    with pytest.raises(DependencyError) as refused:
        require("hf", "calibration needs")
    assert str(refused.value) == (
        "calibration needs safetensors, which is not installed; pip install 'dus-edge[hf]'."
    )
    require("hf", "calibration needs", "torch")


def test_other_names_and_remedies(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(DependencyError, match="need llama-cpp-python, which is not installed; "):
        require("llama", "blocks need")
    with pytest.raises(DependencyError, match=r"'dus-edge\[llama\]', or use --quantizer native\.$"):
        require("llama", "blocks need", instead="or use --quantizer native")
    said = str(cannot_import("llama", "files are run by x", ImportError("no y")))
    assert said == (
        "files are run by x, which cannot be imported (no y); pip install 'dus-edge[llama]'."
    )


def test_the_extras_are_those_of_the_project():
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        listed = {re.split(r"[\[>=]", line)[0].replace("-", "_") for line in extras[extra]}
        if "dus_edge" in listed:
            inner = re.search(r"dus-edge\[([\w,]+)\]", " ".join(extras[extra]))[1].split(",")
            below = {name for one in inner for name in EXTRAS[one]} | set(EXTRAS["hf"])
            listed |= {name.replace("llama_cpp", "llama_cpp_python") for name in below}
        named = {p.replace("llama_cpp", "llama_cpp_python") for p in packages}
        assert named <= listed, extra
