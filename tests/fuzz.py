"""Try what was never tried until time is up or something breaks: `make fuzz MINUTES=10`.

Half of the time the readers of files get damaged ones (`fuzzing`); in the other half the property
tests are repeated with new draws. By itself: ``python tests/fuzz.py MINUTES [options of pytest]``.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent
#: Made by tests/conftest.py when a test fails, beside the tests.
FAILED = ".fuzz-failed"
#: Seconds that a failure may take to be reported after time is up.
LAST_WORDS_S = 600
KEEP = """
A drawn case failed; it stands above, after "Failing test case" (or "Falsifying example").
To keep it, write its arguments above the test, where they are tried on every run from then on:

    @example(name="a", n=5)    # from hypothesis import example
    @given(...)
    def test_...

Where a test draws inside itself (st.data()), the line @reproduce_failure(...) above shows the case
again until it is mended; keep it as a test of its own. The seed of this round was {seed}.
"""


def fuzz(seconds: float, folder: Path = TESTS, *options: str) -> int:
    """Run rounds of all property tests under `folder`; the exit code, 1 after a failure."""
    end = time.monotonic() + seconds
    n = 0
    while (left := end - time.monotonic()) > 0:
        seed = secrets.randbelow(1 << 32)
        code = one_round(seed, left, folder, options)
        if code is None:
            break
        n += 1
        if code:
            # 2 is what stopping at the first failure ends with under pytest-xdist.
            failed = code in (1, 2)
            print(KEEP.format(seed=seed) if failed else f"pytest ended with {code}.")
            return 1
        print(f"Round {n}: no failure.", flush=True)
    print(f"Time is up: {n} whole rounds and part of one more, no failure.")
    return 0


def one_round(seed: int, timeout: float, folder: Path, options: tuple[str, ...]) -> int | None:
    """pytest's exit code, None if time was up before. The files come in another order each time,
    so that a short run is not always of the same tests."""
    files = sorted(map(str, folder.glob("test_*.py")))
    random.Random(seed).shuffle(files)
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-x", "-m", "hypothesis"),
        *("--hypothesis-profile=fuzz", f"--hypothesis-seed={seed}", "--no-header"),
        *(*options, *files),
    ]
    failed = folder / FAILED
    failed.unlink(missing_ok=True)
    # Workers of pytest-xdist and what tests start end with it.
    environment = {**os.environ, "FUZZ_FAILED": str(failed)}
    run = subprocess.Popen(command, start_new_session=True, env=environment)
    try:
        return run.wait(timeout)
    except subprocess.TimeoutExpired:
        # A test that failed in the last moments is still to be said: its example is made small.
        return run.wait(LAST_WORDS_S) if failed.exists() else None
    finally:
        failed.unlink(missing_ok=True)
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGTERM)
            run.wait()


def fuzz_readers(seconds: float) -> int:
    """Feed the readers with damaged files; the exit code, 1 after a failure."""
    command = [sys.executable, "-m", "fuzzing.campaign", "--minutes", str(seconds / 60)]
    run = subprocess.Popen(command, cwd=TESTS)
    try:
        return run.wait()
    finally:
        if run.poll() is None:
            run.terminate()
            run.wait()


if __name__ == "__main__":
    # Ended from outside, too, it leaves nothing running behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    half = 30 * float(sys.argv[1])
    code = fuzz_readers(half)
    sys.exit(fuzz(half, TESTS, *sys.argv[2:]) or code)
