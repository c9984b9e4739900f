"""The entries of a family's TOML as records; `family` says where each stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dus_edge.families.shape import Shape


@dataclass(frozen=True)
class FieldRule:
    """Where config.json keeps a field.

    Attributes:
        key: config.json's; None where it has none, and the default holds for all models.
        default: where the key is absent or null; None if it may not be. See `family`.
        optional: whether a null means that there is none (and absence means the default).
        only_if: key of config.json that must be true for there to be one.
        power: what a number of config.json is raised to.
    """

    key: str | None
    default: int | float | bool | str | None = None
    optional: bool = False
    only_if: str | None = None
    power: float = 1.0


@dataclass(frozen=True)
class TensorRule:
    """One tensor, or one of every layer.

    Attributes:
        role: what it does: ``q``, ``down``, ``final_norm``, …
        hf: transformers' name without ``.weight``; ``{i}`` is the layer.
        gguf: llama.cpp's, the same way.
        shape: fields or properties of `Shape`, outermost first.
        bias: flag of the configuration that gives it a bias; None if there never is one.
        unless: flag that leaves it out.
        rope_heads: field with the number of heads whose rows are reordered; None for none.
        site: of a linear layer, the point of the forward pass where its inputs are seen; tensors
            of one site share their inputs. Exactly these matrices are what GPTQ and bitsandbytes
            quantize.
    """

    role: str
    hf: str
    gguf: str
    shape: tuple[str, ...]
    bias: str | None = None
    unless: str | None = None
    rope_heads: str | None = None
    site: str | None = None

    @property
    def per_layer(self) -> bool:
        """Whether every layer has one."""
        return "{i}" in self.hf


@dataclass(frozen=True)
class GGUFKey:
    """One entry of GGUF's metadata; it is not written where its value is None.

    Attributes:
        key: without the architecture before it.
        value: field or property of the configuration, ``rope_theta``, ``rope_theta_local`` or
            ``rope_scaling``.
        type: ``u32``, ``f32`` or ``bools``, one a layer.
        if_given: key of config.json without which the entry is not written.
    """

    key: str
    value: str
    type: str = "u32"
    if_given: str | None = None


@dataclass(frozen=True)
class DepthRule:
    """A depth at which llama.cpp takes the model for one of its own.

    Attributes:
        n_layers: the depth.
        llama_cpp_type: what it is taken for, such as ``70B``.
        grouped_queries: only for models with, or without, grouped queries; None for all.
        query_width: quotient of two sizes whose root llama.cpp divides attention's scores by then;
            None for the same as at other depths.
    """

    n_layers: int
    llama_cpp_type: str
    grouped_queries: bool | None = None
    query_width: str | None = None

    def holds(self, shape: Shape) -> bool:
        """Whether a model of that shape is taken so."""
        grouped = self.grouped_queries
        return shape.n_layers == self.n_layers and grouped in (None, shape.grouped_queries)


@dataclass(frozen=True)
class LayerPattern:
    """Which layers are of a kind of their own, such as those without a window.

    Attributes:
        list: key of config.json with one entry a layer, where it is there.
        entries: the entry of a layer of this kind, and that of all others.
        every: without that list, each so-many-th layer is of this kind.
        every_key: key of config.json with that number.
        until: without that list, key of config.json with the first layer that is not.
        until_default: where that key is absent.
        llama_cpp_every: what llama.cpp goes by, whatever a file says; None where it is told.
    """

    list: str
    entries: tuple[Any, Any]
    every: int | None = None
    every_key: str | None = None
    until: str | None = None
    until_default: int = 0
    llama_cpp_every: int | None = None

    def derived(self, raw: Mapping[str, Any], n_layers: int) -> tuple[bool, ...]:
        """Whether each layer is of this kind, by the rule that holds without a list."""
        if self.until is not None:
            first = raw.get(self.until, self.until_default)
            return tuple(i < first for i in range(n_layers))
        every = (self.every_key and raw.get(self.every_key)) or self.every
        return each(every, n_layers)

    def of(self, raw: Mapping[str, Any], n_layers: int) -> tuple[bool, ...]:
        """Whether each layer is of this kind."""
        said = raw.get(self.list)
        if isinstance(said, list):
            return tuple(entry == self.entries[0] for entry in said)
        return self.derived(raw, n_layers)

    def as_list(self, members: tuple[bool, ...]) -> list[Any]:
        """The list of config.json that says so."""
        return [self.entries[0 if member else 1] for member in members]


def each(every: int | None, n_layers: int) -> tuple[bool, ...]:
    """Each so-many-th layer of n; None for no layer."""
    return tuple(every is not None and (i + 1) % every == 0 for i in range(n_layers))
