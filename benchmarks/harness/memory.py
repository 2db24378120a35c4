"""Measure peaks of memory, in new processes if needed."""

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

# By default, glibc keeps a random part of freed memory.
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def of_process(what: str) -> int:
    """Return the bytes of memory of this process (Linux): VmRSS now, VmHWM the peak.

    ``ru_maxrss`` is not used: a new process inherits it from a large parent process.
    """
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(1024 * int(s.split()[1]) for s in lines if s.startswith(what))


def peak(device: str) -> int:
    """Return the peak memory of this process in bytes, on the GPU for ``"cuda"``."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return of_process("VmHWM")


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Let processes started in a ``with`` block return freed memory at once.

    A peak is then memory in use.
    """
    os.environ.update(AT_ONCE)
    try:
        yield
    finally:
        for name in AT_ONCE:
            del os.environ[name]


def fresh(run: Callable[..., Result], *args: object) -> Result:
    """Return a function's result from a new process that returns freed memory."""
    spawn = multiprocessing.get_context("spawn")
    threads = (torch.get_num_threads(),)
    with (
        freed_at_once(),
        ProcessPoolExecutor(1, spawn, torch.set_num_threads, threads) as pool,
    ):
        return pool.submit(run, *args).result()
