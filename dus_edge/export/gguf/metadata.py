"""The metadata of an exported GGUF, as llama.cpp's own converter writes it, plus the plan.

Keys and their order follow `conversion/base.py` (`TextModel.set_gguf_parameters`),
`conversion/llama.py` and `gguf-py/gguf/metadata.py` of llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import gguf
from gguf import GGUFValueType as Kind

from dus_edge import __version__
from dus_edge.checkpoint.card import languages, read_base_models, tags
from dus_edge.checkpoint.config import ModelConfig
from dus_edge.checkpoint.gguf.origin import MIX_PREFIX
from dus_edge.checkpoint.gguf.rope import longrope_scale
from dus_edge.checkpoint.spec import Source
from dus_edge.errors import UnsupportedError
from dus_edge.export.gguf.format import KeyValue
from dus_edge.export.vocab.vocab import Vocab, vocab_metadata
from dus_edge.families.rules import each
from dus_edge.jsonfile import find_object
from dus_edge.quant.recipe import Preset
from dus_edge.upscale.methods import COPY
from dus_edge.upscale.naming import ModelName
from dus_edge.upscale.plan import DepthPlan

#: generation_config.json's fields that llama.cpp reads as suggested sampling.
_SAMPLING = (
    ("top_k", "general.sampling.top_k", Kind.INT32),
    ("top_p", "general.sampling.top_p", Kind.FLOAT32),
    ("min_p", "general.sampling.min_p", Kind.FLOAT32),
    ("temperature", "general.sampling.temp", Kind.FLOAT32),
    ("repetition_penalty", "general.sampling.penalty_repeat", Kind.FLOAT32),
)


def build_metadata(
    config: ModelConfig,
    source: Source,
    name: ModelName,
    plan: DepthPlan,
    vocab: Vocab,
    adapter: str | None = None,
) -> list[KeyValue]:
    """All entries that do not depend on the preset; `with_file_type` adds the rest.

    Args:
        config: of the model to be written.
        source: where it comes from.
        name: what it is called.
        plan: which of the base's layers stand where.
        vocab: the tokenizer.
        adapter: name of the adapter that was merged into the up-scaled model, if one was.
    """
    return [
        *_general(config, source, name, plan, adapter, phi3=vocab.strips_as_phi3),
        *_hyperparameters(config),
        *plan_metadata(source, plan),
        *vocab_metadata(vocab),
    ]


def check_layers(config: ModelConfig, where: str) -> None:
    """See that layers are what llama.cpp takes them for where a file cannot tell it.

    Args:
        config: of the base; plans keep the pattern (`upscale.plan.check_pattern`).
        where: names its file in messages.

    Raises:
        UnsupportedError: they are not.
    """
    members = {"full": config.full_layers, "no_rope": config.no_rope_layers}
    if config.sliding_window is None:
        del members["full"]
    for kind, found in members.items():
        pattern = config.family.patterns.get(kind)
        every = pattern.llama_cpp_every if pattern else None
        if pattern and every and found != each(every, config.n_layers):
            raise UnsupportedError(
                f"{where}: {pattern.list} does not make each layer number {every}, {2 * every}, … "
                f"a {pattern.entries[0]!r}, which llama.cpp takes for granted in a "
                f"{config.architecture}; export it with dus-edge upscale, gptq or bnb."
            )


def with_file_type(metadata: list[KeyValue], preset: Preset) -> list[KeyValue]:
    """Add what depends on the preset.

    `llama_model_quantize` sets these two anew, which moves them to the end; they stand there from
    the start so that its output and ours are the same bytes.
    """
    return [
        *metadata,
        *_mix_metadata(preset),
        KeyValue("general.quantization_version", gguf.GGML_QUANT_VERSION, Kind.UINT32),
        KeyValue("general.file_type", preset.file_type, Kind.UINT32),
    ]


def _mix_metadata(preset: Preset) -> Iterator[KeyValue]:
    """Where the types of a mix come from; nothing of a preset."""
    kinds = {str: Kind.STRING, int: Kind.UINT32, float: Kind.FLOAT32}
    for key, value in preset.said.items():
        yield KeyValue(f"{MIX_PREFIX}{key}", value, kinds[type(value)])


def _text(key: str, value: str) -> KeyValue:
    return KeyValue(key, value, Kind.STRING)


def _u32(key: str, value: int) -> KeyValue:
    return KeyValue(key, value, Kind.UINT32)


def _f32(key: str, value: float) -> KeyValue:
    return KeyValue(key, value, Kind.FLOAT32)


def general_name(title: str, phi3: bool) -> str:
    """``general.name``: the title, spelled as llama.cpp looks for it where it must know a Phi-3.

    Args:
        title: of the model.
        phi3: whether its added tokens swallow blanks, which llama.cpp knows by the name alone.
    """
    return re.sub(r"\b(phi) (3)", r"\1-\2", title, flags=re.IGNORECASE) if phi3 else title


def _general(
    config: ModelConfig,
    source: Source,
    name: ModelName,
    plan: DepthPlan,
    adapter: str | None,
    *,
    phi3: bool,
) -> Iterator[KeyValue]:
    yield _text("general.architecture", config.family.gguf_architecture)
    yield _text("general.type", "model")
    generation = find_object(source.folder / "generation_config.json") or {}
    for field, key, kind in _SAMPLING:
        value = generation.get(field)
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9:
            yield KeyValue(key, int(value) if kind is Kind.INT32 else float(value), kind)
    yield _text("general.name", general_name(name.title, phi3))
    yield _text("general.version", name.version)
    if name.finetune:
        yield _text("general.finetune", name.finetune)
    yield _text("general.basename", name.base)
    if not plan.is_identity:
        yield _text("general.description", upscaled_description(source, plan, adapter))
    yield _text("general.size_label", name.size)
    if source.licence:
        yield _text("general.license", source.licence)
    yield from base_model_metadata(source, plan)
    labels = [t for t in tags(source.folder) if t != "depth-up-scaling"]
    if not plan.is_identity:
        labels.append("depth-up-scaling")
    if labels:
        yield KeyValue("general.tags", labels, Kind.ARRAY, Kind.STRING)
    if spoken := languages(source.folder):
        yield KeyValue("general.languages", spoken, Kind.ARRAY, Kind.STRING)


def upscaled_description(source: Source, plan: DepthPlan, adapter: str | None) -> str:
    """What was done to a base; `adapter` is the name of one merged into the result."""
    then = f"with the adapter {adapter} merged into it" if adapter else "not trained further"
    changed = plan.method.sentence
    copies = f" Copies: {changed}." if changed else ""
    return (
        f"{source.name} up-scaled in depth from {plan.n_base} to {plan.depth} layers "
        f"({plan.spelled}), {then}.{copies}"
    )


def base_model_metadata(source: Source, plan: DepthPlan) -> Iterator[KeyValue]:
    """The source itself if it was up-scaled; else what the source's card names."""
    itself = [source.repo_id or source.name]
    names = read_base_models(source.folder) if plan.is_identity else itself
    if not names:
        return
    yield _u32("general.base_model.count", len(names))
    for i, full in enumerate(names):
        organization, slash, short = full.rpartition("/")
        yield _text(f"general.base_model.{i}.name", short)
        if slash:
            yield _text(f"general.base_model.{i}.organization", organization)
            yield _text(f"general.base_model.{i}.repo_url", f"https://huggingface.co/{full}")


def _hyperparameters(config: ModelConfig) -> Iterator[KeyValue]:
    """The keys that the family names, in its order."""
    kinds = {"u32": Kind.UINT32, "f32": Kind.FLOAT32}
    thetas = {"rope_theta": config.rope.theta, "rope_theta_local": config.rope.theta_local}
    for entry in config.family.gguf_keys:
        if entry.if_given and config.raw.get(entry.if_given) is None:
            continue
        if entry.value == "rope_scaling":
            yield from _rope_scaling(config)
            continue
        value = thetas[entry.value] if entry.value in thetas else getattr(config, entry.value)
        key = f"{config.family.gguf_architecture}.{entry.key}"
        if value is not None and entry.type == "bools":
            yield KeyValue(key, list(value), Kind.ARRAY, Kind.BOOL)
        elif value is not None:
            yield KeyValue(key, value, kinds[entry.type])


def _rope_scaling(config: ModelConfig) -> Iterator[KeyValue]:
    """Linear and YaRN scaling, and what longrope's tensors do not say.

    Llama 3's is a tensor, and `dynamic` starts past the context.
    """
    rope, a = config.rope, f"{config.family.gguf_architecture}.rope.scaling"
    if rope.kind == "longrope":
        original = int(rope.params["original_max_position_embeddings"])
        yield _u32(f"{a}.original_context_length", original)
        yield _f32(f"{a}.attn_factor", _longrope_scale(config, original))
    if rope.kind not in ("linear", "yarn"):
        return
    yield _text(f"{a}.type", rope.kind)
    yield _f32(f"{a}.factor", float(rope.params["factor"]))
    if rope.kind == "linear":
        return
    original = rope.params.get("original_max_position_embeddings") or config.raw.get(
        "original_max_position_embeddings", config.context_length
    )
    yield _u32(f"{a}.original_context_length", int(original))
    for field, key in (
        ("extrapolation_factor", "yarn_ext_factor"),
        ("attention_factor", "yarn_attn_factor"),
        ("beta_fast", "yarn_beta_fast"),
        ("beta_slow", "yarn_beta_slow"),
    ):
        if isinstance(rope.params.get(field), int | float):
            yield _f32(f"{a}.{key}", float(rope.params[field]))


def _longrope_scale(config: ModelConfig, original: int) -> float:
    """What longrope multiplies cosines and sines by: `_compute_longrope_parameters`."""
    if (said := config.rope.params.get("attention_factor")) is not None:
        return float(said)
    factor = config.rope.params.get("factor") or config.context_length / original
    return longrope_scale(factor, original)


def plan_metadata(source: Source, plan: DepthPlan) -> Iterator[KeyValue]:
    """Our own keys, so that a file says how it was made."""
    if plan.is_identity:
        return
    yield _text("dus.version", __version__)
    yield _text("dus.plan", plan.spelled)
    yield _u32("dus.base_block_count", plan.n_base)
    if plan.drop is not None:
        yield _u32("dus.drop", plan.drop)
    yield KeyValue("dus.layer_sources", list(plan.sources), Kind.ARRAY, Kind.INT32)
    if plan.method.kind != COPY:
        yield _text("dus.method", plan.method.kind)
    if plan.method.branch_scale != 1:
        yield _f32("dus.branch_scale", plan.method.branch_scale)
    yield _text("dus.base", source.repo_id or source.name)
    if source.revision:
        yield _text("dus.base_revision", source.revision)
