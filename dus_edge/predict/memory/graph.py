"""The compute buffer of llama.cpp, by replaying its graph through its allocator.

What ggml's graph allocator would reserve: the Llama graph's tensors in the order in which they are
made, put through the same best-fit search (`ggml/src/ggml-alloc.c`, `src/models/llama.cpp` and
`src/llama-graph.cpp` of the llama.cpp that `recipe.LLAMA_CPP_COMMIT` names).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from dus_edge.predict.stored_model import KV_TYPES, RunSettings, StoredModel

#: Bytes that tensors start at a multiple of.
BUFFER_ALIGNMENT = {"CUDA": 128, "Metal": 32, "CPU": 32}
_F32 = 4
_F16 = 2
_I32 = 4
_I64 = 8
#: Metal's flash attention: columns of the cache and rows of queries in a simdgroup, and the
#: workgroups whose partial results it keeps (`ggml-metal-ops.cpp`).
_METAL_COLUMNS, _METAL_ROWS, _METAL_GROUPS, _METAL_MAX_ROWS = 64, 8, 32, 32


def cache_streams(settings: RunSettings) -> int:
    """Caches side by side: since 2025 one for each sequence; before, all shared one."""
    return settings.n_parallel if settings.era == "2025+" else 1


def padded_context(settings: RunSettings) -> int:
    """Cells of a cache that a token may look at: its context rounded up as that build does.

    2023: not at all; 2024: to 32, with flash attention 256; since 2025: to 256.
    """
    context = settings.context * settings.n_parallel // cache_streams(settings)
    if settings.era == "2023":
        return context
    wide = settings.era == "2025+" or settings.flash_attn
    return round_up(context, 256 if wide else 32)


def windowed_context(settings: RunSettings, window: int | None) -> int:
    """Cells of the cache of a layer that looks back at so many tokens; None for all."""
    cells = padded_context(settings)
    if window is None or settings.era != "2025+":
        return cells
    ubatch = min(settings.n_parallel * settings.context, settings.batch, settings.ubatch)
    return round_up(min(cells, window + ubatch), 256)


def tokens_at_once(settings: RunSettings) -> int:
    """Tokens of the largest ubatch; the context counts before it is rounded up.

    As many of each sequence (`llama_context::graph_reserve`).
    """
    n = settings.n_parallel
    return round_up(min(n * settings.context, settings.batch, settings.ubatch), n)


def outputs_at_once(settings: RunSettings) -> int:
    """Tokens of the largest ubatch whose logits are kept; builds before 2025 keep all."""
    tokens = tokens_at_once(settings)
    if settings.n_outputs is None or settings.era != "2025+":
        return tokens
    return min(tokens, settings.n_outputs)


def shape_only(model: StoredModel) -> StoredModel:
    """The same shape without its tensors: all that the graph depends on, and quick to hash."""
    return replace(model, name="", context_length=1, tensors=(), windows=())


@functools.lru_cache(maxsize=4096)
def graph_bytes(
    model: StoredModel, n_layers: int, head: bool, settings: RunSettings, fused_qkv: bool = False
) -> int:
    """Peak of the compute buffer over the graph of so many layers on the device.

    With `fused_qkv` one product makes queries, keys and values, and all are views of it.
    """
    new = settings.era == "2025+"
    on_cpu = settings.backend == "CPU"
    tokens, cells = tokens_at_once(settings), padded_context(settings)
    outputs = outputs_at_once(settings)
    hidden = tokens * model.hidden_size * _F32
    q_bytes, kv_bytes = tokens * model.q_width * _F32, tokens * model.kv_width * _F32
    fa = settings.flash_attn
    g = Graph(BUFFER_ALIGNMENT[settings.backend])

    # Inputs come first. A GPU gets copies of those that its layers read.
    ids = g.input(tokens * _I32) if on_cpu else None
    if on_cpu and new:
        g.input(hidden)  # embeddings given instead of tokens: reserved and never freed
    x = None if on_cpu else g.input(hidden)
    position = g.input(tokens * _I32)
    rows_k = rows_v = None
    if new:
        rows_k = g.input(tokens * _I64)
        rows_v = g.input(tokens * _I64 * (1 if fa else model.kv_width))
    mask = g.input(cells * tokens * (_F16 if fa and new else _F32))
    chosen = g.input(outputs * _I32) if new else None
    turn_k = turn_v = None
    if new:
        if _turned(model, settings.type_k):
            turn_k = g.input(_rotation(model.head_dim))
        if _turned(model, settings.type_v):
            turn_v = g.input(64 * 64 * _F32)
    if x is None:
        x = g.op(hidden, ids)

    for i in range(n_layers):
        normed = g.op(hidden, x, in_place=True)
        # A view stands between a product and its rotary embedding, and what a view looks at is
        # never written in place; in 2023 it was.
        in_place = settings.era == "2023" and not fused_qkv
        fused = g.op(q_bytes + 2 * kv_bytes, normed) if fused_qkv else None
        q = g.op(q_bytes, normed) if fused is None else fused
        q = g.op(q_bytes, q, position, in_place=in_place)
        if turn_k is not None:
            q = g.op(q_bytes, q, turn_k)
        v = g.op(kv_bytes, normed) if fused is None else fused
        if turn_v is not None:
            v = g.op(kv_bytes, v, turn_v)
        k = g.op(kv_bytes, normed) if fused is None else fused
        k = g.op(kv_bytes, k, position, in_place=in_place)
        if turn_k is not None:
            k = g.op(kv_bytes, k, turn_k)
        g.use(k, rows_k)
        g.use(v, rows_v)
        if fa:
            attended = g.op(q_bytes + _flash_extra(model, settings, tokens, cells), q, mask)
        else:
            scores = g.op(cells * tokens * model.n_heads * _F32, q)
            g.use(mask)  # softmax, in place
            mixed = g.op(q_bytes, scores)
            attended = g.op(q_bytes, mixed)  # the heads side by side again
        if turn_v is not None:
            attended = g.op(q_bytes, attended, turn_v)
        out = g.op(hidden, attended)
        width = tokens
        if head and i == n_layers - 1 and chosen is not None:
            width = outputs
            out = g.op(outputs * model.hidden_size * _F32, out, chosen)
            x = g.op(outputs * model.hidden_size * _F32, x, chosen)
        row = width * model.hidden_size * _F32
        wide = width * model.intermediate_size * _F32
        x = g.op(row, out, x, in_place=True)
        normed = g.op(row, x, in_place=True)
        gate, up = g.op(wide, normed), g.op(wide, normed)
        product = g.op(wide, gate, up, in_place=not new)
        down = g.op(row, product)
        x = g.op(row, down, x, in_place=True)
    if head:
        normed = g.op(outputs * model.hidden_size * _F32, x, in_place=True)
        g.op(outputs * model.vocab_size * _F32, normed)
    return g.peak()


def _turned(model: StoredModel, kind: str) -> bool:
    """Whether llama.cpp rotates what goes into a cache of that type (`attn_rot_k`, `_v`)."""
    return KV_TYPES[kind].block_weights > 1 and model.head_dim % 64 == 0


def _rotation(head_dim: int) -> int:
    """Bytes of the rotation of keys: the largest power of two that divides the head."""
    size = head_dim & -head_dim
    return size * size * _F32


def _flash_extra(model: StoredModel, settings: RunSettings, tokens: int, cells: int) -> int:
    """What a backend's flash attention wants behind its result."""
    kinds = (settings.type_k, settings.type_v)
    f16_rows = cells * cache_streams(settings) * model.kv_width * _F16
    if settings.backend == "CUDA":
        return sum(f16_rows for kind in kinds if kind != "f16")  # the cache as f16
    if settings.backend == "CPU" or settings.era != "2025+":
        return 0
    rows = sum(KV_TYPES[kind].row_bytes(model.kv_width) for kind in kinds)
    if any(KV_TYPES[kind].block_weights > 1 for kind in kinds):
        rows = 2 * model.kv_width * _F16
    pad = _METAL_COLUMNS * (rows + tokens * _F16)
    blocks = -(-tokens // _METAL_ROWS) * -(-cells // _METAL_COLUMNS)
    partial = min(tokens, _METAL_MAX_ROWS) * model.n_heads * _METAL_GROUPS
    return pad + blocks + partial * (model.head_dim + 2) * _F32 + 2 * f16_rows


class Graph:
    """A graph as ggml's allocator sees it: sizes, who reads whom, and what is made in place.

    Built in the order of execution, then laid out by `peak`. Views are what they look at.
    """

    def __init__(self, alignment: int) -> None:
        self._alignment = alignment
        self._sizes: list[int] = []
        self._uses: list[int] = []
        self._n_inputs = 0
        #: (result or None, read, whether a read tensor's place may be taken)
        self._steps: list[tuple[int | None, tuple[int, ...], bool]] = []

    def input(self, nbytes: int) -> int:
        """A tensor that is there from the start."""
        assert self._n_inputs == len(self._sizes)
        self._n_inputs += 1
        return self._tensor(nbytes)

    def op(self, nbytes: int, *read: int | None, in_place: bool = False) -> int:
        """An operation with a result of its own, or in the place of one that it reads last."""
        sources = self._read(read)
        result = self._tensor(nbytes)
        self._steps.append((result, sources, in_place))
        return result

    def use(self, *read: int | None) -> None:
        """An operation whose result is elsewhere: the cache, or in place of what it reads."""
        self._steps.append((None, self._read(read), False))

    def peak(self) -> int:
        """Bytes that the buffer must have."""
        space = FreeSpace()
        uses, sizes = list(self._uses), [round_up(n, self._alignment) for n in self._sizes]
        places = [-1] * len(sizes)
        for i in range(self._n_inputs):
            places[i] = space.take(sizes[i])
        for result, sources, in_place in self._steps:
            if result is not None:
                same = [s for s in sources if sizes[s] == sizes[result] and uses[s] == 1]
                if in_place and same:
                    places[result], places[same[0]] = places[same[0]], -1
                else:
                    places[result] = space.take(sizes[result])
            for s in sources:
                uses[s] -= 1
                if uses[s] == 0 and places[s] >= 0:
                    space.give(places[s], sizes[s])
        return space.peak

    def _tensor(self, nbytes: int) -> int:
        self._sizes.append(nbytes)
        self._uses.append(0)
        return len(self._sizes) - 1

    def _read(self, read: Sequence[int | None]) -> tuple[int, ...]:
        sources = tuple(s for s in read if s is not None)
        for s in sources:
            self._uses[s] += 1
        return sources


class FreeSpace:
    """The free stretches of a buffer that grows at its end (`ggml_dyn_tallocr`)."""

    def __init__(self) -> None:
        self.peak = 0
        self._end = 0  # from here on all is free
        self._holes: list[tuple[int, int]] = []  # offset and size, by offset

    def take(self, size: int) -> int:
        """The smallest hole that holds it, the last of equals; else the end."""
        fitting = [(n, -i) for i, (_, n) in enumerate(self._holes) if n >= size]
        if not fitting:
            offset, self._end = self._end, self._end + size
            self.peak = max(self.peak, self._end)
            return offset
        i = -min(fitting)[1]
        offset, n = self._holes[i]
        self._holes[i : i + 1] = [(offset + size, n - size)] if n > size else []
        return offset

    def give(self, offset: int, size: int) -> None:
        """Free a stretch and join it with its neighbours."""
        joined: list[tuple[int, int]] = []
        for start, n in sorted([*self._holes, (offset, size)]):
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + n)
            else:
                joined.append((start, n))
        if joined and sum(joined[-1]) == self._end:
            self._end = joined.pop()[0]
        self._holes = joined


def round_up(n: int, step: int) -> int:
    """The least multiple of `step` that is not below `n`."""
    return -(-n // step) * step
