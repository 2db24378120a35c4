"""Numbers of all shards of a network, of which each process has its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from force_plugin.parallel.ranks import ALONE, Ranks


class Totals:
    """Adds up what the processes that hold a network's shards count.

    Args:
        ranks: The processes.
        holders: Those that hold one shard each; with replicas (HSDP), those of the
            first. ``None``: every process holds all, and nothing is exchanged.
        mine: Which of the shards is this process's own.
    """

    def __init__(  # noqa: D107 (the class has it)
        self, ranks: Ranks = ALONE, holders: Sequence[int] | None = None, mine: int = 0
    ) -> None:
        self._ranks = ranks
        self._holders = holders
        self._mine = mine

    @property
    def divided(self) -> bool:
        """Whether there is more than one shard."""
        return self._holders is not None

    def each(self, number: float) -> tuple[Sequence[float], int]:
        """A number of every shard, and which of them is this process's own."""
        if self._holders is None:
            return [number], 0
        rows = self._ranks.gather(number)
        return [rows[rank][0] for rank in self._holders], self._mine

    def sum(self, *numbers: float) -> Sequence[float]:
        """Sums over all shards of numbers that each process has of its own."""
        if self._holders is None or not numbers:
            return numbers
        rows = self._ranks.gather(*numbers)
        held = [rows[rank] for rank in self._holders]
        return [sum(column) for column in zip(*held, strict=True)]

    def largest(self, *numbers: float) -> Sequence[float]:
        """The largest of what the shards have, of each number."""
        if self._holders is None or not numbers:
            return numbers
        rows = self._ranks.gather(*numbers)
        return [max(column) for column in zip(*rows, strict=True)]

    def count(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """How many values are not 0, in all shards together, by name."""
        counts = self.sum(*(int(t.count_nonzero()) for t in tensors.values()))
        return {name: int(n) for name, n in zip(tensors, counts, strict=True)}

    def empty(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """The names of those whose values are 0, in all shards."""
        found = self.sum(*(_any(tensor) for tensor in tensors.values()))
        return [name for name, some in zip(tensors, found, strict=True) if not some]

    def size(self, tensors: Sequence[Tensor]) -> int:
        """How many values tensors have, all shards together."""
        return int(*self.sum(sum(tensor.numel() for tensor in tensors)))

    def concatenate(self, values: Tensor) -> Tensor:
        """The values of all shards, one after the other.

        Args:
            values: One dimension, any length.
        """
        if self._holders is None:
            return values
        lengths = [int(row[0]) for row in self._ranks.gather(values.numel())]
        # Bytes are exchanged, which any backend can, and as many from each.
        padded = values.new_zeros(max(lengths))
        padded[: values.numel()] = values
        rows = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(
            [row.view(torch.uint8) for row in rows], padded.view(torch.uint8)
        )
        return torch.cat([rows[rank][: lengths[rank]] for rank in self._holders])


def _any(tensor: Tensor) -> bool:
    if tensor.dtype == torch.bool and tensor.device.type == "cpu":
        return bool(tensor.numpy().any())  # stops at the first
    return bool(tensor.any())


ALL_HERE = Totals()
"""Of a network that this process holds as a whole."""
