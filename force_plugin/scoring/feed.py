"""The batches of a step, read from a loader, cut into microbatches, and moved."""

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
    """Hands out the batches of each step, and starts the loader again at its end.

    Args:
        loader: Iterable of batches. It is not read before the first step.
        passes: Number of batches in a step, number of samples in a microbatch, and
            memory formats.
        device: The device of the network.
        shards: The division of parameters among the processes. The processes of a
            sharded network must have equally many batches.
        on_batch: Called after each batch with the number of the batch within the step,
            from 1.

    Attributes:
        device: The device of the network.
        last: The batch that was read last; ``None`` before the first batch.
        repeats: Whether the last batch comes again if the loader is at its end and can
            be read only once. Default: False.
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
        self.repeats = False
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
        """Yield the batches of a step, as the loader gives them.

        Args:
            step: Number of the step, for a message.
            count: Number of batches. Default: the number in the passes.

        Raises:
            BatchError: The loader has no batch, or it is at its end and can be read
                only once.
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
                    if not self.repeats:
                        raise BatchError(*self._dry(step, number)) from None
                    batch = self.last
            number += 1
            if wanted is None:
                self._go_on_together(True)
            self.last = batch
            yield batch
            self._on_batch(number)

    def split(self, batch: Any) -> Iterator[tuple[Any, float]]:
        """Yield the microbatches of a batch, each with its share of the samples.

        Raises:
            BatchError: The batch is to be cut, and its samples cannot be found.
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
        # Make the sizes about equal, as a batch norm needs more than a small remainder.
        for start, end in pairwise(samples * i // count for i in range(count + 1)):
            yield cut(batch, samples, slice(start, end)), (end - start) / samples

    def moved(self, batch: Any) -> Any:
        """Return a copy of a batch on the device, in the passes' memory formats."""
        return to_device(batch, self.device, self._passes.formats)

    def _go_on_together(self, more: int, what: str = "batches") -> None:
        """Raise BatchError if a sharded network's ranks differ in a count."""
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
                raise  # the error comes from inside the loader
            raise TypeError(
                "loader: expected an iterable of batches (a DataLoader, a list), got "
                f"{type(self._loader).__name__}"
            ) from None

    def _dry(self, step: int, number: int) -> tuple[str, str]:
        """Return why the loader gives no batch, and what to do, for a message."""
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
