"""Chat formats in training: the checkpoint's own text, the loss on answers, Ollama's prompt."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

from dus_edge.errors import UnsupportedError, UsageError
from dus_edge.export.vocab.vocab import read_vocab
from dus_edge.jobs.train.chat_format import find_format
from dus_edge.ollama import chat
from dus_edge.ollama.gotemplate import render_conversation
from dus_edge.text.dialogues import Dialogue, Preference
from dus_edge.train.tune.examples import (
    IGNORED,
    Coder,
    dialogue_examples,
    marked_texts,
    preference_pairs,
)
from dus_edge.train.tune.formats import format_names, known_format, own_format, render_marked

from .cases import check_each
from .test_chat_templates import CHECKPOINTS, LLAMA, REFUSES_SYSTEM, jinja, talk

TOKENS = (
    *("<|im_start|>", "<|im_end|>", "<|begin_of_text|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
#: Every template of a checkpoint that we know, and the format that no checkpoint writes.
CASES = [*CHECKPOINTS, ("", LLAMA, "solar", None)]
DIALOGUES = [
    talk("Why is the sky blue?", "Air scatters blue light most."),
    talk("하나", "둘", "셋", "넷 🙂.", system="숫자만\n\n말하세요."),
    talk("1", "2", "3", "4\n\n- five", "5", "6", system="Count."),
    talk("A", "B", "C", "D"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pico) -> Path:
    """pico's tokenizer with the special tokens that some formats need."""
    folder = tmp_path_factory.mktemp("tokens")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pico / name, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": list(TOKENS)})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def coder(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    vocabulary = tokenizer.get_vocab()

    def make(family, tokens=LLAMA, system=None, n_ctx=512) -> Coder:
        form = known_format(family, tokens, vocabulary, system)
        return Coder(form, tokenizer, tokenizer.bos_token_id, n_ctx)

    return make


def answers(messages):
    return [m["content"] for m in messages if m["role"] == "assistant"]


def as_row(messages) -> Dialogue:
    return Dialogue(tuple(messages), "en", "test:1")


def test_every_known_format_can_be_trained():
    assert set(format_names()) == {family.name for family in chat.families()}


def test_the_text_is_that_of_the_checkpoints_own_template(coder):
    def check(case, messages):
        name, tokens, family, system = case
        if not name or (messages[0]["role"] == "system" and name in REFUSES_SYSTEM):
            return
        own = jinja(name)
        form = coder(family, tokens, system).form
        front = tokens.get("bos_token", "") if "bos_token" in own else ""
        for prompt, upto in ((True, messages[:-1]), (False, messages)):
            (expected,), _ = render_jinja_template(
                [upto], chat_template=own, add_generation_prompt=prompt, **tokens
            )
            if "strftime_now" in own:
                today = expected.split("Today Date: ")[1].split("\n")[0]
                expected = expected.replace(today, "26 Jul 2024")
            text, _ = render_marked(form, upto, prompt=prompt)
            assert text == expected.removeprefix(front)

    check_each(check, CASES, DIALOGUES)


def test_what_ollama_renders_is_what_training_saw(coder):
    """Before every answer stands the prompt that Ollama makes of the conversation so far."""

    def check(case, messages):
        _, tokens, family, system = case
        form = coder(family, tokens, system).form
        go = chat._with_tokens(chat.family(family), tokens).template
        seen = [text[:start] for text, spans in marked_texts(form, messages) for start, _ in spans]
        places = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        assert seen == [render_conversation(go, form.complete(messages[:i])) for i in places]

    check_each(check, CASES, DIALOGUES)


def test_what_is_learnt_is_the_answers_with_their_end(coder):
    def check(case, messages):
        _, tokens, family, system = case
        made = coder(family, tokens, system)
        examples, left_out = dialogue_examples(made, [as_row(messages)])
        assert not left_out
        runs = []
        for example in examples:
            assert example.ids[0] == made.begin and not example.learnt[0] and example.learnt[-1]
            last = None
            for i, label in enumerate(example.labels):
                if label == IGNORED:
                    continue
                assert label == example.ids[i]
                if last != i - 1:
                    runs.append([])
                runs[-1].append(label)
                last = i
        ends = [made.tokenizer.decode(run[-1:]) for run in runs]
        assert ends == [made.form.end] * len(runs)
        texts = [made.tokenizer.decode(run[:-1]).strip() for run in runs]
        assert texts == answers(messages)

    check_each(check, CASES, DIALOGUES)


def test_llama_cpp_reads_the_prompt_as_training_did(coder, folder, load_vocab):
    """The tokens before an answer are those that llama.cpp makes of Ollama's prompt alone."""
    vocab = load_vocab(read_vocab(folder, 4096 + len(TOKENS)))

    def check(family, messages):
        made = coder(family)
        go = render_conversation(chat.family(family).template, messages[:-1])
        example = dialogue_examples(made, [as_row(messages)])[0][-1]
        start = max(i for i, x in enumerate(example.learnt) if x and not example.learnt[i - 1])
        prompt = vocab.encode(go, add_special=True, parse_special=True)
        assert list(example.ids[:start]) == prompt

    check_each(check, format_names(), DIALOGUES)


def test_formats_whose_answers_are_not_apart_have_a_reason_not_to_be(coder):
    """In a format that is apart, some answer stands behind another text than its prompt."""

    def differs(form, messages) -> bool:
        text, spans = render_marked(form, messages)
        places = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        prompts = [render_marked(form, messages[:i], prompt=True)[0] for i in places]
        ends = all(text[a:b].endswith(form.end) for a, b in spans)
        return not ends or [text[:a] for a, _ in spans] != prompts

    def check(family):
        form = coder(family).form
        assert any(differs(form, m) for m in DIALOGUES) is form.apart

    check_each(check, format_names())


def test_a_template_that_is_saved_is_recognised(coder):
    def check(family, begins):
        form = coder(family).form
        saved = form.saved_template(begins)
        assert "generation -%}" not in saved
        found = chat.identify(saved, LLAMA)
        assert found is not None and found.name == family
        for messages in DIALOGUES:
            (text,), _ = render_jinja_template(
                [messages[:-1]], chat_template=saved, add_generation_prompt=True, **LLAMA
            )
            expected = render_conversation(found.template, messages[:-1])
            assert text == ("<s>" if begins else "") + expected

    check_each(check, format_names(), (True, False))


def test_pairs_share_their_prompt_and_end(coder):
    def check(family):
        made = coder(family)
        row = Preference(tuple(DIALOGUES[1][:-1]), "넷 🙂.", "다섯", "ko", "test:1")
        (pair,), left_out = preference_pairs(made, [row])
        assert not left_out
        for ids, text in ((pair.chosen, row.chosen), (pair.rejected, row.rejected)):
            assert made.tokenizer.decode(ids[-1:]) == made.form.end
            assert made.tokenizer.decode(ids[:-1]).strip() == text
            whole = dialogue_examples(made, [as_row(row.with_answer(text))])[0][-1]
            assert (*pair.prompt, *ids) == whole.ids

    check_each(check, format_names())


def test_what_is_too_long_is_left_out(coder):
    rows = [as_row(DIALOGUES[0]), as_row(talk("long " * 60, "answer"))]
    examples, left_out = dialogue_examples(coder("solar", n_ctx=64), rows)
    assert (len(examples), left_out) == (1, 1)


def test_a_special_token_in_a_message_is_refused(coder):
    with pytest.raises(UsageError, match=r"test:1: .*special token </s>"):
        dialogue_examples(coder("solar"), [as_row(talk("Hi", "Bye</s> now"))])


def test_a_format_whose_tokens_are_missing_is_refused():
    vocabulary = {"<s>": 1, "</s>": 2}
    with pytest.raises(UsageError, match=r"chatml needs the token <\|im_end\|>"):
        known_format("chatml", LLAMA, vocabulary)
    with pytest.raises(UsageError, match="no chat format 'nonsense'"):
        known_format("nonsense", LLAMA, vocabulary)
    with pytest.raises(UnsupportedError, match="names no end-of-text token"):
        known_format("solar", {"bos_token": "<s>"}, vocabulary)


# A checkpoint's own template, of a format that is not known

OWN = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% else %}"
    "{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_an_own_template_with_marks_is_taken(coder):
    form = own_format(OWN, LLAMA, ["<s>", "</s>"])
    assert (form.end, form.front) == ("</s>", "<s>")
    made = Coder(form, coder("solar").tokenizer, 1, 512)
    (example,), _ = dialogue_examples(made, [as_row(DIALOGUES[0])])
    assert example.ids.count(1) == 1
    learnt = [i for i in example.labels if i != IGNORED]
    assert made.tokenizer.decode(learnt) == "Air scatters blue light most.</s>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (OWN.replace("{% generation %}", "").replace("{% endgeneration %}", ""), "no {% gener"),
        (
            OWN.replace("{{ eos_token }}{% endgeneration %}", "{% endgeneration %}{{ eos_token }}"),
            "would never stop",
        ),
    ],
)
def test_an_own_template_without_marks_is_refused(folder, template, message, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").write_text(template)
    with pytest.raises(UnsupportedError, match=message):
        find_format(copy, _config(), None)


def test_a_template_that_never_ends_is_refused(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    slow = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (copy / "chat_template.jinja").write_text(slow + OWN)
    with pytest.raises(UnsupportedError, match="takes too long"):
        find_format(copy, _config(), None)


def test_which_format_a_checkpoint_gets(folder, tmp_path):
    assert find_format(folder, _config(), None)[0].name == "solar"
    assert find_format(folder, _config(), "zephyr")[0].name == "zephyr"
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").write_text(jinja("zephyr"))
    assert find_format(copy, _config(), None)[0].name == "zephyr"
    with pytest.raises(UsageError, match=r"template of its own \(zephyr\)"):
        find_format(copy, _config(), "solar")


def _config():
    from dus_edge.checkpoint.config import parse_config

    from .conftest import TINY

    return parse_config(TINY | {"vocab_size": 4096 + len(TOKENS)})
