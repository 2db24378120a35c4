"""Measure the peak over a bare step's peak, in bytes per prunable weight.

Each peak is measured in a new process.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from harness.memory import fresh, of_process, peak
from harness.networks import bare, make_batch, make_model, prunable, prune
from torch import nn

from cost_sections.rows import Row, make_row


def peak_of(
    method: str,
    name: str,
    size: int,
    samples: int,
    batches: int,
    device: str,
    microbatch: int | None = None,
    guard: bool = True,
) -> int:
    """Return the bytes that a model and a few steps need.

    With an empty method, the steps are bare.
    """
    warnings.simplefilter("ignore")
    one = make_batch(2, 8, "cpu")
    prune(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), [one])  # imports come first
    before = of_process("VmRSS")
    model, data = make_model(name, size, device), make_batch(samples, size, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if method:
        options: dict[str, Any] = {"batches": batches, "microbatch": microbatch}
        prune(model, [data], method=method, steps=3, guard=guard, **options)
    else:
        bare(model, data, 3 * batches, batches)
    return peak(device) - (0 if device == "cuda" else before)


def measure(args: argparse.Namespace) -> Iterator[Row]:
    models = [("resnet50", 32, 128), ("vit_base_patch16_224", 224, 4)]
    methods = [("force", 1), ("iter_snip", 1), ("grasp_it", 1), ("force", 4)]
    if args.quick:
        models, methods = [("resnet18", 32, 2)], [("force", 1)]
    for name, size, samples in models:
        with torch.device("meta"):
            weights = prunable(make_model(name, size, "meta"))
        for method, batches in methods:
            pairs = []
            for _ in range(args.runs or 3):
                case = (name, size, samples, batches, args.device)
                ours, theirs = (fresh(peak_of, which, *case) for which in (method, ""))
                pairs.append((ours / weights, theirs / weights))
            yield make_row(
                "memory",
                f"{name} {size}x{size}, batch {samples}",
                f"{method}, batches={batches}",
                "bytes a weight",
                pairs,
                9,
                difference=True,
            )
