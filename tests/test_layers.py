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
    "export",
    "ollama",
    "jobs",
    "report",
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


def test_heavy_packages_are_imported_where_they_are_needed():
    """`--help` must be instant and an export must not need torch."""
    heavy = {"torch", "transformers", "llama_cpp"}
    for path in ROOT.rglob("*.py"):
        if unit(path) == "pico":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            assert not heavy & {n.split(".")[0] for n in names}, path
