"""What each of two ranks does in ``test_sharding.py``; torchrun starts it.

Everything that a rank has seen goes into one file, and the tests read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import timm
import torch
from distributed_worker import (
    STEPS,
    Batch,
    FirstColumns,
    Masks,
    Network,
    Routed,
    chain,
    images,
    part,
    routed,
    shard,
    train,
    whole,
)
from networks import batches
from processes import take_part
from selecting import top_k_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy, linear, mse_loss
from torch.utils.checkpoint import checkpoint

import force_plugin.pruning.loop
from force_plugin import (
    METHODS,
    apply_masks,
    diagnose,
    force_prune,
    get_masks,
    load_sparse,
    make_permanent,
    saliency,
    save_sparse,
    sparsity_report,
)
from force_plugin.methods.base import SaliencyMethod
from force_plugin.parallel.ranks import Ranks
from force_plugin.parallel.shards import Shards
from force_plugin.selection import top_k as selection


class Gated(nn.Module):
    """Closed gates of every kind, a layer of zeros, and one that is run twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, 6)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.gain = nn.Parameter(torch.zeros(6))
        self.last = nn.Linear(6, 1)
        self.head = nn.Linear(6, 3)
        nn.init.zeros_(self.norm.weight)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.head.weight)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = x + self.norm(torch.tanh(self.first(x)))
        x = x + self.gain * checkpoint(self._branch, x, use_reentrant=False)
        return self.head(x) + self.last(x)  # type: ignore[no-any-return]

    def _branch(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(x))


class Silent(nn.Module):
    """A layer whose inputs are 0, and one whose gradient ends."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.dead = nn.Linear(4, 6), nn.Linear(6, 6)
        self.flat, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = x + self.dead(torch.relu(-x.abs())) + torch.sign(self.flat(x))
        return self.head(x)  # type: ignore[no-any-return]


class Tied(nn.Module):
    """A weight of two modules, and one that is read without a call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(4, 5)
        self.inner, self.again = nn.Linear(5, 5), nn.Linear(5, 5)
        self.again.weight = self.inner.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.encoder(x))
        x = self.again(torch.tanh(self.inner(x)))
        return linear(x, self.encoder.weight.t())


class Normalised(SaliencyMethod):
    """Needs all of a weight at once, to compare its rows."""

    @staticmethod
    def score(weight: Tensor, gradient: Tensor) -> Tensor:
        score = (weight * gradient).abs()
        return score / score.norm(dim=0, keepdim=True)  # type: ignore[no-any-return]


def reconstruct(model: nn.Module, batch: Batch) -> Tensor:
    return mse_loss(model(batch[0]), batch[0])


def vectors(count: int = 4) -> list[Batch]:
    """Whole batches of eight."""
    return batches(count, 8, (4,), 3, seed=3)


def sharded(model: nn.Module, *units: str, **options: Any) -> nn.Module:
    for unit in units:
        fully_shard(model.get_submodule(unit), **options)
    fully_shard(model, **options)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    """What a rank holds, gradients and hooks included."""
    found = {}
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor)
        found[name] = p.to_local().detach().clone()
        if p.grad is not None:
            assert isinstance(p.grad, DTensor)
            found[f"{name}.grad"] = p.grad.to_local().clone()
    hooks = [
        (n, len(m._forward_hooks), len(m._forward_pre_hooks))
        for n, m in model.named_modules()
    ]
    return found | {str(hooks): torch.zeros(())}


def failed(run: Callable[[], object], model: nn.Module) -> str:
    """The error of a call that leaves the shards as they were."""
    before = state(model)
    try:
        run()
    except BaseException as error:
        after = state(model)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        return f"{type(error).__name__}: {error}"
    return "no error"


def selections(rank: int) -> list[str]:
    """Where the k largest of all shards are not those of the whole."""
    shards = Shards(model := shard(Network()), Ranks(model))
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(150_000, generator=generator, dtype=torch.float64)
    kinds = {
        "normal": values,
        "heavy tails": values.exp().pow(20),
        "mostly zeros": values * (values > 1.5),
        "few values": (values * 2).round(),
        "all equal": torch.ones_like(values),
        "pruned": values.masked_fill(values < 1, -torch.inf),
        "denormal": values * 5e-324,
    }
    wrong = []
    for kind, scores in kinds.items():
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            tensors = scores.to(dtype).split([140_000, 9_999, 1])
            tensors = (tensors[0].view(700, 4, 50), *tensors[1:])
            for k in (0, 1, 100, 10_001, 75_000, 149_999, 150_000):
                expected, threshold = top_k_of(tensors, k)
                own = [t.tensor_split(2)[rank] for t in tensors]
                masks, found = top_k_of(own, k, shards.totals)
                pairs = zip(masks, expected, strict=True)
                if found != threshold or not all(
                    torch.equal(mask, e.tensor_split(2)[rank]) for mask, e in pairs
                ):
                    wrong.append(f"{kind}, {dtype}, {k}")
    return wrong


def failures(rank: int) -> dict[str, str]:
    """Calls that go wrong on rank 1 alone, at any place of a pass."""
    batches = part(images(), rank)
    seen: dict[str, str] = {}

    def prune(what: str, loader: Any = batches, **options: Any) -> None:
        model = shard(Network())
        call = {"sparsity": 0.8, **STEPS, **options}
        seen[what] = failed(lambda: force_prune(model, loader, **call), model)
        # What is left is a network that trains.
        train(model, batches)

    def hooked(module: str, method: str) -> None:
        model = shard(Network())

        def hook(*args: object) -> None:
            if rank == 1:
                raise OSError(f"broken in {module or 'all'}")

        model.get_submodule(module).register_forward_hook(hook)
        seen[f"forward {module} {method}"] = failed(
            lambda: force_prune(model, batches, 0.8, method=method, **STEPS), model
        )

    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        def hook(gradient: Tensor) -> Tensor:
            if rank == 1:
                raise OSError("broken in the backward pass")
            return gradient

        outputs.register_hook(hook)
        return cross_entropy(outputs, targets)

    def interrupted(outputs: Tensor, targets: Tensor) -> Tensor:
        if rank == 1:
            raise KeyboardInterrupt
        return cross_entropy(outputs, targets)

    def bad() -> Iterator[Batch]:
        yield from batches[:2]
        if rank == 1:
            raise OSError("the disk is gone")
        yield from batches[2:]

    prune("empty loader", batches[: 6 * (1 - rank)])
    prune("loader raises", bad())
    prune("loss", loss_fn=interrupted)
    prune("backward", loss_fn=broken)
    prune("fewer batches", batches[: 3 - rank], batches=None)
    x, y = batches[0]
    few = [(x[: 4 - 2 * rank], y[: 4 - 2 * rank])]
    for method in ("force", "grasp"):
        prune(f"fewer parts {method}", few, microbatch=2, method=method)
    prune("compiled", compile=True)
    prune("no such method", method="forse" if rank else "force")
    for module in ("stem", "body", "head", ""):
        for method in ("force", "grasp", "synflow"):
            hooked(module, method)
    model = sharded(Routed())
    seen["routed"] = failed(lambda: saliency(model, [routed(rank)]), model)
    return seen


def misfits() -> dict[str, str]:
    """Models that cannot be pruned as they are sharded."""
    seen = {}
    mesh = init_device_mesh("cpu", (2,))
    tensor_parallel = parallelize_module(
        nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double(),
        mesh,
        {"0": ColwiseParallel()},
    )
    partly = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()
    fully_shard(partly[0])
    models = {
        "tensor parallel": tensor_parallel,
        "partly": partly,
        "fsdp 1": FullyShardedDataParallel(
            nn.Linear(4, 3).double(), device_id=torch.device("cpu")
        ),
    }
    for what, model in models.items():
        with pytest.raises(ValueError, match="shard") as error:
            force_prune(model, vectors(), 0.5, **STEPS)
        seen[what] = str(error.value)
    pruned = Network()
    force_prune(pruned, images(), 0.8, **STEPS)
    model = shard(pruned)
    seen["permanent"] = failed(lambda: make_permanent(model), model)
    masks, dense = get_masks(pruned), shard(Network())
    seen["masks"] = failed(lambda: apply_masks(dense, masks), dense)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        seen["saved"] = failed(lambda: save_sparse(dense, path), dense)
        save_sparse(Network(), path)
        seen["loaded"] = failed(lambda: load_sparse(dense, path), dense)
    return seen


def run(rank: int) -> dict[str, Any]:
    batches = part(images(), rank)
    seen: dict[str, Any] = {}

    # All methods, and how much of the scores a rank ever sees.
    loop: Any = force_plugin.pruning.loop
    select, largest = loop.top_k_masks, [0]

    def watched(scores: Masks, *rest: Any) -> Any:
        assert not any(isinstance(score, DTensor) for score in scores.values())
        largest[0] = max(largest[0], sum(score.numel() for score in scores.values()))
        return select(scores, *rest)

    loop.top_k_masks = watched
    for method in METHODS:
        for per_step in (1, 2, None):
            model = shard(Network())
            torch.manual_seed(10 + rank)
            report = force_prune(
                model, batches, 0.8, method=method, batches=per_step, **STEPS
            )
            seen[f"masks {method} {per_step}"] = get_masks(model)
            seen[f"report {method} {per_step}"] = report.to_dict()
            seen[f"counted {method} {per_step}"] = sparsity_report(model).to_dict()
        model = shard(Network())
        torch.manual_seed(10 + rank)
        scores = saliency(model, batches, method)
        assert all(isinstance(score, DTensor) for score in scores.values())
        seen[f"scores {method}"] = {n: whole(score) for n, score in scores.items()}
    seen["held"] = largest[0]
    loop.top_k_masks = select
    model = shard(Network())
    seen["rows"] = {
        n: whole(s) for n, s in saliency(model, batches, Normalised).items()
    }

    selection._SMALL = 1 << 14
    seen["selections"] = selections(rank)

    for method in METHODS:
        model = shard(Network())
        torch.manual_seed(10 + rank)
        usual = {"batches": 2, "microbatch": 3, "channels_last": True, **STEPS}
        force_prune(model, batches, 0.8, method=method, **usual)
        seen[f"in parts {method}"] = get_masks(model)

    # Gates, shared weights, other ways to shard.
    model = sharded(Gated(), "second", "norm")
    report = force_prune(model, part(vectors(), rank), 0.5, **STEPS)
    seen["gated"] = get_masks(model), report.to_dict()
    model = sharded(Gated(), "second")
    seen["diagnosis"] = str(diagnose(model, part(vectors(), rank), sparsity=0.5))
    report = force_prune(
        sharded(chain(), "2"),
        part(vectors(), rank),
        45 / 78,
        method=FirstColumns,
        progress=False,
    )
    seen["idle"] = report.to_dict()
    model = sharded(Silent(), "dead")
    with torch.no_grad():
        model(vectors()[0][0])  # leaves the root's own parameters whole
    report = force_prune(model, part(vectors(), rank), 0.5, **STEPS)
    seen["silent"] = report.to_dict()
    with torch.no_grad():
        model(vectors()[0][0])
    make_permanent(model)
    seen["silent, permanent"] = get_masks(model)
    for how, model in {
        "two units": sharded(Tied(), "encoder"),
        "one unit": sharded(Tied()),
    }.items():
        force_prune(model, part(vectors(), rank), 0.5, forward=reconstruct, **STEPS)
        seen[how] = get_masks(model)
    meshes: dict[str, tuple[tuple[int, int] | None, dict[str, Any]]] = {
        "replicas": ((2, 1), {}),
        "no replicas": ((1, 2), {}),
        "columns": (None, {"shard_placement_fn": lambda p: Shard(min(1, p.ndim - 1))}),
        "not resharded": (None, {"reshard_after_forward": False}),
    }
    for how, (mesh, options) in meshes.items():
        if mesh is not None:
            options["mesh"] = init_device_mesh(
                "cpu", mesh, mesh_dim_names=("replicate", "shard")
            )
        model = sharded(Network(), "body", **options)
        report = force_prune(model, batches, 0.8, **STEPS)
        seen[how] = get_masks(model), report.to_dict()
        # FSDP2 of torch 2.7 has no replicas on a CPU.
        if "replicas" not in how or torch.__version__ >= "2.8":
            seen[f"{how}, trained"] = train(model, batches)
    torch.manual_seed(0)
    model = timm.create_model("test_vit2", num_classes=5, img_size=32).double().eval()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(8, 3, 32, 32, generator=generator, dtype=torch.float64)
    y = torch.randint(5, (8,), generator=generator)
    report = force_prune(model, part([(x, y)], rank), 0.9, **STEPS)
    seen["vit"] = get_masks(model), report.to_dict()

    # What it leaves behind.
    model = shard(Network())
    cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    seen["gradients"] = [{n: whole(p.grad) for n, p in model.named_parameters()}]
    with torch.no_grad():
        model(batches[0][0])  # leaves the root's own parameters whole
    saliency(model, batches)
    seen["gradients"].append({n: whole(p.grad) for n, p in model.named_parameters()})
    force_prune(model, batches, 0.8, **STEPS)
    seen["trained"] = train(model, batches)
    earlier = get_masks(model)
    again = force_prune(model, batches, 0.9, **STEPS)
    seen["again"] = again.kept, earlier, get_masks(model)
    model = Network()
    force_prune(model, batches, 0.8, **STEPS)
    make_permanent(model)
    force_prune(shard(model), batches, 0.9, **STEPS)
    seen["permanent, again"] = earlier, get_masks(model)

    # A restart: the zeros of a checkpoint are held in the shards of a fresh model.
    model = shard(Network())
    force_prune(model, batches, 0.8, **STEPS)
    full = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    checkpoint = get_model_state_dict(model, options=full)
    fresh = shard(Network(seed=1))
    set_model_state_dict(fresh, checkpoint, options=full)
    make_permanent(fresh)
    seen["restart"] = get_masks(model), get_masks(fresh)
    seen["restart, trained"] = train(fresh, batches)

    seen["failures"] = failures(rank)
    seen["misfits"] = misfits()
    return seen


if __name__ == "__main__":
    take_part(run)
