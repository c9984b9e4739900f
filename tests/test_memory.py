"""Predicted memory against what llama.cpp allocates, what was published, and damaged input."""

from __future__ import annotations

import ctypes
import re
import struct
from dataclasses import replace

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dus_edge.checkpoint.config import parse_config
from dus_edge.errors import CheckpointError, UnsupportedError, UsageError
from dus_edge.predict.memory import llama as memory
from dus_edge.predict.memory.graph import FreeSpace, graph_bytes, shape_only
from dus_edge.predict.memory.llama import memory_use, model_of_config, read_gguf
from dus_edge.predict.prediction import memory_settings
from dus_edge.predict.stored_model import MIB, RunSettings, kv_types
from dus_edge.quant.recipe import find_preset

from .cases import check_each
from .draws import examples
from .scripts import load_script, read_published

LIMIT = 0.03


@pytest.fixture(scope="module")
def pico_gguf(tmp_path_factory, pico):
    from dus_edge.jobs.export.gguf import export_gguf
    from dus_edge.upscale.model import plan_chooser

    folder = tmp_path_factory.mktemp("gguf")
    plan = plan_chooser(None, None, (), False)
    result = export_gguf(str(pico), plan, [find_preset("q8_0")], folder)
    return result.outputs[0].path


@pytest.fixture(scope="module")
def llama():
    """llama_cpp and the lines it logs."""
    import llama_cpp

    lines: list[str] = []
    callback = llama_cpp.llama_log_callback(
        lambda level, text, user: lines.append(text.decode(errors="replace"))
    )
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    yield llama_cpp, lines
    from dus_edge.run import llama as llama_library

    # Another callback before ours is gone: llama.cpp keeps the pointer.
    llama_library.llama_library.cache_clear()
    llama_library.llama_library()


@pytest.fixture(scope="module")
def fused_gguf(pico_gguf, tmp_path_factory):
    """The same file with queries, keys and values in one tensor, as older conversions have them."""
    path = tmp_path_factory.mktemp("fused") / "fused.gguf"
    reader = gguf.GGUFReader(pico_gguf)
    writer = gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(
                field.name, field.contents(), field.types[0], sub_type=field.types[-1]
            )
    tensors = {t.name: t for t in reader.tensors}
    for name, tensor in tensors.items():
        data = tensor.data
        if ".attn_k." in name or ".attn_v." in name:
            continue
        if ".attn_q." in name:
            data = np.concatenate(
                [tensors[name.replace("attn_q", f"attn_{x}")].data for x in "qkv"]
            )
            name = name.replace("attn_q", "attn_qkv")
        writer.add_tensor(name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Logged:
    """A file loaded by llama.cpp, and what its log says of contexts that are made of it."""

    def __init__(self, llama, path):
        self.lib, self.lines = llama
        self.lines.clear()
        params = self.lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self.loaded = self.lib.llama_model_load_from_file(str(path).encode(), params)
        self.model = read_gguf(path)

    def mib(self, what):
        return sum(map(float, re.findall(rf"{what} size =\s*([\d.]+) MiB", "".join(self.lines))))

    def check(self, settings: RunSettings, slots: int = 1):
        """The cache and the compute buffer of a context are what is predicted of these settings.

        With more `slots` that many sequences share the context, each with a row of logits.
        """
        c = self.lib.llama_context_default_params()
        c.n_ctx = settings.context * settings.n_parallel
        c.n_batch, c.n_ubatch, c.n_threads = settings.batch, settings.ubatch, 1
        c.type_k, c.type_v = (LLAMA_TYPES[x] for x in (settings.type_k, settings.type_v))
        c.flash_attn_type = int(settings.flash_attn)
        c.n_seq_max, c.n_outputs_max = settings.n_parallel, settings.n_outputs or 0
        if slots > 1:
            c.n_seq_max, c.kv_unified = slots, True
        self.lines.clear()
        made = self.lib.llama_init_from_model(self.loaded, c)
        assert made
        self.lib.llama_free(made)
        use = memory_use(self.model, replace(settings, backend="CPU"))
        assert use.kv_cache_bytes / MIB == pytest.approx(self.mib("KV buffer"), abs=6e-3)
        compute = self.mib("compute buffer") + self.mib("output buffer")
        assert compute > 0
        rows = (slots - 1) * self.model.vocab_size * 4 / MIB
        assert use.compute_buffer_bytes / MIB + rows == pytest.approx(compute, abs=0.02)


LLAMA_TYPES = {"f16": 1, "q8_0": 8}


def test_pico_takes_what_llama_cpp_says(pico_gguf, llama):
    """Weights, cache and compute buffer of llama.cpp's own log, at 16 settings."""
    logged = Logged(llama, pico_gguf)
    assert logged.mib("model buffer") == pytest.approx(logged.model.weights_bytes / MIB, abs=0.01)

    def check(context, kind, flash):
        k, v = kv_types(kind, flash)
        logged.check(RunSettings(context=context, type_k=k, type_v=v, flash_attn=flash))

    check_each(check, (300, 512, 2048, 4096), LLAMA_TYPES, (False, True))
    llama[0].llama_model_free(logged.loaded)


def test_outputs_and_sequences_take_what_llama_cpp_says(pico_gguf, llama):
    """Logits of as many tokens as are asked for, and a cache for each sequence."""
    logged = Logged(llama, pico_gguf)

    def check(outputs, parallel, context, kind, flash):
        k, v = kv_types(kind, flash)
        logged.check(
            RunSettings(
                context=context,
                type_k=k,
                type_v=v,
                flash_attn=flash,
                n_outputs=None if outputs is None else outputs * parallel,
                n_parallel=parallel,
            )
        )

    check_each(check, (None, 1, 2), (1, 3, 4), (300, 1024), LLAMA_TYPES, (False, True))
    # llama-server's default: four slots that share one context.
    logged.check(RunSettings(context=2048, n_outputs=4), slots=4)
    llama[0].llama_model_free(logged.loaded)


def test_fused_matrices_take_what_llama_cpp_says(pico_gguf, fused_gguf, llama):
    logged = Logged(llama, fused_gguf)
    assert logged.model.fused_qkv
    assert not read_gguf(pico_gguf).fused_qkv
    assert logged.model.weights_bytes == read_gguf(pico_gguf).weights_bytes

    def check(context, kind, flash, outputs):
        k, v = kv_types(kind, flash)
        logged.check(
            RunSettings(context=context, type_k=k, type_v=v, flash_attn=flash, n_outputs=outputs)
        )

    check_each(check, (300, 2048), LLAMA_TYPES, (False, True), (None, 1))
    llama[0].llama_model_free(logged.loaded)


def test_a_file_and_its_configuration_are_the_same_model(pico_gguf, pico):
    """The header that was written, and the plan of what would be."""
    from dus_edge.checkpoint.config import load_config

    planned = model_of_config(load_config(pico / "config.json"), find_preset("q8_0"))
    stored = read_gguf(pico_gguf)
    assert sorted(stored.tensors, key=str) == sorted(planned.tensors, key=str)
    assert shape_only(stored) == shape_only(planned)


ROWS = read_published("memory")["rows"]


def llama_rows():
    """Rows of Llama-form models whose shape, type, context and buffers are all there."""
    keys = ("kv_cache_mib", "compute_buffer_mib", "total_vram_mib", "quant", "n_ubatch")
    return [r for r in ROWS if all(k in r for k in keys)]


@pytest.mark.parametrize("row", llama_rows(), ids=lambda r: str(r["row"]))
def test_published_totals(row):
    arch = row["arch"]
    model = model_of_config(
        parse_config(
            {
                "architectures": ["LlamaForCausalLM"],
                "num_hidden_layers": arch["n_layer"],
                "hidden_size": arch["n_embd"],
                "num_attention_heads": arch["n_head"],
                "num_key_value_heads": arch["n_head_kv"],
                "intermediate_size": arch["n_ff"],
                "vocab_size": arch["n_vocab"],
                "max_position_embeddings": 8192,
            }
        ),
        find_preset(row["quant"]),
    )
    use = memory_use(
        model,
        RunSettings(
            context=row["n_ctx"],
            batch=row["n_batch"],
            ubatch=row["n_ubatch"],
            flash_attn=row["flash_attn"],
            backend=row["backend"],
            era=row["era"],
        ),
    )
    # August 2023 has 2 MiB of ggml's headers in the cache's buffer, Metal's of that year 0.06.
    headers = 2 if row.get("date") == "2023-08" else 0
    assert use.kv_cache_bytes / MIB + headers == pytest.approx(row["kv_cache_mib"], abs=0.07)
    assert use.buffers_bytes / MIB == pytest.approx(row["total_vram_mib"], rel=LIMIT)
    if not headers:
        assert use.compute_buffer_bytes / MIB == pytest.approx(row["compute_buffer_mib"], abs=0.2)


def test_most_published_rows_are_compared():
    assert len(llama_rows()) > 55


def test_published_compute_buffers_of_builds_that_keep_some_logits():
    """Rows 86 and 102 keep logits of one token, 103 of all; 86 has one matrix for q, k and v."""
    script = load_script("check_memory")
    rows = {r["row"]: script.compute_of(r) for r in ROWS if r["row"] in (86, 102, 103)}

    def check(row):
        assert row["and_fused"] == pytest.approx(row["published"], abs=0.02)

    check_each(check, rows.values())
    assert rows[86]["outputs_asked_for"] > rows[86]["published"] + 5
    assert rows[102]["all_outputs"] == 304.0


def test_published_weights_of_a_fused_model():
    script = load_script("check_memory")

    def check(row):
        weights = memory.weights_on_device(script.model_of(row), script.settings_of(row))
        assert weights / MIB == pytest.approx(row["model_buffer_mib"], abs=0.02)

    check_each(check, [r for r in ROWS if r["row"] in script.FUSED])


def mistral(preset="q5_k_m", **fields):
    return model_of_config(
        parse_config(
            {
                "architectures": ["LlamaForCausalLM"],
                "num_hidden_layers": 32,
                "hidden_size": 4096,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "intermediate_size": 14336,
                "vocab_size": 32000,
                "max_position_embeddings": 32768,
            }
            | fields
        ),
        find_preset(preset),
        "the model",
    )


def test_a_part_of_the_layers():
    """Row 90: 5 of 33 layers, 755 + 10 + 173.04 MiB; the output matrix is copied over."""
    use = memory_use(
        mistral(), RunSettings(context=512, flash_attn=False, n_gpu_layers=5, era="2024")
    )
    assert use.kv_cache_bytes == 10 * MIB
    assert use.weights_bytes / MIB == pytest.approx(755.0, abs=0.05)
    assert use.compute_buffer_bytes / MIB == pytest.approx(173.04, abs=0.05)


def test_which_layers_are_offloaded():
    model = mistral()
    assert memory.offloaded(model, RunSettings(n_gpu_layers=5)) == (4, True)
    assert memory.offloaded(model, RunSettings(n_gpu_layers=5, era="2024")) == (5, False)
    assert memory.offloaded(model, RunSettings(n_gpu_layers=33, era="2024")) == (32, True)
    assert memory.offloaded(model, RunSettings(n_gpu_layers=0)) == (0, False)
    assert memory_use(model, RunSettings(n_gpu_layers=0)).total_bytes == 0
    assert memory.offloaded(model, RunSettings(n_gpu_layers=0, backend="CPU")) == (32, True)


@given(
    context=st.integers(1, 9000),
    ubatch=st.sampled_from((32, 128, 512)),
    flash=st.booleans(),
    kind=st.sampled_from(("f16", "q8_0", "q4_0")),
)
@examples(30)
def test_no_less_than_what_must_live_at_once(context, ubatch, flash, kind):
    """Bounds from the shape alone: scores or logits below, all tensors of a layer above."""
    model = mistral()
    k, v = kv_types(kind, flash)
    use = memory_use(
        model, RunSettings(context=context, ubatch=ubatch, type_k=k, type_v=v, flash_attn=flash)
    )
    n, cells = min(context, ubatch), -(-context // 256) * 256
    assert use.compute_buffer_bytes >= n * 4 * (32000 + 4096)
    if not flash:
        assert use.compute_buffer_bytes >= n * cells * 32 * 4
    copies = cells * 2 * 1024 * 2
    assert (
        use.compute_buffer_bytes
        <= n * 4 * (32000 + 10 * 4096 + 3 * 14336 + 2 * 1024 + cells * 34) + copies + 128 * 1024
    )
    bytes_per_value = {"f16": 2, "q8_0": 34 / 32, "q4_0": 18 / 32}
    assert use.kv_cache_bytes == 32 * cells * 1024 * (bytes_per_value[k] + bytes_per_value[v])


def test_the_allocator_takes_the_best_hole_and_joins_neighbours():
    space = FreeSpace()
    a, b, c, d = (space.take(n) for n in (100, 20, 50, 10))
    space.give(a, 100)
    space.give(c, 50)
    assert space.take(40) == c  # 50 fits better than 100
    space.give(b, 20)  # joins a's hole: 120 at 0
    assert space.take(120) == a
    assert space.peak == 180
    space.give(d, 10)
    assert space.take(60) == 160  # what is left of c's hole and d are the end again


def test_layers_beyond_the_fourth_change_nothing():
    model = shape_only(mistral())
    for flash in (False, True):
        s = RunSettings(flash_attn=flash)
        assert graph_bytes(model, 4, True, s) == graph_bytes(model, 32, True, s)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"context": 0}, "context is 0"),
        ({"ubatch": -1}, "ubatch is -1"),
        ({"batch": 0}, "batch is 0"),
        ({"n_outputs": 0}, "n_outputs is 0"),
        ({"n_parallel": 0}, "n_parallel is 0"),
        ({"n_parallel": 4, "n_outputs": 3}, "each of 4 sequences needs one"),
        ({"n_gpu_layers": -1}, "n_gpu_layers is -1"),
        ({"type_k": "q9"}, "type_k is 'q9'"),
        ({"backend": "TPU"}, "backend is 'TPU'"),
        ({"era": "1999"}, "era is '1999'"),
        ({"type_v": "q8_0", "flash_attn": False}, "needs flash attention"),
    ],
)
def test_bad_settings(fields, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        RunSettings(**fields)


def test_outputs_and_sequences_that_are_asked_for():
    def check(given, expected):
        settings = memory_settings(mistral(), **given)
        assert (settings.n_parallel, settings.n_outputs) == expected

    for case in (
        ({}, (1, 4)),  # llama-server's own: four slots share a context
        ({"parallel": 1}, (1, 1)),  # Ollama's
        ({"parallel": 6}, (6, 6)),
        ({"parallel": 2, "outputs": "all"}, (2, None)),
        ({"outputs": "512"}, (1, 512)),
    ):
        check(*case)
    with pytest.raises(UsageError, match="a number or all"):
        memory_settings(mistral(), outputs="some")


def test_sequences_of_older_builds_share_a_cache():
    one = RunSettings(context=4096, flash_attn=False, era="2024")
    four = replace(one, context=1024, n_parallel=4)
    assert memory_use(mistral(), one) == memory_use(mistral(), four)


def test_contexts_beyond_the_model():
    assert memory.context_warning(mistral(), 32768) is None
    assert "made for 32,768 tokens" in memory.context_warning(mistral(), 40000)
    memory.check_context(40000)
    for context, said in ((0, "at least 1"), (-1, "at least 1"), (2**31 + 1, "2,147,483,648")):
        with pytest.raises(UsageError, match=said):
            memory.check_context(context)


def test_heads_that_no_block_divides():
    model = mistral(hidden_size=4096, head_dim=80)
    with pytest.raises(UsageError, match="head size 80"):
        memory_use(model, RunSettings(type_k="q8_0"))


def test_a_truncated_file(pico_gguf, tmp_path):
    whole = pico_gguf.read_bytes()
    cut = tmp_path / "cut.gguf"
    for n in (0, 3, 10, 200, 5000, len(whole) // 2, len(whole) - 40):
        cut.write_bytes(whole[:n])
        with pytest.raises(CheckpointError, match=r"cut\.gguf is (truncated|no whole GGUF file)"):
            read_gguf(cut)


def test_not_a_gguf_file(tmp_path):
    other = tmp_path / "x.gguf"
    other.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CheckpointError, match="does not start with GGUF"):
        read_gguf(other)
    other.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60))
    with pytest.raises(CheckpointError, match="counts are larger than the file"):
        read_gguf(other)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_gguf(tmp_path / "none.gguf")


def test_another_architecture(pico_gguf, tmp_path):
    other = tmp_path / "other.gguf"
    other.write_bytes(
        pico_gguf.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gemma", 1)
    )
    with pytest.raises(UnsupportedError, match="gemma"):
        read_gguf(other)


def test_a_field_that_is_missing(pico_gguf, tmp_path):
    other = tmp_path / "other.gguf"
    other.write_bytes(pico_gguf.read_bytes().replace(b"llama.block_count", b"llama.block_kount", 1))
    with pytest.raises(CheckpointError, match=r"llama\.block_count is None"):
        read_gguf(other)
    with pytest.raises(CheckpointError, match="hidden_size is missing"):
        parse_config({"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(CheckpointError, match="hidden_size is -5"):
        parse_config({"architectures": ["LlamaForCausalLM"], "hidden_size": -5})
