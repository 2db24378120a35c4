"""Sets of channels that go together, and how they are taken out of a model.

Which channels these are, through residual sums, concatenations, groups and
normalisations, is what the dependency graph of torch-pruning finds out (Fang et al.
2023, arXiv 2301.12900), and it cuts them, too: from a copy, in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(eq=False)
class Use:
    """A layer that reads or writes some channels of a set.

    Attributes:
        layer: Name of a convolution or linear layer.
        positions: Channels of its input (or output), int64 of shape ``[n]``.
        channels: Which of the set's channels each of them is, of the same shape.
    """

    layer: str
    positions: Tensor
    channels: Tensor


@dataclass(eq=False)
class Channels:
    """Channels of one or several layers that can only go together.

    Attributes:
        name: The layer whose output channels the others are numbered by.
        size: Their number.
        writers: Layers whose output channels they are.
        readers: Layers whose input channels they are.
        fixed: Why none can go, or ``""``.
        normalised: Whether a layer normalisation runs over them, so that the others
            become others where one of them goes.
        units: Channels that can only go together, one row for each: the same one of
            the halves of a gated layer, a whole head of an attention.
        blocks: Tensors of the set's channels, one row for each of the parts of which
            the same number must stay: the groups of a convolution.
        heads: Name of the module that counts these units as its heads, or ``""``.
    """

    name: str
    size: int
    writers: list[Use] = field(default_factory=list)
    readers: list[Use] = field(default_factory=list)
    fixed: str = ""
    normalised: bool = False
    units: Tensor = field(default_factory=lambda: torch.empty(0, 1))
    blocks: list[Tensor] = field(default_factory=list)
    heads: str = ""

    @property
    def choices(self) -> Tensor:
        """Channels of which any row may go: units, or one of each block, int64."""
        return max(self.blocks, key=len).T if self.blocks else self.units

    def without(
        self, gone: Tensor, outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
    ) -> Channels:
        """What is left of the set once channels have gone, numbered anew.

        Args:
            gone: Bool tensor of shape ``[size]``, True = taken out.
            outputs: Of each writer which of its output channels stay, bool.
            inputs: Of each reader which of its input channels stay, bool.
        """
        left = ~gone
        number = left.cumsum(0) - 1

        def renumbered(uses: list[Use], stay: Mapping[str, Tensor]) -> list[Use]:
            result = []
            for use in uses:
                here = left[use.channels]
                positions = (stay[use.layer].cumsum(0) - 1)[use.positions[here]]
                result.append(Use(use.layer, positions, number[use.channels[here]]))
            return result

        return Channels(
            self.name,
            int(left.sum()),
            renumbered(self.writers, outputs),
            renumbered(self.readers, inputs),
            units=number[self.choices[left[self.choices].all(1)]],
        )

    def removable(self, free: Tensor, round_to: int = 1) -> Tensor:
        """Which channels may go if no reader needs the free ones.

        Args:
            free: Bool tensor of shape ``[size]``.
            round_to: Let a multiple of so many stay, where no parts are to be equal.

        Returns:
            A bool tensor of this shape: whole units, as many in each block, not all.
        """
        if self.fixed or self.normalised:
            return torch.zeros_like(free)
        read = torch.zeros_like(free)
        for use in self.readers:
            read[use.channels] = True
        whole = (free | ~read)[self.units].all(1) & read[self.units].any(1)
        result = torch.zeros_like(free)
        result[self.units[whole].flatten()] = True
        finest = max(self.blocks, key=len, default=None)
        if finest is None:
            for use in (*self.writers, *self.readers):  # something is left of each
                if result[use.channels].all():
                    whole &= (self.units != use.channels[0]).all(1)
                    result[self.units[~whole].flatten()] = False
            left = max(1, int((~whole).sum()))
            if self.units.shape[1] == 1:
                left = -(-left // round_to) * round_to
            chosen = whole.nonzero().flatten()
            back = chosen[: max(0, left - len(whole) + len(chosen))]
            result[self.units[back].flatten()] = False
            return result
        number = min(int(result[finest].sum(1).min()), finest.shape[1] - 1)
        gone = [row[result[row]][:number] for row in finest]
        result = torch.zeros_like(result)
        result[torch.cat(gone)] = True
        counts = [result[block].sum(1) for block in self.blocks]
        return result & all(bool((count == count[0]).all()) for count in counts)
