"""One way to say a number: counts, sizes, rates, times; lines and tables that fit 80 columns."""

from __future__ import annotations

from collections.abc import Mapping

#: Columns of everything that is printed.
WIDTH = 80


def format_count(n: int) -> str:
    """``10.73 B``, ``8.14 M``."""
    value, unit = float(n), ""
    for unit in ("", " k", " M", " B", " T"):
        if value < 1000 or unit == " T":
            break
        value /= 1000
    return f"{value:.2f}{unit}" if unit else str(n)


def format_bytes(n: float) -> str:
    """A size for people: ``4.07 GiB``, ``11.5 MiB``, ``512 B``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            break
        n /= 1024
    return f"{n:.0f} B" if unit == "B" else f"{n:.{2 if n < 10 else 1}f} {unit}"


def format_rate(amount: float, seconds: float, unit: str) -> str:
    """E.g. ``812 MB/s`` or ``7.4 M weights/s``; decimal prefixes."""
    rate = amount / seconds if seconds > 0 else 0.0
    prefix = ""
    for prefix in ("", "k", "M", "G"):
        if rate < 1000 or prefix == "G":
            break
        rate /= 1000
    digits = 0 if rate >= 100 else 1
    gap = "" if unit == "B" else " " if prefix else ""
    return f"{rate:.{digits}f} {prefix}{gap}{unit}/s"


def format_time(seconds: float) -> str:
    """``m:ss`` or ``h:mm:ss``."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def duration(seconds: float) -> str:
    """``9.6 s``, from a minute on ``1:09 (m:ss)``."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{format_time(seconds)} (m:ss)"


def counts_text(types: Mapping[str, int]) -> str:
    """``72 Q4_K, 13 Q6_K, 25 F32``, the most frequent first."""
    return ", ".join(f"{n} {t}" for t, n in sorted(types.items(), key=lambda item: -item[1]))
