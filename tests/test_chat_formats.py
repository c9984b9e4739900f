"""Chat formats of today's families: what is found in them, and what a Modelfile then says.

The reference is transformers' rendering of the published template.
"""

from __future__ import annotations

import random
import re

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from dus_edge.ollama.autodetect import FAR, capabilities, count_triples, near_template
from dus_edge.ollama.chat import identify, rendered
from dus_edge.ollama.edges import EDGES, edge_differences
from dus_edge.ollama.gotemplate import render_conversation
from dus_edge.ollama.modelfile import for_model, render_modelfile
from dus_edge.ollama.recognise import recognise_format
from dus_edge.ollama.turns import TURN_PROBES, find_form, go_template, learn_turns, turn_forms
from dus_edge.text.jinja import render_jinja

from .cases import check_each
from .format_cases import FORMATS, QWEN, YI, FormatCase
from .test_chat_templates import (
    CHECKPOINTS,
    DATA,
    LLAMA,
    ROLE_TAGS,
    TALKS,
    USER_ASSISTANT,
    jinja,
    talk,
)

_FOUND = {}


def found_in(case: FormatCase):
    """What is found in a case; kept, for each look starts processes."""
    if case.name not in _FOUND:
        _FOUND[case.name] = recognise_format(case.template, case.tokens, case.ends)
    return _FOUND[case.name]


def reference(case: FormatCase, conversation) -> str | None:
    """transformers' text, without the begin-of-text token, which the tokenizer adds."""
    try:
        (text,), _ = render_jinja_template(
            [conversation], chat_template=case.template, add_generation_prompt=True, **case.tokens
        )
    except Exception:  # a template refuses with what it likes
        return None
    return text.removeprefix(case.tokens.get("bos_token", ""))


def written(found):
    """The Modelfile's text, its comment's lines joined."""
    spec = for_model(
        from_path="m.gguf",
        context_length=4096,
        chat_format=found,
        licence=None,
        title="A model",
    )
    return re.sub(r"\n# +", " ", render_modelfile(spec))


# --- families ---------------------------------------------------------------------------


def check_format(case: FormatCase) -> None:
    found = found_in(case)
    assert found.family is not None and found.family.name == case.form
    assert set(case.stops) <= set(found.stops)
    assert (found.has, found.dated, found.left) == (case.has, case.dated, case.left)
    texts = [render_jinja(case.template, c, case.tokens) for c in EDGES.values()]
    system = found.family.system
    assert edge_differences(found.family.template, system, texts) == list(case.edges)


def check_rendering(case: FormatCase) -> None:
    """The Go template's text is the reference's, for other conversations than were learnt from."""
    family = found_in(case).family
    for conversation in TALKS:
        text = reference(case, conversation)
        if case.dated:  # today is not the day that the Go template has
            text = render_jinja(case.template, conversation, case.tokens)
        if text is None:
            assert conversation[0]["role"] == "system"
            continue
        if family.system is not None and conversation[0]["role"] != "system":
            conversation = [{"role": "system", "content": family.system}, *conversation]
        assert render_conversation(family.template, conversation) == text


def check_modelfile(case: FormatCase) -> None:
    found = found_in(case)
    text = written(found)
    assert ("TEMPLATE" in text.partition("FROM")[2]) is not case.left
    assert ("Ollama runs" in text) is bool(case.has or case.left)
    for name in case.has:
        assert name in text
    assert ("the day's date" in text) is case.dated
    for stop in case.stops:
        assert f'PARAMETER stop "{stop}"' in text


def test_families_of_today_are_recognised() -> None:
    check_each(check_format, FORMATS)


def test_they_render_as_transformers_does() -> None:
    check_each(check_rendering, FORMATS)


def test_their_modelfiles_say_what_ollama_runs() -> None:
    check_each(check_modelfile, FORMATS)


def test_every_form_is_covered() -> None:
    assert {form.name for form in turn_forms()} <= {case.form for case in FORMATS}


def test_a_form_is_no_family_for_training() -> None:
    assert identify(YI, QWEN) is None


# --- turns ------------------------------------------------------------------------------


def turns_of(template, tokens=LLAMA):
    return learn_turns([render_jinja(template, talk, tokens) for talk in TURN_PROBES])


NOT_TURNS = {
    "a number before each message": "{% for m in messages %}{{ loop.index }}{{ m.content }}"
    "{% endfor %}",
    "contents in capitals": "{% for m in messages %}[{{ m.role }}]{{ m.content | upper }}"
    "{% endfor %}",
    "the last message only": "{{ messages[-1].content }}",
    "the system message in the middle": "{% for m in messages %}{% if m.role != 'system' %}"
    "[{{ m.role }}]{{ m.content }}{% if messages[0].role == 'system' and loop.index == 3 %}"
    "{{ messages[0].content }}{% endif %}{% endif %}{% endfor %}",
    "nothing between turns": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "no template": "{{ raise_exception('no') }}",
}


def test_other_templates_are_no_turns() -> None:
    def check(name: str) -> None:
        assert turns_of(NOT_TURNS[name]) is None

    check_each(check, NOT_TURNS)


def test_texts_that_a_go_template_cannot_hold() -> None:
    frame = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ X }}{% endfor %}"
    for end, good in (("<e>", True), ("{{ '{{' }}", False), ("\u200b.", False)):
        turns = turns_of(frame.replace("{{ X }}", end))
        assert turns is not None and (go_template(turns) is not None) is good


def test_an_empty_system_message_is_written_as_the_checkpoint_does() -> None:
    """It is there or not, or something else is; `.System` is empty in each case."""
    frame = "{% for m in messages %}X[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    seen = set()
    for template in (
        frame,
        frame.replace("X", "{% if m.role == 'system' and not m.content %}[none]{% endif %}"),
        "{% if messages[0].role != 'system' %}[system]Default.{% endif %}" + frame,
        "{% if messages[0].role == 'system' and not messages[0].content %}"
        "{% set messages = messages[1:] %}{% endif %}" + frame,
    ):
        go = go_template(turns_of(template.replace("X", "")))
        for conversation in (talk("U"), talk("U", system=""), talk("U", "A", "V", system="S")):
            text = render_jinja(template.replace("X", ""), conversation, LLAMA)
            assert render_conversation(go, conversation) == text
        seen.add(render_conversation(go, talk("U", system="")))
    assert len(seen) == 3


def test_a_begin_of_text_token_is_left_out_where_it_is_spelled_at_the_front() -> None:
    frame = "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    family = recognise_format(frame, LLAMA).family
    assert render_conversation(family.template, talk("U")) == "[user]U[assistant]"


def test_system_messages_that_a_template_leaves_out_stay_out() -> None:
    turns = turns_of(USER_ASSISTANT)
    assert turns.drops
    assert "Be kind" not in render_conversation(go_template(turns), talk("U", system="Be kind."))


def test_a_form_is_found_by_the_end_of_text_token_of_the_checkpoint() -> None:
    olmo = next(case for case in FORMATS if case.form == "olmo-2")
    turns = turns_of(olmo.template, olmo.tokens)
    assert find_form(turns, olmo.tokens).name == "olmo-2"
    assert find_form(turns, LLAMA) is None


# --- what Ollama takes ------------------------------------------------------------------


#: Texts that are in Ollama's index, and the templates that it takes for them.
IN_THE_INDEX = {
    "solar-instruct": "solar-instruct",
    "llama-2-chat": "llama2-chat",
    "mistral-instruct-v0.1-2023": "mistral-instruct",
    "openhermes-2.5": "chatml",
    "zephyr": "zephyr",
    "llama-3.1-instruct": "llama3-instruct",
}


def check_index(name: str) -> None:
    near = near_template(jinja(name))
    assert (near.name, near.edits) == (IN_THE_INDEX[name], 0)


def test_texts_of_the_index() -> None:
    check_each(check_index, IN_THE_INDEX)


def edits(left: str, right: str) -> int:
    """Levenshtein's distance, as the textbook has it."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


def test_the_distance_is_about_levenshteins() -> None:
    """Known texts with a few runs changed; a run changes at most two triples more."""
    rng = random.Random(5)
    texts = [jinja(name) for name in IN_THE_INDEX if "3.1" not in name]
    for _ in range(12):
        text = original = rng.choice(texts)
        n_runs = rng.randrange(1, 5)
        for _ in range(n_runs):
            at, n = rng.randrange(len(text)), rng.randrange(12)
            run = rng.choice(["", "Message", "{% set x = 1 %}", text[at : at + n].upper()])
            text = text[:at] + run + text[at + n :]
        true, near = edits(text, original), near_template(text)
        assert near is not None and true / 2 <= near.edits <= true + 4 * n_runs + 15


def test_triples_are_of_characters_not_bytes() -> None:
    assert sum(count_triples("층을 복사")) == 3
    assert count_triples("ab") == [0] * 256


#: Templates without tools whose text is near to one of Ollama's that renders something else, and
#: whether a Go template can be made of them.
NEAR = {
    "User: and Assistant:": ("zephyr", USER_ASSISTANT, True),
    "roles as tags": ("chatml", ROLE_TAGS, True),
    "all in capitals": (
        "zephyr",
        jinja("zephyr").replace("message['content']", "message['content'] | upper"),
        False,
    ),
}


def check_near(name: str) -> None:
    name, template, made = NEAR[name]
    near = near_template(template)
    assert near.name == name and 0 < near.edits < FAR
    found = recognise_format(template, LLAMA, ("</s>",))
    text = written(found)
    assert f"its own {name}" in text and "PARAMETER stop" in text
    assert (found.family is not None, "Without this TEMPLATE" in text) == (made, made)
    assert ('TEMPLATE """' in text, "OLLAMA_GO_TEMPLATE=0" in text) == (made, not made)


def test_a_wrong_template_of_ollamas_is_prevented() -> None:
    check_each(check_near, NEAR)


def test_a_text_far_from_all_is_left_to_the_gguf() -> None:
    template = "{{ messages[-1].content | upper }}" + "{# far from anything that is known #}" * 40
    found = recognise_format(template, LLAMA, ("</s>",))
    assert found.family is None and found.near is None
    assert "Ollama runs the one in the GGUF." in written(found)


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("{{ messages }}", ()),
        ("{% if tools %}", ("tools",)),
        ("message.tool_calls", ("tools",)),
        ("<think> and </think>", ("thinking",)),
        ("<think>", ()),
        ("content.split('</think>')[-1]", ("thinking",)),
        ('content.split("</think>")', ("thinking",)),
        ("content.split('</think>') reasoning_content", ()),
        ("tools <think></think>", ("tools", "thinking")),
    ],
)
def test_capabilities_are_found_as_ollama_finds_them(text: str, has: tuple[str, ...]) -> None:
    assert capabilities(text) == has


# --- the page ---------------------------------------------------------------------------


def test_a_template_that_does_not_end_is_unknown() -> None:
    found = recognise_format("{% for i in range(10**9) %}{% endfor %}", LLAMA, ("</s>",))
    assert found.family is None and found.stops == ("</s>",)
    assert rendered("{% for", LLAMA) is not None


#: The rows of the table of differences in docs/modelfiles.md, and the templates they speak of.
ROWS = {
    "ChatML, Zephyr, SOLAR as Upstage writes it": (
        "openhermes-2.5",
        "smollm2-instruct",
        "qwen2_5",
        "qwen3",
        "SOLAR Pro",
        "zephyr",
        "solar-instruct",
    ),
    "Phi-3, Phi-3.5, Phi-4, EXAONE 3.5, Granite, OLMo 2, GLM-4, DeepSeek-R1": (
        "phi3",
        "phi3_5",
        "Phi-4",
        "Phi-4-mini",
        "EXAONE 3.5",
        "Granite 3.0",
        "Granite 3.3",
        "OLMo 2",
        "GLM-4",
        "deepseek_r1_distill",
    ),
    "Mistral Small": ("Mistral Small",),
    "Llama 3 to 3.3": ("llama3", "llama3_1", "llama3_2"),
    "Llama 2, Alpaca, SOLAR with blank lines, Mistral v0.3": (
        "llama-2-chat",
        "alpaca",
        "solar-plain",
        "mistral-instruct-v0.3",
    ),
    "Mistral v0.1 and v0.2, Mistral Nemo": ("mistral-instruct-v0.2", "Mistral Nemo"),
    "Mistral v0.1 and v0.2 as first published": (
        "mistral-instruct-v0.1-2023",
        "mistral-instruct-v0.2-2023",
    ),
    "Gemma 2": ("gemma",),
    "Gemma 3": ("gemma3",),
}
_OTHERWISE = {"two questions": "two turns", "empty system": "otherwise", "blanks": "stripped"}
KNOWN = [
    FormatCase(name, family, (), jinja(name), tokens) for name, tokens, family, _ in CHECKPOINTS
]


def docs_table() -> dict[str, list[str]]:
    """The cells of the table, by row."""
    page = (DATA.parent.parent / "docs" / "modelfiles.md").read_text(encoding="utf-8")
    table = page.partition("| format |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


def check_row(row: str) -> None:
    cases = {case.name: case for case in (*KNOWN, *FORMATS)}
    for case in map(cases.__getitem__, ROWS[row]):
        family = found_in(case).family
        shown = dict(zip(EDGES, rendered(case.template, case.tokens).edges, strict=True))
        differs = edge_differences(family.template, family.system, list(shown.values()))
        cells = [
            "same" if name not in differs else "refused" if shown[name] is None else otherwise
            for name, otherwise in _OTHERWISE.items()
        ]
        assert docs_table()[row] == cells, case.name


def test_the_page_says_where_each_format_differs() -> None:
    check_each(check_row, ROWS)
    assert set(docs_table()) == set(ROWS)


def check_empty(case: FormatCase) -> None:
    """An empty system message is written as the checkpoint's own template writes it."""
    text = render_jinja(case.template, talk("Hi", system=""), case.tokens)
    template = found_in(case).family.template
    assert text is None or render_conversation(template, talk("Hi", system="")) == text


def test_an_empty_system_message_of_known_families() -> None:
    check_each(check_empty, KNOWN)
    mended = [c.name for c in KNOWN if found_in(c).family.template != match(c).template]
    assert "mistral-instruct-v0.2" in mended


def match(case: FormatCase):
    """The family alone, its template as it stands in the folder."""
    return identify(case.template, case.tokens)
