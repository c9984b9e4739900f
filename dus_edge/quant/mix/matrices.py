"""The matrices of a model, the types that they may take, and those that are fixed by hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dus_edge.errors import CheckpointError, UsageError
from dus_edge.quant import types as t
from dus_edge.quant.mix.solve import Item, Option
from dus_edge.quant.recipe import PRESETS, Preset, fitting_type
from dus_edge.quant.sensitivity.candidates import candidate_types
from dus_edge.quant.types import TYPES, QuantType

#: Types that lose nothing worth counting: their loss is 0 unless it was measured.
_PLAIN = frozenset({t.F32, t.F16, t.BF16})


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix that presets quantize.

    Attributes:
        name: GGUF name.
        role: the family's name of what it is for: ``embedding``, ``q``, ``down``.
        layer: number of its layer in the result; None outside layers.
        n_rows: all dimensions but the last.
        n_cols: the last, which blocks divide.
    """

    name: str
    role: str
    layer: int | None
    n_rows: int
    n_cols: int

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return self.n_rows * self.n_cols

    def nbytes(self, kind: QuantType) -> int:
        """Bytes in a type, without padding."""
        return self.n_rows * kind.row_bytes(self.n_cols)


@dataclass(frozen=True, slots=True)
class FixedType:
    """A type that a person chose for some matrices.

    Attributes:
        spelled: as it was given, with the option's name, for messages.
        matches: tells the matrices.
        kind: the type.
    """

    spelled: str
    matches: Callable[[Matrix], bool]
    kind: QuantType


def find_type(name: str, where: str) -> QuantType:
    """The storage type of that name, in any case.

    Raises:
        UsageError: no such type.
    """
    kind = TYPES.get(name.strip().upper())
    if kind is None:
        known = ", ".join(sorted(k.lower() for k in TYPES))
        raise UsageError(f"{where}: there is no type {name.strip()!r}; types are {known}.")
    return kind


def keep_role(text: str) -> FixedType:
    """What ``embedding=q6_k`` fixes: the matrices of a role.

    Raises:
        UsageError: not of that form, or no such type.
    """
    spelled = f"--keep {text}"
    role, kind = _halves(text, spelled, "embedding=q6_k")
    return FixedType(spelled, lambda matrix: matrix.role == role.strip(), kind)


def fix_by_pattern(text: str) -> FixedType:
    r"""What ``blk\..*\.ffn_down=q6_k`` fixes: matrices in whose GGUF names a pattern is found.

    As llama-quantize's ``--tensor-type``, which looks for the pattern in lower case anywhere in
    the name.

    Raises:
        UsageError: not of that form, no regular expression, or no such type.
    """
    spelled = f"--tensor-type {text}"
    pattern, kind = _halves(text, spelled, r"blk\..*\.ffn_down=q6_k")
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as e:
        raise UsageError(
            f"{spelled}: {pattern!r} is no regular expression ({e}); correct it."
        ) from None
    return FixedType(spelled, lambda matrix: compiled.search(matrix.name) is not None, kind)


def fixed_types(matrices: Sequence[Matrix], wishes: Sequence[FixedType]) -> dict[str, QuantType]:
    """By name, the type of each matrix that a wish speaks of; of several wishes the first counts.

    A type whose blocks do not divide a row becomes what stands in for it.

    Raises:
        UsageError: a wish speaks of no matrix.
    """
    fixed: dict[str, QuantType] = {}
    for wish in wishes:
        found = [m for m in matrices if wish.matches(m)]
        if not found:
            roles = ", ".join(dict.fromkeys(m.role for m in matrices))
            raise UsageError(
                f"{wish.spelled} matches no matrix of this model; roles are {roles}, and names are "
                f"such as {matrices[-1].name}."
            )
        for matrix in found:
            fixed.setdefault(matrix.name, fitting_type(wish.kind, matrix.n_cols))
    return fixed


def items_of(
    matrices: Sequence[Matrix],
    losses: Mapping[str, Mapping[str, float]],
    fixed: Mapping[str, QuantType],
    cost: Callable[[Matrix, QuantType], int],
    where: str,
) -> list[Item]:
    """The choice as `choose_types` takes it.

    Args:
        matrices: all of the model.
        losses: by name and type name; a type that is missing is not offered.
        fixed: matrices that take the type given.
        cost: bytes of the budget that a matrix takes in a type.
        where: what the losses were read from, for messages.

    Raises:
        CheckpointError: nothing is known of a matrix: the losses are of another model.
    """
    items = []
    for matrix in matrices:
        kinds = (fixed[matrix.name],) if matrix.name in fixed else candidate_types(matrix.n_cols)
        known = losses.get(matrix.name, {})
        options = tuple(
            Option(kind, cost(matrix, kind), known.get(kind.name, 0.0))
            for kind in kinds
            if kind.name in known or kind in _PLAIN or matrix.name in fixed
        )
        if not options:
            raise CheckpointError(
                f"{where} knows nothing of {matrix.name} as {kinds[0].name}: it is of another "
                "model or another plan; compute one for this model with dus-edge sensitivity."
            )
        items.append(Item(matrix.name, options))
    return items


def expected_loss(
    kinds: Mapping[str, QuantType], losses: Mapping[str, Mapping[str, float]]
) -> float | None:
    """The sum over matrices; None where the loss of one is not known."""
    total = 0.0
    for name, kind in kinds.items():
        loss = losses.get(name, {}).get(kind.name, 0.0 if kind in _PLAIN else None)
        if loss is None:
            return None
        total += loss
    return total


def nearest_preset(matrices: Sequence[Matrix], kinds: Mapping[str, QuantType]) -> Preset:
    """The preset after the type that most weights have: the file's `general.file_type`."""
    weights: dict[QuantType, int] = {}
    for matrix in matrices:
        kind = kinds[matrix.name]
        weights[kind] = weights.get(kind, 0) + matrix.n_weights
    order = sorted(weights, key=lambda kind: -weights[kind])
    named = {preset.default: preset for preset in reversed(PRESETS.values())}
    return next((named[kind] for kind in order if kind in named), PRESETS["f32"])


def _halves(text: str, spelled: str, example: str) -> tuple[str, QuantType]:
    before, equals, kind = text.rpartition("=")
    if not equals or not before.strip():
        raise UsageError(f"{spelled}: give what and its type, such as {example!r}.")
    return before, find_type(kind, spelled)
