"""Sequences of tokens as a tree of shared prefixes, and the order in which to compute it: pure.

Requests of an evaluation share most of their tokens: the solved examples, the question, often all
but the last word. Here each shared token is computed once. Nothing knows an engine; those are
`llama_tree` and `torch_tree`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class ScoredTokens:
    """A continuation whose log-likelihood is wanted.

    Attributes:
        tokens: ids of context and continuation; at least one of each.
        n_context: how many of them are context.
    """

    tokens: tuple[int, ...]
    n_context: int

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: the last token is only predicted."""
        return self.tokens[:-1]


@dataclass(eq=False)
class Branch:
    """Tokens that every sequence below shares, and no more than that.

    Attributes:
        start: position of the first one.
        tokens: ids.
        children: branches that go on after the last one, by their first tokens.
        reads: (offset in `tokens`, number of the request, the token that it wants there).
    """

    start: int
    tokens: tuple[int, ...]
    children: dict[int, Branch] = field(default_factory=dict)
    reads: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def end(self) -> int:
        """Position behind the last token."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class FlatTree:
    """Branches side by side, as one batch of tokens, each parent before its children.

    Attributes:
        tokens: ids, int64, ``(n,)``.
        positions: in their sequences, int64, ``(n,)``.
        leaves: of each token the first and the last-plus-one number of the leaves that end
            below it, int64, ``(n, 2)``: a token sees an earlier one whose range holds its own.
        n_leaves: numbers of leaves in all.
        read: rows whose logits are wanted, ascending, int64.
        wanted: for each of `read` the (request, token) pairs that are looked up there.
    """

    tokens: np.ndarray
    positions: np.ndarray
    leaves: np.ndarray
    n_leaves: int
    read: np.ndarray
    wanted: tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class TreeStep:
    """A batch to compute.

    Attributes:
        base: tokens of the common prefix that stay; what is kept beyond is forgotten first.
        tree: to compute behind it.
        keep: whether its tokens, one branch then, become part of the common prefix.
    """

    base: int
    tree: FlatTree
    keep: bool


def grow(requests: Sequence[ScoredTokens]) -> Branch:
    """The tree of all requests; its root has no tokens.

    Raises:
        ValueError: a request has no context, or nothing to score.
    """
    root = Branch(0, ())
    order = sorted(range(len(requests)), key=lambda i: requests[i].inputs)
    path, before = [root], ()
    for i in order:
        request = requests[i]
        if not 0 < request.n_context < len(request.tokens):
            raise ValueError("a request needs a context and a continuation")
        inputs = request.inputs
        shared = _shared(before, inputs)
        while path[-1].start >= shared and path[-1] is not root:
            path.pop()
        if path[-1].end > shared:
            _split(path[-1], shared)
        if shared < len(inputs):
            branch = Branch(shared, inputs[shared:])
            path[-1].children[inputs[shared]] = branch
            path.append(branch)
        before = inputs
    for i, request in enumerate(requests):
        _mark(root, i, request)
    return root


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


def _split(branch: Branch, at: int) -> None:
    """Cut a branch at a position; what lies behind becomes its only child."""
    n = at - branch.start
    rest = Branch(at, branch.tokens[n:], branch.children)
    branch.tokens, branch.children = branch.tokens[:n], {rest.tokens[0]: rest}


def _mark(root: Branch, i: int, request: ScoredTokens) -> None:
    """Write down where a request's continuation is predicted."""
    branch, inputs = root, request.inputs
    first = request.n_context - 1
    while True:
        for position in range(max(first, branch.start), branch.end):
            branch.reads.append((position - branch.start, i, request.tokens[position + 1]))
        if branch.end >= len(inputs):
            return
        branch = branch.children[inputs[branch.end]]


@dataclass(frozen=True)
class _Size:
    tokens: int
    leaves: int
    reads: int

    def __add__(self, other: _Size) -> _Size:
        return _Size(
            self.tokens + other.tokens, self.leaves + other.leaves, self.reads + other.reads
        )


@dataclass(frozen=True)
class Limits:
    """What a batch may hold.

    Attributes:
        tokens: at which a batch is full; a single branch may have more.
        leaves: sequences that an engine tells apart.
        reads: rows of logits.
    """

    tokens: int = 1024
    leaves: int = 128
    reads: int = 512


def tree_steps(root: Branch, limits: Limits) -> Iterator[TreeStep]:
    """Batches that compute every token of the tree once, in order.

    A common prefix that many branches share is computed by itself and kept; small subtrees go
    side by side.
    """
    sizes: dict[int, _Size] = {}
    _measure(root, sizes)
    yield from _visit(root, 0, sizes, limits)


def n_tokens(root: Branch) -> int:
    """Tokens in a tree."""
    sizes: dict[int, _Size] = {}
    _measure(root, sizes)
    return sizes[id(root)].tokens


def _measure(root: Branch, sizes: dict[int, _Size]) -> None:
    """Fill in the size of each subtree; without recursion, for trees can be deep."""
    stack = [(root, False)]
    while stack:
        branch, below = stack.pop()
        if not below:
            stack.append((branch, True))
            stack.extend((child, False) for child in branch.children.values())
            continue
        own = len({offset for offset, _, _ in branch.reads})
        size = _Size(len(branch.tokens), int(not branch.children), own)
        for child in branch.children.values():
            size = size + sizes[id(child)]
        sizes[id(branch)] = size


def _visit(root: Branch, base: int, sizes: dict[int, _Size], limits: Limits) -> Iterator[TreeStep]:
    """The steps of what lies below `root`, whose own tokens are the common prefix already."""
    stack: list[Iterator[tuple[list[Branch], bool]]] = [_packs(root, sizes, limits)]
    bases = [base]
    while stack:
        pack = next(stack[-1], None)
        if pack is None:
            stack.pop()
            bases.pop()
            continue
        branches, keep = pack
        yield TreeStep(bases[-1], flatten_branches(branches, alone=keep), keep)
        if keep:
            stack.append(_packs(branches[0], sizes, limits))
            bases.append(branches[0].end)


def _packs(
    parent: Branch, sizes: dict[int, _Size], limits: Limits
) -> Iterator[tuple[list[Branch], bool]]:
    """Children in batches; a large one with more to share is to be computed alone and kept."""
    pack: list[Branch] = []
    total = _Size(0, 0, 0)
    for child in parent.children.values():
        size = sizes[id(child)]
        if _is_large(child, size, limits):
            if pack:
                yield pack, False
                pack, total = [], _Size(0, 0, 0)
            yield [child], True
            continue
        more = total + size
        full = (
            more.tokens > limits.tokens or more.leaves > limits.leaves or more.reads > limits.reads
        )
        if pack and full:
            yield pack, False
            pack, more = [], size
        pack.append(child)
        total = more
    if pack:
        yield pack, False


def _is_large(branch: Branch, size: _Size, limits: Limits) -> bool:
    if not branch.children:
        return False
    if size.leaves > limits.leaves or size.reads > limits.reads:
        return True
    # A batch with little behind its trunk is best done at once.
    return size.tokens > limits.tokens and size.tokens > 2 * len(branch.tokens)


def flatten_branches(branches: Sequence[Branch], *, alone: bool = False) -> FlatTree:
    """Branches and all below them as one batch.

    Args:
        branches: side by side.
        alone: leave out what is below.
    """
    tokens: list[int] = []
    positions: list[int] = []
    spans: list[tuple[int, int, Branch]] = []
    first_leaf: dict[int, int] = {}
    last_leaf: dict[int, int] = {}
    read: list[int] = []
    wanted: list[tuple[tuple[int, int], ...]] = []
    n_leaves = 0
    stack = [(branch, False) for branch in reversed(branches)]
    while stack:
        branch, below = stack.pop()
        if below:
            last_leaf[id(branch)] = n_leaves
            continue
        first_leaf[id(branch)] = n_leaves
        spans.append((len(tokens), len(branch.tokens), branch))
        by_offset: dict[int, list[tuple[int, int]]] = {}
        for offset, request, token in branch.reads:
            by_offset.setdefault(offset, []).append((request, token))
        for offset in sorted(by_offset):
            read.append(len(tokens) + offset)
            wanted.append(tuple(by_offset[offset]))
        tokens.extend(branch.tokens)
        positions.extend(range(branch.start, branch.end))
        stack.append((branch, True))
        if branch.children and not alone:
            stack.extend((child, False) for child in reversed(branch.children.values()))
        else:
            n_leaves += 1
    leaves = np.empty((len(tokens), 2), np.int64)
    for start, n, branch in spans:
        leaves[start : start + n] = first_leaf[id(branch)], last_leaf[id(branch)]
    return FlatTree(
        tokens=np.asarray(tokens, np.int64),
        positions=np.asarray(positions, np.int64),
        leaves=leaves,
        n_leaves=n_leaves,
        read=np.asarray(read, np.int64),
        wanted=tuple(wanted),
    )
