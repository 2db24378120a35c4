"""Measure steps of ten batches with images of 224x224."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from harness.networks import bare, make_batch, make_model
from harness.turns import take_turns

from cost_sections.rows import Row, row_of_few


def measure(args: argparse.Namespace) -> Iterator[Row]:
    # Batch sizes for which a step of ten batches takes about four seconds on two cores.
    models = {
        "resnet18": 8,
        "resnet50": 4,
        "vit_base_patch16_224": 2,
        "convnext_tiny": 4,
    }
    size, batches = 224, 10
    if args.quick:
        models, size, batches = {"test_resnet": 2, "test_vit": 2}, 64, 3
    for name, samples in models.items():
        dense = make_model(name, size, args.device)
        data = make_batch(samples, size, args.device)
        bare(dense, data, 2)  # warm-up
        turns = [
            take_turns(dense, data, 4, batches=batches) for _ in range(args.runs or 3)
        ]
        setting = f"{size}x{size}, {batches} batches a step, force"
        remark = f"batch {samples}; "
        yield row_of_few("large", setting, name, turns, remark, bound=1.03)
