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
