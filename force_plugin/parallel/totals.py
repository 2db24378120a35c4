"""Sums over the processes that each hold a shard of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from force_plugin.parallel.ranks import ALONE, Ranks


class Totals:
    """Adds up numbers that the processes count on their shards of a network.

    Args:
        ranks: The processes.
        holders: Ranks that hold one shard each, in the order of the shards; with
            replicas (HSDP), the ranks of the first replica. ``None``: every process
            holds the whole network, and nothing is exchanged.
        mine: Index of this process's own shard.
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
        """Return a number of every shard, and the index of this process's own shard."""
        if self._holders is None:
            return [number], 0
        rows = self._ranks.gather(number)
        return [rows[rank][0] for rank in self._holders], self._mine

    def sum(self, *numbers: float) -> Sequence[float]:
        """Return the sums of numbers over all shards."""
        if self._holders is None or not numbers:
            return numbers
        rows = self._ranks.gather(*numbers)
        held = [rows[rank] for rank in self._holders]
        return [sum(column) for column in zip(*held, strict=True)]

    def largest(self, *numbers: float) -> Sequence[float]:
        """Return the largest value of each number over all shards."""
        if self._holders is None or not numbers:
            return numbers
        rows = self._ranks.gather(*numbers)
        return [max(column) for column in zip(*rows, strict=True)]

    def count(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """Return the count of values other than 0 in all shards, by name."""
        counts = self.sum(*(int(t.count_nonzero()) for t in tensors.values()))
        return {name: int(n) for name, n in zip(tensors, counts, strict=True)}

    def empty(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Return the names of the tensors whose values are 0 in all shards."""
        found = self.sum(*(_any(tensor) for tensor in tensors.values()))
        return [name for name, some in zip(tensors, found, strict=True) if not some]

    def size(self, tensors: Sequence[Tensor]) -> int:
        """Return the number of values of tensors in all shards together."""
        return int(*self.sum(sum(tensor.numel() for tensor in tensors)))

    def concatenate(self, values: Tensor) -> Tensor:
        """Return the values of all shards in a single tensor.

        Args:
            values: A tensor of one dimension and any length.
        """
        if self._holders is None:
            return values
        lengths = [int(row[0]) for row in self._ranks.gather(values.numel())]
        # Every process sends equally many bytes, as any backend can exchange bytes.
        padded = values.new_zeros(max(lengths))
        padded[: values.numel()] = values
        rows = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(
            [row.view(torch.uint8) for row in rows], padded.view(torch.uint8)
        )
        return torch.cat([rows[rank][: lengths[rank]] for rank in self._holders])


def _any(tensor: Tensor) -> bool:
    if tensor.dtype == torch.bool and tensor.device.type == "cpu":
        return bool(tensor.numpy().any())  # NumPy stops at the first True
    return bool(tensor.any())


ALL_HERE = Totals()
"""Sums for a network that this process holds as a whole."""
