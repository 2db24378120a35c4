"""The same mask on every rank of a distributed job."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from force_plugin.snapshot import restored

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

_LETTERS = 2000


class RankError(RuntimeError):
    """What every rank is told: one of them has failed, or they do not fit together."""


class Ranks:
    """The processes that prune one network together, each with batches of its own.

    A context manager around all that they do together. Before they exchange anything
    the ranks vote on whether all of them have come this far, and once more at the end,
    so that nobody waits for a rank that has failed: who leaves by an exception votes
    against, and the others raise an error that quotes it. With one process, as where
    :mod:`torch.distributed` is not initialised, nothing is exchanged.

    The process group is the default one. Every rank makes the same calls in the same
    order.

    Args:
        model: The network; the exchange takes place on the device of its first
            parameter. ``None``: this process by itself, whatever is initialised.

    Attributes:
        size: Number of ranks.
        rank: Number of this one, from 0.

    Raises:
        RankError: By any method, and at the end: another rank has failed.
    """

    def __init__(self, model: nn.Module | None) -> None:  # noqa: D107
        together = model is not None and dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if together else 1
        self.rank = dist.get_rank() if together else 0
        self._device = torch.device("cpu")
        if isinstance(model, nn.Module):
            self._device = next((p.device for p in model.parameters()), self._device)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._vote()
        elif not isinstance(error, RankError):
            # What has gone wrong here is to be seen, whatever the connection says.
            with suppress(RuntimeError):
                self._vote(error)

    def gather(self, *numbers: float) -> list[Sequence[float]]:
        """The numbers of each rank, in the order of the ranks.

        Args:
            numbers: As many on every rank. Up to 2⁵³ integers are exact.
        """
        if self.size == 1:
            return [numbers]
        self._vote()
        mine = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine)
        return [row.tolist() for row in rows]

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return any(row[0] for row in self.gather(flag))

    def average(self, tensors: dict[str, Tensor]) -> None:
        """Put in the place of each tensor its mean over the ranks.

        Args:
            tensors: The same names, shapes and dtypes on every rank; the tensors
                themselves are not written to.
        """
        if self.size == 1:
            return
        self._vote()
        for name in sorted(tensors):
            tensor = tensors[name]
            # In row-major order: memory formats may differ between ranks.
            mean = tensor.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(mean)
            tensors[name] = torch.empty_like(tensor).copy_(mean.div_(self.size))

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of rank 0.

        Args:
            tensors: Of the same shapes and dtypes on every rank.
        """
        if self.size == 1:
            return
        self._vote()
        for tensor in tensors:
            values = tensor.clone(memory_format=torch.contiguous_format)
            dist.broadcast(values, 0)
            tensor.copy_(values)

    def agree(self, what: str, advice: str, *things: object) -> None:
        """Make sure that all ranks have the same.

        Args:
            what: Its name, for the message.
            advice: What to do where it is not the same.
            things: Tensors, compared bit by bit, or anything else, by its ``repr``.

        Raises:
            RankError: On all ranks: they differ.
        """
        if self.size == 1:
            return
        rows = self.gather(_digest(things))
        others = [rank for rank, row in enumerate(rows) if row != rows[0]]
        if others:
            raise RankError(
                f"{what}: expected the same on all {self.size} ranks, but rank "
                f"{', '.join(map(str, others))} and rank 0 differ; {advice}"
            )

    def _vote(self, error: BaseException | None = None) -> None:
        """Go on if all ranks can.

        Args:
            error: Why this one cannot.
        """
        if self.size == 1:
            return
        vote = self.size if error is None else self.rank
        votes = torch.tensor(vote, device=self._device)
        dist.all_reduce(votes, dist.ReduceOp.MIN)
        failed = int(votes)
        if failed == self.size:
            return
        text = f"{type(error).__name__}: {error}".encode()[:_LETTERS]
        letters = torch.frombuffer(bytearray(text.ljust(_LETTERS)), dtype=torch.uint8)
        letters = letters.to(self._device)
        dist.broadcast(letters, failed)
        if error is None:
            text = bytes(letters.tolist())
            raise RankError(
                f"rank {failed} of {self.size} failed, and rank {self.rank} cannot go "
                f"on without it: {text.decode(errors='ignore').rstrip(' :')}"
            )


ALONE = Ranks(None)
"""One process by itself."""


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside of :class:`torch.nn.parallel.DistributedDataParallel`.

    Raises:
        ValueError: Only a part of the network is wrapped.
    """
    while isinstance(model, DistributedDataParallel):
        model = model.module
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            if isinstance(module, DistributedDataParallel):
                raise ValueError(
                    f"{name} is a DistributedDataParallel within the model: expected "
                    "one around all of it, or none; prune the model that it was made of"
                )
    return model


@contextmanager
def gathered(model: nn.Module, ranks: Ranks) -> Iterator[bool]:
    """Give each rank all values of a model that FSDP2 has sharded, for a while.

    Its modules have plain parameters in the place of the shards, and work by
    themselves: FSDP2's hooks are off. The shards are not touched.

    Args:
        model: Any module; one that is not sharded is left alone.
        ranks: Those that hold the shards.

    Yields:
        Whether it is sharded.

    Raises:
        ValueError: It is sharded otherwise than by ``fully_shard`` alone (FSDP1, tensor
            parallelism), or was pruned before it was sharded.
    """
    sharded = _sharded_modules(model)
    if not sharded:
        yield False
        return
    ranks.any(False)  # nobody gathers alone
    for unit in sharded:
        unit.reshard()
    with restored(model.modules()):
        whole: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in list(hooks.items()):
                    if _home(hook).startswith("torch.distributed.fsdp"):
                        del hooks[key]
            for name, shard in module._parameters.items():
                if shard is not None and hasattr(shard, "device_mesh"):
                    if id(shard) not in whole:
                        values = shard.detach().full_tensor()  # type: ignore[attr-defined]
                        whole[id(shard)] = nn.Parameter(values, shard.requires_grad)
                    module._parameters[name] = whole[id(shard)]
        yield True


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules that ``fully_shard`` was called with."""
    # Whoever has sharded a model has imported this, which takes half a second.
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
    sharded = [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]
    for name, parameter in model.named_parameters():
        shards = [p for p in getattr(parameter, "placements", ()) if p.is_shard()]
        if len(shards) > 1 or (shards and not sharded):
            raise ValueError(
                f"{name} is sharded otherwise than by fully_shard alone (tensor "
                "parallelism): prune the model first, and shard the pruned one"
            )
        if shards and name.endswith("_orig"):
            raise ValueError(
                f"{name} was pruned before it was sharded, and cannot be pruned again: "
                "prune the model as far as it is to be, and shard it then"
            )
    return sharded


def _home(hook: object) -> str:
    """The module that a hook comes from."""
    return getattr(hook, "__module__", None) or ""


def _digest(things: Iterable[object]) -> int:
    """Of 48 bits, which a float64 holds exactly."""
    digest = hashlib.sha256()
    for thing in things:
        if isinstance(thing, Tensor):
            values = thing.detach().cpu().flatten()
            digest.update(values.view(torch.uint8).numpy().data)
        else:
            digest.update(repr(thing).encode())
    return int.from_bytes(digest.digest()[:6], "big")
