"""What makes a mask doubtful: collapse, emptied layers, and what emptied them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from force_plugin.errors import CollapseError
from force_plugin.methods.base import SaliencyMethod
from force_plugin.model.module_names import name_layers
from force_plugin.model.weights import Weight
from force_plugin.parallel.shards import WHOLE, Shards
from force_plugin.scoring import dead_gradients
from force_plugin.scoring.probe import Probe
from force_plugin.selection.top_k import top_k_masks

# Rescaled to this size, the layers of timm's MobileViT and MambaOut are not emptied.
_SMALL = 0.5
# That a saliency is 0 by chance, as where it underflows or dropout leaves a unit out,
# makes no collapse.
_CHANCE = 0.1
# Without a normalisation, the saliency of a dead channel is no larger than others.
_OVERRATED = 10


class DeadChannels:
    """Whether channels without any weight have taken the saliency of emptied layers.

    Args:
        steps: How many steps there are.
        fixed: Whether the method fixes them.

    Attributes:
        said: A sentence about the step at which they had the most; empty: they had no
            more than half of the saliency.
    """

    def __init__(self, steps: int, fixed: bool) -> None:  # noqa: D107
        self.said = ""
        self._steps = steps
        self._fixed = fixed
        self._share = 0.5  # of the saliency, the largest so far

    def look(
        self,
        step: int,
        scores: Mapping[str, Tensor],
        among: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        rows: Callable[[str, Tensor], Tensor],
    ) -> None:
        """Look at the scores of a step.

        Args:
            step: Its number, from 1.
            scores: Of all weights.
            among: Where there was a weight to choose; empty: everywhere.
            masks: The masks that the scores were measured with.
            rows: Gives all of a tensor of a weight's shape, output channels first.
        """
        # Saliency and number of the weights in dead channels, of those kept, of all.
        dead, kept, every = ([0.0, 0.0] for _ in range(3))
        for name in masks:
            # One layer at a time: whether a channel is empty is told by all of it.
            chosen = scores[name] * among.get(name, True)
            mask, score = (rows(name, tensor) for tensor in (masks[name], chosen))
            score = score.abs()
            empty = mask.flatten(1).any(1) if mask.dim() > 1 else torch.ones_like(mask)
            for sums, weights in ((dead, ~empty), (kept, mask), (every, ...)):
                sums[0] += float(score[weights].sum(dtype=torch.float64))
                sums[1] += score[weights].numel()
        share = dead[0] / every[0] if every[0] else 0.0
        ratio = dead[0] / dead[1] / (kept[0] / kept[1]) if dead[1] and kept[0] else 0.0
        if share <= self._share or ratio <= _OVERRATED:
            return
        self._share = share
        remedy = "iter_snip, where nothing returns, may serve better"
        self.said = (
            f"at step {step} of {self._steps}, channels without any weight had "
            f"{100 * share:.0f} % of the saliency, {ratio:,.0f} times as much a "
            "weight as what was kept (as a rule because a normalisation divides by "
            "next to nothing there), and they return at the cost of others. "
            + ("I" + remedy[1:] if self._fixed else f"Fewer steps, or {remedy}")
        )


class Doubts:
    """What makes a mask doubtful, noticed on the way.

    Args:
        kept: How many weights are to be left after each step.
        on_collapse: ``"raise"`` an error where the network is disconnected, or
            ``"warn"``.
        criterion: The method that chooses them.
        shards: Which shard of scores and masks this process has.

    Attributes:
        problems: A sentence each.
    """

    def __init__(  # noqa: D107 (the class has it)
        self,
        kept: Sequence[int],
        on_collapse: str,
        criterion: type[SaliencyMethod],
        shards: Shards = WHOLE,
    ) -> None:
        self.problems: list[str] = []
        self._steps = len(kept)
        self._left = kept[-1]
        self._raise = on_collapse == "raise"
        self._regrows = criterion.regrows
        self._fixed = criterion.steps is not None
        self._reads = True  # whether other batches would have a say
        self._shards = shards
        self._dead = DeadChannels(len(kept), self._fixed)
        # All that there is to choose from, and what has a saliency at the first step.
        self._choice = self._alive_at_first = 0
        self._causes: list[str] = []  # why nothing has one
        self._gone: set[str] = set()  # layers that an earlier pruning has emptied
        self._collapsed = self._disconnected = False
        # The step at which a layer lost its last weight, until one comes back.
        self._empty: dict[str, int] = {}
        # The layers that keep a weight if everything is pruned at the first step.
        self._kept_at_once: set[str] = set()
        self._layers = 0
        self._weights: Mapping[str, Tensor] = {}
        self._parameters: Mapping[str, Weight] = {}

    def on_first_scores(
        self, scores: Mapping[str, Tensor], among: Mapping[str, Tensor], probe: Probe
    ) -> None:
        """Look at what the dense network, or the one as it came, can rank.

        Args:
            scores: Of all weights.
            among: Where there is a weight to choose; empty: everywhere.
            probe: What has measured them.
        """
        self._weights, self._parameters = probe.weights, probe.parameters
        self._reads = not math.isnan(probe.loss)
        alive = self._shards.totals.count(scores)
        blind = [name for name, count in alive.items() if not count]
        causes = probe.explain_zero_saliency(blind)
        self.problems += [
            *probe.problems,
            *dead_gradients.sentences(causes, len(scores)),
        ]
        self._causes = [*dict.fromkeys(causes.values())]
        self._choice = self._shards.totals.size([*scores.values()])
        if among:
            self._gone = {*self._shards.totals.empty(among)}
            self._choice = sum(self._shards.totals.count(among).values())
            alive = self._shards.totals.count(self._found(scores, among))
        self._alive_at_first = sum(alive.values())

    @staticmethod
    def _found(
        scores: Mapping[str, Tensor], among: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Where there is a saliency other than 0 to choose."""
        return {name: (s != 0) & among.get(name, True) for name, s in scores.items()}

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
                [*scores.values()], self._left, self._shards.totals, [*among.values()]
            )
            none = self._shards.totals.empty(dict(zip(scores, at_once, strict=True)))
            self._kept_at_once = scores.keys() - none
        empty = [
            name for name in self._shards.totals.empty(masks) if name not in self._gone
        ]
        emptied = [name for name in empty if name not in self._empty]
        self._empty = {name: self._empty.get(name, step) for name in empty}
        if emptied and self._regrows and before is not None:
            self._dead.look(step, scores, among, before, self._rows)
        # Scores below 0 are GraSP's, and mean something.
        if self._collapsed or threshold != 0:
            return
        alive = sum(self._shards.totals.count(self._found(scores, among)).values())
        kept = sum(self._shards.totals.count(masks).values())
        if not alive and kept < self._choice:
            self._disconnect(
                "every saliency is exactly 0 at the first step: there is nothing to "
                "rank by"
                if step == 1
                else f"the network was disconnected at step {step - 1} of "
                f"{self._steps}: no gradient reaches any weight through the mask"
            )
        choice = (
            sum(self._shards.totals.count(among).values()) if among else self._choice
        )
        # Weights without saliency in the dense network (the outer taps of a 3x3 kernel
        # on 1x1 maps, units that a batch leaves asleep) are kept while there is room
        # for them, and do no harm. With another batch they may be twice as many.
        asleep = 1 - self._alive_at_first / self._choice
        usual = max(
            min(kept, self._alive_at_first) / 2, (1 - 2 * asleep - _CHANCE) * kept
        )
        if alive >= usual or kept == choice:
            return
        self._collapsed = True
        dense = f" ({self._alive_at_first:,} at the first step)" if asleep else ""
        self.problems.append(
            f"the network collapsed at step {step} of {self._steps}: {alive:,} weights "
            f"have a saliency other than 0{dense}, and {kept:,} were to stay; the "
            "others were kept by position, which means nothing. "
            f"Take {self._advice()}"
        )

    def on_flow(
        self, connected: bool | None, idle: int, broken: Sequence[str] = ()
    ) -> None:
        """Look at what the last mask lets through.

        Args:
            connected: Whether the outputs depend on the inputs, where that is known.
            idle: On how many of the weights that stay they do not.
            broken: Weights of which they depend in a way that is not finite.
        """
        if broken:
            self.problems.append(
                "the pruned network has gradients that are NaN or infinite, of "
                f"{name_layers([*broken], self._layers)}. A layer may divide by what "
                "has become 0, as weight_norm by the norm of a channel without any "
                f"weight. Take {self._advice('more')}"
            )
        if connected is False and not self._disconnected:
            self._disconnect(
                "the pruned network is disconnected: its outputs do not depend on its "
                "inputs"
            )
        # Weights that are idle in the dense network, too, are not among them.
        if connected and idle > self._left / 2:
            self.problems.append(
                f"{idle:,} of the {self._left:,} weights that stay "
                f"({100 * idle / self._left:.0f} %) are idle: the outputs do not "
                "depend on them, as nothing reaches their channels, or nothing leads "
                "on from there. Take "
                + self._advice("more" if self._steps == 1 else "another number of")
            )

    def _disconnect(self, what: str) -> None:
        self._disconnected = True
        if self._alive_at_first:
            problem = [what, *self.emptied()]
            advice = f"take {self._advice()}"
        else:  # no sparsity is too high for that
            problem = [what, *self._causes]
            advice = "look at the data, the loss and the initialisation"
        if self._raise:
            raise CollapseError(
                "; ".join(problem),
                f'{advice}, or on_collapse="warn" to prune all the same',
            )
        self.problems.append(f"{what}. {advice[0].upper()}{advice[1:]}")

    def _advice(self, more_or_fewer: str = "") -> str:
        """What to take instead, of what this method leaves to the caller."""
        if not more_or_fewer:
            alive_at_once = self._kept_at_once.issuperset(self._empty) and self._empty
            more_or_fewer = "fewer" if self._dead.said or alive_at_once else "more"
        *others, last = [
            *([] if self._fixed else [f"{more_or_fewer} steps"]),
            *(["more batches"] if self._reads else []),
            "a lower sparsity",
            "a method that prunes in steps"
            if self._fixed and self._steps == 1
            else "another method",
        ]
        return f"{', '.join(others)} or {last}"

    def _rows(self, name: str, shard: Tensor) -> Tensor:
        """All of a tensor of a weight's shape, with the output channels first."""
        return self._parameters[name].rows(self._shards.whole(name, shard))

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
        return [*said, self._dead.said] if self._dead.said else said


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
