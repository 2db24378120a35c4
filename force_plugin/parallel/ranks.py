"""The same mask on every rank of a distributed job."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from force_plugin.errors import PruningError, RankError
from force_plugin.model.module_names import unwrapped

_LETTERS = 2000


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
        # A thread of gloo that is the last to have a tensor waits for the GIL, and
        # destroy_process_group of torch 2.7 keeps that while it waits for the thread.
        self._exchanged: list[Tensor] = []
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
            self.vote()
        elif not isinstance(error, RankError):
            # What has gone wrong here is to be seen, whatever the connection says.
            with suppress(RuntimeError):
                self.vote(error=error)

    def gather(self, *numbers: float) -> list[Sequence[float]]:
        """The numbers of each rank, in the order of the ranks.

        Args:
            numbers: As many on every rank. Up to 2⁵³ integers are exact.
        """
        if self.size == 1:
            return [numbers]
        self.vote()
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
        self.vote()
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
        self.vote()
        for tensor in tensors:
            values = tensor.clone(memory_format=torch.contiguous_format)
            dist.broadcast(values, 0)
            tensor.copy_(values)

    def require_same(self, what: str, advice: str, *things: object) -> None:
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
                f"{', '.join(map(str, others))} and rank 0 differ",
                advice,
            )

    def vote(self, next_up: int = 0, error: BaseException | None = None) -> None:
        """Go on if all ranks can, and are about to do the same.

        Args:
            next_up: A number for what this one is about to exchange.
            error: Why this one cannot go on.
        """
        if self.size == 1:
            return
        vote = self.size if error is None else self.rank
        votes = torch.tensor([vote, next_up, -next_up], device=self._device)
        dist.all_reduce(votes, dist.ReduceOp.MIN)
        self._exchanged = [votes]
        failed, least, most = votes.tolist()
        if failed == self.size and least == -most:
            return
        if failed == self.size:
            raise RankError(
                "the ranks do not use the same weights in the same order: expected a "
                "forward pass that does not depend on the batch, as the ranks of a "
                "sharded model score together",
                "prune the model before it is sharded",
            )
        text = _said(error).encode()[:_LETTERS]
        letters = torch.frombuffer(bytearray(text.ljust(_LETTERS)), dtype=torch.uint8)
        letters = letters.to(self._device)
        self._exchanged.append(letters)
        dist.broadcast(letters, failed)
        if error is None:
            said = bytes(letters.tolist()).decode(errors="ignore")
            problem, _, advice = said.partition("\0")
            raise RankError(
                f"rank {failed} of {self.size} failed, and rank {self.rank} cannot go "
                f"on without it: {problem.rstrip(' :')}",
                advice.rstrip(),
            )


ALONE = Ranks(None)
"""One process by itself."""


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside of ``DistributedDataParallel``, ``torch.compile`` and others.

    Raises:
        ValueError: Only a part of the network is distributed.
    """
    if not isinstance(model, nn.Module):
        return model
    model = unwrapped(model)
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            raise ValueError(
                f"{name} is a DistributedDataParallel within the model: expected "
                "one around all of it, or none; prune the model that it was made of"
            )
    return model


def _said(error: BaseException | None) -> str:
    """What the other ranks are told of an error, its advice behind a zero."""
    problem, advice = str(error), ""
    if isinstance(error, PruningError):
        problem, advice = error.problem, error.advice
    return f"{type(error).__name__}: {problem}\0{advice}"


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
