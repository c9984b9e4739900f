"""The choice of types: never over, as good as trying all; what is fixed by hand or by a file."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dus_edge.errors import CheckpointError, UnsupportedError, UsageError
from dus_edge.quant import types as t
from dus_edge.quant.mix.budget import Budget, best_types
from dus_edge.quant.mix.file import read_mix, write_mix
from dus_edge.quant.mix.matrices import (
    Matrix,
    expected_loss,
    fix_by_pattern,
    fixed_types,
    keep_role,
    nearest_preset,
)
from dus_edge.quant.mix.solve import (
    Item,
    Option,
    choose_types,
    largest_bytes,
    smallest_bytes,
)
from dus_edge.quant.recipe import Preset
from dus_edge.quant.sensitivity.candidates import candidate_types
from dus_edge.tables.mix.text import layer_grid, role_table
from dus_edge.words import parse_bytes

from .draws import examples
from .mix_cases import made_up

KINDS = (t.Q2_K, t.Q3_K, t.Q4_K, t.Q5_K, t.Q6_K, t.Q8_0)


@st.composite
def item_lists(draw, most_items, most_options):
    """Items of any options, of which some are pointless."""
    items = []
    for i in range(draw(st.integers(1, most_items))):
        n = draw(st.integers(1, most_options))
        sizes = draw(st.lists(st.integers(1, 60), min_size=n, max_size=n))
        losses = draw(st.lists(st.floats(0, 10, width=32), min_size=n, max_size=n))
        options = zip(KINDS, sizes, losses, strict=False)
        items.append(Item(f"t{i}", tuple(Option(k, s, x) for k, s, x in options)))
    return items


def lowest_loss(items, budget):
    """By trying all."""
    return min(
        sum(o.loss for o in choice)
        for choice in itertools.product(*(item.options for item in items))
        if sum(o.nbytes for o in choice) <= budget
    )


@given(item_lists(6, 4), st.integers(0, 200))
@examples(200)
def test_the_choice_is_the_best_there_is(items, more):
    budget = smallest_bytes(items) + more
    found = choose_types(items, budget)
    picked = [next(o for o in item.options if o.kind is found.kinds[item.name]) for item in items]
    assert sum(o.nbytes for o in picked) == found.nbytes <= budget
    assert sum(o.loss for o in picked) == pytest.approx(found.loss)
    best = lowest_loss(items, budget)
    assert found.loss == pytest.approx(best, abs=1e-9)
    assert found.bound <= best + 1e-9


@given(item_lists(40, 6), st.lists(st.integers(0, 2400), min_size=2, max_size=6))
@examples(60)
def test_more_room_is_never_worse(items, rooms):
    least = smallest_bytes(items)
    found = [choose_types(items, least + room) for room in sorted(rooms)]
    for room, solution in zip(sorted(rooms), found, strict=True):
        assert solution.nbytes <= least + room
        assert solution.gap >= 0
    for narrow, wide in itertools.pairwise(found):
        assert wide.loss <= narrow.loss + 1e-9


def test_the_ends_of_the_budget():
    items = [
        Item("a", (Option(t.Q2_K, 10, 5.0), Option(t.Q4_K, 20, 1.0), Option(t.Q8_0, 40, 1.0))),
        Item("b", (Option(t.Q2_K, 10, 3.0), Option(t.Q4_K, 20, 2.0))),
    ]
    assert (smallest_bytes(items), largest_bytes(items)) == (20, 40)
    assert choose_types(items, 20).kinds == {"a": t.Q2_K, "b": t.Q2_K}
    # Of the one step that fits, the one that saves more.
    assert choose_types(items, 30).kinds == {"a": t.Q4_K, "b": t.Q2_K}
    # No room makes it take Q8_0, which is no better.
    assert choose_types(items, 1000).kinds == {"a": t.Q4_K, "b": t.Q4_K}
    with pytest.raises(ValueError, match="at least 20 bytes"):
        choose_types(items, 19)


def matrices(n_layers=4, hidden=512):
    found = [Matrix("token_embd.weight", "embedding", None, 1000, hidden)]
    for i in range(n_layers):
        found += [
            Matrix(f"blk.{i}.attn_q.weight", "q", i, hidden, hidden),
            Matrix(f"blk.{i}.ffn_down.weight", "down", i, hidden, 3 * hidden + 32),
        ]
    return found


def test_real_sizes_are_solved_to_the_last_bytes():
    """A 48-layer model: the gap to what no choice can beat is next to nothing, at any budget."""
    shapes = {"q": (4096, 4096), "k": (1024, 4096), "down": (4096, 14336), "up": (14336, 4096)}
    found = [Matrix("token_embd.weight", "embedding", None, 32000, 4096)]
    for i in range(48):
        found += [Matrix(f"blk.{i}.{r}.weight", r, i, *shape) for r, shape in shapes.items()]
    losses = made_up(found).kl
    q8 = sum(m.nbytes(t.Q8_0) for m in found)
    for share in (0.32, 0.45, 0.61, 0.8, 0.99):
        budget = Budget("any", int(share * q8), 0, lambda m, kind: m.nbytes(kind), str)
        best = best_types(found, losses, {}, budget, "x")
        assert best.nbytes <= budget.nbytes
        assert best.nbytes > 0.999 * budget.nbytes
        assert best.gap <= 3e-3 * best.loss
        assert best.loss == pytest.approx(expected_loss(best.kinds, losses))


# What is fixed by hand


def test_roles_and_patterns():
    found = matrices()
    wishes = [fix_by_pattern(r"blk\.[01]\..*down=q6_k"), keep_role("down=Q4_K"),
              keep_role("embedding=q8_0")]  # fmt: skip
    fixed = fixed_types(found, wishes)
    # Rows of 1,568 are no blocks of 256: what stands in for Q6_K and Q4_K.
    assert fixed == {
        "token_embd.weight": t.Q8_0,
        "blk.0.ffn_down.weight": t.Q8_0,
        "blk.1.ffn_down.weight": t.Q8_0,
        "blk.2.ffn_down.weight": t.Q5_0,
        "blk.3.ffn_down.weight": t.Q5_0,
    }
    # The last equals sign divides: patterns may have some.
    assert fixed_types(found, [fix_by_pattern("attn_(?=q)=q3_k")]).keys() == {
        f"blk.{i}.attn_q.weight" for i in range(4)
    }


@pytest.mark.parametrize(
    ("wish", "text", "message"),
    [
        (keep_role, "embedding", "--keep embedding: give what and its type"),
        (keep_role, "embedding=q7_k", "there is no type 'q7_k'; types are bf16, f16"),
        (fix_by_pattern, "=q6_k", "give what and its type"),
        (fix_by_pattern, "blk.(=q6_k", r"'blk.\(' is no regular expression \("),
    ],
)
def test_what_fixes_nothing_is_refused(wish, text, message):
    with pytest.raises(UsageError, match=message):
        wish(text)


def test_a_wish_that_matches_nothing_is_refused():
    for wish in (keep_role("head=q6_k"), fix_by_pattern("attn_norm=q6_k")):
        with pytest.raises(UsageError, match="matches no matrix of this model; roles are emb"):
            fixed_types(matrices(), [wish])


def test_losses_of_another_model_are_refused():
    found = matrices()
    losses = made_up(matrices(3)).kl
    budget = Budget("any", 1 << 40, 0, lambda m, kind: m.nbytes(kind), str)
    with pytest.raises(CheckpointError, match=r"s.json knows nothing of blk.3.attn_q.weight as"):
        best_types(found, losses, {}, budget, "s.json")


def test_a_budget_below_the_smallest_is_refused():
    found = matrices()
    budget = Budget("1 B", 1, 7, lambda m, kind: m.nbytes(kind), lambda least: f"least {least:,}")
    least = 7 + sum(min(map(m.nbytes, candidate_types(m.n_cols))) for m in found)
    with pytest.raises(UsageError, match=f"least {least:,}"):
        best_types(found, made_up(found).kl, {}, budget, "x")


def test_the_file_type_is_that_of_most_weights():
    found = matrices()
    kinds = {m.name: t.Q5_0 if m.role == "down" else t.Q6_K for m in found}
    assert nearest_preset(found, kinds).name == "q5_0"
    kinds["token_embd.weight"] = t.Q4_K
    assert nearest_preset(found[:1], kinds).name == "q4_k_m"


# Kept in a file


def a_mix(found):
    kinds = {m.name: t.Q5_0 if m.role == "down" else t.Q6_K for m in found}
    return Preset("mix", 0, t.Q6_K, kinds, {"goal": "6 GiB", "expected_kl": 0.25, "tokens": 7})


def test_a_mix_comes_back_from_its_file(tmp_path):
    found = matrices()
    write_mix(tmp_path / "a.mix", a_mix(found))
    kinds, said = read_mix(tmp_path / "a.mix", found)
    assert kinds == a_mix(found).chosen and said == a_mix(found).said


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"format": "x"}, CheckpointError, "is no mix; name one that"),
        ({"types": []}, CheckpointError, "is no mix; name one that"),
        ({"types": {"token_embd.weight": "Q6_K"}}, CheckpointError, "does not speak of blk.0"),
        ({"more": {"blk.9.attn_q.weight": "Q6_K"}}, CheckpointError, "it speaks of blk.9.attn_q"),
        ({"more": {"blk.0.attn_q.weight": "IQ1_S"}}, UnsupportedError, "of type IQ1_S, which is"),
        ({"more": {"blk.0.attn_q.weight": 6}}, CheckpointError, "is 6, not a name"),
        ({"more": {"blk.0.ffn_down.weight": "Q6_K"}}, CheckpointError, "do not divide its rows"),
    ],
)
def test_a_damaged_mix_is_refused(tmp_path, change, error, message):
    found, path = matrices(), tmp_path / "a.mix"
    write_mix(path, a_mix(found))
    held = json.loads(path.read_text())
    held["types"] |= change.pop("more", {})
    path.write_text(json.dumps(held | change))
    with pytest.raises(error, match=message):
        read_mix(path, found)


def test_a_mix_that_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match="is missing; name a mix"):
        read_mix(tmp_path / "none.mix", matrices())
    with pytest.raises(CheckpointError, match=r"none.gguf"):
        read_mix(tmp_path / "none.gguf", matrices())


def test_what_is_not_known_of_a_mix_is_left_out(tmp_path):
    found, path = matrices(), tmp_path / "a.mix"
    write_mix(path, a_mix(found))
    held = json.loads(path.read_text())
    held["said"] = {"goal": 3, "expected_kl": -1.0, "tokens": 1 << 40, "text": "x" * 900, "y": "z"}
    path.write_text(json.dumps(held))
    assert read_mix(path, found)[1] == {}


# Shown


def test_the_grid_has_a_letter_for_each_matrix():
    found = matrices(n_layers=70)
    kinds = a_mix(found).chosen | {"blk.65.attn_q.weight": t.Q2_K}
    text = layer_grid(found, kinds)
    assert max(map(len, text.splitlines())) <= 80
    rows = [line for line in text.splitlines() if re.match("q |down ", line)]
    letters = ["".join(r.split()[1] for r in rows if r.startswith(role)) for role in ("q", "down")]
    assert letters == ["6" * 65 + "2" + "6" * 4, "c" * 70]
    assert text.endswith("2 Q2_K, 6 Q6_K, c Q5_0")
    table = role_table(found, kinds).splitlines()
    assert table[1].split() == ["embedding", "512.00", "k", "6.56", "1", "Q6_K"]
    assert [line.split()[0] for line in table[1:]] == ["embedding", "q", "down"]


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("6GiB", 6 << 30), ("5.5 g", int(5.5 * 2**30)), ("700 MB", 700_000_000), ("123", 123),
     ("2kib", 2048), ("1B", 1)],
)  # fmt: skip
def test_sizes_are_read(text, nbytes):
    assert parse_bytes(text, "x") == nbytes


@pytest.mark.parametrize("text", ["", "6 GiBs", "-1", "0", "1e9", "GiB", "٣GiB", "6" * 30])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match=r"--x is .*; give a size such as 6GiB"):
        parse_bytes(text, "--x")
