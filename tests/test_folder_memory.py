"""GPTQ and bitsandbytes models: predicted memory against what transformers and torch allocate."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dus_edge.checkpoint.config import load_config
from dus_edge.errors import CheckpointError, DusEdgeError, UnsupportedError, UsageError
from dus_edge.export import bnb
from dus_edge.export import gptq as gptq_export
from dus_edge.jobs.predict import find_candidate
from dus_edge.predict import fit
from dus_edge.predict.devices import find_device
from dus_edge.predict.memory import folder as folder_memory
from dus_edge.predict.memory import torch as torch_memory
from dus_edge.predict.memory.folder import (
    find_torch_preset,
    model_of_bnb_config,
    model_of_gptq_config,
    read_folder,
)
from dus_edge.predict.memory.llama import memory_use
from dus_edge.predict.prediction import work_of
from dus_edge.predict.stored_model import MIB, RunSettings, StoredModel, TorchForm
from dus_edge.quant import gptq_format
from dus_edge.tables.predicted import solar_config
from dus_edge.upscale.model import find_model, plan_chooser

CHOOSE = plan_chooser(None, None, (), False)
#: Divided by GPTQ's groups of 32, and by bitsandbytes' blocks.
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 512, "num_hidden_layers": 3}
SOLAR = solar_config()
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
#: hidden, intermediate, layers, heads, KV heads: grouped and plain attention, a wide and a narrow
#: MLP, one layer only.
SHAPES = [(256, 704, 3, 8, 2), (256, 704, 1, 8, 8), (256, 256, 2, 4, 4), (128, 512, 2, 4, 1)]


def llama(hidden, ff, layers, heads, kv_heads, dtype="BF16"):
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ff,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=512,
        max_position_embeddings=4096,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).eval()


def stored_like(model, form: TorchForm) -> StoredModel:
    c = model.config
    return StoredModel(
        name="the model",
        n_layers=c.num_hidden_layers,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        n_heads=c.num_attention_heads,
        n_kv_heads=c.num_key_value_heads,
        head_dim=c.hidden_size // c.num_attention_heads,
        vocab_size=c.vocab_size,
        context_length=c.max_position_embeddings,
        tensors=(),
        torch=form,
    )


def allocated_peak(call) -> int:
    """The most that torch's allocator had handed out at once during a call, in bytes."""
    call()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return int(np.cumsum(sizes).max())


def reading(model, n: int):
    """`generate` of one token after n: what an answer to a prompt begins with."""
    tokens = 1 + torch.arange(n)[None] % 500  # 0 would be padding, which needs a mask
    return lambda: model.generate(tokens, max_new_tokens=1, do_sample=False, pad_token_id=0)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_a_forward_holds_what_torch_allocates(shape, dtype):
    """Plain matrices, as a fused kernel leaves no more than its result: within 1 %."""
    model = llama(*shape, dtype)
    stored = stored_like(model, TorchForm("GPTQ", dtype, dtype))
    for n in (64, 700):
        cache = torch_memory.kv_cache_bytes(stored, n)
        measured = allocated_peak(reading(model, n)) - cache
        assert torch_memory.forward_bytes(stored, n, "CUDA") == pytest.approx(measured, rel=0.01)
    kept = model(torch.arange(n)[None] % 512, use_cache=True).past_key_values
    assert cache == sum(t.nbytes for layer in kept.layers for t in (layer.keys, layer.values))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tensors_in((args, kwargs))}
        for storage in (t.untyped_storage() for t in tensors_in(result)):
            if storage._cdata not in self._known | given:
                self._known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _gone(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes


def tensors_in(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize(
    "shape",
    [(4096, 14336, 48, 32, 8), (4096, 11008, 4, 32, 32), (8192, 28672, 2, 64, 8)],
    ids=["SOLAR", "Llama 2 7B", "Llama 3 70B"],
)
@pytest.mark.parametrize("n", [512, 4096])
def test_a_forward_at_real_sizes(shape, n):
    """Tensors without memory behind them: the forward is transformers', only nothing computes."""
    with FakeTensorMode():
        model = llama(*shape)
        tokens = torch.ones((1, n), dtype=torch.long)
        with torch.inference_mode(), LiveBytes() as counted:
            model(tokens, use_cache=True, logits_to_keep=1)
    stored = stored_like(model, TorchForm("GPTQ", "BF16", "BF16"))
    measured = counted.peak - torch_memory.kv_cache_bytes(stored, n)
    # `generate`'s own two tensors, tokens and mask, are not there.
    assert torch_memory.forward_bytes(stored, n, "CUDA") - 16 * n == measured


def test_a_window_that_a_prompt_outgrows_needs_a_mask():
    """Mistral 7B v0.1: within 3 % of the live tensors, most of the difference the mask."""
    config = transformers.MistralConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=512,
        max_position_embeddings=32768,
        sliding_window=4096,
    )
    with FakeTensorMode():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        for n in (4095, 8192, 32768):
            with torch.inference_mode(), LiveBytes() as counted:
                out = model(torch.ones((1, n), dtype=torch.long), logits_to_keep=1)
            stored = stored_like(model, TorchForm("GPTQ", "BF16", "BF16", window=4096))
            measured = counted.peak - torch_memory.kv_cache_bytes(stored, n)
            forward = torch_memory.forward_bytes(stored, n, "CUDA")
            assert forward == pytest.approx(measured, rel=0.03)
            plain = stored_like(model, TorchForm("GPTQ", "BF16", "BF16"))
            more = forward - torch_memory.forward_bytes(plain, n, "CUDA")
            assert more >= (n * n if n >= 4096 else 0)
            del out


@pytest.mark.parametrize(
    ("form", "options"),
    [
        (
            TorchForm("NF4", "BF16", "F32", nested=True),
            {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32"},
        ),
        (TorchForm("NF4", "BF16", "BF16"), {"bnb_4bit_compute_dtype": "bfloat16"}),
        (TorchForm("NF4", "F16", "F32"), {"bnb_4bit_compute_dtype": "float32"}),
        (TorchForm("INT8", "BF16", "BF16"), {}),
        (TorchForm("INT8", "F16", "F16"), {}),
    ],
    ids=lambda x: f"{x.method} {x.values} {x.compute}" if isinstance(x, TorchForm) else "",
)
def test_a_forward_of_bitsandbytes(tmp_path, form, options):
    """Dequantized matrices, casts and int32 products counted: within 3 %."""
    llama(*SHAPES[0], form.values).save_pretrained(tmp_path)
    four = form.method == "NF4"
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=four, load_in_8bit=not four, bnb_4bit_quant_type="nf4", **options
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=settings, device_map="cpu", dtype=DTYPES[form.values]
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # a format of few processors
    stored = stored_like(model, form)
    # Short prompts differ by processor: with AVX-512, and bfloat16 in it, fewer matrices are cast.
    for n in (600, 1200) if "BF16" in form.compute or form.method == "INT8" else (64, 700):
        cache = torch_memory.kv_cache_bytes(stored, n)
        measured = allocated_peak(reading(model, n)) - cache
        assert torch_memory.forward_bytes(stored, n, "CPU") == pytest.approx(measured, rel=0.03)


# Weights


def resident(model) -> int:
    """Bytes of what transformers keeps of a loaded bitsandbytes model, rotary tables left out."""
    found: dict[int, int] = {}

    def count(tensor) -> None:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "rotary" in name:
            continue
        count(tensor)
        state = getattr(tensor, "quant_state", None)
        for part in (state, state.state2) if state else ():
            if part is not None:
                count(part.absmax)
                count(part.code)
        if (scales := getattr(tensor, "SCB", None)) is not None:
            count(scales)
    return sum(found.values())


def bnb_folder(base, out, scheme):
    checkpoint = find_model(str(base), CHOOSE, weights=True, say=lambda line: None).open()
    bnb.write_checkpoint(checkpoint, out, "A card.", scheme, n_threads=1)
    return out


@pytest.mark.parametrize("scheme", [bnb.NF4, bnb.INT8, bnb.Scheme("nf4", double_quant=False)])
@pytest.mark.parametrize(
    "overrides",
    [{}, {"tie_word_embeddings": True, "attention_bias": True}, {"dtype": "F32"}],
    ids=["plain", "tied", "F32"],
)
def test_weights_of_a_bitsandbytes_folder(make_checkpoint, tmp_path, scheme, overrides):
    """To the byte what transformers keeps of it, and what the configuration alone gives."""
    base = make_checkpoint(**SHAPE | overrides)
    folder = bnb_folder(base, tmp_path / "out", scheme)
    stored = read_folder(folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    assert stored.weights_bytes == resident(loaded)
    assert stored.torch.values == {torch.bfloat16: "BF16", torch.float32: "F32"}[loaded.dtype]
    if scheme.double_quant:
        config = load_config(base / "config.json")
        values = overrides.get("dtype", "BF16")
        planned = model_of_bnb_config(replace(config, dtype=values), scheme.name)
        assert planned.tensors == stored.tensors
        assert planned.torch == stored.torch


def gptq_folder(base, out, settings: gptq_format.GPTQSettings):
    """Our export of random codes: sizes do not depend on them."""
    checkpoint = find_model(str(base), CHOOSE, weights=True, say=lambda line: None).open()
    rng = np.random.default_rng(0)
    parts = {}
    for spec in checkpoint.specs().values():
        if not checkpoint.config.family.is_linear(spec.name):
            continue
        n_out, n_in = spec.shape
        width = settings.group_width(n_in)
        solution = SimpleNamespace(
            codes=rng.integers(0, settings.top + 1, spec.shape),
            scales=rng.random((n_in // width, n_out)),
            zeros=np.full((n_in // width, n_out), 2 ** (settings.bits - 1)),
            g_idx=np.arange(n_in) // width,
        )
        stem = spec.name.removesuffix(".weight")
        stored = gptq_format.stored(solution, settings)
        parts |= {f"{stem}.{k}": torch.from_numpy(v) for k, v in stored.items()}
    layers = out.with_suffix(".layers")
    save_file(parts, layers)
    gptq_export.write_checkpoint(checkpoint, out, "A card.", settings, [layers], n_threads=1)
    return out


@pytest.mark.parametrize(
    ("bits", "group_size", "tied"),
    [(4, 32, False), (4, 128, True), (4, -1, False), (2, 64, True), (3, 32, False), (8, 128, True)],
)
def test_weights_of_a_gptq_folder(make_checkpoint, tmp_path, bits, group_size, tied):
    """The header's sizes and the configuration's; a tied head is stored but counts once."""
    base = make_checkpoint(**SHAPE, tie_word_embeddings=tied)
    settings = gptq_format.GPTQSettings(bits=bits, group_size=group_size)
    folder = gptq_folder(base, tmp_path / "out", settings)
    stored = read_folder(folder)
    tensors = load_file(folder / "model.safetensors")
    twice = tensors["lm_head.weight"].nbytes if tied else 0
    assert stored.weights_bytes == sum(t.nbytes for t in tensors.values()) - twice
    config = replace(load_config(base / "config.json"), dtype="BF16")
    planned = model_of_gptq_config(config, bits, group_size)
    assert sorted(t.nbytes for t in planned.tensors) == sorted(t.nbytes for t in stored.tensors)
    kinds = {t.kind for t in stored.tensors}
    assert f"GPTQ{bits}_{'ROW' if group_size == -1 else group_size}" in kinds
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert read_folder(folder).weights_bytes == stored.weights_bytes


def test_a_matrix_by_hand():
    # 4,096 x 4,096 at 4 bits, groups of 128: codes 8,388,608 B; 32 groups x 4,096: zeros of 4 bits
    # 65,536, scales in 16 bits 262,144; g_idx 4,096 x 4 B = 16,384.
    model = model_of_gptq_config(SOLAR)
    query = next(t for t in model.tensors if t.name == "blk.0.attn_q.weight")
    assert query.nbytes == 8_388_608 + 65_536 + 262_144 + 16_384
    assert (query.kind, query.n_rows, query.n_cols) == ("GPTQ4_128", 4096, 4096)
    # 48 layers of 218,103,808 such weights at 4.15625 bits (g_idx apart), embeddings and head
    # 2 x 131,072,000 x 2 B, norms 97 x 4,096 x 2 B, g_idx 48 x (6 x 4,096 + 14,336) x 4 B.
    by_hand = 48 * 218_103_808 * 4.15625 / 8 + 2 * 262_144_000 + 97 * 8_192 + 48 * 38_912 * 4
    assert model.weights_bytes == by_hand


def test_solar_in_gptq_by_hand():
    """Cache and compute at 4,096 tokens on CUDA, where nothing is dequantized."""
    use = memory_use(model_of_gptq_config(SOLAR), RunSettings())
    # 48 layers x 4,096 tokens x 2,048 x 2 B = 768 MiB
    assert use.kv_cache_bytes == 768 * MIB
    # gate, up and product: 3 x 14,336 x 2 B; embeddings, the layer's input, what attention added
    # and its norm: 4 x 4,096 x 2 B; cosines and sines 512 B, tokens, mask and positions 24 B.
    assert use.compute_buffer_bytes == 4096 * (86_016 + 32_768 + 512 + 24)
    assert use.overhead_bytes == 400_000_000


def test_a_folder_of_autogptq(make_checkpoint, tmp_path):
    """Its own file name, settings in a file of their own, biases of zeros, and no g_idx."""
    base = make_checkpoint(**SHAPE)
    folder = gptq_folder(base, tmp_path / "out", gptq_format.GPTQSettings(group_size=32))
    ours = read_folder(folder)
    tensors = load_file(folder / "model.safetensors")
    n_more = 0
    for name in list(tensors):
        if name.endswith(".qweight"):
            stem = name.removesuffix("qweight")
            tensors[stem + "bias"] = torch.zeros(tensors[name].shape[1], dtype=torch.float16)
            n_more += tensors[stem + "bias"].nbytes - tensors.pop(stem + "g_idx").nbytes
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "gptq_model-4bit-32g.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "quantize_config.json").read_text())
    del settings["quant_method"]  # as its early versions wrote it
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    theirs = read_folder(folder)
    assert theirs.weights_bytes == ours.weights_bytes + n_more
    assert find_candidate(str(folder), CHOOSE, None, print).model == theirs


# Answers


def test_presets_have_names():
    assert find_torch_preset("GPTQ_INT4_G32").group_size == 32
    assert find_torch_preset("gptq-int2-grow").group_size == -1
    assert find_torch_preset("bnb-nf4").method == "NF4"
    with pytest.raises(UsageError, match="did you mean gptq-int4"):
        find_torch_preset("gptq-int4bit")
    with pytest.raises(UsageError, match="group size 48"):
        find_torch_preset("gptq-int4-g48")


def test_all_or_nothing_is_on_the_device():
    model = model_of_gptq_config(SOLAR, name="SOLAR")
    whole = memory_use(model, RunSettings())
    assert memory_use(model, RunSettings(n_gpu_layers=49)) == whole
    assert memory_use(model, RunSettings(n_gpu_layers=48)).total_bytes == 0
    assert fit.layers_that_fit(model, RunSettings(), whole.total_bytes) == 49
    assert fit.layers_that_fit(model, RunSettings(), whole.total_bytes - 1) == 0
    context = fit.longest_context(model, RunSettings(), whole.total_bytes - 1)
    assert context == 4096 - fit.CONTEXT_STEP
    with pytest.raises(UsageError, match=r"SOLAR runs under transformers.*not in q8_0"):
        memory_use(model, RunSettings(type_k="q8_0", type_v="q8_0"))


def test_which_devices_hold_it():
    # Weights 5,695, cache 768, compute 466, context 381 MiB: 7,310. Windows leaves 7,114 of 8 GB.
    model = model_of_gptq_config(SOLAR)
    total = memory_use(model, RunSettings()).total_bytes
    assert total / MIB == pytest.approx(7310, abs=1)
    found = fit.devices_that_run(model, RunSettings())
    held = {(v.device.id, v.memory_gb) for v in found}
    assert ("rtx-3060-12gb", 12) in held
    assert not {("rtx-4060", 8), ("m1-8c", 8)} & held
    notes = {v.device.backend: v.note for v in found}
    assert notes["CUDA"] is None
    assert "dequantizes every matrix" in notes["Metal"]
    assert all(v.runtime == "transformers" and v.fits for v in found)


@pytest.mark.parametrize("bits", [2, 3])
def test_kernels_that_dequantize_take_more(bits):
    """Short prompts, where the matrix is more than the activations."""
    model = model_of_gptq_config(SOLAR, bits)
    matrix = 2 * 4096 * 14336
    for backend in ("CUDA", "Metal", "CPU"):
        need = torch_memory.forward_bytes(model, 64, backend)
        assert need >= matrix, backend
        assert "dequantizes" in (torch_memory.kernel_note(model, backend) or ""), backend
    fused = model_of_gptq_config(SOLAR, 4)
    assert torch_memory.forward_bytes(fused, 64, "CUDA") < matrix / 10
    assert torch_memory.kernel_note(fused, "CUDA") is None


def test_the_work_of_a_token():
    work = work_of(model_of_gptq_config(SOLAR), RunSettings())
    assert work.weights == {"GPTQ4_128": 48 * 218_103_808, "F16": 32_000 * 4096}
    assert work.kv_bytes_per_value == 2


@pytest.fixture
def solar(tmp_path):
    folder = tmp_path / "SOLAR-10.7B-v1.0"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(SOLAR.raw)))
    return folder


def test_a_preset_on_the_command_line(run, solar):
    for preset in ("gptq-int4", "gptq-int8-g32", "bnb-nf4", "BNB_INT8"):
        code, out, err = run("bench", "predict", solar, "-q", preset, "--device", "m2-8c")
        assert code == 0, err
        assert "under transformers" in out
        assert "-ngl" not in out
        assert max(map(len, out.splitlines())) <= 80
    args = ("-q", "bnb-nf4", "--device", "rtx-3060-12gb", "--json")
    code, out, err = run("fit", solar, *args)
    found = json.loads(out)
    assert found["runtime"] == "transformers"
    assert found["fits"] is True
    assert found["offloaded_layers"] == 49
    assert found["tg_tokens_per_s"] is None
    assert "NF4" in found["why_no_speed"]
    assert found["best_preset"] in folder_memory.TORCH_PRESETS
    code, out, _ = run("fit", solar, "-q", "gptq-int4")
    assert "rtx-3060-12gb" in out
    assert "rtx-4060 " not in out
    assert "Metal: GPTQModel" in out


def test_a_folder_on_the_command_line(run, make_checkpoint, tmp_path):
    base = make_checkpoint(**SHAPE)
    folder = bnb_folder(base, tmp_path / "NF4", bnb.NF4)
    code, out, err = run("fit", folder, "--device", "rtx-4060", "--json")
    assert code == 0, err
    assert json.loads(out)["memory"]["weights_bytes"] == read_folder(folder).weights_bytes
    for option in (("-q", "q4_0"), ("--drop", "1")):
        code, _, err = run("fit", folder, "--device", "rtx-4060", *option)
        assert code == 2
        assert "quantized already" in err


def test_groups_that_do_not_divide_a_checkpoint(run, make_checkpoint):
    base = make_checkpoint()  # 64 and 96 inputs
    code, _, err = run("fit", base, "-q", "gptq-int4", "--device", "rtx-4060")
    assert code == 2
    assert "groups of 128 do not divide its 64 inputs; choose" in err
    code, out, err = run("fit", base, "-q", "gptq-int4-g32", "--device", "rtx-4060")
    assert code == 0, err
    assert "best preset that fits whole at this context is bnb-int8" in out


def changed(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    details = config["quantization_config"]
    for key, value in fields.items():
        target = details if key in details else config
        target.pop(key, None)
        if value is not None:
            target[key] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"bits": 5}, "bits is 5"),
        ({"bits": None}, "bits is None"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": 48}, "groups of 48 do not divide its 128 inputs"),
        ({"group_size": 64}, "qzeros has"),
        ({"bits": 8}, "qweight has"),
        ({"quant_method": "awq"}, "quantized by 'awq'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": 1}, "has no place in a LlamaForCausalLM of 1 layers"),
        ({"num_hidden_layers": 4}, "model.layers.3"),
        ({"vocab_size": 500}, "the config means [500, 128]"),
    ],
    ids=str,
)
def test_a_config_that_is_wrong(run, make_checkpoint, tmp_path, fields, said):
    base = make_checkpoint(**SHAPE)
    folder = gptq_folder(base, tmp_path / "out", gptq_format.GPTQSettings(group_size=32))
    changed(folder, **fields)
    with pytest.raises((CheckpointError, UnsupportedError)) as error:
        read_folder(folder)
    assert said in str(error.value)
    code, _, err = run("fit", folder, "--device", "rtx-4060")
    assert code == 3
    assert said in err
    assert err.strip().count("\n") == 0


def test_weights_that_are_damaged(make_checkpoint, tmp_path):
    base = make_checkpoint(**SHAPE)
    folder = bnb_folder(base, tmp_path / "out", bnb.NF4)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for n in (0, 4, 200, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:n])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            read_folder(folder)
    file.write_bytes(whole)
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, file)
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        read_folder(folder)
    save_file(tensors | {name: tensors[name][:-8].clone()}, file)
    with pytest.raises(CheckpointError, match="the config means 16,384"):
        read_folder(folder)
    for bad in ("{", "[]"):
        (folder / "config.json").write_text(bad)
        with pytest.raises(DusEdgeError, match=r"config\.json"):
            read_folder(folder)


def test_exports_go_on_refusing_what_is_quantized(run, make_checkpoint, tmp_path):
    folder = bnb_folder(make_checkpoint(**SHAPE), tmp_path / "NF4", bnb.NF4)
    code, _, err = run("gguf", folder, "-o", tmp_path / "gguf")
    assert code == 3
    assert "already quantized" in err


def test_a_metal_device_is_judged_too():
    v = fit.judge(model_of_bnb_config(SOLAR, "int8"), find_device("m1-8c"), RunSettings())
    assert not v.fits
    assert v.use.overhead_bytes == 0
    assert "float32" in v.note
