"""The plan is arithmetic: compared with the paper's formula and with itself, spelled otherwise."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dus_edge.errors import UsageError
from dus_edge.upscale import plan as plans


def test_solar():
    plan = plans.from_drop(32, 8)
    assert plan.sources == (*range(24), *range(8, 32))
    assert plan.depth == 48
    assert plan.spelled == "0:24,8:32"
    assert plan.drop == 8
    assert [(s.position, s.left, s.right) for s in plan.seams] == [(24, 23, 8)]
    assert plans.from_drop(32) == plan == plans.from_layers(32, 48)


@given(st.integers(1, 100), st.data())
def test_spellings_agree(n, data):
    m = data.draw(st.integers(0, (n - 1) // 2))
    plan = plans.from_drop(n, m)
    assert plan.depth == 2 * (n - m) > n
    assert plan.drop == m
    assert plans.from_layers(n, plan.depth) == plan
    assert plans.parse(n, plan.spelled) == plan


@given(st.integers(1, 40), st.data())
def test_any_ranges_survive_being_spelled(n, data):
    sources = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=60))
    plan = plans.DepthPlan(n, tuple(sources))
    assert plans.parse(n, plan.spelled) == plan
    assert sum(b - a for a, b in plan.ranges) == plan.depth
    assert len(plan.ranges) == len(plan.seams) + 1


def test_plans_follow_each_other():
    plan = plans.choose(8, plans=("0:6,2:8", "0:9,3:12"))
    first = plans.from_drop(8, 2)
    assert plan.sources == tuple(first.sources[i] for i in (*range(9), *range(3, 12)))
    assert plan.n_base == 8
    assert plan.depth == 18


def test_default_is_a_quarter():
    assert [plans.from_drop(n).drop for n in (1, 4, 8, 22, 32, 80)] == [0, 1, 2, 5, 8, 20]


@pytest.mark.parametrize("m", [-1, 16, 32, 99])
def test_m_out_of_range(m):
    with pytest.raises(UsageError, match=rf"m = {m} is out of range.*0 to 15"):
        plans.from_drop(32, m)


@pytest.mark.parametrize("s", [0, 32, 33, 47, 66])
def test_depth_out_of_range(s):
    with pytest.raises(UsageError, match="even numbers from 34 to 64"):
        plans.from_layers(32, s)


@pytest.mark.parametrize("text", ["", "a:b", "3:3", "5:2", "0:33", "-1:4", "0:4,", "1:2:3"])
def test_bad_plan(text):
    with pytest.raises(UsageError, match=r"[Tt]he plan"):
        plans.parse(32, text)


def test_two_ways_at_once():
    with pytest.raises(UsageError, match="--drop and --plan"):
        plans.choose(32, drop=8, plans=("0:24,8:32",))
    with pytest.raises(UsageError, match="--drop and --no-upscale"):
        plans.choose(32, drop=8, upscale=False)
