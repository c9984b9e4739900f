"""The parts of healing: loss, packing, batches, layers by plan, the rate, the state."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dus_edge.calibrate.world import World
from dus_edge.errors import OutputError, UsageError
from dus_edge.text.documents import Document
from dus_edge.train.heal import loss as loss_module
from dus_edge.train.heal.loss import chunked_cross_entropy
from dus_edge.train.heal.mode import TrainMode, learned_layers, parse_mode
from dus_edge.train.heal.network import empty_network, load_weights
from dus_edge.train.heal.optim import Schedule, make_optimizer
from dus_edge.train.heal.state import RunState
from dus_edge.train.packing.batches import NO_LABEL, Batches, heldout_batches
from dus_edge.train.packing.tokens import Stream, read_streams, split_heldout, write_tokens
from dus_edge.upscale.model import find_model, plan_chooser
from dus_edge.upscale.plan import DepthPlan, from_drop

from .draws import examples

ONE = World(0, 1, torch.device("cpu"))
SOLAR = from_drop(32, 8)


# -- loss -----------------------------------------------------------------------------------------


def drawn(n: int, width: int, vocabulary: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width, generator=g, dtype=torch.float64)
    head = torch.randn(vocabulary, width, generator=g, dtype=torch.float64)
    labels = torch.randint(0, vocabulary, (n,), generator=g)
    labels[::5] = NO_LABEL
    return hidden.requires_grad_(), head.requires_grad_(), labels


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunked_loss_and_gradients_are_torchs(monkeypatch, chunk):
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", chunk)
    hidden, head, labels = drawn(64, 8, 50)
    total, plain = chunked_cross_entropy(hidden, head, labels)
    (total * 0.3).backward()
    found = hidden.grad.clone(), head.grad.clone()
    hidden.grad = head.grad = None
    whole = F.cross_entropy(hidden @ head.T, labels, ignore_index=NO_LABEL, reduction="sum")
    (whole * 0.3).backward()
    assert math.isclose(total.item(), whole.item(), rel_tol=1e-6)
    assert plain.item() == total.item()
    # The slope passes through float32, as it does in training.
    assert torch.allclose(found[0], hidden.grad, atol=1e-5)
    assert torch.allclose(found[1], head.grad, atol=1e-5)


def test_a_teacher_is_part_of_the_target(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 7)
    hidden, head, labels = drawn(32, 8, 50)
    states, weights, _ = drawn(32, 6, 50, seed=1)
    total, plain = chunked_cross_entropy(
        hidden, head, labels, (states.detach(), weights.detach(), 0.25)
    )
    total.backward()
    found = hidden.grad.clone(), head.grad.clone()
    hidden.grad = head.grad = None
    logits = hidden @ head.T
    hard = F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum")
    target = (states @ weights.T).softmax(-1).detach()
    soft = F.cross_entropy(logits[labels >= 0], target[labels >= 0], reduction="sum")
    (0.75 * hard + 0.25 * soft).backward()
    assert math.isclose(total.item(), (0.75 * hard + 0.25 * soft).item(), rel_tol=1e-6)
    assert math.isclose(plain.item(), hard.item(), rel_tol=1e-6)
    assert torch.allclose(found[0], hidden.grad, atol=1e-5)
    assert torch.allclose(found[1], head.grad, atol=1e-5)


def test_a_frozen_head_gets_no_gradient():
    hidden, head, labels = drawn(16, 8, 50)
    head.requires_grad_(False)
    chunked_cross_entropy(hidden, head, labels)[0].backward()
    assert head.grad is None and hidden.grad.abs().sum() > 0


# -- packing --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pico():
    model = find_model("pico", plan_chooser(None, None, (), True), weights=True, say=print)
    network = empty_network(model.config)
    load_weights(network, model.open(), (), torch.float32, torch.device("cpu"))
    return model, network.eval()


def logits(network, ids, positions, **more):
    out = network.model(torch.tensor(ids)[None], position_ids=torch.tensor(positions)[None], **more)
    return out.logits[0].detach()


def pack(documents):
    return [i for d in documents for i in d], [i for d in documents for i in range(len(d))]


def test_documents_in_a_pack_do_not_see_each_other(pico):
    _, network = pico
    rng = np.random.default_rng(0)

    def draw(*lengths):
        return [rng.integers(5, 4000, n).tolist() for n in lengths]

    documents = draw(17, 1, 40, 6)
    ids, positions = pack(documents)
    packed = logits(network, ids, positions, use_cache=False)
    alone = torch.cat([logits(network, d, range(len(d)), use_cache=False) for d in documents])
    # Products of another shape are summed in another order.
    assert (packed - alone).abs().max() < 2e-5
    # Of the same shape: every other document is another one, and nothing changes.
    others = draw(17, 1, 40, 6)
    start = 0
    for n, document in enumerate(documents):
        changed, _ = pack([document if i == n else other for i, other in enumerate(others)])
        part = slice(start, start := start + len(document))
        again = logits(network, changed, positions, use_cache=False)
        assert (packed[part] - again[part]).abs().max() == 0
    # What healing computes is this: states of the body, then the head.
    states = network.hidden(torch.tensor(ids)[None], torch.tensor(positions)[None])
    assert torch.equal((states @ network.head.T)[0], packed)


def test_a_mask_of_ones_would_mix_them(pico):
    _, network = pico
    rng = np.random.default_rng(0)
    first, second = (rng.integers(5, 4000, 30).tolist() for _ in range(2))
    positions = [*range(30), *range(30)]
    ones = torch.ones(1, 60, dtype=torch.long)
    mixed = logits(network, first + second, positions, attention_mask=ones, use_cache=False)
    alone = logits(network, second, range(30), use_cache=False)
    assert (mixed[30:] - alone).abs().max() > 1


def test_a_network_is_the_model_that_is_exported(pico, tmp_path):
    from transformers import AutoModelForCausalLM

    from dus_edge.jobs.export.checkpoint import export_checkpoint

    _, network = pico
    export_checkpoint("pico", plan_chooser(None, None, (), True), tmp_path / "up")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "up", dtype=torch.float32).eval()
    ids = torch.arange(100, 164)[None]
    with torch.no_grad():
        assert torch.equal(theirs(ids, use_cache=False).logits, network.model(ids).logits)


def test_frozen_copies_share_memory(pico):
    model, _ = pico
    network = empty_network(model.config)
    name = "model.layers.{}.mlp.up_proj.weight"
    load_weights(network, model.open(), {name.format(8)}, torch.float32, torch.device("cpu"))
    layers = network.model.model.layers
    # Source layer 3 stands at 3 and at 7, source layer 4 at 4 and at 8, which learns.
    assert layers[3].mlp.up_proj.weight is layers[7].mlp.up_proj.weight
    assert layers[4].mlp.up_proj.weight is not layers[8].mlp.up_proj.weight
    assert [
        p.requires_grad for p in (layers[4].mlp.up_proj.weight, layers[8].mlp.up_proj.weight)
    ] == [
        False,
        True,
    ]


# -- tokens and batches ---------------------------------------------------------------------------


class Letters:
    """A tokenizer of one token a character."""

    bos_id = 1

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


def stream(lengths, language="en", first=100) -> Stream:
    """Documents of counting tokens, each different from all others."""
    ids = np.arange(first, first + sum(lengths), dtype=np.uint32)
    ends = np.cumsum(lengths)
    places = np.stack([np.zeros_like(ends), ends - lengths, ends], 1)
    return Stream("made", language, (ids,), places)


def test_documents_become_shards_and_a_run_goes_on(tmp_path):
    documents = [
        Document(f"text {i} " * (i + 1), "en" if i % 3 else "ko", f"{i}") for i in range(9)
    ]
    documents.append(documents[2])  # the same text again is left out
    seen: list[int] = []
    write_tokens(documents, Letters(), 2, tmp_path / "a", seen.append, shard_tokens=100)
    assert sum(seen) == sum(len(d.text) for d in documents)
    found = {s.language: s for s in read_streams(tmp_path / "a", "made")}
    assert sorted(found) == ["en", "ko"]
    assert len(found["en"].shards) > 1
    texts = sorted(
        bytes(found[x].document(i).tolist()) for x in found for i in range(len(found[x].places))
    )
    assert texts == sorted(b"\x01" + d.text.encode() + b"\x02" for d in documents[:-1])

    # Killed behind the second shard: the rest is made again, the shards are not.
    write_tokens(documents[:5], Letters(), 2, tmp_path / "b", shard_tokens=100)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    for name in names[6:]:
        (tmp_path / "a" / name).unlink()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").iterdir()}
    write_tokens(documents, Letters(), 2, tmp_path / "a", shard_tokens=100)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == names
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    again = {s.language: s for s in read_streams(tmp_path / "a", "made")}
    assert all(np.array_equal(again[x].places, found[x].places) for x in found)


@examples(30)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12).filter(lambda x: sum(x) > 8),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_a_pass_shows_every_token_once_and_labels_stay_in_their_document(lengths, batch, seed):
    found, length = stream(lengths), 8
    n_windows = (found.n_tokens - 1) // length
    batches = Batches([found], [1.0], length, batch, seed)
    n_steps = -(-n_windows // batch)
    windows = [batches.step(i) for i in range(n_steps)]
    ids = np.concatenate([w.ids for w in windows])[:n_windows].ravel()
    positions = np.concatenate([w.positions for w in windows])[:n_windows].ravel()
    labels = np.concatenate([w.labels for w in windows])[:n_windows].ravel()
    assert len(set(ids.tolist())) == ids.size  # no token twice
    document = {int(t): n for n in range(len(lengths)) for t in found.document(n)}
    counted = labels != NO_LABEL
    assert (labels[counted] == ids[counted] + 1).all()
    assert all(
        document[a] == document[b] for a, b in zip(ids[counted], labels[counted], strict=True)
    )
    lasts = {int(found.document(n)[-1]) for n in range(len(lengths))}
    assert {int(t) for t in ids[~counted]} <= lasts
    starts = {int(found.document(n)[0]) for n in range(len(lengths))}
    for window in range(n_windows):
        part = slice(window * length, (window + 1) * length)
        for place, (token, position) in enumerate(zip(ids[part], positions[part], strict=True)):
            assert (position == 0) == (place == 0 or int(token) in starts)


def test_a_batch_depends_on_seed_and_step_alone():
    streams = [stream([30, 50, 70]), stream([200], "ko", 5000)]
    one = Batches(streams, [3, 1], 16, 4, seed=5)
    late = Batches(streams, [3, 1], 16, 4, seed=5).step(37)
    for step in range(38):
        last = one.step(step)
    assert np.array_equal(last.ids, late.ids)
    halves = [one.step(37, slice(rank, None, 2)).ids for rank in range(2)]
    assert np.array_equal(np.stack(halves, 1).reshape(4, 16), late.ids)
    other = Batches(streams, [3, 1], 16, 4, seed=6).step(37)
    assert not np.array_equal(other.ids, late.ids)


def test_streams_get_their_weights():
    streams = [stream([300]), stream([300], "ko", 5000)]
    batches = Batches(streams, [3, 1], 16, 4, seed=0)
    ids = np.concatenate([batches.step(i).ids for i in range(500)])
    assert abs((ids >= 5000).mean() - 0.25) < 0.03
    assert sum(batches.passes(500).values()) * 300 == pytest.approx(500 * 64)


def test_a_text_that_does_not_fill_a_window_is_refused():
    with pytest.raises(UsageError, match=r"'ko' has 12 tokens.*window has 16"):
        Batches([stream([90]), stream([12], "ko")], [1, 1], 16, 2, 0)


def test_held_out_are_whole_documents_of_every_stream():
    streams = [stream([50] * 40), stream([30] * 40, "ko", 9000), stream([500], "code", 20000)]
    kept, held = split_heldout(streams, 400, 0.2, seed=0)
    for before, after in zip(streams, kept, strict=True):
        out = [h for h in held if h.language == before.language]
        taken = sum(len(h.places) for h in out)
        assert len(after.places) + taken == len(before.places)
        assert not {tuple(p) for p in after.places} & {tuple(p) for h in out for p in h.places}
    assert [h.language for h in held] == ["en", "ko"]  # one document cannot be divided
    assert 300 <= sum(h.n_tokens for h in held) <= 700


def test_held_out_windows_have_every_label_once():
    held = [stream([5, 20, 3]), stream([9], "ko", 900)]
    found = heldout_batches(held, 8, 2)
    labels = np.concatenate([b.labels.ravel() for _, b in found])
    expected = [int(t) for s in held for i in range(len(s.places)) for t in s.document(i)[1:]]
    assert sorted(labels[labels != NO_LABEL].tolist()) == sorted(expected)
    assert {language for language, _ in found} == {"en", "ko"}


# -- layers by plan, the rate ---------------------------------------------------------------------


def test_layers_are_named_from_the_plan():
    assert learned_layers(TrainMode("copies"), SOLAR) == tuple(range(24, 40))
    assert learned_layers(parse_mode("seam:8"), SOLAR) == tuple(range(20, 28))
    assert learned_layers(parse_mode("seam:3"), SOLAR) == (23, 24, 25)
    assert learned_layers(TrainMode("all"), SOLAR) == tuple(range(48))
    twice = DepthPlan(4, (0, 1, 2, 1, 2, 1, 2, 3))
    assert learned_layers(TrainMode("copies"), twice) == (3, 4, 5, 6)
    assert learned_layers(parse_mode("seam:2"), twice) == (2, 3, 4, 5)


@pytest.mark.parametrize("text", ["", "seam", "seam:0", "seam:x", "seam:-1", "copies:2", "ALL"])
def test_modes_that_are_none(text):
    with pytest.raises(UsageError, match="all, copies, lora or seam:K"):
        parse_mode(text)


def test_a_base_has_neither_copies_nor_a_seam():
    base = DepthPlan(4, (0, 1, 2, 3))
    for mode in ("copies", "seam:2"):
        with pytest.raises(UsageError, match="--train all"):
            learned_layers(parse_mode(mode), base)


def test_the_rate_rises_stays_and_falls():
    schedule = Schedule(2.0, 100)
    rates = [schedule.rate(i) for i in range(100)]
    assert rates[0] == pytest.approx(0.4) and rates[4:80] == [2.0] * 76
    assert all(a > b > 0 for a, b in pairwise(rates[79:]))
    assert [Schedule(1.0, 1).rate(0)] == [1.0]


# -- state ----------------------------------------------------------------------------------------


def learned() -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    torch.manual_seed(0)
    weights = {f"w{i}": torch.nn.Parameter(torch.randn(6, 4)) for i in range(3)}
    return weights, make_optimizer("adamw", weights.values(), 0.1)


def advance(weights, optimizer, steps: range) -> None:
    for step in steps:
        for i, p in enumerate(weights.values()):
            p.grad = torch.full_like(p, 0.1 * (step + 1) * (i + 1))
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.step()


def test_a_state_goes_on_digit_by_digit(tmp_path):
    weights, optimizer = learned()
    advance(weights, optimizer, range(5))
    state = RunState(tmp_path / "run", {"a": 1}, ONE)
    state.save(5, weights, optimizer)
    advance(weights, optimizer, range(5, 9))

    other, again = learned()
    state = RunState(tmp_path / "run", {"a": 1}, ONE)
    assert state.load(other, again) == 5
    advance(other, again, range(5, 9))
    assert all(torch.equal(weights[k], other[k]) for k in weights)


def test_the_last_checkpoints_are_kept_and_a_torn_one_is_none(tmp_path):
    weights, optimizer = learned()
    advance(weights, optimizer, range(1))
    state = RunState(tmp_path / "run", {"a": 1}, ONE, keep=2)
    for step in (1, 2, 3):
        state.save(step, weights, optimizer)
    (tmp_path / "run" / "step-00000009.partial").mkdir()
    (tmp_path / "run" / "step-00000008").mkdir()
    assert state.steps() == [2, 3]
    assert state.load(weights, optimizer) == 3


def test_the_state_of_another_run_is_refused(tmp_path):
    RunState(tmp_path / "run", {"text": "abc", "--lr": 0.1}, ONE)
    with pytest.raises(UsageError, match=r"another text;"):
        RunState(tmp_path / "run", {"text": "abd", "--lr": 0.1}, ONE)


def test_a_full_disk_at_a_checkpoint_leaves_the_one_before(tmp_path, monkeypatch):
    import torch.distributed.checkpoint as dcp

    weights, optimizer = learned()
    advance(weights, optimizer, range(1))
    state = RunState(tmp_path / "run", {"a": 1}, ONE)
    state.save(1, weights, optimizer)
    real = dcp.FileSystemWriter.write_data

    def full(*args, **kwargs):
        real(*args, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", full)
    with pytest.raises(OutputError, match=r"No space left on device\), that of step 1 is kept"):
        state.save(2, weights, optimizer)
    assert state.steps() == [1]
    fresh = RunState(tmp_path / "fresh", {"a": 1}, ONE)
    with pytest.raises(OutputError, match="there is none before it"):
        fresh.save(1, weights, optimizer)
    assert not list((tmp_path / "run").glob("*.partial"))
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == {"a": 1}
    assert Path(tmp_path / "run" / "step-00000001" / ".metadata").is_file()
