"""A mix for people: the types of each role, and a letter for each matrix, by role and layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from dus_edge.quant.mix.matrices import Matrix
from dus_edge.quant.types import QuantType
from dus_edge.words import counts_text, format_count, wrap

#: A letter for each type: the bits of those that mixes are made of, and a letter of the others.
LETTERS = {
    **{"Q2_K": "2", "Q3_K": "3", "Q4_K": "4", "Q5_K": "5", "Q6_K": "6", "Q8_0": "8"},
    **{"Q4_0": "a", "Q4_1": "b", "Q5_0": "c", "Q5_1": "d", "IQ4_NL": "n", "IQ4_XS": "x"},
    **{"IQ3_S": "i", "IQ2_S": "j", "IQ2_XS": "k"},
    **{"BF16": "g", "F16": "h", "F32": "f"},
}
_OTHER = "?"
#: Roles as a layer computes, those outside layers around them.
_ORDER = ("embedding", "q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "head")
#: Layers in a line of the grid.
_MOST_LAYERS = 60


def roles_of(matrices: Sequence[Matrix]) -> list[str]:
    """The roles, as a layer computes; those that are not known come last."""
    found = dict.fromkeys(m.role for m in matrices)
    return [r for r in _ORDER if r in found] + [r for r in found if r not in _ORDER]


def role_table(matrices: Sequence[Matrix], kinds: Mapping[str, QuantType]) -> str:
    """Each role's weights, bits per weight and types, no line over 80 columns."""
    lines = [f"{'role':11}{'weights':>9}{'bits':>7}  types"]
    for role in roles_of(matrices):
        mine = [m for m in matrices if m.role == role]
        n_weights = sum(m.n_weights for m in mine)
        bits = 8 * sum(m.nbytes(kinds[m.name]) for m in mine) / n_weights
        types = counts_text(Counter(kinds[m.name].name for m in mine))
        start = f"{role[:10]:11}{format_count(n_weights):>9}{bits:>7.2f}  "
        lines.append(wrap(types, first=start, rest=" " * len(start)))
    return "\n".join(lines)


def layer_grid(matrices: Sequence[Matrix], kinds: Mapping[str, QuantType]) -> str:
    """A letter for the type of each matrix, roles below each other; empty without layers."""
    letters = {
        (m.role, m.layer): LETTERS.get(kinds[m.name].name, _OTHER)
        for m in matrices
        if m.layer is not None
    }
    if not letters:
        return ""
    n_layers = 1 + max(layer for _, layer in letters if layer is not None)
    roles = [r for r in roles_of(matrices) if any(role == r for role, _ in letters)]
    parts = []
    for start in range(0, n_layers, _MOST_LAYERS):
        shown = range(start, min(start + _MOST_LAYERS, n_layers))
        lines = [f"{'layer':11}" + "".join(f"{i:<10}" for i in shown if i % 10 == 0).rstrip()]
        lines += [
            f"{role[:10]:11}" + "".join(letters.get((role, i), " ") for i in shown)
            for role in roles
        ]
        parts.append("\n".join(lines))
    used = {LETTERS.get(kind.name, _OTHER): kind.name for kind in kinds.values()}
    named = [f"{letter} {used[letter]}" for letter in [*LETTERS.values(), _OTHER] if letter in used]
    return "\n\n".join([*parts, wrap(", ".join(named))])
