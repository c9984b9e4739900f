"""What was measured, as files keep it: lines with their machine, and quality; both checked.

A kept line is one of `measurement.json_lines` with the machine's facts beside it. Whoever reads a
file back gets lines that are known to be whole, or one sentence that says where they are not.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dus_edge import __version__
from dus_edge.errors import UsageError
from dus_edge.files import append_text, check_writable
from dus_edge.machine import (
    command_output,
    default_threads,
    memory_bytes,
    processor_name,
    system_name,
)
from dus_edge.measure.measurement import Measurement, measurement_json
from dus_edge.measure.ollama import host_url
from dus_edge.words import cut_end

_ROOT = Path(__file__).parent.parent

#: What a key may hold; numbers are finite and not negative.
_NUMBER, _WHOLE, _TEXT = "a number", "a whole number", "text"
#: Keys of a kept line that are read, and what they hold.
_LINE = {
    "model_filename": _TEXT,
    "model_type": _TEXT,
    "engine": _TEXT,
    "test": _TEXT,
    "test_time": _TEXT,
    "avg_ts": _NUMBER,
    "stddev_ts": _NUMBER,
    "cpu": _TEXT,
    "cores": _WHOLE,
    "os": _TEXT,
    "python": _TEXT,
    "dus_edge": _TEXT,
}
#: The same of keys that may be null, where nothing is known.
_LINE_OR_NULL = {
    "build_commit": _TEXT,
    "gpu_info": _TEXT,
    "backends": _TEXT,
    "type_k": _TEXT,
    "type_v": _TEXT,
    "n_threads": _WHOLE,
    "n_gpu_layers": None,  # -1 is all
    "flash_attn": None,  # -1 is the engine's choice
    "model_size": _WHOLE,
    "model_n_params": _WHOLE,
    "load_s": _NUMBER,
    "time_to_first_token_s": _NUMBER,
    "peak_memory_bytes": _WHOLE,
    "baseline_memory_bytes": _WHOLE,
    "joules_per_token": _NUMBER,
    "memory_bytes": _WHOLE,
    "commit": _TEXT,
}
_MODEL = {
    "name": _TEXT,
    "kind": _TEXT,
    "file_bytes": _WHOLE,
    "n_parameters": _WHOLE,
    "bits_per_weight": _NUMBER,
}
#: Keys of a line of divergence, a file on a text.
_DIVERGENCE = {
    **dict.fromkeys(("model", "preset", "way", "text"), _TEXT),
    **dict.fromkeys(("seed", "n_tokens", "bytes"), _WHOLE),
    "kl": _NUMBER,
}
_WRITER, _DIVERGENCE_WRITER = "dus-edge bench run -o", "bench_divergence.py"
_WANTED_QUALITY = "give the quality.json that `dus-edge quality -o DIR` writes."
_SCORES = ("perplexity", "perplexity_reference", "kl_nats", "kl_p99_nats", "same_top_share")


def machine() -> dict[str, Any]:
    """What it is measured on.

    Returns:
        ``cpu`` (name), ``cores`` (that this process may use), ``memory_bytes`` (of the machine;
        None if not told), ``os``, ``python``, ``dus_edge`` (releases), ``commit`` (of this
        program's checkout, with ``-dirty`` if its code was changed; None if it runs from none).
    """
    return {
        "cpu": processor_name(),
        "cores": default_threads(),
        "memory_bytes": memory_bytes(),
        "os": system_name(),
        "python": platform.python_version(),
        "dus_edge": __version__,
        "commit": _commit(_ROOT),
    }


def check_record(path: Path, *, ollama: bool = False) -> None:
    """See that lines can be added to a file, before anything is measured.

    Args:
        path: the file.
        ollama: whether Ollama is to be measured; it must be the one of this machine.

    Raises:
        UsageError: it is there and holds something else, or Ollama runs on another machine.
        OutputError: its folder cannot be written.
    """
    if ollama:
        host = urlsplit(host_url(os.environ.get("OLLAMA_HOST"))).hostname or ""
        if host not in ("localhost", "::1") and not host.startswith("127."):
            raise UsageError(
                f"OLLAMA_HOST is {host}, and -o keeps this machine's facts; measure there, or "
                "leave -o out."
            )
    if path.exists():
        read_lines(path)
    check_writable(path.parent)


def append_record(path: Path, measurements: Sequence[Measurement]) -> None:
    """Add a line for each measurement, all or none; the file is made if it is missing.

    Raises:
        UsageError: the file holds something else.
        OutputError: it cannot be written.
    """
    here = machine()
    lines = (json.dumps(measurement_json(m) | here, allow_nan=False) + "\n" for m in measurements)
    if path.exists():
        read_lines(path)
    append_text(path, "".join(lines), lambda before: parse_lines(before, str(path)))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that `append_record` wrote.

    Raises:
        UsageError: there is no such file, or a line is not one of ours; file and line are named.
    """
    return parse_lines(_read(path, _WRITER), str(path))


def parse_lines(text: str, name: str) -> list[dict[str, Any]]:
    """The same of a text; `name` is what errors call it."""
    found = []
    for n, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            where = f"{name}, line {n}"
            value = _parse(line, where)
            _check(value, _LINE, where)
            _check(value, _LINE_OR_NULL, where, null=True)
            found.append(value)
    return found


def read_quality(path: Path) -> dict[str, Any]:
    """What `dus-edge quality -o DIR` wrote as ``quality.json``; see `quality.report.quality_json`.

    Raises:
        UsageError: there is no such file, or it is of another shape.
    """
    return parse_quality(_read(path, "dus-edge quality -o"), str(path))


def parse_quality(text: str, name: str) -> dict[str, Any]:
    """The same of a text; `name` is what errors call it."""
    found = _parse(text, name)
    reference, about = _part(found, "reference", name), _part(found, "text", name)
    _check(reference, _MODEL, f"{name}, reference")
    _check(about, {"n_ctx": _WHOLE, "first_scored": _WHOLE, "sha256": _TEXT}, f"{name}, text")
    languages = _part(about, "chunks", f"{name}, text")
    _check(languages, dict.fromkeys(languages, _WHOLE), f"{name}, text, chunks")
    if not languages:
        raise UsageError(f"{name}: no language of the text is named; {_WANTED_QUALITY}")
    candidates = found.get("candidates")
    if not isinstance(candidates, list) or not candidates:
        raise UsageError(f"{name}: 'candidates' is no list of models; {_WANTED_QUALITY}")
    for i, candidate in enumerate(candidates, start=1):
        where = f"{name}, candidate {i}"
        if not isinstance(candidate, dict):
            raise UsageError(f"{where} is no object; {_WANTED_QUALITY}")
        _check(candidate, _MODEL, where)
        said = [k for k in ("stored_as", "way") if candidate.get(k) is not None]
        _check(candidate, dict.fromkeys(said, _TEXT), where)
        by_language = _part(candidate, "languages", where)
        scores = {"total": _part(candidate, "total", where)}
        scores |= {k: _part(by_language, k, f"{where}, languages") for k in languages}
        for label, values in scores.items():
            _check(values, {"n_chunks": _WHOLE, "n_tokens": _WHOLE}, f"{where}, {label}")
            numbers = dict.fromkeys(_SCORES, _NUMBER)  # null where infinite
            numbers |= {f"{k}_error": _NUMBER for k in _SCORES if k != "kl_p99_nats"}
            numbers |= {"log_ratio_nats": None, "log_ratio_nats_error": _NUMBER}
            _check(values, numbers, f"{where}, {label}", null=True)
    return found


def read_divergence(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that ``benchmarks/bench_divergence.py`` wrote: a file on a text each.

    Raises:
        UsageError: there is no such file, or a line is not one of these; file and line are named.
    """
    return parse_divergence(_read(path, _DIVERGENCE_WRITER), str(path))


def parse_divergence(text: str, name: str) -> list[dict[str, Any]]:
    """The same of a text; `name` is what errors call it."""
    found = []
    for n, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            where = f"{name}, line {n}"
            value = _parse(line, where)
            _check(value, _DIVERGENCE, where)
            if value["bytes"] < 1:
                raise UsageError(f"{where}: 'bytes' is 0; a file has some.")
            chunks = value.get("by_chunk")
            if not isinstance(chunks, list) or not all(_is(x, _NUMBER) for x in chunks):
                raise UsageError(f"{where}: 'by_chunk' is no list of numbers.")
            found.append(value)
    return found


def _read(path: Path, writer: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; `{writer}` writes such a file.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no text; give what `{writer}` writes.") from None
    except OSError as e:
        raise UsageError(f"{path} cannot be read ({e.strerror or e}).") from None


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        # NaN and Infinity are no JSON, though the reader takes them.
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise UsageError(f"{where} is no JSON.") from None
    if not isinstance(value, dict):
        raise UsageError(f"{where} is JSON, but no object.")
    return value


def _refuse(text: str) -> None:
    raise ValueError(text)


def _part(value: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    part = value.get(key)
    if not isinstance(part, dict):
        raise UsageError(f"{where}: {key!r} is no object; {_WANTED_QUALITY}")
    return part


def _check(
    value: Mapping[str, Any], wanted: Mapping[str, str | None], where: str, *, null: bool = False
) -> None:
    """See that all keys are there and hold what is wanted; None stands for a number of any sign."""
    for key, kind in wanted.items():
        if key not in value:
            raise UsageError(f"{where} lacks {key!r}.")
        found = value[key]
        if not (null and found is None) and not _is(found, kind):
            raise UsageError(f"{where}: {key!r} is {_shown(found)}; it must be {kind or _NUMBER}.")


def _is(value: Any, kind: str | None) -> bool:
    if kind == _TEXT:
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int if kind == _WHOLE else int | float):
        return False
    return math.isfinite(value) and (kind is None or value >= 0)


def _shown(value: Any) -> str:
    return cut_end(json.dumps(value, ensure_ascii=False), 40)


def _commit(package: Path) -> str | None:
    """Of the checkout that a package lies in, and only of its own: not one around a `.venv`."""
    root = package.parent
    if not (root / ".git").exists():
        return None
    commit = command_output("git", "-C", str(root), "rev-parse", "--short", "HEAD")
    changed = command_output("git", "-C", str(root), "status", "--porcelain", "--", package.name)
    return f"{commit}-dirty" if commit and changed else commit or None
