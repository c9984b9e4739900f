"""What a training run leaves beside its output while it goes on: enough to go on after a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dus_edge.errors import UsageError
from dus_edge.files import write_text
from dus_edge.jsonfile import find_object

_RUN = "run.json"


def work_folder(output: Path) -> Path:
    """Where a run that makes `output` keeps its checkpoints."""
    return output.with_name(f"{output.name}.training")


def check_same_run(work: Path, identity: Mapping[str, Any], restart: bool) -> None:
    """See that a run that was cut short is gone on with by the same command only.

    Args:
        work: from `work_folder`.
        identity: what the result depends on, by what a person calls it.
        restart: whether it may be thrown away.

    Raises:
        UsageError: it was another's, or the folder is none of ours.
    """
    if not work.exists():
        return
    before = find_object(work / _RUN)
    if before is None:
        if any(work.iterdir()):
            raise UsageError(f"{work} is no folder of a training run; move it away.")
        return
    # As JSON has it: tuples are lists there.
    now = json.loads(json.dumps(identity))
    changed = [name for name in now if now[name] != before.get(name)]
    if changed and not restart and list(work.glob("checkpoint-*")):
        raise UsageError(
            f"{work} holds a run that was cut short, with another {' and another '.join(changed)}; "
            "repeat its command to go on, or add --restart to begin anew."
        )
    if changed or restart:
        shutil.rmtree(work)


def begin_run(work: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder of a run, if it is not there yet."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / _RUN).exists():
        write_text(work / _RUN, json.dumps(identity) + "\n")


def end_run(work: Path) -> None:
    """Remove what only an unfinished run needs."""
    shutil.rmtree(work, ignore_errors=True)
