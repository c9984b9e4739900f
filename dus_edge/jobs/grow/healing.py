"""A short training of every plan of a sweep, all with the same budget."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dus_edge.jobs.job import quiet
from dus_edge.tables.grow.swept import HealedLosses
from dus_edge.train.recovery.options import HealOptions
from dus_edge.upscale.candidates import Candidate
from dus_edge.upscale.model import Model, Say
from dus_edge.upscale.plan import DepthPlan


@dataclass(frozen=True)
class ShortHealing:
    """The budget of each plan.

    Attributes:
        options: of `heal`, with its first seed.
        n_seeds: seeds from that one on; each draws other text to train on and to measure on.
    """

    options: HealOptions
    n_seeds: int = 1

    @property
    def n_tokens(self) -> int:
        """That a plan is trained on."""
        return self.options.n_steps * self.options.batch * self.options.length


def heal_plans(
    model: Model,
    candidates: Sequence[Candidate],
    healing: ShortHealing,
    folder: Path,
    say: Say,
) -> list[HealedLosses]:
    """Train every plan, and measure it before and after; what is done already is not done again.

    Args:
        model: the base.
        candidates: plans for it.
        healing: the budget.
        folder: where results are kept, and the state of the run that is under way.
        say: takes lines for the user.

    Returns:
        for each plan its held-out losses.

    Raises:
        DusEdgeError: text or options cannot be used, or a loss is no number.
    """
    from dus_edge.train.recovery.data import find_texts

    texts = find_texts(healing.options, say)
    key = json.dumps([texts.digest, healing.options.identity() | {"--seed": 0}], sort_keys=True)
    work = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
    work.mkdir(parents=True, exist_ok=True)
    found = [HealedLosses(healing.n_tokens, (), (), ()) for _ in candidates]
    n_runs = healing.n_seeds * len(candidates)
    for number in range(healing.n_seeds):
        seed = healing.options.seed + number
        options = replace(healing.options, seed=seed)
        with _Runs(model, options, work / f"seed-{seed}", texts) as runs:
            base = runs.untrained()
            for i, candidate in enumerate(candidates):
                before, after = runs.heal(candidate.plan)
                found[i] = found[i].with_seed(base, before, after)
                run = number * len(candidates) + i + 1
                say(
                    f"{run} of {n_runs}: {candidate.label}, held-out loss {before:.4f} → "
                    f"{after:.4f} (base {base:.4f})"
                )
    return found


class _Runs:
    """Runs of one seed: their text is tokenized once, their losses are in ``losses.json``."""

    def __init__(self, model: Model, options: HealOptions, work: Path, texts: object) -> None:
        from dus_edge.calibrate.world import joined_world

        self.model, self.options, self.work, self.texts = model, options, work, texts
        self.base = model.open()
        self._joined = joined_world(options.device)
        self._data: object = None

    def __enter__(self) -> _Runs:
        self._world = self._joined.__enter__()
        self.work.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._joined.__exit__(*error)  # type: ignore[arg-type]

    def untrained(self) -> float:
        """The base's held-out loss."""
        kept = self._known()
        if "base" not in kept:
            kept["base"] = [self._runner("base").untrained("base", self.base).mean]
            self._keep(kept)
        return float(kept["base"][0])

    def heal(self, plan: DepthPlan) -> tuple[float, float]:
        """Held-out losses before and behind the training."""
        what = [list(plan.sources), plan.method.as_json()]
        name = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
        kept = self._known()
        if name not in kept:
            runner = self._runner(name)
            checkpoint = replace(self.model, plan=plan).open()
            said = self.options.identity() | {"plan": plan.spelled, **plan.method.as_json()}
            runner.train("heal", checkpoint, plan, self.options.mode, said, None)
            curve = runner.log.curve("heal")
            kept[name] = [curve.means[0], curve.means[-1]]
            self._keep(kept)
            shutil.rmtree(runner.work, ignore_errors=True)
        before, after = kept[name]
        return float(before), float(after)

    def _runner(self, name: str):  # type: ignore[no-untyped-def]
        from dus_edge.train.recovery.data import prepare_data
        from dus_edge.train.recovery.log import Log
        from dus_edge.train.recovery.run import Runner

        if self._data is None:
            self._data = prepare_data(
                self.model, self.options, self.texts, self.work, self._world, quiet
            )
        work = self.work / name
        work.mkdir(exist_ok=True)
        log = Log(work / "log.jsonl")
        return Runner(self.options, self._data, self._world, work, log, quiet)

    def _known(self) -> dict[str, list[float]]:
        path = self.work / "losses.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return dict(found)

    def _keep(self, kept: dict[str, list[float]]) -> None:
        partial = self.work / "losses.partial"
        partial.write_text(json.dumps(kept), encoding="utf-8")
        partial.replace(self.work / "losses.json")
