"""Kill every exporting command at random moments, and see that nothing is lost or half-written.

    python benchmarks/torture.py [--kills 20] [--seed 0] [--only gguf,gptq]

Method: each command runs once undisturbed on the built-in base; its files are the reference and
its time the span. Then, as often as asked: it is started anew and sent SIGKILL at a moment drawn
uniformly from that span; whatever then stands under a final name must be equal to the reference,
byte for byte; the same command is run to its end; now everything must be equal, and nothing else
may be in the folder: no partial file, no lock, no kept state. A kill that came after the end does
not count. Results go to `results/torture.jsonl`, a line a command.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from common import HERE, RESULTS, append, machine

CLI = [sys.executable, "-c", "from dus_edge.cli.main import main; main()"]
TEXT = HERE.parent / "dus_edge" / "checkpoint"
CALIBRATION = ["--text", str(TEXT), "--ctx", "128", "--chunks", "48"]
COMMANDS = {
    "gguf": ["gguf", "pico", "-q", "q4_k_m", "-q", "q8_0", "--alias", "a", "-o", "OUT"],
    "upscale": ["upscale", "pico", "-o", "OUT/up"],
    "imatrix": ["imatrix", "pico", *CALIBRATION, "-o", "OUT/imatrix.gguf"],
    "sensitivity": ["sensitivity", "pico", *CALIBRATION, "-o", "OUT/sensitivity.json"],
    "feedback": ["gguf", "pico", "-q", "q3_k_m", "--feedback", *CALIBRATION, "-o", "OUT"],
    "gptq": ["gptq", "pico", "--group-size", "64", *CALIBRATION, "-o", "OUT/gptq"],
    "bnb": ["bnb", "pico", "-o", "OUT/bnb"],
    "mlx": ["mlx", "pico", "-o", "OUT/mlx"],
    "tables": ["bench", "tables", "-o", "OUT"],
}


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder; of a link, where it points."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def start(command: list[str], out: Path) -> subprocess.Popen[bytes]:
    words = [word.replace("OUT", str(out)) for word in command]
    return subprocess.Popen(
        [*CLI, *words, "--overwrite"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(command: list[str], out: Path) -> float:
    """Run to the end; seconds."""
    begin = time.monotonic()
    child = start(command, out)
    _, err = child.communicate()
    if child.returncode:
        sys.exit(f"{command[0]} failed: {err.decode()[-600:]}")
    return time.monotonic() - begin


def final(name: str) -> bool:
    """Whether a name is one that a finished run leaves."""
    parts = Path(name).parts
    return not any(
        p.endswith((".partial", ".lock", ".calibration")) or p.startswith(".dus-edge")
        for p in parts
    )


def torture(name: str, n_kills: int, rng: random.Random, work: Path) -> dict[str, object]:
    """Kill one command as often as asked; returns counts, the first difference ends the program."""
    command, out = COMMANDS[name], work / "out"
    shutil.rmtree(work, ignore_errors=True)
    finish(command, out)  # compiles kernels where that was never done
    shutil.rmtree(out)
    seconds = finish(command, out)
    reference = contents(out)
    counts = {"command": name, "kills": 0, "too_late": 0, "with_leftovers": 0, "resumed": 0}
    while counts["kills"] < n_kills:
        # One in two finds finished outputs there, which it is to replace.
        if rng.random() < 0.5:
            shutil.rmtree(out)
        child = start(command, out)
        time.sleep(rng.uniform(0, seconds))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        if child.returncode != -signal.SIGKILL:
            counts["too_late"] += 1
            continue
        counts["kills"] += 1
        left = contents(out) if out.exists() else {}
        counts["with_leftovers"] += any(not final(n) for n in left)
        counts["resumed"] += any(".calibration" in n for n in left)
        wrong = [n for n in left if final(n) and left[n] != reference.get(n)]
        if wrong:
            sys.exit(f"{name}: after a kill, {wrong[0]} is not what a whole run writes")
        finish(command, out)
        after = contents(out)
        if after != reference:
            odd = sorted(set(after.items()) ^ set(reference.items()))
            sys.exit(f"{name}: after kill and rerun, {odd[0][0]} differs from an undisturbed run")
        print(f"{name}: {counts['kills']} of {n_kills}", end="\r", flush=True)
    print(
        f"{name:8} {counts['kills']:3} kills, {counts['with_leftovers']:3} left something, "
        f"{counts['resumed']:3} went on; all equal in the end",
        flush=True,
    )
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(COMMANDS))
    parser.add_argument("--work", type=Path, default=Path("build/torture"))
    parser.add_argument("--no-record", action="store_true", help="do not keep the counts")
    args = parser.parse_args()
    lines = []
    for name in args.only.split(","):
        rng = random.Random(f"{args.seed} {name}")
        lines.append(torture(name, args.kills, rng, args.work.absolute()) | {"seed": args.seed})
    shutil.rmtree(args.work, ignore_errors=True)
    if not args.no_record:
        append(RESULTS / "torture.jsonl", [line | machine() for line in lines])


if __name__ == "__main__":
    main()
