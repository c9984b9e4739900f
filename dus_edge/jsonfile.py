"""JSON files that hold one object, as checkpoints are full of; read, or refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dus_edge.errors import CheckpointError


def read_object(path: Path, *, what: str = "", missing: str = "fetch it again") -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: the file.
        what: what messages call it; empty for its path.
        missing: the remedy where there is no such file.

    Raises:
        CheckpointError: it is missing, cannot be read, is not UTF-8, not JSON or no object.
    """
    found = find_object(path, what=what)
    if found is None:
        raise CheckpointError(f"{what or path} is missing; {missing}.")
    return found


def find_object(path: Path, *, what: str = "") -> dict[str, Any] | None:
    """The same, or None if there is no such file."""
    what = what or str(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        reason = f"byte {e.start} is not UTF-8" if isinstance(e, UnicodeDecodeError) else e
        raise CheckpointError(
            f"{what} cannot be read as JSON ({reason}); fetch it again."
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not a JSON object; fetch it again.")
    return value
