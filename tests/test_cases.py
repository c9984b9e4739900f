"""The loop that stands for parametrizations loses no failure; and draws are the same each run."""

from __future__ import annotations

import pytest

from .cases import check_each


def test_a_loop_checks_every_case_and_names_all_that_fail():
    seen = []

    def check(a, b):
        seen.append((a, b))
        assert a != 1, "one"
        if b == "y" and a == 2:
            with pytest.raises(ValueError, match="never"):
                pass
        if a == 3:
            raise KeyError(b)

    with pytest.raises(BaseExceptionGroup) as caught:
        check_each(check, (0, 1, 2, 3), "xy")
    assert seen == [(a, b) for a in range(4) for b in "xy"]
    assert str(caught.value).startswith("5 of 8 cases failed: 1, x; 1, y; 2, y; 3, x; 3, y")
    kinds = [type(e).__name__ for e in caught.value.exceptions]
    assert kinds == ["AssertionError", "AssertionError", "Failed", "KeyError", "KeyError"]
    assert caught.value.exceptions[2].__notes__ == ["Case: 2, y"]


def test_a_loop_over_nothing_fails():
    with pytest.raises(AssertionError, match="no case"):
        check_each(lambda x: None, [])
