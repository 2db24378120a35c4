"""Time our steps and bare steps in turns, so that both run in the same minutes."""

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

STEPS = 60  # steps of a call in the FORCE paper


@dataclass
class Turns:
    """Seconds of our turns and of the bare turns within one call.

    The first entry of ``ours`` is the work before the first batch. The last entry
    contains the work after the last step.
    """

    ours: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)

    def all_of_it(self) -> tuple[float, float]:
        """Return the seconds of the whole call, and of all bare steps."""
        return sum(self.ours), sum(self.bare)

    def step(self) -> tuple[float, float]:
        """Return the median step of ours and of bare, if a turn is a step.

        The first and the last steps are left out.
        """
        return statistics.median(self.ours[2:-1]), statistics.median(self.bare[1:-1])

    def once(self) -> float:
        """Return the seconds of the work that is done once in a call."""
        return sum(self.ours) - len(self.bare) * self.step()[0]

    def step_of_60(self) -> tuple[float, float]:
        """Return a step of ours, with a 60th of the work done once, and a bare step."""
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
    """Prune a copy, and take bare steps of the network between turns of our steps.

    Args:
        dense: The network.
        batch: Batch of all bare steps.
        steps: Steps of the call.
        turn: Steps of a turn.
        batches: Batches of a step.
        loaded: Batch for ``force_prune``. Default: ``batch``.
        options: Options of ``force_prune``.
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
    """Return the seconds of a call that keeps freed memory, as our calls do."""
    with freed_memory_kept():
        return seconds(run)


def alternate(
    ours: Callable[[nn.Module], object],
    dense: nn.Module,
    theirs: Callable[[], object],
    runs: int,
) -> list[tuple[float, float]]:
    """Return the seconds of both sides in turns; ``ours`` gets a copy of ``dense``."""
    pairs = [
        (seconds(partial(ours, copy.deepcopy(dense))), seconds_bare(theirs))
        for _ in range(runs + 1)
    ]
    return pairs[1:]  # the first is a warm-up
