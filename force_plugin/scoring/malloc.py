"""Keep the memory that passes free for the next ones."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# mallopt's names for them, in malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# What glibc's own rules come to in a process that frees large blocks.
_USUAL_MMAP = 32 << 20
_USUAL_TRIM = 2 * _USUAL_MMAP
_ALL = 2**31 - 1


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let the C library keep what is freed, as a caching allocator does on a GPU.

    Each pass allocates and frees what the one before has: activations and gradients.
    glibc gives much of it back to the system, which has to clear every page of it when
    it is asked for again; that takes up to a tenth of a pass of a ResNet-50 on a CPU.
    Values do not depend on it. With another C library, and where the user has set
    malloc's parameters in the environment, nothing is done.

    Source: ``mallopt(3)``, ``M_TRIM_THRESHOLD``.
    """
    chosen = "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"
    libc: Any = ctypes.CDLL(None) if os.name == "posix" else None
    if not hasattr(libc, "gnu_get_libc_version") or any(map(os.environ.get, chosen)):
        yield
        return
    # Either ends glibc's own adaptation of both; some versions refuse more than usual.
    for most in (_USUAL_MMAP, _ALL):
        libc.mallopt(_MMAP_THRESHOLD, most)
    libc.mallopt(_TRIM_THRESHOLD, _ALL)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _USUAL_MMAP)
        libc.mallopt(_TRIM_THRESHOLD, _USUAL_TRIM)
