"""Time the selection of the k largest scores: ours, PyTorch's and NumPy's.

    python benchmarks/selection.py
    python benchmarks/selection.py --sizes 1e6 1e7 1e8 1e9 --store selection.json

The scores lie in tensors, as in a network: the sizes of ResNet-50's layers, repeated.
Each tensor gets a mask. ``torch.topk``, ``torch.kthvalue`` and ``numpy.partition`` take
a single tensor, so their time includes the concatenation. They mark scores by ``>=``,
which marks too many of equal scores; only our code marks exactly k.

All methods take turns, and must find equal k-th largest scores. A method that would
need more than four fifths of the memory is left out: ``topk`` sorts pairs of 16 bytes,
``kthvalue`` keeps an index of 8 bytes beside a copy. A time is the least of all runs,
because other processes can only add time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any

import timm
import torch
from harness.machine import in_words
from harness.options import parser_of
from harness.storage import write_json
from harness.timing import timed
from torch import Tensor

from force_plugin.selection.top_k import top_k_masks

Method = Callable[[list[Tensor], int], float]

INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x.abs_(),
    "mostly zeros": lambda x: x.mul_(x > 2),
    "all equal": lambda x: x.fill_(0.5),
    "denormal": lambda x: x.abs_().mul_(1e-40),
    "heavy tails": lambda x: x.pow_(9).abs_(),
}
# Shares k / m of the scores to select.
SHARES = {"k = 1": 0.0, "1 %": 0.01, "10 %": 0.1, "50 %": 0.5, "k = m - 1": 1.0}


def by_ours(scores: list[Tensor], k: int) -> float:
    return top_k_masks({str(n): s for n, s in enumerate(scores)}, k)[1]


def by_topk(scores: list[Tensor], k: int) -> float:
    return marked(scores, torch.topk(torch.cat(scores), k, sorted=False).values.min())


def by_kthvalue(scores: list[Tensor], k: int) -> float:
    merged = torch.cat(scores)
    return marked(scores, torch.kthvalue(merged, len(merged) - k + 1).values)


def by_partition(scores: list[Tensor], k: int) -> float:
    merged = torch.cat(scores).numpy()
    merged.partition(len(merged) - k)  # in place, without another copy
    return marked(scores, torch.tensor(merged[len(merged) - k]))


def marked(scores: list[Tensor], threshold: Tensor) -> float:
    _ = [score >= threshold for score in scores]
    return float(threshold)


def make_scores(size: int, kind: str, device: str) -> list[Tensor]:
    """Return ``size`` scores in tensors of the sizes of ResNet-50's layers."""
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


def methods(size: int, device: str) -> dict[str, Method]:
    """Return the methods that fit into memory, by name."""
    # Each with the bytes per score that it needs beside the scores and the masks.
    every: dict[str, tuple[Method, int]] = {
        "ours": (by_ours, 0),
        "topk": (by_topk, 4 + 16),
        "kthvalue": (by_kthvalue, 4 + 12),
        "partition": (by_partition, 4),
    }
    if device == "cpu":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        del every["partition"]
        memory = torch.cuda.mem_get_info(device)[1]
    room = 0.8 * memory / size - 5
    return {name: method for name, (method, need) in every.items() if need <= room}


def rows(
    sizes: Sequence[int],
    kinds: Sequence[str] = tuple(INPUTS),
    shares: Sequence[str] = tuple(SHARES),
    runs: int = 5,
    device: str = "cpu",
) -> Iterator[dict[str, Any]]:
    """Yield the milliseconds of all runs of all methods, a row for each case."""
    for size, kind in product(sizes, kinds):
        found = methods(size, device)
        scores = make_scores(size, kind, device)
        for share in shares:
            k = min(max(1, int(SHARES[share] * size)), size - 1)
            times: dict[str, list[float]] = {method: [] for method in found}
            for _ in range(runs):
                values = set()
                for method, run in found.items():
                    spent, value = timed(partial(run, scores, k))
                    times[method].append(1000 * spent)
                    values.add(value)
                if len(values) > 1:
                    raise AssertionError(f"{size} scores, {kind}, {share}: {values}")
            yield {"size": size, "scores": kind, "asked": share, "times": times}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e6, 2.5e7])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--store", type=Path, help="JSON file to write")
    args = parser.parse_args()

    machine = in_words(args.device, torch.get_num_threads(), "torch", "numpy")
    print(f"{machine}, milliseconds, the least of {args.runs}\n")
    names = ["ours", "topk", "kthvalue", "partition"]
    columns = "".join(f"{name:>10}" for name in names)
    print(f"{'scores':>11}  {'':14}{'asked':10}{columns}  ratio")
    stored = []
    for row in rows([int(s) for s in args.sizes], runs=args.runs, device=args.device):
        least = {name: min(times) for name, times in row.pop("times").items()}
        row |= least
        times = "".join(
            f"{least[name]:10.2f}" if name in least else f"{'-':>10}" for name in names
        )
        row["ratio"] = least.pop("ours") / min(least.values())
        asked = f"{row['scores']:14}{row['asked']:10}"
        print(f"{row['size']:11,}  {asked}{times}{row['ratio']:7.2f}", flush=True)
        stored.append(row)
    print("\nratio: ours over the fastest of the others")
    if args.store:
        record = {"machine": machine, "date": str(date.today()), "rows": stored}
        write_json(args.store, record)


if __name__ == "__main__":
    main()
