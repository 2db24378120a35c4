"""The batches of a step: read from a loader, cut into microbatches, put on a device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch

from force_plugin.data.containers import count_samples, cut, describe, to_device
from force_plugin.errors import BatchError
from force_plugin.parallel.shards import Shards
from force_plugin.scoring.passes import Loader, Passes


class Feed:
    """Hands out the batches of one step after the other, from a loader that it cycles.

    Args:
        loader: Iterable of batches. It is not read before the first step.
        passes: How many batches a step has, and how many samples a microbatch.
        device: Where they are passed through the network.
        shards: The processes that read together; those of a sharded network have
            equally many batches.
        on_batch: Called after each batch with its number within the step, from 1.

    Attributes:
        device: As given.
        last: The batch that was read last, ``None`` before.
    """

    def __init__(  # noqa: D107 (the class has it)
        self,
        loader: Loader,
        passes: Passes,
        device: torch.device,
        shards: Shards,
        on_batch: Callable[[int], object],
    ) -> None:
        self.last: Any = None
        self._loader = loader
        self._passes = passes
        self.device = device
        self._shards = shards
        self._on_batch = on_batch
        self._iterator: Iterator[Any] | None = None

    def close(self) -> None:
        """Let go of the loader's iterator, and of the last batch."""
        self._iterator = self.last = None

    def batches(self, step: int, count: int | None = None) -> Iterator[Any]:
        """The batches of one step, as they come.

        Args:
            step: Its number, for a message.
            count: How many, instead of what the passes say.

        Raises:
            BatchError: There is none, or the loader can be read only once.
        """
        wanted = count or self._passes.batches
        number = 0
        if wanted is None or self._iterator is None:
            self._iterator = self._start()
        while wanted is None or number < wanted:
            try:
                batch = next(self._iterator)
            except StopIteration:
                if wanted is None and number:
                    self._go_on_together(False)
                    return
                self._iterator = self._start()
                try:
                    batch = next(self._iterator)
                except StopIteration:
                    raise BatchError(*self._dry(step, number)) from None
            number += 1
            if wanted is None:
                self._go_on_together(True)
            self.last = batch
            yield batch
            self._on_batch(number)

    def split(self, batch: Any) -> Iterator[tuple[Any, float]]:
        """A batch's microbatches, each with its share of the batch's samples.

        Raises:
            BatchError: It is to be cut, and nobody can tell what its samples are.
        """
        most = self._passes.microbatch
        if most is None:
            yield batch, 1.0
            return
        samples = count_samples(batch)
        if not samples:
            raise BatchError(
                "microbatch: expected batches with a tensor whose first dimension are "
                f"the samples, at least one, got {describe(batch)} without",
                "leave microbatch out",
            )
        count = math.ceil(samples / most)
        self._go_on_together(count, f"microbatches of at most {most} samples")
        # Of about the same size: a batch norm can do little with what is left over.
        for start, end in pairwise(samples * i // count for i in range(count + 1)):
            yield cut(batch, samples, slice(start, end)), (end - start) / samples

    def moved(self, batch: Any) -> Any:
        """Copies of a batch's tensors on the device, in the formats of the passes."""
        return to_device(batch, self.device, self._passes.formats)

    def _go_on_together(self, more: int, what: str = "batches") -> None:
        """Make sure that the ranks of a sharded network have equally much to pass."""
        if self._shards.sharded:
            others = [row[0] for row in self._shards.ranks.gather(more)]
            if min(others) != max(others):
                fewer = others.index(min(others))
                raise BatchError(
                    f"loader: expected as many {what} on every rank, as the ranks of a "
                    f"sharded model score together, got fewer on rank {fewer}"
                )

    def _start(self) -> Iterator[Any]:
        try:
            return iter(self._loader)
        except TypeError:
            if hasattr(type(self._loader), "__iter__"):
                raise  # it has its own reason
            raise TypeError(
                "loader: expected an iterable of batches (a DataLoader, a list), got "
                f"{type(self._loader).__name__}"
            ) from None

    def _dry(self, step: int, number: int) -> tuple[str, str]:
        """Why there is no batch, after so many of a step, and what to do."""
        if iter(self._loader) is self._loader:
            return (
                f"loader: it ran dry at step {step} after {number} batches of the "
                "step, and can be read only once",
                "pass a DataLoader or a list, which are read again",
            )
        return (
            "loader: expected at least one batch, got none",
            "pass data, and where there are fewer samples than a batch has, a "
            "DataLoader without drop_last",
        )
