"""Feed every reader with damaged files, a million in all, and keep the counts.

    python benchmarks/fuzz_readers.py [--inputs 1000000] [--seed N] [--state FOLDER]

The run is that of `make fuzz` (`tests/fuzzing/`), with a number of inputs and no time. Stopped, it
goes on where it was when it is started again with the same folder. At its end `results/fuzz.jsonl`
gets a line for each reader.
"""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

from common import HERE, RESULTS, append, machine

sys.path.insert(0, str(HERE.parent / "tests"))

from fuzzing.campaign import SAVED, State, campaign, report

FILE = RESULTS / "fuzz.jsonl"


def lines(state: State) -> Iterator[dict[str, object]]:
    """What is kept of a run, a line for each reader."""
    for name, found in state.counts["readers"].items():
        counts = {k: v for k, v in found.items() if k != "wall_s"}
        yield {"reader": name, **counts, "seed": state.seed, **state.counts["machine"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 32))
    parser.add_argument("--state", type=Path, help="folder to go on in")
    args = parser.parse_args()
    state = State(args.state or SAVED / f"run-{args.seed}", args.seed)
    state.counts.setdefault("machine", machine())
    n = campaign(state, args.inputs, None)
    print(report(state))
    append(FILE, lines(state))
    return 1 if n else 0


if __name__ == "__main__":
    sys.exit(main())
