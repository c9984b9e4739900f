"""`dus-edge eval` against lm-evaluation-harness' own HFLM, and what happens to its answers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from dus_edge.errors import UnsupportedError, UsageError
from dus_edge.eval import lm as ours
from dus_edge.eval.record import AnswerRecord, content_digest
from dus_edge.eval.run import evaluate_model
from dus_edge.eval.suites import Suite, SuiteTask, find_suite
from dus_edge.eval.tasks import EXAMPLES_SEED, LoadedTask, load_tasks, quiet_harness
from dus_edge.jobs.export.gguf import export_gguf
from dus_edge.quant.recipe import find_preset
from dus_edge.run.open import inspect_source
from dus_edge.upscale.model import plan_chooser

from .eval_rows import SUBJECTS, write_h6

AS_IT_IS = plan_chooser(None, None, (), False)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_h6(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def f32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pico as a GGUF of float32."""
    folder = tmp_path_factory.mktemp("f32")
    return export_gguf("pico", AS_IT_IS, [find_preset("f32")], folder).outputs[0].path


def _h6() -> Suite:
    """H6 with two subjects of MMLU."""
    suite = find_suite("h6")
    wanted = {f"mmlu_{s}" for s in SUBJECTS}
    tasks = tuple(t for t in suite.tasks if t.group != "mmlu" or t.task in wanted)
    return Suite(suite.name, suite.title, tasks, suite.titles)


@pytest.fixture(scope="module")
def tasks(rows: Path) -> tuple[LoadedTask, ...]:
    return load_tasks(_h6(), rows, 2, 1)


@pytest.fixture(scope="module")
def theirs(tasks: tuple[LoadedTask, ...], pico: Path) -> dict[str, Any]:
    """The harness with its own model, the same documents."""
    with quiet_harness():
        model = HFLM(pretrained=str(pico), device="cpu", dtype="float32", batch_size=4)
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=[t.task for t in tasks],
            task_manager=TaskManager(include_defaults=False),
            samples={t.spec.task: list(t.asked) for t in tasks},
            bootstrap_iters=0,
            fewshot_random_seed=EXAMPLES_SEED,
        )
    assert found is not None
    return dict(found)


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_answers_are_the_harness_own(
    kind: str,
    pico: Path,
    f32: Path,
    tasks: tuple[LoadedTask, ...],
    theirs: dict[str, Any],
    tmp_path: Path,
) -> None:
    """Prompts to the letter, log-likelihoods to 1e-3, greedy flags and texts exactly."""
    info = inspect_source(pico if kind == "folder" else f32)
    found, raw = evaluate_model(info, tasks, tmp_path, n_threads=1)
    for scores in found.tasks:
        own, other = raw["samples"][scores.task], theirs["samples"][scores.task]
        n = 1 if scores.group == "mmlu" else 2  # of two subjects together two
        assert len(scores.values) == n and len(own) == len(other)
        for a, b in zip(own, other, strict=True):
            assert a["arguments"] == b["arguments"] and a["doc_hash"] == b["doc_hash"]
            for [x], [y] in zip(a["resps"], b["resps"], strict=True):
                if isinstance(y, str):
                    assert x == y
                else:
                    assert x[0] == pytest.approx(y[0], abs=1e-3) and x[1] == y[1]
        key = f"{scores.metric},{_filter(tasks, scores.task)}"
        mean = sum(scores.values) / len(scores.values)
        assert mean == pytest.approx(theirs["results"][scores.task][key], abs=1e-3)
    assert {s.n_available for s in found.tasks} == {6}
    # ARC's 25 solved examples are more than pico's 512 tokens.
    assert found.tokens > 0 and found.n_cut >= 8


def _filter(tasks: tuple[LoadedTask, ...], name: str) -> str:
    return next(t.filter for t in tasks if t.spec.task == name)


def test_shots_are_the_leaderboards(tasks: tuple[LoadedTask, ...]) -> None:
    shots = {t.spec.group: (t.n_shots, t.metric) for t in tasks}
    assert shots == {
        "arc_challenge": (25, "acc_norm"),
        "hellaswag": (10, "acc_norm"),
        "mmlu": (5, "acc"),
        "truthfulqa_mc2": (0, "acc"),
        "winogrande": (5, "acc"),
        "gsm8k": (5, "exact_match"),
    }


def test_rolling_log_likelihoods_are_the_harness_own(
    pico: Path, f32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text longer than the context, in windows."""
    text = (Path(__file__).read_text() * 2)[:9000]
    request = lm_eval.api.instance.Instance("loglikelihood_rolling", {}, (text,), 0)
    with quiet_harness():
        hflm = HFLM(
            pretrained=str(pico), device="cpu", dtype="float32", batch_size=4, max_length=256
        )
        expected = hflm.loglikelihood_rolling([request], disable_tqdm=True)
    record = AnswerRecord(tmp_path / "a.jsonl")
    monkeypatch.setattr(ours.LlamaLM, "max_length", 256)
    model = ours.LlamaLM(inspect_source(f32), record, "cpu", 1, "f32")
    found = model.loglikelihood_rolling([request])
    model.close()
    assert found == pytest.approx(expected, rel=1e-5)


def test_what_was_answered_is_not_computed_again(
    f32: Path, tasks: tuple[LoadedTask, ...], tmp_path: Path
) -> None:
    tasks = tuple(t for t in tasks if t.spec.group in ("mmlu", "truthfulqa_mc2"))
    first, _ = evaluate_model(inspect_source(f32), tasks, tmp_path, n_threads=1)
    again, _ = evaluate_model(inspect_source(f32), tasks, tmp_path, n_threads=1)
    assert again.tasks == first.tasks and again.tokens == 0
    [record] = tmp_path.iterdir()
    # Cut short in the middle of a line: that answer alone is asked again.
    record.write_bytes(record.read_bytes()[:-9])
    third, _ = evaluate_model(inspect_source(f32), tasks, tmp_path, n_threads=1)
    assert 0 < third.tokens < first.tokens
    # In a batch of another shape products are summed in another order.
    for mine, other in zip(third.tasks, first.tasks, strict=True):
        assert mine.values == pytest.approx(other.values, abs=1e-4)
    assert all(json.loads(line) for line in record.read_text().splitlines()[-1:])


def test_another_file_of_the_same_name_is_asked_itself(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"one")
    first = content_digest([path], "llama.cpp")
    path.write_bytes(b"two")
    assert content_digest([path], "llama.cpp") != first
    path.write_bytes(b"one")
    assert content_digest([path], "llama.cpp") == first
    assert content_digest([path], "transformers") != first


def test_a_killed_run_goes_on(f32: Path, rows: Path, run: Any, tmp_path: Path) -> None:
    """kill -9 while answers are being written, then the same command."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = [
        *("eval", str(f32), "--suite", "gsm8k,winogrande,hellaswag,truthfulqa_mc2"),
        *("--data", str(rows), "--docs", "3", "--threads", "1", "--no-plots", "-o"),
    ]
    assert run(*words, whole)[0] == 0
    program = [sys.executable, "-c", "from dus_edge.cli.main import main; main()"]
    process = subprocess.Popen(
        [*program, *words, str(cut)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _wait(lambda: len(_answers(cut)) >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(_answers(cut))
    assert 3 <= kept < len(_answers(whole)) and not (cut / "eval.json").exists()
    assert run(*words, cut)[0] == 0
    one, two = (json.loads((folder / "eval.json").read_text()) for folder in (whole, cut))
    for page in (one, two):
        for model in page["models"]:
            for key in ("tokens", "tokens_computed", "seconds"):
                model.pop(key, None)
    assert one == two


def _answers(folder: Path) -> list[str]:
    return [
        line
        for path in (folder / "answers").glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]


def _wait(ready: Callable[[], bool], run: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while not ready():
        assert run.poll() is None and time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "arc_chalenge"], "did you mean arc_challenge?"),
        (["--suite", "h6", "--data", "nowhere"], "nowhere is no folder"),
        (["--suite", "h6", "--data", "."], "lacks arc_challenge/test.jsonl"),
        (["--suite", "humaneval"], "runs programs that the model writes"),
        (["--docs", "0"], "neither a number from 1 nor all"),
        (["--contamination", "x.txt"], "leave out FILE"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(
    words: list[str], said: str, f32: Path, run: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = run("eval", f32, *words)
    assert code and said in err.replace("\n", " ") and not out
    assert "Traceback" not in err


def test_without_a_network_the_task_is_named(monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"arc_easy needs .* --data"):
        load_tasks(find_suite("arc_easy"), None, 2, 0)


def test_a_metric_without_a_value_for_each_document_is_refused(
    f32: Path, tasks: tuple[LoadedTask, ...], tmp_path: Path
) -> None:
    """Such as a perplexity over all documents."""
    task = tasks[0]
    spec = SuiteTask(**{**vars(task.spec), "metric": "brier_score"})
    wrong = LoadedTask(spec, task.task, task.asked, 6, "brier_score", task.filter, 25)
    with pytest.raises(UnsupportedError, match="brier_score"):
        evaluate_model(inspect_source(f32), [wrong], tmp_path, n_threads=1)


def test_a_base_is_asked_as_it_is_and_up_scaled(rows: Path, run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--suite", "winogrande", "--docs", "2", "--data", rows, "--threads", "1", "-o", out)
    code, said, _ = run("eval", "pico", "--drop", "2", "--json", "--no-plots", *words)
    assert not code
    names = [model["name"] for model in json.loads(said)["models"]]
    assert len(names) == 2 and names[1].endswith("12 layers")
    left = sorted(path.name for path in out.iterdir())
    assert left == sorted(["answers", "eval.json", "eval.md", "samples", *(_raw(n) for n in names)])


def _raw(name: str) -> str:
    return f"results_{name.replace(',', '_').replace(' ', '_')}.json"


def test_overlap_names_the_questions_that_a_text_has(rows: Path, run: Any, tmp_path: Path) -> None:
    question = json.loads((rows / "gsm8k/test.jsonl").read_text().splitlines()[2])["question"]
    text = tmp_path / "train.txt"
    text.write_text(f"Something else. {question} And more.")
    words = ("--suite", "gsm8k", "--data", rows, "--contamination", text)
    code, said, _ = run("eval", "--json", *words)
    assert not code and 2 in json.loads(said)["gsm8k"]["in_text"]
    code, said, _ = run("eval", *words)
    assert not code and "in the text" in said and max(map(len, said.splitlines())) <= 80


def test_parts_and_empty_answers(
    f32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that are too many for one tree, and a choice without a token."""
    texts = [("The cat sat on", " the mat"), ("The cat sat on", ""), ("Two", " cats"), ("", "One")]
    requests = [
        lm_eval.api.instance.Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(texts)
    ]
    found = []
    for most in (8192, 3):
        monkeypatch.setattr(ours, "MOST_REQUESTS", most)
        record = AnswerRecord(tmp_path / f"{most}.jsonl")
        model = ours.LlamaLM(inspect_source(f32), record, "cpu", 1, "f32")
        found.append(model.loglikelihood(requests))
        model.close()
    assert found[0][1] == (0.0, True) and all(value < 0 for value, _ in found[0][:1])
    assert [v for v, _ in found[1]] == pytest.approx([v for v, _ in found[0]], abs=1e-5)


def test_git_is_not_asked_for_the_commit_of_the_folder_one_is_in(tmp_path, monkeypatch, capfd):
    from lm_eval import evaluator

    monkeypatch.chdir(tmp_path)
    before = evaluator.get_git_commit_hash
    with quiet_harness():
        assert evaluator.get_git_commit_hash() is None
    assert evaluator.get_git_commit_hash is before and not capfd.readouterr().err
