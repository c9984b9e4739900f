"""What calibration needs installed; the one module here that a bare installation can import."""

from __future__ import annotations

import importlib.util

from dus_edge.errors import DependencyError

_NEEDED = ("torch", "transformers", "safetensors")


def require_packages() -> None:
    """See that everything is there before any work.

    Raises:
        DependencyError: a package is missing.
    """
    for name in _NEEDED:
        if importlib.util.find_spec(name) is None:
            raise DependencyError(
                f"calibration needs {name}, which is not installed; pip install 'dus-edge[hf]'."
            )
