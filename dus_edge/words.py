"""One way to say a number: counts, sizes, rates, times; lines and tables that fit 80 columns."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence

from dus_edge.errors import UsageError

#: Columns of everything that is printed.
WIDTH = 80


def printable(text: str) -> str:
    """Text for a terminal: characters that would steer it are spelled out, as ``\\x1b``."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def whole_number(text: str) -> int | None:
    """The number that ASCII digits spell; None of anything else, and of more than 18 of them."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else None


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


_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?) ?([KMGT]?)(I?)B?", re.ASCII)


def parse_bytes(text: str, where: str) -> int:
    """Bytes that a size spells: ``6GiB``, ``5.5 G``, ``700 MB``, ``123456``.

    GB is 10⁹ bytes, GiB and G are 2³⁰.

    Args:
        text: in any case.
        where: names the option in the message.

    Raises:
        UsageError: it is none, or not even one byte.
    """
    found = _SIZE.fullmatch(text.strip().upper())
    if found is not None:
        number, prefix, binary = found.groups()
        decimal = prefix and not binary and text.strip().upper().endswith("B")
        unit = 1000 ** (_UNITS[prefix] // 10) if decimal else 1 << _UNITS[prefix]
        if (nbytes := int(float(number) * unit)) > 0:
            return nbytes
    raise UsageError(f"{where} is {text!r}; give a size such as 6GiB or 700MiB.")


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


def figure(x: float, whole_from: float = 100) -> str:
    """``7.4``, ``1,234``: one digit after the point, none from `whole_from` on."""
    return f"{x:,.0f}" if x >= whole_from else f"{x:.1f}"


def with_error(value: float, error: float, most: int = 6) -> str:
    """``12.346 ± 0.021``: the error with two digits, the value as far as that.

    Args:
        value: finite.
        error: above 0.
        most: digits after the point at most.
    """
    decimals = min(max(0, 1 - math.floor(math.log10(error))), most)
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def brief_time(seconds: float) -> str:
    """``812 ms``, ``9.6 s``."""
    return f"{1e3 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def cut_end(text: str, width: int) -> str:
    """At most `width` characters: what is too long ends in ``…``."""
    return text if len(text) <= width else f"{text[: width - 1]}…"


def cut_middle(text: str, width: int) -> str:
    """The same without its middle: names of files differ at their ends."""
    if len(text) <= width:
        return text
    left = (width - 1) // 3
    return f"{text[:left]}…{text[len(text) - (width - 1 - left) :]}"


def wrap(
    text: str,
    width: int = WIDTH,
    *,
    first: str = "",
    rest: str = "",
    long_words: bool = True,
    hyphens: bool = True,
) -> str:
    """Lines of at most `width` columns.

    Args:
        text: one paragraph.
        width: columns.
        first: what the first line begins with.
        rest: what the others begin with.
        long_words: whether a word that is longer than a line is broken.
        hyphens: whether a line may end after a hyphen.
    """
    return textwrap.fill(
        text,
        width,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=long_words,
        break_on_hyphens=hyphens,
    )


def markdown_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,)
) -> str:
    """A table of GitHub's Markdown, to be rendered.

    Args:
        head: a title for each column.
        rows: cells.
        left: columns of text, by number; the others are figures and stand on the right.
    """
    marks = ["---" if i in left else "---:" for i in range(len(head))]
    return "\n".join(map(_cells_line, (_safe(head), marks, *map(_safe, rows))))


def aligned_table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    left: Collection[int] = (0,),
    *,
    least: int = 8,
) -> str:
    """The same to be read as it is: aligned, and no line over `WIDTH`, which figures fill first.

    Args:
        head: a title for each column.
        rows: cells.
        left: columns of text, by number. Where there is too little room their cells lose their
            middles, the first column's before the others'.
        least: characters that the first column keeps, come what may.
    """
    lines = [_safe(line) for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    room = WIDTH - 1 - 3 * len(widths) - sum(n for i, n in enumerate(widths) if i not in left)
    for before, i in reversed(list(enumerate(sorted(left)))):
        share = max(room - before * least, room // (before + 1), 1 if before else least)
        widths[i] = min(widths[i], share)
        room -= widths[i]
    rule = ["-" * n if i in left else "-" * (n - 1) + ":" for i, n in enumerate(widths)]

    def aligned(cells: Sequence[str]) -> list[str]:
        pairs = enumerate(zip(cells, widths, strict=True))
        return [cut_middle(c, n).ljust(n) if i in left else c.rjust(n) for i, (c, n) in pairs]

    first, *others = map(aligned, lines)
    return "\n".join(map(_cells_line, (first, rule, *others)))


def _safe(cells: Sequence[str]) -> list[str]:
    """A bar in a name would begin a cell."""
    return [cell.replace("|", "/") for cell in cells]


def _cells_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
