"""Measure SynFlow over passes of a positive float64 network, converted once."""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Iterator
from functools import partial

import torch
from harness.networks import make_batch, make_model, prune
from harness.timing import seconds
from harness.turns import STEPS, seconds_bare
from torch import Tensor, nn

from cost_sections.rows import Row, make_row, milliseconds


def measure(args: argparse.Namespace) -> Iterator[Row]:
    models, sizes, few, more = ["resnet50", "vgg16_bn"], [32, 224], 2, 10
    if args.quick:
        models, sizes, more = ["test_resnet"], [32], 4
    for size in sizes:
        for name in models:
            dense = make_model(name, size, args.device)
            loader = [make_batch(2, size, args.device)]
            ours = partial(prune, loader=loader, method="synflow")
            # As in the authors' code: one conversion, forward and backward passes.
            positive = copy.deepcopy(dense).double().eval()
            for tensor in (*positive.parameters(), *positive.buffers()):
                tensor.data.abs_()
            ones = torch.ones(1, 3, size, size, dtype=torch.float64)
            theirs = partial(flow, positive, ones.to(args.device), more)
            found, once = [], []
            for _ in range((args.runs or 3) + 1):
                # All steps use a single batch, so no loader can stop our clock.
                short, long = (
                    seconds(partial(ours, copy.deepcopy(dense), steps=steps))
                    for steps in (few, few + more)
                )
                step = (long - short) / more
                once.append(short - few * step)
                found.append((step + once[-1] / STEPS, seconds_bare(theirs) / more))
            note = f"done once: {1000 * statistics.median(once[1:]):.0f} ms"
            pairs = milliseconds(found[1:])  # the first is a warm-up
            setting = f"{size}x{size}"
            row = ("synflow", setting, name, "ms a step", pairs, 1.12)
            yield make_row(*row, note=note)


def flow(positive: nn.Module, ones: Tensor, number: int) -> None:
    for _ in range(number):
        torch.autograd.backward(positive(ones).sum())
        positive.zero_grad()
