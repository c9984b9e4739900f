"""Planned against measured memory of training, on a CPU.

    python benchmarks/check_training_memory.py                  # all cases, half an hour
    python benchmarks/check_training_memory.py --only smollm2   # those whose name holds that

Every case trains for three steps in a process of its own; measured is the most that it had
resident (`VmHWM`). Nothing is subtracted: the plan has a term for the interpreter with its
libraries. glibc is told to map every large tensor by itself (`ENVIRONMENT`); as it comes, its heap
held 5 to 57 % more. Prints a table and writes `results/training_memory.jsonl`. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, append, machine

from dus_edge.checkpoint.config import ModelConfig, config_of_shape
from dus_edge.families.shape import Shape
from dus_edge.predict.stored_model import MIB
from dus_edge.predict.training.memory import TrainingMemory, plan_training
from dus_edge.predict.training.work import TrainingWork, work_of_mode
from dus_edge.upscale.plan import DepthPlan, choose
from dus_edge.words import markdown_table

LIMIT = 0.10
STEPS = 3
#: posix_memalign of glibc 2.36 finds no room in holes of its heap that fit; mapped memory has none.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": "1000000",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
#: Sizes of bases: hidden, heads, KV heads, head, layers, feed-forward, vocabulary; then whether the
#: head is tied. pico is the program's own, llama a Llama of 1/8 the width, and tiny what the plan's
#: term for interpreter and libraries was read from.
SHAPES: dict[str, tuple[tuple[int, ...], bool]] = {
    "tiny": ((32, 2, 1, 16, 4, 64, 128), True),
    "pico": ((256, 8, 4, 32, 8, 688, 8192), True),
    "smollm2": ((576, 9, 3, 64, 30, 1536, 49152), True),
    "llama": ((512, 8, 8, 64, 12, 1408, 32000), False),
}


@dataclass(frozen=True)
class Case:
    """One training to plan and to measure; fields as those of `TrainingWork`."""

    shape: str
    mode: str
    sequence: int
    batch: int = 1
    micro_batches: int = 1
    precision: str = "f32"
    checkpointing: bool = False
    chunk: int | None = 512
    packed: bool = False

    @property
    def name(self) -> str:
        """What a table calls it."""
        words = [self.shape, self.mode, f"{self.batch}x{self.sequence}"]
        words += [self.precision] if self.precision != "f32" else []
        words += ["checkpointing"] if self.checkpointing else []
        words += ["packed"] if self.packed else []
        words += ["whole head"] if self.chunk is None else []
        words += [f"{self.micro_batches} micro-batches"] if self.micro_batches > 1 else []
        return ", ".join(words)

    @property
    def plan(self) -> DepthPlan:
        """The base up-scaled as SOLAR was; smollm2 to 46 layers."""
        n = SHAPES[self.shape][0][4]
        return choose(n, layers=46) if n == 30 else choose(n)

    @property
    def config(self) -> ModelConfig:
        """Of the up-scaled model."""
        sizes, tied = SHAPES[self.shape]
        hidden, heads, kv_heads, head, _, ff, vocab = sizes
        shape = Shape(
            hidden_size=hidden,
            n_heads=heads,
            n_kv_heads=kv_heads,
            head_dim=head,
            n_layers=self.plan.depth,
            intermediate_size=ff,
            vocab_size=vocab,
            context_length=2048,
        )
        return config_of_shape(shape, tied_head=tied)

    @property
    def work(self) -> TrainingWork:
        """What is planned."""
        fields: dict[str, Any] = asdict(self)
        del fields["shape"], fields["mode"]
        chunk = fields.pop("chunk")
        work = work_of_mode(self.mode, self.plan, backend="CPU", **fields)
        return TrainingWork(**{k: getattr(work, k) for k in work.__slots__} | {"chunk": chunk})

    @property
    def planned(self) -> TrainingMemory:
        """The plan."""
        return plan_training(self.config, self.work)


CASES = (
    Case("tiny", "all", 64),
    Case("tiny", "lora", 64),
    Case("pico", "all", 256),
    Case("pico", "all", 1024),
    Case("pico", "all", 1024, packed=True),
    Case("pico", "all", 1024, checkpointing=True),
    Case("pico", "all", 512, batch=2, micro_batches=4),
    Case("pico", "all", 1024, chunk=None),
    Case("pico", "copies", 1024),
    Case("pico", "seam:4", 1024, packed=True),
    Case("pico", "lora", 1024),
    Case("pico", "lora", 1024, checkpointing=True),
    Case("pico", "all", 1024, precision="mixed"),
    Case("llama", "all", 1024),
    Case("llama", "all", 512, checkpointing=True),
    Case("llama", "copies", 1024),
    Case("llama", "lora", 512),
    Case("smollm2", "all", 256),
    Case("smollm2", "all", 512, packed=True),
    Case("smollm2", "all", 1024, checkpointing=True),
    Case("smollm2", "all", 256, chunk=None),
    Case("smollm2", "copies", 512),
    Case("smollm2", "copies", 1024, checkpointing=True, packed=True),
    Case("smollm2", "copies", 256, chunk=None),
    Case("smollm2", "seam:8", 512),
    Case("smollm2", "lora", 256),
    Case("smollm2", "lora", 512, checkpointing=True),
)


def train_step_memory(case: Case) -> int:
    """Bytes that this process had resident at most, after three steps of a training.

    Network, loss, adapters and optimizer are the trainer's own (`dus_edge.train.heal`); the weights
    are random.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dus_edge.train.heal.lora import add_adapters
    from dus_edge.train.heal.network import Network, checkpoint_layers
    from dus_edge.train.heal.optim import make_optimizer

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config, work = case.config, case.work
    compute = torch.bfloat16 if case.precision == "mixed" else torch.float32
    model = LlamaForCausalLM._from_config(
        LlamaConfig(**config.raw, use_cache=False), dtype=torch.float32
    )
    model.train()
    layers = model.model.layers
    network = Network(model, compute)
    if work.lora_rank:
        model.to(compute)
        add_adapters(network, work.lora_rank)
    else:
        model.requires_grad_(work.ends)
        for i in range(len(layers)):
            layers[i].requires_grad_(work.layers is None or i in work.layers)
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(compute)
    if case.checkpointing:
        checkpoint_layers(network)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer("adamw", learning, 0.1)
    n_documents = 2 if case.packed else 1
    of_document = torch.arange(case.sequence // n_documents)
    positions = of_document.repeat(n_documents).expand(case.batch, -1)

    def backward() -> None:
        tokens = torch.randint(0, config.vocab_size, (case.batch, case.sequence))
        if case.chunk is None:
            out = model(input_ids=tokens, position_ids=positions, labels=tokens, use_cache=False)
            out.loss.backward()
            return
        loss, _ = network(tokens, positions, tokens)
        (loss / tokens.numel()).backward()

    for _ in range(STEPS):
        for _ in range(case.micro_batches):
            backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, "Linux only"
    return int(found[1]) * 1024


def measure(case: Case) -> int:
    """The same, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(asdict(case))],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{case.name}: {done.stderr[-2000:]}")
    return int(done.stdout.splitlines()[-1])


def compare(case: Case) -> dict[str, Any]:
    """A case planned and measured, as a line of the results."""
    plan, measured = case.planned, measure(case)
    parts = {
        key.removesuffix("_bytes") + "_mib": round(getattr(plan, key) / MIB, 1)
        for key in plan.__slots__
        if key.endswith("_bytes")
    }
    return {
        "case": case.name,
        **asdict(case),
        "measured_mib": round(measured / MIB, 1),
        "planned_mib": round(plan.total_bytes / MIB, 1),
        "error": round(plan.total_bytes / measured - 1, 4),
        "peak": plan.peak,
        "planned": parts,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """What is printed."""
    head = ["case", "peak", "planned MiB", "measured MiB", "error"]
    cells = (
        [
            r["case"],
            r["peak"],
            f"{r['planned_mib']:,.0f}",
            f"{r['measured_mib']:,.0f}",
            f"{r['error']:+.1%}",
        ]
        for r in rows
    )
    return markdown_table(head, cells, left=(0, 1))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Planned against measured memory of training.")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases whose name holds that")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(train_step_memory(Case(**json.loads(args.child))))
        return 0
    rows = []
    for case in CASES:
        if args.only in case.name:
            rows.append(compare(case))
            print(f"{case.name}: {rows[-1]['error']:+.1%}", file=sys.stderr, flush=True)
    print(table(rows))
    worst = max(abs(r["error"]) for r in rows)
    print(f"\nThe largest error is {worst:.1%}; wanted is at most {LIMIT:.0%}.")
    if not args.no_write:
        target = RESULTS / "training_memory.jsonl"
        target.unlink(missing_ok=True)  # figures of one version, not a log
        append(target, ({**r, **machine()} for r in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
