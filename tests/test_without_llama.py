"""The program without llama-cpp-python: in a virtual environment of what it requires, no more."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sysconfig
import tomllib
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import dus_edge

PACKAGE = Path(dus_edge.__file__).parent
PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
#: What the recipe of the built-in base needs; users of the program do not run it.
TRAINING = {"torch", "transformers", "safetensors", "sentencepiece"}

IMPORT_ALL = """
import importlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
for path in sorted(root.rglob("*.py")):
    name = ".".join(path.relative_to(root.parent).with_suffix("").parts)
    name = name.removesuffix(".__init__")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as e:
        print(name, e.name)
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


def required() -> list[importlib.metadata.Distribution]:
    """The distributions that pyproject.toml's dependencies mean, with theirs, as installed here."""
    found: dict[str, importlib.metadata.Distribution] = {}
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    waiting = list(project["dependencies"])
    while waiting:
        requirement = Requirement(waiting.pop())
        distribution = importlib.metadata.distribution(requirement.name)
        if distribution.name in found:
            continue
        found[distribution.name] = distribution
        for line in distribution.requires or ():
            marker = Requirement(line).marker
            if any(
                marker is None or marker.evaluate({"extra": e}) for e in ("", *requirement.extras)
            ):
                waiting.append(line)
    return list(found.values())


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Run:
    """Run code with arguments in an environment that has the program and its requirements."""
    home = tmp_path_factory.mktemp("bare")
    venv.create(home, symlinks=True)
    paths = {"base": str(home), "platbase": str(home)}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    for distribution in required():
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link = site / top
            if not link.is_symlink():  # two may share a folder
                link.symlink_to(Path(distribution.locate_file(top)))
    (site / "dus_edge").symlink_to(PACKAGE)

    def run(code: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
        # -I: neither this folder nor variables of the running environment lead elsewhere.
        command = [home / "bin" / "python", "-I", "-c", code, *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture
def bare_cli(bare: Run) -> Run:
    """`dus-edge` in that environment."""
    return lambda *args: bare("from dus_edge.cli import main; main()", *args)


def test_the_environment_has_no_llama(bare):
    run = bare("import llama_cpp")
    assert run.returncode == 1
    assert "ModuleNotFoundError" in run.stderr


def test_every_module_imports(bare):
    """Only the training recipe may lack something, and nothing but its own extra."""
    run = bare(IMPORT_ALL, PACKAGE)
    assert run.returncode == 0, run.stderr
    for name, missing in map(str.split, run.stdout.splitlines()):
        assert name.startswith("dus_edge.pico."), f"{name} needs {missing}"
        assert missing.split(".")[0] in TRAINING, f"{name} needs {missing}"


def test_the_main_job_writes_the_same_files(bare_cli, cli, tmp_path):
    presets = ["-q", "q4_k_m", "-q", "q8_0"]
    for folder, dus in (("bare", bare_cli), ("full", cli)):
        run = dus("gguf", "pico", *presets, "-o", tmp_path / folder)
        assert run.returncode == 0, run.stderr
    names = sorted(p.name for p in (tmp_path / "full").iterdir())
    assert len(names) == 4
    assert sorted(p.name for p in (tmp_path / "bare").iterdir()) == names
    for name in names:
        assert (tmp_path / "bare" / name).read_bytes() == (tmp_path / "full" / name).read_bytes()


def test_ggml_is_said_to_be_missing(bare_cli, tmp_path):
    run = bare_cli("gguf", "pico", "-o", tmp_path / "out", "--quantizer", "ggml")
    assert run.returncode == 5
    assert run.stderr == (
        "dus-edge: ggml's quantizers need llama-cpp-python, which is not installed; "
        "pip install 'dus-edge[llama]', or use --quantizer native.\n"
    )
    assert run.stdout == ""
    assert not list(tmp_path.iterdir())
