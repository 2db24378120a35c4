"""The k-th largest of many scores: ours beside PyTorch's and NumPy's.

    python benchmarks/selection.py
    python benchmarks/selection.py --sizes 1e6 1e7 1e8 1e9 --store selection.json

The scores are in tensors of the sizes of ResNet-50's layers, again and again, as a
network has them. ``torch.topk``, ``torch.kthvalue`` and ``numpy.partition`` take one
tensor, so that to concatenate is a part of what they do; ours does not. All of them are
called in turns, and what they find must be the same. A time is the least of the runs:
other processes only ever add to it.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import date
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor

from force_plugin.selection import kth_largest

INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x.abs_(),
    "mostly zeros": lambda x: x.mul_(x > 2),
    "all equal": lambda x: x.fill_(0.5),
    "denormal": lambda x: x.abs_().mul_(1e-40),
    "heavy tails": lambda x: x.pow_(9).abs_(),
}
# Shares of the scores that are at least the one to be found.
SHARES = {"k = 1": 0.0, "1 %": 0.01, "10 %": 0.1, "50 %": 0.5, "k = m - 1": 1.0}


def by_ours(scores: list[Tensor], k: int) -> float:
    return kth_largest(scores, k)[0]


def by_topk(scores: list[Tensor], k: int) -> float:
    return float(torch.topk(torch.cat(scores), k, sorted=False).values.min())


def by_kthvalue(scores: list[Tensor], k: int) -> float:
    merged = torch.cat(scores)
    return float(torch.kthvalue(merged, len(merged) - k + 1).values)


def by_partition(scores: list[Tensor], k: int) -> float:
    merged = torch.cat(scores).numpy()
    merged.partition(len(merged) - k)  # where it is, without another copy
    return float(merged[len(merged) - k])


def make_scores(size: int, kind: str, device: str) -> list[Tensor]:
    """Of ResNet-50's layers, until there are enough."""
    model = timm.create_model("resnet50", num_classes=10)
    layers = cycle([p.numel() for p in model.parameters() if p.ndim > 1])
    generator = torch.Generator(device).manual_seed(0)
    scores, left = [], size
    while left:
        length = min(next(layers), left)
        values = torch.randn(length, generator=generator, device=device)
        scores.append(INPUTS[kind](values))
        left -= length
    return scores


def measure(size: int, kind: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds of each, by the number that is asked for."""
    scores = make_scores(size, kind, args.device)
    methods = {"ours": by_ours, "topk": by_topk, "kthvalue": by_kthvalue}
    if args.device == "cpu":
        methods["partition"] = by_partition

    def seconds(
        run: Callable[[list[Tensor], int], float], k: int
    ) -> tuple[float, float]:
        if args.device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        found = run(scores, k)  # a number: it has waited for the device
        return time.perf_counter() - start, found

    rows = []
    for name, share in SHARES.items():
        k = min(max(1, int(share * size)), size - 1)
        times: dict[str, list[float]] = {method: [] for method in methods}
        for _ in range(args.runs):
            found = set()
            for method, run in methods.items():
                spent, value = seconds(run, k)
                times[method].append(1000 * spent)
                found.add(value)
            if len(found) > 1:
                raise AssertionError(f"{size} scores, {kind}, {name}: found {found}")
        row = {"size": size, "scores": kind, "asked": name}
        rows.append(row | {method: min(spent) for method, spent in times.items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e6, 2.5e7])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--store", type=Path, help="JSON file to write")
    args = parser.parse_args()

    machine = (
        f"{args.device}, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"torch {torch.__version__}, numpy {np.__version__}"
    )
    print(f"{machine}, milliseconds, the least of {args.runs}\n")
    rows = []
    for size in map(int, args.sizes):
        for kind in INPUTS:
            for row in measure(size, kind, args):
                if not rows:
                    columns = [f"{name:>10}" for name in list(row)[3:]]
                    print(
                        f"{'scores':>11}  {'':14}{'asked':10}{''.join(columns)}  ratio"
                    )
                others = [row[name] for name in list(row)[4:]]
                row["ratio"] = row["ours"] / min(others)
                times = "".join(f"{row[name]:10.2f}" for name in list(row)[3:-1])
                asked = f"{kind:14}{row['asked']:10}"
                print(f"{size:11,}  {asked}{times}{row['ratio']:7.2f}", flush=True)
                rows.append(row)
    print("\nratio: ours over the fastest of the others")
    if args.store:
        stored = {"machine": machine, "date": str(date.today()), "rows": rows}
        args.store.parent.mkdir(exist_ok=True)
        args.store.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
