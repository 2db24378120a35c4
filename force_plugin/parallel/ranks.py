"""Exchange among the ranks of a distributed job, so that all get equal masks."""

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
    """The ranks that prune a network together, each with its own batches.

    This is a context manager around everything that the ranks do together. Before each
    exchange, and at the end, the ranks vote on whether all of them have come this far.
    So no rank waits for a rank that has failed. A rank that leaves with an exception
    votes against, and the other ranks raise an error that quotes the exception. A
    single process, without :mod:`torch.distributed`, exchanges nothing.

    The ranks use the default process group. Every rank must make the same calls in the
    same order.

    Args:
        model: The network. The exchange takes place on the device of its first
            parameter. ``None``: this process alone, even if :mod:`torch.distributed`
            is initialised.

    Attributes:
        size: Number of ranks.
        rank: Number of this rank, from 0.

    Raises:
        RankError: Another rank has failed. Any method may raise it, and the end of the
            context.
    """

    def __init__(self, model: nn.Module | None) -> None:  # noqa: D107
        together = model is not None and dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if together else 1
        self.rank = dist.get_rank() if together else 0
        self._device = torch.device("cpu")
        # destroy_process_group of torch 2.7 holds the GIL while it waits for gloo's
        # threads. A thread that frees a tensor waits for the GIL. So none frees these.
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
            # The user should see this rank's error, and not that of a lost connection.
            with suppress(RuntimeError):
                self.vote(error=error)

    def gather(self, *numbers: float) -> list[Sequence[float]]:
        """Return the numbers of each rank, in the order of the ranks.

        Args:
            numbers: Numbers of this rank; every rank must give equally many. Integers
                up to 2⁵³ are exact.
        """
        if self.size == 1:
            return [numbers]
        self.vote()
        mine = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine)
        return [row.tolist() for row in rows]

    def any(self, flag: bool) -> bool:
        """Whether a flag is true on any rank."""
        return any(row[0] for row in self.gather(flag))

    def average(self, tensors: dict[str, Tensor]) -> None:
        """Replace each tensor by its mean over the ranks.

        Args:
            tensors: Tensors by name, with equal names, shapes and dtypes on every rank.
                The mapping gets new tensors. The old tensors are not written to.
        """
        if self.size == 1:
            return
        self.vote()
        for name in sorted(tensors):
            tensor = tensors[name]
            # Use row-major order, as memory formats may differ between ranks.
            mean = tensor.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(mean)
            tensors[name] = torch.empty_like(tensor).copy_(mean.div_(self.size))

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with the tensors of rank 0.

        Args:
            tensors: Tensors with equal shapes and dtypes on every rank.
        """
        if self.size == 1:
            return
        self.vote()
        for tensor in tensors:
            values = tensor.clone(memory_format=torch.contiguous_format)
            dist.broadcast(values, 0)
            tensor.copy_(values)

    def require_same(self, what: str, advice: str, *things: object) -> None:
        """Raise RankError on all ranks if their values differ.

        Args:
            what: Name of the values, for the message.
            advice: What to do if the values differ, for the message.
            things: The values: tensors, which are compared bit by bit, or other
                objects, which are compared by their ``repr``.

        Raises:
            RankError: The values of the ranks differ. Every rank raises it.
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
        """Raise RankError unless all ranks go on, and agree on the next exchange.

        Args:
            next_up: A number that stands for the next exchange of this rank.
            error: The exception because of which this rank cannot go on.

        Raises:
            RankError: Another rank has failed, or the next exchanges differ.
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
"""A single process, which exchanges nothing."""


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network inside ``DistributedDataParallel`` and other wrappers.

    Raises:
        ValueError: A ``DistributedDataParallel`` is around a part of the network only.
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
    """Return the text of an error for the other ranks: problem, zero byte, advice."""
    problem, advice = str(error), ""
    if isinstance(error, PruningError):
        problem, advice = error.problem, error.advice
    return f"{type(error).__name__}: {problem}\0{advice}"


def _digest(things: Iterable[object]) -> int:
    """Return a digest of 48 bits, which a float64 holds exactly."""
    digest = hashlib.sha256()
    for thing in things:
        if isinstance(thing, Tensor):
            values = thing.detach().cpu().flatten()
            digest.update(values.view(torch.uint8).numpy().data)
        else:
            digest.update(repr(thing).encode())
    return int.from_bytes(digest.digest()[:6], "big")
