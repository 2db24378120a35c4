"""Reasons to doubt a mask: collapse, emptied layers, and what emptied them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from force_plugin.errors import CollapseError
from force_plugin.methods.base import SaliencyMethod
from force_plugin.methods.steady_force import SteadyFORCE
from force_plugin.model.module_names import name_layers
from force_plugin.model.weights import Weight
from force_plugin.parallel.shards import WHOLE, Shards
from force_plugin.scoring import dead_gradients
from force_plugin.scoring.probe import Probe
from force_plugin.selection.top_k import top_k_masks

# The layers of timm's MobileViT and MambaOut are not emptied if their weights are
# rescaled to this size.
_SMALL = 0.5
# A saliency may be 0 by chance, because it underflows or because dropout leaves a unit
# out. This share of zeros is no sign of a collapse.
_CHANCE = 0.1
# Without a normalisation, a dead channel has no larger saliency than other channels.
_OVERRATED = 10


class DeadChannels:
    """Tells whether channels without any weight have taken most of the saliency.

    These channels are called dead.

    Args:
        steps: Number of steps.
        fixed: Whether the method fixes the number of steps.

    Attributes:
        said: A sentence about the step at which the dead channels had the largest
            share of the saliency. It is empty unless this share is above one half, and
            the mean saliency of a weight is 10 times larger there than among the kept
            weights.
    """

    def __init__(self, steps: int, fixed: bool) -> None:  # noqa: D107
        self.said = ""
        self._steps = steps
        self._fixed = fixed
        self._share = 0.5  # the largest share of the saliency so far

    def look(
        self,
        step: int,
        scores: Mapping[str, Tensor],
        among: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        rows: Callable[[str, Tensor], Tensor],
    ) -> None:
        """Compare the saliency of dead channels with the saliency of kept weights.

        Args:
            step: Number of the step, from 1.
            scores: Scores of all weights.
            among: Masks of the weights that could be chosen; empty: all weights.
            masks: Masks of the network while the scores were measured.
            rows: Puts the shards of a tensor of a weight's shape together, and returns
                the tensor with the output channels first.
        """
        # Each list holds a sum of saliencies, and the number of weights in the sum:
        # weights in dead channels, kept weights, all weights.
        dead, kept, every = ([0.0, 0.0] for _ in range(3))
        for name in masks:
            # Only a whole layer shows whether a channel is empty. So the shards of a
            # layer are put together, one layer at a time.
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
        self.said = (
            f"at step {step} of {self._steps}, channels without any weight had "
            f"{100 * share:.0f} % of the saliency, {ratio:,.0f} times as much a "
            "weight as what was kept (as a rule because a normalisation divides by "
            "next to nothing there), and they return at the cost of others. "
            + ("Take " if self._fixed else "Take fewer steps, ")
            + 'method="steady_force", which does not overrate them, or "iter_snip", '
            "where nothing returns"
        )


class Doubts:
    """Collects reasons to doubt a mask while the network is pruned.

    Args:
        kept: Number of weights to keep after each step.
        on_collapse: ``"raise"`` an error if the network is disconnected, or ``"warn"``.
        criterion: The method that chooses the weights.
        shards: The division of scores and masks among the processes.

    Attributes:
        problems: The reasons, a sentence each.
        begun: Whether there were scores before.
    """

    def __init__(  # noqa: D107 (the class has it)
        self,
        kept: Sequence[int],
        on_collapse: str,
        criterion: type[SaliencyMethod],
        shards: Shards = WHOLE,
    ) -> None:
        self.problems: list[str] = []
        self.begun = False
        self._steps = len(kept)
        self._left = kept[-1]
        self._raise = on_collapse == "raise"
        self._regrows = criterion.regrows
        self._steady = issubclass(criterion, SteadyFORCE)
        self._fixed = criterion.steps is not None
        self._reads = True  # whether the scores depend on the batches
        self._shards = shards
        self._dead = DeadChannels(len(kept), self._fixed)
        # Number of weights to choose from, and number of weights with a saliency other
        # than 0 at the first step.
        self._choice = self._alive_at_first = 0
        self._causes: list[str] = []  # why layers have no saliency
        self._gone: set[str] = set()  # layers that an earlier pruning has emptied
        self._collapsed = self._disconnected = False
        # The step at which a layer lost its last weight. A layer leaves this dictionary
        # when a weight comes back.
        self._empty: dict[str, int] = {}
        # The layers that would keep a weight if all steps were made at once.
        self._kept_at_once: set[str] = set()
        self._layers = 0
        self._weights: Mapping[str, Tensor] = {}
        self._parameters: Mapping[str, Weight] = {}

    def on_first_scores(
        self, scores: Mapping[str, Tensor], among: Mapping[str, Tensor], probe: Probe
    ) -> None:
        """Count the weights with a saliency before the first selection.

        Args:
            scores: Scores of all weights.
            among: Masks of the weights that can be chosen; empty: all weights.
            probe: The probe that has measured the scores.
        """
        self.begun = True
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
        """Return masks of the weights to choose from with a saliency other than 0."""
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
        """Look for emptied layers, and for kept weights of saliency 0.

        Args:
            step: Number of the step, from 1.
            scores: Scores of all weights.
            among: Masks of the weights that could be chosen; empty: all weights.
            masks: Masks of the weights that were chosen.
            threshold: The smallest score that was chosen.
            before: Masks of the network while the scores were measured, if any.

        Raises:
            CollapseError: Every saliency is 0, and ``on_collapse`` is ``"raise"``.
        """
        self._layers = len(masks)
        if step == 1 < self._steps:
            at_once, _ = top_k_masks(scores, self._left, self._shards.totals, among)
            none = self._shards.totals.empty(at_once)
            self._kept_at_once = scores.keys() - none
        empty = [
            name for name in self._shards.totals.empty(masks) if name not in self._gone
        ]
        emptied = [name for name in empty if name not in self._empty]
        self._empty = {name: self._empty.get(name, step) for name in empty}
        if emptied and self._regrows and before is not None:
            self._dead.look(step, scores, among, before, self._rows)
        # GraSP has scores below 0, which mean something.
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
        # Some weights have no saliency in the dense network: the outer taps of a 3x3
        # kernel on 1x1 maps, or units that a batch leaves asleep. They are kept while
        # there is room, and do no harm. With another batch they may be twice as many.
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
        """Note what the outputs of the pruned network depend on.

        Args:
            connected: Whether the outputs depend on the inputs; ``None``: not known.
            idle: Number of kept weights that the outputs do not depend on.
            broken: Names of weights whose gradient is NaN or infinite.

        Raises:
            CollapseError: The network is disconnected, and ``on_collapse`` is
                ``"raise"``.
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
        # Weights that are idle in the dense network too do not count as idle.
        if connected and idle > self._left / 2:
            self.problems.append(
                f"{idle:,} of the {self._left:,} weights that stay "
                f"({100 * idle / self._left:.0f} %) are idle: the outputs do not "
                "depend on them, as nothing reaches their channels, or nothing leads "
                "on from there. Take "
                + self._advice("more" if self._steps == 1 else "another number of")
                + ', such as "steady_force"' * (self._regrows and not self._steady)
            )

    def _disconnect(self, what: str) -> None:
        self._disconnected = True
        if self._alive_at_first:
            problem = [what, *self.emptied()]
            advice = f"take {self._advice()}"
        else:  # nothing has a saliency even before pruning: the sparsity is no reason
            problem = [what, *self._causes]
            advice = "look at the data, the loss and the initialisation"
        if self._raise:
            raise CollapseError(
                "; ".join(problem),
                f'{advice}, or on_collapse="warn" to prune all the same',
            )
        self.problems.append(f"{what}. {advice[0].upper()}{advice[1:]}")

    def _advice(self, more_or_fewer: str = "") -> str:
        """Return advice: what to change, among the settings that the method allows."""
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
        """Return a whole tensor of a weight's shape, with the output channels first."""
        return self._parameters[name].rows(self._shards.whole(name, shard))

    def emptied(self) -> list[str]:
        """Return sentences about the layers that lost every weight."""
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
    """Return the sizes of weights that start small, by parameter name.

    The size of a weight tensor is its root mean square, in units of PyTorch's own
    initialisation. PyTorch draws convolutions and linear layers uniformly from ±1/√n
    for n inputs. A size below one half is small.

    Args:
        weights: Parameter names and dense weights, with the output channels first.
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
    """Return the range of the sizes in words."""
    ends = dict.fromkeys(f"{f(small.values()):.2g}" for f in (min, max))
    return f"{' to '.join(ends)} times the size of PyTorch's own initialisation"
