"""Run text through a model one layer at a time, and show every linear layer's inputs to a visitor.

Only one layer's weights are in memory; the hidden states of all tokens are carried from layer to
layer. So a model calibrates on a machine that cannot hold it, an up-scaled one straight from its
base's files. A visitor may replace the matrices of a site before the layer goes on (GPTQ does):
what follows then sees what the quantized model will see.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from dus_edge.calibrate.layer import (
    DecoderLayer,
    as_tensor,
    positions,
    read_layer,
)
from dus_edge.calibrate.world import ALONE, World
from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.errors import CheckpointError, UsageError
from dus_edge.files import check_free_space
from dus_edge.machine import keep_freed_memory
from dus_edge.progress import count_resumed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEVICES = ("auto", "cpu", "cuda", "mps")
#: Tokens that go through a layer together.
_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384, "mps": 8192}
_BF16_UNITS = ("avx512_bf16", "amx_tile")
#: Of the wide inputs of `down`, how much is kept between its two passes; the rest is computed
#: twice. Small beside XᵀX of such a site in a large model, and all there is in a small one.
_KEPT_BYTES = 512 << 20


class Visitor(Protocol):
    """Takes what the engine shows; keeps its own results."""

    #: Whether `finish_site` may return matrices: then a layer is computed site by site.
    replaces: bool

    def observe(self, layer: int, site: str, x: torch.Tensor) -> None:
        """Inputs of a site, ``(n_tokens, width)`` in the engine's dtype, on its device."""

    def finish_site(
        self, layer: int, site: str, weights: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor]:
        """All tokens were shown.

        Args:
            layer: which layer.
            site: one of the family's `sites`.
            weights: the site's matrices ``(out, in)`` by transformers' names, stored dtype.

        Returns:
            matrices to go on with, where they shall change.
        """

    def save(self, layer: int, path: Path) -> None:
        """Keep the results of a finished layer at `path` (a file that may be there already)."""

    def load(self, layer: int, path: Path) -> None:
        """Take the results of a layer finished in an earlier run."""


@dataclass(frozen=True)
class ComputeSettings:
    """How the engine computes.

    Attributes:
        device: ``cpu``, ``cuda``, ``mps`` (``cuda:1`` and the like too).
        dtype: name in `DTYPES` of weights and activations.
        batch_tokens: tokens that go through a layer together.
        products: name in `DTYPES` of what the layers' matrices are multiplied in; None for `dtype`.
    """

    device: str
    dtype: str
    batch_tokens: int
    products: str | None = None


def choose_settings(
    device: str = "auto", dtype: str | None = None, *, narrow: bool = False
) -> ComputeSettings:
    """Settings for this machine: the fastest device, float32 on a CPU and bfloat16 elsewhere.

    Args:
        device: one of `DEVICES`, or one of several (``cuda:1``).
        dtype: name in `DTYPES`; None leaves it to the machine.
        narrow: where it is left to a CPU that has instructions for it, matrices are multiplied in
            bfloat16, twice as fast; hidden states stay float32.

    Raises:
        UsageError: the device is not one of `DEVICES` or not there.
    """
    kind = device.partition(":")[0]
    if kind not in DEVICES:
        raise UsageError(f"there is no device {device!r}; choose one of {', '.join(DEVICES)}.")
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        device = kind = next(name for name, here in there.items() if here)
    if not there[kind]:
        raise UsageError(f"no {kind} device is usable here; use --device cpu.")
    chosen = dtype or ("float32" if kind == "cpu" else "bfloat16")
    products = "bfloat16" if narrow and dtype is None and kind == "cpu" and _has_bf16() else None
    return ComputeSettings(device, chosen, _BATCH_TOKENS[kind], products)


def _has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32 (AVX512-BF16, AMX)."""
    known = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in _BF16_UNITS)
    return any(there is not None and there() for there in known)


def total_token_layers(checkpoint: Checkpoint, tokens: np.ndarray) -> int:
    """Tokens times layers: what `run_layers` tells of as it goes."""
    return tokens.size * checkpoint.config.n_layers


def run_layers(
    checkpoint: Checkpoint,
    tokens: np.ndarray,
    visitor: Visitor,
    settings: ComputeSettings,
    *,
    state: State | None = None,
    between: Callable[[int, torch.Tensor], None] = lambda layer, h: None,
    advance: Callable[[int], None] = lambda n: None,
) -> torch.Tensor:
    """Show a visitor all inputs of all linear layers.

    Args:
        checkpoint: the model, a base or a view of one.
        tokens: ``(n_chunks, n_ctx)`` int32 token ids; every chunk is a context of its own.
        visitor: see `Visitor`.
        settings: device and precision.
        state: where finished layers are kept; a run that was interrupted goes on from there.
        between: shown the hidden states before the first layer that is run, and behind each:
            the number of the layer that takes them in, and what the function returns at the end.
            They change in place.
        advance: told of work done, out of `total_token_layers`.

    Returns:
        hidden states behind the last layer ``(n_chunks, n_ctx, hidden)``, on the CPU.

    Raises:
        CheckpointError: activations became NaN or infinite (the layer is named).
    """
    keep_freed_memory()
    config = checkpoint.config
    dtype = DTYPES[settings.dtype]
    n_chunks, n_ctx = tokens.shape
    start, h = state.resume(visitor) if state else (0, None)
    if h is None:
        h = embedded(checkpoint, tokens, dtype)
    between(start, h)
    count_resumed(advance, start * tokens.size)
    where = positions(config, n_ctx, settings.device, dtype)
    step = max(1, settings.batch_tokens // n_ctx)
    batches = [slice(i, min(i + step, n_chunks)) for i in range(0, n_chunks, step)]
    with torch.inference_mode(), ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read_layer, checkpoint, start) if start < config.n_layers else None
        for index in range(start, config.n_layers):
            assert ahead is not None
            stored = ahead.result()
            if index + 1 < config.n_layers:
                ahead = reader.submit(read_layer, checkpoint, index + 1)
            weights = {name: _placed(name, t, settings) for name, t in stored.items()}
            layer = DecoderLayer(config, weights, where[index])
            pass_ = _Pass(index, layer, stored, visitor, h, batches, settings, advance)
            pass_.by_sites() if visitor.replaces else pass_.at_once()
            check_finite(h, index)
            between(index + 1, h)
            if state:
                state.save(index, h, visitor)
    return h


def _placed(name: str, stored: torch.Tensor, settings: ComputeSettings) -> torch.Tensor:
    """A tensor of a layer on the device; matrices and biases in the dtype of the products."""
    linear = stored.ndim == 2 or name.endswith(".bias")
    dtype = (linear and settings.products) or settings.dtype
    return stored.to(settings.device, DTYPES[dtype])


class _Pass:
    """One layer over all tokens; hidden states are updated in place."""

    def __init__(
        self,
        index: int,
        layer: DecoderLayer,
        stored: Mapping[str, torch.Tensor],
        visitor: Visitor,
        h: torch.Tensor,
        batches: list[slice],
        settings: ComputeSettings,
        advance: Callable[[int], None],
    ) -> None:
        self.index, self.layer, self.stored, self.visitor = index, layer, stored, visitor
        self.h, self.batches, self.settings = h, batches, settings
        self.advance = Shares(advance, h.shape[0] * h.shape[1])

    def at_once(self) -> None:
        """Batch by batch through the whole layer: nothing is computed twice."""
        for batch, h in self._loaded():
            x = self.layer.attention_input(h)
            self._show("attn_input", x)
            x = self.layer.attention(x)
            self._show("attn_output", x)
            h = self.layer.after_attention(h, x)
            x = self.layer.ffn_input(h)
            self._show("ffn_input", x)
            x = self.layer.ffn(x)
            self._show("ffn_output", x)
            self.h[batch] = self.layer.after_ffn(h, x)
            self.advance(h.shape[0] * h.shape[1], 1)
        for site in self.layer.config.family.sites:
            self._finish(site)

    def by_sites(self) -> None:
        """Site by site through all batches: a site's matrices may change before they are used.

        Attention's output is kept between its two sites; of the wide input of `down` as much as
        `_KEPT_BYTES` hold, and the rest is computed twice.
        """
        layer, c = self.layer, self.layer.config
        for _, h in self._loaded(share=0.1):
            self._show("attn_input", layer.attention_input(h))
        self._finish("attn_input")
        kept = torch.empty(*self.h.shape[:2], c.q_width, dtype=self.h.dtype)
        for batch, h in self._loaded(share=0.3):
            x = layer.attention(layer.attention_input(h))
            self._show("attn_output", x)
            kept[batch] = x
        self._finish("attn_output")
        for batch, h in self._loaded(share=0.1):
            h = layer.after_attention(h, kept[batch].to(self.settings.device))
            self._show("ffn_input", layer.ffn_input(h))
            self.h[batch] = h
        del kept
        self._finish("ffn_input")
        wide: dict[int, torch.Tensor] = {}
        left = _KEPT_BYTES
        for batch, h in self._loaded(share=0.25):
            x = layer.ffn(layer.ffn_input(h))
            self._show("ffn_output", x)
            if x.nbytes <= left:
                left -= x.nbytes
                wide[batch.start] = x
        self._finish("ffn_output")
        for batch, h in self._loaded(share=0.25):
            x = wide.pop(batch.start, None)
            x = layer.ffn(layer.ffn_input(h)) if x is None else x
            self.h[batch] = layer.after_ffn(h, x)

    def _loaded(self, share: float = 0.0) -> Iterator[tuple[slice, torch.Tensor]]:
        for batch in self.batches:
            h = self.h[batch].to(self.settings.device)
            yield batch, h
            self.advance(h.shape[0] * h.shape[1], share)

    def _show(self, site: str, x: torch.Tensor) -> None:
        self.visitor.observe(self.index, site, x.reshape(-1, x.shape[-1]))

    def _finish(self, site: str) -> None:
        family = self.layer.config.family
        roles = {family.name(r.role, self.index): r.role for r in family.sites[site]}
        weights = {name: self.stored[f"{role}.weight"] for name, role in roles.items()}
        for name, weight in self.visitor.finish_site(self.index, site, weights).items():
            now = self.layer.weights[f"{roles[name]}.weight"]
            self.layer.replace(roles[name], weight.to(now.device, now.dtype))


class Shares:
    """Whole numbers of work from shares of it: what is left of one amount goes to the next."""

    def __init__(self, advance: Callable[[int], None], total: int) -> None:
        self.advance, self.total = advance, total
        self.done, self.told = 0.0, 0

    def __call__(self, n: int, share: float) -> None:
        self.done += n * share
        whole = min(round(self.done), self.total)
        if whole > self.told:
            self.advance(whole - self.told)
            self.told = whole


def embedded(checkpoint: Checkpoint, tokens: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """What the first layer takes in, ``(n_chunks, n_ctx, hidden)``, on the CPU."""
    table = as_tensor(checkpoint.read(checkpoint.config.family.name("embedding")))
    h = table[torch.from_numpy(tokens.astype(np.int64))].to(dtype)
    scale = checkpoint.config.embedding_scale
    return h if scale == 1 else h * scale


def check_finite(h: torch.Tensor, index: int, first: int = 0) -> None:
    """See that states behind layer `index`, of chunks from `first` on, are numbers.

    Raises:
        CheckpointError: they are not.
    """
    # One sum is finite only if all are; one that overflows is looked at more closely.
    if bool(torch.isfinite(h.sum())):
        return
    for i, chunk in enumerate(h, start=first):
        if not bool(torch.isfinite(chunk).all()):
            raise CheckpointError(
                f"activations behind layer {index} are not finite (text chunk {i}); the weights "
                f"of layer {index} or below are damaged, or need --dtype float32."
            )


# Interrupted runs


class State:
    """Finished layers of a run, in a folder: the visitor's results and the hidden states.

    Layers are finished one after the other; the hidden states of the last one replace those of
    the one before. A folder that belongs to other inputs is not taken up. Where many processes
    share a run they share the folder, and each keeps the states of its own chunks in it.
    """

    def __init__(self, folder: Path, identity: Mapping[str, object], world: World = ALONE) -> None:
        self.folder, self.world = folder, world
        blob = json.dumps(identity, sort_keys=True).encode()
        self.identity = hashlib.sha256(blob).hexdigest()

    @property
    def _index(self) -> Path:
        return self.folder / "state.json"

    def n_done(self) -> int:
        """Layers that an earlier run of the same inputs has finished."""
        try:
            kept = json.loads(self._index.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return 0
        return kept["n_done"] if kept.get("identity") == self.identity else 0

    def resume(self, visitor: Visitor) -> tuple[int, torch.Tensor | None]:
        """The first layer to be done, the hidden states before it; None at the beginning."""
        done = self.n_done()
        if not done:
            return 0, None
        for layer in range(done):
            visitor.load(layer, self._layer(layer))
        return done, torch.load(self._hidden(done), weights_only=True)

    def save(self, layer: int, h: torch.Tensor, visitor: Visitor) -> None:
        """Keep a finished layer; only when all of it is on disk does the index name it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        check_free_space(self.folder, h.nbytes)
        torch.save(h, self._hidden(layer + 1))
        self.world.wait()
        if self.world.first:
            visitor.save(layer, self._layer(layer))
            partial = self._index.with_suffix(".partial")
            partial.write_text(json.dumps({"identity": self.identity, "n_done": layer + 1}))
            partial.replace(self._index)
        self.world.wait()
        self._hidden(layer).unlink(missing_ok=True)

    def layer_files(self, n_layers: int) -> list[Path]:
        """Results of finished layers, as their visitor saved them."""
        return [self._layer(i) for i in range(n_layers)]

    def _layer(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:04}.safetensors"

    def _hidden(self, n_done: int) -> Path:
        own = f"-{self.world.rank}" if self.world.many else ""
        return self.folder / f"hidden-{n_done:04}{own}.pt"
