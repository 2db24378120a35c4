"""What makes a mask doubtful: collapse, emptied layers, and what emptied them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from force_plugin import silence
from force_plugin.errors import CollapseError
from force_plugin.parameters import Weight, name_layers
from force_plugin.scoring import Probe
from force_plugin.selection import top_k_masks
from force_plugin.sharding import WHOLE, Parts

# Rescaled to this size, the layers of timm's MobileViT and MambaOut are not emptied.
_SMALL = 0.5
# Without a normalisation, the saliency of a dead channel is no larger than others.
_OVERRATED = 10


class Notes:
    """What makes a mask doubtful, noticed on the way.

    Args:
        kept: How many weights are to be left after each step.
        on_collapse: ``"raise"`` an error where the network is disconnected, or
            ``"warn"``.
        regrows: Whether weights may return that an earlier step has pruned.
        parts: Which part of scores and masks this process is given.

    Attributes:
        problems: A sentence each.
    """

    def __init__(  # noqa: D107 (the class has it)
        self,
        kept: Sequence[int],
        on_collapse: str,
        regrows: bool,
        parts: Parts = WHOLE,
    ) -> None:
        self.problems: list[str] = []
        self._steps = len(kept)
        self._left = kept[-1]
        self._raise = on_collapse == "raise"
        self._regrows = regrows
        self._parts = parts
        # Of the step at which they had the largest: the share of the saliency that dead
        # channels had, and a sentence about it.
        self._dead: tuple[float, str] = (0.5, "")
        self._alive_at_first = 0
        self._collapsed = self._disconnected = False
        # The step at which a layer lost its last weight, until one comes back.
        self._empty: dict[str, int] = {}
        # The layers that keep a weight if everything is pruned at the first step.
        self._kept_at_once: set[str] = set()
        self._layers = 0
        self._weights: Mapping[str, Tensor] = {}
        self._parameters: Mapping[str, Weight] = {}

    def on_first_scores(self, scores: Mapping[str, Tensor], probe: Probe) -> None:
        """Look for layers that the dense network cannot rank."""
        self._weights, self._parameters = probe.weights, probe.parameters
        alive = self._parts.count(scores)
        self._alive_at_first = sum(alive.values())
        blind = [name for name, count in alive.items() if not count]
        self.problems += silence.describe(probe.explain_silence(blind), len(scores))

    def on_selection(
        self,
        step: int,
        scores: Mapping[str, Tensor],
        among: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        threshold: float,
        before: Mapping[str, Tensor] | None,
    ) -> None:
        """Look for emptied layers, and for weights of saliency 0 that were taken.

        Args:
            step: Its number, from 1.
            scores: Of all weights.
            among: Where there was a weight to choose; empty: everywhere.
            masks: What was chosen.
            threshold: The least score that was.
            before: The masks that the scores were measured with, if any.
        """
        self._layers = len(masks)
        if step == 1 < self._steps:
            at_once, _ = top_k_masks(
                [*scores.values()], self._left, self._parts, [*among.values()]
            )
            none = self._parts.empty(dict(zip(scores, at_once, strict=True)))
            self._kept_at_once = scores.keys() - none
        empty = self._parts.empty(masks)
        emptied = [name for name in empty if name not in self._empty]
        self._empty = {name: self._empty.get(name, step) for name in empty}
        if emptied and self._regrows and before is not None:
            self._look_at_dead_channels(step, scores, among, before)
        # Scores below 0 are GraSP's, and mean something.
        if self._collapsed or threshold != 0:
            return
        found = {n: (s != 0) & among.get(n, True) for n, s in scores.items()}
        alive = sum(self._parts.count(found).values())
        kept = sum(self._parts.count(masks).values())
        if not alive and kept < self._parts.size([*masks.values()]):
            self._disconnect(
                "every saliency is exactly 0 at the first step: there is nothing to "
                "rank by"
                if step == 1
                else f"the network was disconnected at step {step - 1} of "
                f"{self._steps}: no gradient reaches any weight through the mask"
            )
        # Weights without saliency in the dense network (the outer taps of a 3x3 kernel
        # on 1x1 maps) are kept while there is room for them, and do no harm.
        if alive >= kept or (kept > self._alive_at_first and step < self._steps):
            return
        self._collapsed = True
        self.problems.append(
            f"the network collapsed at step {step} of {self._steps}: {alive:,} weights "
            f"have a saliency other than 0, and {kept:,} were to stay; the others were "
            f"kept by position, which means nothing. {self._advice()}"
        )

    def _look_at_dead_channels(
        self,
        step: int,
        scores: Mapping[str, Tensor],
        among: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
    ) -> None:
        """See whether a step took layers for the sake of channels without a weight."""
        # Saliency and number of the weights in dead channels, of those kept, of all.
        dead, kept, every = ([0.0, 0.0] for _ in range(3))
        for name in masks:
            # One layer at a time: whether a channel is empty is told by all of it.
            chosen = scores[name] * among.get(name, True)
            mask, score = (self._rows(name, part) for part in (masks[name], chosen))
            score = score.abs()
            rows = mask.flatten(1).any(1) if mask.dim() > 1 else torch.ones_like(mask)
            for part, weights in ((dead, ~rows), (kept, mask), (every, ...)):
                part[0] += float(score[weights].sum(dtype=torch.float64))
                part[1] += score[weights].numel()
        share = dead[0] / every[0] if every[0] else 0.0
        ratio = dead[0] / dead[1] / (kept[0] / kept[1]) if dead[1] and kept[0] else 0.0
        if share > self._dead[0] and ratio > _OVERRATED:
            self._dead = (
                share,
                f"at step {step} of {self._steps}, channels without any weight had "
                f"{100 * share:.0f} % of the saliency, {ratio:,.0f} times as much a "
                "weight as what was kept (as a rule because a normalisation divides by "
                "next to nothing there), and they return at the cost of others. Fewer "
                "steps, or iter_snip, where nothing returns, may serve better",
            )

    def on_flow(self, connected: bool | None, idle: int) -> None:
        """Look at what the last mask lets through.

        Args:
            connected: Whether the outputs depend on the inputs, where that is known.
            idle: On how many of the weights that stay they do not.
        """
        if connected is False and not self._disconnected:
            self._disconnect(
                "the pruned network is disconnected: its outputs do not depend on its "
                "inputs"
            )
        once = self._steps == 1
        steps = "a method that prunes in steps" if once else "another number of steps"
        # Weights that are idle in the dense network stay where there is room for them.
        if connected and idle > self._left / 2 and self._left <= self._alive_at_first:
            self.problems.append(
                f"{idle:,} of the {self._left:,} weights that stay "
                f"({100 * idle / self._left:.0f} %) are idle: the outputs do not "
                "depend on them, as nothing reaches their channels, or nothing leads "
                f"on from there. Take {steps}, more batches or a lower sparsity"
            )

    def _disconnect(self, what: str) -> None:
        self._disconnected = True
        if self._raise:
            raise CollapseError(
                "; ".join([what, *self.emptied()]),
                f'{self._advice()}, or on_collapse="warn" to prune all the same',
            )
        self.problems.append(f"{what}. {self._advice()}")

    def _advice(self) -> str:
        alive_at_once = self._empty and self._kept_at_once.issuperset(self._empty)
        steps = "fewer" if self._dead[1] or alive_at_once else "more"
        return f"Take {steps} steps, more batches, a lower sparsity or another method"

    def _rows(self, name: str, part: Tensor) -> Tensor:
        """All of a tensor of a weight's shape, with the output channels first."""
        return self._parameters[name].rows(self._parts.whole(name, part))

    def emptied(self) -> list[str]:
        """What there is to say about layers without any weight, if there are any."""
        if not self._empty:
            return []
        names = sorted(self._empty, key=self._empty.__getitem__)
        since = (
            f", the first at step {self._empty[names[0]]}" if self._steps > 1 else ""
        )
        said = [f"{name_layers(names, self._layers)} lost every weight{since}"]
        if small := find_small(
            (name, self._rows(name, self._weights[name])) for name in names
        ):
            said.append(
                f"small initial weights in {len(small)} of them: {sizes(small)}"
            )
        if at_once := len(self._kept_at_once.intersection(names)):
            said.append(f"a single step would have left weights in {at_once} of them")
        return [*said, self._dead[1]] if self._dead[1] else said


def find_small(weights: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    """The size of weights that start small, by parameter name.

    It is their root mean square in units of that of PyTorch's convolutions and linear
    layers, which are uniform in ±1/√n for n inputs; less than a half is small.

    Args:
        weights: Parameter names and dense weights, their output channels first.
    """
    found = {}
    for name, weight in weights:
        if weight.dim() > 1:
            norm, inputs = float(weight.abs().float().norm()), weight[0].numel()
            size = norm * math.sqrt(3 * inputs / weight.numel())
            if size < _SMALL:
                found[name] = size
    return found


def sizes(small: Mapping[str, float]) -> str:
    """The range of sizes in words."""
    ends = dict.fromkeys(f"{f(small.values()):.2g}" for f in (min, max))
    return f"{' to '.join(ends)} times the size of PyTorch's own initialisation"
