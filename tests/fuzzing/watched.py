"""One batch of inputs in a process of its own, under limits: what came of it, and what broke.

The contract of a reader, for any bytes: it returns or raises an error of the program's own; it
takes no more than `MOST_CPU_S` and `MOST_EXTRA_BYTES`; it writes nothing, starts nothing, connects
to nothing and imports no pickle.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import mmap
import os
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dus_edge.errors import MOST_MESSAGE, DusEdgeError

from .mutate import Seed, mutated
from .readers import READERS, Reader

MOST_CPU_S = 1.0
MOST_EXTRA_BYTES = 200 << 20
#: An input that takes this long is interrupted; a process that cannot be, is killed by its parent.
INTERRUPTED_S, KILLED_S = 5.0, 120.0
_M_ARENA_MAX = -8
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
#: What the interpreter announces and no reader may do. `open` is looked at closer.
_FORBIDDEN = (
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.chown", "os.utime", "os.system", "os.exec", "os.posix_spawn", "os.fork"),
    *("subprocess.Popen", "socket.connect", "socket.bind", "pickle.find_class", "os.putenv"),
    *("shutil.rmtree", "tempfile.mkstemp", "tempfile.mkdtemp", "os.kill"),
)


class TooSlow(BaseException):
    """No `except Exception` of a reader takes it for its own."""


class Forbidden(BaseException):
    """A reader did what it may not do."""


@dataclass
class Outcome:
    """What came of a batch.

    Attributes:
        n: inputs read.
        accepted: of them, taken as sound.
        refused: the rest, by the error's class.
        findings: what broke the contract: reader, seed, index, what, where, files.
        slowest_s: CPU time of the slowest input, seconds.
        extra_bytes: by how much the process grew at its largest.
    """

    n: int = 0
    accepted: int = 0
    refused: Counter = field(default_factory=Counter)
    findings: list[dict[str, Any]] = field(default_factory=list)
    slowest_s: float = 0.0
    extra_bytes: int = 0


def run_batch(reader: Reader, seed: int, start: int, count: int) -> Outcome:
    """Read inputs `start` to `start + count` of a run, in a child process.

    A child that dies is one more finding, and the batch goes on behind the input that killed it.
    """
    total = Outcome()
    end = start + count
    while start < end:
        with tempfile.TemporaryDirectory(dir=_memory_folder()) as folder:
            outcome, done = _in_child(reader, seed, start, end, Path(folder))
        total.n += outcome.n
        total.accepted += outcome.accepted
        total.refused += outcome.refused
        total.findings += outcome.findings
        total.slowest_s = max(total.slowest_s, outcome.slowest_s)
        total.extra_bytes = max(total.extra_bytes, outcome.extra_bytes)
        start = done
    return total


def _in_child(reader: Reader, seed: int, start: int, end: int, folder: Path) -> tuple[Outcome, int]:
    place = mmap.mmap(-1, 8)  # shared: where the child is
    place[:] = struct.pack("<Q", start)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reading)
            outcome = _Child(reader, seed, folder, place).run(start, end)
            with os.fdopen(writing, "w") as f:
                json.dump(vars(outcome), f)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    killer = _kill_when_stuck(pid, place)
    with os.fdopen(reading) as f:
        text = f.read()
    _, status = os.waitpid(pid, 0)
    next(killer, None)
    if text:
        found = json.loads(text)
        return Outcome(**found | {"refused": Counter(found["refused"])}), end
    at = struct.unpack("<Q", place[:])[0]
    what = f"the process died (status {status})"
    broken = finding(reader, seed, at, what, "?", changed_files(reader, seed, at))
    return Outcome(n=at + 1 - start, findings=[broken]), at + 1


def _kill_when_stuck(pid: int, place: mmap.mmap) -> Iterator[None]:
    """Watch the child's place from a thread; advanced once more, the thread ends."""
    import threading

    over = threading.Event()

    def watch() -> None:
        last, since = None, time.monotonic()
        while not over.wait(1.0):
            now = place[:]
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > KILLED_S:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()

    def stop() -> Iterator[None]:
        over.set()
        thread.join()
        yield

    return stop()


def changed_files(reader: Reader, seed: int, index: int) -> dict[str, bytes | None]:
    """What input `index` changes of its seed's files."""
    drawn, rng = reader.draw(seed, index)
    return mutated(drawn, rng)


def finding(
    reader: Reader,
    seed: int,
    index: int,
    what: str,
    where: str,
    changed: Mapping[str, bytes | None],
) -> dict[str, Any]:
    """A broken contract, with all that is needed to see it again."""
    files = dict(reader.draw(seed, index)[0].files) | dict(changed)
    return {
        "reader": reader.name,
        "seed": seed,
        "index": index,
        "what": what,
        "where": where,
        "files": {k: base64.b64encode(v).decode() for k, v in files.items() if v is not None},
    }


class _Child:
    def __init__(self, reader: Reader, seed: int, folder: Path, place: mmap.mmap) -> None:
        self.reader, self.seed, self.folder, self.place = reader, seed, folder, place
        self.outcome = Outcome()
        self.watching = False
        #: By seed: the folder of its files, and those that an input has changed.
        self.laid: dict[str, tuple[Path, set[str]]] = {}

    def run(self, start: int, end: int) -> Outcome:
        os.chdir(self.folder)
        for seed in self.reader.seeds:  # caches are filled, modules imported
            self._lay(seed, {})
            self.reader.read(self.laid[seed.name][0])
        sys.addaudithook(self._audit)
        # Each thread would reserve 64 MB of addresses, which the limit counts.
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
        signal.signal(signal.SIGPROF, _interrupt)
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        limit = _memory("VmSize") + MOST_EXTRA_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        for index in range(start, end):
            self.place[:] = struct.pack("<Q", index)
            self._one(index)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        self.outcome.extra_bytes = max(0, _memory("VmHWM") - before)
        kept = {folder.name for folder, _ in self.laid.values()}
        if left := {p.name for p in self.folder.iterdir()} - kept:
            raise AssertionError(f"left behind: {left}")
        return self.outcome

    def _one(self, index: int) -> None:
        seed, rng = self.reader.draw(self.seed, index)
        changed = mutated(seed, rng)
        self._lay(seed, changed)
        out, folder = self.outcome, self.laid[seed.name][0]
        out.n += 1
        broken: tuple[str, str] | None = None
        begin = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, INTERRUPTED_S)
        self.watching = True
        try:
            self.reader.read(folder)
            out.accepted += 1
        except DusEdgeError as e:
            out.refused[type(e).__name__] += 1
            if "\n" in str(e).strip() or len(str(e)) > MOST_MESSAGE:
                broken = f"message of several lines, or of {len(str(e)):,} characters", _place(e)
        except (Exception, TooSlow, Forbidden) as e:
            broken = f"{type(e).__name__}: {e}"[:300], _place(e)
        finally:
            self.watching = False
            signal.setitimer(signal.ITIMER_PROF, 0)
        took = time.process_time() - begin
        out.slowest_s = max(out.slowest_s, took)
        if broken is None and took > MOST_CPU_S:
            broken = f"{took:.2f} s of CPU", "?"
        if broken is not None:
            out.findings.append(finding(self.reader, self.seed, index, *broken, changed))

    def _lay(self, seed: Seed, changed: Mapping[str, bytes | None]) -> None:
        """Write the files that differ from the last input's."""
        if seed.name not in self.laid:
            folder = self.folder / f"seed{len(self.laid)}"
            folder.mkdir()
            self.laid[seed.name] = folder, set(seed.files)
        folder, dirty = self.laid[seed.name]
        for name in dirty | set(changed):
            data = changed.get(name, seed.files[name])
            if data is None:
                (folder / name).unlink(missing_ok=True)
            else:
                (folder / name).write_bytes(data)
        self.laid[seed.name] = folder, set(changed)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        if event == "open":
            path, _, flags = args
            if flags & _WRITING and not isinstance(path, int):
                raise Forbidden(f"opened {path} for writing")
        elif event in _FORBIDDEN:
            raise Forbidden(f"{event} {args}")


def _interrupt(*_: object) -> None:
    raise TooSlow(f"more than {INTERRUPTED_S} s of CPU")


def _place(e: BaseException) -> str:
    """File and line of the program where an exception came from."""
    frames = traceback.extract_tb(e.__traceback__)
    own = [f for f in frames if "dus_edge" in Path(f.filename).parts]
    last = own[-1] if own else frames[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


def _memory(key: str) -> int:
    """A line of the process's status, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise KeyError(key)


def _memory_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def replay(saved: Mapping[str, Any], folder: Path) -> None:
    """Read a saved input again; what it raises passes through."""
    limit = _memory("VmSize") + 10 * MOST_EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    for name, text in saved["files"].items():
        (folder / name).write_bytes(base64.b64decode(text))
    READERS[saved["reader"]].read(folder)
