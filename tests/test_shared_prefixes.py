"""Trees of shared prefixes: every token once, and logits as of each sequence alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from dus_edge.jobs.export.gguf import export_gguf
from dus_edge.quant.recipe import find_preset
from dus_edge.run.llama import load_model
from dus_edge.run.llama_tree import LlamaTree
from dus_edge.run.llama_writer import write_greedily
from dus_edge.run.open import inspect_source
from dus_edge.run.torch_logits import load_network
from dus_edge.run.torch_tree import TorchTree
from dus_edge.run.tree import Limits, ScoredTokens, TreeStep, grow, n_tokens, tree_steps
from dus_edge.upscale.model import plan_chooser

from .draws import examples

#: Few ids, so that prefixes are shared, split and repeated.
_sequences = st.lists(st.integers(0, 2), min_size=2, max_size=9)
_requests = st.lists(
    _sequences.flatmap(
        lambda s: st.builds(lambda n: ScoredTokens(tuple(s), n), st.integers(1, len(s) - 1))
    ),
    min_size=1,
    max_size=12,
)
_limits = st.builds(Limits, st.integers(1, 12), st.integers(1, 4), st.integers(1, 6))


@given(_requests, _limits)
@examples(300)
def test_each_prefix_is_computed_once_and_read_where_it_is_asked(
    requests: list[ScoredTokens], limits: Limits
) -> None:
    """Against sets of prefixes, which know no tree."""
    root = grow(requests)
    prefixes = {r.inputs[:i] for r in requests for i in range(1, len(r.inputs) + 1)}
    assert n_tokens(root) == len(prefixes)
    kept: list[int] = []
    computed: list[tuple[int, ...]] = []
    read: dict[int, list[tuple[tuple[int, ...], int]]] = {}
    for step in tree_steps(root, limits):
        del kept[step.base :]
        own = _paths(kept, step)
        assert [len(path) - 1 for path in own] == step.tree.positions.tolist()
        assert step.keep or step.tree.n_leaves <= limits.leaves
        computed += own
        for row, wanted in zip(step.tree.read, step.tree.wanted, strict=True):
            for request, token in wanted:
                read.setdefault(request, []).append((own[row], token))
        if step.keep:
            kept += step.tree.tokens.tolist()
    assert sorted(computed) == sorted(prefixes)
    for i, r in enumerate(requests):
        wanted = [(r.tokens[:n], r.tokens[n]) for n in range(r.n_context, len(r.tokens))]
        assert sorted(read[i]) == wanted


def _paths(kept: Sequence[int], step: TreeStep) -> list[tuple[int, ...]]:
    """The tokens that each token of a step sees, itself last."""
    tree = step.tree
    return [
        (*kept, *(int(tree.tokens[j]) for j in range(i + 1) if _sees(tree.leaves, i, j)))
        for i in range(len(tree.tokens))
    ]


def _sees(leaves: np.ndarray, i: int, j: int) -> bool:
    return bool(leaves[j, 0] <= leaves[i, 0] and leaves[j, 1] >= leaves[i, 1])


def test_a_request_without_context_or_continuation_is_refused() -> None:
    for n in (0, 2):
        with pytest.raises(ValueError, match="context"):
            grow([ScoredTokens((5, 6), n)])


def test_a_tree_may_be_deeper_than_python_recurses() -> None:
    """Each sequence goes on where the one before it ends."""
    requests = [ScoredTokens(tuple(range(n)), n - 1) for n in range(2, 3000)]
    steps = list(tree_steps(grow(requests), Limits()))
    assert sum(len(s.tree.tokens) for s in steps) == 2998


@pytest.fixture(scope="module")
def f32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pico as it is, a GGUF of float32."""
    folder = tmp_path_factory.mktemp("f32")
    return (
        export_gguf("pico", plan_chooser(None, None, (), False), [find_preset("f32")], folder)
        .outputs[0]
        .path
    )


@pytest.fixture(scope="module")
def questions() -> list[ScoredTokens]:
    """A trunk, questions, choices; one choice is two tokens, one request ends in the trunk."""
    draw = np.random.default_rng(7)

    def some(n: int) -> tuple[int, ...]:
        return tuple(draw.integers(300, 3000, n).tolist())

    trunk = some(40)
    requests = [ScoredTokens((*trunk[:12], 77), 9)]
    for n in (5, 30, 11, 60):
        question = trunk + some(n)
        requests += [ScoredTokens(question + some(k), len(question)) for k in (1, 2, 6)]
    return requests


@pytest.fixture(scope="module")
def expected(questions: list[ScoredTokens], pico: Path) -> list[list[float]]:
    """Log-probabilities of each continuation's tokens by transformers, alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32)
    found = []
    for r in questions:
        with torch.inference_mode():
            out = model(torch.tensor([r.inputs])).logits[0].double().log_softmax(-1)
        places = range(r.n_context - 1, len(r.inputs))
        found.append([float(out[i, r.tokens[i + 1]]) for i in places])
    return found


def _scored(engine: LlamaTree | TorchTree, steps: Sequence[TreeStep], n: int) -> list[list[float]]:
    """The same by an engine, in the order of positions."""
    found: list[list[tuple[int, float]]] = [[] for _ in range(n)]
    for step in steps:
        logits = torch.from_numpy(np.array(engine.compute(step))).double().log_softmax(-1)
        positions = step.tree.positions[step.tree.read]
        for row, wanted in enumerate(step.tree.wanted):
            for request, token in wanted:
                found[request].append((int(positions[row]), float(logits[row, token])))
    return [[value for _, value in sorted(own)] for own in found]


#: Everything side by side, the usual, and as little at a time as there can be.
_LIMITS = (Limits(4096, 128, 4096), Limits(100, 5, 40), Limits(1, 1, 1))


@pytest.mark.parametrize("limits", _LIMITS)
def test_llama_cpp_computes_a_tree_as_transformers_does_each_sequence(
    limits: Limits, f32: Path, questions: list[ScoredTokens], expected: list[list[float]]
) -> None:
    steps = list(tree_steps(grow(questions), limits))
    with (
        load_model(f32) as model,
        LlamaTree(model, f32, steps=steps, n_threads=1, cache="f32") as engine,
    ):
        found = _scored(engine, steps, len(questions))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4)


@pytest.mark.parametrize("limits", _LIMITS)
def test_transformers_computes_a_tree_as_each_sequence(
    limits: Limits, pico: Path, questions: list[ScoredTokens], expected: list[list[float]]
) -> None:
    steps = list(tree_steps(grow(questions), limits))
    model, _ = load_network(inspect_source(pico), "cpu", 1)
    found = _scored(TorchTree(model, pico), steps, len(questions))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4)


def test_a_sliding_window_hides_what_lies_behind_it(
    make_checkpoint, questions: list[ScoredTokens]
) -> None:
    """Mistral's attention, whose window ends inside the trunk."""
    base = make_checkpoint(
        architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=16, dtype="F32"
    )
    model, _ = load_network(inspect_source(base), "cpu", 1)
    steps = list(tree_steps(grow(questions), Limits(100, 5, 40)))
    found = _scored(TorchTree(model, base), steps, len(questions))
    for request, ours in zip(questions, found, strict=True):
        with torch.inference_mode():
            out = model(torch.tensor([request.inputs]), use_cache=False).logits[0].double()
        places = range(request.n_context - 1, len(request.inputs))
        theirs = [float(out[i].log_softmax(-1)[request.tokens[i + 1]]) for i in places]
        assert ours == pytest.approx(theirs, abs=2e-4)


def test_texts_side_by_side_are_those_of_transformers_alone(f32: Path, pico: Path) -> None:
    """More prompts than go at once, of different lengths."""
    draw = np.random.default_rng(3)
    prompts = [draw.integers(300, 3000, n).tolist() for n in (3, 40, 17, 9, 25, 6)]
    with load_model(f32) as model:
        written = dict(
            write_greedily(
                model, f32, prompts, n_new=12, finished=lambda _: False, n_threads=1, cache="f32"
            )
        )
    network = transformers.AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32)
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        out = network.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        theirs = out[0, len(prompt) :].tolist()
        end = network.generation_config.eos_token_id
        assert written[i] == [t for t in theirs if t != end]
