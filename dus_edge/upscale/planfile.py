"""A plan given as a file: which layers, and how the copies are made.

TOML or JSON with the options' own names::

    plan = "0:24,8:32"      # or a list, or one of: block = "8:22", drop = 8, layers = 48
    place = "interleaved"
    method = "averaged"
    branch_scale = 0.5
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dus_edge.errors import UsageError
from dus_edge.jsonfile import parse_strict, read_regular
from dus_edge.upscale import plan as plans
from dus_edge.upscale.methods import COPY, Method, parse_scale
from dus_edge.upscale.plan import DepthPlan

ENDINGS = (".json", ".toml")
STACKED, INTERLEAVED = "stacked", "interleaved"
PLACES = (STACKED, INTERLEAVED)
#: Bytes of a plan's file at most: a plan of the deepest model has 40,000.
_MOST = 1 << 20


@dataclass(frozen=True)
class PlanChoice:
    """What is asked for, by the options' names; None or nothing where it is not said.

    Attributes:
        drop: SOLAR's m.
        layers: of the result.
        plan: ranges, applied one after the other.
        block: blocks that run twice, the same way.
        place: one of `PLACES`.
        method: one of `methods.COPY_METHODS`.
        branch_scale: what branches of copies are multiplied by.
    """

    drop: int | None = None
    layers: int | None = None
    plan: tuple[str, ...] = ()
    block: tuple[str, ...] = ()
    place: str | None = None
    method: str | None = None
    branch_scale: float | None = None

    def __post_init__(self) -> None:
        if self.place not in (None, *PLACES):
            raise UsageError(f"--place {self.place!r}: choose {' or '.join(PLACES)}.")
        self.making()

    @property
    def given(self) -> dict[str, Any]:
        """What is said."""
        said = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in said.items() if value is not None and value != ()}

    def making(self) -> Method:
        """How copies are made."""
        scale = 1.0 if self.branch_scale is None else self.branch_scale
        return Method(COPY if self.method is None else self.method, scale)

    def depth_plan(self, n: int, upscale: bool) -> DepthPlan:
        """The plan for a base of n layers.

        Raises:
            UsageError: two ways of saying it, a value that does not fit, or no copies to change.
        """
        found = plans.choose(
            n,
            drop=self.drop,
            layers=self.layers,
            plans=self.plan,
            blocks=self.block,
            upscale=upscale,
        )
        if self.place == INTERLEAVED:
            if not found.copies:
                raise UsageError(
                    f"--place interleaved is for copies, and the plan {found.spelled} has none."
                )
            found = found.interleaved()
        return found.with_method(self.making())


def with_files(asked: PlanChoice) -> PlanChoice:
    """What is asked for, with what a plan's file says where `plan` names one.

    Raises:
        UsageError: the file cannot be used, or the two say the same thing.
    """
    files = [text for text in asked.plan if text.endswith(ENDINGS)]
    if not files:
        return asked
    if len(asked.plan) > 1:
        raise UsageError(f"--plan {files[0]} is a whole plan; give no other --plan beside it.")
    said = read_plan_file(Path(files[0]))
    asked = replace(asked, plan=())
    if both := said.given.keys() & asked.given.keys():
        option = min(both).replace("_", "-")
        raise UsageError(f"{files[0]} and --{option} say the same thing; give one of them.")
    return replace(said, **asked.given)


def read_plan_file(path: Path) -> PlanChoice:
    """The plan that a file says.

    Raises:
        UsageError: it is missing, neither TOML nor JSON, or an entry is unknown or of no use.
    """
    try:
        text = read_regular(path, _MOST).decode("utf-8")
        raw = tomllib.loads(text) if path.suffix == ".toml" else parse_strict(text)
    except FileNotFoundError:
        raise UsageError(f"--plan {path}: there is no such file.") from None
    except (OSError, ValueError, RecursionError) as e:
        raise UsageError(f"--plan {path}: the file cannot be read ({e}).") from None
    if not isinstance(raw, dict):
        raise UsageError(f'--plan {path}: the file holds no table such as {{"plan": "0:24,8:32"}}.')
    known = [f.name for f in fields(PlanChoice)]
    if unknown := [key for key in raw if key not in known]:
        raise UsageError(
            f"--plan {path}: the entry {unknown[0]!r} is not known; there are {', '.join(known)}."
        )
    try:
        return PlanChoice(**_checked(raw))
    except UsageError as e:
        raise UsageError(f"--plan {path}: {e}") from None


def _checked(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of the types that `PlanChoice` wants."""
    found = dict(raw)
    for key in ("plan", "block"):
        if key in raw:
            texts = raw[key] if isinstance(raw[key], list) else [raw[key]]
            if not texts or not all(isinstance(t, str) and not t.endswith(ENDINGS) for t in texts):
                raise UsageError(f'{key} is {raw[key]!r}; ranges such as "0:24,8:32" are needed.')
            found[key] = tuple(texts)
    for key in ("drop", "layers"):
        if key in raw and (isinstance(raw[key], bool) or not isinstance(raw[key], int)):
            raise UsageError(f"{key} is {raw[key]!r}; a whole number is needed.")
    if "branch_scale" in raw:
        found["branch_scale"] = parse_scale(raw["branch_scale"])
    return found
