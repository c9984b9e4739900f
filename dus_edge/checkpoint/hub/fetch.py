"""Fetch a checkpoint from the hub: only the files needed, and the small ones first."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import dus_edge
from dus_edge.checkpoint.card import read_licence
from dus_edge.checkpoint.hub.explain import MODEL, Unreachable, hub_explained
from dus_edge.checkpoint.hub.limits import (
    ANSWER_BYTES,
    ANSWER_SECONDS,
    SMALL_FILE_SECONDS,
    answer_limit,
    check_answer,
)
from dus_edge.checkpoint.names import CONFIG, GENERATION_CONFIG, INDEX, SINGLE, TOKENIZER_FILES
from dus_edge.checkpoint.spec import Source
from dus_edge.errors import CheckpointError, DusEdgeError, OutputError, UnsupportedError
from dus_edge.jsonfile import MAX_BYTES
from dus_edge.machine import deadline
from dus_edge.progress import Advance
from dus_edge.progress import progress as show_progress
from dus_edge.words import format_bytes

_SMALL = frozenset((CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES, "README.md", INDEX))
_SMALL_PATTERN = re.compile(r"LICENSE[\w.-]*|additional_chat_templates/[\w-][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")

#: Bytes that stay free on the cache's disk.
_DISK_MARGIN = 100_000_000

#: Downloads of at least this many bytes show their progress.
_BIG_BYTES = 20_000_000

Progress = Callable[[str], None]


def is_small_file(name: str) -> bool:
    """Whether a repository's file is one of the small ones that are always fetched."""
    return name in _SMALL or (_SMALL_PATTERN.fullmatch(name) is not None and ".." not in name)


@dataclass(frozen=True)
class HubRepo:
    """One repository at one commit, and where the cache keeps it.

    Attributes:
        id: ``org/name``.
        commit: 40 hex digits.
        sizes: of its files in bytes; None where the hub does not say.
        cache: the hub cache's folder.
        kind: ``model`` or ``dataset``.
    """

    id: str
    commit: str
    sizes: Mapping[str, int | None]
    cache: Path
    kind: str = MODEL

    @property
    def folder(self) -> Path:
        """Where its files of this commit lie."""
        return _storage(self.cache, self.id, self.kind) / "snapshots" / self.commit


def hub_cache(cache_dir: Path | None) -> Path:
    """The folder of the hub cache: what is asked for, or the hub client's own default."""
    from huggingface_hub import constants

    return Path(cache_dir or constants.HF_HUB_CACHE).expanduser().absolute()


def _storage(cache: Path, repo: str, kind: str) -> Path:
    return cache / f"{kind}s--{repo.replace('/', '--')}"


def from_hub(
    base: str,
    repo: str,
    revision: str | None,
    weights: bool,
    cache_dir: Path | None,
    progress: Progress,
    on_config: Callable[[Path], None] | None,
) -> Source:
    with quiet_hub():
        cache = hub_cache(cache_dir)
        try:
            listing = list_files(repo, revision, cache)
        except Unreachable as e:
            folder = _cached_folder(repo, revision, weights, cache, str(e))
            progress(f"{repo}: using the cached copy, commit {folder.name[:12]}")
            if on_config is not None:
                on_config(folder)
        else:
            folder = _download(listing, revision, weights, progress, on_config)
    return Source(folder, base, repo.rpartition("/")[2], repo, folder.name, read_licence(folder))


def _download(
    repo: HubRepo,
    revision: str | None,
    weights: bool,
    progress: Progress,
    on_config: Callable[[Path], None] | None,
) -> Path:
    if CONFIG not in repo.sizes:
        raise CheckpointError(f"{repo.id} has no {CONFIG}, so it is no transformers checkpoint.")
    if weights:
        _check_has_safetensors(repo.id, repo.sizes)
    # config.json comes last: where it is, the other small files are too.
    fetch_files(
        repo, sorted(filter(is_small_file, repo.sizes), key=lambda n: (n == CONFIG, n)), progress
    )
    remember_commit(repo, revision)
    if on_config is not None:
        on_config(repo.folder)
    if weights:
        names = _weight_files(repo)
        check_disk(repo, names)
        fetch_files(repo, names, progress)
    return repo.folder


def _check_has_safetensors(repo: str, names: Iterable[str]) -> None:
    """Refuse a repository without safetensors weights, saying what it has instead."""
    names = sorted(names)
    if INDEX in names or SINGLE in names:
        return
    pickled = [n for n in names if n.endswith((".bin", ".pth", ".pt"))]
    if pickled:
        raise UnsupportedError(
            f"{repo} has only pickled weights ({pickled[0]}), which can run code when they are "
            'opened; if you trust it, convert it once with python -c "from transformers import '
            f"AutoModelForCausalLM as M; M.from_pretrained('{repo}').save_pretrained('DIR')\" "
            "and give DIR."
        )
    if any(n.endswith(".gguf") for n in names):
        raise UnsupportedError(
            f"{repo} has only GGUF files; take the checkpoint that they were made from."
        )
    raise UnsupportedError(f"{repo} has neither {SINGLE} nor {INDEX}, so no weights to read.")


def _weight_files(repo: HubRepo) -> list[str]:
    """The shards that the fetched index names, all of them listed by the hub, or the one file."""
    if INDEX not in repo.sizes:
        return [SINGLE]
    names = indexed_shards(repo.folder / INDEX, repo.id)
    for name in names:
        if name not in repo.sizes:
            raise CheckpointError(
                f"{repo.id}: {INDEX} names {name}, which the repository does not have."
            )
    return names


def indexed_shards(index: Path, where: str) -> list[str]:
    """Names of the shards in an index, sorted; each is a plain ``*.safetensors`` file name.

    Args:
        index: a `model.safetensors.index.json`.
        where: what the message calls the place that the index is from.

    Raises:
        CheckpointError: it is no index, or it names a file outside its folder or a pickle.
    """
    from dus_edge.checkpoint.safetensors import is_plain_name

    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names or not all(isinstance(n, str) for n in names):
            raise ValueError("its weight_map is empty or holds no file names")
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{where}: {index.name} is no index of shards ({e}).") from None
    for name in names:
        if not is_plain_name(name):
            raise CheckpointError(
                f"{where}: {index.name} points to {name!r}, outside the folder; refused."
            )
        if not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{where}: {index.name} names {name!r}, which is no safetensors file; refused."
            )
    return names


def check_disk(repo: HubRepo, names: Iterable[str]) -> None:
    """See that the cache's disk has room for what is missing of some files.

    Raises:
        OutputError: it has not.
    """
    need = sum(repo.sizes[n] or 0 for n in names if not (repo.folder / n).exists())
    there = next(p for p in (repo.folder, *repo.folder.parents) if p.exists())
    free = shutil.disk_usage(there).free
    if need and need + _DISK_MARGIN > free:
        raise OutputError(
            f"{repo.id} needs {format_bytes(need)} more, but {repo.cache} has "
            f"{format_bytes(free)} free; "
            "set HF_HOME to a folder on a larger disk."
        )


def fetch_files(repo: HubRepo, names: Iterable[str], progress: Progress) -> None:
    """Bring files of one commit into the cache; those that are there already cost nothing.

    Raises:
        DusEdgeError: it breaks off; what is whole stays.
    """
    from huggingface_hub import hf_hub_download

    missing = [n for n in names if not (repo.folder / n).exists()]
    total = sum(repo.sizes[n] or 0 for n in missing)
    bar = show_progress("Fetching", total) if total >= _BIG_BYTES else nullcontext(lambda n: None)
    with bar as advance:
        for i, name in enumerate(missing, 1):
            size = repo.sizes[name]
            progress(
                f"{repo.id}: fetching {name} ({i} of {len(missing)}"
                + (f", {format_bytes(size)})" if size is not None else ")")
            )
            small = is_small_file(name)
            most = min(size or MAX_BYTES, MAX_BYTES) if small else size
            limited = deadline(SMALL_FILE_SECONDS) if small else nullcontext()
            try:
                with (
                    hub_explained(repo.id, repo.commit, name, repo.kind),
                    answer_limit(most),
                    limited,
                ):
                    hf_hub_download(
                        repo.id,
                        name,
                        repo_type=repo.kind,
                        revision=repo.commit,
                        cache_dir=repo.cache,
                        library_name="dus-edge",
                        library_version=dus_edge.__version__,
                        tqdm_class=_reporting(advance, most),
                    )
            except KeyboardInterrupt:
                progress(f"{repo.id}: interrupted; run the same command again to go on with {name}")
                raise


def _reporting(advance: Advance, most: int | None) -> type:
    """A bar for the hub client that shows nothing, passes the bytes on and counts them.

    Its transfer back end in other threads is seen by nothing else here.
    """
    from tqdm import tqdm

    class Reporting(tqdm):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **(options | {"disable": True}))
            self.taken = 0

        def update(self, n: float | None = 1) -> None:
            self.taken += int(n or 0)
            if most is not None and self.taken > most:
                raise ValueError(f"it sends more than {format_bytes(most)}")
            advance(int(n or 0))

    return Reporting


def list_files(repo: str, revision: str | None, cache: Path, kind: str = MODEL) -> HubRepo:
    """Ask the hub for the commit behind a revision and for its files with sizes in bytes.

    Raises:
        Unreachable: it does not answer.
        DusEdgeError: it has no such repository or revision, or refuses it.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="dus-edge", library_version=dus_edge.__version__)
    with (
        hub_explained(repo, revision, None, kind),
        answer_limit(ANSWER_BYTES),
        deadline(ANSWER_SECONDS),
    ):
        info = api.repo_info(
            repo, repo_type=kind, revision=revision, files_metadata=True, timeout=30
        )
        check_answer(info)
    sizes = {f.rfilename: f.size for f in info.siblings or ()}
    if not _COMMIT.fullmatch(info.sha or ""):
        raise DusEdgeError(f"The hub names no commit for {repo}; check HF_ENDPOINT.")
    return HubRepo(repo, info.sha, sizes, cache, kind)


def remember_commit(repo: HubRepo, revision: str | None) -> None:
    """Note the commit behind a branch or tag where the hub client does, for offline use.

    The client does it only when it is asked for files by branch; we ask by commit, so that a
    push in the middle of a download cannot mix two versions.
    """
    revision = revision or "main"
    if _COMMIT.fullmatch(revision):
        return
    ref = _storage(repo.cache, repo.id, repo.kind) / "refs" / revision
    with suppress(OSError):  # a read-only cache is no obstacle
        ref.parent.mkdir(parents=True, exist_ok=True)
        partial = ref.with_name(f"{ref.name}.{os.getpid()}.part")
        partial.write_text(repo.commit, encoding="ascii")
        partial.replace(ref)


def _cached_folder(
    repo: str, revision: str | None, weights: bool, cache: Path, why_not_online: str
) -> Path:
    """The snapshot that the cache has for a revision, if it is whole.

    Raises:
        DusEdgeError: not cached, or not all of it.
    """
    from dus_edge.checkpoint.safetensors import shard_files

    folder = cached_snapshot(repo, revision, cache, MODEL, CONFIG, why_not_online)
    if weights:
        try:
            shard_files(folder)
        except UnsupportedError:
            raise
        except CheckpointError:
            raise DusEdgeError(
                f"{why_not_online}, and the copy of {repo} in {cache} is incomplete."
            ) from None
    return folder


def cached_snapshot(
    repo: str, revision: str | None, cache: Path, kind: str, has: str, why_not_online: str
) -> Path:
    """The folder of a revision in the cache.

    Args:
        repo: ``org/name``.
        revision: branch, tag or commit; None means main.
        cache: the hub cache.
        kind: ``model`` or ``dataset``.
        has: a file, or a pattern of files, of which one must be there.
        why_not_online: a clause, for the message.

    Raises:
        DusEdgeError: it is not there.
    """
    storage, revision = _storage(cache, repo, kind), revision or "main"
    commit = revision
    if not _COMMIT.fullmatch(revision):
        try:
            commit = (storage / "refs" / revision).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            commit = ""
    folder = storage / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not any(f.is_file() for f in folder.glob(has)):
        raise DusEdgeError(f"{why_not_online}, and {cache} has no copy of {repo} at {revision}.")
    return folder


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Keep the hub client's bars, hints and telemetry away; our own lines say enough."""
    # Read when the client is imported, which must not happen before.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import utils

    verbosity, bars = utils.logging.get_verbosity(), not utils.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        utils.logging.set_verbosity_error()
        utils.disable_progress_bars()
        try:
            yield
        finally:
            utils.logging.set_verbosity(verbosity)
            if bars:
                utils.enable_progress_bars()
