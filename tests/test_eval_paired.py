"""Scores and paired differences beside the harness's own formulas and scipy's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dus_edge.eval.intervals import (
    PairedCounts,
    PairedMean,
    WeightedSum,
    holm,
    mcnemar,
    t_quantile,
    t_two_sided,
    tango_interval,
)
from dus_edge.eval.paired import (
    group_score,
    matched,
    paired_group,
    paired_suite,
    suite_score,
    summarize_models,
    task_score,
)
from dus_edge.eval.results import TaskScores
from tests.cases import check_each
from tests.draws import examples

stats = pytest.importorskip("scipy.stats")


def scores(values, task="a", documents=None, group="g", language="en") -> TaskScores:
    names = documents or [str(i) for i in range(len(values))]
    return TaskScores(task, group, "acc", 0, language, tuple(names), tuple(map(float, values)))


# Beside the harness and scipy


def test_groups_are_the_harness_own():
    metrics = pytest.importorskip("lm_eval.api.metrics")
    rng = np.random.default_rng(0)
    tasks = [scores(rng.integers(0, 2, n), f"t{n}") for n in (2, 7, 25, 100, 311)]
    each = [task_score(t) for t in tasks]
    for task, s in zip(tasks, each, strict=True):
        assert s.value == pytest.approx(metrics.mean(task.values), rel=1e-14)
        assert s.error == pytest.approx(metrics.mean_stderr(task.values), rel=1e-12)
    sizes = [s.n for s in each]
    group = group_score(tasks)
    value = metrics.aggregate_subtask_metrics([s.value for s in each], sizes)
    error = metrics.pooled_sample_stderr([s.error for s in each], sizes)
    assert group.value == pytest.approx(value, rel=1e-14)
    assert group.error == pytest.approx(float(error), rel=1e-12)
    average = suite_score(each)
    error = metrics.unweighted_mean_stderr([s.error for s in each])
    assert average.error == pytest.approx(float(error), rel=1e-12)
    assert average.value == pytest.approx(sum(s.value for s in each) / 5)


def test_students_t():
    def check(df: float, t: float) -> None:
        assert t_two_sided(t, df) == pytest.approx(2 * stats.t.sf(t, df), rel=1e-10)

    check_each(check, (1, 2, 24, 24.5, 816, 14041), (1e-3, 0.5, 1.0, 1.1, 1.96, 5, 30))
    assert t_two_sided(0, 3) == 1
    for alpha in (0.5, 0.05, 1e-6):
        for df in (1, 24, 1171):
            assert t_quantile(alpha, df) == pytest.approx(stats.t.isf(alpha / 2, df), rel=1e-10)


def test_mcnemar():
    def check(gained: int, lost: int) -> None:
        if gained + lost:
            p = stats.binomtest(gained, gained + lost).pvalue
            assert mcnemar(gained, lost) == pytest.approx(p, rel=1e-10)

    check_each(check, (0, 1, 5, 40, 1000), (0, 2, 5, 33, 1200))
    assert mcnemar(0, 0) == 1


def test_paired_t():
    rng = np.random.default_rng(1)
    a, b = rng.random(40), rng.random(40)
    ours = paired_group([scores(a)], [scores(b)])
    theirs = stats.ttest_rel(a, b)
    low, high = theirs.confidence_interval()
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-10)
    assert (ours.low, ours.high) == pytest.approx((low, high), rel=1e-10)


@given(
    st.integers(2, 60).flatmap(
        lambda n: st.tuples(st.just(n), st.integers(0, n)).flatmap(
            lambda x: st.tuples(st.just(x[0]), st.just(x[1]), st.integers(0, x[0] - x[1]))
        )
    )
)
@examples(60)
def test_tango_inverts_the_score_test(case):
    """At each end the likelihood under that difference, found by search, gives |z| = 1.96."""
    n, gained, lost = case
    low, high = tango_interval(n, gained, lost, 0.05)
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    optimize = pytest.importorskip("scipy.optimize")
    for delta in (low, high):
        if abs(delta) > 0.999:
            continue

        def loss(share: float, delta: float = delta) -> float:
            cells = (share + delta, share, 1 - 2 * share - delta)
            counts = (gained, lost, n - gained - lost)
            return -sum(k * math.log(max(p, 1e-12)) for k, p in zip(counts, cells, strict=True))

        bounds = (max(0.0, -delta), (1 - delta) / 2)
        q = optimize.minimize_scalar(loss, bounds=bounds, method="bounded").x
        variance = n * (2 * q + delta - delta**2)
        assert abs(gained - lost - n * delta) / math.sqrt(variance) == pytest.approx(1.96, abs=0.02)


def test_a_published_interval():
    """Airway hyper-responsiveness before and after transplantation: Fagerland et al., table."""
    assert tango_interval(21, 1, 7, 0.05) == pytest.approx((-0.517, -0.026), abs=6e-4)


# Coverage


def test_tangos_interval_covers():
    """For 25 and 100 questions, few and many answered otherwise: near 95 %, never below 92 %."""
    rng = np.random.default_rng(2)
    found = []
    for n in (25, 100):
        for gain, loss in ((0.02, 0.02), (0.05, 0.10), (0.20, 0.10), (0.02, 0.30)):
            draws = rng.multinomial(n, (gain, loss, 1 - gain - loss), 2000)
            kinds, counts = np.unique(draws, axis=0, return_counts=True)
            inside = 0
            for (b, c, _), k in zip(kinds, counts, strict=True):
                low, high = tango_interval(n, int(b), int(c), 0.05)
                inside += k if low <= gain - loss <= high else 0
            found.append(inside / 2000)
    assert min(found) > 0.92
    assert 0.94 < np.mean(found) < 0.985


def test_the_averages_interval_covers():
    """Six tasks of 25 documents: five of right or wrong, one of any value."""
    rng = np.random.default_rng(3)
    gain, loss = 0.04, 0.10
    true = (5 * (gain - loss) + 0.01) / 6
    inside = refused = 0
    for i in range(400):
        draws = rng.multinomial(25, (gain, loss, 1 - gain - loss), 5)
        x = rng.normal(0.01, 0.1, 25)
        parts = [PairedCounts(25, int(b), int(c)) for b, c, _ in draws]
        parts.append(PairedMean(25, float(x.mean()), float(x.std(ddof=1) / 5)))
        whole = WeightedSum(tuple(parts), (1 / 6,) * 6)
        low, high = whole.limits(0.05)
        inside += low <= true <= high
        refused += low > 0 or high < 0
        if i < 15:  # p takes a while
            assert (low > 0 or high < 0) == (whole.p < 0.05)
    assert 0.93 <= inside / 400 <= 0.99
    assert 0 < refused < 400


# What cannot be told, is said


def test_small_and_equal_cases():
    assert task_score(scores([])).note == "no documents"
    one = task_score(scores([1]))
    assert (one.value, one.error, one.note) == (1, None, "one document")
    assert "1 of 2 documents is no number" in task_score(scores([1, math.nan])).note
    assert group_score([scores([1], "a"), scores([0], "b")]).note == "one document of each task"
    none = paired_group([scores([1, 0])], [scores([1, 0], documents=["x", "y"])])
    assert (none.value, none.p, none.note) == (None, None, "no document in common")
    same = paired_group([scores([1, 0, 1])], [scores([1, 0, 1])])
    assert (same.value, same.p, same.error) == (0, 1, 0)
    assert same.low == -same.high < 0
    other = paired_group([scores([0.5, 0.25])], [scores([0.5, 0.25])])
    assert (other.value, other.low, other.p) == (0, None, None)
    assert other.note == "no document differs"
    shifted = paired_group([scores([0.5, 0.25])], [scores([0.25, 0.0])])
    assert (shifted.value, shifted.p) == (0.25, None)
    assert shifted.note == "all documents differ by the same"
    single = paired_group([scores([0.5])], [scores([0.25])])
    assert (single.value, single.p, single.note) == (0.25, None, "one document")
    assert paired_group([scores([math.nan, 1])], [scores([0, 1])]).note == "a score is no number"
    assert paired_suite([same, none]).note == "a task has no difference"
    assert paired_suite([same, single]).value == pytest.approx(0.125)
    mixed = paired_suite([same, other])
    assert mixed.value == 0 and mixed.p == 1 and mixed.low == pytest.approx(same.low / 2)


def test_documents_pair_by_content():
    ours = scores([1, 0, 1, 1], documents=["a", "b", "a", "c"])
    theirs = scores([0, 1, 0, 1], documents=["b", "a", "a", "d"])
    a, b = matched(ours, theirs)
    assert a.tolist() == [1, 0, 1]
    assert b.tolist() == [1, 0, 0]


def test_groups_pool_right_and_wrong():
    rng = np.random.default_rng(4)
    ours = [scores(rng.integers(0, 2, 30), f"t{i}") for i in range(3)]
    theirs = [scores(rng.integers(0, 2, 30), f"t{i}") for i in range(3)]
    gained = sum(a > b for x, y in zip(ours, theirs, strict=True) for a, b in _pairs(x, y))
    lost = sum(a < b for x, y in zip(ours, theirs, strict=True) for a, b in _pairs(x, y))
    found = paired_group(ours, theirs)
    assert found.detail == PairedCounts(90, gained, lost)
    assert found.value == pytest.approx(group_score(ours).value - group_score(theirs).value)


def _pairs(a: TaskScores, b: TaskScores):
    return zip(a.values, b.values, strict=True)


def test_values_of_several_tasks_add():
    rng = np.random.default_rng(5)
    sizes = (20, 50)
    ours = [scores(rng.random(n), f"t{n}") for n in sizes]
    theirs = [scores(rng.random(n), f"t{n}") for n in sizes]
    found = paired_group(ours, theirs)
    differences = [np.subtract(a.values, b.values) for a, b in zip(ours, theirs, strict=True)]
    assert found.value == pytest.approx(np.concatenate(differences).mean())
    variances = [d.var(ddof=1) / len(d) * (len(d) / 70) ** 2 for d in differences]
    assert found.error == pytest.approx(math.sqrt(sum(variances)))
    # Welch and Satterthwaite's interval, another way to add, is nearly the same.
    df = sum(variances) ** 2 / sum(v**2 / (n - 1) for v, n in zip(variances, sizes, strict=True))
    reach = stats.t.isf(0.025, df) * found.error
    assert found.high - found.value == pytest.approx(reach, rel=0.03)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(found.value) / found.error, df), rel=0.1)


def test_holm():
    ps = [0.01, 0.04, None, 0.03, 0.005, 0.9]
    # By hand: 5 × .005, 4 × .01, 3 × .03, then no smaller: 2 × .04, and .9.
    assert holm(ps) == pytest.approx([0.04, 0.09, None, 0.09, 0.025, 0.9])
    assert holm([0.4, 0.6]) == [0.8, 0.8]
    assert holm([]) == []


def test_a_summary():
    from dus_edge.eval.results import EvaluatedModel

    def model(*tasks: TaskScores) -> EvaluatedModel:
        return EvaluatedModel(None, tasks, 0, 0.0, "")

    reference = model(
        scores([1] * 40, "a1", group="a"), scores([0, 1] * 20, "b", group="b", language="ko")
    )
    worse = model(
        scores([1] * 20 + [0] * 20, "a1", group="a"),
        scores([0, 1] * 20, "b", group="b", language="ko"),
    )
    first, second = summarize_models([reference, worse], ["a", "b"])
    assert not first.differences and first.average_difference is None
    assert first.by_language["ko"].value == 0.5
    assert second.average.value == 0.5
    a, b = second.differences.values()
    assert a.is_clear and not b.is_clear
    assert a.p_holm == 3 * a.p
    assert second.average_difference.value == -0.25
