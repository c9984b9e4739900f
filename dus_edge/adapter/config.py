"""`adapter_config.json` as peft writes it: which modules, which rank and scale, and nothing else.

What would change the arithmetic and is not done here (DoRA, biases, trained tokens and whatever
peft learns later) is refused by the name of its field, never passed over.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dus_edge.checkpoint.names import ADAPTER_CONFIG
from dus_edge.errors import CheckpointError, UnsupportedError
from dus_edge.jsonfile import read_object

#: Fields that say nothing of the weights as they are merged, and those that are read below.
_NEUTRAL = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
        *("lora_dropout", "peft_version", "megatron_core", "qalora_group_size", "runtime_config"),
        *("eva_config", "corda_config", "loftq_config", "lora_ga_config"),
        *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("modules_to_save", "init_lora_weights"),
    )
)
#: Ways to begin training that leave the base's weights as they are; others (PiSSA, OLoRA, CorDA,
#: LoftQ …) take a part out of them, which belongs to no checkpoint.
_INITS = (True, False, "gaussian", "eva")
#: A pattern of a stranger's may not take for ever: one quantifier at most.
_QUANTIFIERS = re.compile(r"[*+?{]")
_LONGEST_PATTERN = 256
_LARGEST_RANK = 1 << 16


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter says of itself, checked.

    Attributes:
        where: the file, for messages.
        r: rank of a module that no pattern names.
        alpha: numerator of its scale.
        ranks, alphas: other values by pattern, as peft matches them.
        rslora: whether the scale is alpha / √r instead of alpha / r.
        targets: ends of the names of the modules that are adapted; None where the file has a
            regular expression, which is not run.
        excluded: ends of names that are left out.
        layers: indices of the layers that are adapted; None for all.
        saved: ends of the names of modules that are replaced whole.
        base: the base that the adapter was trained on, as it names it; a hint.
    """

    where: str
    r: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool
    targets: tuple[str, ...] | None
    excluded: tuple[str, ...]
    layers: frozenset[int] | None
    saved: tuple[str, ...]
    base: str | None

    def rank(self, module: str) -> int:
        """Columns of B and rows of A of a module."""
        return self.ranks.get(_matching(self.ranks, module) or "", self.r)

    def scale(self, module: str) -> float:
        """What B·A is multiplied by, as peft computes it: in double precision."""
        alpha = self.alphas.get(_matching(self.alphas, module) or "", self.alpha)
        r = self.rank(module)
        return alpha / math.sqrt(r) if self.rslora else alpha / r

    def adapts(self, module: str, layer: int | None) -> bool | None:
        """Whether a module of the base is to be adapted; None where only the weights say."""
        if self.targets is None:
            return None
        if not _ends_with(module, self.targets) or _ends_with(module, self.excluded):
            return False
        # peft matches a full name before it looks at layers.
        return module in self.targets or self.layers is None or layer in self.layers

    def replaces(self, tensor: str) -> bool:
        """Whether a tensor belongs to a module that is saved whole."""
        parts = tensor.split(".")
        return any(_ends_with(".".join(parts[:n]), self.saved) for n in range(1, len(parts)))


def load_adapter_config(folder: Path) -> AdapterConfig:
    """Read and check a folder's `adapter_config.json`.

    Raises:
        CheckpointError: it is missing, no JSON, or a field is absent or absurd.
        UnsupportedError: another kind of adapter than plain LoRA.
    """
    path = folder / ADAPTER_CONFIG
    remedy = "an adapter is a folder with it and adapter_model.safetensors, as peft writes them"
    return parse_adapter_config(read_object(path, missing=remedy), str(path))


def parse_adapter_config(raw: Mapping[str, Any], where: str = ADAPTER_CONFIG) -> AdapterConfig:
    """Turn the JSON into an `AdapterConfig`; see `load_adapter_config` for errors."""
    _check_kind(raw, where)
    read = _Reader(raw, where)
    targets, excluded = read.names("target_modules"), read.names("exclude_modules") or ()
    if targets == () and not read.names("modules_to_save"):
        raise CheckpointError(f"{where}: target_modules names no module.")
    if isinstance(excluded, str):
        targets, excluded = "", ()
    base = raw.get("base_model_name_or_path")
    return AdapterConfig(
        where,
        r=read.rank(raw.get("r"), "r"),
        alpha=read.alpha(raw.get("lora_alpha"), "lora_alpha"),
        ranks={k: read.rank(v, "rank_pattern") for k, v in read.patterns("rank_pattern")},
        alphas={k: read.alpha(v, "alpha_pattern") for k, v in read.patterns("alpha_pattern")},
        rslora=read.flag("use_rslora"),
        targets=None if isinstance(targets, str) else targets,
        excluded=excluded,
        layers=read.layers(),
        saved=read.list_of_names("modules_to_save"),
        base=base if isinstance(base, str) and base else None,
    )


def _check_kind(raw: Mapping[str, Any], where: str) -> None:
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(
            f"{where}: peft_type is {kind!r}; only LORA is merged here, merge others with peft's "
            "merge_and_unload."
        )
    if raw.get("bias", "none") != "none":
        raise UnsupportedError(
            f"{where}: bias is {raw['bias']!r}; trained biases are not merged here, merge it with "
            "peft's merge_and_unload."
        )
    init = raw.get("init_lora_weights", True)
    if not any(init is known or (isinstance(init, str) and init == known) for known in _INITS):
        raise UnsupportedError(
            f"{where}: init_lora_weights is {init!r}, which changes the base's own weights; "
            "convert the adapter to plain LoRA with peft's save_pretrained "
            "(path_initial_model_for_weight_conversion)."
        )
    for field, value in raw.items():
        if field not in _NEUTRAL and value not in (None, False, 0, "", [], {}):
            raise UnsupportedError(
                f"{where}: {field} is {str(value)[:40]!r}, which is not merged here; merge the "
                "adapter with peft's merge_and_unload."
            )
    if raw.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
        raise UnsupportedError(f"{where}: layers_pattern is {raw['layers_pattern']!r}, not layers.")


@dataclass(frozen=True)
class _Reader:
    """Reads checked fields; `where` names the file in messages."""

    raw: Mapping[str, Any]
    where: str

    def names(self, field: str) -> tuple[str, ...] | str | None:
        """A list of names, or a string: a regular expression."""
        value = self.raw.get(field)
        if isinstance(value, str) and value:
            return value
        if field == "target_modules" and value is None:
            raise CheckpointError(f"{self.where}: the field {field} is missing.")
        return self.list_of_names(field)

    def list_of_names(self, field: str) -> tuple[str, ...]:
        value = self.raw.get(field) or []
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            raise CheckpointError(f"{self.where}: {field} is no list of names of modules.")
        return tuple(value)

    def rank(self, value: object, field: str) -> int:
        if type(value) is not int or not 1 <= value <= _LARGEST_RANK:
            raise CheckpointError(
                f"{self.where}: {field} says {value!r}; a positive whole number is needed."
            )
        return value

    def alpha(self, value: object, field: str) -> float:
        if type(value) not in (int, float) or not abs(value) < 1e9:  # type: ignore[arg-type]
            raise CheckpointError(f"{self.where}: {field} says {value!r}; a number is needed.")
        return value  # type: ignore[return-value]

    def flag(self, field: str) -> bool:
        value = self.raw.get(field)
        if value is not None and not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {field} is {value!r}, not true or false.")
        return bool(value)

    def layers(self) -> frozenset[int] | None:
        value = self.raw.get("layers_to_transform")
        if value is None or value == []:
            return None
        items = value if isinstance(value, list) else [value]
        if not all(type(i) is int and i >= 0 for i in items):
            raise CheckpointError(f"{self.where}: layers_to_transform is no list of layers.")
        return frozenset(items)

    def patterns(self, field: str) -> Iterable[tuple[str, Any]]:
        value = self.raw.get(field) or {}
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.where}: {field} is no JSON object.")
        for pattern in value:
            if len(pattern) > _LONGEST_PATTERN or len(_QUANTIFIERS.findall(pattern)) > 1:
                raise UnsupportedError(
                    f"{self.where}: {field} has the pattern {pattern[:40]!r}, which is too "
                    "involved to be run safely; write the names of the modules out."
                )
            try:
                re.compile(pattern)
            except re.error as e:
                raise CheckpointError(
                    f"{self.where}: {field} has {pattern[:40]!r}, which is no pattern ({e})."
                ) from None
        return value.items()


def _matching(patterns: Iterable[str], module: str) -> str | None:
    """The first pattern that peft would take for a module (`peft.utils.other.get_pattern_key`)."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), None)


def _ends_with(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)
