"""`dus-edge chat`: prompts, tokens and answers beside transformers' and llama-cpp-python's own."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import llama_cpp
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from dus_edge.chat.engine import Engine, Sampling, common_prefix
from dus_edge.chat.open import open_chat
from dus_edge.chat.session import Conversation
from dus_edge.chat.stops import StopTexts
from dus_edge.chat.template import ChatTemplate
from dus_edge.chat.terminal import notes_of, talk
from dus_edge.cli.talk.next import after_folder, after_gguf, can_chat
from dus_edge.errors import UnsupportedError, UsageError
from dus_edge.text.jinja import render_prompt

from .cases import ONE_THREAD, check_each
from .chat_models import (
    SOLAR_TEMPLATE,
    STRICT_TEMPLATE,
    chat_folder,
    chat_gguf,
    ending_in,
    with_end_token,
)

GREEDY = Sampling(temperature=0)
TALKS = (
    [{"role": "user", "content": "def add(a, b):"}],
    [{"role": "system", "content": "You count."}, {"role": "user", "content": "하나, 둘?"}],
    [
        {"role": "user", "content": " two  blanks "},
        {"role": "assistant", "content": "x </s> y"},
        {"role": "user", "content": "\tand a tab\n\n"},
    ],
)


def silent(text: str) -> None:
    """Where nobody reads along."""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """A folder that can chat, and the GGUF file of it."""
    folder = chat_folder(tmp_path_factory.mktemp("chat") / "chatty", SOLAR_TEMPLATE)
    return folder, chat_gguf(folder)


@pytest.fixture(scope="module")
def engines(files):
    """Both, loaded: the folder first."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(open_chat(path, 256, 1)[0]) for path in files]


@pytest.fixture(scope="module")
def tokenizer(files):
    return transformers.AutoTokenizer.from_pretrained(files[0])


# The prompt


def test_prompts_and_tokens_are_those_of_transformers(engines, tokenizer):
    def check(engine: Engine, talk: list) -> None:
        text = engine.template.prompt(talk)
        assert text == tokenizer.apply_chat_template(
            talk, tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
        assert engine.encode(text) == ids
        assert ids.count(1) == 1  # one begin-of-text token

    check_each(check, engines, TALKS)


def test_a_begin_token_that_is_a_formats_own_stays(tokenizer):
    """SmolLM2's begin-of-text token is ChatML's `<|im_start|>`."""
    chatml = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' "
        "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% endif %}"
    )
    tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    template = ChatTemplate(chatml, tokens, "here")
    question = [{"role": "user", "content": "Hi"}]
    said = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert template.prompt(question) == said
    assert template.answer_end() == "<|im_end|>\n<|im_start|>user"


def test_what_the_environment_of_templates_has():
    question = [{"role": "user", "content": "Hi"}]
    assert render_prompt("{{ strftime_now('%Y') }}", question, {}) == time.strftime("%Y")
    assert render_prompt("{{ tools }}{{ x }}{{ bos_token }}", question, {}, x=3) == "None3"
    assert render_prompt("{% for x in [1, 2] %}{% break %}{% endfor %}a", question, {}) == "a"


def test_templates_that_refuse_or_never_end_are_refused():
    def check(jinja: str, reason: str) -> None:
        with pytest.raises(UsageError, match=f"^here: the model's chat template.*{reason}"):
            ChatTemplate(jinja, {}, "here").prompt(TALKS[0])
        assert ChatTemplate(jinja, {}, "here").answer_end() == ""

    check("{{ raise_exception('not like this') }}", r"\(not like this\)")
    check("{{ messages[ }}", "unexpected")
    check("{{ ''.__class__.__mro__ }}", "unsafe")
    check("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "time")


def test_a_module_of_the_folder_one_stands_in_is_not_run(tmp_path, monkeypatch):
    (tmp_path / "jinja2.py").write_text("open('run', 'w')")
    monkeypatch.chdir(tmp_path)
    assert render_prompt("{{ messages[0].content }}", [{"role": "user", "content": "x"}], {}) == "x"
    assert not (tmp_path / "run").exists()


# The answer


def test_a_gguf_answers_as_llama_cpp_python_has_it(files, engines):
    model = llama_cpp.Llama(str(files[1]), n_ctx=256, verbose=False, **ONE_THREAD)

    def check(talk: list) -> None:
        found = model.create_chat_completion(
            talk, temperature=0, max_tokens=24, repeat_penalty=1.0
        )["choices"][0]
        system = talk[0]["content"] if talk[0]["role"] == "system" else None
        conversation = Conversation(engines[1], GREEDY, system, 24)
        answer = conversation.ask(talk[-1]["content"], silent)
        assert answer.text == found["message"]["content"]
        assert answer.why == found["finish_reason"]
        assert answer.ran.n_tokens == 24 or answer.why == "stop"

    check_each(check, TALKS[:2])


def test_a_folder_answers_as_transformers_has_it(engines, tokenizer):
    engine = engines[0]
    conversation, said = Conversation(engine, GREEDY, n_most=16), []
    for question in ("def add(a, b):", "And another?"):
        said.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(
            said, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = engine.network.generate(**ids, do_sample=False, max_new_tokens=16, pad_token_id=2)
        answer = conversation.ask(question, silent)
        expected = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer.text == expected
        said.append({"role": "assistant", "content": answer.text})
    assert answer.ran.n_reused > 20


def test_the_cache_changes_no_answer(engines):
    def check(engine: Engine) -> None:
        pieces: list[str] = []
        conversation = Conversation(engine, GREEDY, n_most=12)
        first = conversation.ask("One thing.", pieces.append)
        assert "".join(pieces) == first.text
        second = conversation.ask("Another.", silent)
        assert second.ran.n_reused > first.n_prompt
        assert second.ran.n_reused < second.n_prompt
        engine.answer(engine.encode("something else"), GREEDY, 1, lambda text: True)
        again = Conversation(engine, GREEDY, n_most=12)
        assert again.ask("One thing.", silent).text == first.text
        answer = again.ask("Another.", silent)
        assert answer.text == second.text

    check_each(check, engines)


def test_a_seed_gives_the_same_answer_and_another_another(engines):
    def check(engine: Engine) -> None:
        def answer(seed: int | None) -> str:
            sampling = Sampling(temperature=1.5, top_p=1.0, seed=seed)
            return Conversation(engine, sampling, n_most=16).ask("Go on.", silent).text

        assert answer(3) == answer(3)
        assert len({answer(seed) for seed in (3, 4, 5, None)}) > 1

    check_each(check, engines)


# What ends it


def greedy_ids(engine: Engine, n: int) -> list[int]:
    """Tokens of the greedy answer to the first talk."""
    ids = engine.encode(engine.template.prompt(TALKS[0]))
    out = engine.network.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=n, pad_token_id=2
    )
    return out[0, len(ids) :].tolist()


def test_end_tokens_that_the_files_name_end_an_answer(files, engines, tmp_path, tokenizer):
    ids = greedy_ids(engines[0], 8)
    place = next(i for i in range(2, 8) if ids[i] not in ids[:i])
    folder = chat_folder(tmp_path / "other", SOLAR_TEMPLATE, eos_token_id=[2, ids[place]])
    gguf = with_end_token(files[1], ids[place], tmp_path / "other.gguf")

    def check(path: Path) -> None:
        with open_chat(path, 256, 1)[0] as engine:
            answer = Conversation(engine, GREEDY, n_most=32).ask(TALKS[0][0]["content"], silent)
        assert answer.why == "stop" and answer.ran.n_tokens == place
        assert answer.text.strip() == tokenizer.decode(ids[:place]).strip()

    check_each(check, (folder, gguf))


def test_what_the_template_ends_answers_in_ends_them(engines, tmp_path, tokenizer):
    """A format without a token for it, as Alpaca's was: the end-of-text token may never come."""
    text = tokenizer.decode(greedy_ids(engines[0], 24))
    end = text[6:9]
    assert end == end.strip()
    folder = chat_folder(tmp_path / "plain", ending_in(end))

    def check(path: Path) -> None:
        with open_chat(path, 256, 1)[0] as engine:
            assert engine.stops == (end,)
            pieces: list[str] = []
            answer = Conversation(engine, GREEDY, n_most=64).ask("def add(a, b):", pieces.append)
        assert answer.why == "stop" and end not in answer.text
        assert answer.text == "".join(pieces)
        assert answer.text.strip() == text[: text.index(end)].strip()

    check_each(check, (folder, chat_gguf(folder)))


@given(
    st.text("ab<|>", max_size=30),
    st.lists(st.text("ab<|>", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 5), min_size=30, max_size=30),
)
def test_stops_are_found_however_the_text_is_cut(text, stops, cuts):
    expected, found = text, StopTexts(stops)
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    shown, at = "", 0
    for n in cuts:
        shown += found.feed(text[at : at + n])
        at += n
        assert (expected.startswith(shown)) or found.met
        if found.met:
            break
    # Piece by piece: a stop that is whole first is taken, though a longer one began before it.
    whole = shown + found.rest()
    assert found.met == bool(ends)
    assert text.startswith(whole)
    assert not any(stop in whole for stop in stops)
    if not ends:
        assert whole == text


def test_a_limit_and_a_user_end_an_answer(engines):
    def check(engine: Engine) -> None:
        conversation = Conversation(engine, GREEDY, n_most=5)
        answer = conversation.ask("def add(a, b):", silent)
        assert answer.why == "length" and answer.ran.n_tokens == 5
        assert "cut at --max-tokens" in notes_of(answer, 256)[0]
        asked: list[int] = []

        def wanted() -> bool:
            asked.append(1)
            return len(asked) < 3

        conversation = Conversation(engine, GREEDY)
        answer = conversation.ask("def add(a, b):", silent, wanted)
        assert answer.why == "interrupted" and answer.ran.n_tokens == 3
        assert conversation.n_messages == 2
        assert conversation.ask("Go on.", silent, lambda: False).ran.n_tokens == 1

    check_each(check, engines)


# The context


def test_a_full_context_forgets_the_oldest_and_says_so(files):
    def check(path: Path) -> None:
        with open_chat(path, 256, 1)[0] as engine:
            conversation = Conversation(engine, GREEDY, "You count.", n_most=8)
            dropped = []
            for i in range(12):
                answer = conversation.ask(f"Number {i}, said with a few words more.", silent)
                assert answer.n_prompt + answer.ran.n_tokens <= engine.n_ctx
                dropped.append(answer.n_dropped)
            assert dropped[0] == 0 and max(dropped) == 2
            told = notes_of(answer, engine.n_ctx) if answer.n_dropped else []
            assert not told or "the oldest 2 messages are forgotten" in told[0]
            with pytest.raises(UsageError, match=r"has 256; shorten it, or take a larger --ctx"):
                conversation.ask("word " * 400, silent)
            n = conversation.n_messages
            conversation.ask("Still there?", silent)
            assert conversation.n_messages <= n + 2

    check_each(check, files)


def test_an_answer_ends_where_the_context_does(engines):
    def check(engine: Engine) -> None:
        answer = Conversation(engine, Sampling(2.0, 1.0, 1)).ask("def f(x):" * 20, silent)
        if answer.why != "stop":
            assert answer.why == "context"
            assert answer.n_prompt + answer.ran.n_tokens == engine.n_ctx
            assert notes_of(answer, 256)[0] == (
                "The answer was cut: the context of 256 tokens is full."
            )

    check_each(check, engines)


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix(a, b):
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


# The command


def test_one_prompt_prints_the_answer_alone(run, files, engines):
    def check(path: Path, engine: Engine) -> None:
        args = ("--temp", "0", "--max-tokens", "8", "--ctx", "256", "--threads", "1")
        code, out, err = run("chat", path, "--prompt", "def add(a, b):", *args)
        assert code == 0
        answer = Conversation(engine, GREEDY, n_most=8).ask("def add(a, b):", silent)
        assert out.strip() == answer.text.strip()
        assert "8 tokens" in err and "tok/s" in err
        assert all(len(line) <= 80 for line in err.splitlines())

    for path, engine in zip(files, engines, strict=True):
        check(path, engine)


def test_quantized_folders_talk(run, files, tmp_path):
    made = {
        "bnb": ("bnb", "--no-upscale"),
        "gptq": ("gptq", "--no-upscale", "--bits", "8", "--chunks", "1", "--ctx", "64"),
    }
    for name, command in made.items():
        code, out, err = run(command[0], files[0], *command[1:], "-o", tmp_path / name)
        assert code == 0, err
        assert f"\n  dus-edge chat {tmp_path / name}\n  dus-edge serve " in out
        words = ("--prompt", "def add(a, b):", "--temp", "0", "--max-tokens", "5")
        code, out, err = run("chat", tmp_path / name, *words)
        assert code == 0 and out.strip() and "[5 tokens" in err


def test_what_comes_next(files, tmp_path):
    folder = tmp_path / "a model"
    folder.mkdir()
    assert after_folder(folder, plain=True) == [
        f"dus-edge gguf --no-upscale '{folder}'",
        f"dus-edge serve '{folder}'",
        *after_folder(folder, plain=False)[1:],
    ]
    assert after_folder(folder, plain=False)[-1].startswith(f"hf upload YOU/'a model' '{folder}'")
    assert f"dus-edge chat {files[0]}" in after_folder(files[0], plain=False)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    assert can_chat(folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    assert after_folder(folder, plain=True)[0] == (
        f"dus-edge merge org/base '{folder}' -o 'a model'-merged"
    )
    lines = after_gguf(Path("x.gguf"), ["1", "2", "3", "4", "5"], True)
    assert lines == [
        "3", "4", "5", "dus-edge chat x.gguf", "dus-edge serve x.gguf  # or llama-server -m",
        "lms import --copy x.gguf  # into LM Studio",
    ]  # fmt: skip
    assert len(lines) <= 6


def test_lines_that_are_piped_in_are_messages_and_commands(cli, files):
    lines = "/system Count.\n/system\none\n\n/reset\n/nothing\n/help\n//two\n/exit\nthree\n"
    done = cli("chat", files[1], "--temp", "0", "--max-tokens", "4", "--threads", "1", input=lines)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("[4 tokens") == 2  # "three" comes after /exit
    for said in ("is set.", "Count.", "Forgotten.", "There is no /nothing", "/reset        forget"):
        assert said in done.stderr
    assert "Forgotten" not in done.stdout


def test_models_that_cannot_chat_are_told_in_one_sentence(run, pico, tmp_path):
    plain = chat_folder(tmp_path / "plain", None)
    code, out, err = run("chat", plain, "--prompt", "Hi")
    assert code == UnsupportedError.exit_code and not out
    assert err == (
        f"dus-edge: {plain} has no chat template: it is a base model, which continues text and "
        "answers nobody; name a chat model, or make one with dus-edge sft.\n"
    )
    gguf = chat_gguf(plain)
    code, _, err = run("chat", gguf, "--prompt", "Hi")
    assert code == 3 and f"\ndus-edge: {gguf} has no chat template" in err
    code, _, err = run("chat", tmp_path / "none.gguf", "--prompt", "Hi")
    assert code == 2 and err.count("\n") == 1 and "does not exist" in err
    strict = chat_folder(tmp_path / "strict", STRICT_TEMPLATE)
    code, out, err = run("chat", chat_gguf(strict), "--system", "Be kind.", "--prompt", "Hi")
    assert code == 2 and "(System role not supported)" in err and not out


def test_the_context_is_checked_against_the_models(run, files):
    code, _, err = run("chat", files[1], "--prompt", "x", "--max-tokens", "2", "--ctx", "1024")
    assert code == 0
    assert "a context of 1,024 tokens is beyond the 512" in " ".join(err.split())


def test_what_a_model_writes_cannot_steer_the_terminal(engines, capsys, monkeypatch):
    conversation = Conversation(engines[1], GREEDY)
    monkeypatch.setattr(
        conversation, "ask", lambda q, show, wanted: show(" \x1b[2Ja\tb\n") or real("x", silent)
    )
    real = Conversation(engines[1], GREEDY, n_most=1).ask
    assert talk(conversation, iter(["hello\n"]), interactive=False) == 0  # type: ignore[arg-type]
    assert capsys.readouterr().out == "\\x1b[2Ja\tb\n"


def test_the_first_interrupt_ends_the_answer_alone(engines, capsys, monkeypatch):
    conversation = Conversation(engines[1], GREEDY)
    ask, answers = conversation.ask, []

    def interrupted(question, show, wanted):
        signal.raise_signal(signal.SIGINT)
        answers.append(ask(question, show, wanted))
        return answers[-1]

    monkeypatch.setattr(conversation, "ask", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert talk(conversation, iter(["a\n", "b\n"]), interactive=False) == 0  # type: ignore[arg-type]
    assert [a.why for a in answers] == ["interrupted"] * 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_conversation_in_a_terminal(files):
    main, side = pty.openpty()
    code = "from dus_edge.cli.main import main; main()"
    command = [sys.executable, "-c", code, "chat", str(files[1]), "--temp", "0", "--threads", "1"]
    process = subprocess.Popen(
        command, stdin=side, stdout=side, stderr=side, start_new_session=True
    )
    os.close(side)
    seen = ""

    def until(text: str) -> None:
        nonlocal seen
        end = time.monotonic() + 60
        while text not in seen:
            assert time.monotonic() < end and select.select([main], [], [], 60)[0], seen
            seen += os.read(main, 4096).decode(errors="replace")
        seen = seen.partition(text)[2]

    try:
        until(">>> ")
        os.write(main, b"def add(a, b):\n")
        until("tokens")
        until(">>> ")
        # At the prompt nothing ends. CPython's readline overlooks a signal that comes between
        # drawing the prompt and waiting for a key, until the next; so does a person press again.
        for _ in range(30):
            process.send_signal(signal.SIGINT)
            if select.select([main], [], [], 2)[0]:
                break
        until(">>> ")
        os.write(main, b"/exit\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(main)
