"""Memory that passes free stays for the next ones, as long as scoring lasts."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's"
)

# A process of its own: what malloc does depends on what was freed before.
SCRIPT = """
import resource
from contextlib import nullcontext
from force_plugin.scoring.malloc import freed_memory_kept

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def cleared():
    "Pages that the system clears for eight blocks, when as many were there before."
    for _ in range(2):
        before = faults()
        blocks = [b"x" * {size} for _ in range(8)]
        del blocks
    return faults() - before

def passes():
    with freed_memory_kept():
        return cleared()

print(passes(), cleared(), passes())
"""


def count(size: int, **environment: str) -> list[int]:
    """Pages cleared while it is kept, afterwards, and while it is kept again."""
    output = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("{size}", str(size))],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return list(map(int, output.split()))


@pytest.mark.parametrize("size", [1 << 20, 24 << 20, 80 << 20])
def test_what_is_freed_stays_while_scoring_lasts(size: int) -> None:
    pages = 8 * size // os.sysconf("SC_PAGE_SIZE")
    kept, _, again = count(size)
    assert kept < pages / 100
    assert again < pages / 100


def test_afterwards_it_goes_back_to_the_system() -> None:
    size = 24 << 20
    _, after, _ = count(size)
    assert after > 8 * size / os.sysconf("SC_PAGE_SIZE") / 2


def test_what_the_user_has_chosen_is_left_alone() -> None:
    size = 24 << 20
    kept, *_ = count(size, MALLOC_MMAP_THRESHOLD_="65536")
    assert kept > 8 * size / os.sysconf("SC_PAGE_SIZE") / 2
