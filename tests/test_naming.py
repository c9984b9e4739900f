"""Names of exports: safe in file systems, shells and Modelfiles, and still names."""

from __future__ import annotations

import re
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dus_edge.quant.recipe import PRESETS
from dus_edge.upscale.naming import name_model

from .draws import examples

#: Letters and digits of any script, and what joins them.
SAFE = re.compile(r"[\w.-]+")


@given(
    st.one_of(
        st.text(max_size=300),
        st.from_regex(
            r"[A-Za-z]{1,9}-[0-9]B-[^\x00]{0,30}-v[0-9.]{1,9}[^\x00]{0,9}", fullmatch=True
        ),
    ),
    st.integers(1, 10**13),
    st.booleans(),
)
@examples(400)
def test_any_name_becomes_a_safe_one(source, n_parameters, upscaled):
    name = name_model(source, n_parameters, upscaled=upscaled)
    for part in name.parts:
        assert SAFE.fullmatch(part) and part.strip("-.") == part, part
    file = name.file_name(PRESETS["q4_k_m"])
    assert "/" not in file and not file.startswith((".", "-"))
    assert len(file.encode()) <= 255 - len(".0123456789abcdef.replaced.partial")
    assert "\n" not in name.title


@pytest.mark.parametrize(
    ("source", "stem"),
    [
        ("Mistral-7B-v0.1", "Mistral-DUS-10.7B-v0.1"),
        ("ünï-코드", "ünï-코드-DUS-10.7B-v1.0"),
        ("My Model", "My-Model-DUS-10.7B-v1.0"),
        ("../../etc/passwd", "etc-passwd-DUS-10.7B-v1.0"),
        ("$(touch x)", "touch-x-DUS-10.7B-v1.0"),
        ("", "model-DUS-10.7B-v1.0"),
    ],
)
def test_letters_stay_and_the_rest_goes(source, stem):
    assert name_model(source, 10_730_000_000, upscaled=True).stem == stem


def test_printed_lines_can_be_pasted_into_a_shell(run, make_checkpoint, tmp_path):
    base = make_checkpoint()
    folder = tmp_path / "it's a $(touch x) folder"
    code, out, _ = run("gguf", base, "-q", "q8_0", "-o", folder)
    assert code == 0
    for command, file in (("ollama create", "*.Modelfile"), ("dus-edge serve", "*.gguf")):
        [line] = [line for line in out.splitlines() if line.startswith(f"  {command} ")]
        assert shlex.split(line, comments=True)[-1] == str(next(folder.glob(file)))
