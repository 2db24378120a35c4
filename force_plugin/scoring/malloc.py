"""Reuse of the memory that one pass frees in the next pass."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Parameters of mallopt, from malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# Values that glibc's own rules reach in a process that frees large blocks.
_USUAL_MMAP = 32 << 20
_USUAL_TRIM = 2 * _USUAL_MMAP
_ALL = 2**31 - 1


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let the C library keep freed memory, as a caching allocator does on a GPU.

    Each pass allocates and frees memory for activations and gradients, as much as the
    pass before. glibc gives much of the freed memory back to the system. When the
    memory is needed again, the system has to clear every page. That takes up to a tenth
    of a pass of a ResNet-50 on a CPU. Computed values do not depend on this setting.
    Nothing is done with another C library, or if the user has set malloc's parameters
    in the environment.

    Source: ``mallopt(3)``, ``M_TRIM_THRESHOLD``.
    """
    chosen = "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"
    libc: Any = ctypes.CDLL(None) if os.name == "posix" else None
    if not hasattr(libc, "gnu_get_libc_version") or any(map(os.environ.get, chosen)):
        yield
        return
    # Setting either threshold stops glibc's own adaptation of both. Some versions
    # refuse values above the usual one.
    for most in (_USUAL_MMAP, _ALL):
        libc.mallopt(_MMAP_THRESHOLD, most)
    libc.mallopt(_TRIM_THRESHOLD, _ALL)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _USUAL_MMAP)
        libc.mallopt(_TRIM_THRESHOLD, _USUAL_TRIM)
