"""Sets of channels that can only be removed together.

Residual sums, concatenations, groups and normalisations tie channels of several layers
to each other. The dependency graph of torch-pruning finds the ties (Fang et al. 2023,
arXiv 2301.12900). torch-pruning also removes the channels, from a copy in float64.
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
        positions: Indices of the layer's input (or output) channels, int64 of shape
            ``[n]``.
        channels: Index in the set of the channel at each position, int64 of shape
            ``[n]``.
    """

    layer: str
    positions: Tensor
    channels: Tensor


@dataclass(eq=False)
class Channels:
    """A set of channels that one or several layers share.

    A channel can only be removed from all its layers at once.

    Attributes:
        name: Name of the layer whose output channels number the set's channels.
        size: Number of channels.
        writers: Layers whose output channels are in the set.
        readers: Layers whose input channels are in the set.
        fixed: Why no channel can be removed, or ``""``.
        normalised: Whether a layer normalisation runs over the channels, so that the
            removal of a channel changes the values of the others.
        units: Channels that can only be removed together, one row for each unit.
            Examples are the matching channels of both halves of a gated layer, and a
            whole attention head.
        blocks: A tensor of channels for each convolution with groups, one row for each
            group. All rows must keep the same number of channels.
        heads: Name of the module whose ``num_heads`` counts the units, or ``""``.
    """

    name: str
    size: int
    writers: list[Use] = field(default_factory=list)
    readers: list[Use] = field(default_factory=list)
    fixed: str = ""
    normalised: bool = False
    units: Tensor = field(default_factory=lambda: torch.empty(0, 1).long())
    blocks: list[Tensor] = field(default_factory=list)
    heads: str = ""

    @property
    def choices(self) -> Tensor:
        """Rows of channels that may go: units, or a channel from each group, int64."""
        return max(self.blocks, key=len).T if self.blocks else self.units

    def without(
        self, gone: Tensor, outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
    ) -> Channels:
        """Return the set that remains after channels are removed, with new numbers.

        Args:
            gone: Bool tensor of shape ``[size]``, True = removed.
            outputs: For each writer, a bool tensor of its output channels, True = kept.
            inputs: For each reader, a bool tensor of its input channels, True = kept.
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
        """Return which channels may be removed if no reader needs the free channels.

        Args:
            free: Bool tensor of shape ``[size]``, True = not needed.
            round_to: Keep a multiple of this number of channels. It applies if the set
                has no blocks and each unit is a single channel.

        Returns:
            A bool tensor of shape ``[size]``, True = removable. It holds whole units
            only, equally many in each group, and never all channels.
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
            for use in (*self.writers, *self.readers):  # each layer keeps a channel
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
