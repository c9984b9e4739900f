"""The readers, as the program calls them, each with its seeds."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dus_edge.checkpoint.card import languages, read_base_models, read_licence, tags
from dus_edge.checkpoint.config import load_config, tensor_shapes
from dus_edge.checkpoint.safetensors import read_header
from dus_edge.export.gguf.format import encode_header
from dus_edge.export.vocab.vocab import read_vocab, vocab_metadata
from dus_edge.ollama.facts import gguf_facts, render_facts
from dus_edge.ollama.gotemplate import render_conversation
from dus_edge.ollama.grammar import decode_modelfile, parse_modelfile, resolve_from
from dus_edge.predict.memory.folder import read_folder
from dus_edge.predict.memory.llama import read_gguf
from dus_edge.quant.imatrix import match, read_imatrix
from dus_edge.run.open import inspect_source
from dus_edge.verify.digest import read_digests
from dus_edge.verify.folder import verify_folder
from dus_edge.verify.gguf import verify_gguf

from . import seeds
from .mutate import Seed

_TALK = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "u"},
    {"role": "user", "content": "v"},
    {"role": "assistant", "content": "a"},
]


@dataclass(frozen=True)
class Reader:
    """A reader of files in a folder.

    Attributes:
        read: takes the folder and raises for what it refuses.
        make_seeds: its sound inputs.
        share: inputs that it gets of a whole run, in parts of the sum of all.
    """

    name: str
    read: Callable[[Path], object]
    make_seeds: tuple[Callable[[], Seed | list[Seed]], ...]
    share: float = 1

    @functools.cached_property
    def seeds(self) -> tuple[Seed, ...]:
        made = [make() for make in self.make_seeds]
        return tuple(s for x in made for s in (x if isinstance(x, list) else [x]))

    def draw(self, seed: int, index: int) -> tuple[Seed, random.Random]:
        """The seed of input `index` and what mutates it, of a run with this number."""
        rng = random.Random(f"{seed}/{self.name}/{index}")
        return rng.choice(self.seeds), rng


def _imatrix(file: str) -> Callable[[Path], object]:
    shapes = {"blk.0.attn_q.weight": (8, 8), "output.weight": (8, 8)}

    def read(folder: Path) -> object:
        return match(read_imatrix(folder / file), shapes)

    return read


def _config(folder: Path) -> object:
    return sum(1 for _ in tensor_shapes(load_config(folder / "config.json")))


def _vocab(folder: Path) -> object:
    """A vocabulary goes into a file, too: what cannot be written must be refused before."""
    return encode_header(vocab_metadata(read_vocab(folder, seeds.TOKENS)), [])


def _folder(folder: Path) -> object:
    """As `verify`, `fit` and `bench run` come to it; the first refusal is the answer."""
    inspect_source(folder)
    verify_folder(folder)
    return read_folder(folder)


def _old_folder(folder: Path) -> object:
    """Without settings in config.json; `bench run` takes no such folder."""
    verify_folder(folder)
    return read_folder(folder)


def _plain_folder(folder: Path) -> object:
    inspect_source(folder)
    return verify_folder(folder)


def _modelfile(folder: Path) -> object:
    path = folder / "Modelfile"
    commands = parse_modelfile(decode_modelfile(path.read_bytes()))
    return [resolve_from(path, str(c.value)) for c in commands if c.name == "from"]


def _go_template(folder: Path) -> object:
    return render_conversation((folder / "template").read_bytes().decode(errors="replace"), _TALK)


def _card(folder: Path) -> object:
    return read_licence(folder), read_base_models(folder), languages(folder), tags(folder)


def _facts(folder: Path) -> object:
    return render_facts(gguf_facts(folder / "m.gguf"), "./m.gguf")


_ALL = (
    Reader("GGUF, verify", lambda f: verify_gguf(f / "m.gguf"), (seeds.gguf_model,), 2),
    Reader("GGUF, memory", lambda f: read_gguf(f / "m.gguf"), (seeds.gguf_model,)),
    Reader("GGUF, Modelfile", _facts, (seeds.gguf_model,)),
    Reader("imatrix, GGUF", _imatrix("x.gguf"), (seeds.gguf_imatrix,), 1.5),
    Reader("imatrix, older format", _imatrix("x.dat"), (seeds.legacy_imatrix,), 1.5),
    Reader(
        "safetensors header",
        lambda f: read_header(f / "model.safetensors"),
        (seeds.plain_weights,),
        2,
    ),
    Reader("config.json", _config, (seeds.configs,), 2),
    Reader("tokenizer, byte-level", _vocab, (seeds.byte_level,), 1.5),
    Reader("tokenizer, byte-fallback", _vocab, (seeds.byte_fallback,), 1.5),
    Reader("tokenizer, SentencePiece", _vocab, (seeds.sentencepiece,), 1.5),
    Reader("folder, plain", _plain_folder, (seeds.plain_folder,), 0.5),
    Reader("folder, GPTQ", _folder, (seeds.gptq_folder,), 1),
    Reader("folder, old GPTQ", _old_folder, (seeds.old_gptq_folder,), 0.5),
    Reader("folder, bitsandbytes", _folder, (seeds.bnb_folder,), 0.5),
    Reader("Modelfile", _modelfile, (seeds.modelfile,), 1.5),
    Reader(
        "Go template",
        _go_template,
        (seeds.go_template,),
        1.5,
    ),
    Reader("model card", _card, (seeds.card,), 0.5),
    Reader("digests", lambda f: read_digests(f / "SHA256SUMS"), (seeds.digests,), 0.5),
)
READERS: Mapping[str, Reader] = {reader.name: reader for reader in _ALL}
