"""The way down to the wanted sparsity, with steps back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from force_plugin.model.module_names import name_some
from force_plugin.parallel.totals import ALL_HERE, Totals

# A step is tried again this many times, each time with half of the way.
_TRIALS = 10
# From this trial on, no pruned weight returns.
_HOLDING = 2
# From this trial on, layers are spared.
_SPARING = 3


class _Place(NamedTuple):
    """Masks, the number of weights that they keep, and the step that chose them."""

    masks: Mapping[str, Tensor]
    kept: int
    step: int


class Descent:
    """The numbers of weights to keep, one after the other.

    If the masks of a step disconnect the network, :meth:`back` returns to the masks
    before. Then the step is taken in two: the first goes half of the way, by the
    geometric mean of the numbers of weights. The ranking stays that of the method.
    If the network is disconnected again, no pruned weight may return until the step is
    done. If it still is, some of the layers that have lost their last live weight are
    spared: those with the fewest weights. They lose no more weights.

    Args:
        kept_after: Number of weights to keep after each step.
        total: Number of prunable weights.
        guard: Whether steps are taken again.
        totals: Sums over the processes that each hold a shard of the masks.
        start: Number of weights that earlier prunings have left. Default: all.

    Attributes:
        masks: The masks of the last step; empty before the first step.
        kept: Number of weights that these masks keep.
        step: Number of the next step, from 1.
        guarded: Whether a step that disconnects the network can be taken again.
    """

    def __init__(  # noqa: D107 (the class has it)
        self,
        kept_after: Sequence[int],
        total: int,
        guard: bool,
        totals: Totals = ALL_HERE,
        start: int | None = None,
    ) -> None:
        self._total = total
        self._here = _Place({}, total if start is None else start, 0)
        self._before = self._here
        self._ahead = [(n, kept) for n, kept in enumerate(kept_after, start=1)][::-1]
        self._trials = 0
        # The steps that were taken again, and the number of parts that each has so far.
        self._parts: dict[int, int] = {}
        self._held: set[int] = set()
        self._spared: dict[str, int] = {}  # and the step since which they are
        self._given_up: int | None = None  # the step that nothing has helped
        self._totals = totals
        self.guarded = guard

    @property
    def masks(self) -> Mapping[str, Tensor]:  # noqa: D102 (the class has it)
        return self._here.masks

    @property
    def kept(self) -> int:  # noqa: D102
        return self._here.kept

    @property
    def step(self) -> int:  # noqa: D102
        return self._ahead[-1][0] if self._ahead else self._here.step + 1

    @property
    def sparse(self) -> bool:
        """Whether the last step has removed any weight."""
        return self._here.kept < self._total

    @property
    def taken(self) -> int:
        """Number of steps that were taken."""
        return self._here.step

    @property
    def done(self) -> bool:
        """Whether every step was taken."""
        return not self._ahead

    @property
    def holding(self) -> bool:
        """Whether no pruned weight may return in the next step."""
        return self._trials >= _HOLDING and self.step in self._parts

    @property
    def next(self) -> int:
        """Number of weights to keep after the next step."""
        return self._ahead[-1][1]

    def go(self, masks: Mapping[str, Tensor]) -> None:
        """Take the next step.

        Args:
            masks: The masks that the method has chosen.
        """
        step, kept = self._ahead.pop()
        if step in self._parts:
            self._parts[step] += 1
        else:
            self._trials = 0  # the step that had to be taken again is done
        place = _Place(masks, kept, step)
        self._before, self._here = self._here if self.guarded else place, place

    def sparing(self, scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return scores by which spared layers keep the weights that they have.

        A layer is spared no longer if there is no room for all of its weights, beside
        smaller spared layers.

        Args:
            scores: Scores of all weights. They are not written to.
        """
        masks, room = self._here.masks, self.next
        left = self._totals.count({name: masks[name] for name in self._spared})
        for name in sorted(left, key=left.__getitem__):
            room -= left[name]
            if room < 0:
                del self._spared[name]
        spared = {n: scores[n].masked_fill(masks[n], math.inf) for n in self._spared}
        return {**scores, **spared}

    def back(self, lost: Sequence[str] = ()) -> bool:
        """Return to the masks before the last step, which will be taken in two.

        Args:
            lost: Names of the layers that have lost their last live weight.

        Returns:
            Whether this was done. It is not done if the step was tried often enough.
            Then no other step is taken again either.
        """
        step, kept, start = self._here.step, self._here.kept, self._before.kept
        if not self.guarded or self._trials >= _TRIALS:
            self.guarded = False
            self._given_up = step
            return False
        # A step that removes nothing has only let weights return.
        self._trials = max(self._trials + 1, _HOLDING if kept == start else 0)
        self._parts[step] = self._parts.get(step, 1) - 1
        self._ahead.append((step, kept))
        middle = round(math.sqrt(start * kept))
        if kept < middle < start:
            self._ahead.append((step, middle))
        if self.holding:
            self._held.add(step)
        if self._trials >= _SPARING and self._before.masks:
            left = self._totals.count({n: self._here.masks[n] for n in lost})
            fewest = min(left.values(), default=0)
            for name, count in left.items():
                if count == fewest:
                    self._spared.setdefault(name, step)
        self._here = self._before
        return True

    def said(self, steps: int) -> list[str]:
        """Return sentences about the steps that were taken again.

        Args:
            steps: Number of steps that the caller asked for.
        """
        found = []
        for step, parts in self._parts.items():
            held = ", in which no pruned weight returned" * (step in self._held)
            if step == self._given_up:
                said = f"disconnects the network, also in smaller steps{held}"
            else:
                smaller = f"in {parts} smaller steps" if parts > 1 else "again"
                said = (
                    "would have disconnected the network, and was taken "
                    f"{smaller}{held}"
                )
            found.append(f"step {step} of {steps} {said}")
        if self._spared and self._given_up is None:
            first = min(self._spared.values())
            names = name_some([*self._spared])
            found.append(
                f"from step {first} of {steps} on, {names} lost no weight, as the "
                "network would have been disconnected"
            )
        return found
