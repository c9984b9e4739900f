"""The size of a GGUF file as the budget of a mix, and a mix as a preset that files are made by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dus_edge.checkpoint.config import ModelConfig
from dus_edge.export.gguf.format import padded
from dus_edge.export.gguf.sink import gguf_shapes, model_shape
from dus_edge.export.gguf.tensors import rope_factors
from dus_edge.quant.mix.budget import Budget
from dus_edge.quant.mix.matrices import FixedType, Matrix, fixed_types, nearest_preset
from dus_edge.quant.recipe import Preset, is_matrix, tensor_type
from dus_edge.quant.types import F32, QuantType
from dus_edge.words import format_bytes


def model_matrices(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Matrix, ...]:
    """The matrices of a model that presets quantize, in a file's order.

    Args:
        config: of the model to be written.
        shapes: Hugging Face names and shapes of its tensors.
    """
    family = config.family
    roles = {family.gguf_name(name): family.find(name) for name in shapes}
    return tuple(
        Matrix(name, roles[name][0].role, roles[name][1], math.prod(shape[:-1]), shape[-1])
        for name, shape in gguf_shapes(family, shapes).items()
        if is_matrix(name, shape)
    )


def preset_types(
    preset: Preset, config: ModelConfig, matrices: Sequence[Matrix], has_imatrix: bool = False
) -> dict[str, QuantType]:
    """The type of each matrix under a preset's rules."""
    model = model_shape(config, has_imatrix)
    return {m.name: tensor_type(preset, m.name, (m.n_rows, m.n_cols), model) for m in matrices}


def file_budget(
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    header_bytes: int,
    nbytes: int,
    goal: str,
) -> Budget:
    """What a mix may take of a file.

    Args:
        config: of the model to be written.
        shapes: Hugging Face names and shapes of its tensors.
        header_bytes: of the file's header.
        nbytes: of the whole file.
        goal: what the budget is called.
    """

    def refusal(least: int) -> str:
        return (
            f"No mix of this model is as small as {goal} ({nbytes:,} bytes): the smallest takes "
            f"{least:,} bytes ({format_bytes(least)}); raise the budget, or drop more layers."
        )

    named = gguf_shapes(config.family, shapes)
    named |= {name: factors.shape for name, factors in rope_factors(config).items()}
    plain = sum(
        padded(math.prod(shape) * F32.block_bytes)
        for name, shape in named.items()
        if not is_matrix(name, shape)
    )
    return Budget(
        goal, nbytes, header_bytes + plain, lambda m, kind: padded(m.nbytes(kind)), refusal
    )


def mixed_preset(
    matrices: Sequence[Matrix],
    kinds: Mapping[str, QuantType],
    said: Mapping[str, str | int | float],
    bits_per_weight: float,
) -> Preset:
    """A mix as what files are made by.

    Its name follows the naming convention, in which a type is letters, digits and underscores:
    ``MIX_4_62BPW``.

    Args:
        matrices: of the model.
        kinds: the type of each, by name.
        said: what the file says of the choice.
        bits_per_weight: of the whole file, for the name.
    """
    near = nearest_preset(matrices, kinds)
    name = f"mix_{bits_per_weight:.2f}bpw".replace(".", "_")
    return Preset(name, near.file_type, near.default, dict(kinds), dict(said))


def custom_preset(
    preset: Preset,
    config: ModelConfig,
    matrices: Sequence[Matrix],
    wishes: Sequence[FixedType],
    has_imatrix: bool = False,
) -> Preset:
    """A preset in which some matrices take other types; it says so in its name.

    Raises:
        UsageError: a wish speaks of no matrix.
    """
    kinds = preset_types(preset, config, matrices, has_imatrix)
    kinds |= fixed_types(matrices, wishes)
    goal = f"{preset.name}, {', '.join(w.spelled for w in wishes)}"
    said = {"goal": goal[:400].encode(errors="replace").decode()}
    return Preset(f"{preset.name}_custom", preset.file_type, preset.default, kinds, said)
