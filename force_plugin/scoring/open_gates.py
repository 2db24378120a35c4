"""Opening of a network's closed gates before the first measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from force_plugin.model.restoring import restored
from force_plugin.model.weights import Weight
from force_plugin.parallel.shards import Shards
from force_plugin.scoring import gates
from force_plugin.scoring.stand_ins import StandIns

Measure = Callable[[], tuple[Tensor, Mapping[str, Tensor]]]
"""Returns a result and the leaves of its graph, by parameter name."""


class Opening:
    """Opens the gates of a network, and can make its last measurement again.

    Args:
        model: The network.
        parameters: All parameters of the network, by name.
        scored: The weights that are scored.
        shards: The division of parameters among the processes, which all open the same
            gates.
        wanted: Whether gates are to be opened at all.

    Attributes:
        gates: The closed gates that were opened, by parameter name. Closed weights are
            known from the beginning, other gates from the first measurement on.
        measure: Makes the last measurement again, with the modules in the modes of that
            measurement; ``None`` before the first measurement.
    """

    def __init__(  # noqa: D107 (the class has it)
        self,
        model: nn.Module,
        parameters: Mapping[str, Weight],
        scored: Sequence[Weight],
        shards: Shards,
        wanted: bool,
    ) -> None:
        self.gates: dict[str, gates.Gate] = {}
        self.measure: Measure | None = None
        self._model = model
        self._parameters = parameters
        self._shards = shards
        # Parameters that may be gates. The first graph decides.
        self._candidates: dict[str, float] = {}
        if wanted:
            shapes = {w.name: w.shape for w in scored}
            others = {n: w.shape for n, w in parameters.items() if w.prunable}
            small = gates.small(self._dense(), shards)
            self.gates = gates.closed_weights(shapes | others, small)
            matrices = {name for name, shape in shapes.items() if len(shape) > 1}
            neither = small.keys() - self.gates.keys() - matrices
            self._candidates = {name: small[name] for name in small if name in neither}

    def values(self) -> dict[str, Tensor]:
        """Return the values of the opened gates, by parameter name."""
        transposed = {n for n in self.gates if self._parameters[n].transposed}
        return gates.open_values(self.gates, self._dense(), self._shards, transposed)

    def revealed(
        self, measure: Measure, stand_ins: StandIns
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return a result and the leaves of its graph, with all gates open.

        The first graph shows the gates. If no gate is closed, this graph is returned.
        Otherwise the gates are opened, the effects of the first pass are undone, and
        the result is made again. It is also made again if the search for gates has
        touched the graph.

        Args:
            measure: Makes the result.
            stand_ins: The stand-ins of the network's parameters.
        """
        modes = [(module, module.training) for module in self._model.modules()]

        def again() -> tuple[Tensor, Mapping[str, Tensor]]:
            for module, training in modes:
                module.training = training
            return measure()

        self.measure = again
        if not self._candidates:
            return measure()
        rewind = stand_ins.remember(self.gates)
        # A frozen gate would not be in the graph.
        frozen = [
            leaf
            for name in self._candidates
            if not (leaf := stand_ins.leaves[name]).requires_grad
        ]
        try:
            for leaf in frozen:
                leaf.requires_grad_()
            result, leaves = measure()
            found, looked = gates.closed_gates(
                result, leaves, candidates=self._candidates, scored=stand_ins.weights
            )
        except RuntimeError:
            # A network may write in place to a frozen parameter, which fails if the
            # parameter requires a gradient. The pass below raises any other failure.
            if not frozen:
                raise
            found, looked = {}, True
        found = self._found_by_any(found, stand_ins)
        self._candidates = {}
        if not (frozen or looked or found):
            return result, leaves
        result = leaves = None  # type: ignore[assignment]  # frees the graph
        for leaf in frozen:
            leaf.requires_grad_(False)
        rewind()
        opened = gates.open_values(found, stand_ins.leaves, self._shards)
        for name, values in opened.items():
            stand_ins.leaves[name].data.copy_(values)
            if name in stand_ins.weights:
                stand_ins.weights[name] = values
        self.gates |= found
        return measure()

    @contextmanager
    def last_graph(
        self, stand_ins: StandIns
    ) -> Iterator[tuple[Tensor, Mapping[str, Tensor]] | None]:
        """Return a context with the last measurement, made again, or ``None``.

        ``None`` means that nothing was measured. The context undoes what the
        measurement does to the model.
        """
        if self.measure is None:
            yield None
            return
        with restored(self._model.modules()):
            rewind = stand_ins.remember(self.gates)
            yield self.measure()
            rewind()

    def _found_by_any(
        self, found: Mapping[str, gates.Gate], stand_ins: StandIns
    ) -> dict[str, gates.Gate]:
        """Return the gates that any rank has found; a graph may depend on a batch."""
        kinds = (None, gates.NORMALISATION, gates.SCALE, gates.WEIGHT)
        names = [name for name in stand_ins.leaves if name in self._candidates]
        codes = {name: kinds.index(gate.kind) for name, gate in found.items()}
        rows = self._shards.ranks.gather(*(codes.get(name, 0) for name in names))
        agreed = {}
        for name, *given in zip(names, *rows, strict=True):
            if kind := kinds[int(max(given))]:
                agreed[name] = gates.Gate(name, kind, self._candidates[name])
        return agreed

    def _dense(self) -> dict[str, Tensor]:
        """Return the values of the model's own parameters, by name."""
        return {name: weight.local for name, weight in self._parameters.items()}
