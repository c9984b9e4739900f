"""Datasets of the hub as text: the real hub client against a small hub on this machine."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from dus_edge.checkpoint.hub.dataset import HubText, parse_hub_text
from dus_edge.train.recovery.options import text_part

from .cases import check_each
from .test_resolve import Hub, commit_id, hub, one_commit  # noqa: F401 - hub is a fixture

NAME = "some-org/Texts"
DOCUMENTS = [
    f"Paragraph {i} tells of the number {i * i}. " + "It goes on for a while. " * 8
    for i in range(60)
]


def table(texts: list[str], column: str = "text", **more: list) -> bytes:
    out = io.BytesIO()
    parquet.write_table(pa.table({column: texts, **more}), out)
    return out.getvalue()


def card(*configs: str) -> bytes:
    said = "configs:\n" + "".join(configs) if configs else ""
    return f"---\nlicense: cc-by-4.0\n{said}---\n# Texts\n".encode()


TRAIN = [f"data/train-{i:05}-of-00002.parquet" for i in range(2)]
FILES = {
    "README.md": card(),
    # What a loading script would do is never seen: it is not even fetched.
    "Texts.py": b"raise SystemExit('executed')",
    TRAIN[0]: table(DOCUMENTS[:30], more=[1] * 30, language=["en"] * 30),
    TRAIN[1]: table(DOCUMENTS[30:], more=[1] * 30, language=["en"] * 30),
    "data/test-00000-of-00001.parquet": table(["A test."]),
}
CLIENT = """
import json, sys
from pathlib import Path
from dus_edge.checkpoint.hub.dataset import dataset_documents, find_dataset, parse_hub_text
from dus_edge.errors import DusEdgeError

results = []
for text, field in json.loads(sys.argv[1]):
    said = []
    try:
        found = find_dataset(parse_hub_text(text), said.append, None)
        rows = [[d.text, d.language] for d in dataset_documents(found, field, said.append)]
        result = {"files": found.files, "licence": found.licence, "rows": rows,
                  "commit": found.repo.commit}
    except DusEdgeError as e:
        result = {"error": type(e).__name__, "message": str(e)}
    results.append(result | {"said": said})
print(json.dumps(results))
"""
HEALER = """
import json, sys
from pathlib import Path
from dus_edge.errors import DusEdgeError
from dus_edge.jobs.train.heal import heal
from dus_edge.train.recovery.options import HealOptions, text_part
from dus_edge.upscale.model import plan_chooser

results = []
for text, out, options in json.loads(sys.argv[1]):
    said = []
    common = {"steps": 2, "length": 64, "batch": 2, "heldout_tokens": 300}
    try:
        _, figures = heal("pico", plan_chooser(None, None, (), True), Path(out), HealOptions(
            texts=(text_part(text),), **common | options), say=said.append)
        results.append({"said": said, "card": Path(out, "README.md").read_text()} | figures)
    except DusEdgeError as e:
        results.append({"said": said, "message": str(e)})
print(json.dumps(results))
"""


def ask(script: str, home: Path, url: str, calls: list, **env: str) -> list[dict]:
    """What a script answers in a process of its own, for the client reads its address once."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(calls)],
        env=clean | {"HF_HOME": str(home), "HF_ENDPOINT": url, "OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_column_of_the_split_is_read_and_nothing_else(hub: Hub, tmp_path: Path) -> None:  # noqa: F811
    hub.repos = {NAME: one_commit(dict(FILES))}
    train, test, again = ask(
        CLIENT,
        tmp_path,
        hub.url,
        [(NAME, None), (f"{NAME}:default/test", None), (f"{NAME}@main", None)],
    )
    assert train["rows"] == [[text, "en"] for text in DOCUMENTS]
    assert train["files"] == TRAIN and train["licence"] == "cc-by-4.0"
    assert test["rows"] == [["A test.", "text"]]
    assert again["rows"] == train["rows"] and again["said"] == []
    asked = {path for method, path, _ in hub.requests if method == "GET" and "/api/" not in path}
    assert not any(path.endswith(".py") for path in asked)
    [offline] = ask(CLIENT, tmp_path, "http://127.0.0.1:9", [(NAME, None)])
    assert offline["rows"] == train["rows"] and "cached copy" in offline["said"][0]


def config(name: str, body: str) -> str:
    return f"- config_name: {name}\n{body}"


def test_configurations_and_splits(hub: Hub, tmp_path: Path) -> None:  # noqa: F811
    def texts(*names: str) -> dict[str, bytes]:
        return {name: table([name]) for name in names}

    declared = card(
        config("ko", "  data_files:\n  - split: train\n    path: ko/*\n"),
        config("en", "  data_files:\n  - split: train\n    path:\n    - a/**/x.parquet\n"),
        config("whole", "  data_dir: w\n"),
    )
    named = {"README.md": declared, **texts("ko/1.parquet", "a/b/x.parquet", "w/1.parquet")}
    defaults = card(
        config("b", '  data_files: "b/*.parquet"\n'),
        config("a", '  default: true\n  data_files: "a/*.parquet"\n'),
    )
    hub.repos = {
        "o/named": one_commit(named),
        "o/default": one_commit(
            {"README.md": defaults, **texts("a/1.parquet", "b/1.parquet", "c/1.parquet")}
        ),
        "o/plain": one_commit(texts("one.parquet", "two.parquet")),
        "o/folders": one_commit(texts("en/train/0.parquet", "ko/partial-train/0.parquet")),
        "o/none": one_commit({"Texts.py": b"", "data.csv": b""}),
        "o/script": one_commit({"script.py": b""}),
        "o/damaged": one_commit({"train.parquet": b"PAR1 no"}),
        "o/numbers": one_commit({"train.parquet": table([1, 2])}),  # type: ignore[list-item]
        "o/blank": one_commit({"train.parquet": table(["", "  ", None])}),  # type: ignore[list-item]
    }
    script = hub.repos["o/script"]
    script.commits[commit_id("2")] = texts("default/train/0000.parquet")
    script.refs["refs/convert/parquet"] = commit_id("2")
    wanted: Mapping[str, list[str] | str] = {
        "o/named:ko": ["ko/1.parquet"],
        "o/named:en": ["a/b/x.parquet"],
        "o/named:whole": ["w/1.parquet"],
        "o/named": "o/named has several configurations; give one as o/named:NAME, of en, ko, whole",
        "o/named:fr": "has no configuration fr",
        "o/named:ko/test": "has no split test in ko; it has train",
        "o/default": ["a/1.parquet"],
        "o/default:b": ["b/1.parquet"],
        "o/plain": ["one.parquet", "two.parquet"],
        "o/plain:default/dev": "has no split dev",
        "o/folders:ko": ["ko/partial-train/0.parquet"],
        "o/folders": "several configurations",
        "o/none": "has no parquet files",
        "o/script": ["default/train/0000.parquet"],
        "o/damaged": "no parquet file that can be read",
        "o/numbers": "the column 'text' is not text",
        "o/blank": [],
        "o/plain@gone": "has no revision gone",
        "o/absent": "The hub has no dataset o/absent",
    }
    answers = ask(CLIENT, tmp_path, hub.url, [(text, None) for text in wanted])
    found = dict(zip(wanted, answers, strict=True))

    def check(text: str) -> None:
        want = wanted[text]
        if isinstance(want, str):
            assert want in found[text]["message"], found[text]
            assert "\n" not in found[text]["message"]
        else:
            assert [row[0] for row in found[text]["rows"]] == want, found[text]

    check_each(check, wanted)
    column, offline = (
        ask(CLIENT, tmp_path, hub.url, [("o/plain", "body")]),
        ask(CLIENT, tmp_path / "empty", hub.url, [("o/plain", None)], HF_HUB_OFFLINE="1"),
    )
    assert "the column 'body' is missing" in column[0]["message"]
    assert "HF_HUB_OFFLINE is set" in offline[0]["message"]


def test_healing_reads_as_much_as_it_needs(hub: Hub, tmp_path: Path) -> None:  # noqa: F811
    hub.repos = {NAME: one_commit(dict(FILES))}
    out, cut = str(tmp_path / "out"), str(tmp_path / "cut")
    healed, broken = ask(
        HEALER,
        tmp_path,
        hub.url,
        [(NAME, out, {}), (NAME, cut, {"rate": 1e30, "steps": 6})],
    )
    gets = {path for method, path, _ in hub.requests if method == "GET"}
    assert any(TRAIN[0] in path for path in gets)
    assert not any(TRAIN[1] in path for path in gets)
    [said] = [line for line in healed["said"] if "documents" in line]
    assert f"at commit {commit_id('1')[:12]}" in said and said.startswith(f"{NAME}: read ")
    n_read = int(said.split()[2])
    assert 0 < n_read < 30
    assert healed["healed_loss"] != healed["upscaled_loss"]
    assert f"| {NAME} " in healed["card"] and "cc-by-4.0" in healed["card"]
    assert "is no number" in broken["message"]
    # The dataset goes on to another commit: that is other data.
    hub.repos[NAME].commits[commit_id("2")] = FILES | {"new": b""}
    hub.repos[NAME].refs["main"] = commit_id("2")
    same = {"rate": 1e30, "steps": 6}
    at = f"{NAME}@{commit_id('1')}"
    changed, named = ask(HEALER, tmp_path, hub.url, [(NAME, cut, same), (at, cut, same)])
    assert "another text" in changed["message"]
    assert "is no number" in named["message"]
    assert not any("documents" in line for line in named["said"])  # its tokens are there


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("org/name", HubText("org/name")),
        ("org/name@v1:en/test", HubText("org/name", "v1", "en", "test")),
        ("org/name@refs/pr/1", HubText("org/name", "refs/pr/1")),
        ("org/name:default", HubText("org/name")),
        ("org/../name", None),
        ("name", None),
        ("/abs/name", None),
        ("a/b/c", None),
        ("org/name:", None),
    ],
)
def test_names_of_datasets(text: str, found: HubText | None) -> None:
    assert parse_hub_text(text) == found
    if found:
        assert parse_hub_text(found.spelled) == found


def test_a_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert text_part("org/name").dataset == HubText("org/name")
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").write_text("text")
    assert text_part("org/name").dataset is None
    assert text_part(str(tmp_path / "none")).dataset is None
