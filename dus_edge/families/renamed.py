"""Architectures that are one of the families under other names: `data/renamed.toml`."""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dus_edge.data import read_text
from dus_edge.families.family import load_families, named_architecture

_LAYER = re.compile(r"\.(\d{1,18})\.")


@dataclass(frozen=True)
class RenamedForm:
    """An architecture that is read as another one.

    Attributes:
        architecture: transformers' name of it.
        model_type: config.json's.
        family: name of the family that it is read as.
        keys: config.json's keys there, and the family's.
        defaults: the family's keys where config.json says nothing, if its own default is another.
        left_out: keys that are not carried.
        must: keys that may have one value alone.
        tensors: names without ``.weight`` there, and the family's; ``{i}`` is the layer.
    """

    architecture: str
    model_type: str
    family: str
    keys: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    must: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)

    def config(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """config.json as the family has it.

        Raises:
            ValueError: a key has a value that the family cannot mean; the message says which.
        """
        for key, value in self.must.items():
            if raw.get(key, value) != value:
                raise ValueError(f"{key} is {raw[key]!r}; {value!r} is supported.")
        family = load_families()[self.family]
        told = {self.keys.get(key, key): value for key, value in raw.items()}
        told = {key: value for key, value in told.items() if key not in self.left_out}
        named = {"architectures": [family.architecture], "model_type": family.model_type}
        return {**self.defaults, **told, **named}

    def read_name(self, name: str) -> str:
        """The family's name of a tensor that is stored under the other one."""
        return _renamed(name, self.tensors)

    def stored_name(self, name: str) -> str:
        """The name that the family's tensor is stored under."""
        return _renamed(name, self._stored)

    @functools.cached_property
    def _stored(self) -> dict[str, str]:
        return {ours: theirs for theirs, ours in self.tensors.items()}


def _renamed(name: str, names: Mapping[str, str]) -> str:
    stem, _, part = name.rpartition(".")
    layer = _LAYER.search(stem)
    general = stem if layer is None else f"{stem[: layer.start(1)]}{{i}}{stem[layer.end(1) :]}"
    found = names.get(general)
    if found is None:
        return name
    return f"{found.replace('{i}', layer[1] if layer else '')}.{part}"


@functools.cache
def renamed_forms() -> tuple[RenamedForm, ...]:
    """All of them."""
    return tuple(
        RenamedForm(
            architecture=form["architecture"],
            model_type=form["model_type"],
            family=form["as"],
            keys=form["keys"],
            defaults=form.get("defaults", {}),
            left_out=tuple(form.get("left_out", ())),
            must=form.get("must", {}),
            tensors=form["tensors"],
        )
        for form in tomllib.loads(read_text("renamed.toml"))["form"]
    )


def find_renamed(raw: Mapping[str, Any]) -> RenamedForm | None:
    """The form that a config.json names; None if it is none of them."""
    name = named_architecture(raw)
    for form in renamed_forms():
        if name in (form.architecture, form.model_type):
            return form
    return None
