"""Feed every reader with damaged files for as long as asked, or until a number is reached.

    python -m fuzzing.campaign --minutes 5
    python -m fuzzing.campaign --inputs 1000000 --state FOLDER   # goes on where it was
    python -m fuzzing.campaign --replay FILE

Run in `tests/`; `make fuzz` does. Input i of a reader depends on the run's seed and on i alone.
Each that breaks the contract (`watched`) is saved as a file that ``--replay`` reads again.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import secrets
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .readers import READERS
from .watched import Outcome, replay, run_batch

#: Where failing inputs are kept, beside the project's other caches.
SAVED = Path(__file__).parents[2] / "build" / "fuzz"
BATCH = 500
#: Findings of one kind at one place are counted; so many are saved.
_SAVED_EACH = 3


class State:
    """Counts by reader, kept in a file after every batch."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.path = folder, folder / "state.json"
        self.counts: dict[str, Any] = {"seed": seed, "readers": {}}
        if self.path.is_file():
            self.counts = json.loads(self.path.read_text())

    @property
    def seed(self) -> int:
        return self.counts["seed"]

    def of(self, name: str) -> dict[str, Any]:
        empty = {"n": 0, "accepted": 0, "refused": {}, "findings": {}}
        empty |= {"slowest_s": 0.0, "extra_bytes": 0, "wall_s": 0.0}
        return self.counts["readers"].setdefault(name, empty)

    def add(self, name: str, outcome: Outcome, wall_s: float) -> None:
        mine = self.of(name)
        for key in ("n", "accepted"):
            mine[key] += getattr(outcome, key)
        mine["refused"] = collections.Counter(mine["refused"]) + outcome.refused
        for key in ("slowest_s", "extra_bytes"):
            mine[key] = max(mine[key], getattr(outcome, key))
        mine["wall_s"] += wall_s
        for found in outcome.findings:
            kind = f"{found['what'].partition(':')[0]} at {found['where']}"
            n = mine["findings"][kind] = mine["findings"].get(kind, 0) + 1
            if n <= _SAVED_EACH:
                self._save(found, n == 1)
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.counts, indent=1))
        partial.replace(self.path)

    def _save(self, found: dict[str, Any], say: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = found["reader"].replace(" ", "-").replace(",", "")
        path = self.folder / f"{name}-{found['seed']}-{found['index']}.json"
        path.write_text(json.dumps(found))
        if say:
            print(f"{found['reader']}: {found['what'][:200]}, {found['where']}", flush=True)
            print(f"  kept in {path}", flush=True)


def campaign(state: State, inputs: int | None, seconds: float | None) -> int:
    """Run until there were so many inputs, or for so long; the number of findings."""
    end = time.monotonic() + seconds if seconds is not None else float("inf")
    shares = sum(reader.share for reader in READERS.values())
    open_ended = inputs is None
    while True:
        n_before = sum(state.of(name)["n"] for name in READERS)
        for name, reader in READERS.items():
            done = state.of(name)["n"]
            wanted = BATCH * reader.share if open_ended else inputs * reader.share / shares - done
            count = min(round(wanted), round(BATCH * reader.share))
            if time.monotonic() > end:
                return _findings(state)
            if count > 0:
                begin = time.monotonic()
                outcome = run_batch(reader, state.seed, done, count)
                state.add(name, outcome, time.monotonic() - begin)
        if sum(state.of(name)["n"] for name in READERS) == n_before:
            return _findings(state)


def _findings(state: State) -> int:
    return sum(n for r in state.counts["readers"].values() for n in r["findings"].values())


def report(state: State) -> str:
    """A table of at most 80 columns."""
    lines = [
        f"{'reader':25} {'inputs':>9} {'sound':>8} {'broken':>6} {'s, most':>8} {'MB, most':>8}"
    ]
    for name, r in state.counts["readers"].items():
        broken = sum(r["findings"].values())
        lines.append(
            f"{name:25} {r['n']:9,} {r['accepted']:8,} {broken:6} {r['slowest_s']:8.3f} "
            f"{r['extra_bytes'] / 1e6:8.1f}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, help="inputs of all readers together")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--seed", type=int, help="of a new run")
    parser.add_argument("--state", type=Path, default=None, help="folder to go on in")
    parser.add_argument("--replay", type=Path, help="a saved input to read again")
    args = parser.parse_args()
    if args.replay:
        with tempfile.TemporaryDirectory() as folder:
            replay(json.loads(args.replay.read_text()), Path(folder))
        print("It is taken as sound.")
        return 0
    seed = secrets.randbelow(1 << 32) if args.seed is None else args.seed
    state = State(args.state or SAVED / f"run-{seed}", seed)
    n = campaign(state, args.inputs, 60 * args.minutes if args.minutes is not None else None)
    print(report(state))
    total = sum(r["n"] for r in state.counts["readers"].values())
    print(f"{total:,} inputs of seed {state.seed}: {n} broke a reader's contract.")
    return 1 if n else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and tidy up
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
