"""Measure the cost of a pruned model's training step over the dense model's step.

    python benchmarks/training_cost.py

A step is forward, backward and the optimizer's step. Four processes hold four forms of
one model: dense, pruned by plain ``torch.nn.utils.prune``, pruned by force_plugin, and
pruned by force_plugin after ``make_permanent``. The processes take turns, a step each,
while the others wait. Ratios are ratios of medians. Four further processes, one after
the other, measure the peaks of memory. In these processes, freed memory returns to the
system at once, so a peak is memory in use.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from functools import partial
from multiprocessing.connection import Connection

import timm
import torch
from harness.machine import in_words
from harness.memory import freed_at_once, peak
from harness.options import add_threads, parser_of, use_threads
from harness.timing import seconds
from harness.training import step
from torch import nn
from torch.nn.utils import prune

from force_plugin import apply_masks, make_permanent

FORMS = ("dense", "torch.nn.utils.prune", "ours", "ours, permanent")


def build(form: str, args: argparse.Namespace) -> nn.Module:
    """Return the model, pruned at random; the cost does not depend on the masks."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(args.model, num_classes=1000)
    masks = {
        f"{name}.weight": torch.rand(module.weight.shape) < 1 - args.sparsity
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    if form == "torch.nn.utils.prune":
        for name, mask in masks.items():
            path = name.removesuffix(".weight")
            prune.custom_from_mask(model.get_submodule(path), "weight", mask)
    elif form != "dense":
        apply_masks(model, masks)
    if form == "ours, permanent":
        make_permanent(model)
    return model


def work(form: str, args: argparse.Namespace, turns: Connection) -> None:
    """Take a step for each request, and send back its seconds."""
    use_threads(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(form, args).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4)
    inputs = torch.randn(args.batch_size, 3, args.size, args.size, device=device)
    targets = torch.randint(1000, (args.batch_size,), device=device)

    turns.send(torch.get_num_threads())
    while turns.recv():
        turns.send(seconds(partial(step, model, optimizer, (inputs, targets))))
    turns.send(peak(device) / 2**20)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="resnet50", help="any timm model")
    parser.add_argument("--size", type=int, default=224, help="height and width")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--steps", type=int, default=9, help="counted steps of each")
    add_threads(parser)
    args = parser.parse_args()

    context = multiprocessing.get_context("spawn")

    def start(form: str) -> tuple[Connection, int]:
        ours, theirs = context.Pipe()
        context.Process(target=work, args=(form, args, theirs), daemon=True).start()
        return ours, ours.recv()

    def one_step(end: Connection) -> float:
        end.send(True)
        return float(end.recv())

    def finish(end: Connection) -> float:
        end.send(False)
        return float(end.recv())

    ends = {}
    for form in FORMS:
        ends[form], threads = start(form)
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for number in range(args.steps + 2):
        for form, end in ends.items():
            spent = one_step(end)
            if number > 1:  # the first two are a warm-up
                times[form].append(spent)
    for end in ends.values():
        finish(end)
    memory = {}
    with freed_at_once():
        for form in FORMS:
            end, _ = start(form)
            one_step(end)
            one_step(end)
            memory[form] = finish(end)

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    print(
        f"{args.model} at {args.size}x{args.size}, batch {args.batch_size}, "
        f"{args.steps} steps, sparsity {args.sparsity}\n"
        f"{in_words(kind, threads, 'torch', 'timm')}\n"
    )
    print(f"{'':22}{'seconds a step':>20}{'ratio':>8}{'peak MB':>12}{'ratio':>8}")
    base = statistics.median(times["dense"])
    for form in FORMS:
        middle = statistics.median(times[form])
        spread = f"{middle:.3f} ({min(times[form]):.3f})"
        print(
            f"{form:22}{spread:>20}{middle / base:8.3f}"
            f"{memory[form]:12.0f}{memory[form] / memory['dense']:8.3f}"
        )


if __name__ == "__main__":
    main()
