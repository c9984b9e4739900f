"""Rows of H6's tasks with the hub's fields, made here: short questions with one right answer."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
#: Of MMLU's 57, those that rows are made for.
SUBJECTS = ("anatomy", "astronomy")


def write_h6(folder: Path, n: int = 6) -> Path:
    """Files of ``--data`` for all tasks but 55 subjects of MMLU; `n` questions each."""
    draw = random.Random(5)
    rows = {
        "arc_challenge/test": _each(n, _arc, draw),
        "arc_challenge/train": _each(30, _arc, draw),
        "hellaswag/validation": _each(n, _hellaswag, draw),
        "hellaswag/train": _each(12, _hellaswag, draw),
        "truthful_qa/validation": _each(n, _truthful, draw),
        "winogrande/validation": _each(n, _winogrande, draw),
        "winogrande/train": _each(8, _winogrande, draw),
        "gsm8k/test": _each(n, _gsm8k, draw),
        "gsm8k/train": _each(8, _gsm8k, draw),
        "mmlu/test": [row for s in SUBJECTS for row in _mmlu(s, n, draw)],
        "mmlu/dev": [row for s in SUBJECTS for row in _mmlu(s, 5, draw)],
    }
    for name, own in rows.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in own))
    return folder


def _each(n: int, make: Any, draw: random.Random) -> list[dict[str, Any]]:
    return [make(draw) for _ in range(n)]


def _sum(draw: random.Random) -> tuple[str, list[str], int]:
    """A question, four answers, and which is right."""
    a, b = draw.randrange(5), draw.randrange(5)
    wrong = draw.sample([w for w in _NUMBERS if w != _NUMBERS[a + b]], 3)
    answers = [_NUMBERS[a + b], *wrong]
    draw.shuffle(answers)
    return f"What is {_NUMBERS[a]} plus {_NUMBERS[b]}?", answers, answers.index(_NUMBERS[a + b])


def _arc(draw: random.Random) -> dict[str, Any]:
    question, answers, right = _sum(draw)
    choices = {"text": answers, "label": list("ABCD")}
    return {"id": "x", "question": question, "choices": choices, "answerKey": "ABCD"[right]}


def _hellaswag(draw: random.Random) -> dict[str, Any]:
    _, answers, right = _sum(draw)
    return {
        "activity_label": "Counting",
        "ctx_a": "A child counts the apples in a basket [title] slowly.",
        "ctx_b": "the child",
        "endings": [f"says that there are {word} of them." for word in answers],
        "label": str(right),
    }


def _mmlu(subject: str, n: int, draw: random.Random) -> Iterable[dict[str, Any]]:
    for _ in range(n):
        question, answers, right = _sum(draw)
        yield {"question": question, "subject": subject, "choices": answers, "answer": right}


def _truthful(draw: random.Random) -> dict[str, Any]:
    question, answers, right = _sum(draw)
    order = [answers[right], *(a for i, a in enumerate(answers) if i != right)]
    targets = {"choices": [f"It is {word}." for word in order], "labels": [1, 0, 0, 0]}
    return {"question": question, "mc1_targets": targets, "mc2_targets": targets}


def _winogrande(draw: random.Random) -> dict[str, Any]:
    a, b = draw.sample(("the bag", "the box", "the cup", "the hat"), 2)
    return {
        "sentence": f"The ball did not fit into {a} because _ was too small for it.",
        "option1": a,
        "option2": b,
        "answer": "1",
    }


def _gsm8k(draw: random.Random) -> dict[str, Any]:
    a, b = draw.randrange(1, 9), draw.randrange(1, 9)
    return {
        "question": f"Ann has {a} pens and buys {b} more. How many pens does she have?",
        "answer": f"Ann has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} pens.\n#### {a + b}",
    }
