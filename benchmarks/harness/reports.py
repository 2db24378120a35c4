"""What the warnings of a report say."""

from __future__ import annotations

from collections.abc import Iterable


def is_disconnected(warnings: Iterable[str]) -> bool:
    """Whether the mask has cut the outputs off from the inputs."""
    return any("disconnected" in warning for warning in warnings)


def gates_opened(warnings: Iterable[str]) -> int:
    """How many parameters were opened while scoring."""
    opened = [w for w in warnings if w.startswith("gates opened")]
    return sum(int(w.split(": ")[1].split()[0]) for w in opened)
