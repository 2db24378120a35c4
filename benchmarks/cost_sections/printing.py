"""Print pairs of ours and bare."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cost_sections.rows import Row, identity, is_worse


def heading(row: Row) -> str:
    bound = "" if row["bound"] is None else f", bound {row['bound']:g}"
    last = "ours - bare" if row["difference"] else "ratio"
    columns = 2 * "  med.   min   max" + "  med.  min  max"
    return (
        f"\n{row['section']}: {row['setting']}\n"
        f"{row['unit']}, {row['runs']} runs{bound}\n\n"
        f"{'':23}{'ours':>18}{'bare':>18}{last:>16}\n{'':23}{columns}"
    )


def short(value: float) -> str:
    """Return a number in six columns, with three digits or more."""
    size = abs(value)
    return f"{value:6.{0 if size >= 100 else 1 if size >= 10 else 2}f}"


def ratio_of(row: Row) -> str:
    def digits(value: float, most: int) -> int:
        return most if value < 10 else 1

    ratio = row["ratio"]
    middle = f"{ratio['median']:6.{digits(ratio['median'], 3)}f}"
    ends = (f"{ratio[end]:5.{digits(ratio[end], 2)}f}" for end in ("min", "max"))
    return middle + "".join(ends)


def line(row: Row) -> str:
    sides = "".join(
        short(row[side][key])
        for side in ("ours", "bare")
        for key in ("median", "min", "max")
    )
    over = row["bound"] is not None and row["ratio"]["median"] > row["bound"]
    note = f"\n  {row['note']}" if "note" in row else ""
    return f"{row['case']:23}{sides}{ratio_of(row)}{' over' if over else ''}{note}"


def show(
    rows: Iterable[Row],
    stored: Mapping[Any, Row],
    table: Callable[[Sequence[Row]], None] | None = None,
) -> list[Row]:
    """Print rows as they come, and a stored row after each pair. Return all rows.

    Args:
        rows: Rows of a section.
        stored: Rows of a file, by their identity.
        table: Prints a further table of the section, after the pairs or instead.
    """
    seen: list[Row] = []
    for row in rows:
        if "unit" in row:
            if not seen or heading(row) != heading(seen[-1]):
                print(heading(row))
            print(line(row))
            if before := stored.get(identity(row)):
                verdict = " worse" if is_worse(row, before) else ""
                print(f"{'  stored' + verdict:59}{ratio_of(before)}")
            elif stored:
                print("  not stored")
        sys.stdout.flush()
        seen.append(row)
    if table and seen:
        table(seen)
    return seen
