"""The dialogues and preferences that ship: their form, their languages and what is said of them."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from dus_edge.data import read_text

from .cases import check_each

FILES = ("chat", "preferences")
LANGUAGES = ("ko", "en")
HELD_OUT = slice(9, None, 10)
HANGUL = re.compile("[가-힣ㄱ-ㅎㅏ-ㅣ]")
#: Anything but these, Hangul and a line end is a slip of the hand in text of this kind.
ASCII = frozenset(map(chr, range(0x20, 0x7F)))
ROLES = ("user", "assistant")
#: Share of three-letter pieces two lines may have in common: 0.43 is the most there is.
MOST_ALIKE = 0.55

Line = dict[str, Any]
Messages = list[dict[str, str]]


def read_lines(name: str) -> list[Line]:
    return [json.loads(line) for line in read_text(f"dialogues/{name}.jsonl").splitlines()]


def of(language: str, lines: Sequence[Line]) -> list[Line]:
    return [line for line in lines if line["language"] == language]


def talk(line: Line) -> Messages:
    """What is to be learnt from a line, without its system message."""
    messages = line["messages"] if "messages" in line else line["prompt"] + line["chosen"]
    return [m for m in messages if m["role"] != "system"]


def said(role: str, line: Line) -> str:
    return "\n".join(m["content"] for m in talk(line) if m["role"] == role)


def turns(line: Line) -> int:
    return sum(m["role"] == "user" for m in talk(line))


def has_system(line: Line) -> bool:
    return line["messages"][0]["role"] == "system"


def lead(line: Line) -> int:
    """By how many characters the chosen answer is longer than the rejected one."""
    return len(line["chosen"][0]["content"]) - len(line["rejected"][0]["content"])


def korean_share(text: str) -> float:
    """Share of the words that have a Hangul letter, among those that have any letter."""
    words = [w for w in text.split() if re.search(r"[^\W\d_]", w)]
    return sum(bool(HANGUL.search(w)) for w in words) / len(words) if words else 0.5


def asked(line: Line) -> str:
    """The questions without what they quote: text in quotation marks or after a colon."""
    return re.sub(r'"[^"]*"|: .*', "", said("user", line))


def pieces(text: str) -> frozenset[str]:
    letters = re.sub(r"\W", "", text.lower())
    return frozenset(letters[i : i + 3] for i in range(len(letters) - 2))


def alike(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / max(1, len(a | b))


# Form


def faults(line: Line) -> list[str]:
    """What is wrong with the form of a line of either file."""
    parts = ("messages",) if "messages" in line else ("prompt", "chosen", "rejected")
    wrong = []
    if tuple(line) != (*parts, "language"):
        wrong.append("keys")
    if line.get("language") not in LANGUAGES:
        wrong.append("language")
    for m in itertools.chain.from_iterable(line[part] for part in parts):
        content = m["content"]
        if tuple(m) != ("role", "content"):
            wrong.append("keys of a message")
        if not content or content != content.strip() or "  " in content:
            wrong.append("space")
        if set(HANGUL.sub("", content)) - ASCII - {"\n"}:
            wrong.append("characters")
    roles = [m["role"] for m in line[parts[0]]]
    if "messages" in line:
        roles = roles[roles[0] == "system" :]
        if not roles or roles != list(ROLES) * (len(roles) // 2):
            wrong.append("roles")
    else:
        answers = [[m["role"] for m in line[part]] for part in parts[1:]]
        if roles != ["user"] or answers != [["assistant"]] * 2:
            wrong.append("roles")
        if line["chosen"] == line["rejected"]:
            wrong.append("equal answers")
    return wrong


def test_every_line_has_the_form():
    def check(name: str) -> None:
        wrong = {n: f for n, line in enumerate(read_lines(name), 1) if (f := faults(line))}
        assert not wrong, wrong

    check_each(check, FILES)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ({"messages": [user("a")], "language": "en"}, "roles"),
        ({"messages": [user("a"), user("b")], "language": "en"}, "roles"),
        ({"messages": [assistant("a"), user("b")], "language": "en"}, "roles"),
        ({"messages": [{"role": "system", "content": "a"}], "language": "en"}, "roles"),
        ({"messages": [user("a "), assistant("b")], "language": "en"}, "space"),
        ({"messages": [user("a"), assistant("")], "language": "ko"}, "space"),
        ({"messages": [user("“a”"), assistant("b")], "language": "en"}, "characters"),
        ({"messages": [user("a"), assistant("b")], "language": "fr"}, "language"),
        ({"messages": [user("a"), assistant("b")]}, "keys"),
        (
            {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("b")]},
            "equal answers",
        ),
        ({"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [user("c")]}, "roles"),
    ],
)
def test_a_fault_of_form_is_seen(line, fault):
    assert fault in faults(line)


def test_files_end_with_a_line_end_and_escape_nothing():
    def check(name: str) -> None:
        text = read_text(f"dialogues/{name}.jsonl")
        assert text.endswith("}\n") and "\n\n" not in text
        assert "\\u" not in text

    check_each(check, FILES)


def test_answers_are_short():
    def check(name: str) -> None:
        for line in read_lines(name):
            answers = [m["content"] for m in talk(line) if m["role"] == "assistant"]
            for text in (*answers, *(m["content"] for m in line.get("rejected", ()))):
                assert len(text) <= 200, text

    check_each(check, FILES)


# Languages


def test_a_line_is_in_its_language():
    """A question may quote a sentence of the other language; a translation answers in it."""

    def check(name: str, language: str) -> None:
        lines = of(language, read_lines(name))
        sign = 1 if language == "ko" else -1
        for line in lines:
            assert sign * (korean_share(asked(line)) - 0.3) > 0, line
            if "messages" in line and has_system(line):
                assert sign * (korean_share(line["messages"][0]["content"]) - 0.5) > 0, line
        other = [x for x in lines if sign * (korean_share(said("assistant", x)) - 0.5) < 0]
        assert len(other) <= len(lines) / 10, other

    check_each(check, FILES, LANGUAGES)


def test_korean_is_told_from_english():
    assert korean_share("저는 GGUF 파일이 좋아요.") == 0.75
    assert korean_share("What does 괜찮아요 mean?") == 0.25
    assert korean_share("1, 2, 3") == 0.5
    line = {"messages": [user('What is "네"?'), assistant("Yes."), user("Translate: 네, 네.")]}
    assert asked(line) == "What is ?\nTranslate"


# Counts


def counts(chat: Sequence[Line], pairs: Sequence[Line]) -> dict[str, int]:
    """The rows of the README's table; `held out` is counted apart."""
    by_turns = Counter(map(turns, chat))
    assert set(by_turns) == {1, 2, 3}
    return {
        "dialogues": len(chat),
        "with a system message": sum(map(has_system, chat)),
        "of two turns": by_turns[2],
        "of three turns": by_turns[3],
        "preference pairs": len(pairs),
        "chosen answer longer": sum(lead(p) > 0 for p in pairs),
        "chosen answer shorter": sum(lead(p) < 0 for p in pairs),
        "of equal length": sum(lead(p) == 0 for p in pairs),
    }


def table(chat: Sequence[Line], pairs: Sequence[Line]) -> list[str]:
    """The README's table, from the files."""
    columns = [counts(of(k, chat), of(k, pairs)) for k in LANGUAGES] + [counts(chat, pairs)]
    rows = []
    for name in columns[0]:
        rows.append((name, *(c[name] for c in columns)))
        lines = {"dialogues": chat, "preference pairs": pairs}.get(name)
        if lines:
            held = lines[HELD_OUT]
            rows.append(("of these, held out", *(len(of(k, held)) for k in LANGUAGES), len(held)))
    return [f"| {' | '.join(map(str, row))} |" for row in rows]


def test_the_readme_tells_what_is_there():
    readme = read_text("dialogues/README.md")
    chat, pairs = map(read_lines, FILES)
    rows = "\n".join(table(chat, pairs))
    assert f"|---|---|---|---|\n{rows}\n" in readme, rows


def test_there_is_enough_of_each_kind():
    def check(language: str) -> None:
        chat, pairs = (of(language, read_lines(name)) for name in FILES)
        n = counts(chat, pairs)
        assert n["dialogues"] >= 100 and n["preference pairs"] >= 50
        assert 20 <= n["with a system message"] <= 30
        assert n["of two turns"] + n["of three turns"] >= 15
        assert n["of three turns"] >= 3

    check_each(check, LANGUAGES)


def test_what_is_held_out_is_like_the_rest():
    chat, pairs = (read_lines(name)[HELD_OUT] for name in FILES)
    for lines in (chat, pairs):
        assert len(of("ko", lines)) == len(of("en", lines)) == len(lines) / 2
    assert 0.15 <= sum(map(has_system, chat)) / len(chat) <= 0.35
    assert 0.1 <= sum(turns(x) > 1 for x in chat) / len(chat) <= 0.3
    assert 0.3 <= sum(lead(p) > 0 for p in pairs) / len(pairs) <= 0.7


# Nothing twice, and nothing that gives an answer away


def most_alike(lines: Sequence[Line], part: Callable[[Line], str]) -> tuple[float, Line, Line]:
    """The two lines that have the most in common."""
    cut = [(pieces(part(line)), line) for line in lines]
    return max(
        ((alike(a, b), x, y) for (a, x), (b, y) in itertools.combinations(cut, 2)),
        key=lambda found: found[0],
    )


def test_no_line_is_there_twice_nor_nearly():
    lines = [line for name in FILES for line in read_lines(name)]
    whole = [said("user", x) + "\n" + said("assistant", x) for x in lines]
    assert len(set(whole)) == len(lines)
    assert len({talk(x)[0]["content"] for x in lines}) == len(lines)

    def check(part: Callable[[Line], str]) -> None:
        share, *two = most_alike(lines, part)
        assert share <= MOST_ALIKE, two

    def question(line: Line) -> str:
        return talk(line)[0]["content"]

    def all_of_it(line: Line) -> str:
        return said("user", line) + said("assistant", line)

    check_each(check, (question, all_of_it))


def test_a_near_duplicate_is_seen():
    made = [
        {"messages": [user(f"How do I get a {x} stain out of a white shirt?")]}
        for x in ("tea", "coffee")
    ]
    assert most_alike(made, lambda x: said("user", x))[0] > MOST_ALIKE


def test_length_does_not_tell_the_chosen_answer():
    def check(language: str) -> None:
        leads = [lead(p) for p in of(language, read_lines("preferences"))]
        told = max(sum(x > 0 for x in leads), sum(x < 0 for x in leads)) / len(leads)
        assert told <= 0.55
        assert abs(sum(leads)) / len(leads) <= 8

    check_each(check, LANGUAGES)


def test_a_rejected_answer_is_no_answer_to_learn():
    chat, pairs = map(read_lines, FILES)
    learnt = {m["content"] for line in (*chat, *pairs) for m in talk(line)}
    again = [r for p in pairs if (r := p["rejected"][0]["content"]) in learnt]
    assert not again
