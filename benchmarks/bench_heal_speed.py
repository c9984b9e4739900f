"""Speed and memory of healing beside HF Trainer: the same model, windows, optimizer and precision.

    python benchmarks/bench_heal_speed.py [CHECKPOINT ...] [--rounds 3] [--steps 8]

Each case runs in a process of its own, by turns, `--rounds` times, on one thread: `all` and
`copies` of our trainer, and HF Trainer on all weights. All train the up-scaled base (pico, or each
CHECKPOINT) in float32 with AdamW on the same windows of 256 tokens, two a step, without checkpoints
and held-out losses. The first step warms up and does not count. Tokens per CPU second are of the
steps alone; peak RSS is the process's `VmHWM`. `full logits` is our trainer with the loss of the
whole batch at once, to tell what chunks are worth; `--long` compares that alone, with eight windows
at once. Results go to `results/heal_speed.jsonl`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import HERE, RESULTS, append, machine

WINDOW, BATCH = 256, 2
CASES = ("all", "copies", "full logits", "HF Trainer")
#: With `--long`: so many windows at once that the loss has several chunks.
LONG_CASES, LONG_BATCH = ("all", "full logits"), 8
TEXT = HERE.parent / "dus_edge" / "predict"


def open_base(base: str):  # type: ignore[no-untyped-def]
    from dus_edge.upscale.model import find_model, plan_chooser

    return find_model(base, plan_chooser(None, None, (), True), weights=True, say=print)


def windows(model, folder: Path, batch: int):  # type: ignore[no-untyped-def]
    from dus_edge.text.documents import read_documents
    from dus_edge.text.tokenizers import load_tokenizer
    from dus_edge.train.packing.batches import Batches
    from dus_edge.train.packing.tokens import read_streams, write_tokens

    tokenizer = load_tokenizer(model.source.folder, model.config.vocab_size)
    write_tokens(read_documents([TEXT], None), tokenizer, None, folder)
    return Batches(
        [s for s in read_streams(folder, "text") if s.language == "code"], [1], WINDOW, batch, 0
    )


def ours(model, batches, mode: str, steps: int, batch: int) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """CPU seconds and wall seconds of the steps behind the first."""
    import torch

    from dus_edge.calibrate.world import World
    from dus_edge.train.heal import loop, loss
    from dus_edge.train.heal.mode import learned_layers, parse_mode
    from dus_edge.train.heal.network import empty_network, learned_names, load_weights
    from dus_edge.train.heal.optim import make_optimizer

    if mode == "full logits":
        loss.CHUNK_TOKENS = 1 << 30
        mode = "all"
    layers = learned_layers(parse_mode(mode), model.plan)
    network = empty_network(model.config)
    names = learned_names(model.config, layers, mode == "all")
    load_weights(network, model.open(), set(names), torch.float32, torch.device("cpu"))
    learned = {n: p for n, p in network.model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer("adamw", learned.values(), 0.0)
    world = World(0, 1, torch.device("cpu"))

    class Nothing:
        load = staticmethod(lambda *_: 0)
        save = staticmethod(lambda *_: None)
        steps = staticmethod(list)

    clock: list[tuple[float, float]] = []

    def told(step: object) -> None:
        clock.append((time.process_time(), time.monotonic()))
        if len(clock) == steps + 1:
            raise StopIteration

    # The last step is never reached, so nothing is measured or kept.
    pace = loop.Pace(loop.Schedule(1e-5, 10**6), micro=batch, evaluate=10**9, save=10**9)
    with contextlib.suppress(StopIteration):
        loop.run_steps(network, learned, optimizer, batches, [], pace, world, Nothing(), told)
    return clock[-1][0] - clock[0][0], clock[-1][1] - clock[0][1]


def theirs(model, batches, steps: int) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """The same by HF Trainer."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from dus_edge.jobs.export.checkpoint import export_checkpoint
    from dus_edge.upscale.model import plan_chooser

    with tempfile.TemporaryDirectory() as folder:
        up = Path(folder) / "up"
        export_checkpoint(model.source.label, plan_chooser(None, None, (), True), up)
        network = AutoModelForCausalLM.from_pretrained(up, dtype=torch.float32)
        rows = []
        for step in range(steps + 1):
            batch = batches.step(step)
            for ids, positions, labels in zip(
                batch.ids, batch.positions, batch.labels, strict=True
            ):
                # The trainer's loss shifts labels itself.
                shifted = [-100, *labels[:-1].tolist()]
                rows.append({"input_ids": ids, "position_ids": positions, "labels": shifted})
        clock: list[tuple[float, float]] = []

        class Clock(TrainerCallback):
            def on_step_end(self, *_: object, **__: object) -> None:
                clock.append((time.process_time(), time.monotonic()))

        network.config.use_cache = False
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            max_steps=steps + 1,
            learning_rate=1e-5,
            weight_decay=0.0,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        Trainer(model=network, args=arguments, train_dataset=rows, callbacks=[Clock()]).train()
    return clock[-1][0] - clock[0][0], clock[-1][1] - clock[0][1]


def child(base: str, case: str, steps: int, batch: int) -> dict[str, object]:
    import torch

    torch.set_num_threads(1)
    model = open_base(base)
    with tempfile.TemporaryDirectory() as folder:
        batches = windows(model, Path(folder), batch)
        run = (
            theirs(model, batches, steps)
            if case == "HF Trainer"
            else ours(model, batches, case, steps, batch)
        )
    cpu_s, wall_s = run
    tokens = steps * WINDOW * batch
    return {
        "base": Path(base).name,
        "case": case,
        "batch_tokens": WINDOW * batch,
        "tokens": tokens,
        "tokens_per_cpu_s": round(tokens / cpu_s, 2),
        "tokens_per_s": round(tokens / wall_s, 2),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bases", nargs="*")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        batch = LONG_BATCH if args.long else BATCH
        print(json.dumps(child(args.bases[0], args.child, args.steps, batch)))
        return
    lines = []
    for base in args.bases or ("pico",):
        for number in range(args.rounds):
            for case in LONG_CASES if args.long else CASES:
                command = [sys.executable, __file__, base, "--child", case]
                command += ["--long"] * args.long
                done = subprocess.run(
                    [*command, "--steps", str(args.steps)],
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    sys.exit(done.stderr[-2000:])
                line = json.loads(done.stdout.strip().splitlines()[-1]) | {"round": number}
                lines.append(line)
                rate, rss = line["tokens_per_cpu_s"], line["peak_rss_bytes"] / 2**30
                print(f"{line['base']:10} {case:12} {rate:8} tokens/CPU s, {rss:.2f} GiB")
    append(RESULTS / "heal_speed.jsonl", [line | machine() for line in lines])


if __name__ == "__main__":
    main()
