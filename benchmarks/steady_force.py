"""The study behind SteadyFORCE: each of its parts left out, and other returns.

    python benchmarks/steady_force.py                              # half an hour
    python benchmarks/steady_force.py --table docs/steady-force-table.md

The networks are those of ``evidence.py``, on Fashion-MNIST. Each is pruned, and not
trained. A cell has two numbers, measured on ten other batches. The first is the share
of live weights: kept weights with a saliency other than 0. The second is the objective
of FORCE, the sum of |weight * gradient| over the kept weights in the pruned network (de
Jorge et al. 2021, arXiv 2006.09081, equation 4).

A finished run is a line of JSON in ``--out`` and is not run again. Several processes
may share the work, with other ``--networks`` each.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from evidence_networks import Batches, load, make
from harness.fashion_mnist import add_folder, need_folder
from harness.machine import made_with
from harness.options import add_threads, parser_of, use_threads
from harness.storage import append_run, read_runs
from harness.tables import markdown, percent
from torch import Tensor, nn
from tqdm import tqdm

from force_plugin import (
    FORCE,
    IterSNIP,
    SaliencyMethod,
    SteadyFORCE,
    force_prune,
    get_masks,
    saliency,
)
from force_plugin.files import write_whole

HERE = Path(__file__)
NETWORKS = ("resnet_small", "vgg_small")
SEEDS = (0, 1, 2)
# Sparsity, steps and schedule.
CELLS = (
    (0.95, 5, "exponential"),
    (0.99, 5, "exponential"),
    (0.99, 10, "exponential"),
    (0.99, 60, "exponential"),
    (0.99, 20, "linear"),
    (0.995, 10, "exponential"),
    (0.995, 10, "linear"),
    (0.999, 60, "exponential"),
)


class WithoutLevelling(SteadyFORCE):
    """Saliencies are not divided by the root of what their layer has."""

    levelling = 0.0


class WithoutMemory(SteadyFORCE):
    """The ranking is by the saliencies of the step alone."""

    longest = 0.0


class WithoutRefinement(SteadyFORCE):
    """No step stays at the final density."""

    refining = 0


class ReturnsOfFORCE(SteadyFORCE):
    """Pruned weights count as kept weights do, behind a normalisation too."""

    returning = 1.0

    @classmethod
    def measure(cls, probe: Any) -> Mapping[str, Tensor]:  # noqa: D102
        probe.scale_free = lambda gradients: set()
        return super().measure(probe)


class ReturnsBySpread(ReturnsOfFORCE):
    """Pruned weights count by a quarter of the spread that their channel has left.

    The spread is the standard deviation of the layer's output, relative to that of the
    dense network, and at most 1.
    """

    @classmethod
    def measure(cls, probe: Any) -> Mapping[str, Tensor]:  # noqa: D102
        spreads: dict[str, Tensor] = {}

        def note(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
            channels = output.detach().transpose(0, 1).flatten(1)
            spreads[f"{name}.weight"] = (channels.var(1, correction=0) + 1e-5).sqrt()

        hooks = [
            module.register_forward_hook(partial(note, name))
            for name, module in probe.model.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
        ]
        gradients = super().measure(probe)
        for hook in hooks:
            hook.remove()
        if probe.masks is None:
            probe.memory["spreads"] = spreads
            return gradients
        for name, gradient in gradients.items():
            left = (spreads[name] / probe.memory["spreads"][name]).clamp_max(1) / 4
            factor = left.view(-1, *[1] * (gradient.dim() - 1))
            gradient *= torch.where(probe.masks[name], 1, factor)
        return gradients


class NoReturns(SteadyFORCE):
    """Pruned weights return by the memory alone, wherever they are."""

    returning = 0.0


# The columns of the two tables.
PARTS: dict[str, type[SaliencyMethod]] = {
    "FORCE": FORCE,
    "Iter SNIP": IterSNIP,
    "SteadyFORCE": SteadyFORCE,
    "without levelling": WithoutLevelling,
    "without memory": WithoutMemory,
    "without refinement": WithoutRefinement,
}
RETURNS: dict[str, type[SaliencyMethod]] = {
    "SteadyFORCE": SteadyFORCE,
    "returns as in FORCE": ReturnsOfFORCE,
    "by the spread": ReturnsBySpread,
    "by memory alone": NoReturns,
}
METHODS = PARTS | RETURNS


@dataclass(frozen=True)
class Run:
    """The options that determine a mask."""

    network: str
    method: str
    sparsity: float
    steps: int
    schedule: str
    seed: int


def execute(run: Run, data: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Prune a network as published, without the guard, and measure its mask."""
    model = make(run.network, run.seed).to(memory_format=torch.channels_last)
    force_prune(
        model,
        Batches(*data, 128, 10 * run.seed),
        run.sparsity,
        method=METHODS[run.method],
        steps=run.steps,
        schedule=run.schedule,
        on_collapse="warn",
        guard=False,
        progress=False,
    )
    others = Batches(*data, 128, 10 * run.seed + 2)
    scores = saliency(model, others, "force", batches=10)
    kept = torch.cat([scores[name][mask] for name, mask in get_masks(model).items()])
    live = int(kept.count_nonzero()) / len(kept)
    return {"live": live, "objective": float(kept.sum()), **made_with()}


def table(done: dict[Run, dict[str, Any]]) -> str:
    """Return the means over the seeds in Markdown, two tables for each network."""
    lines = []
    for network, columns in product(NETWORKS, (PARTS, RETURNS)):
        titles = [f"`{network}`", *columns]
        rows = []
        for sparsity, steps, schedule in CELLS:
            cells = [f"{percent(sparsity)}, {steps} {schedule}"]
            for method in columns:
                cell = network, method, sparsity, steps, schedule
                found = [
                    done[run] for seed in SEEDS if (run := Run(*cell, seed)) in done
                ]
                live = mean(one["live"] for one in found) if found else 0
                objective = mean(one["objective"] for one in found) if found else 0
                cells.append(f"{live:.3f} / {objective:.3g}" if found else "–")
            rows.append(cells)
        lines += [*markdown(titles, rows), ""]
    versions = [*done.values()][-1]
    lines.append(
        "Share of live weights / objective of FORCE, means of three seeds. torch "
        f"{versions['torch']}, timm {versions['timm']}, {versions['date']}."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--out", type=Path, default=HERE.with_suffix(".jsonl"))
    parser.add_argument("--table", type=Path, help="only write a table of the results")
    add_folder(parser)
    add_threads(parser)
    args = parser.parse_args()
    done = read_runs(args.out, Run)
    if args.table:
        write_whole(args.table, table(done).encode())
        return
    need_folder(parser, args.data)
    use_threads(args)
    warnings.simplefilter("ignore", UserWarning)
    data = load("fashion", args.data, "cpu")["train"]
    runs = [
        Run(network, method, *cell, seed)
        for network in args.networks
        for cell in CELLS
        for method in METHODS
        for seed in SEEDS
    ]
    for run in tqdm([run for run in runs if run not in done], "runs", file=sys.stderr):
        append_run(args.out, run, execute(run, data))


if __name__ == "__main__":
    main()
