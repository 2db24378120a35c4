"""A network that FSDP2 has sharded: each rank holds a shard of every parameter.

During a measurement, the shards of a parameter are put together when the network reads
the parameter, and again for the backward pass. The whole parameter is never kept. Its
gradient is divided among the ranks as soon as it is computed. So a rank holds its
shards of weights, scores and masks, and the whole of the parameter in use. FSDP2 itself
does this in training. But its backward pass has no derivative, which GraSP needs, and a
rank that fails leaves the other ranks waiting.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from force_plugin.model.torch_internals import remove_hooks, version
from force_plugin.model.weights import (
    Weight,
    is_sharded,
    local_values,
    mask_of,
    named_parameters,
)
from force_plugin.parallel.ranks import ALONE, Ranks
from force_plugin.parallel.totals import Totals

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


class Shards:
    """The division of a network's parameters among the ranks.

    If the network is not sharded, each shard is the whole parameter, and nothing is
    exchanged.

    Args:
        model: The network. Parameters that FSDP2 has put together are freed.
        ranks: The ranks that hold the network.

    Attributes:
        ranks: The ``ranks`` argument.
        parameters: Every parameter of the network by name.
        sharded: Whether the network is sharded.
        totals: Sums over all shards.

    Raises:
        ValueError: The network is sharded in another way than by ``fully_shard`` alone
            (FSDP1, tensor parallelism), over other ranks, or off its device, or it was
            pruned before it was sharded.
    """

    def __init__(self, model: nn.Module, ranks: Ranks = ALONE) -> None:  # noqa: D107
        self.ranks = ranks
        self._layouts: dict[str, DTensor] = {}
        units = sharded_modules(model)
        if units:
            ranks.vote()  # all ranks must take part in the following calls
        for unit in units:
            unit.reshard()
        self.parameters = named_parameters(model)
        for name, weight in self.parameters.items():
            if is_sharded(weight.dense):
                self._layouts[name] = _checked(weight, units, ranks)
        self._tags = {name: tag for tag, name in enumerate(self._layouts, start=1)}
        self.sharded = bool(self._layouts)
        self.totals = Totals(ranks)
        if self.sharded:
            first, layout = next(iter(self._layouts.items()))
            for name, other in self._layouts.items():
                if other.device_mesh != layout.device_mesh:
                    raise ValueError(
                        f"{name} is sharded over another mesh than {first}: expected "
                        "the same for the whole model"
                    )
            across = layout.device_mesh.mesh
            for placement in layout.placements:
                across = across.movedim(0, -1) if placement.is_shard() else across[0]
            at: Sequence[int] = layout.device_mesh.get_coordinate() or []
            mine = sum(
                place
                for place, placement in zip(at, layout.placements, strict=True)
                if placement.is_shard()
            )
            self.totals = Totals(ranks, across.tolist(), mine)

    def check(self, weights: Iterable[Weight]) -> None:
        """Raise ValueError if only some of the weights are sharded.

        Raises:
            ValueError: The model is sharded, but one of the weights is not.
        """
        for weight in weights:
            if self.sharded and weight.name not in self._layouts:
                raise ValueError(
                    f"{weight.name} is not sharded, and other weights are: call "
                    "fully_shard with the model too, which takes what is left, or "
                    "leave it out with parameters="
                )

    def require_same(self, what: str, advice: str, *tensors: Tensor) -> None:
        """Raise RankError if the ranks' tensors differ, unless the model is sharded.

        The arguments are those of :meth:`Ranks.require_same`.
        """
        if not self.sharded:
            self.ranks.require_same(what, advice, *tensors)

    def detach(self, model: nn.Module) -> None:
        """Remove FSDP2's hooks from the modules of a sharded model."""
        for module in model.modules() if self.sharded else ():
            remove_hooks(module, _is_of_fsdp)

    def divides(self, name: str) -> bool:
        """Whether the parameter of a name is sharded."""
        return name in self._layouts

    def whole(self, name: str, shard: Tensor) -> Tensor:
        """Return a whole tensor from the shards of all ranks.

        The tensor is divided like a parameter.

        Args:
            name: Name of the parameter.
            shard: This rank's shard of the tensor.
        """
        if name not in self._layouts:
            return shard
        self.ranks.vote(self._tags[name])
        return self.joined(name, shard).full_tensor()  # type: ignore[attr-defined, no-any-return]

    def local(self, name: str, whole: Tensor) -> Tensor:
        """Return this rank's shard of a whole or sharded tensor; nothing is sent."""
        layout = self._layouts.get(name)
        return whole if layout is None else shard_like(layout, whole).clone()

    def joined(self, name: str, shard: Tensor) -> Tensor:
        """Return a sharded tensor that is made of the shards of all ranks."""
        layout = self._layouts.get(name)
        if layout is None:
            return shard
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            shard.detach().contiguous(),
            layout.device_mesh,
            layout.placements,
            run_check=False,
            shape=layout.shape,
            stride=layout.stride(),
        )

    def shape(self, name: str, shard: Tensor) -> torch.Size:
        """Return the shape of the whole tensor to which a shard belongs."""
        return self._layouts[name].shape if name in self._layouts else shard.shape

    def sum(self, name: str, whole: Tensor) -> Tensor:
        """Return this rank's shard of a sum over the ranks.

        Args:
            name: Name of a parameter that is sharded.
            whole: This rank's summand, of the shape of the whole parameter.
        """
        from torch.distributed.tensor import DTensor, Partial

        self.ranks.vote(self._tags[name])
        layout = self._layouts[name]
        summands = [Partial()] * layout.device_mesh.ndim
        summand = whole.to_dense().contiguous()
        return (
            DTensor.from_local(summand, layout.device_mesh, summands, run_check=False)
            .redistribute(placements=layout.placements)
            .to_local()
        )

    def average(self, tensors: dict[str, Tensor]) -> None:
        """Replace each tensor by its mean over the ranks.

        Args:
            tensors: Tensors by parameter name. If the parameter is sharded, the tensor
                is this rank's shard of the sum over the ranks. The mapping gets new
                tensors. The old tensors are not written to.
        """
        rest = {n: t for n, t in tensors.items() if n not in self._layouts}
        self.ranks.average(rest)
        for name, tensor in tensors.items():
            tensors[name] = rest[name] if name in rest else tensor / self.ranks.size


class Reader:
    """Puts the shards of a parameter together for a pass, and for its backward pass.

    Args:
        shards: The division of parameters among the ranks.
    """

    def __init__(self, shards: Shards) -> None:  # noqa: D107
        self._shards = shards
        # By the memory address of a whole parameter: a reference to it, this rank's
        # leaf, and the name. The backward pass reads the parameter again by them.
        self._open: dict[int, tuple[ref[Tensor], Tensor, str]] = {}

    def read(self, name: str, leaf: Tensor) -> Tensor:
        """Return a whole parameter for a differentiable pass, from the ranks' leaves.

        The gradient of the leaf is this rank's shard of the sum over the ranks.
        """
        if not self._shards.divides(name):
            return leaf
        value: Tensor = _Whole.apply(leaf, name, self._shards)
        where = value.untyped_storage().data_ptr()
        self._open[where] = (
            ref(value, lambda _: self._open.pop(where, None)),
            leaf,
            name,
        )
        return value

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Return a context in which autograd does not save whole parameters.

        It saves how to read each parameter again for the backward pass.
        """
        if not self._shards.sharded:
            yield
            return

        def pack(tensor: Tensor) -> Any:
            if tensor.layout != torch.strided or type(tensor) is not Tensor:
                return tensor
            # While the whole parameter is alive, no other tensor has its memory.
            opened = self._open.get(tensor.untyped_storage().data_ptr())
            value = None if opened is None else opened[0]()
            if value is None or value.dtype != tensor.dtype or version(value):
                return tensor
            shape = tensor.size(), tensor.stride(), tensor.storage_offset()
            return opened[1:], shape  # type: ignore[index]

        def unpack(saved: Any) -> Tensor:
            if isinstance(saved, Tensor):
                return saved
            (leaf, name), shape = saved
            return self._shards.whole(name, leaf.detach()).as_strided(*shape)

        with saved_tensors_hooks(pack, unpack):
            yield


class _Whole(torch.autograd.Function):
    """Computes a whole parameter from its shards."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, name: str, shards: Shards) -> Tensor:
        ctx.name, ctx.shards = name, shards
        return shards.whole(name, shard)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Sum.apply(gradient, ctx.name, ctx.shards), None, None


class _Sum(torch.autograd.Function):
    """Computes a sum over the ranks, and returns this rank's shard of the sum."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, name: str, shards: Shards) -> Tensor:
        ctx.name, ctx.shards = name, shards
        return shards.sum(name, whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Whole.apply(gradient, ctx.name, ctx.shards), None, None


def shard_like(layout: Tensor, tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor that is whole on every rank, or sharded.

    Args:
        layout: A sharded tensor of equal shape, which shows the division.
        tensor: The tensor.
    """
    if is_sharded(tensor):
        return local_values(tensor)
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = layout.device_mesh, layout.placements  # type: ignore[attr-defined]
    whole = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return local_values(whole.redistribute(placements=placements))  # nothing is sent


def _is_of_fsdp(hook: object) -> bool:
    module = getattr(hook, "__module__", None) or ""
    return str(module).startswith("torch.distributed.fsdp")


def _checked(weight: Weight, units: Sequence[FSDPModule], ranks: Ranks) -> DTensor:
    name, layout = weight.name, cast("DTensor", weight.dense)
    mesh = layout.device_mesh
    divided = [p for p in layout.placements if not p.is_replicate()]
    if not units or len(divided) != 1 or not divided[0].is_shard():
        raise ValueError(
            f"{name} is sharded otherwise than by fully_shard alone (tensor "
            "parallelism): prune the model first, and shard the pruned one"
        )
    if mesh.size() != ranks.size:
        raise ValueError(
            f"{name} is sharded over {mesh.size()} of {ranks.size} ranks: expected a "
            "model that is sharded over all of them, or not at all; prune it first, "
            "and shard the pruned one"
        )
    if layout.device.type != mesh.device_type:
        raise ValueError(
            f"{name} is offloaded to the {layout.device.type}: prune the model before "
            "it is sharded, or shard it without an OffloadPolicy"
        )
    if any(mask_of(*owner) is not None for owner in weight.owners):
        raise ValueError(
            f"{name} was pruned before it was sharded, and cannot be pruned again or "
            "made permanent: do both before the model is sharded"
        )
    return layout


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """Return the modules that ``fully_shard`` was called with.

    Raises:
        ValueError: A part of the model is sharded by FSDP1.
    """
    # The import takes half a second. A sharded model has imported it already.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(model, nn.Module):
        return []
    for name, module in model.named_modules():
        if isinstance(module, fsdp.FullyShardedDataParallel):
            raise ValueError(
                f"{name or 'the model'} is a FullyShardedDataParallel (FSDP1): "
                "expected a model that is not sharded, or sharded by fully_shard; "
                "prune it first, and wrap the pruned model"
            )
    return [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]


WHOLE = Shards(nn.Module())
"""The division of a network that is not sharded."""
