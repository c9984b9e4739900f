"""The architecture's order: a module imports only from those above it."""

from __future__ import annotations

import ast
from pathlib import Path

import dus_edge

ROOT = Path(dus_edge.__file__).parent

#: From the ground up; a package stands for all its modules.
ORDER = (
    "errors",
    "data",
    "files",
    "stream",
    "progress",
    "pico",  # the built-in base's folder; its recipe is a program of its own
    "checkpoint",
    "upscale",
    "quant",
    "calibrate",
    "export",
    "ollama",
    "bench",
    "jobs",
    "calibration",
    "prediction",
    "prediction_report",
    "tables_measured",
    "tables",
    "page",
    "report",
    "options",
    "cli_bench",
    "cli",
)


def unit(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    units = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dus_edge"):
            parts = node.module.split(".")
            names = [parts[1]] if len(parts) > 1 else [a.name for a in node.names]
            units |= {n for n in names if not n.startswith("__")}
        elif isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names]
            units |= {n[1] for n in names if n[0] == "dus_edge" and len(n) > 1}
    return units


def test_every_module_has_its_place():
    modules = {unit(p) for p in ROOT.rglob("*.py")} - {"__init__"}
    assert modules == set(ORDER)


def test_imports_point_upwards():
    for path in ROOT.rglob("*.py"):
        here = unit(path)
        if here == "__init__":
            continue
        for other in imported(path):
            assert ORDER.index(other) <= ORDER.index(here), f"{path} imports {other}"


def packages(path: Path) -> set[str]:
    """Top-level packages that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {n.split(".")[0] for n in names}


def test_heavy_packages_are_imported_where_they_are_needed():
    """`--help` must be instant and an export must not need torch, nor anything llama_cpp."""
    allowed = {
        "torch": ("pico.", "calibrate.", "bench.", "quant.gptq", "export.bnb"),
        "transformers": ("pico.", "calibrate.", "bench.", "export.bnb"),
        "bitsandbytes": ("export.bnb",),
        "llama_cpp": ("bench.",),
        "matplotlib": ("bench.",),
        "numba": ("quant.",),
        "llvmlite": ("quant.",),
    }
    for path in ROOT.rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in packages(path) & set(allowed):
            assert module.startswith(allowed[package]), f"{path} imports {package}"


#: Within `quant`: what describes and chooses quantizers, which must not import any of them.
CHOOSING = ("types", "recipe", "quantizer")


def test_quantizers_stand_alone():
    """Each is chosen at run time; neither imports the other, and nobody else imports one."""
    for path in ROOT.rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if module.startswith("quant.") and path.stem not in CHOOSING:
            forbidden = {"native"} if path.stem == "ggml" else {"ggml"}
        else:
            forbidden = {"native", "ggml"} if module != "quant.quantizer" else set()
        assert not forbidden & quantizers_imported(path), path


def quantizers_imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "dus_edge.quant":
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dus_edge.quant."):
            found.add(node.module.split(".")[2])
    return found
