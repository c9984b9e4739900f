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

from dus_edge.ollama.gotemplate import Message

# Templates that ask for today's date get the day that Llama 3.1's falls back to, so that a
# template gives the same text on every day.
_TODAY = datetime(2024, 7, 26)
#: Stands for the begin-of-text token while a template runs: the token's own text may also be
#: what a format begins with (SmolLM2's is `<|im_start|>`), and only the token is left out.
_BEGIN = "\ue000begin\ue000"
#: What a template may take: seconds of processor time, seconds in all, bytes of memory and of text.
CPU_S, WALL_S, MEMORY_BYTES, TEXT_BYTES = 2, 20, 1 << 30, 1 << 22


def render_apart(
    jinja_template: str,
    talks: Sequence[Sequence[Message]],
    special_tokens: Mapping[str, str],
) -> list[str | None] | None:
    """What `render_jinja` gives for each conversation, computed in a process of its own.

    Returns:
        the texts; None if the template takes more than it may.
    """
    task = {
        "template": jinja_template,
        "talks": [[dict(message) for message in talk] for talk in talks],
        "tokens": dict(special_tokens),
    }
    command = [sys.executable, "-c", f"from {__name__} import render_task; render_task()"]
    try:
        done = subprocess.run(
            command, input=json.dumps(task), capture_output=True, text=True, timeout=WALL_S
        )
        return json.loads(done.stdout) if done.returncode == 0 else None
    except (subprocess.TimeoutExpired, ValueError):
        return None


def render_task() -> None:
    """The child: a task on standard input, texts on standard output."""
    _hold_short()
    task = json.load(sys.stdin)
    texts = [render_jinja(task["template"], talk, task["tokens"]) for talk in task["talks"]]
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
    jinja_template: str, messages: Sequence[Message], special_tokens: Mapping[str, str]
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
