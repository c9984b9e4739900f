"""What is said of an evaluation: the page, the JSON, the plot and the files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from dus_edge.errors import DependencyError, OutputError, UsageError
from dus_edge.eval.paired import summarize_models
from dus_edge.eval.results import EvalResults, EvaluatedModel, TaskScores
from dus_edge.eval.suites import load_suite
from dus_edge.run.source import SourceInfo
from dus_edge.tables.evaluation import (
    evaluation_page,
    evaluation_paths,
    group_titles,
    model_names,
    write_evaluation,
)
from dus_edge.tables.evaluation_plot import evaluation_figure, render_evaluation
from tests.cases import check_each

QUANTS = (
    *("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q3_K_M"),
    *("IQ3_XXS", "Q2_K", "bnb-nf4-double", "GPTQ-int4-g128-desc-act"),
)


def made_up(
    names=("M-7B-F16", "M-7B-Q4_K_M"), suite="h6", n=20, n_docs=20, worse=0.05, engine="llama.cpp"
) -> EvalResults:
    """Models of which each answers some more questions otherwise than the first."""
    table, rng = load_suite(suite), np.random.default_rng(0)
    first = {
        t.task: rng.random(n) if t.group == "truthfulqa_mc2" else rng.integers(0, 2, n) * 1.0
        for t in table.tasks
    }
    models = []
    for i, name in enumerate(names):
        tasks = []
        for t in table.tasks:
            values = np.where(rng.random(n) < worse * i, 0.0, first[t.task])
            documents = tuple(f"{t.task} {k}" for k in range(n))
            row = (t.task, t.group, t.metric, t.n_shots, t.language, documents, tuple(values), 1172)
            tasks.append(TaskScores(*row))
        kind = "gptq" if "GPTQ" in name else "bitsandbytes" if "bnb" in name else "gguf"
        info = SourceInfo(Path(name), name, kind, 32000, int(15e9 / (1 + i / 3)), 7_240_000_000, 0)
        models.append(EvaluatedModel(info, tuple(tasks), 1000, 61.0, engine))
    published = {p.name: dict(p.scores) for p in table.published}
    return EvalResults(
        suite, table.groups, tuple(models), n_docs, 0, "lm-eval 0.4.13", published,
        table.published_note,
    )  # fmt: skip


def test_no_line_is_over_80_columns():
    def check(names: tuple[str, ...], suite: str) -> None:
        for results in (made_up(names, suite), made_up(names, suite, worse=0, n_docs=None)):
            page = evaluation_page(results)
            assert max(map(len, page.splitlines())) <= 80
            assert "nan" not in page.lower()

    long = ("a" * 90, "b" * 70, "b" * 71)
    check_each(check, (QUANTS, ("one",), long), ("h6", "ko"))


def test_the_page_says_what_was_found():
    results = made_up(("M-7B-F16", "M-7B-Q8_0", "M-7B-Q2_K"), worse=0.2)
    page = re.sub(r"\s+", " ", evaluation_page(results))
    summary = summarize_models(results.models, results.groups)[2]
    c = summary.differences["mmlu"]
    assert c.is_clear
    low, high = -100 * c.high, -100 * c.low
    words = (
        f"Q2_K loses {-100 * c.value:.1f} points of MMLU (95 % interval {low:.1f} to {high:.1f})"
    )
    assert words in page
    assert "14 comparisons were made" in page
    assert page.count("20 documents of each task, drawn with seed 0.") == 3
    assert "MMLU 1,140 of 66,804 in 57 tasks (5 shots, acc)" in page
    assert "older harness (Open LLM Leaderboard v1), not comparable to the digit" in page
    assert "| average | 66.04 | 74.20 | 60.97 |" in page
    assert re.search(r"\| F16 \(reference\) \| 14.0 GiB \| 16.57 \|", page)
    for name in results.groups:
        s = summary.scores[name]
        assert f"{100 * s.value:.1f} ± {100 * s.error:.1f}" in page
    for title, c in (("ARC", summary.differences["arc_challenge"]), ("average", None)):
        c = c or summary.average_difference
        assert f"{100 * c.value:+.1f}".replace("-", "−") in page, title


def test_equal_models_are_not_said_to_differ():
    results = made_up(worse=0)
    page = evaluation_page(results)
    assert "No difference is clear" in page
    assert "TruthfulQA: no document differs." in page
    assert "loses" not in page and "gains" not in page
    assert "Differences" not in evaluation_page(made_up(("one",)))


def test_a_chance_among_many_is_said():
    """One clear difference of 0.02 < p < 0.05 among seven."""
    results = made_up(worse=0)
    reference, other = results.models
    tasks = list(other.tasks)
    i = next(k for k, t in enumerate(tasks) if t.task == "gsm8k")
    values = list(reference.tasks[i].values)
    right = [k for k, v in enumerate(values) if v][:6]
    for k in right:
        values[k] = 0.0
    tasks[i] = dataclasses.replace(tasks[i], values=tuple(values))
    results = dataclasses.replace(
        results, models=(reference, dataclasses.replace(other, tasks=tuple(tasks)))
    )
    page = re.sub(r"\s+", " ", evaluation_page(results))
    assert re.search(r"loses 30.0 points of GSM8K \([^)]*\). Among all comparisons it could", page)
    assert " * |" not in page


def test_languages():
    results = made_up()
    tasks = tuple(
        dataclasses.replace(t, language="ko") if t.group == "gsm8k" else t
        for m in results.models[:1]
        for t in m.tasks
    )
    model = dataclasses.replace(results.models[0], tasks=tasks)
    page = evaluation_page(dataclasses.replace(results, models=(model,)))
    assert "## By language" in page and re.search(r"\| model \s*\| +en \| +ko \|", page)
    assert "## By language" not in evaluation_page(results)


def test_names_are_told_apart():
    same = made_up(("M-Q4", "M-Q4", "M-F16"))
    assert model_names(same) == ["Q4", "Q4 (2)", "F16"]
    assert model_names(made_up(("M-Q4",))) == ["M-Q4"]
    titles = group_titles(dataclasses.replace(same, suite="arc_easy", groups=("arc_easy",)))
    assert titles == {"arc_easy": "arc_easy"}


def test_files(tmp_path):
    pytest.importorskip("matplotlib")
    results = made_up()
    paths = write_evaluation(results, tmp_path, plots=True)
    assert [p.name for p in paths] == ["eval.md", "eval.json", "eval.png", "eval.svg"]
    assert paths == evaluation_paths(tmp_path, plots=True)
    before = [p.read_bytes() for p in paths]
    with pytest.raises(OutputError, match="--overwrite"):
        write_evaluation(results, tmp_path, plots=True)
    write_evaluation(results, tmp_path, plots=True, overwrite=True)
    assert [p.read_bytes() for p in paths] == before
    assert paths[0].read_text() == evaluation_page(results)
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    table = json.loads(paths[1].read_text())
    first, second = table["models"]
    assert first["differences"] == {} and first["average_difference"] is None
    summary = summarize_models(results.models, results.groups)[1]
    c = summary.differences["mmlu"]
    found = second["differences"]["mmlu"]
    assert (found["low"], found["high"], found["p"]) == (c.low, c.high, c.p)
    assert found["p_holm"] == c.p_holm
    assert second["groups"]["mmlu"]["n_documents"] == 57 * 20
    assert len(second["tasks"]) == 62
    assert table["published"]["scores_percent"]["SOLAR 10.7B"]["mmlu"] == 65.48


def test_what_json_cannot_hold_becomes_null(tmp_path):
    results = made_up(n=1, n_docs=1)
    bad = dataclasses.replace(results.models[1].tasks[0], values=(math.nan,))
    model = dataclasses.replace(results.models[1], tasks=(bad, *results.models[1].tasks[1:]))
    results = dataclasses.replace(results, models=(results.models[0], model))
    path = write_evaluation(results, tmp_path, plots=False)[1]
    second = json.loads(path.read_text())["models"][1]
    assert second["groups"]["arc_challenge"]["score"] is None
    assert second["average_difference"]["low"] is None
    page = re.sub(r"\s+", " ", evaluation_page(results))
    assert "the score of 1 of 1 documents is no number" in page
    assert "1 document of each task" in page


def test_plots_without_matplotlib_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DependencyError, match=r"dus-edge\[plots\]"):
        write_evaluation(made_up(), tmp_path, plots=True)
    assert not list(tmp_path.iterdir())


def _picture(results: EvalResults):
    summaries = summarize_models(results.models, results.groups)
    return (results, summaries, model_names(results), group_titles(results))


def test_labels_do_not_meet():
    """Names of many models at much the same size cover neither each other nor a bar."""
    pytest.importorskip("matplotlib")
    names = [f"M-7B-{q}" for q in QUANTS]
    figure = evaluation_figure(*_picture(made_up(names)))
    axes = figure.axes[0]
    renderer = figure.canvas.get_renderer()
    boxes = [t.get_window_extent(renderer) for t in axes.texts if t.get_text()]
    assert len(boxes) == len(names)
    assert not [1 for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]
    frame = axes.get_window_extent(renderer)
    assert all(frame.contains(*box.min) and frame.contains(*box.max) for box in boxes)
    assert len(figure.axes) == 1 + 6


def test_pictures_of_few_and_odd_results():
    pytest.importorskip("matplotlib")

    def check(results: EvalResults) -> None:
        assert render_evaluation(*_picture(results), "png").startswith(b"\x89PNG")

    one = dataclasses.replace(made_up(), groups=("gsm8k",), suite="gsm8k")
    for results in (made_up(("one",)), made_up(n=1), made_up(worse=0), one):
        check(results)


def test_the_tables_have_the_tasks_of_real_models(tmp_path: Path) -> None:
    """Of what `eval -o` wrote: a section, rows for programs; another shape is one sentence."""
    from dus_edge.tables.tasks import read_evaluation, task_rows, tasks_markdown
    from dus_edge.tables.write import as_csv, as_json

    write_evaluation(made_up(), tmp_path, plots=False)
    found = read_evaluation(tmp_path / "eval.json")
    page = tasks_markdown([found])
    for model in found["models"]:
        assert f"| {model['short_name']}" in page
        assert f"{100 * model['average']['score']:.1f} ± " in page
    rows = task_rows([found])
    assert len(rows) == len(found["models"]) * (1 + len(found["groups"]))
    assert as_csv(as_json([], [], [], [found])).count("\n") == 1 + len(rows)
    del found["models"][0]["groups"]
    (tmp_path / "eval.json").write_text(json.dumps(found))
    with pytest.raises(UsageError, match="is not what `dus-edge eval -o` writes"):
        read_evaluation(tmp_path / "eval.json")
    assert "make eval" in tasks_markdown([])
