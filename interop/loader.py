"""What the loaders share: one process runs all folders; one that fails is told of, not fatal."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np


def main(name: str, logits: Callable[[str], np.ndarray]) -> None:
    """Write ``OUT/<folder>.<name>.npy`` for every folder, or ``….error`` with what went wrong."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for folder in map(Path, sys.argv[2:]):
        array = out / f"{folder.name}.{name}.npy"
        error = array.with_suffix(".error")
        array.unlink(missing_ok=True)
        error.unlink(missing_ok=True)
        try:
            np.save(array, logits(str(folder)).astype(np.float32))
        except Exception as e:
            traceback.print_exc()
            error.write_text(f"{type(e).__name__}: {e}".splitlines()[0] + "\n", encoding="utf-8")
