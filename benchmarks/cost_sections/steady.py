"""Measure SteadyFORCE over FORCE, and the memory of both and of the guard.

Whole calls take turns. Each peak is measured in a new process.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from harness.memory import fresh
from harness.networks import make_batch, make_model, prunable, prune
from harness.turns import alternate
from torch import nn

from cost_sections.memory import peak_of
from cost_sections.rows import Row, make_row, milliseconds

CASES = (("resnet50", 32, 128), ("resnet50", 224, 4), ("vit_small_patch16_224", 224, 4))
STEPS = 10


def measure(args: argparse.Namespace) -> Iterator[Row]:
    cases = (("test_resnet", 32, 16),) if args.quick else CASES
    for name, size, samples in cases:
        dense = make_model(name, size, args.device)
        batch = make_batch(samples, size, args.device)
        call = partial(prune, loader=[batch], steps=STEPS)
        ours = partial(call, method="steady_force")

        def theirs(call: Any = call, dense: nn.Module = dense) -> None:
            call(copy.deepcopy(dense), method="force")

        pairs = alternate(ours, dense, theirs, args.runs or 3)
        setting = f"{STEPS} steps, ours: steady_force, bare: force"
        case = f"{name} {size}, {samples}"
        yield make_row(
            "steady", setting, case, "ms a step", milliseconds(pairs, STEPS), 1.05
        )
    yield from memory(*cases[0], args)


def memory(
    name: str, size: int, samples: int, args: argparse.Namespace
) -> Iterator[Row]:
    """Compare the peaks with that of a bare step."""
    with torch.device("meta"):
        weights = prunable(make_model(name, size, "meta"))
    case = (name, size, samples, 1, args.device, None)
    bare = fresh(peak_of, "", *case) / weights
    for method, guard in (("force", False), ("force", True), ("steady_force", True)):
        ours = fresh(peak_of, method, *case, guard) / weights
        yield make_row(
            "steady",
            f"{name} {size}x{size}, batch {samples}, memory over a bare step",
            method + ", no guard" * (not guard),
            "bytes a weight",
            [(ours, bare)],
            difference=True,
        )
