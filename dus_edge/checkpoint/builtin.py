"""``pico``: a small trained Llama checkpoint which ships inside the package."""

from pathlib import Path

BUILTIN = "pico"
"""The name by which the command line knows the built-in base checkpoint."""


def model_dir() -> Path:
    """Return the folder of the shipped checkpoint (config, weights, tokenizer, card)."""
    return Path(__file__).resolve().parents[1] / "data" / "pico"
