"""What `dus-edge eval` says: a Markdown page that is read as it is, and its files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dus_edge.eval.paired import (
    ComparedScore,
    MeanScore,
    ModelSummary,
    n_comparisons,
    summarize_models,
)
from dus_edge.eval.results import EvalResults, EvaluatedModel
from dus_edge.eval.suites import load_suite, suite_names
from dus_edge.files import check_absent, check_writable, output_files, pwrite_all
from dus_edge.quality.names import short_names
from dus_edge.quality.plot import check_plots
from dus_edge.tables.evaluation_json import evaluation_json
from dus_edge.tables.evaluation_plot import render_evaluation
from dus_edge.words import (
    WIDTH,
    aligned_table,
    cut_middle,
    format_bytes,
    format_time,
    wrap,
)

_AVERAGE = "average"
_NAME_WIDTH = 26
_CLEAR = 0.05


# -- files ----------------------------------------------------------------------------------------


def evaluation_paths(folder: Path, *, plots: bool) -> list[Path]:
    """The files that `write_evaluation` makes."""
    suffixes = ("md", "json", "png", "svg") if plots else ("md", "json")
    return [folder / f"eval.{suffix}" for suffix in suffixes]


def check_evaluation_outputs(folder: Path, *, plots: bool, overwrite: bool = False) -> None:
    """See that `write_evaluation` will work, before hours of evaluating.

    Raises:
        OutputError: a file exists, or the folder cannot be written.
        DependencyError: plots are wanted and matplotlib is not installed.
    """
    check_absent(evaluation_paths(folder, plots=plots), overwrite)
    check_writable(folder)
    if plots:
        check_plots()


def write_evaluation(
    results: EvalResults, folder: Path, *, plots: bool, overwrite: bool = False
) -> list[Path]:
    """Write the page, the JSON and the plots, all or nothing; returns their paths.

    Raises:
        OutputError: one exists, or cannot be written.
        DependencyError: plots are wanted and matplotlib is not installed.
    """
    check_evaluation_outputs(folder, plots=plots, overwrite=overwrite)
    paths = evaluation_paths(folder, plots=plots)
    names, titles = model_names(results), group_titles(results)
    summaries = summarize_models(results.models, results.groups)
    table = evaluation_json(results, summaries, names, titles)
    data = [
        evaluation_page(results, summaries).encode(),
        (json.dumps(table, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode(),
    ]
    data += [
        render_evaluation(results, summaries, names, titles, path.suffix[1:]) for path in paths[2:]
    ]
    sizes = [(path, len(blob)) for path, blob in zip(paths, data, strict=True)]
    with output_files(sizes) as fds:
        for fd, blob in zip(fds, data, strict=True):
            pwrite_all(fd, blob, 0)
    return paths


def evaluation_table(results: EvalResults) -> dict[str, Any]:
    """What ``eval.json`` holds."""
    summaries = summarize_models(results.models, results.groups)
    return evaluation_json(results, summaries, model_names(results), group_titles(results))


# -- names ----------------------------------------------------------------------------------------


def model_names(results: EvalResults) -> list[str]:
    """Short names of the models, each another one."""
    names = [m.info.name for m in results.models]
    short = short_names(names) if len(names) > 1 else names
    seen: Counter[str] = Counter()
    found = []
    for name in short:
        seen[name] += 1
        found.append(f"{name} ({seen[name]})" if seen[name] > 1 else name)
    return found


def group_titles(results: EvalResults) -> dict[str, str]:
    """What people call the groups: by the suite, or the harness's names."""
    known = load_suite(results.suite).titles if results.suite in suite_names() else {}
    return {name: known.get(name, name) for name in results.groups}


# -- the page -------------------------------------------------------------------------------------


def evaluation_page(results: EvalResults, summaries: Sequence[ModelSummary] | None = None) -> str:
    """Tables of scores and of differences to the reference, no line over 80 columns.

    Args:
        results: of one model or more.
        summaries: of `summarize_models`; None to have them computed.
    """
    summaries = summaries or summarize_models(results.models, results.groups)
    names, titles = model_names(results), group_titles(results)
    parts = ["# Evaluation", _about(results, names, titles), _models_table(results, names)]
    parts += [
        _paragraph(
            f"{name}: {m.n_cut:,} prompts are longer than its context of "
            f"{m.info.context_length:,} tokens, and were asked without their beginning."
        )
        for name, m in zip(names, results.models, strict=True)
        if m.n_cut
    ]
    parts += ["## Scores", _paragraph(f"{_drawn(results)} Per cent ± one standard error.")]
    parts += _scores(results, summaries, names, titles)
    if languages := summaries[0].by_language:
        text = f"{_drawn(results)} Averages of the tasks of each language, per cent."
        parts += ["## By language", _paragraph(text)]
        columns = {k: [_score(s.by_language[k]) for s in summaries] for k in languages}
        parts += _tables("model", names, columns)
    if len(results.models) > 1:
        parts += _differences(results, summaries, names, titles)
    parts += _published(results, titles)
    return "\n\n".join(parts) + "\n"


def _about(results: EvalResults, names: Sequence[str], titles: Mapping[str, str]) -> str:
    suite = load_suite(results.suite).title if results.suite in suite_names() else results.suite
    engines = dict.fromkeys(m.engine for m in results.models)
    if len(engines) == 1:
        ran = f"Run by {next(iter(engines))}."
    else:
        by = [(n, m.engine) for n, m in zip(names, results.models, strict=True)]
        ran = "Run by " + "; ".join(
            f"{e} ({', '.join(n for n, own in by if own == e)})" for e in engines
        )
        ran += "."
    text = (
        f"{suite}. Tasks, prompts and metrics are those of {results.harness}. {ran} "
        f"{_asked(results, titles)}"
    )
    return _paragraph(text)


def _asked(results: EvalResults, titles: Mapping[str, str]) -> str:
    """How many documents of how many, shots and metric of each group."""
    found = []
    for name in results.groups:
        tasks = [t for t in results.models[0].tasks if t.group == name]
        n = sum(len(t.values) for t in tasks)
        counts = [t.n_available for t in tasks]
        known = sum(c for c in counts if c is not None) if None not in counts else n
        of = f" of {known:,}" if known != n else ""
        several = f" in {len(tasks)} tasks" if len(tasks) > 1 else ""
        shots = "/".join(dict.fromkeys(str(t.n_shots) for t in tasks))
        metric = "/".join(dict.fromkeys(t.metric for t in tasks))
        found.append(f"{titles[name]} {n:,}{of}{several} ({shots} shots, {metric})")
    return f"Documents: {'; '.join(found)}."


def _drawn(results: EvalResults) -> str:
    if results.n_docs is None:
        return "All documents of each task."
    counts = {
        sum(len(t.values) for t in m.tasks if t.group == group)
        for m in results.models
        for group in results.groups
    }
    most = "" if counts == {results.n_docs} else "At most "
    n = "1 document" if results.n_docs == 1 else f"{results.n_docs:,} documents"
    return f"{most}{n} of each task, drawn with seed {results.seed}."


def _models_table(results: EvalResults, names: Sequence[str]) -> str:
    def row(name: str, m: EvaluatedModel) -> list[str]:
        size, bits = format_bytes(m.info.n_bytes), f"{m.info.bits_per_weight:.2f}"
        return [name, size, bits, f"{m.tokens:,}", format_time(m.seconds)]

    rows = [row(name, m) for name, m in zip(names, results.models, strict=True)]
    if len(rows) > 1:
        rows[0][0] += " (reference)"
    return aligned_table(["model", "size", "bits/weight", "tokens computed", "time"], rows)


def _scores(
    results: EvalResults,
    summaries: Sequence[ModelSummary],
    names: Sequence[str],
    titles: Mapping[str, str],
) -> list[str]:
    columns = {}
    if len(results.groups) > 1:
        columns[_AVERAGE] = [_score(s.average) for s in summaries]
    for name in results.groups:
        columns[titles[name]] = [_score(s.scores[name]) for s in summaries]
    tables = list(_tables("model", names, columns))
    notes = [
        f"{label}, {titles[group]}: {s.note}."
        for label, own in zip(names, summaries, strict=True)
        for group, s in own.scores.items()
        if s.note
    ]
    return [*tables, *map(_paragraph, notes)]


# -- differences ----------------------------------------------------------------------------------


def _differences(
    results: EvalResults,
    summaries: Sequence[ModelSummary],
    names: Sequence[str],
    titles: Mapping[str, str],
) -> list[str]:
    parts = ["## Differences to the reference", _how(results, summaries, names[0])]
    clear = [
        (name, title, c)
        for name, s in zip(names[1:], summaries[1:], strict=True)
        for title, c in _rows_of(s, titles)
        if c.is_clear
    ]
    parts.append(
        "\n".join(_sentence(*found) for found in clear) if clear else _paragraph(_NOTHING_CLEAR)
    )
    for name, s in zip(names[1:], summaries[1:], strict=True):
        parts += [f"### {cut_middle(name, 70)}", _paragraph(f"Minus {names[0]}. {_drawn(results)}")]
        rows = []
        for title, c in _rows_of(s, titles):
            between = "" if c.low is None or c.high is None else _between(c.low, c.high)
            cells = [_points(c.value), between, _p(c.p), _p(c.p_holm) + _mark(c)]
            rows.append([title, f"{c.n:,}", *cells])
        head = ["task", "documents", "points", "95 % interval", "p", "p, Holm"]
        parts.append(aligned_table(head, rows))
        parts += [_paragraph(f"{t}: {c.note}.") for t, c in _rows_of(s, titles) if c.note]
    return parts


_NOTHING_CLEAR = (
    "No difference is clear: every interval includes 0, or the test does not refuse it."
)


def _how(results: EvalResults, summaries: Sequence[ModelSummary], reference: str) -> str:
    n = n_comparisons(summaries)
    text = (
        f"Each document's score is compared with the one that {reference} has for it. p is "
        "two-sided: McNemar's exact test where answers are right or wrong, a paired t otherwise. "
        "Intervals are Tango's for right and wrong, t's otherwise, and the average's are put "
        "together from these. The exact test can be stricter than the interval; a difference is "
        "said to be clear where both agree. "
    )
    if n > 1:
        text += (
            f"{n} comparisons were made, of which about {max(1, round(_CLEAR * n))} would have a p "
            "below 0.05 by chance. Holm's p counts them all together; * marks those below 0.05."
        )
    elif n == 1:
        text += "One comparison was made."
    return _paragraph(text)


def _rows_of(s: ModelSummary, titles: Mapping[str, str]) -> Iterator[tuple[str, ComparedScore]]:
    if s.average_difference is not None:
        yield _AVERAGE, s.average_difference
    for group, c in s.differences.items():
        yield titles[group], c


def _sentence(name: str, title: str, c: ComparedScore) -> str:
    """``Q4_K_M loses 1.2 points of MMLU (95 % interval 0.3 to 2.1).``"""
    assert c.value is not None and c.low is not None and c.high is not None
    verb, sign = ("loses", -1) if c.value < 0 else ("gains", 1)
    low, high = sorted((100 * sign * c.low, 100 * sign * c.high))
    of = "of the average" if title == _AVERAGE else f"of {title}"
    text = (
        f"{name} {verb} {abs(100 * c.value):.1f} points {of} "
        f"(95 % interval {low:.1f} to {high:.1f})."
    )
    if c.p_holm is not None and c.p_holm >= _CLEAR:
        text += " Among all comparisons it could be chance."
    return wrap(text, first="- ", rest="  ", hyphens=False)


# -- others' figures ------------------------------------------------------------------------------


def _published(results: EvalResults, titles: Mapping[str, str]) -> list[str]:
    if not results.published:
        return []
    note = results.published_note or "measured in another way"
    groups = [name for name in results.groups if any(name in p for p in results.published.values())]
    if not groups:
        return []
    columns = {}
    for name, scores in results.published.items():
        cells = [f"{scores[g]:.2f}" if g in scores else "" for g in groups]
        if len(groups) > 1:
            whole = all(g in scores for g in results.groups)
            mean = sum(scores[g] for g in groups) / len(groups) if whole else None
            cells.insert(0, "" if mean is None else f"{mean:.2f}")
        columns[name] = cells
    rows = [titles[g] for g in groups]
    if len(groups) > 1:
        rows.insert(0, _AVERAGE)
    text = f"Per cent, of all documents, as others published them: {note}."
    tables = _tables("task", rows, columns)
    return ["## Published figures", _paragraph(text), *tables]


# -- cells ----------------------------------------------------------------------------------------


def _tables(
    first: str, names: Sequence[str], columns: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    """Rows by columns in as many tables as the width asks for."""
    left = [(cut_middle(head, 20), cells) for head, cells in columns.items()]
    name_width = min(max(len(n) for n in (first, *names)), _NAME_WIDTH)
    while left:
        room, n = WIDTH - name_width - 4, 0
        for head, cells in left:
            if (room := room - max(map(len, (head, *cells))) - 3) < 0:
                break
            n += 1
        now, left = left[: max(n, 1)], left[max(n, 1) :]
        heads, bodies = zip(*now, strict=True)
        rows = [[name, *cells] for name, *cells in zip(names, *bodies, strict=True)]
        yield aligned_table([first, *heads], rows)


def _paragraph(text: str) -> str:
    return wrap(text, hyphens=False)


def _score(s: MeanScore) -> str:
    if s.value is None:
        return "none"
    value, error = 100 * s.value, None if s.error is None else 100 * s.error
    digits = 2 if error is not None and 0 < error < 0.1 else 1
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _points(value: float | None) -> str:
    """With the sign of a minus; 0 has none."""
    if value is None:
        return "none"
    rounded = round(100 * value, 1)
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


def _between(low: float, high: float) -> str:
    return f"{_points(low)} to {_points(high)}"


def _p(p: float | None) -> str:
    if p is None:
        return ""
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.01 else f"{p:.2f}"


def _mark(c: ComparedScore) -> str:
    return " *" if c.p_holm is not None and c.p_holm < _CLEAR else ""
