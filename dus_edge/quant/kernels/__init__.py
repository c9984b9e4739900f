"""Quantizers compiled by Numba, one function per type.

Every kernel has the same form, ``kernel(source, importance, sigma2, out) -> overflow``:

- source: C-contiguous 1-D float32 weights, or uint16 for the bits of bfloat16; whole rows;
- importance: ``(n_cols,)`` float32; empty for a kernel without importance;
- sigma2: ``(n_rows,)`` float32, mean of the squares of each row, for the weighted kernels of Q4_0
  to Q5_1; else empty;
- out: uint8, exactly the bytes of the blocks; always filled with finite scales;
- overflow: whether a scale was too large for float16 and is the largest one instead.

IQ2_XS and IQ2_S have a kernel with importance alone. Those of `mlx` and `feedback` have forms of
their own. All release the GIL. `load` gives one of them; compiled code is cached on disk.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import importlib
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dus_edge.machine import user_cache

_MODULES = {
    **dict.fromkeys(("f16", "f16_from_bf16", "bf16"), "plain"),
    **dict.fromkeys(("q8_0", "q4_0", "q4_1", "q5_0", "q5_1"), "blocks"),
    **dict.fromkeys(("q2_k", "q4_k", "q5_k"), "affine_k"),
    **dict.fromkeys(("q3_k", "q6_k"), "symmetric_k"),
    **dict.fromkeys(("iq4_nl", "iq4_xs"), "nonlinear"),
    **{name: f"lattice.{name}" for name in ("iq2_xs", "iq2_s", "iq3_s")},
    **dict.fromkeys(("mlx_affine", "mlx_affine_bf16"), "mlx"),
    "feed_block": "feedback",
}
#: Seconds of silence before compiling is spoken of: loading cached code takes less.
_PATIENCE_S = 0.5


@functools.cache
def load(name: str) -> Any:
    """The kernel of that name (Numba's dispatcher), e.g. ``q4_k`` or ``q4_k_weighted``."""
    module = _MODULES[name.removesuffix("_weighted")]
    with cached_code():
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)


@contextlib.contextmanager
def announced(names: str, say: Callable[[str], None]) -> Iterator[None]:
    """Kernels are compiled within, or loaded; said, once, if that takes longer than a moment."""
    start = time.monotonic()
    spoken = threading.Event()

    def speak() -> None:
        spoken.set()
        say(f"Compiling for this CPU, only once: {names}")

    timer = threading.Timer(_PATIENCE_S, speak)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if spoken.is_set():
        say(f"  compiled in {time.monotonic() - start:.1f} s")


@contextlib.contextmanager
def cached_code() -> Iterator[None]:
    """Compiled code of what is imported within goes to a folder that belongs to its sources.

    Numba looks only at the age of the file that a function stands in; a change in a file that it
    imports would go unnoticed.
    """
    from numba import config

    before = config.CACHE_DIR
    if not before:
        config.CACHE_DIR = str(cache_folder())
    try:
        yield
    finally:
        config.CACHE_DIR = before


@functools.cache
def cache_folder() -> Path:
    """Folder of the compiled code: in the user's cache, else in the temporary folder."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    beside = [here.parent / name for name in ("simd.py", "gptq_kernel.py")]
    for path in sorted([*here.rglob("*.py"), *beside]):
        digest.update(path.read_bytes())
    name = f"kernels-{digest.hexdigest()[:16]}"
    for base in (user_cache(), _own_temporary()):
        if base is not None and (folder := _made(base / "dus-edge" / name)):
            return folder
    folder = Path(tempfile.mkdtemp(prefix="dus-edge-kernels-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _own_temporary() -> Path | None:
    """A folder in the temporary one that only this user can write to, the same every time.

    Compiled code is loaded from it, so one that belongs to somebody else is not used.
    """
    folder = Path(tempfile.gettempdir()) / f"dus-edge-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return folder if own and not found.st_mode & 0o022 else None


def _made(folder: Path) -> Path | None:
    """The folder, if files can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None
