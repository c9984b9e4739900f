"""How many plans run together, so that no layer runs twice on the same inputs: pure lists.

Two plans that begin with the same layers have the same hidden states up to where they part. So
plans form a tree: a *run* is a layer behind another run, or behind the embeddings, and a plan is
the run it ends with. Every layer of the base is a run of the tree's trunk.

Weights are read in *waves*: a wave goes over the base's layers once, from the first to the last,
and does all runs whose layer is in memory. A plan of one seam needs the wave that makes the base's
own states and one more; each further way back down is another wave. Layers that repeat in place
need none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from dus_edge.upscale.methods import PLAIN_COPIES, Method
from dus_edge.upscale.plan import DepthPlan


@dataclass(frozen=True)
class LayerRun:
    """One layer on the output of another.

    Attributes:
        parent: the run whose output it takes; None for the embeddings.
        source: layer of the base.
        making: how the layer is made of the base's.
        wave: in which it is done.
        turn: how many runs of the same wave and layer come before it, one behind the other.
    """

    parent: int | None
    source: int
    making: Method
    wave: int
    turn: int


@dataclass(frozen=True)
class LayerStep:
    """A run, and where hidden states lie: each slot has those of all tokens.

    Attributes:
        source: layer of the base.
        making: how it is made.
        wave: in which it is done.
        read: slot of its input.
        write: slot of its output, another one: a step that was cut short can be done again.
        n_plans: plans that go through it.
    """

    source: int
    making: Method
    wave: int
    read: int
    write: int
    n_plans: int


@dataclass(frozen=True)
class SharedSchedule:
    """Steps, one after the other, that give the final states of all plans.

    Slot 0 has the embeddings at the beginning.

    Attributes:
        steps: in order.
        ends: slot of each plan's final states, when all steps are done.
        streams: slots of the base's own streams 0 … n: stream i is the input of layer i.
        n_slots: in all.
    """

    steps: tuple[LayerStep, ...]
    ends: tuple[int, ...]
    streams: tuple[int, ...]
    n_slots: int

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """First and end of the steps that use the same weights, in order."""
        keys = [(s.wave, s.source, s.making) for s in self.steps]
        cuts = [i for i in range(len(keys)) if i == 0 or keys[i] != keys[i - 1]]
        return tuple(zip(cuts, [*cuts[1:], len(keys)], strict=True))


@dataclass
class _Tree:
    """Runs, and which plan ends where."""

    runs: list[LayerRun] = field(default_factory=list)
    known: dict[tuple[int | None, int, Method], int] = field(default_factory=dict)

    def behind(self, parent: int | None, source: int, making: Method) -> int:
        """The run of a layer behind another; a new one if there is none."""
        key = (parent, source, making)
        if key not in self.known:
            above = self.runs[parent] if parent is not None else None
            back = above is not None and source < above.source
            wave = (above.wave if above else 0) + back
            again = above is not None and above.source == source
            turn = above.turn + 1 if above and again else 0
            self.known[key] = len(self.runs)
            self.runs.append(LayerRun(parent, source, making, wave, turn))
        return self.known[key]

    def add(self, plan: DepthPlan) -> int | None:
        """The run that a plan ends with; None where it ends with the embeddings."""
        at: int | None = None
        copies = frozenset(plan.copies)
        for i, source in enumerate(plan.sources):
            making = plan.method if i in copies else PLAIN_COPIES
            if making.branch_scale == 0:
                continue  # neither branch adds anything: its output is its input
            if len(plan.parents(i)) == 1:
                making = replace(making, kind=PLAIN_COPIES.kind)
            at = self.behind(at, source, making)
        return at


def share_layers(n_base: int, plans: Sequence[DepthPlan]) -> SharedSchedule:
    """The steps of many plans.

    Args:
        n_base: layers of their base, which itself is always run.
        plans: each for that base.
    """
    tree = _Tree()
    trunk: list[int | None] = [None]
    for source in range(n_base):
        trunk.append(tree.behind(trunk[-1], source, PLAIN_COPIES))
    ends = [tree.add(plan) for plan in plans]
    order = sorted(range(len(tree.runs)), key=lambda i: _place(tree.runs[i], i))
    return _with_slots(tree.runs, order, trunk, ends)


def _place(run: LayerRun, index: int) -> tuple[int, int, int, str, float, int]:
    """Weights change as seldom as can be; a parent comes before its children."""
    making = run.making
    return run.wave, run.source, run.turn, making.kind, making.branch_scale, index


def _with_slots(
    runs: Sequence[LayerRun],
    order: Sequence[int],
    trunk: Sequence[int | None],
    ends: Sequence[int | None],
) -> SharedSchedule:
    """Give every run a slot. It is free again when all that take its output are done."""
    wanted: dict[int | None, int] = dict.fromkeys([None, *range(len(runs))], 0)
    for run in runs:
        wanted[run.parent] += 1
    for kept in (*trunk, *ends):
        wanted[kept] += 1
    n_plans = _plans_through(runs, ends)
    slots: dict[int | None, int] = {None: 0}
    free: list[int] = []
    n_slots = 1
    steps = []
    for i in order:
        run = runs[i]
        if free:
            slots[i] = free.pop()
        else:
            slots[i], n_slots = n_slots, n_slots + 1
        read = slots[run.parent]
        steps.append(LayerStep(run.source, run.making, run.wave, read, slots[i], n_plans[i]))
        wanted[run.parent] -= 1
        if not wanted[run.parent]:
            free.append(read)
    return SharedSchedule(
        tuple(steps), tuple(slots[e] for e in ends), tuple(slots[t] for t in trunk), n_slots
    )


def _plans_through(runs: Sequence[LayerRun], ends: Sequence[int | None]) -> list[int]:
    counts = [0] * len(runs)
    for end in ends:
        at = end
        while at is not None:
            counts[at] += 1
            at = runs[at].parent
    return counts
