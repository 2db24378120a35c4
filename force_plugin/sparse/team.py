"""Threads that share a kernel's work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch

# Fewer products than these are done before a second thread has woken up.
_WORTH_A_THREAD = 2_000_000

_pools: dict[int, ThreadPoolExecutor] = {}
os.register_at_fork(after_in_child=_pools.clear)  # a child has no threads


def members(products: int) -> int:
    """Return the number of threads for some products, at most PyTorch's number."""
    return max(1, min(torch.get_num_threads(), products // _WORTH_A_THREAD))


def run(kernel: Callable[..., None], shares: Sequence[tuple[int, ...]]) -> None:
    """Call a kernel with each share's arguments, each share in a thread of its own.

    Kernels are foreign functions, which do not hold the interpreter's lock.
    """
    others = []
    if len(shares) > 1:
        size = len(shares) - 1
        if size not in _pools:
            _pools[size] = ThreadPoolExecutor(size, "sparse")
        others = [_pools[size].submit(kernel, *share) for share in shares[1:]]
    try:
        kernel(*shares[0])
    finally:  # their memory has to live until they are done
        for other in others:
            other.result()


def parts(count: int, number: int) -> Iterator[tuple[int, int]]:
    """Yield the first and the last (excluded) of a number of parts of equal size."""
    ends = [count * n // number for n in range(number + 1)]
    yield from pairwise(ends)
