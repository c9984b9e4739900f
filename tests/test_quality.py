"""Quality against a reference: sums by torch, models by transformers and llama.cpp."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import struct
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from dus_edge.checkpoint.builtin import model_dir
from dus_edge.checkpoint.gguf.origin import Origin
from dus_edge.errors import (
    CheckpointError,
    DependencyError,
    DusEdgeError,
    OutputError,
    UnsupportedError,
    UsageError,
)
from dus_edge.jobs.export.gguf import export_gguf
from dus_edge.quality.compare import ComparedModel, Results, compare_models, quality
from dus_edge.quality.label_layout import place_labels
from dus_edge.quality.names import labels
from dus_edge.quality.plot import plot, render_plot
from dus_edge.quality.report import output_paths, quality_json, quality_report, write
from dus_edge.quality.scores import (
    Estimate,
    PerToken,
    Scores,
    compare,
    estimate,
    first_scored,
    summarize,
)
from dus_edge.quant.recipe import find_preset
from dus_edge.run.open import inspect_source, open_source
from dus_edge.run.source import SourceInfo, log_softmax, split_files
from dus_edge.text.chunks import Chunks
from dus_edge.upscale.model import plan_chooser

from .draws import examples

N_CTX, N_CHUNKS = 96, 4
PRESETS = ("f32", "q8_0", "q4_k_m", "q2_k")
TEXT = Path(__file__)


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory) -> dict[str, Path]:
    """pico in several presets."""
    folder = tmp_path_factory.mktemp("ggufs")
    choose = plan_chooser(None, None, (), False)
    result = export_gguf("pico", choose, [find_preset(p) for p in PRESETS], folder)
    return {str(written.preset): written.path for written in result.outputs}


@pytest.fixture(scope="module")
def found(ggufs) -> Results:
    """All presets, by llama.cpp, against the folder, by transformers."""
    return quality(
        "pico",
        [str(ggufs[p]) for p in PRESETS],
        texts=[TEXT],
        n_ctx=N_CTX,
        n_chunks=N_CHUNKS,
        n_threads=1,
    )


def chunks_of(tokens: np.ndarray, *languages: str) -> Chunks:
    return Chunks(tokens.astype(np.int32), languages or ("en",) * len(tokens), 0, "digest")


def some_tokens(n_chunks: int = 2, n_ctx: int = 48) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(3, 4096, (n_chunks, n_ctx))
    tokens[:, 0] = 1
    return tokens


# -- arithmetic ---------------------------------------------------------------------------------


@examples(40)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 70),
    st.integers(2, 300),
    st.sampled_from([0.0, 1e-3, 1.0, 10.0]),
    st.sampled_from([0.1, 1.0, 12.0]),
)
def test_numbers_of_a_token_are_those_of_torch(seed, n, vocab, difference, spread):
    rng = np.random.default_rng(seed)
    reference = (rng.standard_normal((n, vocab)) * spread).astype(np.float32)
    candidate = (reference + rng.standard_normal((n, vocab)) * difference).astype(np.float32)
    targets = rng.integers(0, vocab, n)
    ours = compare(log_softmax(reference), log_softmax(candidate), targets)

    a, b = (torch.from_numpy(x).double() for x in (reference, candidate))
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    np.testing.assert_allclose(ours.kl, kl, rtol=1e-4, atol=1e-9)
    goal = torch.from_numpy(targets)
    for logits, nll in ((a, ours.nll_reference), (b, ours.nll_candidate)):
        expected = F.cross_entropy(logits, goal, reduction="none")
        np.testing.assert_allclose(nll, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(ours.same_top, (a.argmax(-1) == b.argmax(-1)).numpy())
    assert (ours.kl >= 0).all()
    if difference == 0:
        assert (ours.kl == 0).all()


def test_small_divergences_are_not_lost_in_rounding():
    """float32 log-probabilities alone would give errors of 1e-7 and negative divergences."""
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((8, 32000)) * 3
    nudged = logits + rng.standard_normal(logits.shape) * 3e-5
    ours = compare(
        log_softmax(logits.astype(np.float32)),
        log_softmax(nudged.astype(np.float32)),
        np.zeros(8, int),
    )
    log_p, log_q = (torch.from_numpy(x).log_softmax(-1) for x in (logits, nudged))
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    assert kl.max() < 1e-9
    np.testing.assert_allclose(ours.kl, kl, rtol=0.02)


def test_compared_arrays_must_belong_together():
    with pytest.raises(ValueError):
        compare(np.zeros((2, 5), np.float32), np.zeros((2, 6), np.float32), np.zeros(2, int))


def test_half_of_a_chunk_is_context_as_in_llama_cpp():
    # tools/perplexity/perplexity.cpp: first = n_ctx / 2, and n_ctx - 1 - first tokens count.
    assert first_scored(512) == 256
    assert first_scored(7) == 3
    assert first_scored(512, all_positions=True) == 0


def per_token(n_chunks: int, n_scored: int) -> PerToken:
    rng = np.random.default_rng(2)
    shape = (n_chunks, n_scored)
    nll = rng.gamma(2, 1, shape)
    kl = rng.gamma(1, 0.1, shape)
    return PerToken(kl, rng.random(shape) < 0.9, nll, nll + rng.standard_normal(shape) * 0.1)


def test_summary_is_of_plain_means_over_tokens():
    scored = per_token(6, 50)
    total, by_language = summarize(scored, ("en", "en", "ko", "ko", "ko", "code"))
    assert list(by_language) == ["en", "ko", "code"]
    chosen = {"en": slice(0, 2), "ko": slice(2, 5), "code": slice(5, 6)}
    for scores, rows in [(total, slice(None))] + [(by_language[k], v) for k, v in chosen.items()]:
        nll = scored.nll_candidate[rows].ravel()
        reference = scored.nll_reference[rows].ravel()
        kl = scored.kl[rows].ravel()
        assert scores.n_tokens == nll.size
        assert scores.perplexity.value == pytest.approx(math.exp(nll.mean()))
        assert scores.perplexity_reference.value == pytest.approx(math.exp(reference.mean()))
        ratio = scores.perplexity.value / scores.perplexity_reference.value
        assert math.exp(scores.log_ratio.value) == pytest.approx(ratio)
        assert scores.kl.value == pytest.approx(kl.mean())
        assert scores.same_top.value == pytest.approx(scored.same_top[rows].mean())
        # perplexity.cpp's percentile: between the two values around 0.99 (n - 1)
        at = 0.99 * (kl.size - 1)
        low, high = np.sort(kl)[[math.floor(at), math.ceil(at)]]
        assert scores.kl_p99 == pytest.approx(low + (at - math.floor(at)) * (high - low))
    assert by_language["code"].kl.error is None


def test_standard_error_is_the_spread_of_repeated_draws():
    """Chunks of two languages far apart, tokens of a chunk that lean on each other."""
    rng = np.random.default_rng(3)
    strata = np.repeat([0, 1], [12, 6])
    values, errors = [], []
    for _ in range(2000):
        chunks = np.where(strata == 0, 1.0, 50.0) + rng.standard_normal(18)
        one = estimate(chunks[:, None] + 0.1 * rng.standard_normal((18, 20)), strata)
        values.append(one.value)
        errors.append(one.error)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(values), rel=0.08)


def test_a_language_with_one_chunk_leaves_an_error_on_the_safe_side():
    values = np.random.default_rng(4).standard_normal((3, 10)) + np.array([[0], [0], [9]])
    stratified = estimate(values, np.array([0, 0, 0]))
    single = estimate(values, np.array([0, 0, 1]))
    assert single.error == pytest.approx(stratified.error)
    assert estimate(values[:1], np.array([0])).error is None


# -- models -------------------------------------------------------------------------------------


def transformers_log_probs(model, tokens: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.double().log_softmax(-1)


def test_llama_cpp_and_transformers_agree_on_the_unquantized_model(found):
    f32 = found.candidates[0].total
    assert f32.kl.value < 1e-8
    assert f32.same_top.value >= 0.999
    assert f32.log_ratio.value == pytest.approx(0, abs=1e-5)


def test_fewer_bits_diverge_more(found):
    kl = [c.total.kl.value for c in found.candidates]
    assert kl == sorted(kl)
    assert kl[1] < kl[2] / 5 < kl[3] / 25
    assert found.candidates[3].total.perplexity.value > found.candidates[0].total.perplexity.value
    sizes = [c.info.n_bytes for c in found.candidates]
    assert sizes == sorted(sizes, reverse=True)
    assert {c.info.n_parameters for c in found.candidates} == {found.reference.n_parameters}


def test_a_file_against_itself_is_exactly_the_same(ggufs):
    info = inspect_source(ggufs["q4_k_m"])
    results = compare_models(info, [info], chunks_of(some_tokens()), n_threads=1)
    total = results.candidates[0].total
    assert (total.kl.value, total.kl_p99, total.log_ratio.value) == (0, 0, 0)
    assert total.same_top.value == 1


def test_perplexity_is_that_of_llama_cpps_tool(ggufs, tmp_path):
    """The loop of perplexity.cpp, by llama-cpp-python's own class and float64 sums."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text()[:2000])
    file = str(ggufs["q4_k_m"])
    results = quality(file, [file], texts=[text], n_ctx=N_CTX, n_threads=1)
    llama = llama_cpp.Llama(
        file,
        n_ctx=N_CTX,
        logits_all=True,
        verbose=False,
        n_threads=1,
        n_threads_batch=1,
        type_k=0,  # F32
        type_v=0,
    )
    stream = llama.tokenize(text.read_bytes(), add_bos=True, special=False)
    first, nll, count = N_CTX // 2, 0.0, 0
    for start in range(0, len(stream) - N_CTX + 1, N_CTX):
        tokens = [llama.token_bos(), *stream[start + 1 : start + N_CTX]]
        llama.reset()
        llama.eval(tokens)
        logits = torch.from_numpy(np.array(llama.scores[:N_CTX], np.float64))
        for i in range(first, N_CTX - 1):
            nll -= float(logits[i].log_softmax(-1)[tokens[i + 1]])
            count += 1
    llama.close()
    total = results.candidates[0].total
    assert total.n_tokens == count > 300
    assert total.perplexity.value == pytest.approx(math.exp(nll / count), rel=1e-6)


def test_only_the_wanted_positions_are_computed(ggufs, pico):
    tokens = some_tokens()[0]
    for path in (ggufs["f32"], pico):
        with open_source(inspect_source(path), n_threads=1) as source:
            everything, part = source.log_probs(tokens), source.log_probs(tokens, 40)
        assert everything.shape == (48, 4096) and everything.dtype == np.float32
        np.testing.assert_allclose(part, everything[40:], atol=2e-5)
        np.testing.assert_allclose(np.exp(everything).sum(-1), 1, rtol=1e-5)


def test_all_positions_can_count(ggufs):
    info = inspect_source(ggufs["q8_0"])
    tokens = some_tokens(1)
    results = compare_models(info, [info], chunks_of(tokens), all_positions=True, n_threads=1)
    with open_source(info, n_threads=1) as source:
        log_probs = source.log_probs(tokens[0])
    nll = -log_probs[np.arange(47), tokens[0, 1:]].mean(dtype=np.float64)
    assert results.candidates[0].total.n_tokens == 47
    assert results.candidates[0].total.perplexity.value == pytest.approx(math.exp(nll), rel=1e-6)


def pack(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """32 / bits codes to a word along an axis, the lowest bits first."""
    per_word = 32 // bits
    rows = np.moveaxis(codes.astype(np.int64), axis, 0)
    words = sum(rows[j::per_word] << (bits * j) for j in range(per_word))
    return np.ascontiguousarray(np.moveaxis(words, 0, axis).astype(np.uint32).view(np.int32))


def gptq_folder(folder: Path, plain: Path, bits: int, group: int, **details: object) -> None:
    """pico rounded to codes in `folder`, and in `plain` what those codes mean, as float32."""
    rng = np.random.default_rng(5)
    state = {k: v.float() for k, v in load_file(model_dir() / "model.safetensors").items()}
    packed, meant = {}, {}
    for name, tensor in state.items():
        if not name.endswith("_proj.weight"):
            packed[name] = meant[name] = tensor
            continue
        weight = tensor.numpy()
        n_out, n_in = weight.shape
        g_idx = rng.permutation(np.arange(n_in) // group).astype(np.int32)
        scales = np.float16(weight.std() / 2 ** (bits - 2)) * rng.uniform(
            0.8, 1.2, (n_in // group, n_out)
        ).astype(np.float16)
        zeros = rng.integers(2 ** (bits - 1) - 1, 2 ** (bits - 1) + 1, scales.shape)
        each = scales.astype(np.float32)[g_idx].T
        codes = np.clip(np.rint(weight / each) + zeros[g_idx].T, 0, 2**bits - 1)
        layer = name.removesuffix(".weight")
        meant[name] = torch.from_numpy((each * (codes - zeros[g_idx].T)).astype(np.float32))
        packed[f"{layer}.qweight"] = torch.from_numpy(pack(codes.T, bits, 0))
        packed[f"{layer}.qzeros"] = torch.from_numpy(pack(zeros - 1, bits, 1))
        packed[f"{layer}.scales"] = torch.from_numpy(scales)
        packed[f"{layer}.g_idx"] = torch.from_numpy(g_idx)
        # auto-gptq writes these for layers without biases.
        packed[f"{layer}.bias"] = torch.zeros(n_out, dtype=torch.float16)
    config = json.loads((model_dir() / "config.json").read_text())
    method = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": True}
    for where, tensors, extra, file in (
        (folder, packed, {"quantization_config": method | details}, "gptq_model-4bit.safetensors"),
        (plain, meant, {}, "model.safetensors"),
    ):
        where.mkdir()
        (where / "config.json").write_text(json.dumps(config | extra))
        save_file(tensors, where / file, metadata={"format": "pt"})


@pytest.mark.parametrize("bits", [4, 8])
def test_a_gptq_folder_is_the_model_that_its_codes_mean(bits, tmp_path):
    gptq_folder(tmp_path / "gptq", tmp_path / "plain", bits, 32)
    infos = [inspect_source(tmp_path / name) for name in ("plain", "gptq")]
    assert infos[1].kind == "gptq"
    assert infos[1].n_parameters == infos[0].n_parameters
    assert infos[1].n_bytes < infos[0].n_bytes
    results = compare_models(infos[0], infos[1:], chunks_of(some_tokens()), n_threads=1)
    assert results.candidates[0].total.kl.value < 1e-10
    original = compare_models(
        inspect_source(model_dir()), infos[1:], chunks_of(some_tokens()), n_threads=1
    )
    assert original.candidates[0].total.kl.value > 1e-4


def test_gptq_of_another_version_is_refused(tmp_path):
    gptq_folder(tmp_path / "gptq", tmp_path / "plain", 4, 32, checkpoint_format="gptq_v2")
    info = inspect_source(tmp_path / "gptq")
    with pytest.raises(UnsupportedError, match="gptq_v2"):
        open_source(info)


def test_a_bitsandbytes_folder_is_the_model_that_transformers_runs(tmp_path, pico):
    details = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        pico, quantization_config=details, dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "nf4")
    info = inspect_source(tmp_path / "nf4")
    assert info.kind == "bitsandbytes"
    assert info.n_bytes < inspect_source(pico).n_bytes
    tokens = some_tokens()
    results = compare_models(inspect_source(pico), [info], chunks_of(tokens), n_threads=1)

    # The oracle computes in float32 too, with bitsandbytes' own dequantized weights.
    import bitsandbytes

    plain = transformers.AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32)
    log_p = transformers_log_probs(plain, tokens)
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            meant = bitsandbytes.functional.dequantize_4bit(
                module.weight.data, module.weight.quant_state
            )
            plain.get_submodule(name).weight.data = meant.float()
    log_q = transformers_log_probs(plain, tokens)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)[:, 24:-1].mean()
    assert results.candidates[0].total.kl.value == pytest.approx(float(kl), rel=1e-3)
    assert float(kl) > 1e-3


def test_int8_folders_run_without_a_word(tmp_path, pico, capfd, caplog):
    details = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        pico, quantization_config=details, dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "int8")
    capfd.readouterr()
    caplog.clear()
    infos = [inspect_source(pico), inspect_source(tmp_path / "int8")]
    results = compare_models(infos[0], infos[1:], chunks_of(some_tokens()), n_threads=1)
    assert 1e-6 < results.candidates[0].total.kl.value < 0.01
    assert not caplog.messages
    assert all("tokens/s" in line for line in capfd.readouterr().err.splitlines())


# -- what is refused ----------------------------------------------------------------------------


def refused(error: type[DusEdgeError], *args: object, **kwargs: object) -> str:
    with pytest.raises(error) as caught:
        quality(*args, **{"texts": [TEXT], "n_ctx": 48, "n_chunks": 2, "n_threads": 1} | kwargs)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def test_what_is_not_there_is_refused(tmp_path, pico):
    assert "no file" in refused(UsageError, "pico", [str(tmp_path / "none.gguf")])
    (tmp_path / "text.gguf").write_text("no model")
    assert "no GGUF file" in refused(UsageError, "pico", [str(tmp_path / "text.gguf")])
    refused(UsageError, str(tmp_path / "none"), ["pico"])
    assert "candidate" in refused(UsageError, "pico", [])


@pytest.mark.parametrize("left", [0.02, 0.5, 0.999])
def test_a_truncated_gguf_is_found_before_anything_runs(left, ggufs, tmp_path, capfd):
    data = ggufs["q4_k_m"].read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: int(left * len(data))])
    message = refused(CheckpointError, "pico", [str(tmp_path / "cut.gguf")])
    assert "cut.gguf" in message and "llama.cpp" in message
    assert "tokens/s" not in capfd.readouterr().err


def test_another_vocabulary_is_refused(make_checkpoint):
    other = make_checkpoint(vocab_size=512)
    message = refused(UsageError, "pico", [str(other)])
    assert "512" in message and "4,096" in message


def test_text_and_context_must_fit(ggufs, tmp_path):
    assert "512" in refused(UsageError, "pico", [str(ggufs["q8_0"])], n_ctx=4096)
    (tmp_path / "short.txt").write_text("Too little.")
    refused(UsageError, "pico", [str(ggufs["q8_0"])], texts=[tmp_path / "short.txt"])
    assert "3 tokens" in refused(UsageError, "pico", [str(ggufs["q8_0"])], n_ctx=2)


def test_a_missing_device_is_refused(ggufs):
    assert "nowhere" in refused(UsageError, "pico", [str(ggufs["q8_0"])], device="nowhere")


def test_weights_that_give_nan_are_named(make_checkpoint, ggufs, tmp_path):
    folder = make_checkpoint("broken", dtype="F32")
    state = load_file(folder / "model.safetensors")
    state["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    message = refused(CheckpointError, str(ggufs["q8_0"]), [str(folder)])
    assert str(folder) in message and "chunk 1 of 2" in message


def test_a_folder_without_a_tensor_is_refused(make_checkpoint):
    """transformers alone would go on with random numbers."""
    folder = make_checkpoint("partial", dtype="F32")
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    message = refused(CheckpointError, "pico", [str(folder)])
    assert "model.layers.1.mlp.up_proj.weight" in message


def test_other_quantized_folders_are_refused(make_checkpoint):
    folder = make_checkpoint("awq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "awq" in refused(UnsupportedError, "pico", [str(folder)])


def test_a_small_disk_is_met_before_the_first_model_runs(ggufs, tmp_path, monkeypatch, capfd):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert "1000 B are free" in refused(OutputError, "pico", [str(ggufs["q8_0"])], work=tmp_path)
    assert "tokens/s" not in capfd.readouterr().err


def test_split_models_are_measured_whole(tmp_path):
    for i in (1, 2, 3):
        (tmp_path / f"m-{i:05}-of-00003.gguf").write_bytes(b"x" * i)
    first = tmp_path / "m-00001-of-00003.gguf"
    assert sum(f.stat().st_size for f in split_files(first)) == 6
    assert split_files(tmp_path / "m.gguf") == [tmp_path / "m.gguf"]


# -- report -------------------------------------------------------------------------------------

NAMES = ["Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q4_0"]
NAMES += ["GPTQ-4bit-128g", "nf4", "Q3_K_M", "Q2_K", "F32"]


def made_up(
    names: list[str], languages: tuple[str, ...], kl: list[float], error: float | None = 0.05
) -> Results:
    """Results without models, as wide as they can get."""

    def scores(kl: float) -> Scores:
        def part(x: float) -> Estimate:
            return Estimate(x, None if error is None else x * error)

        nll = part(12345.678)
        share = part(math.exp(-kl))
        return Scores(20, 5100, nll, part(12.1), Estimate(kl / 3, error), part(kl), 12 * kl, share)

    kinds = {"GPTQ-4bit-128g": "gptq", "nf4": "bitsandbytes"}
    reference = SourceInfo(Path("base"), "base", "hf", 32000, 20 * 2**30, 10**10, 4096)
    candidates = [
        ComparedModel(
            dataclasses.replace(
                reference,
                name=name,
                kind=kinds.get(name.removeprefix("SOLAR-DUS-10.7B-v1.0-"), "gguf"),
                n_bytes=int(2**30 * (3 + 10 / (1 + 9 * math.sqrt(x)))),
            ),
            scores(x),
            {language: scores(x) for language in languages},
        )
        for name, x in zip(names, kl, strict=True)
    ]
    chunks = dict.fromkeys(languages, 20)
    return Results(reference, tuple(candidates), 512, 256, chunks, "ab" * 32)


LONG = [f"SOLAR-DUS-10.7B-v1.0-{name}" for name in NAMES]
KL = [1e-3, 3e-3, 8e-3, 8.3e-3, 0.021, 0.024, 0.034, 0.026, 0.031, 0.07, 0.3, 0.0]


@pytest.mark.parametrize("error", [0.05, 0.0, None])
@pytest.mark.parametrize(
    "languages", [("en",), ("en", "ko", "code"), tuple(f"language-{i}" * 2 for i in range(9))]
)
@pytest.mark.parametrize("names", [NAMES, LONG, [f"{n}-{'x' * 90}|{n}" for n in NAMES]])
def test_pages_are_at_most_80_columns_wide(names, languages, error):
    page = quality_report(made_up(names, languages, KL, error))
    lines = page.splitlines()
    assert max(map(len, lines)) <= 80
    for block in page.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({(len(r), r.count("|")) for r in rows}) <= 1, "not aligned"
    assert ("## By language" in page) == (len(languages) > 1)


def test_page_says_what_was_found(found):
    page = quality_report(found)
    total = found.candidates[2].total
    rows = [line for line in page.splitlines() if line.startswith("| Q4_K_M")]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert {c[0] for c in cells} == {"Q4_K_M"}
    kl, error = map(float, cells[0][3].split(" ± "))
    assert kl == pytest.approx(total.kl.value, rel=0.01)
    assert error == pytest.approx(total.kl.error, rel=0.05)
    assert cells[0][4] == "*"
    assert float(cells[2][1]) == pytest.approx(total.kl_p99, rel=0.01)
    assert float(cells[2][2].removesuffix(" %")) == pytest.approx(
        100 * total.same_top.value, abs=0.01
    )
    assert f"{found.candidates[0].total.n_tokens:,} tokens" in " ".join(page.split())


def test_names_lose_what_they_share():
    assert labels(made_up(LONG, ("en",), KL)) == NAMES
    assert labels(made_up(["base-Q4_0"], ("en",), [0.1])) == ["base-Q4_0"]
    assert labels(made_up(["a-b", "a-b"], ("en",), [0.1, 0.2])) == ["b", "b"]
    assert labels(made_up(["a", "a-b"], ("en",), [0.1, 0.2])) == ["a", "a-b"]


def test_names_say_how_files_are_stored_where_that_tells_them_apart():
    results = made_up(["m-Q4_K_M", "m-Q4_K_M", "m-MIX"], ("en",), [0.1, 0.2, 0.3])
    fed = Origin("Q4_K_M", imatrix=True, fed=(3, 4))

    def stored(*origins: Origin | None) -> list[str]:
        return labels(
            dataclasses.replace(
                results,
                candidates=tuple(
                    dataclasses.replace(
                        c, info=dataclasses.replace(c.info, origin=o, path=Path(f"{i}/m.gguf"))
                    )
                    for i, (c, o) in enumerate(zip(results.candidates, origins, strict=True))
                ),
            )
        )

    plain, mix = Origin("Q4_K_M"), Origin("Q4_K_M", goal="like q4_k_m")
    assert stored(plain, fed, mix) == ["Q4_K_M", "Q4_K_M + feedback", "mix like q4_k_m"]
    assert stored(plain, plain, mix) == ["0/Q4_K_M", "1/Q4_K_M", "mix like q4_k_m"]
    assert stored(plain, mix, mix) == [
        *("Q4_K_M", "mix like q4_k_m, 1/Q4_K_M", "mix like q4_k_m, MIX")
    ]
    assert stored(None, fed, mix) == ["0/Q4_K_M", "Q4_K_M + feedback", "mix like q4_k_m"]


def test_json_has_every_number(found):
    parsed = json.loads(json.dumps(quality_json(found), allow_nan=False))
    assert parsed["reference"]["name"] == "pico"
    assert parsed["text"] == {
        "n_ctx": N_CTX,
        "first_scored": N_CTX // 2,
        "chunks": {"code": N_CHUNKS},
        "sha256": found.digest,
    }
    for candidate, ours in zip(parsed["candidates"], found.candidates, strict=True):
        assert candidate["file_bytes"] == Path(candidate["path"]).stat().st_size
        assert candidate["bits_per_weight"] == pytest.approx(
            8 * candidate["file_bytes"] / candidate["n_parameters"]
        )
        assert candidate["total"]["kl_nats"] == ours.total.kl.value
        assert candidate["languages"]["code"]["perplexity"] == ours.total.perplexity.value


def test_what_json_cannot_hold_becomes_null():
    endless = made_up(["a"], ("en",), [math.inf])
    text = json.dumps(quality_json(endless), allow_nan=False)
    assert json.loads(text)["candidates"][0]["total"]["kl_nats"] is None
    assert "inf" in quality_report(endless)


def test_files_are_written_whole_and_the_same_again(found, tmp_path):
    paths = write(found, tmp_path, plots=True)
    assert paths == output_paths(tmp_path, plots=True)
    assert paths[0].read_text() == quality_report(found)
    assert json.loads(paths[1].read_text()) == quality_json(found)
    png = paths[2].read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    assert 800 <= width <= 2000 and 500 <= height <= 1500
    assert 10_000 < len(png) < 500_000
    assert ET.fromstring(paths[3].read_text()).tag.endswith("svg")
    with pytest.raises(OutputError, match="exists"):
        write(found, tmp_path, plots=True)
    before = {path: path.read_bytes() for path in paths}
    write(found, tmp_path, plots=True, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(UsageError, match="png"):
        plot(found, tmp_path / "plot.pdf")


def test_plots_without_matplotlib_name_the_extra(found, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DependencyError, match=r"dus-edge\[plots\]"):
        write(found, tmp_path, plots=True)
    assert not list(tmp_path.iterdir())
    assert len(write(found, tmp_path, plots=False)) == 2


def test_a_crowded_plot():
    svg = render_plot(made_up(LONG, ("en", "ko"), KL), "svg")
    assert b"<path" in svg and 10_000 < len(svg) < 1_000_000


@pytest.mark.parametrize("kl", [[0.0, 0.0], [1e-12, 0.0], [5.0, 5.0]])
def test_plots_of_few_or_equal_points(kl):
    assert render_plot(made_up(["a", "b"], ("en",), kl, None), "png").startswith(b"\x89PNG")


def overlaps(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@examples(20)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8),
    st.sampled_from([0.02, 0.2, 1.0]),
)
@example(
    [(0.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.5, 0.0), (0.0, 0.375), (0.5, 0.0), (0.0, 0.5)], 0.02
)
def test_labels_cover_neither_each_other_nor_points(where, spread):
    """Also where points crowd into a corner or lie on one another."""
    points = [(60 + 350 * spread * x, 40 + 220 * spread * y) for x, y in where]
    frame, legend = (0.0, 0.0, 460.0, 300.0), (380.0, 240.0, 455.0, 295.0)
    points = [p for p in points if not overlaps((*p, *p), legend)]
    places = place_labels(points, [(45.0, 9.0)] * len(points), [legend], frame)
    boxes = [place.box for place in places]
    for a, b in itertools.combinations(boxes, 2):
        assert not overlaps(a, b)
    for box in boxes:
        assert not overlaps(box, legend)
        assert all(not (box[0] < x < box[2] and box[1] < y < box[3]) for x, y in points)
        assert box[0] >= 0 and box[1] >= 0 and box[2] <= 460 and box[3] <= 300
