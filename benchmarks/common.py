"""What the benchmarks share: the machine's facts, and results as lines of JSON.

The scripts are run as `python benchmarks/x.py`, which puts this folder on the import path.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dus_edge.machine import default_threads, processor_name

HERE = Path(__file__).parent
RESULTS = HERE / "results"
#: What others measured, each row with its source; see its README.
PUBLISHED = HERE / "published"


def read_published(name: str) -> Any:
    """What `published/<name>.json` holds: a list of rows, or an object with `rows`."""
    return json.loads((PUBLISHED / f"{name}.json").read_text(encoding="utf-8"))


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True
    ).stdout.strip()
    return {
        "cpu": processor_name(),
        "cores": default_threads(),
        "python": platform.python_version(),
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def append(path: Path, lines: Iterable[Mapping[str, object]]) -> None:
    """Add lines to a JSONL file; its folder is made if it is missing."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as f:
        for line in lines:
            f.write(json.dumps(line) + "\n")


def read(path: Path) -> list[dict]:
    """All lines of a JSONL file; none if there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_or_report(
    doc: str | None,
    run: Callable[[argparse.Namespace], None],
    report: Callable[[], None],
    options: Mapping[str, Mapping[str, Any]],
) -> None:
    """The command line of a benchmark that measures a checkpoint or prints what it has found.

    `options` are those of `run`, as `add_argument` takes them.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--work", type=Path)
    for name, more in options.items():
        parser.add_argument(name, **more)
    args = parser.parse_args()
    if args.what == "report":
        report()
    else:
        run(args)


def toml_text(about: Iterable[str], tables: Mapping[str, Mapping]) -> str:
    """Tables of numbers and lists as TOML below comments; numbers rounded to five digits."""
    out = [f"# {line}" for line in about]
    for name, table in tables.items():
        out += ["", f"[{name}]"]
        for key, value in table.items():
            quoted = key if key.isidentifier() else json.dumps(key)
            text = json.dumps(value) if isinstance(value, list) else round(value, 5)
            out.append(f"{quoted} = {text}")
    return "\n".join(out) + "\n"
