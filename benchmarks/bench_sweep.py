"""`dus-edge sweep` beside building every plan and running it; its memory; angles and losses.

    python benchmarks/bench_sweep.py cost CHECKPOINT [--chunks 16] [--rounds 1]
    python benchmarks/bench_sweep.py exact CHECKPOINT [--chunks 4]
    python benchmarks/bench_sweep.py memory [--work DIR]

`cost`: all m of CHECKPOINT over the same tokens of the built-in mix. One side is one `sweep`; the
other is, for each m, `dus-edge upscale` and then a process that loads the folder by transformers
and computes the loss of all tokens, in float32, eight chunks at once. Both get all cores. Wall and
CPU seconds are of everything: start, imports, building, running. Losses must agree to 1e-4 nats.

`exact`: the same of plans of every kind: two m, a block, repeated ranges, each with branch scales
of 0, ½ and 1, stacked and interleaved. With a scale of 0 the built model's logits must be the
base's, bit for bit.

`memory`: three plans of a random base with the layers of Mistral-7B, eight of them, in bfloat16;
peak RSS (VmHWM) of `sweep`, against three layers in float32 and the activations of a batch.

Results go to `results/sweep.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import HERE, RESULTS, append, machine

CLI = [sys.executable, "-c", "from dus_edge.cli.main import main; main()"]
#: A command, and then the peak of its memory.
PEAK = (
    "import sys\nfrom dus_edge.cli.main import main\n"
    "try:\n    main()\nfinally:\n"
    "    status = open('/proc/self/status').read()\n"
    "    print('VmHWM', status.split('VmHWM:')[1].split()[0], file=sys.stderr)\n"
)


def timed(command: list[str]) -> tuple[float, float, str]:
    """Wall and CPU seconds of a command, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - begun, cpu, done.stdout


#: Plans of 30 layers, of every kind.
EXACT = "--m 2,8 --plan 0:10,5:30 --plan 0:4,3:8,5:9,8:30 --branch-scale 0,0.5,1"
EXACT += " --place stacked,interleaved"


def plain_loss(folder: Path, tokens: Path) -> None:
    """What a person would write: the mean loss of an up-scaled folder, as JSON."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    import transformers

    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(np.load(tokens).astype(np.int64))
    losses: list[float] = []
    with torch.inference_mode():
        for some in ids.split(8):
            logits, targets = model(some).logits[:, :-1], some[:, 1:]
            found = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            losses += found.view(len(some), -1).mean(1).tolist()
    print(json.dumps(sum(losses) / len(losses)))


def saved_tokens(checkpoint: str, n_chunks: int, work: Path) -> Path:
    """The tokens that `sweep` takes, as a file."""
    import numpy as np

    from dus_edge.jobs.export.calibration import TextChoice, read_chunks
    from dus_edge.upscale.model import find_model
    from dus_edge.upscale.plan import identity

    model = find_model(checkpoint, identity, weights=True, say=lambda line: None)
    tokens = work / "tokens.npy"
    np.save(tokens, read_chunks(model, TextChoice(n_chunks=n_chunks)).tokens)
    return tokens


def sweep_all(
    checkpoint: str, n_chunks: int, more: list[str]
) -> tuple[dict[str, Any], list[float]]:
    """What a sweep says as JSON, and its wall and CPU seconds."""
    words = ["sweep", checkpoint, "--chunks", str(n_chunks), "--compute", "cpu", "--json", *more]
    wall, cpu, out = timed([*CLI, *words])
    return json.loads(out), [wall, cpu]


def build_and_run(
    checkpoint: str, plan: dict[str, Any], tokens: Path, work: Path
) -> tuple[float, list[float]]:
    """Loss of a plan by itself, built and run; wall and CPU seconds of both together."""
    up = work / "up"
    shutil.rmtree(up, ignore_errors=True)
    build = [*CLI, "upscale", checkpoint, "--plan", plan["plan"], "-o", str(up)]
    build += ["--method", plan["method"], "--branch-scale", str(plan["branch_scale"])]
    run = [sys.executable, __file__, "loss", str(up), "--tokens", str(tokens)]
    spent = [0.0, 0.0]
    for command in (build, run):
        *seconds, out = timed(command)
        spent = [a + b for a, b in zip(spent, seconds, strict=True)]
    return json.loads(out), spent


def cost(checkpoint: str, n_chunks: int, rounds: int, work: Path) -> list[dict[str, Any]]:
    """One `sweep` beside every plan by itself."""
    tokens = saved_tokens(checkpoint, n_chunks, work)
    lines = []
    for number in range(rounds):
        found, together = sweep_all(checkpoint, n_chunks, [])
        base_loss = math.log(found["base_perplexity"]["value"])
        apart, largest = [0.0, 0.0], 0.0
        for plan in found["plans"]:
            loss, spent = build_and_run(checkpoint, plan, tokens, work)
            apart = [a + b for a, b in zip(apart, spent, strict=True)]
            largest = max(largest, abs(loss - base_loss - plan["loss"]))
        for case, (wall, cpu) in (("sweep", together), ("one by one", apart)):
            line: dict[str, Any] = {"case": case, "wall_s": round(wall, 2), "cpu_s": round(cpu, 2)}
            line |= {"plans": len(found["plans"]), "n_tokens": found["text"]["n_scored"]}
            lines.append(line | {"round": number, "model": found["base"]})
        lines[-2] |= {
            "share_of_wall": round(together[0] / apart[0], 4),
            "share_of_cpu": round(together[1] / apart[1], 4),
            "largest_difference_nats": largest,
        }
        print(json.dumps(lines[-2]), json.dumps(lines[-1]), sep="\n", flush=True)
    return lines


def exact(checkpoint: str, n_chunks: int, work: Path) -> list[dict[str, Any]]:
    """Losses of plans of every kind, swept and built."""
    import numpy as np
    import torch
    import transformers

    def logits(folder: str | Path) -> torch.Tensor:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.inference_mode():
            return model.eval()(torch.from_numpy(np.load(tokens)[:1].astype(np.int64))).logits

    tokens = saved_tokens(checkpoint, n_chunks, work)
    found, _ = sweep_all(checkpoint, n_chunks, EXACT.split())
    base_loss, of_base = math.log(found["base_perplexity"]["value"]), logits(checkpoint)
    lines = []
    for plan in found["plans"]:
        loss, _ = build_and_run(checkpoint, plan, tokens, work)
        line = {"case": "exact", "model": found["base"], "n_tokens": found["text"]["n_scored"]}
        line |= {key: plan[key] for key in ("label", "plan", "method", "branch_scale", "loss")}
        line["difference_nats"] = loss - base_loss - plan["loss"]
        if plan["branch_scale"] == 0:
            line["logits_of_the_base"] = torch.equal(logits(work / "up"), of_base)
        print(json.dumps(line), flush=True)
        lines.append(line)
    return lines


def memory(work: Path) -> list[dict[str, Any]]:
    """Peak RSS of `sweep` on layers of Mistral-7B."""
    base = work / "base"
    if not base.exists():
        make = [sys.executable, str(HERE / "make_checkpoint.py"), str(base), "--layers", "8"]
        subprocess.run(make, check=True)
    config = json.loads((base / "config.json").read_text())
    h, f = config["hidden_size"], config["intermediate_size"]
    head_dim = h // config["num_attention_heads"]
    kv = config["num_key_value_heads"] * head_dim
    layer = h * h * 2 + 2 * h * kv + 3 * h * f
    words = ["sweep", str(base), "--m", "1:4", "--chunks", "4", "--compute", "cpu", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    peak = int(done.stderr.rsplit("VmHWM", 1)[1].split()[0]) << 10
    line = {
        "case": "memory",
        "model": "random, 8 layers of Mistral-7B, bfloat16",
        "peak_rss_bytes": peak,
        "layer_f32_bytes": 4 * layer,
        "layers": round(peak / (4 * layer), 3),
        "plans": 3,
        "batch_tokens": 2048,
    }
    print(json.dumps(line), flush=True)
    return [line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("cost", "exact", "memory", "loss"))
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tokens", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    if args.what == "loss":
        plain_loss(Path(args.checkpoint), args.tokens)
        return
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        if args.what == "memory":
            lines = memory(work)
        elif args.what == "exact":
            lines = exact(args.checkpoint, args.chunks, work)
        else:
            lines = cost(args.checkpoint, args.chunks, args.rounds, work)
    append(RESULTS / "sweep.jsonl", [line | machine() for line in lines])


if __name__ == "__main__":
    main()
