"""What a Modelfile says of a GGUF file that another program made."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest

from dus_edge.jobs.export.gguf import export_gguf
from dus_edge.jobs.modelfile import render_modelfile_of
from dus_edge.quant.recipe import find_preset
from dus_edge.upscale.model import plan_chooser

from .chat_models import SOLAR_TEMPLATE, chat_folder

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


def test_a_template_in_a_file_of_its_own_is_found(tmp_path, run):
    """`chat_template.jinja` and no entry in tokenizer_config.json, or not even that file."""
    folder = chat_folder(tmp_path / "chat", SOLAR_TEMPLATE)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert "chat_template" not in config
    for config_is_there in (True, False):
        if not config_is_there:
            (folder / "tokenizer_config.json").unlink()
        code, text, _ = run("modelfile", folder, "--from", "x.gguf")
        assert code == 0 and "# Chat format: the checkpoint's own" in text
        path = chat_gguf_of(folder, tmp_path / f"out-{config_is_there}")
        assert "# Chat format: the checkpoint's own" in render(path)


def chat_gguf_of(folder: Path, out: Path) -> Path:
    """The F16 GGUF file of a folder."""
    as_it_is = plan_chooser(None, None, (), False)
    return export_gguf(str(folder), as_it_is, [find_preset("f16")], out).outputs[0].path


def test_stops_are_the_ends_of_turns_and_of_texts(tmp_path):
    """Those that the file names, and control tokens that llama.cpp takes for ends."""
    path = tmp_path / "ends.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    texts = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "</s>", "<stop>", "a"]
    control, plain = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_list(texts)
    writer.add_token_types([control, control, control, plain, control, plain])
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(4)
    writer.add_chat_template((TEMPLATES / "openhermes-2.5.jinja").read_text())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    stops = [line for line in render(path).splitlines() if line.startswith("PARAMETER stop")]
    assert stops == [
        f'PARAMETER stop "{text}"'
        for text in ("<|im_start|>", "<|im_end|>", "<stop>", "<|endoftext|>")
    ]


def test_the_format_of_a_model_whose_begin_token_begins_its_messages(foreign):
    text = render(foreign)
    assert "# Chat format: ChatML" in text
    assert 'SYSTEM """You are a helpful AI assistant named SmolLM, trained by Hugging' in text
