"""Modelfiles: the grammar that Ollama reads, and the texts that we write."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dus_edge.errors import DusEdgeError
from dus_edge.jobs.modelfile import render_tracked
from dus_edge.ollama import chat
from dus_edge.ollama.grammar import (
    Command,
    ModelfileError,
    decode_modelfile,
    parse_modelfile,
    resolve_from,
)
from dus_edge.ollama.modelfile import (
    NUM_CTX_CAP,
    ModelfileSpec,
    for_model,
    licence_text,
    render_modelfile,
)
from dus_edge.ollama.recognise import ChatFormat
from dus_edge.ollama.tracked import tracked_modelfiles
from dus_edge.quant.recipe import PRESETS

TRACKED = Path(__file__).parent.parent / "modelfiles"


def read(text):
    """The commands after a FROM line, as (name, key, value)."""
    commands = parse_modelfile("FROM m\n" + text)
    return [(command.name, command.key, command.value) for command in commands[1:]]


def refuse(text, match):
    with pytest.raises(ModelfileError, match=match):
        parse_modelfile(text)


# --- the grammar ------------------------------------------------------------------------


def test_commands_in_any_case():
    assert parse_modelfile("fRoM a b\nSystem hi") == [
        Command("from", "a b", 1),
        Command("system", "hi", 2),
    ]


def test_unknown_commands():
    refuse("FROM m\nTEMPALTE x", r"Line 2: 'TEMPALTE' is not a command")
    refuse('FROM m\nSYSTEM"""x"""', r"Line 2")
    refuse("FROM\n", r"Line 1")
    refuse("FROM", r"Line 1: FROM has no value")


def test_from_is_required():
    refuse("", "no FROM")
    refuse("SYSTEM hi\n# FROM m", "no FROM")


def test_comments_stand_only_where_a_command_could():
    assert read("# a\n  \t# b\nSYSTEM x") == [("system", None, "x")]
    assert read('SYSTEM """a\n# b\n"""') == [("system", None, "a\n# b\n")]


def test_a_trailing_comment_joins_the_value():
    assert read("PARAMETER stop a # b") == [("parameter", "stop", "a # b")]
    assert parse_modelfile("FROM m # base")[0].value == "m # base"
    refuse("FROM m\nPARAMETER num_ctx 4096 # tokens", "Line 2: num_ctx takes a whole number")


def test_values_are_trimmed_outside_quotes_only():
    assert read("SYSTEM  \t a  b \t") == [("system", None, "a  b")]
    assert read('SYSTEM " a "') == [("system", None, " a ")]
    assert read('SYSTEM """\n a\n"""  ') == [("system", None, "\n a\n")]


def test_there_are_no_escapes_and_no_single_quotes():
    assert read(r'SYSTEM "a\n\"b"') == [("system", None, r"a\n\"b")]
    assert read("SYSTEM 'a'") == [("system", None, "'a'")]


def test_a_quoted_value_ends_at_the_first_line_end_after_its_quote():
    assert read('SYSTEM "a\nb" c\nd"') == [("system", None, 'a\nb" c\nd')]
    refuse('FROM m\nSYSTEM """a"""\nb"""', "Line 3: 'b\"' is not a command")


def test_a_value_that_begins_with_a_quote_swallows_lines():
    assert read('SYSTEM "Hi" he said\nPARAMETER num_ctx 1\nSYSTEM "x"') == [
        ("system", None, 'Hi" he said\nPARAMETER num_ctx 1\nSYSTEM "x')
    ]


def test_unclosed_quotes():
    refuse('FROM m\n\nSYSTEM """a\nb', "Line 3: the quote that opens")
    refuse('FROM m\nSYSTEM "', "Line 2: the quote that opens")


def test_characters_that_ollama_drops():
    assert read("SYSTEM a\u00a0b\u200bc\x07d\u2028e") == [("system", None, "abcde")]
    assert read("SYSTEM 한국어 é 🙂") == [("system", None, "한국어 é 🙂")]


def test_line_ends_and_encodings():
    assert parse_modelfile("FROM m\r\nSYSTEM x\r\n")[1] == Command("system", "x", 2)
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert parse_modelfile(decode_modelfile("FROM é".encode(encoding)))[0].value == "é"
    assert decode_modelfile(b"FROM \xff") == "FROM \ufffd"


def test_parameters_have_types():
    assert read("PARAMETER num_ctx 4096\nPARAMETER temperature 1\nPARAMETER use_mmap True") == [
        ("parameter", "num_ctx", 4096),
        ("parameter", "temperature", 1.0),
        ("parameter", "use_mmap", True),
    ]
    for bad in (
        "num_ctx 4096.0",
        "num_ctx 4_096",
        "num_ctx 99999999999999999999",
        "temperature hot",
        "temperature 1e39",
        "use_mmap yes",
    ):
        refuse(f"FROM m\nPARAMETER {bad}", "Line 2: .* takes")


def test_parameter_names():
    refuse("FROM m\nPARAMETER tfs_z 1", "unknown parameter 'tfs_z'")
    refuse("FROM m\nPARAMETER Num_Ctx 1", "unknown parameter 'Num_Ctx'")
    refuse("FROM m\nPARAMETER  num_ctx 1", "unknown parameter ''")
    refuse("FROM m\nPARAMETER num_ctx=1", "must be followed by a blank")
    refuse("FROM m\nPARAMETER num_ctx", "must be followed by a blank")
    refuse("FROM m\nPARAMETER system x", "unknown parameter 'system'")


def test_a_dropped_parameter_is_marked():
    command = parse_modelfile("FROM m\nPARAMETER mirostat two")[1]
    assert command.ignored and command.key == "mirostat" and command.value == "two"


def test_repeats_are_all_kept_in_order():
    assert [value for _, _, value in read("PARAMETER stop a\nPARAMETER stop b\nSYSTEM c")] == [
        "a",
        "b",
        "c",
    ]


def test_messages_have_a_role():
    assert read('MESSAGE user """a: b\nc"""') == [("message", "user", "a: b\nc")]
    for bad in ("bot hi", "User hi", "user: hi", "user"):
        refuse(f"FROM m\nMESSAGE {bad}", "Line 2")


def test_requires_is_a_version():
    assert read("REQUIRES 0.14.0") == [("requires", None, "0.14.0")]
    refuse("FROM m\nREQUIRES new", "Line 2: REQUIRES")


def test_from_is_relative_to_the_modelfile(tmp_path, monkeypatch):
    (tmp_path / "modelfiles").mkdir()
    (tmp_path / "build").mkdir()
    gguf = tmp_path / "build" / "m.gguf"
    gguf.write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    modelfile = tmp_path / "modelfiles" / "solar"
    assert resolve_from(modelfile, "../build/m.gguf").samefile(gguf)
    assert resolve_from(modelfile, str(gguf)) == gguf
    assert resolve_from(modelfile, "build/m.gguf") is None  # right only from the working directory
    assert resolve_from(modelfile, "llama3") is None


def test_from_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert resolve_from(Path("Modelfile"), "~/m.gguf") == tmp_path / "m.gguf"


def test_from_a_folder_is_refused(tmp_path):
    """Ollama would fail on the .json beside the GGUF, and without it take any GGUF."""
    for name in ("a.gguf", "config.json"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelfileError, match=r"name the one \.gguf file"):
        resolve_from(tmp_path / "Modelfile", ".")


# --- rendering --------------------------------------------------------------------------

SPEC = ModelfileSpec(
    from_path="../build/m.gguf",
    template='{{ "\\n" }}{{ range .Messages }}{{ .Content }}{{ end }}\n',
    system=' Be "brief".\n\n짧게. ',
    parameters=(
        ("num_ctx", 4096),
        ("temperature", 1e-05),
        ("use_mmap", False),
        ("stop", "### User:"),
        ("stop", 'a "quoted" stop\n'),
    ),
    licence="Apache License\n\n  1. Terms",
    comment=("What it is.", "Two\nlines, and\n\nFROM elsewhere"),
    messages=(("user", "Hi"), ("assistant", "role: text")),
)


def said(spec):
    """What `SPEC` should be read as, written out apart from the code under test."""
    return [
        ("from", None, "../build/m.gguf"),
        ("parameter", "num_ctx", 4096),
        ("parameter", "temperature", 1e-05),
        ("parameter", "use_mmap", False),
        ("parameter", "stop", "### User:"),
        ("parameter", "stop", 'a "quoted" stop\n'),
        ("template", None, spec.template),
        ("system", None, spec.system),
        ("message", "user", "Hi"),
        ("message", "assistant", "role: text"),
        ("license", None, spec.licence),
    ]


def parsed(text):
    return [(command.name, command.key, command.value) for command in parse_modelfile(text)]


def test_what_is_written_is_read_again():
    assert parsed(render_modelfile(SPEC)) == said(SPEC)


def test_none_leaves_a_command_out():
    bare = ModelfileSpec("m.gguf", None, None, (), None, ())
    assert render_modelfile(bare) == "FROM m.gguf\n"


@pytest.mark.parametrize("path", ["a b.gguf", '"m".gguf', " m.gguf", "m.gguf ", "~/m # 1.gguf"])
def test_from_paths(path):
    assert parsed(render_modelfile(replace(SPEC, from_path=path)))[0] == ("from", None, path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"system": "no\u00a0break"}, r"SYSTEM holds the character U\+00A0"),
        ({"system": "\ufeffx"}, r"U\+FEFF"),
        ({"licence": "page\x0c"}, r"LICENSE holds the character U\+000C"),
        ({"template": 'a """\nb'}, "TEMPLATE has a line that ends in three quotes"),
        ({"template": '"""  \nb'}, "three quotes"),
        ({"template": ""}, "empty TEMPLATE"),
        ({"from_path": ""}, "names no file"),
        ({"from_path": "m\u200b.gguf"}, r"U\+200B"),
        ({"parameters": (("num_ctx", 4096.0),)}, "whole number"),
        ({"parameters": (("num_ctx", True),)}, "whole number"),
        ({"parameters": (("num_gqa", 8),)}, "unknown parameter"),
        ({"parameters": (("mirostat", 1),)}, "read back"),
        ({"parameters": (("stop", "\x1b"),)}, "parameter stop holds"),
        ({"messages": (("bot", "x"),)}, "role"),
    ],
)
def test_what_the_grammar_cannot_carry_is_refused(change, match):
    with pytest.raises(ModelfileError, match=match):
        render_modelfile(replace(SPEC, **change))


def test_text_may_end_in_quotes():
    for text in ('"', '""', '"""', 'a"""', '"""a', '"a"', "'"):
        assert parsed(render_modelfile(replace(SPEC, system=text)))[-4][2] == text


ANY_TEXT = st.one_of(
    st.text(),
    st.text(st.sampled_from(list('"#\\ \t\r\nab{}한\u00a0')), max_size=30),
)


@given(template=ANY_TEXT, system=ANY_TEXT, licence=ANY_TEXT, stop=ANY_TEXT, path=ANY_TEXT)
def test_any_text_is_carried_or_refused(template, system, licence, stop, path):
    spec = ModelfileSpec(path, template, system, (("stop", stop),), licence, (system,))
    try:
        text = render_modelfile(spec)
    except DusEdgeError:
        return
    assert parsed(text) == [
        ("from", None, path),
        ("parameter", "stop", stop),
        ("template", None, template),
        ("system", None, system),
        ("license", None, licence),
    ]


@given(st.text(st.characters(exclude_categories=("C", "Z")), min_size=1))
def test_text_that_prints_is_carried(text):
    spec = replace(SPEC, template=text, system=f"{text}\n{text[:-1]}.\n")
    lines_end_in_quotes = text.endswith('"""')
    if lines_end_in_quotes:
        with pytest.raises(ModelfileError):
            render_modelfile(spec)
    else:
        assert parsed(render_modelfile(spec)) == said(spec)


# --- what we say of a model -------------------------------------------------------------


def model(**changes):
    given = {
        "from_path": "m.gguf",
        "context_length": 32768,
        "chat_format": None,
        "licence": "apache-2.0",
        "title": "A model",
    }
    return for_model(**{**given, **changes})


def chat_format(family, stops):
    return ChatFormat(family, family is not None, stops, None, (), (), False)


def values(spec, name):
    return [value for key, value in spec.parameters if key == name]


def test_a_base_model_states_its_template_and_its_stop():
    spec = model(eos_token="<|end_of_text|>")
    assert spec.template == chat.template_text("completion.gotmpl")
    assert values(spec, "stop") == ["<|end_of_text|>"]


@pytest.mark.parametrize("family", chat.families(), ids=lambda family: family.name)
def test_every_family_can_be_written(family):
    spec = model(chat_format=chat_format(replace(family, system="Be kind."), family.stops))
    text = render_modelfile(spec)
    assert ("template", None, family.template) in parsed(text)
    assert ("system", None, "Be kind.") in parsed(text)
    assert values(spec, "stop") == list(family.stops)
    assert family.title in " ".join(text.split()).replace("# ", "")


def test_an_unknown_chat_template_is_left_to_ollama_and_said_so():
    spec = model(chat_format=chat_format(None, ("</s>",)))
    assert spec.template is None and values(spec, "stop") == ["</s>"]
    assert "# Chat format: unknown." in render_modelfile(spec)


def test_a_stop_that_a_modelfile_cannot_carry_is_left_out():
    spec = model(chat_format=chat_format(None, ("</s>", "<\u200b>")))
    assert values(spec, "stop") == ["</s>"]


def test_num_ctx_is_the_models_up_to_a_cap():
    assert values(model(), "num_ctx") == [NUM_CTX_CAP]
    assert "4096 of the model's 32768" in " ".join(model().comment)
    assert values(model(context_length=512), "num_ctx") == [512]
    assert values(model(num_ctx_cap=16384), "num_ctx") == [16384]


def test_licences():
    assert licence_text("Apache-2.0").startswith("Apache License, Version 2.0 (apache-2.0)\nhttps")
    assert licence_text("bespoke-1") == "bespoke-1"
    assert licence_text("A\u00a0B\x0c\nC") == "A B\nC"
    for unknown in (None, "", "other", "unknown"):
        spec = model(licence=unknown)
        assert spec.licence is None
        assert "# Licence: unknown." in render_modelfile(spec)


# --- the tracked files ------------------------------------------------------------------


def test_tracked_files_are_what_we_render():
    """`dus-edge modelfile` writes them again after a change."""
    written = {path.name: path.read_bytes().decode() for path in TRACKED.glob("solar*")}
    assert written == tracked_modelfiles()


def test_write_tracked(tmp_path):
    paths = render_tracked(tmp_path / "modelfiles")
    assert {path.name: path.read_bytes().decode() for path in paths} == tracked_modelfiles()


def test_tracked_set():
    texts = tracked_modelfiles()
    names = {"solar", "solar-instruct", *(f"solar-{preset}" for preset in PRESETS)}
    assert set(texts) == names
    for name, text in texts.items():
        commands = parsed(text)
        suffix = "" if name in ("solar", "solar-instruct") else name.removeprefix("solar")
        assert commands[0] == ("from", None, f"../build/solar-dus{suffix}.gguf")
        # Bases differ in it: Ollama takes no more than the GGUF's own.
        assert "num_ctx" not in {key for _, key, _ in commands}
        comment = " ".join(text.replace("\n#", "").split())
        quant = f" QUANT={suffix[1:]}" if suffix else ""
        # llama-quantize refuses these without a matrix, and so do we.
        quant += " IMATRIX=auto" if suffix[1:4] == "iq2" else ""
        assert f"Make the GGUF first: make gguf{quant}; " in comment
        assert f"-f modelfiles/{name}" in comment
        assert any(key == "stop" for _, key, _ in commands)
        family = "solar" if name == "solar-instruct" else "completion"
        assert ("template", None, chat.template_text(f"{family}.gotmpl")) in commands
