"""Measure the time of ``import force_plugin``, beside ``import torch``.

    python benchmarks/import_time.py [--turns 15]

Each import runs in its own process. The two imports take turns, after a first import of
each that fills the disk's cache. The medians are compared.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from datetime import date
from statistics import median

import torch

TIMED = """
import time
start = time.perf_counter()
import {}
print(time.perf_counter() - start)
"""


def seconds(module: str) -> float:
    """Return the seconds that the import of a module takes in a new process."""
    command = [sys.executable, "-c", TIMED.format(module)]
    return float(subprocess.run(command, check=True, capture_output=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    turns = parser.parse_args().turns
    modules = ("torch", "force_plugin")
    for module in modules:
        seconds(module)
    pairs = [[seconds(module) for module in modules] for _ in range(turns)]
    theirs, ours = (median(times) for times in zip(*pairs, strict=True))
    ratios = sorted(own / base for base, own in pairs)
    machine = f"{platform.machine()}, torch {torch.__version__}, {date.today()}"
    print(f"{machine}, {turns} turns\n")
    print(f"import torch         {theirs:6.2f} s")
    print(f"import force_plugin  {ours:6.2f} s")
    spread = f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
    print(f"ratio                {median(ratios):6.2f}   {spread}")


if __name__ == "__main__":
    main()
