"""What each of two ranks does in ``test_distributed.py``; torchrun starts it.

Everything that a rank has seen goes into one file, and the tests read it.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from networks import batches
from processes import take_part
from state import failed
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import force_plugin.pruning.loop
from force_plugin import (
    METHODS,
    diagnose,
    force_prune,
    get_masks,
    make_permanent,
    saliency,
    sparsity_report,
)
from force_plugin.methods.base import SaliencyMethod

Batch = tuple[Tensor, Tensor]
Masks = dict[str, Tensor]
STEPS: dict[str, Any] = {"steps": 4, "progress": False, "on_collapse": "warn"}


class Network(nn.Module):
    """Convolutions and linear layers without batch statistics, in float64."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.GroupNorm(2, 6)
        self.body = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(32, 5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.body(torch.relu(self.norm(self.stem(x)))))
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


class Routed(nn.Module):
    """A closed branch that only batches with a positive first value go through."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(4, 6)
        self.branch = nn.Linear(6, 6)
        self.gain = nn.Parameter(torch.zeros(1))
        self.head = nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.shared(x))
        if x[0, 0] > 0:
            y = y + self.gain * torch.tanh(self.branch(y))
        return self.head(y)  # type: ignore[no-any-return]


def images(count: int = 6) -> list[Batch]:
    """Whole batches of eight."""
    return batches(count, 8, (2, 4, 4), 5)


def routed(rank: int) -> Batch:
    """A batch that takes the branch on rank 1, and not on rank 0."""
    generator = torch.Generator().manual_seed(2 + rank)
    x = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    x[0, 0] = 1.0 if rank else -1.0
    return x, torch.randint(3, (4,), generator=generator)


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    widths = ((4, 6), (6, 6), (6, 3))
    layers = [nn.Linear(*width, bias=False, dtype=torch.float64) for width in widths]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class FirstColumns(SaliencyMethod):
    """Keeps all that four inputs are read by, and of other layers the first column."""

    steps = 1

    @staticmethod
    def score(weight: Tensor, gradient: Tensor) -> Tensor:
        score = torch.zeros_like(weight)
        score[:, : None if weight.shape[1] == 4 else 1] = 1
        return score


def part(batches: list[Batch], rank: int) -> list[Batch]:
    """Each rank's half of every batch."""
    return [(x[rank::2], y[rank::2]) for x, y in batches]


def train(model: nn.Module, batches: list[Batch]) -> dict[str, Any]:
    """Three steps; the losses, the last gradients and the weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for x, y in batches[:3]:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    parameters = dict(model.named_parameters())
    return {
        "losses": losses,
        "gradients": {n: whole(p.grad) for n, p in parameters.items()},
        "state": {n: whole(v) for n, v in model.state_dict().items()},
    }


def whole(tensor: Tensor | None) -> Tensor:
    """The values of a tensor that may be sharded."""
    assert tensor is not None
    return (
        (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
        .detach()
        .clone()
    )


def shard(model: Any) -> Any:
    """Two layers together, one by itself, and the rest, as FSDP2 is used."""
    for unit in ([model.stem, model.norm], model.body, model):
        fully_shard(unit)
    return model


def one_rank_fails(rank: int) -> dict[str, str]:
    """Calls that go wrong on rank 1 alone."""
    batches = part(images(), rank)
    seen: dict[str, str] = {}

    def prune(what: str, loader: Any, **options: Any) -> None:
        model = Network()
        seen[what] = failed(
            lambda: force_prune(model, loader, **{"sparsity": 0.8, **STEPS, **options}),
            model,
        )

    def broken(kind: str, after: int) -> Callable[[Tensor, Tensor], Tensor]:
        calls = [0]

        def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
            calls[0] += 1
            if rank == 1 and calls[0] > after:
                if kind == "interrupt":
                    raise KeyboardInterrupt
                return cross_entropy(outputs, targets) * float("nan")
            return cross_entropy(outputs, targets)

        return loss_fn

    def bad(batches: list[Batch]) -> Iterator[Batch]:
        yield from batches[:2]
        if rank == 1:
            raise OSError("the disk is gone")
        yield from batches[2:]

    prune("dry", iter(batches[: 2 if rank == 1 else 6]))
    prune("no loader", 3 if rank == 1 else batches)
    prune("loader raises", bad(batches))
    prune("nan", batches, loss_fn=broken("nan", 2))
    prune("nan in the first", batches, loss_fn=broken("nan", 0))
    prune("nan in the last", batches, loss_fn=broken("nan", 3))
    prune("nan in grasp", batches, loss_fn=broken("nan", 1), method="grasp", batches=2)
    prune("interrupt", batches, loss_fn=broken("interrupt", 1))
    prune("no such method", batches, method="forse" if rank == 1 else "force")
    prune("sparsity out of range", batches, sparsity=1.0 - (1 - rank) / 2)
    prune("no such schedule", batches, schedule="bogus" if rank == 1 else "linear")
    return seen


def run(rank: int) -> dict[str, Any]:
    batches = part(images(), rank)
    seen: dict[str, Any] = {}
    model: Any
    options: dict[str, Any]

    for name in METHODS:
        for per_step in (1, 2, None):
            model = Network()
            torch.manual_seed(10 + rank)  # as of "random" on ranks that drew before
            report = force_prune(
                model, batches, 0.8, method=name, batches=per_step, **STEPS
            )
            seen[f"masks {name} {per_step}"] = get_masks(model)
            seen[f"report {name} {per_step}"] = report.to_dict()
        torch.manual_seed(10 + rank)
        seen[f"scores {name}"] = saliency(Network(), batches, name)
    # Rank 0 has two of three batches.
    uneven = images()[:2] if rank == 0 else images()[2:3]
    for name in ("force", "snip_it", "grasp"):
        seen[f"uneven {name}"] = saliency(Network(), uneven, name, batches=None)

    wrapped = DistributedDataParallel(Network())
    report = force_prune(wrapped, batches, 0.8, **STEPS)
    seen["names"] = [
        [layer.name for layer in report.layers],
        list(get_masks(wrapped)),
        [layer.name for layer in sparsity_report(wrapped).layers],
    ]
    seen["wrapped diagnosis"] = [
        str(diagnose(model, batches)) for model in (wrapped, wrapped.module)
    ]
    seen["wrapped, then pruned"] = train(wrapped, batches)
    wraps: dict[str, Callable[[nn.Module], nn.Module]]
    wraps = {"wrapped": DistributedDataParallel, "sharded": shard}
    for how, wrap in wraps.items():
        for form in ("pruned", "permanent"):
            inner = Network()
            force_prune(inner, batches, 0.8, **STEPS)
            if form == "permanent":
                make_permanent(inner)
            seen[f"{form}, then {how}"] = train(wrap(inner), batches)

    nested: Any = Network()
    pruned = Network()
    nested.body = DistributedDataParallel(nested.body)
    force_prune(pruned, batches, 0.5, **STEPS)
    for what, model in {"nested": nested, "pruned and sharded": shard(pruned)}.items():
        for name in ("force_prune", "saliency"):
            call = getattr(force_plugin, name)
            options = {"sparsity": 0.8} if name == "force_prune" else {}
            seen[f"{what} {name}"] = failed(partial(call, model, batches, **options))

    touched: list[int] = []

    def watched() -> Iterator[Batch]:
        touched.append(1)
        yield from batches

    for method in ("force", "magnitude"):
        model = Network(seed=rank)
        seen[f"seeds {method}"] = failed(
            partial(force_prune, model, watched(), 0.8, method=method, **STEPS), model
        )
    seen["seeds saliency"] = failed(lambda: saliency(Network(seed=rank), watched()))
    seen["read"] = touched
    for option, values in {
        "sparsity": (0.8, 0.9),
        "steps": (4, 5),
        "method": ("force", "iter_snip"),
        "open_gates": (True, False),
        "guard": (True, False),
    }.items():
        model = Network()
        options = {"sparsity": 0.8, **STEPS, option: values[rank]}
        seen[f"other {option}"] = failed(
            partial(force_prune, model, batches, **options), model
        )
    seen |= {f"fails: {k}": v for k, v in one_rank_fails(rank).items()}

    batch = (torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3)
    idle = force_prune(chain(), [batch], 45 / 78, method=FirstColumns, progress=False)
    seen["idle"] = idle.to_dict()

    model = Routed()
    seen["gates"] = [force_prune(model, [routed(rank)], 0.5, **STEPS).warnings]
    seen["gates masks"] = get_masks(model)
    seen["routed scores"] = saliency(Routed(), [routed(rank)], "snip")

    # All units are dead on rank 1.
    seen["dead on one"] = []
    for forward in (
        None,
        lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
    ):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
        model[0].weight.data.abs_()
        x = torch.ones(4, 4, dtype=torch.float64) * (1 - 1e6 * rank)
        options = {"method": "snip", "progress": False, "forward": forward}
        seen["dead on one"].append(
            failed(partial(force_prune, model, [(x, routed(0)[1])], 0.5, **options))
        )

    # A rank by itself.
    if rank == 0:
        seen["diagnosis"] = str(diagnose(Network(), batches))
    dist.barrier()

    standard_error = io.StringIO()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with contextlib.redirect_stderr(standard_error):
            force_prune(
                Network(), batches, 0.99, steps=2, method="snip", on_collapse="warn"
            )
    seen["bar"] = standard_error.getvalue()
    seen["warnings"] = [str(warning.message) for warning in caught]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Network()
        seen["warnings are errors"] = failed(
            lambda: force_prune(
                model,
                batches,
                0.99,
                steps=2,
                method="snip",
                on_collapse="warn",
                progress=False,
            ),
            model,
        )

    if rank == 1:
        loop: Any = force_plugin.pruning.loop
        select = loop.top_k_masks

        def other(scores: Masks, *rest: Any) -> tuple[Masks, float]:
            masks, threshold = select(scores, *rest)
            first = next(iter(masks))
            return masks | {first: masks[first].roll(1)}, threshold

        loop.top_k_masks = other
    model = Network()
    seen["other masks"] = failed(
        lambda: force_prune(model, batches, 0.8, **STEPS), model
    )
    return seen


if __name__ == "__main__":
    take_part(run)
