"""Dialogues and preferences from files: three forms of rows, and what is refused where."""

from __future__ import annotations

import json

import pytest

from dus_edge.errors import UsageError
from dus_edge.text.dialogues import read_dialogues, read_preferences, split_held_out

USER = {"role": "user", "content": "Q"}
ANSWER = {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}
GOOD = {"messages": [USER, ANSWER]}
PAIR = {"prompt": "Q", "chosen": "A", "rejected": "B"}


@pytest.fixture
def file(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write


def test_all_forms_of_a_dialogue_are_one(file):
    rows = [
        {"messages": [{"role": "user", "content": " Q\n"}, ANSWER], "language": "en"},
        {"prompt": "Q", "completion": "A"},
        {"prompt": [USER], "completion": [ANSWER], "lang": "ko"},
        {"prompt": [USER], "completion": "A", "score": 5},
    ]
    data = read_dialogues(file(*rows))
    assert {r.messages for r in map(_frozen, data.rows)} == {(("user", "Q"), ("assistant", "A"))}
    assert [r.language for r in data.rows] == ["en", "unknown", "ko", "unknown"]
    assert data.rows[2].origin.endswith("rows.jsonl:3")
    assert (data.name, data.licence) == ("rows.jsonl", None)


def _frozen(row):
    turns = tuple((m["role"], m["content"]) for m in row.messages)
    return type(row)(turns, row.language, row.origin)


def test_all_forms_of_a_pair_are_one(file):
    rows = [
        PAIR,
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER | {"content": "B"}]},
        {"prompt": "Q", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER | {"content": "B"}]},
    ]
    data = read_preferences(file(*rows))
    for row in data.rows:
        assert (list(row.prompt), row.chosen, row.rejected) == ([USER], "A", "B")


def test_the_built_in_rows_are_read():
    dialogues, pairs = read_dialogues("built-in"), read_preferences("built-in")
    assert (len(dialogues.rows), len(pairs.rows)) == (200, 100)
    assert dialogues.licence == "apache-2.0"
    held = split_held_out(dialogues.rows, 0.1)[1]
    assert [r.origin.rpartition(":")[2] for r in held[:3]] == ["10", "20", "30"]


BAD_DIALOGUES = [
    ("[1]", "a JSON object is expected, not list"),
    ("{", "not valid JSON"),
    ({"text": "x"}, r"neither messages nor prompt and completion.*fields: text"),
    ({"messages": "x"}, "messages is str, not a list"),
    ({"messages": []}, "messages is empty, not a list"),
    ({"messages": ["x"]}, r"messages\[0\] is no message"),
    ({"messages": [USER, {"role": "assistant"}]}, r"messages\[1\] is no message"),
    ({"messages": [USER, ANSWER | {"content": None}]}, "content is null, not text"),
    ({"messages": [USER, ANSWER | {"content": [1]}]}, "content is list, not text"),
    ({"messages": [USER, ANSWER | {"content": " \n"}]}, "content is empty"),
    ({"messages": [USER, ANSWER | {"role": "gpt"}]}, 'role "gpt" is not known'),
    ({"messages": [USER, ANSWER | {"tool_calls": [1]}]}, "has tool_calls, which is not trained"),
    ({"messages": [USER, ANSWER, ANSWER]}, "message 2 is of the assistant where the user is next"),
    ({"messages": [ANSWER]}, "message 0 is of the assistant where the user is next"),
    ({"messages": [SYSTEM, ANSWER]}, "message 1 is of the assistant where the user is next"),
    ({"messages": [USER, SYSTEM, ANSWER]}, "message 1 is of the system where the assistant"),
    ({"messages": [SYSTEM]}, "there is only a system message"),
    ({"messages": [USER, ANSWER, USER]}, "the last message is not the assistant's"),
    ({"prompt": "Q", "completion": ""}, "content is empty"),
]
BAD_PAIRS = [
    ({"prompt": "Q", "chosen": "A"}, r"field 'rejected' is missing.*prompt, chosen"),
    (PAIR | {"chosen": "B "}, "chosen and rejected are the same"),
    (PAIR | {"prompt": [USER, ANSWER]}, "prompt's last message is not the user's"),
    (PAIR | {"chosen": [ANSWER, ANSWER]}, "chosen is not one message of the assistant"),
    (PAIR | {"rejected": [USER]}, "rejected is not one message of the assistant"),
]


@pytest.mark.parametrize(("row", "message"), BAD_DIALOGUES)
def test_a_bad_dialogue_is_named_by_its_line(file, row, message):
    with pytest.raises(UsageError, match=rf"rows\.jsonl:2\b.*{message}"):
        read_dialogues(file(GOOD, row))


@pytest.mark.parametrize(("row", "message"), BAD_PAIRS)
def test_a_bad_pair_is_named_by_its_line(file, row, message):
    with pytest.raises(UsageError, match=rf"rows\.jsonl:2\b.*{message}"):
        read_preferences(file(PAIR, row))


def test_too_little_data_is_refused(file, tmp_path):
    for rows in ((), ("", " "), (GOOD,)):
        with pytest.raises(UsageError, match=r"rows\.jsonl: \d rows are too few"):
            read_dialogues(file(*rows))
    with pytest.raises(UsageError, match="cannot be read"):
        read_dialogues(str(tmp_path / "absent.jsonl"))
    (tmp_path / "latin").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(UsageError, match="byte 12 is not UTF-8"):
        read_dialogues(str(tmp_path / "latin"))


def test_held_out_rows_are_spread_evenly():
    train, held = split_held_out(range(40), 0.1)
    assert held == [9, 19, 29, 39] and len(train) == 36
    assert split_held_out(range(4), 0.5)[1] == [1, 3]
    with pytest.raises(UsageError, match="leaves 5 to train on and 0 held out"):
        split_held_out(range(5), 0.1)
