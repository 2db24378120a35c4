"""Measure GraSP over a bare step of an equal number of samples."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

from harness.networks import bare, make_batch, make_model, prune
from harness.turns import alternate

from cost_sections.rows import Row, make_row, milliseconds


def measure(args: argparse.Namespace) -> Iterator[Row]:
    name, batch = ("test_resnet", 16) if args.quick else ("resnet50", 128)
    dense, data = make_model(name, 32, args.device), make_batch(batch, 32, args.device)
    for batches in (1, 4):
        ours = partial(prune, loader=[data], method="grasp", batches=batches)
        theirs = partial(bare, dense, data, batches, batches)
        pairs = milliseconds(alternate(ours, dense, theirs, args.runs or 5))
        case = f"batches={batches}"
        setting = f"{name} 32x32, batch {batch}"
        yield make_row("grasp", setting, case, "ms a call", pairs, 4.5)
