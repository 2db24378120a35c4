"""Measure SteadyFORCE over FORCE, whole calls in turns."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

from harness.networks import make_batch, make_model, prune
from harness.turns import alternate
from torch import nn

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
