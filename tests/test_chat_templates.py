"""Chat formats: what a checkpoint's Jinja renders is what our Go template renders."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from dus_edge.ollama import chat
from dus_edge.ollama.gotemplate import GoTemplateError, render, render_conversation
from dus_edge.text.jinja import render_jinja

DATA = Path(__file__).parent / "data"
LLAMA = {"bos_token": "<s>", "eos_token": "</s>"}
LLAMA3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
CHATML = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
#: Of the published checkpoint; the begin-of-text token is what every message begins with.
SMOLLM2 = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|im_end|>",
}

SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
# file, the tokenizer's special tokens, family, system message of the template's own
CHECKPOINTS = [
    ("solar-instruct", LLAMA, "solar-upstage", None),
    ("solar-plain", LLAMA, "solar-plain", None),
    ("llama-2-chat", LLAMA, "llama2", None),
    ("mistral-instruct-v0.1-2023", LLAMA, "mistral-v0.1", None),
    ("mistral-instruct-v0.2-2023", LLAMA, "mistral-v0.2", None),
    ("mistral-instruct-v0.2", LLAMA, "mistral", None),
    ("mistral-instruct-v0.3", LLAMA, "mistral-v0.3", None),
    ("openhermes-2.5", LLAMA, "chatml", None),
    ("smollm2-instruct", SMOLLM2, "chatml", SMOLLM),
    ("qwen2-instruct", CHATML, "chatml", "You are a helpful assistant."),
    ("zephyr", LLAMA, "zephyr", None),
    ("tinyllama-chat", LLAMA, "zephyr", None),
    ("llama-3-instruct", LLAMA3, "llama3", None),
    ("llama-3.1-instruct", LLAMA3, "llama3.1", None),
    ("llama-3.2-instruct", LLAMA3, "llama3.1", None),
    ("alpaca", LLAMA, "alpaca", None),
]
REFUSES_SYSTEM = {"mistral-instruct-v0.1-2023", "mistral-instruct-v0.2-2023"}


def talk(*contents, system=None):
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)
    ]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


# Other conversations than the probes that `identify` itself compares.
TALKS = [
    talk("Why is the sky blue?"),
    talk("안녕하세요, SOLAR는 무엇인가요?", "깊이를 늘린 모형입니다.", "몇 층인가요?"),
    talk("1", "2", "3", "4", "5", "6", "7"),
    talk('Braces {{ .System }} and {% raw %}, "quotes", <tags> & `ticks`\nin\n\nlines'),
    talk("Hi", system="You are a pirate."),
    talk("하나", "둘", "셋", system="숫자만 말하세요.\n\n짧게."),
    talk("one", "two", "three", "four", "five", system="Count."),
]


def jinja(name):
    return (DATA / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "tokens", "family", "system"), CHECKPOINTS)
def test_known_checkpoints_are_recognised_and_render_alike(name, tokens, family, system):
    found = chat.identify(jinja(name), tokens)
    assert (found.name, found.system) == (family, system)
    for conversation in TALKS:
        text = render_jinja(jinja(name), conversation, tokens)
        has_system = conversation[0]["role"] == "system"
        if has_system and name in REFUSES_SYSTEM:
            assert text is None
            continue
        if not has_system and system:  # as Ollama does with a Modelfile's SYSTEM
            conversation = [{"role": "system", "content": system}, *conversation]
        assert render_conversation(found.template, conversation) == text


def test_every_family_is_covered_by_a_checkpoint_or_is_the_reference():
    assert {f.name for f in chat.families()} == {c[2] for c in CHECKPOINTS} | {"solar"}


def test_no_two_families_render_alike():
    texts = [
        tuple(render_conversation(family.template, conversation) for conversation in TALKS)
        for family in chat.families()
    ]
    assert len(set(texts)) == len(texts)


def test_solar_reference():
    text = render_conversation(chat.family("solar").template, talk("U", "A", "V", system="S"))
    assert text == (
        "### System:\nS\n\n### User:\nU\n\n### Assistant:\nA</s>\n\n"
        "### User:\nV\n\n### Assistant:\n"
    )
    assert chat.family("solar").stops == ("### System:", "### User:", "### Assistant")


def test_no_template_begins_with_the_token_that_the_tokenizer_adds():
    for family in chat.families():
        for conversation in TALKS:
            assert not render_conversation(family.template, conversation).startswith("<s>")


def test_a_base_model_gets_its_text_as_it_is():
    completion = chat.template_text("completion.gotmpl")
    assert render_conversation(completion, talk("Once upon a time")) == "Once upon a time"
    assert render_conversation(completion, talk("Once", " upon", " a")) == "Once upon a"
    assert render_conversation(completion, talk("Once", system="A tale.")) == "A tale.\n\nOnce"


def test_ollama_joins_neighbours_of_one_role():
    conversation = [*talk("a"), *talk("b", "c")]
    assert render_conversation("{{ range .Messages }}[{{ .Content }}]{{ end }}", conversation) == (
        "[a\n\nb][c]"
    )


# 79 and 18 edits from a template of Ollama's index (chatml, zephyr), which below 100 Ollama
# would take in their place; what they render is neither.
ROLE_TAGS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
USER_ASSISTANT = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ 'User: ' + message['content'] }}
{% elif message['role'] == 'assistant' %}
{{ 'Assistant: ' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ 'Assistant:' }}
{% endif %}
{% endfor %}"""
CONTENT_ONLY = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("template", [ROLE_TAGS, USER_ASSISTANT, CONTENT_ONLY, jinja("tulu-3")])
def test_other_formats_are_unknown(template):
    assert render_jinja(template, TALKS[0], LLAMA) is not None
    assert chat.identify(template, LLAMA) is None


@pytest.mark.parametrize(
    "template",
    [
        None,
        "",
        "{% for m in messages %}",
        "{{ raise_exception('no') }}",
        "{{ messages[0].content.format.__globals__ }}",
        "{{ eos_token + 1 }}",
    ],
)
def test_templates_that_do_not_render_are_unknown(template):
    assert chat.identify(template, LLAMA) is None


def test_one_changed_character_makes_a_format_unknown():
    assert chat.identify(jinja("zephyr").replace("<|user|>", "<|User|>"), LLAMA) is None


def test_a_role_that_only_the_system_probe_shows():
    quiet = jinja("zephyr").replace("message['content'] + eos_token", "'' + eos_token", 2)
    assert chat.identify(quiet, LLAMA) is None


def test_other_token_texts_are_put_in():
    found = chat.identify(jinja("zephyr"), {"bos_token": "<|begin|>", "eos_token": "<|end|>"})
    assert found.name == "zephyr"
    assert "<|end|>" in found.stops and "</s>" not in found.template


def test_a_token_text_that_would_be_a_go_action_is_not_put_in():
    assert chat.identify(jinja("zephyr"), {"bos_token": "<s>", "eos_token": "{{ end }}"}) is None


def test_todays_date_does_not_change_what_is_found():
    assert "strftime_now" in jinja("llama-3.2-instruct")
    assert "26 Jul 2024" in render_jinja(jinja("llama-3.2-instruct"), TALKS[0], LLAMA3)


def test_a_begin_of_text_token_that_a_template_spells_out():
    for begin, known in (("<s>", True), ("", True), ("{{ bos_token }}", True), ("<S>", False)):
        template = jinja("solar-plain").replace("{{ bos_token }}", begin)
        assert bool(chat.identify(template, LLAMA)) is known


def test_generation_marks_pass_their_text():
    marked = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n\n"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "<|im_start|>assistant\n\n"
    )
    assert chat.identify(marked, CHATML).name == "chatml"


def test_the_jinja_environment_is_that_of_transformers():
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    for name, tokens, *_ in CHECKPOINTS:
        if name in REFUSES_SYSTEM or "strftime_now" in jinja(name):
            continue
        expected, _ = utils.render_jinja_template(
            [TALKS[5]], chat_template=jinja(name), add_generation_prompt=True, **tokens
        )
        begin = tokens.get("bos_token", "") if "bos_token" in jinja(name) else ""
        assert render_jinja(jinja(name), TALKS[5], tokens) == expected[0].removeprefix(begin)


# --- the evaluator ----------------------------------------------------------------------

MESSAGES = [{"Role": "user", "Content": "a b"}, {"Role": "assistant", "Content": "ü"}]
SOUND = [
    "a {{- .System }} b",
    "a {{ .System -}} b",
    "a\n\n{{- /* left out */ -}}\n b",
    "{{/* x */}}{{ .Absent }}",
    "{{ if .Absent }}1{{ else if .System }}2{{ else }}3{{ end }}",
    "{{ if not (and .System .Absent) }}1{{ end }}",
    '{{ or .Absent "x" }}{{ and .System "y" }}{{ and .System 0 }}',
    "{{ range $i, $m := .Messages }}{{ $i }}{{ $m.Role }}{{ .Content }}{{ $.System }}{{ end }}",
    "{{ range $m := .Messages }}{{ $m.Content }}{{ end }}",
    '{{ range .Messages }}{{ if eq .Role "user" "x" }}{{ continue }}{{ end }}{{ .Role }}{{ end }}',
    "{{ range .Messages }}{{ .Role }}{{ break }}{{ end }}",
    "{{ range .Absent }}x{{ else }}none{{ end }}",
    "{{ $x := 1 }}{{ range .Messages }}{{ $x = .Role }}{{ end }}{{ $x }}",
    "{{ $x := 1 }}{{ if true }}{{ $x := 2 }}{{ $x }}{{ end }}{{ $x }}",
    "{{ len .Messages }}{{ len (slice .Messages 1) }}{{ len .System }}",
    "{{ range $i, $_ := .Messages }}{{ eq (len (slice $.Messages $i)) 1 }}{{ end }}",
    '{{ "\\n\\"\\\\" }}{{ `raw \\n` }}{{ -3 }}{{ true }}',
    '{{ ne .System "" }}{{ not 0 }}',
    "{ { }} {",
    "{{ if true -}}\n x\n{{- end }}",
]
BROKEN = [
    "{{ if .System }}",
    "{{ end }}",
    "{{ .System",
    "{{ }}",
    "{{ $x }}",
    "{{ $x = 1 }}",
    "{{ nosuch .System }}",
    "{{ range .Messages }}{{ .Nosuch }}{{ end }}",
    "{{ .System.Field }}",
    "{{ eq .System }}",
    "{{ eq 1 .System }}",
    "{{ slice .Messages 9 }}",
    "{{ (len .System }}",
    "{{ len .System) }}",
    "{{ if true }}{{ else }}{{ else }}{{ end }}",
    "{{ m['x'] }}",
    "{{ if true }}{{ $y := 1 }}{{ end }}{{ $y }}",
]


def evaluate(template, messages=MESSAGES, system="sys"):
    return render(template, {"Messages": messages, "System": system, "Response": ""})


def test_broken_templates_are_refused():
    for template in BROKEN:
        with pytest.raises(GoTemplateError):
            evaluate(template)


def test_templates_without_messages_are_refused():
    with pytest.raises(GoTemplateError, match=r"\.Messages"):
        render_conversation("{{ .Prompt }}", TALKS[0])


@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed (no `go` on PATH)")
def test_go_agrees_with_the_evaluator():
    templates = [family.template for family in chat.families()]
    templates += [chat.template_text("completion.gotmpl"), *SOUND, *BROKEN]
    jobs = [{"template": t, "messages": MESSAGES, "system": "sys"} for t in templates]
    for conversation in TALKS:
        messages = [{"Role": m["role"], "Content": m["content"]} for m in conversation]
        system = "\n\n".join(m["content"] for m in conversation if m["role"] == "system")
        jobs += [{"template": t, "messages": messages, "system": system} for t in templates]
    done = subprocess.run(
        ["go", "run", str(DATA / "gotemplate" / "main.go")],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    for job, result in zip(jobs, json.loads(done.stdout), strict=True):
        try:
            text = evaluate(**job)
        except GoTemplateError:
            text = None
        assert text == (None if result["failed"] else result["text"]), job["template"]
