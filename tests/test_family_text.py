"""How each family reads text: token ids and chat prompts, against tokenizers and transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from dus_edge.families.family import load_families
from dus_edge.jobs.export.gguf import export_gguf
from dus_edge.ollama.gotemplate import render_conversation
from dus_edge.ollama.grammar import parse_modelfile
from dus_edge.quant.recipe import PRESETS
from dus_edge.text.jinja import render_jinja
from dus_edge.upscale.model import plan_chooser

from .cases import check_each
from .family_models import FAMILY_FORMS
from .family_texts import TEXT_CASES, TextCase, write_text_model
from .format_cases import FORMATS, FormatCase
from .gguf_cases import SILENT
from .test_chat_formats import KNOWN, reference
from .test_chat_templates import TALKS
from .vocab_cases import TEXTS, LlamaVocab, corpus

FORMAT_CASES = {case.name: case for case in (*KNOWN, *FORMATS)}
#: With lines of code and prose: words of other scripts are left out for some.
MANY = list(dict.fromkeys([*TEXTS, *corpus()[::3]]))
AS_IT_IS = plan_chooser(None, None, (), False)

assert SILENT, "llama.cpp's log would fill the screen"

Get = Callable[[TextCase], tuple[Path, Tokenizer]]


@pytest.fixture(scope="module")
def made(tmp_path_factory, vocab_lines) -> Get:
    """Make a case's checkpoint once: its folder, and its tokenizer as the library reads it."""
    done: dict[str, tuple[Path, Tokenizer]] = {}

    def get(case: TextCase) -> tuple[Path, Tokenizer]:
        if case.name not in done:
            folder = tmp_path_factory.mktemp("texts") / case.name
            done[case.name] = folder, write_text_model(case, folder, vocab_lines)
        return done[case.name]

    return get


@pytest.fixture
def exported(tmp_path) -> Iterator[Callable[[Path], tuple[LlamaVocab, str]]]:
    """Export a folder: llama.cpp with the vocabulary of the GGUF, and the Modelfile's text."""
    opened: list[LlamaVocab] = []

    def export(folder: Path) -> tuple[LlamaVocab, str]:
        out = tmp_path / f"out-{len(opened)}"
        (written,) = export_gguf(str(folder), AS_IT_IS, [PRESETS["f16"]], out).outputs
        opened.append(LlamaVocab(written.path))
        return opened[-1], written.path.with_suffix(".Modelfile").read_text(encoding="utf-8")

    yield export
    for vocab in opened:
        vocab.free()


def test_every_family_is_here() -> None:
    forms = {case.form: FAMILY_FORMS.get(case.form) for case in TEXT_CASES}
    assert {form.family if form else name for name, form in forms.items()} == set(load_families())


def test_ids_are_those_of_the_source(made: Get, exported) -> None:
    def check(case: TextCase) -> None:
        folder, tokenizer = made(case)
        llama, _ = exported(folder)
        texts = [text for text in MANY if not case.differs(text)]
        assert len(texts) >= 400
        for text in [*texts, *(t for t in case.special_texts if not case.differs(t))]:
            for special in (False, True):
                tokenizer.encode_special_tokens = not special
                ids = tokenizer.encode(text).ids
                assert ids == llama.encode(text, add_special=True, parse_special=special), text

    check_each(check, TEXT_CASES)


def check_prompts(case: TextCase, chat: FormatCase, made: Get, exported) -> None:
    folder, tokenizer = made(case)
    (folder / "chat_template.jinja").write_text(chat.template, encoding="utf-8")
    llama, text = exported(folder)
    commands = {command.name: command.value for command in parse_modelfile(text)}
    # What is left to the Jinja in the GGUF says so, and says why.
    assert ("template" not in commands) is chat.left
    assert "own chat template, which Ollama" in re.sub(r"\n# +", " ", text) or not chat.left
    tokenizer.encode_special_tokens = False
    for conversation in TALKS:
        wanted = reference(chat, conversation)
        if chat.dated:  # today is not the day that the Go template has
            wanted = render_jinja(chat.template, conversation, chat.tokens)
        if wanted is None:
            assert conversation[0]["role"] == "system"
            continue
        if "template" in commands:
            system = commands.get("system")
            if system is not None and conversation[0]["role"] != "system":
                conversation = [{"role": "system", "content": system}, *conversation]
            assert render_conversation(str(commands["template"]), conversation) == wanted
        ids = llama.encode(wanted, add_special=True, parse_special=True)
        begin = case.bos or ""
        assert ids == tokenizer.encode(begin + wanted, add_special_tokens=False).ids, wanted


def test_prompts_are_those_of_the_source(made: Get, exported) -> None:
    pairs = [(case, FORMAT_CASES[name]) for case in TEXT_CASES for name in case.formats]
    assert {case.form for case, _ in pairs} == {case.form for case in TEXT_CASES}
    check_each(lambda pair: check_prompts(*pair, made, exported), pairs)
