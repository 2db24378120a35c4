"""Make lines of tables, and the case that several sections share."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from harness.networks import make_batch, make_model
from harness.training import Batch
from harness.turns import STEPS, Turns
from torch import nn

Row = dict[str, Any]


def make_row(
    section: str,
    setting: str,
    case: str,
    unit: str,
    pairs: Sequence[tuple[float, float]],
    bound: float | None = None,
    difference: bool = False,
    **more: Any,
) -> Row:
    """Return a line of a table: both sides, and the ratio of their medians.

    With ``difference``, it is the difference of the medians.
    """

    def compared(ours: float, theirs: float) -> float:
        return ours - theirs if difference else ours / theirs

    def spread(values: Sequence[float]) -> Row:
        middle = statistics.median(values)
        return {"median": middle, "min": min(values), "max": max(values)}

    ours, theirs = (spread(side) for side in zip(*pairs, strict=True))
    # The ratio is the ratio of medians; the pairs give its spread.
    over = spread([compared(*pair) for pair in pairs])
    over["median"] = compared(ours["median"], theirs["median"])
    row: Row = {"section": section, "setting": setting, "case": case, "unit": unit}
    row |= {"runs": len(pairs), "ours": ours, "bare": theirs, "ratio": over}
    return row | {"bound": bound, "difference": difference} | more


def milliseconds(
    pairs: Iterable[tuple[float, float]], per: int = 1
) -> list[tuple[float, float]]:
    return [(1000 * ours / per, 1000 * theirs / per) for ours, theirs in pairs]


def row_of_few(
    section: str,
    setting: str,
    case: str,
    turns: Sequence[Turns],
    remark: str = "",
    **more: Any,
) -> Row:
    """Return a line about calls of few steps, with a note on work done once."""
    once = 1000 * statistics.median(t.once() for t in turns)
    more["note"] = f"{remark}done once: {once:.0f} ms"
    pairs = milliseconds(t.step_of_60() for t in turns)
    return make_row(section, setting, case, "ms a step", pairs, **more)


@dataclass
class Case:
    """The network, batch and steps of the sections that measure a step."""

    setting: str
    dense: nn.Module
    batch: Batch
    steps: int
    turn: int


def step_case(args: argparse.Namespace) -> Case:
    # A turn takes two seconds: within a longer turn, the machine's speed may change.
    name, samples, steps, turn = "resnet50", 128, STEPS, 5
    if args.quick:
        name, samples, steps, turn = "test_resnet", 16, 8, 4
    dense = make_model(name, 32, args.device)
    batch = make_batch(samples, 32, args.device)
    return Case(f"{name} 32x32, batch {samples}", dense, batch, steps, turn)


def identity(row: Row) -> tuple[str, str, str]:
    return row["section"], row["setting"], row["case"]


def is_worse(row: Row, stored: Row) -> bool:
    """Return whether a ratio exceeds the stored ratio by over its spread plus 3 %."""
    before = stored["ratio"]
    allowed = before["max"] - before["min"] + 0.03 * abs(before["median"])
    return bool(row["ratio"]["median"] > before["median"] + allowed)
