"""Measure the memory of the guard and of SteadyFORCE, over a bare step.

Each peak is measured in a new process.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from harness.memory import fresh
from harness.networks import make_model, prunable

from cost_sections.memory import peak_of
from cost_sections.rows import Row, make_row


def measure(args: argparse.Namespace) -> Iterator[Row]:
    name, samples = ("test_resnet", 16) if args.quick else ("resnet50", 128)
    with torch.device("meta"):
        weights = prunable(make_model(name, 32, "meta"))
    case = (name, 32, samples, 1, args.device, None)
    bare = fresh(peak_of, "", *case) / weights
    for method, guard in (("force", False), ("force", True), ("steady_force", True)):
        ours = fresh(peak_of, method, *case, guard) / weights
        yield make_row(
            "guard",
            f"{name} 32x32, batch {samples}, memory",
            method + ", no guard" * (not guard),
            "bytes a weight",
            [(ours, bare)],
            difference=True,
        )
