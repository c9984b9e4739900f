"""Datasets on the hub: their parquet files, fetched one by one, and of these one column of text.

Nothing of a dataset is executed: loading scripts are passed over, and a dataset without parquet
files of its own is taken from the branch that the hub itself converts to parquet.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from dus_edge.checkpoint.card import CARD, read_card, read_licence
from dus_edge.checkpoint.hub.explain import DATASET, Unreachable
from dus_edge.checkpoint.hub.fetch import (
    HubRepo,
    cached_snapshot,
    check_disk,
    fetch_files,
    hub_cache,
    list_files,
    quiet_hub,
    remember_commit,
)
from dus_edge.errors import UsageError
from dus_edge.packages import require
from dus_edge.text.documents import DEFAULT_FIELD, LANGUAGE_FIELDS, TEXT, Document

_ID = re.compile(
    r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)"  # org/name
    r"(?:@(\w[\w./-]*))?"  # revision
    r"(?::([\w.-]+)(?:/([\w.-]+))?)?"  # configuration, split
)
_PARQUET = ".parquet"
#: The hub's own conversion, and what it calls the only configuration of a dataset.
_CONVERTED = "refs/convert/parquet"
_DEFAULT_CONFIG = "default"
_TRAIN = "train"
#: Words in a file's path that name a split, as the datasets library knows them.
_SPLITS = {
    _TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class HubText:
    """A dataset as it is asked for.

    Attributes:
        repo: ``org/name``.
        revision: branch, tag or commit; None means main.
        config: its configuration; None means the only or the default one.
        split: of that.
    """

    repo: str
    revision: str | None = None
    config: str | None = None
    split: str = _TRAIN

    @property
    def spelled(self) -> str:
        """As the command line has it, without what is a default."""
        revision = f"@{self.revision}" if self.revision else ""
        split = f"/{self.split}" if self.split != _TRAIN else ""
        config = self.config or (_DEFAULT_CONFIG if split else "")
        return f"{self.repo}{revision}{f':{config}' if config else ''}{split}"


@dataclass(frozen=True)
class HubDataset:
    """A dataset that was found.

    Attributes:
        asked: for what.
        repo: at one commit.
        files: parquet files of the split, in order.
        licence: as its card has it; None if unknown.
    """

    asked: HubText
    repo: HubRepo
    files: tuple[str, ...]
    licence: str | None


def parse_hub_text(text: str) -> HubText | None:
    """``org/name[@revision][:configuration[/split]]``; None for what is not of that form."""
    found = _ID.fullmatch(text)
    if found is None or ".." in text or "--" in found[1] or len(found[1]) > 96:
        return None
    config = None if found[3] == _DEFAULT_CONFIG else found[3]
    return HubText(found[1], found[2], config, found[4] or _TRAIN)


def find_dataset(asked: HubText, say: Callable[[str], None], cache: Path | None) -> HubDataset:
    """The files of a dataset; of its bytes only the card is fetched.

    Args:
        asked: for what.
        say: takes lines for the user.
        cache: the hub cache; None means the hub client's own default.

    Raises:
        UsageError: no such dataset, revision, configuration or split; no parquet files.
        DusEdgeError: gated, or unreachable and not cached.
        DependencyError: pyarrow is not installed.
    """
    require("train", "a dataset of the hub needs", "pyarrow")
    with quiet_hub():
        repo = _listed(asked.repo, asked.revision, hub_cache(cache), say)
        licence = read_licence(repo.folder)
        if not _parquet_files(repo) and asked.revision is None:
            with suppress(UsageError):  # not every dataset is converted
                repo = _listed(asked.repo, _CONVERTED, repo.cache, say)
        return HubDataset(asked, repo, tuple(_chosen(asked, repo)), licence)


def dataset_documents(
    dataset: HubDataset, field: str | None, say: Callable[[str], None]
) -> Iterator[Document]:
    """Its texts in their order; a file is fetched when it is come to.

    Args:
        dataset: from `find_dataset`.
        field: the column of the text; ``text`` by default. A row's ``language`` or ``lang`` is
            its language.
        say: takes a line for each file that is fetched.

    Raises:
        UsageError: a file is no parquet file, or has no such column of text.
        DusEdgeError: the download breaks off.
    """
    for name in dataset.files:
        with quiet_hub():
            check_disk(dataset.repo, [name])
            fetch_files(dataset.repo, [name], say)
        where = f"{dataset.asked.repo}: {name}"
        yield from _rows(dataset.repo.folder / name, where, field or DEFAULT_FIELD)


def _listed(repo: str, revision: str | None, cache: Path, say: Callable[[str], None]) -> HubRepo:
    """The repository at a commit, with its card; offline what the cache has of it."""
    try:
        found = list_files(repo, revision, cache, DATASET)
    except Unreachable as e:
        folder = cached_snapshot(repo, revision, cache, DATASET, "**/*", str(e))
        say(f"{repo}: using the cached copy, commit {folder.name[:12]}")
        files = (f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
        return HubRepo(repo, folder.name, dict.fromkeys(files), cache, DATASET)
    if CARD in found.sizes:
        fetch_files(found, [CARD], say)
    remember_commit(found, revision)
    return found


def _parquet_files(repo: HubRepo) -> list[str]:
    names = (n for n in repo.sizes if n.endswith(_PARQUET))
    return sorted(n for n in names if ".." not in Path(n).parts and not n.startswith("/"))


def _chosen(asked: HubText, repo: HubRepo) -> list[str]:
    """The files of a configuration and split: as the card says, else by their paths."""
    files = _parquet_files(repo)
    if not files:
        raise UsageError(
            f"{asked.repo} has no parquet files, and nothing else of a dataset is read; download "
            "its text and give the files."
        )
    declared = _declared(repo.folder)
    if not declared:
        return _of_split(asked, _of_folder(asked, files))
    entry = declared.get(asked.config or _default_of(declared) or "")
    if entry is None:
        raise _no_config(asked, declared)
    splits, folder = entry
    if not splits:
        return _of_split(asked, [f for f in files if f.startswith(folder)])
    found = [f for f in files if any(fnmatchcase(f, p) for p in splits.get(asked.split, ()))]
    if not found:
        raise _no_split(asked, splits)
    return found


def _declared(folder: Path) -> dict[str, tuple[dict[str, list[str]], str]]:
    """Of each configuration that the card names: patterns of files by split, or else its folder."""
    configs = read_card(folder).get("configs")
    found = {}
    for entry in configs if isinstance(configs, list) else ():
        if not isinstance(entry, dict):
            continue
        name = str(entry.get("config_name") or _DEFAULT_CONFIG)
        if str(entry.get("default")).lower() == "true":
            found = {_DEFAULT_CONFIG: (_patterns(entry), _data_folder(entry)), **found}
        found[name] = (_patterns(entry), _data_folder(entry))
    return found


def _default_of(declared: Iterable[str]) -> str | None:
    names = list(declared)
    return names[0] if len(names) == 1 or names[0] == _DEFAULT_CONFIG else None


def _data_folder(entry: Mapping[str, object]) -> str:
    folder = str(entry.get("data_dir") or "").strip("./")
    return f"{folder}/" if folder else ""


def _patterns(entry: Mapping[str, object]) -> dict[str, list[str]]:
    """Patterns by split; a star of `fnmatch` goes over slashes too, so that two are one."""
    files = entry.get("data_files")
    folder = _data_folder(entry)
    found: dict[str, list[str]] = {}
    for part in files if isinstance(files, list) else [files]:
        split, paths = (
            (part.get("split"), part.get("path")) if isinstance(part, dict) else (_TRAIN, part)
        )
        for path in paths if isinstance(paths, list) else [paths]:
            if isinstance(path, str):
                pattern = folder + path.removeprefix("./").replace("**/", "*")
                found.setdefault(str(split), []).append(pattern)
    return found


def _of_folder(asked: HubText, files: Sequence[str]) -> list[str]:
    """Without a word in the card a configuration is a folder, if it is anything."""
    folders = {f.partition("/")[0] for f in files if "/" in f}
    if asked.config is not None:
        if asked.config not in folders:
            raise _no_config(asked, folders)
        return [f for f in files if f.startswith(f"{asked.config}/")]
    if _DEFAULT_CONFIG in folders:
        return [f for f in files if f.startswith(f"{_DEFAULT_CONFIG}/")]
    # The hub's conversion has a folder for each configuration.
    if len(folders) > 1 and all(f.count("/") == 2 for f in files):
        raise _no_config(asked, folders)
    return list(files)


def _of_split(asked: HubText, files: Sequence[str]) -> list[str]:
    """Files whose path names the split; where none names any, all are of ``train``."""
    by_split: dict[str, list[str]] = {}
    for file in files:
        words = re.split(r"[^a-z0-9]+", file.lower())
        named = next((s for s, known in _SPLITS.items() if any(w in known for w in words)), None)
        by_split.setdefault(named or (asked.split if asked.split in words else ""), []).append(file)
    if set(by_split) == {""} and asked.split == _TRAIN:
        return list(files)
    if asked.split not in by_split:
        raise _no_split(asked, filter(None, by_split))
    return by_split[asked.split]


def _no_config(asked: HubText, names: Iterable[str]) -> UsageError:
    known = ", ".join(sorted(names)[:12]) or "none"
    said = f"no configuration {asked.config}" if asked.config else "several configurations"
    return UsageError(f"{asked.repo} has {said}; give one as {asked.repo}:NAME, of {known}.")


def _no_split(asked: HubText, names: Iterable[str]) -> UsageError:
    known = ", ".join(sorted(names)[:12]) or "none"
    return UsageError(
        f"{asked.repo} has no split {asked.split}"
        f"{f' in {asked.config}' if asked.config else ''}; it has {known}."
    )


def _rows(path: Path, where: str, field: str) -> Iterator[Document]:
    """The documents of a parquet file, a few hundred rows in memory."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names or not _is_text(file.schema_arrow.field(field).type):
                problem = "is not text" if field in names else "is missing"
                raise UsageError(
                    f"{where}: the column {field!r} {problem}; name the one with the text by "
                    f"--field (its columns: {', '.join(names[:20])})."
                )
            language = next(
                (
                    n
                    for n in LANGUAGE_FIELDS
                    if n in names and _is_text(file.schema_arrow.field(n).type)
                ),
                None,
            )
            columns = [field, *([language] if language else [])]
            number = 0
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    text = row[field]
                    if text and text.strip():
                        said = row[language] if language else None
                        yield Document(text, said or TEXT, f"{where}:{number}")
    except (pyarrow.ArrowException, OSError, ValueError) as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip(".")
        raise UsageError(
            f"{where} is no parquet file that can be read ({reason[:200]}); remove it from the "
            "hub cache and try again, or take another dataset."
        ) from None


def _is_text(kind: object) -> bool:
    return str(kind) in ("string", "large_string", "string_view")
