"""What `dus-edge quality` says: a Markdown page, JSON, and a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dus_edge.checkpoint.gguf.origin import Origin
from dus_edge.files import (
    check_absent,
    check_writable,
    output_files,
    pwrite_all,
)
from dus_edge.quality.compare import Results
from dus_edge.quality.frontier import SAME_SIZE, frontier
from dus_edge.quality.names import file_labels, labels
from dus_edge.quality.plot import check_plots, render_plot
from dus_edge.quality.scores import Estimate, Scores
from dus_edge.run.source import SourceInfo
from dus_edge.words import WIDTH, aligned_table, cut_middle, format_bytes, with_error, wrap


def quality_report(results: Results) -> str:
    """Tables of all text and of each language, no line over 80 columns."""
    names = labels(results)
    total = [c.total for c in results.candidates]
    stars = ["*" if on else "" for on in frontier(results)]
    parts = [
        "# Quality against the reference",
        _about(results),
        aligned_table(
            ["file", "size", "bpw", "mean KL", "*"],
            [
                [
                    name,
                    format_bytes(c.info.n_bytes),
                    f"{c.info.bits_per_weight:.2f}",
                    _with_error(c.total.kl),
                    star,
                ]
                for name, c, star in zip(names, results.candidates, stars, strict=True)
            ],
            left=(0, 4),
        ),
        *_files(results, names),
        aligned_table(
            ["file", "perplexity", "change"],
            [
                ["reference", _with_error(total[0].perplexity_reference), ""],
                *(
                    [name, _with_error(s.perplexity), _change(s.log_ratio)]
                    for name, s in zip(names, total, strict=True)
                ),
            ],
        ),
        aligned_table(
            ["file", "99 % KL", "top-1"],
            [
                [name, _number(s.kl_p99), _percent(s.same_top.value)]
                for name, s in zip(names, total, strict=True)
            ],
        ),
    ]
    if len(results.chunks) > 1:
        parts += ["## By language"]
        parts += [t for head, cell in _BY_LANGUAGE for t in _matrix(results, names, head, cell)]
    return "\n\n".join(parts) + "\n"


def quality_json(results: Results) -> dict[str, Any]:
    """The results as JSON takes them; units are in the keys. What is infinite becomes null.

    ``stored_as`` is how a model is stored, in words, ``way`` how the types of a GGUF were chosen,
    and ``origin`` both by parts; they are null where that is not known. ``on_frontier`` stands
    beside the scores that it follows from.
    """
    languages = {k: frontier(results, k) for k in results.chunks}
    return {
        "reference": _info_json(results.reference),
        "text": {
            "n_ctx": results.n_ctx,
            "first_scored": results.first_scored,
            "chunks": results.chunks,
            "sha256": results.digest,
        },
        "candidates": [
            _info_json(c.info)
            | {
                "total": _scores_json(c.total, on),
                "languages": {
                    k: _scores_json(s, languages[k][i]) for k, s in c.by_language.items()
                },
            }
            for i, (c, on) in enumerate(zip(results.candidates, frontier(results), strict=True))
        ],
    }


def output_paths(folder: Path, *, plots: bool) -> list[Path]:
    """The files that `write` makes."""
    suffixes = ("md", "json", "png", "svg") if plots else ("md", "json")
    return [folder / f"quality.{suffix}" for suffix in suffixes]


def check_report_outputs(folder: Path, *, plots: bool, overwrite: bool = False) -> None:
    """See that `write` will work, before hours of measuring.

    Raises:
        OutputError: a file exists, or the folder cannot be written.
        DependencyError: plots are wanted and matplotlib is not installed.
    """
    check_absent(output_paths(folder, plots=plots), overwrite)
    check_writable(folder)
    if plots:
        check_plots()


def write(results: Results, folder: Path, *, plots: bool, overwrite: bool = False) -> list[Path]:
    """Write the page, the JSON and the plots, all or nothing; returns their paths.

    Raises:
        OutputError: one exists, or cannot be written.
        DependencyError: plots are wanted and matplotlib is not installed.
    """
    check_report_outputs(folder, plots=plots, overwrite=overwrite)
    paths = output_paths(folder, plots=plots)
    text = json.dumps(quality_json(results), indent=2, allow_nan=False) + "\n"
    data = [quality_report(results).encode(), text.encode()]
    data += [render_plot(results, path.suffix[1:]) for path in paths[2:]]
    sizes = [(path, len(blob)) for path, blob in zip(paths, data, strict=True)]
    with output_files(sizes) as fds:
        for fd, blob in zip(fds, data, strict=True):
            pwrite_all(fd, blob, 0)
    return paths


# -- Markdown -----------------------------------------------------------------------------------


def _about(results: Results) -> str:
    n_scored = results.n_ctx - 1 - results.first_scored
    n_chunks = sum(results.chunks.values())
    counts = ", ".join(f"{name} {n}" for name, n in results.chunks.items())
    counted = (
        "all positions of each count"
        if results.first_scored == 0
        else "the second half of each counts, as in llama.cpp's perplexity tool"
    )
    reference = results.reference
    text = (
        f"Reference: {reference.name}, {format_bytes(reference.n_bytes)}, "
        f"{reference.bits_per_weight:.2f} bits per weight. Text: {n_chunks} chunks of "
        f"{results.n_ctx} tokens ({counts}); {counted}: {n_chunks * n_scored:,} tokens. KL is "
        "the divergence of the next token's distribution from the reference's in nats, top-1 how "
        "often both put the same token first, change that of the perplexity. ± is one standard "
        "error over chunks. bpw is bits per weight. A star marks the frontier: no file of that "
        f"size, within {100 * SAME_SIZE:g} %, or a smaller one diverges less."
    )
    return wrap(text, hyphens=False)


def _files(results: Results, names: Sequence[str]) -> list[str]:
    """Which file is which, where the tables call it something else."""
    files = file_labels(results)
    if [name.lower() for name in names] == [file.lower() for file in files]:
        return []
    whole = [c.info.name for c in results.candidates]
    lines = [
        f"- {cut_middle(name, 38)}: {f'{folder}/' * (whole.count(c.info.name) > 1)}{c.info.name}"
        for name, c in zip(names, results.candidates, strict=True)
        for folder in [c.info.path.parent.name]
    ]
    return ["Files:", "\n".join(cut_middle(line, WIDTH) for line in lines)]


_BY_LANGUAGE: tuple[tuple[str, Callable[[Scores], str]], ...] = (
    ("Perplexity", lambda s: _number(s.perplexity.value, 5)),
    ("Mean KL, nats", lambda s: _number(s.kl.value)),
    ("99th percentile of KL, nats", lambda s: _number(s.kl_p99)),
    ("Same top-1 token", lambda s: _percent(s.same_top.value)),
)


def _matrix(
    results: Results, names: Sequence[str], head: str, cell: Callable[[Scores], str]
) -> Iterable[str]:
    """One measure, candidates by languages; as many tables as the width asks for."""
    yield f"{head}:"
    languages = list(results.chunks)
    rows = [[cell(c.by_language[language]) for language in languages] for c in results.candidates]
    if head == "Perplexity":
        scores = results.candidates[0].by_language
        rows.insert(0, [_number(scores[k].perplexity_reference.value, 5) for k in languages])
        names = ["reference", *names]
    columns = [[cut_middle(k, 16), *(r[i] for r in rows)] for i, k in enumerate(languages)]
    label_width = min(max(map(len, names)), 30)
    while columns:
        room, n = WIDTH - label_width - 4, 0
        while n < len(columns) and (room := room - max(map(len, columns[n])) - 3) >= 0:
            n += 1
        now, columns = columns[: max(n, 1)], columns[max(n, 1) :]
        head_row, *body = zip(*now, strict=True)
        yield aligned_table(
            ["file", *head_row], [[name, *r] for name, r in zip(names, body, strict=True)]
        )


def _number(x: float, digits: int = 3) -> str:
    return f"{x:#.{digits}g}".rstrip(".")


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _with_error(e: Estimate) -> str:
    """``12.346 ± 0.021``: the error with two digits, the value as far as that."""
    if e.error is None or not math.isfinite(e.value):
        return _number(e.value, 5)
    if e.error == 0:
        return f"{e.value:.5g} ± 0"
    if abs(e.value) < 1e-3:
        power = math.floor(math.log10(max(abs(e.value), e.error)))
        scaled = Estimate(e.value / 10.0**power, e.error / 10.0**power)
        return f"({_with_error(scaled)})e{power}"
    return with_error(e.value, e.error)


def _change(log_ratio: Estimate) -> str:
    """A logarithm of a ratio as a change in percent."""
    if log_ratio.value > math.log(1000):
        return f"× {_number(math.exp(min(log_ratio.value, 700)))}"
    # Adding 0 turns −0 into 0.
    change = round(100 * math.expm1(log_ratio.value), 3) + 0.0
    if log_ratio.error is None:
        return f"{change:+.3f} %"
    return f"{change:+.3f} % ± {100 * math.exp(log_ratio.value) * log_ratio.error:.3f}"


# -- JSON ---------------------------------------------------------------------------------------


def _info_json(info: SourceInfo) -> dict[str, Any]:
    origin = info.origin
    return {
        "name": info.name,
        "path": str(info.path),
        "kind": info.kind,
        "file_bytes": info.n_bytes,
        "n_parameters": info.n_parameters,
        "bits_per_weight": info.bits_per_weight,
        "stored_as": origin.spelled if origin else None,
        "way": origin.way if origin and info.kind == "gguf" else None,
        "origin": _origin_json(origin) if origin else None,
    }


def _origin_json(origin: Origin) -> dict[str, Any]:
    kept, tried = origin.fed or (None, None)
    return {
        "types": origin.types,
        "mix_goal": origin.goal,
        "mix_expected_kl_nats": origin.expected_kl,
        "imatrix": origin.imatrix,
        "feedback_kept": kept,
        "feedback_tried": tried,
    }


def _scores_json(s: Scores, on_frontier: bool) -> dict[str, Any]:
    estimates = {
        "perplexity": s.perplexity,
        "perplexity_reference": s.perplexity_reference,
        "log_ratio_nats": s.log_ratio,
        "kl_nats": s.kl,
        "same_top_share": s.same_top,
    }
    numbers = {"kl_p99_nats": s.kl_p99}
    for key, e in estimates.items():
        numbers |= {key: e.value, f"{key}_error": e.error}
    finite = {k: v if v is not None and math.isfinite(v) else None for k, v in numbers.items()}
    about = {"n_chunks": s.n_chunks, "n_tokens": s.n_tokens}
    return {**about, **finite, "on_frontier": on_frontier}
