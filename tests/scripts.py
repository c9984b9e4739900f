"""Scripts of `benchmarks/` as modules, for tests of what they compute."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def read_published(name: str) -> Any:
    """What `benchmarks/published/<name>.json` holds."""
    return json.loads((BENCHMARKS / "published" / f"{name}.json").read_text(encoding="utf-8"))


def load_script(name: str) -> ModuleType:
    """The script of that name without its ending; it finds its neighbours as when it is run."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module
