"""The program without its extras: in a virtual environment of what it requires, no more."""

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
#: What stands behind the extra `hf`, and the modules that are imported only by those who have it.
HF = {"torch", "transformers", "safetensors", "sentencepiece"}
NEED_HF = (
    "dus_edge.train.",
    "dus_edge.jobs.train.heal_card",
    "dus_edge.calibrate.engine",
    "dus_edge.calibrate.feedback",
    "dus_edge.calibrate.fisher.",
    "dus_edge.calibrate.gptq",
    "dus_edge.calibrate.head_feedback",
    "dus_edge.calibrate.imatrix",
    "dus_edge.calibrate.layer",
    "dus_edge.calibrate.streams",
    "dus_edge.calibrate.sweep",
    "dus_edge.calibrate.world",
    "dus_edge.quant.feedback.factor",
    "dus_edge.quant.feedback.gram",
    "dus_edge.quant.feedback.solve",
    "dus_edge.quant.gptq",
)
#: What stands behind the extra `eval`, and the one module that is imported with it.
HARNESS, NEED_HARNESS = "lm_eval", "dus_edge.eval.lm"

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
    return lambda *args: bare("from dus_edge.cli.main import main; main()", *args)


def test_the_environment_has_no_llama(bare):
    run = bare("import llama_cpp")
    assert run.returncode == 1
    assert "ModuleNotFoundError" in run.stderr


def test_every_module_imports(bare):
    """Only training and calibrating may lack something, and nothing but their own extra."""
    run = bare(IMPORT_ALL, PACKAGE)
    assert run.returncode == 0, run.stderr
    for name, missing in map(str.split, run.stdout.splitlines()):
        if (name, missing) == (NEED_HARNESS, HARNESS):
            continue
        assert name.startswith(NEED_HF), f"{name} needs {missing}"
        assert missing.split(".")[0] in HF, f"{name} needs {missing}"


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


@pytest.mark.parametrize(
    ("args", "extra"),
    [
        (("imatrix", "pico"), "hf"),
        (("gguf", "pico", "--imatrix", "auto"), "hf"),
        (("gptq", "pico"), "hf"),
        (("bnb", "pico"), "bnb"),
        (("quality", "pico", "pico", "--no-plots"), "hf"),
        (("quality", "pico", "pico"), "plots"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_an_extra_that_is_missing_is_named(bare_cli, tmp_path, args, extra):
    run = bare_cli(*args, "-o", tmp_path / "out")
    assert run.returncode == 5, run.stderr
    assert f"pip install 'dus-edge[{extra}]'" in run.stderr
    assert run.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
