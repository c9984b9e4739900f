"""Small files of a checkpoint: regular ones, and none that a link brings in from elsewhere.

What a checkpoint's folder says is read, carried into results and passed on. A link in a stranger's
folder could make any file of the user's a part of that.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

from dus_edge.checkpoint.names import ADAPTER_CONFIG, CONFIG, GENERATION_CONFIG, TOKENIZER_FILES
from dus_edge.errors import CheckpointError

#: Files of a source that belong to a result as they are.
CARRIED = (
    GENERATION_CONFIG,
    *TOKENIZER_FILES,
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)
#: A folder of them.
CHAT_TEMPLATES = "additional_chat_templates"
_LOOKED_AT = (
    CONFIG,
    ADAPTER_CONFIG,
    "README.md",
    "quantize_config.json",
    "tekken.json",
    *CARRIED,
)
#: No small file of a checkpoint is larger.
MAX_SMALL_BYTES = 256 << 20


def check_small_files(folder: Path) -> None:
    """See that what is read and carried is the folder's own.

    Links may lead to other files of the folder and, in a hub cache, to its ``blobs``. Weights are
    not looked at: people keep those elsewhere.

    Raises:
        CheckpointError: a file is none, is too large, or leads out of the folder.
    """
    allowed = _allowed(folder)
    for path in _small_files(folder):
        try:
            real = path.resolve(strict=True)
            info = real.stat()
        except (OSError, RuntimeError) as e:
            raise CheckpointError(f"{path} leads nowhere ({e}); fetch it again.") from None
        if not any(real.is_relative_to(root) for root in allowed):
            raise CheckpointError(
                f"{path} is a link that leads out of the checkpoint's folder, to {real}; put a "
                "copy in its place if it belongs there."
            )
        if not stat.S_ISREG(info.st_mode):
            raise CheckpointError(f"{path} is no regular file; take it out of the folder.")
        if info.st_size > MAX_SMALL_BYTES:
            raise CheckpointError(
                f"{path} has {info.st_size:,} bytes, more than any such file; fetch it again."
            )


def carried_files(folder: Path) -> Iterator[Path]:
    """Files that go with a result, checked by `check_small_files`, relative to the folder."""
    for name in CARRIED:
        if (folder / name).is_file():
            yield Path(name)
    for path in sorted((folder / CHAT_TEMPLATES).glob("*")):
        if path.is_file():
            yield path.relative_to(folder)


def _small_files(folder: Path) -> Iterator[Path]:
    for name in _LOOKED_AT:
        path = folder / name
        if path.is_symlink() or path.exists():
            yield path
    if (folder / CHAT_TEMPLATES).is_symlink():
        yield folder / CHAT_TEMPLATES
    elif (folder / CHAT_TEMPLATES).is_dir():
        yield from sorted((folder / CHAT_TEMPLATES).iterdir())


def _allowed(folder: Path) -> tuple[Path, ...]:
    """Where the files may really lie: the folder, and of a snapshot in a hub cache its blobs."""
    real = folder.resolve()
    if real.parent.name == "snapshots":
        return real, real.parents[1] / "blobs"
    return (real,)
