"""Data files of the package, and how to read them."""

from importlib.resources import files


def read_text(name: str) -> str:
    """The text of a data file of this folder."""
    return files(__name__).joinpath(name).read_text(encoding="utf-8")
