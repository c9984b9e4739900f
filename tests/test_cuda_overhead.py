"""The rule of CUDA's overhead against the readings that it was fitted to, and at its edges."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dus_edge.errors import UsageError
from dus_edge.predict.devices import load_devices
from dus_edge.predict.memory import cuda as o
from dus_edge.predict.stored_model import MIB

from .cases import check_each
from .scripts import load_script

#: What the module's text says: MiB between a reading of the process alone and the rule.
STATED_MIB = 30
#: Cards whose context is off by more, and by how much.
APART = {"Tesla P100-PCIE-16GB": 264, "NVIDIA A100-SXM4-80GB": 57}

SCRIPT = load_script("fit_overhead")
ROWS, CARDS = SCRIPT.published()


def card_args(name: str) -> tuple[int, str]:
    return CARDS[name]["n_sm"], CARDS[name]["compute_capability"]


def rule_mib(row: dict) -> float:
    function = o.cuda_overhead_bytes if row["measured"] == "exit" else o.context_bytes
    return function(*card_args(row["device"])) / MIB


def test_constants_are_the_fit():
    start, slope, more = SCRIPT.fit(ROWS, CARDS)
    assert pytest.approx(start, abs=0.01) == o.CONTEXT_MIB
    assert pytest.approx(slope, abs=0.001) == o.CONTEXT_MIB_PER_1024_THREADS
    assert pytest.approx(more, abs=0.1) == o.LOADED_MIB


def test_the_line_of_least_deviations_ignores_what_stands_apart():
    points = [(float(x), 10 + 2.0 * x) for x in range(6)]
    assert SCRIPT.least_deviations([*points, (3.5, 900.0)]) == pytest.approx((10, 2))


class Row(dict):
    """A reading, named in what fails."""

    @property
    def name(self) -> str:
        return f"{self['device']}, {self['taken_mib']} MiB taken"


def test_every_row_is_whole_and_within_the_stated_error_or_explained():
    def check(row):
        assert row["device"] in CARDS
        assert row["measured"] in ("start", "exit", "context")
        assert row["system"] in ("Linux", "Windows", "WSL")
        assert row["source_url"]
        if "total_mib" in row:  # llama.cpp rounds every figure of the line down
            rest = row["total_mib"] - row["free_mib"] - row.get("buffers_mib", 0)
            assert row["taken_mib"] == pytest.approx(rest, abs=2)
        error = row["taken_mib"] - rule_mib(row)
        if row["system"] == "Linux" or row["shared"] is False:
            assert (abs(error) > STATED_MIB) == ("aside" in row), error
        else:
            assert error > 800  # Windows holds about a GiB of its own
        assert error > -STATED_MIB  # others only add

    check_each(check, map(Row, ROWS))


def test_contexts_of_nearly_all_cards_are_within_13_mib():
    least = SCRIPT.contexts(ROWS)
    errors = {n: mib - o.context_bytes(*card_args(n)) / MIB for n, mib in least.items()}
    assert len(errors) == 18
    for name, error in errors.items():
        assert error == pytest.approx(APART.get(name, 0), abs=1 if name in APART else 13), name


def test_a_card_is_predicted_without_it():
    """Each card left out in turn: the rule does not hang on one of them."""
    least = SCRIPT.contexts(ROWS)
    errors = []
    for name, mib in least.items():
        others = [(SCRIPT.threads(CARDS[n]), y) for n, y in least.items() if n != name]
        start, slope = SCRIPT.least_deviations(others)
        errors.append(abs(mib - start - slope * SCRIPT.threads(CARDS[name])))
    assert statistics.median(errors) < 5
    assert sorted(errors)[-3] < 15


def test_loaded_processes_are_nearer_than_by_the_constant_before():
    alone = [r for r in ROWS if r["measured"] == "exit" and SCRIPT.alone(r)]
    now = [abs(r["taken_mib"] - rule_mib(r)) for r in alone]
    before = [abs(r["taken_mib"] - SCRIPT.BEFORE) for r in alone]
    assert sum(now) < sum(before) / 3


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(sorted(o.THREADS)))
def test_more_multiprocessors_take_more(a, b, capability):
    low, high = sorted((a, b))
    assert o.context_bytes(low, capability) <= o.context_bytes(high, capability)
    loaded = o.cuda_overhead_bytes(high, capability)
    assert loaded - o.context_bytes(high, capability) == int(o.LOADED_MIB * MIB)


def test_an_unknown_card_is_the_median_geforce():
    counts = [
        o.multiprocessors(d.cuda_cores, d.compute_capability)
        for d in load_devices()
        if d.family in ("nvidia-30-desktop", "nvidia-40-desktop", "nvidia-laptop") and d.cuda_cores
    ]
    assert statistics.median(counts) == o.DEFAULT_MULTIPROCESSORS
    usual = (o.DEFAULT_MULTIPROCESSORS, o.DEFAULT_CAPABILITY)
    assert o.cuda_overhead_bytes() == o.cuda_overhead_bytes(*usual)
    assert o.cuda_overhead_bytes(None, "9.0") == o.cuda_overhead_bytes(*usual)
    assert o.context_bytes(82, None) == o.context_bytes(82, "99.0") == o.context_bytes(82, "8.6")


def test_multiprocessors_agree_with_the_cards_of_the_readings():
    """Counts from cores, beside those that stand in the file of readings."""
    names = {" ".join(n.split()): c for n, c in CARDS.items()}
    met = 0
    for device in load_devices():
        card = names.get(device.name) or names.get(f"NVIDIA GeForce {device.name}")
        if card is None or device.cuda_cores is None:
            continue
        met += 1
        assert device.compute_capability == card["compute_capability"]
        assert o.multiprocessors(device.cuda_cores, device.compute_capability) == card["n_sm"]
    assert met >= 8
    assert o.multiprocessors(16896, "9.0") == 132  # an H100 SXM
    assert o.multiprocessors(6912, "8.0") == 108  # an A100
    assert o.multiprocessors(None, "8.6") is None
    assert o.multiprocessors(3584, None) is None


def test_no_card_has_no_multiprocessor():
    with pytest.raises(UsageError, match="at least 1"):
        o.cuda_overhead_bytes(0, "8.6")
