"""Write a checkpoint of random weights in the shape of a real model, to time programs with.

    python benchmarks/make_checkpoint.py DIR --layers 8

gives eight layers of Mistral-7B's shape (about 4 GB of bf16). The result depends on the seed
and the shape only, not on the number of threads. Only numpy is needed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ARCHITECTURES = {"MistralForCausalLM": "mistral", "LlamaForCausalLM": "llama"}
#: Option → (safetensors name, config.json name, bytes per weight).
DTYPES = {
    "bf16": ("BF16", "bfloat16", 2),
    "f16": ("F16", "float16", 2),
    "f32": ("F32", "float32", 4),
}
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
#: Weights in one piece of work: 2 MB of float32, so that a piece stays in the caches.
CHUNK = 1 << 19
MAX_THREADS = 8


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-form model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


@dataclass(frozen=True)
class Tensor:
    """One tensor to write; `file` and `offset` (in bytes, of its data) are where it goes."""

    number: int
    name: str
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def n(self) -> int:
        return math.prod(self.shape)

    @property
    def is_norm(self) -> bool:
        return len(self.shape) == 1


def tensor_shapes(s: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all tensors, in the model's order."""
    kv = s.kv_heads * s.head_dim
    yield "model.embed_tokens.weight", (s.vocab, s.hidden)
    for i in range(s.layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.self_attn.q_proj.weight", (s.hidden, s.hidden)
        yield f"{layer}.self_attn.k_proj.weight", (kv, s.hidden)
        yield f"{layer}.self_attn.v_proj.weight", (kv, s.hidden)
        yield f"{layer}.self_attn.o_proj.weight", (s.hidden, s.hidden)
        yield f"{layer}.mlp.gate_proj.weight", (s.intermediate, s.hidden)
        yield f"{layer}.mlp.up_proj.weight", (s.intermediate, s.hidden)
        yield f"{layer}.mlp.down_proj.weight", (s.hidden, s.intermediate)
        yield f"{layer}.input_layernorm.weight", (s.hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (s.hidden,)
    yield "model.norm.weight", (s.hidden,)
    yield "lm_head.weight", (s.vocab, s.hidden)


def plan_shards(
    shapes: list[tuple[str, tuple[int, ...]]], width: int, shard_bytes: float
) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Tensors by file name: a new file where the next tensor would make one too large."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in shapes:
        size = math.prod(shape) * width
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    n = len(shards)
    return {f"model-{i:05}-of-{n:05}.safetensors": s for i, s in enumerate(shards, 1)}


def header(tensors: list[tuple[str, tuple[int, ...]]], dtype: str, width: int) -> bytes:
    """Length and JSON of a safetensors file, padded so that the data starts at 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in tensors:
        end = position + math.prod(shape) * width
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Scratch(threading.local):
    """Each thread's arrays, used again for every chunk: fresh memory costs page faults."""

    def __init__(self) -> None:
        self.values = np.empty(CHUNK, np.float32)
        self.odd = np.empty(CHUNK, np.uint32)
        self.stored = np.empty(CHUNK, np.uint32)


def to_bf16(values: np.ndarray, odd: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Bit patterns of finite float32 values as bf16, to the nearest, ties to even.

    Args:
        values: float32; their memory is used as scratch space.
        odd: uint32 scratch space of the same length.
        out: uint16 of the same length, for the result.
    """
    bits = values.view(np.uint32)
    np.right_shift(bits, 16, out=odd)
    odd &= 1
    odd += 0x7FFF
    bits += odd
    bits >>= 16
    np.copyto(out, bits, casting="unsafe")
    return out


def random_chunk(
    scratch: Scratch, seed: int, tensor: Tensor, start: int, stop: int, std: float, dtype: str
) -> np.ndarray:
    """Stored weights `[start, stop)`: Gaussian around 0, around 1 for a norm's weights.

    The result lies in `scratch`.
    """
    n = stop - start
    rng = np.random.Generator(np.random.SFC64([seed, tensor.number, start]))
    values = scratch.values[:n]
    rng.standard_normal(dtype=np.float32, out=values)
    values *= np.float32(std)
    if tensor.is_norm:
        values += np.float32(1)
    if dtype == "bf16":
        return to_bf16(values, scratch.odd[:n], scratch.stored.view(np.uint16)[:n])
    return values.astype({"f16": "<f2", "f32": "<f4"}[dtype], copy=False)


def write_weights(
    folder: Path,
    shape: Shape,
    *,
    dtype: str,
    shard_bytes: float,
    seed: int,
    std: float,
    threads: int,
    progress: Callable[[int, int], None],
) -> int:
    """Write all shards and the index; returns the weights' size in bytes."""
    code, _, width = DTYPES[dtype]
    shards = plan_shards(list(tensor_shapes(shape)), width, shard_bytes)
    tensors: list[Tensor] = []
    files: dict[str, int] = {}
    try:
        for file, content in shards.items():
            head = header(content, code, width)
            files[file] = os.open(folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            os.pwrite(files[file], head, 0)
            offset = len(head)
            for name, dims in content:
                tensors.append(Tensor(len(tensors), name, dims, file, offset))
                offset += tensors[-1].n * width
        total = sum(t.n for t in tensors) * width

        scratch = Scratch()

        def work(t: Tensor, start: int) -> int:
            data = random_chunk(scratch, seed, t, start, min(start + CHUNK, t.n), std, dtype)
            return write_at(files[t.file], data.data.cast("B"), t.offset + start * width)

        jobs = ((t, start) for t in tensors for start in range(0, t.n, CHUNK))
        done = 0
        for n_bytes in run_bounded(work, jobs, threads):
            done += n_bytes
            progress(done, total)
    finally:
        for fd in files.values():
            os.close(fd)
    if len(shards) > 1:
        weight_map = {t.name: t.file for t in tensors}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def write_at(fd: int, data: memoryview, offset: int) -> int:
    """Write all of `data` at an offset; a single call may write less. Returns its length."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
    return done


def run_bounded(
    work: Callable[..., int], jobs: Iterator[tuple[object, ...]], threads: int
) -> Iterator[int]:
    """Results of the jobs as they finish, with few of them waiting at any time."""
    with ThreadPoolExecutor(threads) as pool:
        running = set()
        try:
            for job in jobs:
                running.add(pool.submit(work, *job))
                if len(running) >= 2 * threads:
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (f.result() for f in finished)
            yield from (f.result() for f in wait(running).done)
        finally:
            pool.shutdown(cancel_futures=True)


def config(s: Shape, architecture: str, dtype: str, ids: Mapping[str, int]) -> dict[str, object]:
    """`config.json` of the checkpoint, with Mistral-7B-v0.1's numbers where no option has them."""
    values: dict[str, object] = {
        "architectures": [architecture],
        "attention_dropout": 0.0,
        **ids,
        "head_dim": s.head_dim,
        "hidden_act": "silu",
        "hidden_size": s.hidden,
        "initializer_range": 0.02,
        "intermediate_size": s.intermediate,
        "max_position_embeddings": 32768,
        "model_type": ARCHITECTURES[architecture],
        "num_attention_heads": s.heads,
        "num_hidden_layers": s.layers,
        "num_key_value_heads": s.kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": DTYPES[dtype][1],
        "use_cache": True,
        "vocab_size": s.vocab,
    }
    if architecture == "MistralForCausalLM":
        values["sliding_window"] = None
    else:
        values |= {"attention_bias": False, "mlp_bias": False}
    return values


def tokenizer_folder(choice: str) -> Path | None:
    """Where to copy a tokenizer from: the built-in base, a folder, or None for no tokenizer."""
    if choice == "none":
        return None
    if choice == "pico":
        from dus_edge.checkpoint import builtin

        return builtin.model_dir()
    return Path(choice)


def token_ids(tokenizer: Path | None) -> tuple[dict[str, int], int]:
    """Special tokens' ids and the vocabulary's size, from the `config.json` by the tokenizer."""
    ids, vocab = {"bos_token_id": 1, "eos_token_id": 2}, 0
    if tokenizer is not None and (tokenizer / "config.json").is_file():
        said = json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))
        ids = {k: said[k] for k in ids if isinstance(said.get(k), int)}
        vocab = said.get("vocab_size", 0)
    return ids, vocab


def copy_tokenizer(source: Path, folder: Path) -> list[str]:
    """Copy the tokenizer's files; returns their names."""
    names = [n for n in TOKENIZER_FILES if (source / n).is_file()]
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return names


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def progress_line(stream=sys.stderr, interval: float = 0.5) -> Callable[[int, int], None]:
    """A line with amount, rate and time left: rewritten on a terminal, else only the last."""
    began = time.monotonic()
    shown = began

    def show(done: int, total: int) -> None:
        nonlocal shown
        now, last = time.monotonic(), done == total
        if not last and (not stream.isatty() or now - shown < interval):
            return
        shown, rate = now, done / max(now - began, 1e-9)
        line = (
            f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s, "
            f"{(total - done) / rate:.0f} s left, {now - began:.0f} s so far"
        )
        print("\r" + line if stream.isatty() else line, end="\n" if last else "", file=stream)
        stream.flush()

    return show


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    p = argparse.ArgumentParser(description="Write a checkpoint of random weights.")
    p.add_argument("folder", metavar="DIR", type=Path, help="a new or empty folder")
    p.add_argument("--layers", type=int, required=True)
    p.add_argument("--hidden", type=int, default=4096)
    p.add_argument("--intermediate", type=int, default=14336)
    p.add_argument("--heads", type=int, default=32)
    p.add_argument("--kv-heads", type=int, default=8)
    p.add_argument("--vocab", type=int, default=32000)
    p.add_argument("--dtype", choices=DTYPES, default="bf16")
    p.add_argument("--shard-gb", type=float, default=5.0, help="largest file in 10^9 bytes")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--std", type=float, default=0.02, help="standard deviation of the weights")
    p.add_argument("--architecture", choices=ARCHITECTURES, default="MistralForCausalLM")
    p.add_argument(
        "--tokenizer", default="pico", help="pico (the built-in base), none, or a folder"
    )
    p.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, MAX_THREADS))
    return p, p.parse_args(argv)


def problem(args: argparse.Namespace, tokenizer: Path | None, vocab: int) -> str | None:
    """What is wrong with the options, if anything."""
    sizes = ("layers", "hidden", "intermediate", "heads", "kv_heads", "vocab", "threads")
    for name in sizes:
        if getattr(args, name) < 1:
            return f"--{name.replace('_', '-')} must be at least 1"
    if args.shard_gb <= 0 or args.seed < 0 or not 0 <= args.std < 1:
        return "--shard-gb must be positive, --seed not negative and --std below 1"
    if args.hidden % args.heads or (args.hidden // args.heads) % 2:
        return f"--hidden {args.hidden} must be --heads {args.heads} times an even head size"
    if args.heads % args.kv_heads:
        return f"--heads {args.heads} must be a multiple of --kv-heads {args.kv_heads}"
    if tokenizer is not None and not any((tokenizer / n).is_file() for n in TOKENIZER_FILES[:2]):
        return f"no tokenizer in {tokenizer}; give --tokenizer a folder with one, or none"
    if vocab > args.vocab:
        return f"--vocab {args.vocab} is less than the tokenizer's {vocab}"
    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        return f"{args.folder} exists and is not an empty folder"
    return None


def main(argv: list[str] | None = None) -> int:
    parser, args = parse(argv)
    tokenizer = tokenizer_folder(args.tokenizer)
    ids, vocab = token_ids(tokenizer)
    if wrong := problem(args, tokenizer, vocab):
        parser.error(wrong)
    shape = Shape(
        args.layers, args.hidden, args.intermediate, args.heads, args.kv_heads, args.vocab
    )
    args.folder.mkdir(parents=True, exist_ok=True)
    need = sum(math.prod(dims) for _, dims in tensor_shapes(shape)) * DTYPES[args.dtype][2]
    free = shutil.disk_usage(args.folder).free
    if need > free:
        parser.error(f"{need / 1e9:.2f} GB are needed, and {free / 1e9:.2f} GB are free")
    write_json(args.folder / "config.json", config(shape, args.architecture, args.dtype, ids))
    write_json(args.folder / "generation_config.json", {"_from_model_config": True, **ids})
    if tokenizer is not None:
        copy_tokenizer(tokenizer, args.folder)
    total = write_weights(
        args.folder,
        shape,
        dtype=args.dtype,
        shard_bytes=args.shard_gb * 1e9,
        seed=args.seed,
        std=args.std,
        threads=args.threads,
        progress=progress_line(),
    )
    print(f"{args.folder}: {args.layers} layers, {total / 1e9:.2f} GB of {args.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
