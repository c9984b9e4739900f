"""The functions of Go's text/template that our templates use.

Operands come as callables, because `and` and `or` evaluate no more than they need. An empty
text, an empty list, zero, false and nil count as false. Reference: text/template's
documentation, "Functions".
"""

import inspect
from collections.abc import Callable
from typing import Any

from dus_edge.errors import DusEdgeError


class GoTemplateError(DusEdgeError, ValueError):
    """The template is not Go's, uses something beyond the subset, or fails when it runs."""


def _equal(left: Callable, *others: Callable) -> bool:
    value = left()
    values = [other() for other in others]
    if not values or any(type(other) is not type(value) for other in values):
        raise GoTemplateError("A comparison needs two values of one type.")
    return value in values


def _and(*operands: Callable) -> Any:
    """The first value that is empty, or the last; what follows is not evaluated."""
    value = None
    for operand in operands:
        if not (value := operand()):
            break
    return value


def _or(*operands: Callable) -> Any:
    """The first value that is not empty, or the last; what follows is not evaluated."""
    value = None
    for operand in operands:
        if value := operand():
            break
    return value


def _len(value: Callable) -> int:
    items = value()
    if not isinstance(items, str | list):
        raise GoTemplateError("len needs a text or a list.")
    return len(items.encode()) if isinstance(items, str) else len(items)


def _slice(value: Callable, *bounds: Callable) -> Any:
    items = value()
    if not isinstance(items, list):  # Go slices text by bytes
        raise GoTemplateError("Only a list can be sliced.")
    if len(bounds) > 2:
        raise GoTemplateError("slice takes a list and two bounds at most.")
    low, high = [*(bound() for bound in bounds), *(0, len(items))[len(bounds) :]]
    if type(low) is not int or type(high) is not int:
        raise GoTemplateError("slice needs whole numbers.")
    if not 0 <= low <= high <= len(items):
        raise GoTemplateError(f"slice {low}:{high} is out of range.")
    return items[low:high]


FUNCTIONS: dict[str, Callable] = {
    "and": _and,
    "or": _or,
    "not": lambda value: not value(),
    "eq": _equal,
    "ne": lambda left, right: not _equal(left, right),
    "len": _len,
    "slice": _slice,
}


def takes(function: Callable, n: int) -> bool:
    """Whether a function of `FUNCTIONS` can be called with so many operands."""
    try:
        inspect.signature(function).bind(*range(n))
    except TypeError:
        return False
    return True
