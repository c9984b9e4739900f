"""Many cases in one test, where they differ only by a name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import pytest

#: For `llama_cpp.Llama`: tests run side by side, and its threads would wait for one another.
ONE_THREAD = {"n_threads": 1, "n_threads_batch": 1}


def check_each(check: Callable[..., None], *choices: Iterable) -> None:
    """Check every combination of `choices`, and fail once with all that failed, by name."""
    n, names, errors = 0, [], []
    for case in itertools.product(*choices):
        n += 1
        try:
            check(*case)
        except (Exception, pytest.fail.Exception) as error:
            names.append(", ".join(map(label, case)))
            errors.append(error)
            error.add_note(f"Case: {names[-1]}")
    assert n, "no case"
    if errors:
        text = f"{len(errors)} of {n} cases failed: {'; '.join(names)}"
        raise BaseExceptionGroup(text, errors)


def label(value: object) -> str:
    """The name of a case's part: its own ``name`` where it has one."""
    name = getattr(value, "name", None) or getattr(value, "__name__", None)
    if name is None and isinstance(value, tuple):
        return " ".join(map(label, value))
    return str(value if name is None else name)
