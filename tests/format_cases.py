"""Chat templates of the families of today: published ones that trl carries, and small ones here.

The small ones render text without tools as the published ones do, and are written for these tests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources


@dataclass(frozen=True)
class FormatCase:
    """A checkpoint's template, and what is to be found in it.

    Attributes:
        name: of the case; a template of trl's where `jinja` is empty.
        form: name of the family or form that is found.
        stops: end of turn and end of text, among the stops.
        jinja: the template.
        tokens: the tokenizer's special tokens.
        ends: of `ModelFacts`.
        has: what makes Ollama run the GGUF's own.
        edges: where the Go template differs.
        dated: whether the template writes the date.
        left: whether the Modelfile has no TEMPLATE on purpose.
    """

    name: str
    form: str
    stops: tuple[str, ...]
    jinja: str = ""
    tokens: dict[str, str] = field(default_factory=dict)
    ends: tuple[str, ...] = ()
    has: tuple[str, ...] = ()
    edges: tuple[str, ...] = ()
    dated: bool = False
    left: bool = False

    @property
    def template(self) -> str:
        """The template's text."""
        if self.jinja:
            return self.jinja
        path = resources.files("trl") / "chat_templates" / f"{self.name}.jinja"
        return path.read_text(encoding="utf-8")


GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>"}
PHI3 = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>"}
LLAMA3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
QWEN = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
DEEPSEEK = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
MISTRAL = {"bos_token": "<s>", "eos_token": "</s>"}
GRANITE = {"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>"}
EXAONE = {"bos_token": "[BOS]", "eos_token": "[|endofturn|]"}
OLMO = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
GLM = {"eos_token": "<|endoftext|>"}

_LAST = "{% if add_generation_prompt %}"
#: Adds tools, as published templates have them: nothing for text without.
_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
_ALTERNATE = (
    "{% for m in msgs %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
_CUT = (
    "{% if messages[0].role == 'system' %}{% set sys = messages[0].content %}"
    "{% set msgs = messages[1:] %}{% else %}{% set msgs = messages %}{% endif %}"
)

PHI4 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user<|im_sep|>{{ m.content }}"
    "<|im_end|><|im_start|>assistant<|im_sep|>{% elif m.role == 'system' %}<|im_start|>system"
    "<|im_sep|>{{ m.content }}<|im_end|>{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
PHI4_MINI = (
    "{% for m in messages %}{% if m.role == 'system' and m.tools %}{{ m.tools }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}" + _LAST + "<|assistant|>{% endif %}"
)
NEMO = (
    "{{ bos_token }}" + _TOOLS + _CUT + _ALTERNATE + "{% for m in msgs %}{% if m.role == 'user' %}"
    "[INST]{% if loop.last and sys is defined %}{{ sys }}{{ '\\n\\n' }}{% endif %}{{ m.content }}"
    "[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
SMALL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]{% else %}"
    "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
#: With a default system message that says the day, as 2501 has it.
SMALL_DATED = (
    "{%- set today = strftime_now('%Y-%m-%d') -%}" + _CUT + _ALTERNATE + _TOOLS + "{{ bos_token }}"
    "[SYSTEM_PROMPT]{% if sys is defined %}{{ sys }}{% else %}Knowledge until 2023-10-01. The "
    "current date is {{ today }}.{% endif %}[/SYSTEM_PROMPT]{% for m in msgs %}"
    "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
_GRANITE_TURNS = (
    "{% for m in msgs %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>"
    "{{ '\\n' }}{% endfor %}" + _LAST + "<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
GRANITE3 = _TOOLS + "{% set msgs = messages %}" + _GRANITE_TURNS
#: With a default system message that says the day, as 3.3 has it, and with thoughts.
GRANITE33 = (
    _TOOLS + _CUT + "<|start_of_role|>system<|end_of_role|>{% if sys is defined %}{{ sys }}"
    "{% else %}Today's Date: {{ strftime_now('%B %d, %Y') }}.{% if thinking %}<think></think>"
    "{% endif %}{% endif %}<|end_of_text|>{{ '\\n' }}" + _GRANITE_TURNS
)
EXAONE35 = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}[|system|][|endofturn|]"
    "{{ '\\n' }}{% endif %}[|{{ m.role }}|]{{ m.content }}{% if m.role != 'user' %}[|endofturn|]"
    "{% endif %}{{ '\\n' }}{% endfor %}" + _LAST + "[|assistant|]{% endif %}"
)
SMOLLM3 = (
    _CUT + _TOOLS + "<|im_start|>system\n## Metadata\n\nToday Date: {{ strftime_now('%d %B %Y') }}"
    "\nReasoning Mode: /think\n\n{% if sys is defined %}## Custom Instructions\n\n{{ sys }}"
    "{% endif %}<|im_end|>\n{% for m in msgs %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|im_end|>\n"
    "{% endfor %}" + _LAST + "<|im_start|>assistant\n{% endif %}{# <think> #}"
)
OLMO2 = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    + _LAST
    + "<|assistant|>\n{% endif %}"
)
GLM4 = (
    "[gMASK]<sop>{% for m in messages %}{% if m.content %}<|{{ m.role }}|>\n{{ m.content }}"
    "{% endif %}{% endfor %}" + _LAST + "<|assistant|>\n{% endif %}"
)
SOLAR_PRO = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + _LAST
    + "<|im_start|>assistant\n{% endif %}"
)
#: As Yi-6B-Chat's: nothing around a system message.
YI = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>"
    "\n<|im_start|>assistant\n{% elif m.role == 'system' %}{{ m.content }}{% else %}"
    "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)

_TWO, _EMPTY, _BLANKS, _SYSTEM, _THINK = (
    "two questions",
    "empty system",
    "blanks",
    "system",
    "reasoning",
)
FORMATS = (
    FormatCase(
        "gemma",
        "gemma",
        ("<end_of_turn>", "<eos>"),
        tokens=GEMMA,
        ends=("<eos>",),
        edges=(_SYSTEM, _TWO, _EMPTY, _BLANKS),
    ),
    FormatCase(
        "gemma3",
        "gemma",
        ("<end_of_turn>", "<eos>"),
        tokens=GEMMA,
        ends=("<eos>",),
        edges=(_TWO, _BLANKS),
    ),
    FormatCase(
        "phi3",
        "phi-3",
        ("<|end|>", "<|endoftext|>"),
        tokens=PHI3,
        ends=("<|endoftext|>",),
        edges=(_TWO,),
    ),
    FormatCase(
        "phi3_5",
        "phi-3",
        ("<|end|>", "<|endoftext|>"),
        tokens=PHI3,
        ends=("<|endoftext|>",),
        edges=(_TWO,),
    ),
    FormatCase("llama3", "llama3", ("<|eot_id|>",), tokens=LLAMA3, edges=(_TWO, _BLANKS)),
    FormatCase(
        "llama3_1",
        "llama3.1",
        ("<|eot_id|>", "<|end_of_text|>"),
        tokens=LLAMA3,
        ends=("<|eot_id|>", "<|end_of_text|>"),
        has=("tools",),
        edges=(_TWO, _BLANKS),
        dated=True,
    ),
    FormatCase(
        "llama3_2",
        "llama3.1",
        ("<|eot_id|>",),
        tokens=LLAMA3,
        has=("tools",),
        edges=(_TWO, _BLANKS),
        dated=True,
    ),
    FormatCase(
        "qwen2_5",
        "chatml",
        ("<|im_end|>", "<|endoftext|>"),
        tokens=QWEN,
        ends=("<|im_end|>", "<|endoftext|>"),
        has=("tools",),
        edges=(_TWO,),
    ),
    FormatCase(
        "qwen3",
        "chatml",
        ("<|im_end|>", "<|endoftext|>"),
        tokens=QWEN,
        ends=("<|im_end|>", "<|endoftext|>"),
        has=("tools", "thinking"),
        edges=(_TWO, _THINK),
    ),
    FormatCase(
        "qwen3_instruct_2507",
        "chatml",
        ("<|im_end|>",),
        tokens=QWEN,
        has=("tools",),
        edges=(_TWO,),
    ),
    FormatCase(
        "deepseek_r1_distill",
        "deepseek-r1",
        ("<｜end▁of▁sentence｜>",),
        tokens=DEEPSEEK,
        has=("tools", "thinking"),
        edges=(_TWO, _THINK),
    ),
    FormatCase(
        "Phi-4",
        "phi-4",
        ("<|im_end|>", "<|endoftext|>"),
        PHI4,
        {"eos_token": "<|endoftext|>"},
        ("<|endoftext|>",),
        edges=(_TWO,),
    ),
    FormatCase(
        "Phi-4-mini",
        "phi-4-mini",
        ("<|end|>",),
        PHI4_MINI,
        {"eos_token": "<|endoftext|>"},
        has=("tools",),
        edges=(_TWO,),
    ),
    FormatCase(
        "Mistral Nemo", "mistral-nemo", ("</s>",), NEMO, MISTRAL, ("</s>",), ("tools",), (_TWO,)
    ),
    FormatCase("Mistral Small", "mistral-small", ("</s>",), SMALL, MISTRAL, ("</s>",), (), (_TWO,)),
    FormatCase(
        "Mistral Small, dated, without tools",
        "mistral-small",
        ("</s>",),
        SMALL_DATED.replace(_TOOLS, ""),
        MISTRAL,
        ("</s>",),
        edges=(_TWO,),
        dated=True,
        left=True,
    ),
    FormatCase(
        "Mistral Small, dated",
        "mistral-small",
        ("</s>",),
        SMALL_DATED,
        MISTRAL,
        ("</s>",),
        ("tools",),
        (_TWO,),
        dated=True,
        left=True,
    ),
    FormatCase(
        "Granite 3.0", "granite", ("<|end_of_text|>",), GRANITE3, GRANITE, (), ("tools",), (_TWO,)
    ),
    FormatCase(
        "Granite 3.3",
        "granite",
        ("<|end_of_text|>",),
        GRANITE33,
        GRANITE,
        (),
        ("tools", "thinking"),
        (_TWO,),
        dated=True,
        left=True,
    ),
    FormatCase("EXAONE 3.5", "exaone", ("[|endofturn|]",), EXAONE35, EXAONE, edges=(_TWO,)),
    FormatCase(
        "SmolLM3",
        "chatml-turns",
        ("<|im_end|>", "<|end_of_text|>"),
        SMOLLM3,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"},
        ("<|im_end|>", "<|end_of_text|>"),
        ("tools", "thinking"),
        (_TWO, _THINK),
        dated=True,
        left=True,
    ),
    FormatCase(
        "OLMo 2", "olmo-2", ("<|endoftext|>",), OLMO2, OLMO, ("<|endoftext|>",), (), (_TWO,)
    ),
    FormatCase(
        "GLM-4", "glm-4", ("<|user|>", "<|endoftext|>"), GLM4, GLM, ("<|endoftext|>",), (), (_TWO,)
    ),
    FormatCase("SOLAR Pro", "chatml", ("<|im_end|>",), SOLAR_PRO, QWEN, edges=(_TWO,)),
    FormatCase("Yi", "chatml-turns", ("<|im_end|>",), YI, QWEN, edges=(_TWO,)),
)
