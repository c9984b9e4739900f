"""The extras of `pyproject.toml`: which packages each brings, and what is said where one lacks."""

from __future__ import annotations

import importlib.util

from dus_edge.errors import DependencyError

_HF = ("torch", "transformers", "safetensors")
#: Packages by extra, under the names that they are imported by.
EXTRAS = {
    "hf": _HF,
    "bnb": (*_HF, "accelerate", "bitsandbytes"),
    "train": (*_HF, "datasets", "peft", "trl"),
    "llama": ("llama_cpp",),
    "eval": (*_HF, "llama_cpp", "accelerate", "datasets", "lm_eval"),
    "serve": (
        "llama_cpp",
        "fastapi",
        "openai",
        "pydantic_settings",
        "sse_starlette",
        "starlette_context",
        "uvicorn",
    ),
    "plots": ("matplotlib",),
}
#: Names to install by, where they are others.
_INSTALLED_AS = {
    "llama_cpp": "llama-cpp-python",
    "lm_eval": "lm-eval",
    "pydantic_settings": "pydantic-settings",
    "sse_starlette": "sse-starlette",
    "starlette_context": "starlette-context",
}


def require(extra: str, what: str, *only: str, instead: str = "") -> None:
    """See that an extra's packages are installed, before any work; none is imported.

    Args:
        extra: of `EXTRAS`.
        what: who needs them, up to the package's name: ``calibration needs``.
        only: the packages that are needed, where it is not all of the extra's.
        instead: another remedy, after a comma.

    Raises:
        DependencyError: one is not; the first is named.
    """
    for name in only or EXTRAS[extra]:
        if importlib.util.find_spec(name) is None:
            raise DependencyError(
                f"{what} {_INSTALLED_AS.get(name, name)}, which is not installed; "
                f"{_remedy(extra)}{f', {instead}' if instead else ''}."
            )


def cannot_import(extra: str, what: str, error: Exception) -> DependencyError:
    """The error for a package that is missing or broken: why its import failed.

    Args:
        extra: that brings it.
        what: who needs it, the package's name included.
        error: what the import raised.
    """
    return DependencyError(f"{what}, which cannot be imported ({error}); {_remedy(extra)}.")


def _remedy(extra: str) -> str:
    return f"pip install 'dus-edge[{extra}]'"
