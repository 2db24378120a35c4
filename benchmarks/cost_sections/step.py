"""Measure ResNet-50 at 32x32, batch 128, as in the FORCE paper's CIFAR runs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

from harness.turns import take_turns

from cost_sections.rows import Row, make_row, milliseconds, step_case


def measure(args: argparse.Namespace) -> Iterator[Row]:
    case = step_case(args)
    setting = f"{case.setting}, {case.steps} steps"
    for method in ("force", "iter_snip", "grasp_it"):
        take = partial(take_turns, case.dense, case.batch, turn=case.turn)
        take(steps=2, method=method)  # warm-up
        turns = [take(steps=case.steps, method=method) for _ in range(args.runs or 5)]
        pairs = milliseconds((t.all_of_it() for t in turns), case.steps)
        yield make_row("step", setting, method, "ms a step", pairs, 1.12)
