"""Whether an adapter is one of a model, tensor by tensor; and of which, the base or the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dus_edge.adapter.adapter import Adapter
from dus_edge.checkpoint.config import ModelConfig, tensor_shapes
from dus_edge.checkpoint.safetensors import StoredTensor
from dus_edge.errors import CheckpointError, UnsupportedError, UsageError


def check_fit(adapter: Adapter, config: ModelConfig) -> None:
    """See that an adapter is one of a model: every tensor has its place, and none is missing.

    Raises:
        CheckpointError: it was made for another base; the first tensor that tells is named.
        UnsupportedError: it changes what is not merged here: an embedding by LoRA, a tied head.
    """
    shapes = tensor_shapes(config)
    for module, pair in adapter.added.items():
        shape = _matrix_shape(adapter, config, shapes, module)
        found = pair.b.shape[0], pair.a.shape[1]
        if found != shape:
            raise CheckpointError(
                f"{adapter.path}: the matrices of {module} make one of {list(found)}, but the "
                f"base's is {list(shape)}; {_other_base(adapter)}."
            )
    for name, tensor in adapter.replaced.items():
        _check_replaced(adapter, config, shapes, name, tensor)
    for name, what in _expected(adapter, config, shapes):
        there = adapter.added if what else adapter.replaced
        if name not in there:
            raise CheckpointError(
                f"{adapter.path}: {adapter.config.where.rpartition('/')[2]} means {name} too, and "
                f"there are no weights for it; {_other_base(adapter)}."
            )
    for module in adapter.added:
        layer = (config.family.layer_of(f"{module}.weight") or (None,))[0]
        if adapter.config.adapts(module, layer) is False:
            raise CheckpointError(
                f"{adapter.path} has weights for {module}, which target_modules in "
                f"{adapter.config.where} does not mean; save the adapter again."
            )


def _matrix_shape(
    adapter: Adapter, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], module: str
) -> tuple[int, ...]:
    """The shape of the matrix that a module adapts."""
    name, head = f"{module}.weight", config.family.name("head")
    if config.tied_head and name == head:
        raise UnsupportedError(
            f"{adapter.path}: {module} is adapted, but in this base it is the embedding (tied); "
            "train without it, or merge with peft."
        )
    if name not in shapes:
        raise CheckpointError(
            f"{adapter.path}: {module} has no place in {_described(config)}; "
            f"{_other_base(adapter)}."
        )
    if name != head and not config.family.is_linear(name):
        raise UnsupportedError(
            f"{adapter.path}: {module} is adapted, which is no linear layer; merge the adapter "
            "with peft's merge_and_unload."
        )
    return shapes[name]


def _check_replaced(
    adapter: Adapter,
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    name: str,
    tensor: StoredTensor,
) -> None:
    where = f"{adapter.path}: tensor {name}"
    embedding, head = config.family.name("embedding"), config.family.name("head")
    if config.tied_head and name in (embedding, head):
        raise UnsupportedError(
            f"{where} is saved whole, but in this base embedding and head are one (tied), and peft "
            "would part them; set tie_word_embeddings to false in the base, or merge with peft."
        )
    if name not in shapes:
        raise CheckpointError(
            f"{where} has no place in {_described(config)}; {_other_base(adapter)}."
        )
    if tensor.shape != shapes[name]:
        hint = _other_base(adapter)
        if name in (embedding, head) and tensor.shape[1:] == shapes[name][1:]:
            hint = (
                "tokens were added in training: bring the base to that size first, with "
                "transformers' resize_token_embeddings and save_pretrained"
            )
        raise CheckpointError(
            f"{where} has shape {list(tensor.shape)}, but the base's is {list(shapes[name])}; "
            f"{hint}."
        )
    saved_embedding = name in (embedding, head)  # peft saves these where it thinks they changed
    if not saved_embedding and not adapter.config.replaces(name):
        raise CheckpointError(
            f"{where} is saved whole, and modules_to_save in {adapter.config.where} does not mean "
            "it; save the adapter again."
        )


def _expected(
    adapter: Adapter, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, bool]]:
    """Modules that must be adapted (True), and tensors that must be replaced (False)."""
    for name in shapes:
        module, _, part = name.rpartition(".")
        layer = (config.family.layer_of(name) or (None,))[0]
        if adapter.config.replaces(name):
            yield name, False
        elif part == "weight" and adapter.config.adapts(module, layer):
            yield module, True


def _described(config: ModelConfig) -> str:
    return f"a {config.architecture} of {config.n_layers} layers"


def _other_base(adapter: Adapter) -> str:
    base = adapter.config.base
    return "it was made for another base" + (f", as it says for {base}" if base else "")


def layers_of(adapter: Adapter, config: ModelConfig) -> frozenset[int]:
    """Layers that an adapter changes."""
    names = (*(f"{module}.weight" for module in adapter.added), *adapter.replaced)
    places = map(config.family.layer_of, names)
    return frozenset(place[0] for place in places if place is not None)


def is_for_result(adapter: Adapter, base: ModelConfig, result: ModelConfig) -> bool:
    """Whether an adapter is one of the up-scaled model; if not, it is one of the base.

    Args:
        adapter: what is to be merged.
        base: configuration of the base.
        result: the up-scaled model's; the base's own where nothing is up-scaled.

    Raises:
        CheckpointError: it fits neither; what is said is of the one that it is nearer to.
        UsageError: it fits both, and does not cover all layers of exactly one.
    """
    if result is base:
        check_fit(adapter, base)
        return False
    reasons: dict[bool, CheckpointError] = {}
    for for_result, config in ((False, base), (True, result)):
        try:
            check_fit(adapter, config)
        except CheckpointError as e:
            reasons[for_result] = e
    layers = layers_of(adapter, base)
    if len(reasons) == 2:
        raise reasons[layers == frozenset(range(result.n_layers))]
    if reasons:
        return False in reasons
    whole = [layers == frozenset(range(c.n_layers)) for c in (base, result)]
    if whole[0] == whole[1]:
        raise UsageError(
            f"{adapter.folder} fits the base and the up-scaled model; merge it with dus-edge merge "
            "into the one that it was trained on, and go on from there."
        )
    return whole[1]
