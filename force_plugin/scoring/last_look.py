"""The last look at a pruned network: what its outputs depend on.

The look does not change the ranking. A network for which the look fails is no error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from force_plugin.data.containers import is_pair
from force_plugin.parallel.shards import Shards
from force_plugin.scoring.connectivity import Flow, find_flow, responds
from force_plugin.scoring.feed import Feed
from force_plugin.scoring.gradients import LossOf, Sums
from force_plugin.scoring.loss import OF_A_CALL
from force_plugin.scoring.passes import Passes
from force_plugin.scoring.stand_ins import StandIns

EvaluationMode = Callable[[], AbstractContextManager[None]]
Run = Callable[[], object]


class Look(NamedTuple):
    """What the outputs of a pruned network depend on.

    Attributes:
        connected: Whether the outputs depend on the inputs; ``None`` if no batch was
            read before, or if no pass of the look succeeds.
        idle: Number of kept weights that no gradient reaches, but that a gradient
            reaches in the dense network; 0 if not known.
        broken: Names of weights whose gradient is NaN or infinite.
        silent: Names of weights of which no kept value has a gradient, if the outputs
            do not depend on the inputs.
    """

    connected: bool | None = None
    idle: int = 0
    broken: Sequence[str] = ()
    silent: Sequence[str] = ()


class LastLook:
    """Looks at a network with the batch that was measured last.

    Args:
        model: The network.
        stand_ins: The stand-ins of its parameters, masked.
        passes: Options of the passes of batches through the network.
        feed: Has the last batch and the device.
        loss_of: Returns the loss of a batch.
        shards: The division of parameters among the processes that look together.
    """

    def __init__(  # noqa: D107 (the class has it)
        self,
        model: nn.Module,
        stand_ins: StandIns,
        passes: Passes,
        feed: Feed,
        loss_of: LossOf,
        shards: Shards,
    ) -> None:
        self._model = model
        self._stand_ins = stand_ins
        self._passes = passes
        self._feed = feed
        self._loss_of = loss_of
        self._shards = shards
        self._masks: Mapping[str, Tensor] = {}
        self._evaluation: EvaluationMode = nullcontext

    def flow(
        self, masks: Mapping[str, Tensor], evaluation: EvaluationMode, loss: float
    ) -> Look:
        """Return what the outputs of the pruned network depend on.

        The outputs depend on the inputs if a gradient that is not exactly 0 reaches the
        inputs of the last measured batch, on any rank. They also depend on the inputs
        if in evaluation mode other inputs give other outputs. A few samples of the
        batch are tried first, which costs next to nothing. If no gradient reaches the
        inputs of the dense network either (the stem is detached), a gradient that
        reaches any kept weight is enough.

        Args:
            masks: The masks of the pruned network.
            evaluation: A context with all modules in evaluation mode.
            loss: Mean loss of the last step; NaN if no loss was measured.
        """
        if self._feed.last is None:
            return Look()
        self._masks, self._evaluation = masks, evaluation
        batch, run, few = self._runs()
        ranks = self._shards.ranks
        kept = sum(self._shards.totals.count(self._masks).values())
        if few is not None:
            found = self._find_flow(few)
            idle = self._count_idle(found)
            if ranks.any(bool(found.connected)) and 2 * idle <= kept:
                return Look(True, idle, self._not_finite(found))
            del found  # and its gradients
        found = self._find_flow(run)
        idle = self._count_idle(found)
        connected, broken = ranks.any(bool(found.connected)), self._not_finite(found)
        if connected and 2 * idle <= kept:
            return Look(True, idle, broken)
        dense = self._find_dense_flow(run)
        if connected:
            return Look(True, self._count_idle(found, dense), broken)
        silent = self._silent(found)
        if ranks.any(bool(dense.connected)):
            return Look(self._responds(run), 0, broken, silent)
        if math.isnan(loss):  # SynFlow measures no loss
            return Look(None, 0, broken)
        reached = self._reaches_weights(batch)
        if ranks.any(bool(reached)):
            return Look(True, 0, broken)
        return Look(None if ranks.any(reached is None) else False, 0, broken, silent)

    def connected(
        self, masks: Mapping[str, Tensor], evaluation: EvaluationMode
    ) -> bool:
        """Whether the outputs depend on the inputs, as far as can be known.

        The arguments are those of :meth:`flow`. The answer is that of :meth:`flow`, but
        without a look at the loss. The caller has to undo the effects of the passes.
        """
        if self._feed.last is None:
            return True
        self._masks, self._evaluation = masks, evaluation
        _, run, few = self._runs()
        ranks = self._shards.ranks
        for passes in (run,) if few is None else (few, run):
            if ranks.any(bool(self._find_flow(passes).connected)):
                return True
        dense = ranks.any(bool(self._find_dense_flow(run).connected))
        return self._responds(run) if dense else True

    def _runs(self) -> tuple[Any, Run, Run | None]:
        """Return a batch, a pass with this batch, and a pass with a few samples of it.

        The last is ``None`` if the samples are not known, or if the network is sharded:
        if a pass failed on one rank only, the other ranks would wait for it.
        """
        batch, _ = next(self._feed.split(self._feed.last))
        inputs = batch[0] if is_pair(batch) else batch
        forward = self._passes.forward

        def run(inputs: Any = inputs) -> object:
            with self._passes.autocasting(self._feed.device):
                if forward is not None:
                    return forward(self._model, self._feed.moved(batch))
                self._model(self._feed.moved(inputs))
                return None

        known = isinstance(inputs, Tensor) and not self._shards.sharded
        # With fewer samples, a sparse unit may stay at 0.
        few = partial(run, inputs[:8]) if forward is None and known else None
        return batch, run, few

    def _find_dense_flow(self, run: Callable[[], object]) -> Flow:
        try:
            self._stand_ins.mask(None)
            return self._find_flow(run)
        finally:
            self._stand_ins.mask(self._masks)

    def _find_flow(self, run: Callable[[], object]) -> Flow:
        """Return the flow, or an empty flow if the passes fail.

        If a pass fails, as a normalisation over a single sample does, a pass in
        evaluation mode serves. A failure of the look must not fail the pruning.
        """
        weights = list(self._stand_ins.scored.values())
        if self._shards.sharded:
            return find_flow(self._model, run, weights)
        for mode in (nullcontext, self._evaluation):
            with suppress(*OF_A_CALL), mode():
                return find_flow(self._model, run, weights)
        return Flow(None, [None] * len(weights))

    def _not_finite(self, found: Flow) -> list[str]:
        pairs = zip(self._stand_ins.scored, found.gradients, strict=True)
        return [
            name
            for name, gradient in pairs
            if gradient is not None and not gradient.to_dense().isfinite().all()
        ]

    def _silent(self, found: Flow) -> list[str]:
        """Return the names of weights of which no kept value has a gradient."""
        pairs = zip(self._stand_ins.scored, found.gradients, strict=True)
        live = self._shards.totals.sum(
            *(
                g is not None and bool((g.to_dense() * self._masks[n]).any())
                for n, g in pairs
            )
        )
        scored = self._stand_ins.scored
        return [name for name, some in zip(scored, live, strict=True) if not some]

    def _reaches_weights(self, batch: Any) -> bool | None:
        """Whether a gradient of the loss reaches a kept weight; ``None``: it fails."""
        left = self._masks
        with nullcontext() if self._shards.sharded else suppress(*OF_A_CALL):
            sums = Sums(self._stand_ins.scored)
            sums.add_gradients(self._loss_of(batch, 1.0))
            return any(
                bool((g[left[n]] if n in left else g).any()) for n, g in sums.items()
            )
        return None

    def _responds(self, run: Callable[[], object]) -> bool:
        """Whether the network has other outputs for other inputs, on any rank."""
        found = False
        if not self._shards.sharded:
            with suppress(*OF_A_CALL), self._evaluation():
                found = responds(self._model, run)
        return self._shards.ranks.any(found)

    def _count_idle(self, found: Flow, dense: Flow | None = None) -> int:
        """Return the smallest count of idle kept weights that any rank has.

        Weights that are idle in the dense network too are left out if its flow is
        given.
        """
        idle = 0
        able = dense.gradients if dense else [None] * len(found.gradients)
        for name, gradient, alive in zip(
            self._stand_ins.scored, found.gradients, able, strict=True
        ):
            mask = self._masks[name]
            if gradient is not None:
                mask = mask & (gradient.to_dense() == 0)
            if alive is not None:
                mask = mask & (alive.to_dense() != 0)
            elif dense:
                continue
            idle += int(mask.count_nonzero())
        (everywhere,) = self._shards.totals.sum(idle)
        return int(min(row[0] for row in self._shards.ranks.gather(everywhere)))
