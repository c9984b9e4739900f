"""The model card of ``pico``: only measured numbers, the text around them, and the file list."""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict, dataclass

from dus_edge.train.pico import corpus
from dus_edge.train.pico.package import PicoScores

TEMPLATE = """\
---
license: apache-2.0
language:
- code
- en
library_name: transformers
pipeline_tag: text-generation
tags:
- llama
- python
- tiny
---

# pico

A Llama of 8 layers and {parameters:,} parameters, trained from scratch on the Python standard
library's own source text. It ships inside dus-edge so that every command has a real, trained
base checkpoint to work on without a download. It continues Python-like text. It knows nothing
else, and it is no coding assistant.

| | |
|---|---|
| architecture | `LlamaForCausalLM`, 8 layers, hidden 256, 4 heads of 64, 2 KV heads, FFN 512 |
| embeddings | tied, vocabulary 4096 |
| context | 512 tokens, RoPE theta 10000 |
| weights | bf16 (trained in f32) |

## Measured

Bits per UTF-8 byte on the {heldout_files} held-out files ({heldout_bytes:,} bytes); lower is
better. Each file starts with `<s>` and is read in windows of 512 tokens with a stride of 256,
so that every byte is scored exactly once. The weights are the shipped bf16 ones, computed in f32.

| model | bits/byte |
|---|---|
| **pico, 8 layers** | **{pico:.3f}** |
| pico up-scaled to 12 layers, [0..5] + [2..7], not trained further | {upscaled:.3f} |
| `xz -9` (LZMA preset 9 on the concatenated held-out text) | {xz:.3f} |
| order-0 model of tokens, fitted on the training text | {unigram_tokens:.3f} |
| order-0 model of bytes, fitted on the training text | {unigram_bytes:.3f} |

## Data

The `.py` files of the standard library of CPython {python}: {library_files:,} library files
({library_bytes:,} bytes) and {tests_files:,} files of the test packages ({tests_bytes:,} bytes)
for training, {heldout_files} files held out. Site packages, `ensurepip`, the `encodings` tables
and build records are left out; of files with the same text one is kept.

Held out by the SHA-256 of the relative path modulo {modulus}, among files which are no tests, have
{low:,} to {high:,} bytes, and share at most {shared:.0%} of their telling lines with other files.
The test packages, which are in the training text, do use the held-out modules, so a held-out
file is unseen text about partly seen names.

Licence of the data: the Python Software Foundation License Version 2 (PSF-2.0),
{copyright}
The weights are this project's own work made with the recipe below and hold no file of the
library, so they come under Apache-2.0 like the program; PSF-2.0 allows
works based on Python when its notice is kept, as it is here. A model of this kind can
repeat short passages of its training text.

## Tokenizer

SentencePiece BPE with byte fallback, 4096 pieces, trained on the library training files only:
identity normalisation, dummy prefix, digits split, whitespace kept; line ends and runs of
spaces have pieces. `tokenizer.json` gives the same ids for any text without the special tokens'
own spellings. Load it with `AutoTokenizer`.

## Training

`{command}`

{steps:,} steps of {step_tokens:,} tokens, {tokens:,} tokens in all, in {minutes:.1f} minutes on
2 cores of an x86-64 server CPU (AVX2) that other work shared, in f32. Muon for the hidden matrices
(learning rate {muon_lr:g}), AdamW for embedding and norms ({adam_lr:g}), linear decay to zero over
the last {decay:.0%} of the time; length {short} tokens, then {full} over the last {full_share:.0%}.
Library files make {early:.0%} of the sequences, and {late:.0%} in the last {late_share:.0%}.
{split_rate:.1%} of the training tokens are cut in two, so that a prompt may end inside a word or
after a space.

{regulariser}

{history}

## Sample

Unedited; each block starts with its prompt. Greedy choice soon repeats itself in a model this
small.

{samples}

## Held-out files

Relative to the standard library, in CPython {python}; `python -m dus_edge.train.pico.corpus` lists
them with their hashes.

{files}
"""

REGULARISED = """\
In the last {share:.0%} of the time one micro-batch in {every} ran through an up-scaled plan of the
same layers ([0..8-m) + [m..8), m of 1 to 3), which makes layers stand being repeated. So the
up-scaled figure above flatters up-scaling: an ordinary checkpoint loses more."""

PLAIN = "No layer was ever run twice in training."


@dataclass(frozen=True)
class Run:
    """What a finished run knows: counts, minutes, the command, and a note on its course."""

    steps: int
    tokens: int
    minutes: float
    parameters: int
    command: str
    history: str


def regulariser_text(recipe) -> str:
    """Say openly whether training ran layers twice; ``recipe`` is a ``train.Recipe``."""
    if not recipe.upscaled_every or recipe.upscaled_from >= 1:
        return PLAIN
    return REGULARISED.format(share=1 - recipe.upscaled_from, every=recipe.upscaled_every)


def pico_card(
    split: corpus.Split, scores: PicoScores, run: Run, recipe, samples: list[tuple[str, str]]
) -> str:
    """Fill in the card; ``samples`` are (title, text) pairs."""
    blocks = [f"{title}:\n\n```text\n{text.rstrip()}\n```" for title, text in samples]
    return TEMPLATE.format(
        **asdict(scores),
        **asdict(run),
        python=platform.python_version(),
        copyright=sys.copyright.splitlines()[0],
        library_files=len(split.library),
        library_bytes=corpus.total_bytes(split.library),
        tests_files=len(split.tests),
        tests_bytes=corpus.total_bytes(split.tests),
        heldout_files=len(split.heldout),
        heldout_bytes=corpus.total_bytes(split.heldout),
        modulus=corpus.HELDOUT_MODULUS,
        low=corpus.MIN_HELDOUT_BYTES,
        high=corpus.MAX_HELDOUT_BYTES,
        shared=corpus.MAX_SHARED_LINES,
        step_tokens=recipe.step_tokens,
        muon_lr=recipe.muon_lr,
        adam_lr=recipe.adam_lr,
        decay=1 - recipe.decay_from,
        short=recipe.short_length,
        full=recipe.full_length,
        full_share=1 - recipe.full_from,
        early=recipe.library_share,
        late=recipe.late_library_share,
        late_share=1 - recipe.late_from,
        split_rate=recipe.split_rate,
        regulariser=regulariser_text(recipe),
        samples="\n\n".join(blocks),
        files="\n".join(f"- `{source.path}`" for source in split.heldout),
    )
