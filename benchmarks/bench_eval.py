"""`dus-edge eval` beside lm-evaluation-harness' own HFLM: the same answers, and what they cost.

    python benchmarks/bench_eval.py GGUF FOLDER --data DIR [--docs arc_challenge=25,...]

GGUF is FOLDER's model in F16. Each task is asked three times, by turns, in a process of its own on
one thread: by HFLM in float32 (batches of 4), by our folder model and by our GGUF model. CPU
seconds are of asking alone: reading tasks and weights is left out.

Last, a few documents of one task go through the harness' own `gguf` model too, over HTTP to
llama-cpp-python's server of the same file; its CPU seconds are those of both processes.

Prompts must be equal to the letter. Compared are all log-likelihoods (nats, the largest and the
root-mean-square difference) and the greedy flags; of GSM8K the texts. HFLM's answers are kept in
WORK, without the questions, and are not computed again. Results go to `results/eval.jsonl`, a line
a task and model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from common import RESULTS, append, machine

DOCS = {
    "arc_challenge": 25,
    "hellaswag": 25,
    "mmlu": 100,
    "truthfulqa_mc2": 100,
    "winogrande": 100,
    "gsm8k": 20,
}
CASES = ("HFLM", "folder", "gguf")
#: Documents that the server is asked: it sorts the whole vocabulary for every token it echoes.
SERVED = ("winogrande", 20)


def load(group: str, data: Path, n: int):  # type: ignore[no-untyped-def]
    """The tasks of a group with about `n` documents in all."""
    from dus_edge.eval.suites import Suite, find_suite
    from dus_edge.eval.tasks import load_tasks

    whole = find_suite("h6")
    own = [task for task in whole.tasks if task.group == group]
    if len(own) > 1:
        # MMLU: some subjects, so that several questions share their solved examples.
        own = own[:: max(1, len(own) * 5 // n)][: n // 5]
    return load_tasks(Suite(whole.name, whole.title, tuple(own), whole.titles), data, n, 0)


def child(
    case: str, model: Path, group: str, data: Path, n: int, base_url: str = ""
) -> dict[str, Any]:
    """Ask one task; CPU seconds, tokens, and every answer under the digest of its prompt."""
    import lm_eval
    import torch
    from lm_eval.tasks import TaskManager

    from dus_edge.eval.lm import FolderLM, LlamaLM
    from dus_edge.eval.record import AnswerRecord
    from dus_edge.eval.tasks import EXAMPLES_SEED, quiet_harness
    from dus_edge.run.open import inspect_source

    torch.set_num_threads(1)
    tasks = load(group, data, n)
    with tempfile.TemporaryDirectory() as folder, quiet_harness():
        record = AnswerRecord(Path(folder) / "a.jsonl")
        if case == "HFLM":
            from lm_eval.models.huggingface import HFLM

            lm: Any = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=4)
        elif case == "server":
            from lm_eval.models.gguf import GGUFLM

            lm = GGUFLM(base_url=base_url)
        elif case == "folder":
            lm = FolderLM(inspect_source(model), record, "cpu", 1)
        else:
            lm = LlamaLM(inspect_source(model), record, "cpu", 1, "f32")
        begun, wall = time.process_time(), time.monotonic()
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=[task.task for task in tasks],
            task_manager=TaskManager(include_defaults=False),
            samples={task.spec.task: list(task.asked) for task in tasks},
            bootstrap_iters=0,
            fewshot_random_seed=EXAMPLES_SEED,
        )
        cpu_s, wall_s = time.process_time() - begun, time.monotonic() - wall
    assert found is not None
    answers = []
    for samples in found["samples"].values():
        for sample in samples:
            answers += [
                [sample["prompt_hash"], list(x[0]) if isinstance(x[0], tuple | list) else x[0]]
                for x in sample["resps"]
            ]
    documents = sum(len(task.asked) for task in tasks)
    return {
        "cpu_s": round(cpu_s, 2),
        "wall_s": round(wall_s, 2),
        "documents": documents,
        "tokens": getattr(lm, "n_computed", None),
        "answers": answers,
    }


def served(model: Path, group: str, data: Path, n: int) -> dict[str, Any]:
    """The same through a server of our own, whose CPU seconds count too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"model": model, "n_ctx": 2048, "n_threads": 1, "n_threads_batch": 1, "port": port}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "llama_cpp.server", *words, "--logits_all", "true"]
    url = f"http://127.0.0.1:{port}"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet) as server:  # type: ignore[call-overload]
        try:
            end = time.monotonic() + 120
            while not _answers(url):
                if server.poll() is not None or time.monotonic() > end:
                    sys.exit("llama_cpp.server does not answer")
                time.sleep(0.2)
            before = _cpu_s(server.pid)
            found = child("server", model, group, data, n, url)
            found["cpu_s"] = round(found["cpu_s"] + _cpu_s(server.pid) - before, 2)
        finally:
            server.kill()
    return found


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=5):
            return True
    except OSError:
        return False


def _cpu_s(pid: int) -> float:
    """User and system seconds of a process and its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """How far answers are apart; the prompts' digests must be equal."""
    pairs = list(zip(ours["answers"], theirs["answers"], strict=True))
    assert all(a[0] == b[0] for a, b in pairs), "prompts differ"
    texts = [(a[1], b[1]) for a, b in pairs if isinstance(a[1], str)]
    if texts:
        return {"texts": len(texts), "texts_equal": sum(a == b for a, b in texts)}
    distances = [abs(float(a[1][0]) - float(b[1][0])) for a, b in pairs]
    return {
        "answers": len(pairs),
        "largest_nats": max(distances),
        "rms_nats": math.sqrt(sum(d * d for d in distances) / len(distances)),
        "greedy_differ": sum(str(a[1][1]) != str(b[1][1]) for a, b in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--docs", default="", help="group=N, with commas between")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        case, group, n = args.child
        if case == "server":
            print(json.dumps(served(args.gguf, group, args.data, int(n))))
            return
        model = args.gguf if case == "gguf" else args.folder
        print(json.dumps(child(case, model, group, args.data, int(n))))
        return
    docs = DOCS | {k: int(v) for k, v in (x.split("=") for x in args.docs.split(",") if x)}
    args.work.mkdir(parents=True, exist_ok=True)
    lines = []
    rounds = [(group, n, CASES) for group, n in docs.items()]
    for group, n, cases in [*rounds, (*SERVED, ("server", "gguf"))]:
        found = {}
        for case in cases:
            kept = args.work / f"{group}-{n}-{case}.json"
            if not kept.exists():
                command = [sys.executable, __file__, args.gguf, args.folder, "--data", args.data]
                done = subprocess.run(
                    [*map(str, command), "--work", str(args.work), "--child", case, group, str(n)],
                    env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    sys.exit(done.stderr[-3000:])
                kept.write_text(done.stdout.strip().splitlines()[-1])
            found[case] = json.loads(kept.read_text())
        reference = cases[0]
        for case in cases:
            line = {k: v for k, v in found[case].items() if k != "answers"}
            line |= {"task": group, "case": case, "model": args.folder.name}
            if case != reference:
                line |= compare(found[case], found[reference]) | {"beside": reference}
                line["cpu_ratio"] = round(found[reference]["cpu_s"] / found[case]["cpu_s"], 2)
            lines.append(line)
            print(json.dumps(line), flush=True)
    append(RESULTS / "eval.jsonl", [line | machine() for line in lines])


if __name__ == "__main__":
    main()
