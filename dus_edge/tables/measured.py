"""The measured half of the tables: kept lines and quality results to Markdown and rows.

Pure functions; `dus_edge.measure.record` reads and checks the files. Nothing here is predicted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from dus_edge.checkpoint.builtin import BUILTIN
from dus_edge.quality.frontier import SAME_SIZE
from dus_edge.tables.frontier.panels import quality_frontier
from dus_edge.words import brief_time, format_bytes, format_count, markdown_table, with_error

Line = Mapping[str, Any]
#: What makes two lines of one machine comparable, beside the engine's release.
_SETTINGS = ("backends", "n_threads", "n_gpu_layers", "flash_attn", "type_k", "type_v")
_FLASH_ATTN = {0: "flash attention off", 1: "flash attention on"}
_QUALITY_HEAD = (
    *("file", "size", "bits/weight", "perplexity", "change", "KL", "KL, 99 %", "same top-1"),
    "frontier",
)
#: Keys of scores that stand in the rows.
SCORE_KEYS = (
    *("n_chunks", "n_tokens", "perplexity", "perplexity_error", "perplexity_reference"),
    *("perplexity_reference_error", "log_ratio_nats", "log_ratio_nats_error", "kl_nats"),
    *("kl_nats_error", "kl_p99_nats", "same_top_share", "same_top_share_error"),
)
#: Keys of measured lines that stand in tables.csv, where lists cannot.
CSV_KEYS = (
    *("cpu", "cores", "memory_bytes", "os", "gpu_info", "engine", "build_commit", "backends"),
    *("n_threads", "model_filename", "model_type", "model_size", "model_n_params", "test"),
    *("avg_ts", "stddev_ts", "peak_memory_bytes", "baseline_memory_bytes", "load_s"),
    *("time_to_first_token_s", "joules_per_token", "python", "dus_edge", "commit", "test_time"),
)


def newest(lines: Iterable[Line]) -> list[Line]:
    """One line for each machine, model, test and settings: the newest, where there are several.

    They stay in the order in which each was measured first. Of lines with the same time the later
    one wins. Releases of engine, system and program are no part of what is compared: a new one
    replaces the old one's figures.
    """
    found: dict[tuple[Any, ...], Line] = {}
    for line in lines:
        model = (_name(line), line["model_type"], line["model_n_params"])
        engine = line["engine"].split(" ")[0]
        key = (*_machine(line), engine, *model, line["test"], *(line[k] for k in _SETTINGS))
        if key not in found or line["test_time"] >= found[key]["test_time"]:
            found[key] = line
    return list(found.values())


def measured_rows(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """Rows of tables.json: the newest lines as they are, with their source."""
    return [{"source": "measured", **line} for line in newest(lines)]


def quality_rows(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of tables.json: one for each candidate and language, and one for all of its text.

    ``language`` is null for all text. Keys are those of `quality.report.quality_json`, flat; the
    reference's have the prefix ``reference_``, the text's ``text_``. ``on_frontier`` is worked out
    here, within one result.
    """
    rows = []
    for result in results:
        frontiers = {k: quality_frontier(result, k) for k in (None, *result["text"]["chunks"])}
        reference, text = result["reference"], result["text"]
        about = {
            "reference_name": reference["name"],
            "reference_file_bytes": reference["file_bytes"],
            "text_n_ctx": text["n_ctx"],
            "text_sha256": text["sha256"],
        }
        for i, c in enumerate(result["candidates"]):
            model = {k: c[k] for k in ("name", "kind", "file_bytes", "n_parameters")}
            model["bits_per_weight"] = c["bits_per_weight"]
            model |= {k: c.get(k) for k in ("stored_as", "way")}
            scores = {None: c["total"]} | {k: c["languages"][k] for k in text["chunks"]}
            for language, s in scores.items():
                found = {"language": language} | {k: s[k] for k in SCORE_KEYS}
                found["on_frontier"] = frontiers[language][i]
                rows.append({"source": "measured", **model, **found, **about})
    return rows


# Speed


def measured_markdown(lines: Iterable[Line], subject: str = "", parameters: int = 0) -> str:
    """The section of what was measured, a heading for each machine.

    Args:
        lines: of `bench run -o`.
        subject: model of the rest of the page; it is said if it is not among those measured.
        parameters: its weights.
    """
    kept = newest(lines)
    parts = ["## Measured\n"]
    if not kept:
        parts.append("Nothing yet. `make bench` measures the machine that it runs on.\n")
        return "\n".join(parts)
    parts.append(
        "Read off clocks and counters on the machines named, by `dus-edge bench run` "
        "(llama-bench's method); nothing here is predicted. *pp512* is a prompt of 512 tokens, "
        "*tg128* the generation of 128, *@ d* the tokens that were in the cache before; ± is one "
        "standard deviation of the repetitions.\n"
    )
    if subject and not any(_same_size(line["model_n_params"], parameters) for line in kept):
        parts.append(f"**None of these models is {subject}**: their sizes stand beside them.\n")
    for group in _grouped(kept, _machine).values():
        parts.append(f"### {machine_name(group)}\n")
        for same in _grouped(group, _engine).values():
            parts += [f"{_engine_text(same)}:\n", _speed_table(same)]
    if any(line["peak_memory_bytes"] is not None for line in kept):
        parts.append(
            "*Peak memory* is the process's with all that is in it, or the GPU's where it ran on "
            "one. On a CPU it counts the mapped file's pages beside those that llama.cpp lays out "
            "anew.\n"
        )
    return "\n".join(parts)


def machine_name(lines: Sequence[Line]) -> str:
    """What lines of one machine were measured on: ``AMD EPYC, 2 cores, 24 GiB, Debian 12``."""
    line = max(lines, key=lambda x: x["test_time"])
    gpu, memory = line["gpu_info"], _gib(line["memory_bytes"])
    cores = f"{line['cores']} core{'s' * (line['cores'] != 1)}"
    parts = [gpu, line["cpu"], cores, f"{memory} GiB" if memory else "", line["os"]]
    return ", ".join(p for p in parts if p)


def machine_names(lines: Iterable[Line]) -> list[str]:
    """The machines of all lines, each once."""
    return [machine_name(group) for group in _grouped(newest(lines), _machine).values()]


def _name(line: Line) -> str:
    """Of a model, without its folder."""
    return PurePath(line["model_filename"]).name.removesuffix(".gguf")


def _machine(line: Line) -> tuple[Any, ...]:
    # In whole GiB: what the kernel keeps for itself differs from boot to boot.
    return line["gpu_info"] or "", line["cpu"], line["cores"], _gib(line["memory_bytes"])


def _engine(line: Line) -> tuple[Any, ...]:
    return line["engine"], line["build_commit"], *(line[k] for k in _SETTINGS)


def _engine_text(lines: Sequence[Line]) -> str:
    """Engine, build and settings of one table, the program and the days."""
    line = lines[0]
    parts = [line["engine"]]
    if line["build_commit"]:
        parts.append(f"build {line['build_commit']}")
    parts += [line["backends"], _FLASH_ATTN.get(line["flash_attn"])]
    if line["n_gpu_layers"] not in (None, -1):
        parts.append(f"-ngl {line['n_gpu_layers']}")
    if line["n_threads"]:
        parts.append(f"{line['n_threads']} thread{'s' * (line['n_threads'] != 1)}")
    types = list(dict.fromkeys(line[k] for k in ("type_k", "type_v") if line[k]))
    if types:
        parts.append(f"cache {'/'.join(types)}")
    counts = {x["model_n_params"] for x in lines}
    if len(counts) == 1 and None not in counts:
        parts.append(f"{format_count(*counts)} parameters")
    before = sorted(x["baseline_memory_bytes"] for x in lines if x["baseline_memory_bytes"])
    if before:
        sizes = dict.fromkeys(format_bytes(n) for n in (before[0], before[-1]))
        parts.append(f"{' to '.join(sizes)} in use before the model was loaded")
    versions = dict.fromkeys(
        x["dus_edge"] + (f" ({x['commit']})" if x["commit"] else "") for x in lines
    )
    days = sorted({x["test_time"][:10] for x in lines})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{', '.join(p for p in parts if p)}; dus-edge {', '.join(versions)}, {when}"


def _speed_table(lines: Sequence[Line]) -> str:
    """A line for each model and test; columns that say nothing are left out."""
    columns: dict[str, Callable[[Line], str]] = {
        "model": _name,
        # Without the architecture and llama.cpp's guess of the size: `llama 34B Q4_K - Medium`.
        "stored as": lambda x: re.sub(r"^\S+ (?:[\dx.?]+[BMK] )?", "", x["model_type"]),
        "size": lambda x: _shown(x["model_size"], format_bytes),
        "parameters": lambda x: _shown(x["model_n_params"], format_count),
        "test": lambda x: x["test"],
        "tok/s": lambda x: " ± ".join(_rate(x[k], x["avg_ts"]) for k in ("avg_ts", "stddev_ts")),
        "peak memory": lambda x: _shown(x["peak_memory_bytes"], format_bytes),
        "load": lambda x: _shown(x["load_s"], brief_time),
        "first token": lambda x: _shown(x["time_to_first_token_s"], brief_time),
        "J/token": lambda x: _shown(x["joules_per_token"], lambda j: f"{j:.3g}"),
    }
    cells = {head: [cell(x) for x in lines] for head, cell in columns.items()}
    kept = {head: column for head, column in cells.items() if any(column)}
    if len(set(cells["parameters"])) == 1:
        kept.pop("parameters", None)  # they are in the line above
    text = [i for i, h in enumerate(kept) if h in ("model", "stored as", "test")]
    return markdown_table(list(kept), zip(*kept.values(), strict=True), text) + "\n"


# Quality


def quality_markdown(
    results: Sequence[Mapping[str, Any]], subject: str = "", parameters: int = 0
) -> str:
    """The section of how good files are, a table for each reference and by language.

    Args:
        results: of `dus-edge quality`, as JSON.
        subject: model of the rest of the page, and its parameters: it is said when what was
            compared here is another one.
        parameters: its weights.
    """
    parts = ["## Quality\n"]
    if not results:
        parts.append("Nothing yet. `make bench` compares files of its base.\n")
        return "\n".join(parts)
    parts.append(
        "How far files are from a reference, measured on text by `dus-edge quality`. *KL* is the "
        "divergence of the next token's distribution from the reference's in nats, its mean and "
        "its 99th percentile over tokens; *same top-1* how often both put the same token first; "
        "*change* that of the perplexity. ± is one standard error over chunks of text. Files "
        f"on the *frontier* are those that none as large (within {100 * SAME_SIZE:g} %) or smaller "
        "beats by its KL.\n"
    )
    for result in results:
        reference = result["reference"]
        if len(results) > 1:
            parts.append(f"### {reference['name']}\n")
        parts.append(_model_text(reference, subject, parameters) + _about_text(result))
        parts.append(_quality_table(result))
        if len(result["text"]["chunks"]) > 1:
            parts.append(_languages(result))
    return "\n".join(parts)


def _quality_table(result: Mapping[str, Any]) -> str:
    """The reference and all candidates; what these are stored as has a column if it is known."""
    reference, candidates = result["reference"], result["candidates"]
    own = reference["name"], reference["file_bytes"], reference["bits_per_weight"]
    head, rows = [*_QUALITY_HEAD], [_quality_cells(*own, candidates[0]["total"], reference=True)]
    rows[0].append("")
    for c, on in zip(candidates, quality_frontier(result), strict=True):
        cells = _quality_cells(c["name"], c["file_bytes"], c["bits_per_weight"], c["total"])
        rows.append([*cells, "yes" * on])
    left = [0, len(head) - 1]
    if any(c.get("stored_as") for c in candidates):
        head.insert(1, "stored as")
        for row, model in zip(rows, (reference, *candidates), strict=True):
            row.insert(1, str(model.get("stored_as") or ""))
        left = [0, 1, len(head) - 1]
    return markdown_table(head, rows, left) + "\n"


def _model_text(reference: Mapping[str, Any], subject: str, parameters: int) -> str:
    """Which model was compared; that it is not the page's subject is said from its size."""
    n = reference["n_parameters"]
    text = f"The model is {reference['name']}, {format_count(n)} parameters"
    if reference["name"].startswith(f"{BUILTIN}-"):
        text += f", made of {BUILTIN}, the small base that comes with the program"
    if subject and not _same_size(n, parameters):
        text += (
            f": **not {subject}**, which has {format_count(parameters)}. Take from it the order of "
            "the presets, not the amounts"
        )
    return text + ". "


def _same_size(n: int | None, parameters: int) -> bool:
    """Within 1 %: vocabularies of the same model differ a little between formats."""
    return n is not None and abs(n - parameters) < 0.01 * parameters


def _about_text(result: Mapping[str, Any]) -> str:
    text, total = result["text"], result["candidates"][0]["total"]
    chunks = text["chunks"]
    named = ", ".join(k if len(chunks) == 1 else f"{k} {n}" for k, n in chunks.items())
    of_each = "all positions" if not text["first_scored"] else "the second half"
    return (
        f"The text: {sum(chunks.values())} chunks of {text['n_ctx']} tokens ({named}), of which "
        f"{of_each} count{'s' * bool(text['first_scored'])}, {total['n_tokens']:,} tokens "
        f"(SHA-256 of the chunks {text['sha256'][:12]}).\n"
    )


def _quality_cells(
    name: str, n_bytes: int, bits: float, s: Mapping[str, Any], *, reference: bool = False
) -> list[str]:
    name += " (reference)" if reference else ""
    cells = [name, format_bytes(n_bytes), f"{bits:.2f}"]
    key = "perplexity_reference" if reference else "perplexity"
    cells.append(cell_with_error(s[key], s[f"{key}_error"]))
    if reference:
        return [*cells, "", "", "", ""]
    ratio, error = s["log_ratio_nats"], s["log_ratio_nats_error"]
    change = "–"
    if ratio is not None:
        # Adding 0 turns −0 into 0.
        change = f"{round(100 * math.expm1(ratio), 2) + 0.0:+.2f} %".replace("-", "−")
        if error is not None:
            change += f" ± {100 * math.exp(ratio) * error:.2f}"
    top = "–" if s["same_top_share"] is None else f"{100 * s['same_top_share']:.2f} %"
    kl = cell_with_error(s["kl_nats"], s["kl_nats_error"])
    return [*cells, change, kl, cell_with_error(s["kl_p99_nats"], None), top]


def _languages(result: Mapping[str, Any]) -> str:
    """KL and top-1 by language; perplexities of languages are not compared with each other."""
    names = list(result["text"]["chunks"])
    head = ["file", *(f"{k}: {what}" for k in names for what in ("change", "KL", "same top-1"))]
    rows = []
    for c in result["candidates"]:
        cells = [_quality_cells("", 0, 0, c["languages"][k]) for k in names]
        rows.append([c["name"], *(x[i].split(" ±")[0] for x in cells for i in (4, 5, 7))])
    return f"The same by language:\n\n{markdown_table(head, rows)}\n"


# Cells


def _grouped(lines: Iterable[Line], key: Callable[[Line], Any]) -> dict[Any, list[Line]]:
    found: dict[Any, list[Line]] = {}
    for line in lines:
        found.setdefault(key(line), []).append(line)
    return found


def _gib(n_bytes: int | None) -> int | None:
    return None if n_bytes is None else round(n_bytes / 2**30)


def _shown(value: Any, spell: Callable[[Any], str]) -> str:
    return "" if value is None else spell(value)


def _rate(x: float, of: float) -> str:
    return f"{x:,.{0 if of >= 1000 else 1 if of >= 100 else 2}f}"


def cell_with_error(value: float | None, error: float | None) -> str:
    """``12.346 ± 0.021``: the error with two digits, the value as far as that."""
    if value is None:
        return "∞"
    if not error:
        return f"{value:.4g}"
    return with_error(value, error, most=7)
