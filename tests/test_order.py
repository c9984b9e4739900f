"""The architecture: rooms from the ground up, no circles, one name a thing, small pieces."""

from __future__ import annotations

import ast
import dataclasses
import functools
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import dus_edge

ROOT = Path(dus_edge.__file__).parent
PROGRAM = "dus_edge"

#: Rooms from the ground up; a folder stands for all its modules. Each imports only from those
#: above it in this list.
ORDER = (
    "errors",
    "words",
    "jsonfile",
    "packages",
    "machine",
    "stream",
    "progress",
    "locks",
    "files",
    "data",
    "families",
    "text",
    "checkpoint",
    "quant",
    "adapter",
    "upscale",
    "calibrate",
    "run",
    "train",
    "export",
    "eval",
    "quality",
    "measure",
    "chat",
    "predict",
    "verify",
    "ollama",
    "tables",
    "jobs",
    "cli",
)
#: Rooms that stand side by side and do not know each other.
APART = frozenset({"train", "export", "eval", "quality", "measure", "chat"})
MOST_ROOMS = 30
MOST_FILES = 12
MOST_LINES = 450
MOST_FUNCTION_LINES = 90

#: Heavy packages, and the modules that may import them: `--help` must be instant, and a GGUF
#: export needs neither torch nor anything of llama_cpp.
HEAVY = {
    "torch": (
        "train.",
        "calibrate.",
        "run.",
        "measure.",
        "chat.",
        "quant.gptq",
        "quant.feedback.",
        "export.bnb",
    ),
    "transformers": ("eval.lm", "train.", "calibrate.", "run.", "measure.", "chat.", "export.bnb"),
    "bitsandbytes": ("export.bnb", "train.heal.optim"),
    "datasets": ("eval.tasks", "train.tune.run", "train.tune.quiet"),
    "peft": ("train.heal.lora", "train.tune.model"),
    "trl": ("train.tune.run",),
    "llama_cpp": ("run.", "chat."),
    "lm_eval": ("eval.",),
    "matplotlib": (
        "tables.evaluation_plot",
        "tables.grow.seam_plot",
        "tables.grow.sweep_plot",
        "tables.mix.plot",
        "quality.plot",
        "train.recovery.plot",
    ),
    "numba": ("quant.", "adapter.kernel"),
    "llvmlite": ("quant.",),
}
#: The quantizers, which one of `CHOOSING` imports when it is chosen. Neither imports the other.
QUANTIZERS = ("native", "ggml")
CHOOSING = "quant.choose"


@dataclasses.dataclass(frozen=True)
class Module:
    """A module, parsed.

    Attributes:
        name: dotted, without the program's; a package's is its folder's.
        imports: modules and packages that it imports anywhere in it, dotted; of the program with
            its name in front.
        n_lines: of its text.
    """

    name: str
    tree: ast.Module
    imports: frozenset[str]
    n_lines: int

    @property
    def room(self) -> str:
        return self.name.split(".")[0]

    @property
    def own_imports(self) -> set[str]:
        """Those of the program, without its name."""
        return {i.removeprefix(f"{PROGRAM}.") for i in self.imports if i.startswith(f"{PROGRAM}.")}


def parse(sources: Mapping[str, str]) -> dict[str, Module]:
    """Modules by name, from texts by file name."""
    names = {file: _name(file) for file in sources}
    known = {f"{PROGRAM}.{name}" for name in names.values()}
    found = {}
    for file, text in sources.items():
        tree = ast.parse(text)
        imports = frozenset(_imports(tree, known))
        found[names[file]] = Module(names[file], tree, imports, len(text.splitlines()))
    return found


def _name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _imports(tree: ast.Module, known: set[str]) -> Iterator[str]:
    """What is imported, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports here are absolute"
            for a in node.names:
                inner = f"{node.module}.{a.name}"
                yield inner if inner in known or node.module == PROGRAM else str(node.module)


@functools.cache
def modules() -> dict[str, Module]:
    """All of the program, but what only says its version."""
    files = {p.relative_to(ROOT).as_posix(): p for p in sorted(ROOT.rglob("*.py"))}
    del files["__init__.py"]
    return parse({name: path.read_text(encoding="utf-8") for name, path in files.items()})


# The rules, each a list of what breaks it


def without_a_place(found: Mapping[str, Module]) -> set[str]:
    """Rooms that are not in `ORDER`, and places in it that no room has."""
    return {m.room for m in found.values()} ^ set(ORDER)


def pointing_up(found: Mapping[str, Module]) -> list[str]:
    """Imports of a room that stands later in `ORDER`, or apart."""
    wrong = []
    for m in found.values():
        for other in sorted(m.own_imports):
            room = other.split(".")[0]
            if room.startswith("__") or room == m.room:
                continue
            later = ORDER.index(room) > ORDER.index(m.room)
            if later or {room, m.room} <= APART:
                wrong.append(f"{m.name} imports {other}")
    return wrong


def circle(found: Mapping[str, Module]) -> list[str]:
    """The modules of a circle of imports, the first one again at the end; none: empty."""
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done or name not in found:
            return []
        path.append(name)
        for other in sorted(found[name].own_imports):
            if way := visit(other):
                return way
        done.add(path.pop())
        return []

    for name in found:
        if way := visit(name):
            return way
    return []


def shared_names(found: Mapping[str, Module]) -> dict[str, list[str]]:
    """Public names that modules of several rooms define; protocols may share theirs."""
    places: dict[str, set[str]] = defaultdict(set)
    for m in found.values():
        for node in m.tree.body:
            for name in _defined(node):
                if not name.startswith("_"):
                    places[name].add(m.name)
    return {
        name: sorted(where)
        for name, where in places.items()
        if len({module.split(".")[0] for module in where}) > 1
    }


def _defined(node: ast.stmt) -> list[str]:
    match node:
        case ast.ClassDef(name=name, bases=bases):
            protocol = any("Protocol" in ast.unparse(base) for base in bases)
            return [] if protocol else [name]
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [t.id for t in targets if isinstance(t, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


def crowded(found: Mapping[str, Module]) -> dict[str, int]:
    """Folders with more modules than `MOST_FILES`, packages inside them not counted."""
    n: dict[str, int] = defaultdict(int)
    packages = {name.rpartition(".")[0] for name in found}
    for name in found.keys() - packages:
        folder = name.rpartition(".")[0]
        if folder:
            n[folder] += 1
    return {folder: k for folder, k in n.items() if k > MOST_FILES}


def long_modules(found: Mapping[str, Module]) -> dict[str, int]:
    return {m.name: m.n_lines for m in found.values() if m.n_lines > MOST_LINES}


def long_functions(found: Mapping[str, Module]) -> dict[str, int]:
    return {
        f"{m.name}.{node.name}": n
        for m in found.values()
        for node in ast.walk(m.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (n := (node.end_lineno or 0) - node.lineno + 1) > MOST_FUNCTION_LINES
    }


def heavy_imports(found: Mapping[str, Module]) -> list[str]:
    """Heavy packages where they are not allowed."""
    return [
        f"{m.name} imports {package}"
        for m in found.values()
        for package in {i.split(".")[0] for i in m.imports} & set(HEAVY)
        if not m.name.startswith(HEAVY[package])
    ]


def quantizer_imports(found: Mapping[str, Module]) -> list[str]:
    """Imports of a quantizer by anybody but who chooses it."""
    wrong = []
    for m in found.values():
        for name in QUANTIZERS:
            if f"quant.{name}" in m.own_imports and m.name != CHOOSING:
                wrong.append(f"{m.name} imports quant.{name}")
    return wrong


# The program


def test_every_module_has_its_place():
    assert not without_a_place(modules())


def test_imports_point_one_way():
    assert not pointing_up(modules())


def test_there_is_no_circle():
    assert not circle(modules()), " → ".join(circle(modules()))


def test_public_names_are_unique_across_rooms():
    assert not shared_names(modules())


def test_rooms_and_folders_are_small():
    assert len({m.room for m in modules().values()}) <= MOST_ROOMS
    assert not crowded(modules())


def test_modules_and_functions_are_short():
    assert not long_modules(modules())
    assert not long_functions(modules())


def test_heavy_packages_are_imported_where_they_are_needed():
    assert not heavy_imports(modules())


def test_quantizers_stand_alone():
    assert not quantizer_imports(modules())


# The rules can fail


def made(**texts: str) -> dict[str, Module]:
    """Modules by their texts; `__` in a name stands for a dot."""
    return parse({n.replace("__", "/") + ".py": textwrap.dedent(t) for n, t in texts.items()})


def test_a_module_without_a_place_is_seen():
    rooms = {f"{room}__x": "" for room in ORDER}
    assert not without_a_place(made(**rooms))
    assert without_a_place(made(**rooms, novelty__x="")) == {"novelty"}
    del rooms["words__x"]
    assert without_a_place(made(**rooms)) == {"words"}


@pytest.mark.parametrize(
    "text",
    [
        "from dus_edge.jobs.job import Job",
        "from dus_edge.jobs import job",
        "from dus_edge import jobs",
        "import dus_edge.jobs.job",
        "def f():\n    from dus_edge.jobs.job import Job",
        "if TYPE_CHECKING:\n    from dus_edge.jobs.job import Job",
    ],
)
def test_an_import_of_a_later_room_is_seen(text):
    found = pointing_up(made(quant__x=text, jobs__job=""))
    assert len(found) == 1 and found[0].startswith("quant.x imports jobs")
    assert not pointing_up(made(cli__x=text, jobs__job=""))


def test_rooms_that_stand_apart_are_seen():
    assert pointing_up(made(measure__x="from dus_edge.quality.y import z", quality__y=""))


def test_a_circle_is_told_by_its_path():
    found = made(
        run__a="def f():\n    from dus_edge.run.b import B",
        run__b="from dus_edge.run import c",
        run__c="import dus_edge.run.a",
        run__d="from dus_edge.run.a import A",
    )
    assert circle(found) == ["run.a", "run.b", "run.c", "run.a"]
    assert not circle({name: m for name, m in found.items() if name != "run.c"})


def test_a_name_in_two_rooms_is_seen():
    found = made(
        run__a="class Source: ...\nLIMIT = 1\n_own = 2\ndef f(): ...",
        quant__b="class Source: ...\nLIMIT: int = 2\n_own = 3\ndef g(): ...",
        quant__c="def g(): ...",
    )
    assert shared_names(found) == {"LIMIT": ["quant.b", "run.a"], "Source": ["quant.b", "run.a"]}
    assert not shared_names(made(run__a="class S(Protocol): ...", text__b="class S: ..."))


def test_a_crowded_folder_is_seen():
    full = {f"run__m{i}": "" for i in range(MOST_FILES)}
    full |= {"run____init__": "", "run__sub____init__": "", "run__sub__x": ""}
    assert not crowded(made(**full))
    assert crowded(made(**full, run__more="")) == {"run": MOST_FILES + 1}


def test_what_is_long_is_seen():
    lines = "    x = 1\n" * (MOST_FUNCTION_LINES - 1)
    assert not long_functions(made(run__a=f"def f():\n{lines}"))
    assert long_functions(made(run__a=f"def f():\n{lines}    x = 1\n")) == {
        "run.a.f": MOST_FUNCTION_LINES + 1
    }
    assert not long_modules(made(run__a="x = 1\n" * MOST_LINES))
    assert long_modules(made(run__a="x = 1\n" * (MOST_LINES + 1))) == {"run.a": MOST_LINES + 1}


def test_a_heavy_package_in_a_wrong_place_is_seen():
    found = made(jobs__a="def f():\n    import torch.nn", calibrate__b="import torch")
    assert heavy_imports(found) == ["jobs.a imports torch"]


def test_a_quantizer_that_is_imported_is_seen():
    found = made(
        quant__native="",
        quant__ggml="from dus_edge.quant import native",
        quant__choose="def f():\n    from dus_edge.quant import ggml, native",
        jobs__a="from dus_edge.quant.ggml import quantize",
    )
    assert quantizer_imports(found) == [
        "quant.ggml imports quant.native",
        "jobs.a imports quant.ggml",
    ]
