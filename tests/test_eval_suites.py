"""The suites beside the harness's own task files, and the files of --data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dus_edge.errors import UsageError
from dus_edge.eval.data_files import find_task_files, read_rows
from dus_edge.eval.suites import (
    SuiteTask,
    find_suite,
    harness_folder,
    harness_index,
    load_suite,
    suite_names,
)
from tests.cases import check_each

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def harness():
    """Its own index of the folders that the suites name, and of two awkward ones."""
    from lm_eval.tasks import TaskManager

    folders = {f for name in suite_names() for f in load_suite(name).folders}
    paths = [str(harness_folder() / f) for f in sorted(folders | {"benchmarks", "glue"})]
    return TaskManager(include_path=paths, include_defaults=False)


def _config(harness, task: str) -> dict:
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(harness.task_index[task].yaml_path, resolve_func=False, recursive=True)


def test_each_task_is_one_of_the_harness_as_the_file_says(harness):
    def check(task: SuiteTask) -> None:
        config = _config(harness, task.task)
        assert harness.task_index[task.task].yaml_path.parent == harness_folder() / task.folder
        assert config["dataset_path"] == task.data.dataset
        assert config.get("dataset_name") == task.data.config
        used = config.get("test_split") or config["validation_split"]
        assert used == task.data.questions
        assert task.metric in [m["metric"] for m in config["metric_list"]]
        if task.n_shots:
            examples = config.get("fewshot_split") or config["training_split"]
            assert examples == task.data.examples
        if task.filter:
            assert task.filter in [f["name"] for f in config["filter_list"]]

    check_each(check, [t for name in suite_names() for t in load_suite(name).tasks])


def test_groups_are_whole():
    """All tasks of the harness's groups, and no other."""
    index = harness_index(harness_folder())
    for suite, group in (
        ("h6", "mmlu"),
        ("ko", "kmmlu"),
        ("ko", "kobest"),
        ("ko", "haerae"),
        ("ko", "click"),
    ):
        ours = {t.task for t in load_suite(suite).tasks if t.group == group}
        found = find_suite(group)
        assert ours == {t.task for t in found.tasks}, group
        assert all(index.tasks[t.task] == t.folder for t in found.tasks)
    assert len([t for t in load_suite("h6").tasks if t.group == "mmlu"]) == 57


def test_the_index_is_the_harness_own(harness):
    """Names read line by line are those that the harness finds by reading YAML."""
    index = harness_index(harness_folder())
    for name, entry in harness.task_index.items():
        if entry.kind.name == "TASK":
            folder = entry.yaml_path.parent.relative_to(harness_folder()).as_posix()
            assert index.tasks[name] == folder
        else:
            assert name in index.members
            if entry.kind.name == "TAG":
                assert set(entry.tags) <= set(index.members[name])


def test_the_leaderboards_tasks_and_shots(harness):
    openllm = _config(harness, "openllm")["task"]
    shots = {entry["task"]: entry["num_fewshot"] for entry in openllm}
    for task in load_suite("h6").tasks:
        known = shots.get(task.group, shots.get(task.group.removesuffix("_mc2")))
        assert task.n_shots == known, task.task
    assert load_suite("h6").groups == (
        "arc_challenge",
        "hellaswag",
        "mmlu",
        "truthfulqa_mc2",
        "winogrande",
        "gsm8k",
    )


def test_published_figures():
    """The averages that were published with them."""
    averages = {
        p.name: round(sum(p.scores.values()) / len(p.scores), 2)
        for p in load_suite("h6").published
        if len(p.scores) == 6
    }
    assert averages == {
        "SOLAR 10.7B": 66.04,
        "SOLAR 10.7B Instruct": 74.20,
        "Mistral 7B v0.1": 60.97,
        "Llama 2 7B": 50.97,
    }
    for name in suite_names():
        suite = load_suite(name)
        assert all(p.source and set(p.scores) <= set(suite.groups) for p in suite.published)


def test_tasks_by_name():
    suite = find_suite("mmlu_anatomy, arc_easy")
    assert [(t.task, t.folder, t.n_shots, t.metric) for t in suite.tasks] == [
        ("mmlu_anatomy", "mmlu/default", None, None),
        ("arc_easy", "arc", None, None),
    ]
    assert suite.groups == ("mmlu_anatomy", "arc_easy")
    assert suite.tasks[0].language == "en"
    assert find_suite("H6") is load_suite("h6")
    assert {t.task for t in find_suite("ai2_arc").tasks} == {"arc_easy", "arc_challenge"}
    with pytest.raises(UsageError, match="did you mean hellaswag"):
        find_suite("hellaswg")
    with pytest.raises(UsageError, match="did you mean h6"):
        find_suite("h8")
    with pytest.raises(UsageError, match="asked twice"):
        find_suite("arc_easy,ai2_arc")
    with pytest.raises(UsageError, match="names no task"):
        find_suite(" , ")


ROWS = {
    "arc_challenge": {
        "question": "q",
        "choices": {"text": ["a"], "label": ["A"]},
        "answerKey": "A",
    },
    "hellaswag": {"query": "q", "choices": ["a", "b"], "label": "0", "gold": 0},
    "truthful_qa": {"question": "q", "mc2_targets": {"choices": ["a"], "labels": [1]}},
    "winogrande": {"sentence": "a _", "option1": "x", "option2": "y", "answer": "1"},
    "gsm8k": {"question": "q", "answer": "#### 1"},
}
FILES = {
    "arc_challenge": ("test", "train"),
    "hellaswag": ("validation.sample1500", "fewshot.from-validation200"),
    "truthful_qa": ("multiple_choice.validation",),
    "winogrande": ("validation", "train_s"),
    "gsm8k": ("test", "train.sample1000"),
}


def _write(folder: Path) -> None:
    for name, files in FILES.items():
        for file in files:
            path = folder / name / f"{file}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(ROWS[name]) + "\n")
    (folder / "mmlu").mkdir()
    subjects = [t.data.config for t in load_suite("h6").tasks if t.group == "mmlu"]
    for file in ("dev", "test.sample2x57"):
        rows = [
            json.dumps({"question": f"{s} {i}", "subject": s, "choices": ["a"] * 4, "answer": i})
            for i in range(2)
            for s in subjects
        ]
        (folder / "mmlu" / f"{file}.jsonl").write_text("\n".join(rows) + "\n")


def test_files_of_a_folder(tmp_path):
    _write(tmp_path)
    tasks = {t.task: t for t in load_suite("h6").tasks}
    found = find_task_files(tmp_path, tasks.values())
    assert found.keys() == tasks.keys()
    arc = found["arc_challenge"]
    assert (arc.questions.name, arc.examples.name) == ("test.jsonl", "train.jsonl")
    assert found["truthfulqa_mc2"].examples is None
    assert found["winogrande"].examples.name == "train_s.jsonl"
    assert found["hellaswag"].examples.name == "fewshot.from-validation200.jsonl"
    anatomy = found["mmlu_anatomy"]
    rows, ready = read_rows(anatomy.questions, tasks["mmlu_anatomy"].data, anatomy.by)
    assert [r["question"] for r in rows] == ["anatomy 0", "anatomy 1"]
    assert not ready
    rows, ready = read_rows(found["hellaswag"].questions, tasks["hellaswag"].data)
    assert ready and rows == [ROWS["hellaswag"]]
    # A whole split goes before a sample of it.
    (tmp_path / "gsm8k" / "train.jsonl").write_text("{}\n")
    found = find_task_files(tmp_path, tasks.values())
    assert found["gsm8k"].examples.name == "train.jsonl"


def test_what_is_wrong_with_a_folder(tmp_path):
    _write(tmp_path)
    tasks = {t.task: t for t in load_suite("h6").tasks}
    (tmp_path / "mmlu" / "dev.jsonl").unlink()
    (tmp_path / "gsm8k" / "test.jsonl").unlink()
    with pytest.raises(UsageError, match=r"lacks mmlu/dev.jsonl, gsm8k/test.jsonl; add them"):
        find_task_files(tmp_path, tasks.values())
    (tmp_path / "gsm8k" / "test.a.jsonl").touch()
    (tmp_path / "gsm8k" / "test.b.jsonl").touch()
    with pytest.raises(UsageError, match=r"holds test.a.jsonl and test.b.jsonl"):
        find_task_files(tmp_path, tasks.values())
    with pytest.raises(UsageError, match="is no folder"):
        find_task_files(tmp_path / "absent", tasks.values())
    with pytest.raises(UsageError, match=r"lacks kmmlu/Accounting.test.jsonl, .* and \d+ more"):
        find_task_files(tmp_path, load_suite("ko").tasks)
    gsm8k, path = tasks["gsm8k"].data, tmp_path / "rows.jsonl"
    for text, message in (
        ('{"question": "q"}', "line 1 lacks the field answer"),
        ('{"question": "q", "answer": "a"}\n[1]', "line 2 is no JSON object"),
        ("", "holds no rows"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_rows(path, gsm8k)
    path.write_bytes(b"\xff")
    with pytest.raises(UsageError, match="UTF-8"):
        read_rows(path, gsm8k)
