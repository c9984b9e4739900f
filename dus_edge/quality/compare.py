"""Measuring candidates against a reference: one model in memory at a time.

The reference runs first; its log-probabilities of the scored positions go to a temporary file.
Each candidate is then loaded, compared chunk by chunk and freed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dus_edge.checkpoint.gguf.ollama import find_ollama, short_name
from dus_edge.checkpoint.names import OLLAMA
from dus_edge.checkpoint.resolve import resolve_base
from dus_edge.errors import CheckpointError, OutputError, UsageError
from dus_edge.files import check_free_space, check_writable
from dus_edge.progress import progress
from dus_edge.quality.scores import PerToken, Scores, compare, first_scored, summarize
from dus_edge.run.folders import check_packages, torch_device
from dus_edge.run.llama_logits import GGUFTokenizer
from dus_edge.run.open import inspect_source, open_source
from dus_edge.run.source import LogitSource, SourceInfo
from dus_edge.text.chunks import DEFAULT_N_CTX, Chunks, make_chunks
from dus_edge.text.documents import builtin_documents, read_documents
from dus_edge.text.tokenizers import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class ComparedModel:
    """A model and its scores, in all and by language of the text."""

    info: SourceInfo
    total: Scores
    by_language: dict[str, Scores]


@dataclass(frozen=True)
class Results:
    """What `quality` found.

    Attributes:
        reference: the model that all others are compared with.
        candidates: in the order they were given.
        n_ctx: tokens per chunk.
        first_scored: the first position of a chunk whose next token counts.
        chunks: number of chunks by language.
        digest: SHA-256 of the tokens, hex; equal digests were scored on equal text.
    """

    reference: SourceInfo
    candidates: tuple[ComparedModel, ...]
    n_ctx: int
    first_scored: int
    chunks: dict[str, int]
    digest: str


def quality(
    reference: str,
    candidates: Sequence[str],
    *,
    texts: Sequence[Path] = (),
    field: str | None = None,
    n_ctx: int = DEFAULT_N_CTX,
    n_chunks: int | None = None,
    seed: int = 0,
    all_positions: bool = False,
    device: str = "cpu",
    n_threads: int | None = None,
    work: Path | None = None,
) -> Results:
    """Measure how far candidates are from a reference.

    Everything that can be refused is refused before the first model runs.

    Args:
        reference: a GGUF file, a model of Ollama's, a folder, ``pico``, or
            ``org/name[@revision]`` on the hub.
        candidates: the same, at least one; all with the reference's vocabulary.
        texts: files and folders of text; none means the built-in evaluation text.
        field: where rows of JSONL files have their text.
        n_ctx: tokens per chunk.
        n_chunks: at most so many chunks; None for all that the text gives.
        seed: of the draw of chunks.
        all_positions: whether the first half of each chunk counts too.
        device: see `open_source`.
        n_threads: of the CPU; None for all cores.
        work: folder of the temporary file, 4 bytes × vocabulary × scored tokens; None for the
            system's.

    Raises:
        UsageError: nothing under a name, vocabularies that differ, too little text, a context
            longer than a model's.
        CheckpointError: a damaged model, or one whose logits are not finite.
        OutputError: the temporary file does not fit.
        DependencyError: a package that reads one of the formats is not installed.
    """
    if not candidates:
        raise UsageError("there is nothing to compare; name a candidate after the reference.")
    infos = [inspect_source(*locate_model(name)) for name in (reference, *candidates)]
    check_comparable(infos, n_ctx)
    check_runnable(infos, device)
    documents = read_documents(texts, field) if texts else builtin_documents("evaluation")
    with _tokenizer(infos[0]) as tokenizer:
        chunks = make_chunks(documents, tokenizer, n_ctx, n_chunks=n_chunks, seed=seed)
    return compare_models(
        infos[0],
        infos[1:],
        chunks,
        all_positions=all_positions,
        device=device,
        n_threads=n_threads,
        work=work,
    )


def compare_models(
    reference: SourceInfo,
    candidates: Sequence[SourceInfo],
    chunks: Chunks,
    *,
    all_positions: bool = False,
    device: str = "cpu",
    n_threads: int | None = None,
    work: Path | None = None,
) -> Results:
    """As `quality`, on tokens that are there already and models that fit together."""
    n_chunks, n_ctx = chunks.tokens.shape
    start = first_scored(n_ctx, all_positions)
    n_scored = n_ctx - 1 - start
    if n_scored < 1:
        raise UsageError(f"--ctx {n_ctx}: a chunk needs at least 3 tokens; give a longer one.")
    work = Path(tempfile.gettempdir()) if work is None else work
    needed = 4 * reference.vocab_size * n_scored * n_chunks
    check_writable(work)
    check_free_space(work, needed)
    found = []
    with _temporary_file(work) as kept:
        with open_source(reference, device, n_threads) as source:
            for log_probs in _run(source, chunks.tokens, start):
                _write(kept, log_probs, work)
        for info in candidates:
            kept.seek(0)
            shape = (n_scored, reference.vocab_size)
            with open_source(info, device, n_threads) as source:
                parts = [
                    compare(_read(kept, shape), log_probs, tokens[start + 1 :])
                    for tokens, log_probs in zip(
                        chunks.tokens, _run(source, chunks.tokens, start), strict=True
                    )
                ]
            found.append(ComparedModel(info, *summarize(_stack(parts), chunks.languages)))
    return Results(
        reference=reference,
        candidates=tuple(found),
        n_ctx=n_ctx,
        first_scored=start,
        chunks={name: chunks.languages.count(name) for name in dict.fromkeys(chunks.languages)},
        digest=chunks.digest,
    )


def locate_model(name: str) -> tuple[Path, str | None]:
    """The file or folder of a model, and what it is called; what is on the hub is fetched.

    Raises:
        UsageError: there is none of that name.
    """
    if name.startswith(OLLAMA):
        of_ollama = name.removeprefix(OLLAMA)
        return find_ollama(of_ollama), short_name(of_ollama)
    path = Path(name).expanduser()
    if path.is_file():
        return path, None
    if path.suffix == ".gguf":
        raise UsageError(f"There is no file {name}.")
    source = resolve_base(name)
    return source.folder, source.name


def check_comparable(infos: Sequence[SourceInfo], n_ctx: int) -> None:
    """See that all models can read the same chunks; the first is the reference.

    Raises:
        UsageError: a vocabulary of another size, or a context shorter than `n_ctx`.
    """
    for info in infos:
        if info.vocab_size != infos[0].vocab_size:
            raise UsageError(
                f"{info.path} has {info.vocab_size:,} tokens in its vocabulary and the reference "
                f"{infos[0].path} has {infos[0].vocab_size:,}; only models with the same "
                "tokenizer can be compared."
            )
        if 0 < info.context_length < n_ctx:
            raise UsageError(
                f"--ctx {n_ctx}: {info.path} was made for {info.context_length:,} tokens; "
                "give a shorter one."
            )


def check_runnable(infos: Sequence[SourceInfo], device: str) -> None:
    """See that what runs folders is installed and has the device.

    Raises:
        DependencyError: a package is missing.
        UsageError: there is no such device.
    """
    folders = [info for info in infos if info.kind != "gguf"]
    if not folders:
        return
    for info in folders:
        check_packages(info)
    torch_device(device)


@contextmanager
def _tokenizer(reference: SourceInfo) -> Iterator[Tokenizer]:
    if reference.kind == "gguf":
        with GGUFTokenizer(reference.path) as tokenizer:
            yield tokenizer
    else:
        yield load_tokenizer(reference.path, reference.vocab_size)


def _run(source: LogitSource, tokens: np.ndarray, start: int) -> Iterator[np.ndarray]:
    """Log-probabilities of every chunk's scored positions, ``(n_scored, vocab)`` each."""
    n_chunks, n_ctx = tokens.shape
    with progress(source.info.name, tokens.size, unit="tokens") as advance:
        for i, chunk in enumerate(tokens):
            # The last position's next token is in no chunk.
            log_probs = source.log_probs(chunk, start)[:-1]
            if not np.isfinite(log_probs).all():
                raise CheckpointError(
                    f"{source.info.path}: logits of chunk {i + 1} of {n_chunks} are NaN or "
                    "infinite; the weights are damaged, fetch or export it again."
                )
            yield log_probs
            advance(n_ctx)


@contextmanager
def _temporary_file(folder: Path) -> Iterator[BinaryIO]:
    """A file without a name, gone when it is closed, however that comes about."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder, prefix=".dus-edge-") as file:
        yield file


def _write(file: BinaryIO, array: np.ndarray, folder: Path) -> None:
    try:
        file.write(np.ascontiguousarray(array).data)
    except OSError as e:
        raise OutputError(
            f"{folder}: log-probabilities cannot be written ({e.strerror or e}); make room, "
            "or take fewer chunks."
        ) from None


def _read(file: BinaryIO, shape: tuple[int, int]) -> np.ndarray:
    out = np.empty(shape, np.float32)
    if file.readinto(out.data.cast("B")) != out.nbytes:  # type: ignore[attr-defined]
        raise OutputError("the temporary file of log-probabilities was cut short; run it again.")
    return out


def _stack(parts: Sequence[PerToken]) -> PerToken:
    """Chunks' numbers as arrays ``(n_chunks, n_scored)``."""
    return PerToken(
        kl=np.stack([p.kl for p in parts]),
        same_top=np.stack([p.same_top for p in parts]),
        nll_reference=np.stack([p.nll_reference for p in parts]),
        nll_candidate=np.stack([p.nll_candidate for p in parts]),
    )
