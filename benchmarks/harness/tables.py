"""Format cells and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean, stdev


def percent(fraction: float) -> str:
    """Return a fraction in per cent with as few digits as needed: 99.5 %."""
    return f"{100 * fraction:.6g} %"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean as text, with the standard deviation of several values."""
    if not values:
        return "–"
    several = f" ± {stdev(values):.{digits}f}" if values[1:] else ""
    return f"{mean(values):.{digits}f}" + several


def aligned(rows: Iterable[Iterable[str]]) -> str:
    """Return a table in aligned columns, for a terminal."""
    rows = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return lines of a Markdown table, right-aligned except the first column."""
    rule = ["---", *["--:"] * (len(titles) - 1)]
    return [f"| {' | '.join(row)} |" for row in (titles, rule, *rows)]
