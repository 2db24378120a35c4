"""Peaks of memory, and processes of which nothing else is in them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")

# For glibc: by itself it keeps what is freed, more or less of it by chance.
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def of_process(what: str) -> int:
    """Bytes of memory of this process (Linux): VmRSS now, VmHWM at most.

    Not ``ru_maxrss``: a process that was started by a large one inherits its peak.
    """
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(1024 * int(s.split()[1]) for s in lines if s.startswith(what))


def peak(device: str) -> int:
    """Bytes that this process has needed at most, on a GPU if that is the device."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return of_process("VmHWM")


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Processes started in here give back what they free, so a peak was in use."""
    os.environ.update(AT_ONCE)
    try:
        yield
    finally:
        for name in AT_ONCE:
            del os.environ[name]


def fresh(run: Callable[..., Result], *args: object) -> Result:
    """The result of a function in a process of its own that frees at once."""
    spawn = multiprocessing.get_context("spawn")
    threads = (torch.get_num_threads(),)
    with (
        freed_at_once(),
        ProcessPoolExecutor(1, spawn, torch.set_num_threads, threads) as pool,
    ):
        return pool.submit(run, *args).result()
