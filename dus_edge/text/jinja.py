"""Chat templates run: a stranger's program in Jinja, in a process that is held short.

Jinja's sandbox keeps a template from the machine, not from its time and memory: loops, powers and
doubled strings have no bound in it. So templates run in a child process with two seconds of
processor time and one gigabyte.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache, lru_cache
from typing import Any

_Message = Mapping[str, Any]

# Templates that ask for today's date get the day that Llama 3.1's falls back to, so that a
# template gives the same text on every day.
_TODAY = datetime(2024, 7, 26)
#: Another day, to see whether a template writes the date.
_OTHER_DAY = datetime(2001, 1, 1)
#: Stands for the begin-of-text token while a template runs: the token's own text may also be
#: what a format begins with (SmolLM2's is `<|im_start|>`), and only the token is left out.
_BEGIN = "\ue000begin\ue000"
#: What a template may take: seconds of processor time, seconds in all, bytes of memory and of text.
CPU_S, WALL_S, MEMORY_BYTES, TEXT_BYTES = 2, 20, 1 << 30, 1 << 22


class TemplateRefusal(ValueError):
    """A chat template gives no prompt for a conversation; the text says why, in a few words."""


def render_prompt(
    jinja_template: str,
    messages: Sequence[_Message],
    special_tokens: Mapping[str, str],
    **more: Any,
) -> str:
    """The prompt that a model is given to answer to, as transformers' `apply_chat_template` has it.

    `bos_token` stays where the template puts it, and today is today. Computed in a process of its
    own.

    Args:
        jinja_template: the model's.
        messages: roles and contents.
        special_tokens: texts by role: ``bos_token``, ``eos_token``, …
        more: what else the template can read, such as ``tools``; JSON.

    Raises:
        TemplateRefusal: the template refuses the conversation, fails, or takes more than it may.
    """
    task = {
        "template": jinja_template,
        "messages": [dict(message) for message in messages],
        "tokens": {"tools": None, "documents": None, **dict(special_tokens), **more},
    }
    found = _run_apart("prompt_task", task)
    if found is None:
        raise TemplateRefusal("it takes more time or memory than a template may")
    if "text" not in found:
        raise TemplateRefusal(found["refused"])
    return found["text"]


def prompt_task() -> None:
    """The child of `render_prompt`: a task on standard input, a text or a reason on output."""
    _hold_short()
    task = json.load(sys.stdin)
    try:
        text = _compiled(task["template"]).render(
            messages=task["messages"],
            add_generation_prompt=True,
            strftime_now=datetime.now().strftime,
            **task["tokens"],
        )
    except Exception as e:  # a stranger's program may raise anything
        reason = str(e).strip().partition("\n")[0] or type(e).__name__
        json.dump({"refused": reason[:300]}, sys.stdout)
        return
    if len(text) > TEXT_BYTES:
        sys.exit(1)
    json.dump({"text": text}, sys.stdout)


def render_apart(
    jinja_template: str,
    talks: Sequence[Sequence[_Message]],
    special_tokens: Mapping[str, str],
    *,
    other_day: bool = False,
) -> list[str | None] | None:
    """What `render_jinja` gives for each conversation, computed in a process of its own.

    Args:
        jinja_template: a checkpoint's.
        talks: conversations.
        special_tokens: texts by role: ``bos_token``, ``eos_token``, …
        other_day: whether it is another day than the fixed one.

    Returns:
        the texts; None if the template takes more than it may.
    """
    task = {
        "template": jinja_template,
        "talks": [[dict(message) for message in talk] for talk in talks],
        "tokens": dict(special_tokens),
        "other_day": other_day,
    }
    return _run_apart("render_task", task)


def _run_apart(name: str, task: Mapping[str, Any]) -> Any:
    """What a function of this module prints for a task, in a process of its own; None if nothing.

    The process is in a group of its own: Ctrl-C in a terminal is for the program alone.
    """
    # -P: a file of the folder that one stands in, a checkpoint maybe, is no module.
    command = [sys.executable, "-P", "-c", f"from {__name__} import {name}; {name}()"]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(task),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=WALL_S,
            start_new_session=True,
        )
        return json.loads(done.stdout) if done.returncode == 0 else None
    except (subprocess.TimeoutExpired, ValueError):
        return None


def render_task() -> None:
    """The child: a task on standard input, texts on standard output."""
    _hold_short()
    task = json.load(sys.stdin)
    tokens = task["tokens"]
    if task["other_day"]:
        # llama.cpp gives Llama 3.1's template the day by this name.
        tokens |= {"date_string": _OTHER_DAY.strftime("%d %b %Y")}
        _environment().globals["strftime_now"] = _OTHER_DAY.strftime
    texts = [render_jinja(task["template"], talk, tokens) for talk in task["talks"]]
    if sum(len(text) for text in texts if text) > TEXT_BYTES:
        sys.exit(1)
    json.dump(texts, sys.stdout)


def _hold_short() -> None:
    """Limit this process; where a system has no such limits, the parent watches the clock."""
    try:
        import resource
    except ImportError:
        return
    import jinja2.sandbox  # noqa: F401 - counts before the limits, not within them

    for what, most in ((resource.RLIMIT_CPU, CPU_S), (resource.RLIMIT_AS, MEMORY_BYTES)):
        try:
            resource.setrlimit(what, (most, most))
        except (ValueError, OSError):  # a system that does not let them be set
            continue


def render_jinja(
    jinja_template: str, messages: Sequence[_Message], special_tokens: Mapping[str, str]
) -> str | None:
    """The prompt a chat template makes, without `bos_token` at its front; None if it fails.

    The environment is that of transformers (`utils/chat_template_utils.py`), except that
    today is a fixed day. A checkpoint's template is a stranger's program: it runs in Jinja's
    sandbox, and whatever it raises counts as a refusal.
    """
    begin = special_tokens.get("bos_token")
    tokens = {**special_tokens, "bos_token": _BEGIN} if begin else special_tokens
    try:
        text = _compiled(jinja_template).render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **tokens,
        )
    except Exception:  # see above
        return None
    return text.removeprefix(_BEGIN).replace(_BEGIN, begin or "")


@lru_cache(maxsize=8)
def _compiled(jinja_template: str):
    return _environment().from_string(jinja_template)


@cache
def _environment():
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks an answer for training; its text passes as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = _TODAY.strftime
    return environment
