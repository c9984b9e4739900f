"""What the distributions hold: the wheel what the program needs, the source what a clone has."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: What stands at the root of a clone; results may stand beside it, under any name.
OURS = (
    *("CHANGELOG.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "SECURITY.md"),
    *("benchmarks", "constraints.txt", "docs", "dus_edge", "interop", "modelfiles"),
    *("pyproject.toml", "tests"),
)
#: Made by work in these, never tracked.
LEFT_OUT = (".*", "build", "dist", "*.egg-info", "__pycache__", "*.gguf", "*.partial")
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the project: building leaves files in its folder."""
    tree = tmp_path_factory.mktemp("packaging") / "tree"
    tree.mkdir()
    ignore = shutil.ignore_patterns(*LEFT_OUT)
    for name in OURS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, tree / name)
    return tree


def build(tree: Path, what: str) -> Path:
    out = tree.parent / what
    out.mkdir()
    run = subprocess.run(
        [sys.executable, "-c", BUILD, what, str(out)], cwd=tree, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return out / run.stdout.splitlines()[-1]


def test_the_source_distribution_has_all_that_a_clone_has(tree):
    ours = {str(p.relative_to(tree)) for p in tree.rglob("*") if p.is_file()}
    with tarfile.open(build(tree, "build_sdist")) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    assert not ours - held
    for name in ("Makefile", "constraints.txt", "modelfiles/solar", "interop/run.sh"):
        assert name in held


def test_the_wheel_has_what_the_program_needs_and_no_more(tree):
    with zipfile.ZipFile(build(tree, "build_wheel")) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = {str(p.relative_to(tree)) for p in (tree / "dus_edge").rglob("*") if p.is_file()}
    assert held == package
    assert not [name for name in held if "published" in name]
