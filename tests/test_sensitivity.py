"""`sensitivity`: gradients against transformers', costs against measured divergence, resuming."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from dus_edge.calibrate import engine
from dus_edge.calibrate.fisher import costs, descent
from dus_edge.calibrate.fisher import sensitivity as way
from dus_edge.calibrate.imatrix import ImatrixCollector
from dus_edge.calibrate.streams import KeptStates
from dus_edge.checkpoint.config import parse_config
from dus_edge.jobs.export.calibration import Machine, TextChoice, read_chunks
from dus_edge.jobs.export.checkpoint import export_checkpoint
from dus_edge.jobs.export.sensitivity import AssumedStorage, export_sensitivity
from dus_edge.quant import native
from dus_edge.quant import types as t
from dus_edge.quant.sensitivity import read_sensitivity, weights_identity
from dus_edge.quant.sensitivity.candidates import CANDIDATES, candidate_types
from dus_edge.upscale.model import find_model, plan_chooser
from dus_edge.upscale.ranking import spearman

from .cases import check_each
from .conftest import TINY
from .forms import FORMS, deep_copied, load

pytestmark = pytest.mark.usefixtures("compiled")
CHOOSE = plan_chooser(None, None, (), True)
SOURCES = (0, 1, 2, 1, 2, 3)
TOKENS = np.random.default_rng(5).integers(3, 4096, (3, 24)).astype(np.int32)
CPU = engine.choose_settings("cpu")
RNG = np.random.default_rng(11)


def opened(base, *plan: str):
    choose = plan_chooser(None, None, plan, True)
    return find_model(str(base), choose, weights=True, say=lambda line: None).open()


def gone_down(checkpoint, folder, tokens=TOKENS, settings=CPU, seed=0):
    """Costs by tensor and type, without a job around."""
    folder.mkdir()
    state = descent.DownwardState(folder, "same")
    native.prepare(way.storing_conversions(checkpoint, ()))
    with state.states() as fd, ThreadPoolExecutor(1) as pool:
        kept = KeptStates(fd, checkpoint.config, tokens, settings.dtype)
        engine.run_layers(checkpoint, tokens, ImatrixCollector(), settings, between=kept.put)
        storing = costs.Storing(native, pool)
        return way.go_down(checkpoint, tokens, kept, storing, settings, state, seed=seed)


# Gradients


def drawn_labels(model, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities where labels are drawn, with their graph, and the labels."""
    first = descent.first_labelled(TOKENS.shape[1])
    logits = model(torch.from_numpy(TOKENS).long(), use_cache=False).logits[:, first:]
    u = np.random.default_rng(seed).random(logits.shape[:2], np.float32)
    sums = logits.detach().double().softmax(-1).cumsum(-1)
    labels = (sums <= torch.from_numpy(u).double()[..., None]).sum(-1)
    return logits.log_softmax(-1), labels


@pytest.mark.parametrize("form", ["llama-gqa", "llama-biases", "llama-tied", "mistral-head-dim"])
def test_gradients_are_those_of_transformers(make_checkpoint, tmp_path, monkeypatch, form):
    base = make_checkpoint(dtype="F32", **FORMS[form])
    model = deep_copied(load(base), SOURCES)
    log_p, labels = drawn_labels(model, seed=3)
    (-log_p.gather(-1, labels[..., None]).sum()).backward()
    seen: dict[str, torch.Tensor] = {}

    def matrix(self, name, x, d):
        seen[name] = torch.einsum("cto,cti->oi", d, x)
        return np.zeros(len(way.tensors_of(self.checkpoint)[name]))

    def embedding(tokens, d, errors):
        table = torch.zeros(4096, d.shape[-1])
        table.index_add_(0, torch.from_numpy(TOKENS).long().flatten(), d.flatten(0, 1))
        seen["model.embed_tokens.weight"] = table
        return np.zeros(len(errors))

    monkeypatch.setattr(way._Measuring, "_matrix", matrix)
    monkeypatch.setattr(way, "embedding_kl", embedding)
    gone_down(opened(base, "0:3,1:4"), tmp_path / "state", seed=3)
    assert len(seen) == 6 * 7 + 1
    if form == "llama-tied":  # there the head's own gradient is in it too
        seen.pop("model.embed_tokens.weight")
    expected = dict(model.named_parameters())
    for name, gradient in seen.items():
        torch.testing.assert_close(gradient, expected[name].grad, rtol=1e-4, atol=1e-4)


# Costs


def normal(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RNG.standard_normal(shape, np.float32))


def test_the_cost_of_a_matrix_is_that_of_its_rows():
    x, d, errors = normal(3, 5, 8), normal(3, 5, 4), normal(2, 4, 8)
    expected = np.zeros(2)
    for kind in range(2):
        for chunk in range(3):
            for row in range(4):
                moved = sum(d[chunk, i, row] * (x[chunk, i] @ errors[kind, row]) for i in range(5))
                expected[kind] += float(moved) ** 2 / 2
    np.testing.assert_allclose(costs.matrix_kl(x, d, errors), expected, rtol=1e-5)


def test_the_cost_of_an_embedding_is_that_of_its_rows():
    tokens = torch.tensor([[0, 2, 0, 1], [3, 3, 3, 0]])
    d, errors = normal(2, 4, 8), normal(3, 4, 8)
    expected = np.zeros(3)
    for kind in range(3):
        for chunk in range(2):
            for row in range(4):
                moved = sum(
                    d[chunk, i] @ errors[kind, row] for i in range(4) if tokens[chunk, i] == row
                )
                expected[kind] += float(moved) ** 2 / 2
    np.testing.assert_allclose(costs.embedding_kl(tokens, d, errors), expected, rtol=1e-5)


def test_the_cost_of_the_head_is_its_divergence():
    more = [{}, {"final_logit_softcapping": 3.0}]

    def check(size: float, options: dict) -> None:
        raw = TINY | {"vocab_size": 5000}
        if options:
            raw |= {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}
            raw |= options | {"head_dim": 16, "query_pre_attn_scalar": 16}
            raw |= {"hidden_activation": "gelu_pytorch_tanh"}
        config = parse_config(raw)
        x, head, errors = normal(7, 64), normal(5000, 64) / 4, normal(2, 5000, 64) * size
        found = costs.head_kl(x, lambda a, b: (head[a:b], errors[:, a:b]), 2, config)

        def log_p(rows):
            z = x.double() @ rows.double().T
            cap = options.get("final_logit_softcapping")
            return (z if cap is None else cap * torch.tanh(z / cap)).log_softmax(-1)

        p = log_p(head)
        expected = [(p.exp() * (p - log_p(head + e))).sum(-1).mean().item() for e in errors]
        np.testing.assert_allclose(found, expected, rtol=2e-3)

    check_each(check, (1e-3, 0.05), more)


def test_types_fit_the_width():
    assert candidate_types(512) == CANDIDATES
    assert candidate_types(96) == (t.Q4_0, t.IQ4_NL, t.Q5_0, t.Q5_1, t.Q8_0)
    assert candidate_types(100) == (t.F16,)


def test_however_chunks_are_divided(make_checkpoint, tmp_path, monkeypatch):
    checkpoint = opened(make_checkpoint(dtype="F32"), "0:3,1:4")
    whole = gone_down(checkpoint, tmp_path / "whole")
    settings = engine.ComputeSettings("cpu", "float32", 24)
    monkeypatch.setattr(way, "_KEPT_BYTES", 1)
    monkeypatch.setattr(costs, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(costs, "_VOCABULARY_ROWS", 1000)
    monkeypatch.setattr(descent, "_LOGITS_BYTES", 4 * 4096 * 5)
    parts = gone_down(checkpoint, tmp_path / "parts", settings=settings)
    assert whole.keys() == parts.keys()
    assert len(whole) == 6 * 7 + 2
    for name, by_kind in whole.items():
        assert parts[name] == pytest.approx(by_kind, rel=1e-3), name


# What it is for


def measured_kl(model, reference: torch.Tensor, tokens: torch.Tensor) -> float:
    first = descent.first_labelled(tokens.shape[1])
    with torch.no_grad():
        q = model(tokens, use_cache=False).logits[:, first:].log_softmax(-1)
    return float((reference.exp() * (reference - q)).sum(-1).double().mean())


@pytest.fixture(scope="module")
def pico_found(tmp_path_factory):
    """Sensitivities of pico up-scaled, and its checkpoint."""
    folder = tmp_path_factory.mktemp("pico")
    path, text = folder / "s.json", TextChoice(n_ctx=128, n_chunks=12)
    result = export_sensitivity("pico", CHOOSE, path, text, Machine("cpu"), AssumedStorage())
    export_checkpoint("pico", CHOOSE, folder / "plain")
    found = read_sensitivity(path, weights_identity(result.model.open()))
    return found, result.model, folder / "plain"


def test_costs_foretell_measured_divergence(pico_found):
    """Of tensors stored alone, by transformers, on text that was not calibrated on."""
    found, model, folder = pico_found
    network = load(folder)
    parameters = dict(network.named_parameters())
    chunks = read_chunks(model, TextChoice(n_ctx=128, n_chunks=12, seed=1))
    tokens = torch.from_numpy(chunks.tokens).long()
    first = descent.first_labelled(128)
    with torch.no_grad():
        reference = network(tokens, use_cache=False).logits[:, first:].log_softmax(-1)
    family, checkpoint = model.config.family, model.open()
    pairs = []
    with ThreadPoolExecutor(1) as pool:
        storing = costs.Storing(native, pool)
        tensors = [n for n in checkpoint.specs() if n in way.tensors_of(checkpoint)]
        for i, name in enumerate(tensors[::4]):
            kinds = candidate_types(checkpoint.specs()[name].shape[-1])
            kind = kinds[i % len(kinds)]
            (error,) = storing.errors(family.gguf_name(name), checkpoint.read(name), [kind])
            parameters[name].data += error
            measured = measured_kl(network, reference, tokens)
            parameters[name].data -= error
            pairs.append((found.kl[family.gguf_name(name)][kind.name], measured))
    expected, measured = np.array(pairs).T
    assert len(pairs) >= 20
    assert spearman(expected, measured) > 0.9
    ratios = np.log(expected / measured)
    assert abs(np.median(ratios)) < 0.25


def test_every_tensor_minds_fewer_bits_more(pico_found):
    found, model, _ = pico_found
    assert len(found.kl) == 12 * 7 + (1 if model.config.tied_head else 2)
    for name, by_kind in found.kl.items():
        order = [by_kind[k] for k in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")]
        assert order == sorted(order, reverse=True), name


# Runs


def short(**more) -> TextChoice:
    return TextChoice(**{"n_ctx": 32, "n_chunks": 4, **more})


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch, make_checkpoint):
    base = str(make_checkpoint())
    storage, machine = AssumedStorage("auto"), Machine("cpu")
    monkeypatch.setitem(engine._BATCH_TOKENS, "cpu", 64)  # two batches of two chunks

    def run(path):
        export_sensitivity(base, CHOOSE, path, short(), machine, storage)

    run(tmp_path / "whole.json")
    places = {
        "ffn": engine.DecoderLayer,
        "layer_gradients": descent,
        "embedding_kl": way,
        "head_kl": way,
    }

    def check(name: str, n: int) -> None:
        path, left, plain = tmp_path / f"{name}-{n}.json", [n], getattr(places[name], name)

        def interrupting(*args, **kwargs):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return plain(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(places[name], name, interrupting)
            with pytest.raises(KeyboardInterrupt):
                run(path)
        assert not path.exists()
        run(path)
        assert path.read_bytes() == (tmp_path / "whole.json").read_bytes()
        assert not list(tmp_path.glob("*.calibration"))

    check_each(check, ["ffn"], [0, 5])
    check_each(check, ["layer_gradients"], [1, 4])
    check_each(check, ["embedding_kl", "head_kl"], [0])


def test_a_state_without_its_states_starts_again(tmp_path, make_checkpoint):
    base, path = str(make_checkpoint()), tmp_path / "s.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(way, "head_kl", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export_sensitivity(base, CHOOSE, path, short(), Machine("cpu"), AssumedStorage())
    (tmp_path / "s.json.calibration" / "states").unlink()
    export_sensitivity(base, CHOOSE, path, short(), Machine("cpu"), AssumedStorage())
    assert read_sensitivity(path).n_tokens == 4 * 16


def test_the_command(run, tmp_path, make_checkpoint):
    base, out = make_checkpoint(), tmp_path / "s.json"
    options = ("--ctx", "32", "--chunks", "3", "--device", "cpu", "-o", out)
    code, said, err = run("sensitivity", base, "--drop", "1", *options)
    assert code == 0, err
    assert f"{6 * 7 + 2} tensors" in said
    found = read_sensitivity(out, weights_identity(opened(base, "0:3,1:4")))
    assert (found.n_tokens, found.text) == (48, "dus-edge's built-in mix")
    assert run("sensitivity", base, *options)[0] == 4
    code, said, _ = run("sensitivity", base, *options, "--imatrix", "auto", "--overwrite", "--json")
    assert code == 0
    assert json.loads(said.splitlines()[-1])["outputs"][0]["path"] == str(out)
    assert read_sensitivity(out).kl != found.kl


def test_an_importance_matrix_is_used_and_must_fit(run, tmp_path, make_checkpoint):
    base, other = make_checkpoint(), make_checkpoint("other", hidden_size=128)
    options = ("--ctx", "32", "--chunks", "3", "--device", "cpu")
    for name, folder in (("i", base), ("other", other)):
        assert run("imatrix", folder, *options, "-o", tmp_path / f"{name}.gguf")[0] == 0
    shutil.rmtree(other)
    found = {}
    for choice in (tmp_path / "i.gguf", "auto"):
        out = tmp_path / "s.json"
        args = ("--imatrix", choice, "--overwrite", "-o", out)
        code, _, err = run("sensitivity", base, *options, *args)
        assert code == 0, err
        found[str(choice)] = read_sensitivity(out).kl
    one, two = found.values()
    assert one == two
    code, _, err = run(
        "sensitivity", base, *options, "--imatrix", tmp_path / "other.gguf", "-o", tmp_path / "x"
    )
    assert code == 3
    assert "other.gguf is of another model" in err and err.strip().count("\n") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "i.gguf", "other.gguf", "s.json"]
