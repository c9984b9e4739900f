"""A budget of bytes, and the mix of least loss within it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dus_edge.errors import UsageError
from dus_edge.quant.mix.matrices import Matrix, items_of
from dus_edge.quant.mix.solve import Solution, choose_types, smallest_bytes
from dus_edge.quant.types import QuantType

#: Bytes of the budget that a matrix takes in a type.
Cost = Callable[[Matrix, QuantType], int]


@dataclass(frozen=True)
class Budget:
    """What a mix may take.

    Attributes:
        goal: what it is of, for people: ``6 GiB``, ``as q4_k_m``.
        nbytes: of everything: a file, or a device's memory.
        rest: what is taken whatever the mix: header and norms, cache and buffers.
        cost: what a matrix takes in a type.
        refusal: one sentence for a budget that no mix meets, by the bytes of the smallest.
    """

    goal: str
    nbytes: int
    rest: int
    cost: Cost
    refusal: Callable[[int], str]

    def total(self, matrices: Sequence[Matrix], kinds: Mapping[str, QuantType]) -> int:
        """Bytes of everything with these types."""
        return self.rest + sum(self.cost(m, kinds[m.name]) for m in matrices)


def best_types(
    matrices: Sequence[Matrix],
    losses: Mapping[str, Mapping[str, float]],
    fixed: Mapping[str, QuantType],
    budget: Budget,
    where: str,
) -> Solution:
    """The types of least total loss within a budget.

    Args:
        matrices: of the model.
        losses: by GGUF name and type name, in any unit that adds up.
        fixed: matrices whose type is not to be chosen.
        budget: what all of it may take.
        where: what the losses were read from, for messages.

    Raises:
        UsageError: the smallest mix takes more than the budget.
        CheckpointError: the losses are of another model.
    """
    items = items_of(matrices, losses, fixed, budget.cost, where)
    least = smallest_bytes(items) + budget.rest
    if least > budget.nbytes:
        raise UsageError(budget.refusal(least))
    return choose_types(items, budget.nbytes - budget.rest)
