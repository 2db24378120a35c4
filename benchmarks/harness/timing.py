"""Measure wall time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def clock() -> float:
    """Return the time in seconds, after a GPU has finished its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(run: Callable[[], Result]) -> tuple[float, Result]:
    """Return the seconds of a call, and its result."""
    start = clock()
    result = run()
    return clock() - start, result


def seconds(run: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    return timed(run)[0]


def seconds_of(run: Callable[[], object], at_least: float) -> float:
    """Return the mean seconds of calls that take at least ``at_least`` in total."""
    start, number, taken = time.perf_counter(), 0, -1.0
    while taken < at_least:
        run()
        number, taken = number + 1, time.perf_counter() - start
    return taken / number
