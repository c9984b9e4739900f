"""What a Modelfile says of a GGUF file that another program made."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from dus_edge.jobs.modelfile import render_modelfile_of

TEMPLATES = Path(__file__).parent / "data" / "chat_templates"


@pytest.fixture
def foreign(tmp_path) -> Path:
    """A file with the facts of SmolLM2-135M-Instruct's published GGUF, and no weights."""
    path = tmp_path / "foreign.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Smollm2 135M")
    writer.add_license("apache-2.0")
    writer.add_context_length(8192)
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template((TEMPLATES / "smollm2-instruct.jinja").read_text())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def render(path: Path) -> str:
    return render_modelfile_of(str(path), path.parent, None, None, say=print)


def test_only_our_files_are_said_to_be_ours(foreign, pico, tmp_path, run):
    assert render(foreign).startswith("# Smollm2 135M.\n")
    assert run("gguf", "pico", "-q", "q4_0", "-o", tmp_path / "ours")[0] == 0
    (ours,) = (tmp_path / "ours").glob("*.gguf")
    assert ", made by dus-edge." in render(ours).splitlines()[0]
    assert render(ours) == ours.with_suffix(".Modelfile").read_text().replace("./", "")
    of_checkpoint = run("modelfile", pico, "--from", "x.gguf")[1]
    assert "made by dus-edge" not in of_checkpoint


def test_the_format_of_a_model_whose_begin_token_begins_its_messages(foreign):
    text = render(foreign)
    assert "# Chat format: ChatML" in text
    assert 'SYSTEM """You are a helpful AI assistant named SmolLM, trained by Hugging' in text
