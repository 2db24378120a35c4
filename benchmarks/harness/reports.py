"""Read facts from the warnings of a report."""

from __future__ import annotations

from collections.abc import Iterable


def is_disconnected(warnings: Iterable[str]) -> bool:
    """Return whether the mask has disconnected the outputs from the inputs.

    A step that the guard has taken again is only said to be one that would have.
    """
    return any("disconnected" in w and "would have" not in w for w in warnings)


def gates_opened(warnings: Iterable[str]) -> int:
    """Return the number of parameters that were opened while scoring."""
    opened = [w for w in warnings if w.startswith("gates opened")]
    return sum(int(w.split(": ")[1].split()[0]) for w in opened)
