"""The job that writes Modelfiles: of a GGUF file, of a checkpoint, and the project's own."""

from __future__ import annotations

import os
from pathlib import Path

from dus_edge.checkpoint.gguf.source import gguf_path
from dus_edge.errors import UsageError
from dus_edge.export.vocab.vocab import read_vocab
from dus_edge.files import check_writable, write_text
from dus_edge.ollama.facts import gguf_facts, model_facts, render_facts
from dus_edge.ollama.tracked import tracked_modelfiles
from dus_edge.upscale.model import Say, find_model, plan_chooser


def render_tracked(folder: Path) -> list[Path]:
    """Render the repository's `modelfiles/`; the same whatever base the GGUFs were made from."""
    check_writable(folder)
    texts = tracked_modelfiles()
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def render_modelfile_of(
    model: str, folder: Path, from_path: str | None, num_ctx: int | None, *, say: Say
) -> str:
    """The Modelfile of a GGUF file or of a checkpoint.

    Args:
        model: a `.gguf` file, a model of Ollama's, or a base as everywhere else.
        folder: where the Modelfile will stand; FROM is relative to it.
        from_path: what FROM names; needed for a checkpoint, which is no file that Ollama runs.
        num_ctx: cap of the context; the module's default if None.
        say: takes lines for the user.

    Raises:
        UsageError: a checkpoint without `from_path`.
    """
    if (file := gguf_path(model)) is not None:
        facts = gguf_facts(file)
        default = os.path.relpath(file, folder)
        return render_facts(facts, from_path or default, num_ctx)
    if from_path is None:
        raise UsageError(
            f"{model} is a checkpoint; name the GGUF file that the Modelfile runs with --from."
        )
    found = find_model(model, plan_chooser(None, None, (), False), weights=False, say=say)
    vocab = read_vocab(found.source.folder, found.config.vocab_size)
    return render_facts(model_facts(found, vocab, ours=False), from_path, num_ctx)
