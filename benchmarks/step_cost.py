"""Cost of a FORCE step over the bare gradients of the same batch.

    python benchmarks/step_cost.py

ResNet-50 at 32×32, batch 128, as in the FORCE paper's CIFAR experiments. A run times
``force_prune`` over a number of steps (everything it does: masking, gradients, scores,
selection, pruning the model at the end) against as many bare steps, forward and
``loss.backward()``; the runs alternate, and the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable

import timm
import torch

from force_plugin import force_prune


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronise()
    start = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet50", help="any timm model")
    parser.add_argument("--size", type=int, default=32, help="height and width")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8, help="steps of one run")
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each side")
    parser.add_argument("--method", default="force")
    parser.add_argument("--sparsity", type=float, default=0.9)
    args = parser.parse_args()
    warnings.simplefilter("ignore")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    kwargs = {"zero_init_last": False} if args.model.startswith("resnet") else {}
    model = timm.create_model(args.model, num_classes=10, **kwargs).to(device)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    inputs = torch.randn(args.batch_size, 3, args.size, args.size, device=device)
    targets = torch.randint(10, (args.batch_size,), device=device)

    def bare() -> None:
        for _ in range(args.steps):
            loss = torch.nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            model.zero_grad()

    def pruned() -> torch.nn.Module:
        fresh = timm.create_model(args.model, num_classes=10, **kwargs).to(device)
        fresh.load_state_dict(state)
        return fresh

    ours, theirs = [], []
    for run in range(args.runs + 1):
        dense = seconds(bare)
        fresh = pruned()
        scored = seconds(
            lambda fresh=fresh: force_prune(
                fresh,
                [(inputs, targets)],
                args.sparsity,
                method=args.method,
                steps=args.steps,
                on_collapse="warn",  # what is kept of random data does not matter here
                progress=False,
            )
        )
        if run:  # the first warms up
            theirs.append(dense / args.steps)
            ours.append(scored / args.steps)

    def line(name: str, times: list[float]) -> str:
        low, mid, high = min(times), statistics.median(times), max(times)
        return f"{name:<24}{mid:>10.3f}{low:>10.3f}{high:>10.3f}"

    ratio = statistics.median(ours) / statistics.median(theirs)
    print(
        f"{args.model} at {args.size}x{args.size}, batch {args.batch_size}, "
        f"{args.steps} steps, {args.runs} runs"
    )
    print(
        f"{device}, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"torch {torch.__version__}, timm {timm.__version__}\n"
    )
    print(f"{'seconds a step':<24}{'median':>10}{'min':>10}{'max':>10}")
    print(line("forward + backward", theirs))
    print(line(f"force_prune {args.method}", ours))
    print(f"\nratio {ratio:.3f}")


if __name__ == "__main__":
    main()
