"""What a plot of divergence against size is made of, from either kind of results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dus_edge.quality.frontier import on_frontier
from dus_edge.quality.names import short_names
from dus_edge.quality.plot import KIND_STYLES
from dus_edge.tables.frontier.medians import MedianRun, median_runs
from dus_edge.words import format_bytes

#: What is said of models of the benchmark, whose names are those of folders.
_MODELS = {"smollm2-padded": "SmolLM2-135M, padded to whole blocks"}
_LANGUAGES = {
    "en": "English",
    "ko": "Korean",
    "code": "code",
    "reference": "English of Python's reference",
}


@dataclass(frozen=True)
class PlottedFile:
    """A point.

    Attributes:
        name: the file in words.
        label: what stands beside the point; empty for nothing.
        way: how its types were chosen, or its format, for shape and colour.
        n_bytes: of the file.
        kl: mean divergence, nats per token; None if infinite.
        error: one standard error of it; None if not known.
        on_frontier: whether no file as large or smaller diverges less.
    """

    name: str
    label: str
    way: str
    n_bytes: int
    kl: float | None
    error: float | None
    on_frontier: bool

    @property
    def has_place(self) -> bool:
        """Whether a log scale has a place for it."""
        return self.kl is not None and self.kl > 0


@dataclass(frozen=True)
class FrontierPanel:
    """One plot.

    Attributes:
        title: the model and the text.
        about: what was measured on.
        files: the points.
    """

    title: str
    about: str
    files: tuple[PlottedFile, ...]

    @property
    def frontier(self) -> list[PlottedFile]:
        """Those on it, from the smallest on."""
        return sorted((f for f in self.files if f.on_frontier), key=lambda f: f.n_bytes)


def run_panels(lines: Iterable[Mapping[str, Any]]) -> list[FrontierPanel]:
    """A panel for each model and text of the divergence benchmark, real models first.

    Files of a preset are as large as one another, so that the topmost alone has the preset's name.

    Args:
        lines: of `measure.record.read_divergence`.
    """
    groups = sorted(median_runs(lines), key=lambda runs: runs[0].model not in _MODELS)
    return [
        FrontierPanel(
            title=f"{model_words(runs[0].model)}: {language_words(runs[0].text)}",
            about=about_runs(runs),
            files=tuple(_file(run, _highest(runs)) for run in runs),
        )
        for runs in groups
    ]


def quality_panels(results: Iterable[Mapping[str, Any]]) -> list[FrontierPanel]:
    """A panel for each result of `dus-edge quality`, as JSON."""
    return [_quality_panel(result) for result in results]


def model_words(model: str) -> str:
    """A model of the benchmark."""
    return _MODELS.get(model, model)


def language_words(language: str) -> str:
    """A language of texts."""
    return _LANGUAGES.get(language, language)


def about_runs(runs: Sequence[MedianRun]) -> str:
    """Tokens, chunks and seeds of one group of `median_runs`."""
    most = max(run.n_seeds for run in runs)
    seeds = f"medians over up to {most} draws of calibration text" if most > 1 else "one seed"
    first = runs[0]
    return f"{first.n_tokens:,} tokens in {first.n_chunks} chunks; {seeds}"


def quality_frontier(result: Mapping[str, Any], language: str | None = None) -> list[bool]:
    """Which candidates of a result of `dus-edge quality` lie on the frontier.

    Args:
        result: as JSON.
        language: of the text; None for all of it.
    """
    found = result["candidates"]
    scores = [c["total"] if language is None else c["languages"][language] for c in found]
    return on_frontier([c["file_bytes"] for c in found], [s["kl_nats"] for s in scores])


def _highest(runs: Sequence[MedianRun]) -> set[tuple[str, str]]:
    """Of each preset, the way that diverges most."""
    worst = {run.preset: run for run in sorted(runs, key=lambda r: r.kl_nats)}
    return {(run.preset, run.way) for run in worst.values()}


def _file(run: MedianRun, labelled: set[tuple[str, str]]) -> PlottedFile:
    return PlottedFile(
        name=f"{run.preset}, {run.way}",
        label=run.preset if (run.preset, run.way) in labelled else "",
        way=run.way,
        n_bytes=run.file_bytes,
        kl=run.kl_nats,
        error=run.kl_nats_error,
        on_frontier=run.on_frontier,
    )


def _quality_panel(result: Mapping[str, Any]) -> FrontierPanel:
    reference, text, candidates = result["reference"], result["text"], result["candidates"]
    short = short_names([c["name"] for c in (*candidates, reference)])
    stored = [c.get("stored_as") for c in candidates]
    names = [
        said if said and stored.count(said) == 1 else name
        for said, name in zip(stored, short, strict=False)
    ]
    files = tuple(
        PlottedFile(
            name=name,
            label=name,
            way=c.get("way") or _format(c["kind"]),
            n_bytes=c["file_bytes"],
            kl=c["total"]["kl_nats"],
            error=c["total"]["kl_nats_error"],
            on_frontier=on,
        )
        for name, c, on in zip(names, candidates, quality_frontier(result), strict=True)
    )
    languages = ", ".join(language_words(k) for k in text["chunks"])
    n_tokens = candidates[0]["total"]["n_tokens"]
    size = format_bytes(reference["file_bytes"])
    return FrontierPanel(
        f"{reference['name']}: {languages}", f"{n_tokens:,} tokens; the model itself {size}", files
    )


def _format(kind: str) -> str:
    return KIND_STYLES[kind][0] if kind in KIND_STYLES else kind
