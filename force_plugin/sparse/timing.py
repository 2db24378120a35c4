"""Measure two ways of one computation in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence


def in_turns(
    ways: Sequence[Callable[[], object]], least: float = 0.003, rounds: int = 3
) -> list[float]:
    """Return the seconds of each way: the least mean of its turns.

    Args:
        ways: Functions to measure. Each runs once before the first turn.
        least: Seconds of a turn.
        rounds: Number of turns of each way.
    """
    best = [float("inf")] * len(ways)
    for way in ways:
        way()
    for _ in range(rounds):
        for n, way in enumerate(ways):
            start, number, taken = time.perf_counter(), 0, 0.0
            while taken < least:
                way()
                number, taken = number + 1, time.perf_counter() - start
            best[n] = min(best[n], taken / number)
    return best
