"""Importance matrices: the files against ggml's own, their use against llama_model_quantize."""

from __future__ import annotations

import ctypes
import struct
from collections import Counter
from pathlib import Path

import gguf as gguf_py
import llama_cpp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dus_edge.errors import CheckpointError
from dus_edge.export.gguf import sink as gguf
from dus_edge.export.gguf.imatrix import quantize_metadata, write_imatrix
from dus_edge.export.gguf.metadata import build_metadata
from dus_edge.export.vocab.vocab import read_vocab
from dus_edge.families.family import load_families
from dus_edge.quant import ggml
from dus_edge.quant import types as t
from dus_edge.quant.choose import find_quantizer
from dus_edge.quant.imatrix import Importance, match, read_imatrix
from dus_edge.quant.recipe import PRESETS
from dus_edge.upscale.model import find_model, plan_chooser

from . import llama_imatrix
from .cases import ONE_THREAD
from .draws import examples

SILENT = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(SILENT, ctypes.c_void_p(0))

N_CHUNKS, N_CTX = 2, 64
#: Few layers, two of them twice, so that every preset can be compared in seconds.
PLAN = "0:3,1:3"


def example(n_entries: int = 3, seed: int = 0) -> Importance:
    """Sums of a few tensors with widths that need padding."""
    rng = np.random.default_rng(seed)
    names = [f"blk.{i}.ffn_down.weight" for i in (0, 10, 2, 1)][:n_entries]
    sums = {name: rng.gamma(1, 9, 33 + i).astype(np.float32) for i, name in enumerate(names)}
    counts = dict.fromkeys(names, 128)
    return Importance(sums, counts, 64, 2, ("text.txt", "καὶ.txt"))


def write_legacy(path: Path, importance: Importance, *, trailer: bool = True) -> None:
    """As `save_imatrix_legacy` of llama.cpp's tools/imatrix/imatrix.cpp."""
    parts = [struct.pack("<i", len(importance.sums))]
    for name, sums in sorted(importance.sums.items()):
        count = np.float32(importance.counts[name])
        n_calls = -(-int(count) // importance.chunk_size)
        parts += [
            struct.pack("<i", len(name)),
            name.encode(),
            struct.pack("<ii", n_calls, len(sums)),
        ]
        parts.append((sums / count * np.float32(n_calls)).tobytes())
    if trailer:
        dataset = importance.datasets[-1].encode()
        parts += [struct.pack("<ii", importance.n_chunks, len(dataset)), dataset]
    path.write_bytes(b"".join(parts))


def assert_same(a: Importance, b: Importance) -> None:
    assert list(a.sums) == sorted(b.sums)
    for name, sums in a.sums.items():
        np.testing.assert_array_equal(sums, b.sums[name])
        assert sums.dtype == np.float32
    assert a.counts == b.counts
    assert (a.chunk_size, a.n_chunks, a.datasets) == (b.chunk_size, b.n_chunks, b.datasets)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_entries", [1, 4])
def test_the_file_is_what_ggml_writes(tmp_path, n_entries):
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    importance = example(n_entries)
    write_imatrix(ours, importance)
    llama_imatrix.write(
        theirs,
        {name: (sums, importance.counts[name]) for name, sums in importance.sums.items()},
        n_chunks=importance.n_chunks,
        chunk_size=importance.chunk_size,
        datasets=importance.datasets,
    )
    assert ours.read_bytes() == theirs.read_bytes()
    assert_same(read_imatrix(ours), importance)
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".partial"] == []


def test_the_older_format_has_the_same_means(tmp_path):
    importance = example()
    write_legacy(tmp_path / "imatrix.dat", importance)
    read = read_imatrix(tmp_path / "imatrix.dat")
    assert list(read.sums) == sorted(importance.sums)
    for name in importance.sums:
        np.testing.assert_allclose(read.means(name), importance.means(name), rtol=2e-7)
    assert (read.chunk_size, read.n_chunks, read.datasets) == (0, 2, importance.datasets[-1:])
    write_legacy(tmp_path / "older.dat", importance, trailer=False)
    oldest = read_imatrix(tmp_path / "older.dat")
    assert (oldest.n_chunks, oldest.datasets) == (0, ())
    np.testing.assert_array_equal(oldest.means(name), read.means(name))


def test_without_a_token_all_columns_count_the_same(tmp_path):
    """llama-quantize takes ones from the GGUF format, and the values as they are from the older."""
    name, sums = "blk.0.attn_q.weight", np.array([3, 0, 5], np.float32)
    unseen = Importance({name: sums}, {name: 0}, 64, 0, ())
    np.testing.assert_array_equal(unseen.means(name), np.ones(3, np.float32))
    path = tmp_path / "imatrix.dat"
    path.write_bytes(
        struct.pack("<ii", 1, len(name)) + name.encode() + struct.pack("<ii3f", 0, 3, *sums)
    )
    np.testing.assert_array_equal(read_imatrix(path).means(name), sums)


def gguf_file(path: Path, tensors: dict[str, np.ndarray], kind: str = "imatrix", **keys) -> Path:
    """A GGUF file by llama.cpp's Python package."""
    writer = gguf_py.GGUFWriter(path, "none")
    writer.add_type(kind)
    keys = {"chunk_count": 1, "chunk_size": 64} | keys
    for key, value in keys.items():
        if value is not None:
            writer.add_uint32(f"imatrix.{key}", value)
    writer.add_array("imatrix.datasets", ["text.txt"])
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def entry(sums, counts=(64,)) -> dict[str, np.ndarray]:
    return {
        "a.weight.in_sum2": np.array(sums, np.float32),
        "a.weight.counts": np.array(counts, np.float32),
    }


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        (
            entry([1, 2]),
            {"kind": "model"},
            "no importance matrix .it is a GGUF file of type 'model'",
        ),
        ({"a.weight": np.ones(3, np.float32)}, {}, "no importance matrix .it has no tensor whose"),
        (entry([1, 2]), {"chunk_size": None}, "it has no number imatrix.chunk_size"),
        (entry([1, np.nan]), {}, ": a.weight is not finite"),
        (entry([1, np.inf]), {}, ": a.weight is not finite"),
        (entry([1, -1]), {}, ": a.weight is negative"),
        (entry([1, 2], [-1]), {}, ": the count of a.weight is negative"),
        (entry([1, 2], [np.nan]), {}, ": the count of a.weight is not finite"),
        ({"a.weight.in_sum2": np.ones(3, np.float32)}, {}, ": a.weight has no counts"),
        ({"a.weight.counts": np.ones(1, np.float32)}, {}, ": a.weight has no sums"),
        (entry([[1, 2], [3, 4]], [[64], [64]]), {}, ": a.weight has 2 counts, one for each expert"),
        (
            entry([1, 2]) | {"a.weight.in_sum2": np.ones(2, np.float16)},
            {},
            ": a.weight.in_sum2 is not of type F32",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, tensors, options, message):
    path = gguf_file(tmp_path / "imatrix.gguf", tensors, **options)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_imatrix(path)
    assert str(caught.value).startswith(str(path))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(CheckpointError, match="does not exist"):
        read_imatrix(path)
    for content in (
        b"",
        b"\1\0\0",
        b"a text of some length, no matrix",
        bytes(64),
        b"GGUF\1\0\0\0" * 9,
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="no importance matrix"):
            read_imatrix(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_imatrix(tmp_path)


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory) -> dict[str, tuple[bytes, int]]:
    """A file of each format, and how many of its last bytes may be missing: the GGUF format's
    padding, the older one's trailer."""
    path, importance = tmp_path_factory.mktemp("whole") / "imatrix", example()
    trailer = 8 + len(importance.datasets[-1].encode())
    found = {}
    for write, optional in ((write_imatrix, 28), (write_legacy, trailer)):
        write(path, importance)
        found[write.__name__] = (path.read_bytes(), optional)
    return found


@pytest.mark.parametrize("write", ["write_imatrix", "write_legacy"])
@examples(150)
@given(st.integers(0, 1 << 16), st.integers(0, 255), st.booleans())
def test_damaged_files_are_refused_or_read_but_never_crash(
    whole_files, tmp_path_factory, write, at, byte, cut
):
    whole, optional = whole_files[write]
    at %= len(whole)
    path = tmp_path_factory.getbasetemp() / "damaged.imatrix"
    path.write_bytes(whole[:at] if cut else whole[:at] + bytes([byte]) + whole[at + 1 :])
    try:
        read = read_imatrix(path)
    except CheckpointError as e:
        assert str(e).startswith(str(path))
    else:
        assert not cut or at >= len(whole) - optional
        for name, sums in read.sums.items():
            assert np.isfinite(sums).all() and (sums >= 0).all() and read.counts[name] >= 0


# --- the model's tensors -------------------------------------------------------------------------


def test_match_names_what_has_no_entry():
    shapes = {
        "token_embd.weight": (100, 8),
        "blk.0.attn_norm.weight": (8,),
        "blk.0.attn_q.weight": (8, 8),
        "blk.1.attn_q.weight": (8, 8),
        "output.weight": (100, 8),
    }
    sums = {"blk.0.attn_q.weight": np.full(8, 6, np.float32), "blk.7.attn_q.weight": np.ones(8)}
    found = match(Importance(sums, dict.fromkeys(sums, 2), 2, 1, ()), shapes)
    assert list(found.weights) == ["blk.0.attn_q.weight"]
    np.testing.assert_array_equal(found.weights["blk.0.attn_q.weight"], np.full(8, 3, np.float32))
    assert found.missing == ("blk.1.attn_q.weight",)
    assert found.unused == ("blk.7.attn_q.weight",)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"blk.0.attn_q.weight": 9}, "blk.0.attn_q.weight has 9 columns there and 8 here"),
        ({"blk.0.wqkv.weight": 9}, "first: blk.0.wqkv.weight, 9 .* first: blk.0.attn_q.weight, 8"),
        ({}, "none of its entries is a tensor of this one"),
    ],
)
def test_another_models_matrix_is_refused(entries, message):
    sums = {name: np.ones(n, np.float32) for name, n in entries.items()}
    importance = Importance(sums, dict.fromkeys(sums, 2), 2, 1, ())
    with pytest.raises(CheckpointError, match=f"^x.gguf is of another model.*{message}"):
        match(importance, {"blk.0.attn_q.weight": (4, 8)}, "x.gguf")


# --- quantizing ----------------------------------------------------------------------------------


def export(
    base: Path | str,
    out: Path,
    presets: list[str],
    importance: Importance | None = None,
    file: str = "",
    *,
    plan: str = PLAN,
    quantizer: str = "ggml",
) -> dict[str, Path]:
    """The up-scaled model's files by preset."""
    choose = plan_chooser(None, None, (plan,), True)
    model = find_model(str(base), choose, weights=True, say=print)
    vocab = read_vocab(model.source.folder, model.config.vocab_size)
    metadata = build_metadata(model.config, model.source, model.name, model.plan, vocab)
    weights = said = None
    if importance is not None:
        weights = match(importance, gguf.gguf_shapes(model.config.family, model.shapes)).weights
        said = quantize_metadata(file, importance)
    files = [
        gguf.plan_file(model.config, model.shapes, metadata, PRESETS[p], out / f"{p}.gguf", said)
        for p in presets
    ]
    done: list[int] = []
    checkpoint, chosen = model.open(), find_quantizer(quantizer)
    chosen.prepare(gguf.conversions(checkpoint, files, weights))
    gguf.write_files(
        checkpoint, files, chosen, n_threads=1, importance=weights, advance=done.append
    )
    assert sum(done) == gguf.total_work(checkpoint, files, weights)
    return {f.preset.name: f.path for f in files}


def llama_quantize(
    source: Path, target: Path, preset: str, importance: Importance, file: str
) -> None:
    """As `main` of llama.cpp's tools/quantize/quantize.cpp calls the library."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = PRESETS[preset].file_type
    params.nthread = 1
    means = {name: np.ascontiguousarray(importance.means(name)) for name in importance.sums}
    data = (llama_cpp.llama_model_imatrix_data * (len(means) + 1))()
    for item, (name, values) in zip(data, means.items(), strict=False):
        item.name, item.size = name.encode(), values.size
        item.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    said: list[tuple[str, str | int]] = [("file", file)]
    said += [("dataset", d) for d in importance.datasets[:1]]
    said.append(("entries_count", len(means)))
    if importance.n_chunks:
        said.append(("chunks_count", importance.n_chunks))
    overrides = (llama_cpp.llama_model_kv_override * (len(said) + 1))()
    for item, (key, value) in zip(overrides, said, strict=False):
        item.key = f"quantize.imatrix.{key}".encode()
        if isinstance(value, str):
            item.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR
            item.value.val_str = value.encode()[:127]
        else:
            item.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
            item.value.val_i64 = value
    params.imatrix = data
    params.kv_overrides = ctypes.cast(overrides, type(params.kv_overrides))
    code = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    assert code == 0


def importance_of(statistics: dict[str, tuple[np.ndarray, int]]) -> Importance:
    return Importance(
        {name: sums for name, (sums, _) in statistics.items()},
        {name: count for name, (_, count) in statistics.items()},
        N_CTX,
        N_CHUNKS,
        ("random tokens",),
    )


@pytest.fixture(scope="module")
def collected(pico, tmp_path_factory) -> Importance:
    """Statistics of up-scaled pico over random tokens."""
    path = export(pico, tmp_path_factory.mktemp("f32"), ["f32"])["f32"]
    tokens = np.random.default_rng(0).integers(3, 4096, (N_CHUNKS, N_CTX))
    return importance_of(llama_imatrix.collect(path, tokens))


def random_importance(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Importance:
    """Every layer's matrices, over six orders of magnitude and with columns never excited."""
    rng = np.random.default_rng(seed)
    sums = {}
    for name, shape in gguf.gguf_shapes(load_families()["llama"], shapes).items():
        if len(shape) == 2 and name.startswith("blk."):
            sums[name] = np.exp(rng.uniform(-7, 7, shape[-1])).astype(np.float32)
            sums[name][rng.random(shape[-1]) < 0.05] = 0
    return Importance(sums, dict.fromkeys(sums, 999), 333, 3, ())


def test_collected_sums_are_those_of_the_first_layers_input(pico, tmp_path):
    """blk.0.attn_q sees the normalized embeddings: computed here without llama.cpp."""
    path = export(pico, tmp_path, ["f32"])["f32"]
    tokens = np.random.default_rng(1).integers(3, 4096, (N_CHUNKS, N_CTX))
    sums, count = llama_imatrix.collect(path, tokens)["blk.0.attn_q.weight"]
    tensors = {x.name: x.data for x in gguf_py.GGUFReader(path).tensors}
    x = tensors["token_embd.weight"][tokens.ravel()].astype(np.float64)
    x /= np.sqrt(np.mean(x**2, axis=1, keepdims=True) + 1e-5)
    x *= tensors["blk.0.attn_norm.weight"]
    assert count == N_CHUNKS * N_CTX
    np.testing.assert_allclose(sums, np.square(x).sum(0), rtol=1e-5)


def test_pico_upscaled_is_what_llama_quantize_writes(pico, tmp_path, collected):
    """All but IQ2 and IQ3, at which ggml is slow: the shapes below have them."""
    file = f"{tmp_path}/{'long' * 40}.gguf"
    presets = [p for p in PRESETS if p[:3] not in ("iq2", "iq3")]
    files = export(pico, tmp_path, presets, collected, file)
    source = export(pico, tmp_path / "plain", ["f32"])["f32"]
    for preset, ours in files.items():
        theirs = tmp_path / "theirs.gguf"
        llama_quantize(source, theirs, preset, collected, file)
        assert ours.read_bytes() == theirs.read_bytes(), preset


#: Two early layers rather than one, widths that trigger the fallbacks, a tied head.
SHAPES = {
    "16-layers": {"hidden_size": 256, "intermediate_size": 256, "plan": "0:4,0:4,0:4,0:4"},
    "fallback-32": {"hidden_size": 288, "num_attention_heads": 6, "intermediate_size": 320},
    "fallback-f16": {"hidden_size": 96, "intermediate_size": 172},
    "tied": {"hidden_size": 256, "intermediate_size": 256, "tie_word_embeddings": True},
}


def importance_for(base: Path, plan: str) -> Importance:
    choose = plan_chooser(None, None, (plan,), True)
    return random_importance(find_model(str(base), choose, weights=False, say=print).shapes)


def assert_same_as_theirs(
    base: Path, tmp_path: Path, presets: list[str], importance: Importance, plan: str
) -> None:
    files = export(base, tmp_path, presets, importance, "i.gguf", plan=plan)
    source = export(base, tmp_path / "plain", ["f32"], plan=plan)["f32"]
    for preset, ours in files.items():
        theirs = tmp_path / "theirs.gguf"
        llama_quantize(source, theirs, preset, importance, "i.gguf")
        assert ours.read_bytes() == theirs.read_bytes(), preset


@pytest.mark.parametrize("shape", SHAPES)
def test_every_rule_with_importance_is_llama_cpps(make_checkpoint, tmp_path, shape):
    """Two tensors lack an entry: they are quantized without, as there."""
    overrides = dict(SHAPES[shape])
    plan = overrides.pop("plan", "0:3,1:4")
    base = make_checkpoint(rows=48, vocab_size=4097, **overrides)
    importance = importance_for(base, plan)
    for name in ("blk.0.ffn_down.weight", "blk.1.attn_v.weight"):
        del importance.sums[name]
    presets = ["q4_0", "q5_0", "q4_k_m", "q4_k_s", "q3_k_m", "iq4_nl", "iq4_xs"]
    presets += ["iq3_s", "iq3_m"]
    assert_same_as_theirs(base, tmp_path, presets, importance, plan)


#: And what the presets of two bits look at besides: keys that many queries share. One early layer
#: does, for ggml is slow.
TWO_BIT_SHAPES = {name: shape for name, shape in SHAPES.items() if name != "16-layers"} | {
    "8-layers": SHAPES["16-layers"] | {"plan": "0:4,0:4"},
    "gqa-4": SHAPES["tied"] | {"num_attention_heads": 8},
}


@pytest.mark.parametrize("shape", TWO_BIT_SHAPES)
def test_every_rule_of_two_bits_is_llama_cpps(make_checkpoint, tmp_path, shape):
    """They need an entry of every matrix in a layer, as there; embedding and head have none."""
    overrides = dict(TWO_BIT_SHAPES[shape])
    plan = overrides.pop("plan", "0:3,1:4")
    base = make_checkpoint(rows=48, vocab_size=4097, **overrides)
    importance = importance_for(base, plan)
    assert_same_as_theirs(base, tmp_path, ["iq2_m", "iq2_s"], importance, plan)


def test_our_own_quantizers_files_load_and_weigh(pico, tmp_path, collected):
    """llama.cpp runs them, and the errors that importance weighs are smaller than without it."""
    presets = ["iq2_m", "iq2_s", "q2_k", "q4_k_m", "q4_0", "iq4_xs", "iq3_m", "q8_0"]
    with_it = export(pico, tmp_path / "w", presets, collected, "i.gguf", quantizer="native")
    without = export(pico, tmp_path / "o", [*presets, "f32"], quantizer="native")
    true = {x.name: x.data for x in gguf_py.GGUFReader(without["f32"]).tensors}
    for preset, path in with_it.items():
        model = llama_cpp.Llama(str(path), n_ctx=32, logits_all=True, verbose=False, **ONE_THREAD)
        model.eval([1, 300, 301])
        assert np.isfinite(model.scores[:3]).all()
        model.close()
        weighted, plain = (weighted_error(p, true, collected) for p in (path, without[preset]))
        if preset == "q8_0":
            assert weighted == plain
        else:
            assert weighted < 0.97 * plain, preset


def weighted_error(path: Path, true: dict[str, np.ndarray], importance: Importance) -> float:
    """Importance-weighted squared error of a file, relative to each matrix's weighted square."""
    total = 0.0
    for x in gguf_py.GGUFReader(path).tensors:
        if x.name not in importance.sums:
            continue
        kind = t.TYPES[x.tensor_type.name]
        data = np.ascontiguousarray(x.data).reshape(-1)
        read = ggml.dequantize(data, kind, true[x.name].shape)
        w = importance.means(x.name)
        total += float((w * (read - true[x.name]) ** 2).sum() / (w * true[x.name] ** 2).sum())
    return total


@pytest.mark.parametrize("own", [True, False])
def test_a_place_with_its_own_importance_is_quantized_for_itself(
    make_checkpoint, tmp_path, monkeypatch, own
):
    """Two places of a layer: one read; one or two quantized, as their importance is."""
    base = make_checkpoint(hidden_size=256, intermediate_size=256, num_hidden_layers=4)
    choose = plan_chooser(None, None, ("0:4,2:4",), True)
    model = find_model(str(base), choose, weights=True, say=print)
    importance = random_importance(model.shapes).sums
    if not own:
        importance |= {
            name.replace("blk.2.", "blk.4.").replace("blk.3.", "blk.5."): vector
            for name, vector in importance.items()
            if name.startswith(("blk.2.", "blk.3."))
        }
    quantizer = find_quantizer("native")
    quantize, done, asked, read = quantizer.quantize, Counter(), set(), Counter()

    def counting(rows, kind, importance, validate):
        done[kind.name] += rows.size
        asked.add((kind, rows.dtype, importance is not None))
        return quantize(rows, kind, importance, validate=validate)

    monkeypatch.setattr(quantizer, "quantize", counting)
    checkpoint = model.open()
    fetch = checkpoint.read

    def noting(name, start=0, stop=None):
        rows = fetch(name, start, stop)
        read[name.split(".")[-2]] += rows.size
        return rows

    monkeypatch.setattr(checkpoint, "read", noting)
    files = [
        gguf.plan_file(model.config, model.shapes, [], PRESETS[p], tmp_path / p, [])
        for p in ("q6_k", "q8_0")
    ]
    wanted = gguf.conversions(checkpoint, files, importance)
    gguf.write_files(checkpoint, files, quantizer, n_threads=1, importance=importance)
    assert set(wanted) == asked
    assert (t.Q6_K, np.dtype(np.uint16), True) in asked
    n_layer = sum(
        int(np.prod(s)) for n, s in model.shapes.items() if ".layers.0." in n and len(s) == 2
    )
    n_vocab = 4096 * 256
    assert done["Q6_K"] == n_layer * (6 if own else 4) + 2 * n_vocab
    assert done["Q8_0"] == n_layer * 4 + 2 * n_vocab
    assert read["gate_proj"] == 4 * 256 * 256
