"""Ours and bare, in turns, so that both see the same minutes of a machine."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from torch import nn

from force_plugin.scoring.malloc import freed_memory_kept
from harness.networks import bare, prune
from harness.timing import clock, seconds
from harness.training import Batch

STEPS = 60  # of a call, in the FORCE paper


@dataclass
class Turns:
    """Seconds of our turns and of the bare ones within one call.

    Ours begin with what is done before the first batch, and the last of them has what
    is done after the last step.
    """

    ours: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)

    def all_of_it(self) -> tuple[float, float]:
        """What the call took, and the bare steps."""
        return sum(self.ours), sum(self.bare)

    def step(self) -> tuple[float, float]:
        """One step of each, where a turn is a step: not the first, not the last."""
        return statistics.median(self.ours[2:-1]), statistics.median(self.bare[1:-1])

    def once(self) -> float:
        """What is done once in a call, whatever the number of its steps."""
        return sum(self.ours) - len(self.bare) * self.step()[0]

    def step_of_60(self) -> tuple[float, float]:
        """One step of each, ours with its share of what is done once."""
        ours, bare = self.step()
        return ours + self.once() / STEPS, bare


def take_turns(
    dense: nn.Module,
    batch: Batch,
    steps: int,
    turn: int = 1,
    batches: int = 1,
    loaded: Batch | None = None,
    **options: Any,
) -> Turns:
    """Prune a copy, and take bare steps of the network after every few of ours.

    Args:
        dense: The network.
        batch: What all bare steps take.
        steps: Of the call.
        turn: Steps of a turn.
        batches: Batches of a step.
        loaded: What ``force_prune`` takes, if another batch.
        options: Of ``force_prune``.
    """
    turns, start = Turns(), 0.0

    def loader() -> Iterator[Batch]:
        nonlocal start
        for number in count():
            if number % (turn * batches) == 0:
                turns.ours.append(clock() - start)
                work = partial(bare, dense, batch, turn * batches, batches)
                turns.bare.append(seconds(work))
                start = clock()
            yield loaded or batch

    model = copy.deepcopy(dense)
    start = clock()
    prune(model, loader(), steps=steps, batches=batches, **options)
    turns.ours.append(clock() - start)
    return turns


def seconds_bare(run: Callable[[], object]) -> float:
    """Wall time of one call that keeps the memory of its passes, as ours do."""
    with freed_memory_kept():
        return seconds(run)


def alternate(
    ours: Callable[[nn.Module], object],
    dense: nn.Module,
    theirs: Callable[[], object],
    runs: int,
) -> list[tuple[float, float]]:
    """Seconds of both, in turns; ours is given a copy of the network each time."""
    pairs = [
        (seconds(partial(ours, copy.deepcopy(dense))), seconds_bare(theirs))
        for _ in range(runs + 1)
    ]
    return pairs[1:]  # the first warms up
