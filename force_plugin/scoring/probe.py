"""Measure a network, as it is pruned so far, and leave no trace in it.

The network is measured with stand-ins: other tensors in the place of its weights and
buffers. Its own are never written to, so afterwards, also when the loader or the loss
raises half-way, they are bit for bit what they were.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    nullcontext,
    suppress,
)
from functools import partial, reduce
from itertools import pairwise
from numbers import Real
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from force_plugin.data.containers import (
    CHANNELS_LAST,
    count_samples,
    cut,
    describe,
    is_pair,
    tensors,
    to_device,
)
from force_plugin.errors import (
    BatchError,
    MethodError,
    NoGradientError,
    NotFiniteError,
    RankError,
)
from force_plugin.model.names import name_some
from force_plugin.model.reparametrisation import show_all
from force_plugin.model.restoring import (
    Kept,
    random_states,
    restored,
    snapshot,
    without_trace,
)
from force_plugin.model.weights import (
    Weight,
    is_scripted,
    named_parameters,
    part_of,
)
from force_plugin.parallel.shards import WHOLE, Parts
from force_plugin.scoring import dead_gradients, gates
from force_plugin.scoring.connectivity import (
    Flow,
    find_flow,
    responds,
)
from force_plugin.scoring.malloc import freed_memory_kept
from force_plugin.scoring.temperature import Dividing, divide
from force_plugin.selection.schedules import check_arguments, check_count

Loader = Iterable[Any]
LossFn = Callable[[Any, Any], Tensor]
Forward = Callable[[nn.Module, Any], Tensor]


# What a network may raise that is called in another way than it was scored. All else,
# such as a full disk, arrives as it was.
_OF_THE_LOOK = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

# What no call in another way would mend, though it is a RuntimeError.
_PASSED_ON = (torch.cuda.OutOfMemoryError, RankError)

# What PyTorch's losses raise of outputs and targets that do not fit.
_OF_A_MISFIT = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)

_PASS_FORWARD = "pass forward=, a callable (model, batch) -> loss"


class Probe:
    """Measures a network, as it is pruned so far.

    A context manager: what it has put in the place of the network's weights and
    buffers is gone when it exits. Nothing is touched, and no batch is read, before the
    first measurement.

    Args:
        model: The network.
        weights: Its prunable weights.
        loader: Iterable of batches; it is cycled.
        batches: Batches a step, ``None`` for a whole pass of the loader a step.
        loss_fn: ``loss_fn(model(inputs), targets)``.
        forward: ``forward(model, batch)``, a loss; replaces ``loss_fn``.
        open_gates: Measure with closed gates opened.
        microbatch: The most samples that are passed through the network at once.
        autocast: ``torch.bfloat16`` runs the passes under :func:`torch.autocast`.
        channels_last: Hand inputs of 4 or 5 dimensions over with channels last.
        compile: Run :meth:`gradients` by :func:`torch.compile`, from the second pass
            on; a string is its mode.
        on_batch: Called after each batch with its number within the step, from 1.
        parts: The processes that measure together: what is measured is the mean over
            their batches, and they open the same gates. If the network is sharded, each
            has its part of whatever is said here to have a weight's shape.

    Attributes:
        parts: As given.
        weights: The dense weights θ by parameter name, without gradient.
        masks: The mask c by parameter name, or ``None`` as long as nothing is pruned.
        parameters: Every parameter of the model, by name.
        step: The step being measured, from 1.
        loss: Mean loss of the last measurement that needed one.
        gates: The closed gates that were opened, by parameter name. Weights that are 0
            are there from the beginning, other gates from the first measurement on.
        problems: What could not be measured as it was asked for, a sentence each.
    """

    def __init__(  # noqa: D107 (the class has it)
        self,
        model: nn.Module,
        weights: Sequence[Weight],
        loader: Loader,
        *,
        batches: int | None = 1,
        loss_fn: LossFn = nn.functional.cross_entropy,
        forward: Forward | None = None,
        open_gates: bool = False,
        microbatch: int | None = None,
        autocast: torch.dtype | None = None,
        channels_last: bool = False,
        compile: bool | str = False,
        on_batch: Callable[[int], object] = lambda number: None,
        parts: Parts = WHOLE,
    ) -> None:
        for name, count in (("batches", batches), ("microbatch", microbatch)):
            if count is not None:
                check_count(name, count)
        _check_loss("loss_fn", loss_fn, "(outputs, targets)")
        if forward is not None:
            _check_loss("forward", forward, "(model, batch)")
        if autocast not in (None, torch.bfloat16):
            raise ValueError(
                f"autocast: expected torch.bfloat16 or None, got {autocast!r}"
                + (
                    "; in it small gradients underflow to 0 without a GradScaler"
                    if autocast is torch.float16
                    else ""
                )
            )
        if compile and parts.sharded:
            raise ValueError(
                "compile: expected a model that is not sharded, as parameters that "
                "are put together when they are read cannot be compiled; leave compile "
                "out, or prune the model before it is sharded"
            )
        self.model = model
        self.parts = parts
        self.parameters = named_parameters(model)
        self.gates: dict[str, gates.Gate] = {}
        # Parameters that may turn out to be gates when a graph is there to look at.
        self._candidates: dict[str, float] = {}
        if open_gates:
            shapes = {w.name: w.shape for w in weights}
            others = {n: w.shape for n, w in self.parameters.items() if w.prunable}
            small = gates.small(self._dense(), parts)
            self.gates = gates.closed_weights(shapes | others, small)
            matrices = {name for name, shape in shapes.items() if len(shape) > 1}
            neither = small.keys() - self.gates.keys() - matrices
            self._candidates = {name: small[name] for name in small if name in neither}
        opened = self._opened()
        self.weights = {w.name: opened.get(w.name, w.part) for w in weights}
        self.masks: Mapping[str, Tensor] | None = None
        self.step = 1
        self.loss = float("nan")
        self.problems: list[str] = []
        self._device = next(iter(self.weights.values())).device
        self._loader = loader
        self._per_step = batches
        self._iterator: Iterator[Any] | None = None
        self._loss_fn = loss_fn
        self._forward = forward
        self._microbatch = microbatch
        self._autocast: Callable[[], AbstractContextManager[object]] = (
            partial(torch.autocast, self._device.type, autocast)
            if autocast
            else nullcontext
        )
        self._formats = CHANNELS_LAST if channels_last else {}
        self._compile = compile
        self._on_batch = on_batch
        self._input_shape: tuple[int, ...] | None = None
        # Stand-ins of all parameters, and of those that are scored.
        self._leaves: dict[str, nn.Parameter] = {}
        self._stand_ins: dict[str, nn.Parameter] = {}
        # The absolute values of the stand-ins, by their identity.
        self._twins: dict[int, nn.Parameter] = {}
        self._last_batch: Any = None
        # The model's own; the stand-ins take on what a pass writes.
        self._buffers = dict(model.named_buffers())
        # Whose outputs a temperature divides where the loss comes from ``forward``.
        self._outlets: Sequence[nn.Module] = [model]
        self._measure: Callable[[], tuple[Tensor, Mapping[str, Tensor]]] | None = None
        self._exit = ExitStack()

    def __enter__(self) -> Probe:
        self._exit.enter_context(torch.enable_grad())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._iterator = self._last_batch = self._measure = None
        self._twins.clear()
        self._exit.close()

    def prune(self, masks: Mapping[str, Tensor]) -> None:
        """Measure the network with these masks from now on, as the next step.

        Args:
            masks: Bool tensors by parameter name, True = kept.
        """
        self.masks = masks
        self.step += 1
        self._mask_stand_ins()

    def gradients(self) -> dict[str, Tensor]:
        """Mean over the step's batches of ∂L/∂θ at θ ⊙ c, pruned weights included.

        Returns:
            By parameter name; the caller's to overwrite. 16-bit weights give float32.

        Raises:
            NoGradientError: A weight got no gradient from any batch.
        """
        self._open()
        total, number, totals = 0.0, 0, _Sums(self._stand_ins)
        for number, batch in enumerate(self._batches(), start=1):  # noqa: B007
            for part, share in self._split(batch):
                loss = self._loss(part) * share
                totals.add_gradients(loss)
                total += loss.item()
        gradients = self._complete(totals)
        count = self._mean_loss(total, number)
        if count != 1:
            for gradient in gradients.values():
                gradient.div_(count)
        return gradients

    def hessian_gradients(self, temperature: float = 1.0) -> dict[str, Tensor]:
        """Hg at θ ⊙ c, with g held constant; g and Hg are summed over the batches.

        Each batch, or part of one, is passed through twice: for what it adds to g, and
        for the gradient of ⟨g, ∇L_b⟩. Of the last one, a single pass serves for both.

        Args:
            temperature: Divides the model's outputs before the loss. Where the loss
                comes from ``forward``, they are divided where they leave the model, or
                the one module that ``forward`` calls of it. A loss that is computed
                within the model, or of several modules, is taken as it is, which
                :attr:`problems` says.

        Returns:
            By parameter name; the caller's to overwrite.

        Raises:
            TypeError, ValueError: The temperature is no positive number, or the passes
                are to be compiled.
            NoGradientError: A weight got no gradient from any batch.
        """
        if isinstance(temperature, bool) or not isinstance(temperature, Real):
            raise TypeError(
                f"temperature: expected a number, got {type(temperature).__name__}"
            )
        if not 0 < temperature < math.inf:
            raise ValueError(
                f"temperature: expected a positive number, got {temperature}"
            )
        self._refuse_compile("second derivatives, which torch.compile lacks")
        self._open()
        batches = list(self._batches())
        *earlier, last = [piece for batch in batches for piece in self._split(batch)]
        g = _Sums(self._stand_ins)
        for part, share in earlier:
            g.add_gradients(self._loss(part, temperature) * share)
        total, totals = 0.0, _Sums(self._stand_ins)
        # The fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            for piece in (last, *earlier):
                part, share = piece
                loss = self._loss(part, temperature) * share
                slopes = torch.autograd.grad(
                    loss,
                    list(self._stand_ins.values()),
                    allow_unused=True,
                    create_graph=True,
                )
                pairs = dict(zip(self._stand_ins, slopes, strict=True))
                slope = {n: s.to_dense() for n, s in pairs.items() if s is not None}
                if piece is last:
                    for name, gradient in slope.items():
                        g.add(name, gradient.detach())
                    self._complete(g)
                # A weight that no gradient depends on has no curvature.
                curved = [name for name, s in slope.items() if s.requires_grad]
                if curved:
                    # The gradient of the sum of their products, which is not needed.
                    vectors = [g[n].to(slope[n].dtype) for n in curved]
                    try:
                        totals.add_gradients([slope[n] for n in curved], vectors)
                    except RuntimeError as error:
                        if "is not implemented" not in str(error):
                            raise
                        raise NoGradientError(
                            "GraSP needs second derivatives, and PyTorch lacks one: "
                            f"{error}",
                            "take another activation or another method",
                        ) from error
                total += loss.item()
        self._mean_loss(total, len(batches))
        totals.average(self.parts)
        return {
            name: totals.get(name, torch.zeros_like(weight))
            for name, weight in self.weights.items()
        }

    def synflow_gradients(self) -> dict[str, Tensor]:
        """``|∂R/∂θ|`` at ``|θ ⊙ c|``, in float64 (float32 where there is none).

        R is the sum of the outputs for one input of ones of the shape that the loader
        gives, with all parameters and buffers replaced by their absolute values, in
        evaluation mode.

        Returns:
            By parameter name, float64; the caller's to overwrite.

        Raises:
            BatchError: The inputs are no floating-point tensor, or no output is one, or
                the model fails on such an input.
            ValueError: The passes are to be compiled, or a part of the model is
                TorchScript.
            NoGradientError: A weight, or all of them, got no gradient.
        """
        self._refuse_compile("the network anew at each step")
        scripted = [name for name, m in self.model.named_modules() if is_scripted(m)]
        if scripted:
            raise ValueError(
                "SynFlow: expected a model whose values can all be replaced by their "
                f"magnitudes, got one with a part in TorchScript ({scripted[0]}); take "
                "another method"
            )
        self._open()
        if self._input_shape is None:
            batch = next(self._batches(count=1))
            inputs = batch[0] if is_pair(batch) else batch
            if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
                raise BatchError(
                    "SynFlow: expected batches (inputs, targets) or inputs, one "
                    "floating-point tensor that ones can take the place of, got "
                    f"{describe(inputs)}",
                    "take another method for other inputs",
                )
            self._input_shape = (1, *inputs.shape[1:])
        dtype = torch.float32 if self._device.type == "mps" else torch.float64
        ones = torch.ones(self._input_shape, dtype=dtype, device=self._device)

        def measure() -> tuple[Tensor, Mapping[str, Tensor]]:
            twins = self._make_positive(dtype)
            with torch.autocast(self._device.type, enabled=False):
                try:
                    outputs = self.model(ones.clone())
                except _PASSED_ON:
                    raise
                except _OF_THE_LOOK as error:
                    raise BatchError(
                        f"SynFlow: the model fails on {describe(ones)}, one input of "
                        f"ones: {str(error).rstrip('.')}",
                        "SynFlow calls model(inputs) with one tensor, in float64, and "
                        "has no use for forward=: leave casts such as .float() out of "
                        "the model's forward, or take another method",
                    ) from error
            flow = [
                output.sum()
                for output in tensors(outputs)
                if output.is_floating_point() or output.is_complex()
            ]
            if not flow:
                raise BatchError(
                    "SynFlow: expected a model whose outputs are tensors, got "
                    f"{describe(outputs)}",
                    "take another method for other outputs",
                )
            total = reduce(torch.add, flow)
            if not total.requires_grad:
                raise NoGradientError(
                    "SynFlow: expected outputs that depend on the weights through "
                    f"autograd, got {describe(outputs)} without a gradient",
                    "return them without detach or no_grad",
                )
            return total, twins

        with restored(self.model.modules()):
            flow, twins = self._revealed(measure)
            totals = _Sums({name: twins[name] for name in self.weights})
            totals.add_gradients(flow)
        return self._complete(
            totals,
            "the outputs do not depend on it",
            "leave it out with parameters=, or take another method",
        )

    def explain_silence(self, names: Sequence[str]) -> dict[str, str]:
        """Why weights have a saliency of exactly 0, by parameter name.

        Costs one more pass of the last batch, where there is any such weight.
        """
        masks = {
            name: self.parts.part(name, mask)
            for name in names
            if (mask := self.parameters[name].mask) is not None
        }
        pruned = self.parts.empty(masks)
        alive = self.parts.count({name: self.weights[name] for name in names})
        causes = {
            name: "the method gives it none" if count else "its weights are 0"
            for name, count in alive.items()
        }
        asked = [name for name in names if name not in pruned]
        if asked and self._measure is not None:
            with restored(self.model.modules()):
                rewind = self._remember()
                output, leaves = self._measure()
                found = dead_gradients.find_ends(output, {n: leaves[n] for n in asked})
                rewind()
            causes |= {name: cause for name, cause in found.items() if cause}
        return causes | dict.fromkeys(pruned, dead_gradients.PRUNED)

    def flow(self) -> tuple[bool | None, int, list[str]]:
        """What the outputs of the network, as it is pruned, depend on.

        On its inputs if a gradient that is not exactly 0 reaches those of the last
        batch that was measured, on any rank, or if in evaluation mode other inputs give
        other outputs. A few of its samples are tried first, and cost next to nothing.
        Where no gradient reaches the inputs of the dense network either (the stem is
        detached), a gradient that reaches any of the kept weights is what counts.

        Returns:
            Whether they do, ``None`` where nothing was measured with data before, or no
            pass of such a look succeeds; how many of the kept weights no gradient
            reaches that does so in the dense network, 0 where it is not known; and the
            names of weights whose gradient is NaN or infinite.
        """
        if self._last_batch is None:
            return None, 0, []
        batch, _ = next(self._split(self._last_batch))
        inputs = batch[0] if is_pair(batch) else batch

        def run(inputs: Any = inputs) -> object:
            with self._autocast():
                if self._forward is not None:
                    return self._forward(self.model, self._moved(batch))
                self.model(self._moved(inputs))
                return None

        ranks = self.parts.ranks
        kept = sum(self.parts.count(self.masks or {}).values())
        # What fails on one rank only would lose the ranks of a sharded network.
        few_serve = isinstance(inputs, Tensor) and not self.parts.sharded
        if self._forward is None and few_serve:
            # Fewer samples may be too few to wake a sparse unit.
            found = self._flow_of(lambda: run(inputs[:8]))
            idle = self._count_idle(found)
            if ranks.any(bool(found.connected)) and 2 * idle <= kept:
                return True, idle, self._not_finite(found)
            del found  # and its gradients
        found = self._flow_of(run)
        idle = self._count_idle(found)
        connected, broken = ranks.any(bool(found.connected)), self._not_finite(found)
        if connected and 2 * idle <= kept:
            return True, idle, broken
        masks, self.masks = self.masks, None
        try:
            self._mask_stand_ins()
            dense = self._flow_of(run)
        finally:
            self.masks = masks
            self._mask_stand_ins()
        if connected:
            return True, self._count_idle(found, dense), broken
        if ranks.any(bool(dense.connected)):
            return self._responds(run), 0, broken
        if math.isnan(self.loss):  # SynFlow's, which has none
            return None, 0, broken
        reached = self._reaches_weights(batch)
        if ranks.any(bool(reached)):
            return True, 0, broken
        return (None if ranks.any(reached is None) else False), 0, broken

    def _not_finite(self, found: Flow) -> list[str]:
        pairs = zip(self._stand_ins, found.gradients, strict=True)
        return [
            name
            for name, gradient in pairs
            if gradient is not None and not gradient.to_dense().isfinite().all()
        ]

    def _flow_of(self, run: Callable[[], object]) -> Flow:
        """The flow, or that none was found: to look at a network must not fail it.

        Where a pass fails, as that of a normalisation over a single sample, one in
        evaluation mode serves.
        """
        weights = list(self._stand_ins.values())
        if self.parts.sharded:
            return find_flow(self.model, run, weights)
        for mode in (nullcontext, self.evaluation_mode):
            with suppress(*_OF_THE_LOOK), mode():
                return find_flow(self.model, run, weights)
        return Flow(None, [None] * len(weights))

    def _reaches_weights(self, batch: Any) -> bool | None:
        """Whether a gradient of the loss reaches any of the kept weights."""
        left = self.masks or {}
        with nullcontext() if self.parts.sharded else suppress(*_OF_THE_LOOK):
            sums = _Sums(self._stand_ins)
            sums.add_gradients(self._loss(batch))
            return any(
                bool((g[left[n]] if n in left else g).any()) for n, g in sums.items()
            )
        return None

    def _responds(self, run: Callable[[], object]) -> bool:
        """Whether the network has other outputs for other inputs, on any rank."""
        found = False
        if not self.parts.sharded:
            with suppress(*_OF_THE_LOOK), self.evaluation_mode():
                found = responds(self.model, run)
        return self.parts.ranks.any(found)

    def _count_idle(self, found: Flow, dense: Flow | None = None) -> int:
        """How many of the kept weights have no gradient, at most, on any rank."""
        idle, masks = 0, self.masks or {}
        able = dense.gradients if dense else [None] * len(found.gradients)
        for name, gradient, alive in zip(
            self._stand_ins, found.gradients, able, strict=True
        ):
            mask = masks[name]
            if gradient is not None:
                mask = mask & (gradient.to_dense() == 0)
            if alive is not None:
                mask = mask & (alive.to_dense() != 0)
            elif dense:
                continue
            idle += int(mask.count_nonzero())
        (everywhere,) = self.parts.total(idle)
        return int(min(row[0] for row in self.parts.ranks.gather(everywhere)))

    def _revealed(
        self, measure: Callable[[], tuple[Tensor, Mapping[str, Tensor]]]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """A result and the leaves of its graph, once no closed gate hides a weight.

        The first graph that there is shows the gates. If it has none that is closed it
        serves; if it has, they are opened and it is made again, as if nothing had been.
        """
        modes = [(module, module.training) for module in self.model.modules()]

        def again() -> tuple[Tensor, Mapping[str, Tensor]]:
            for module, training in modes:
                module.training = training
            return measure()

        self._measure = again
        if not self._candidates:
            return measure()
        rewind = self._remember()
        # A gate that is frozen would not be in the graph.
        frozen = [
            leaf
            for name in self._candidates
            if not (leaf := self._leaves[name]).requires_grad
        ]
        try:
            for leaf in frozen:
                leaf.requires_grad_()
            result, leaves = measure()
            found, looked = gates.closed_gates(
                result, leaves, candidates=self._candidates, scored=self.weights
            )
        except RuntimeError:
            # Networks may write to what is frozen; any other failure comes back below.
            if not frozen:
                raise
            found, looked = {}, True
        found = self._found_by_any(found)
        self._candidates = {}
        if not (frozen or looked or found):
            return result, leaves
        result = leaves = None  # type: ignore[assignment]  # frees the graph
        for leaf in frozen:
            leaf.requires_grad_(False)
        rewind()
        for name, values in gates.open_values(found, self._leaves, self.parts).items():
            self._leaves[name].data.copy_(values)
            if name in self.weights:
                self.weights[name] = values
        self.gates |= found
        return measure()

    def _found_by_any(self, found: Mapping[str, gates.Gate]) -> dict[str, gates.Gate]:
        """The gates that any rank has found: a graph may depend on its batch."""
        kinds = (None, gates.NORMALISATION, gates.SCALE, gates.WEIGHT)
        names = [name for name in self._leaves if name in self._candidates]
        codes = {name: kinds.index(gate.kind) for name, gate in found.items()}
        rows = self.parts.ranks.gather(*(codes.get(name, 0) for name in names))
        agreed = {}
        for name, *given in zip(names, *rows, strict=True):
            if kind := kinds[int(max(given))]:
                agreed[name] = gates.Gate(name, kind, self._candidates[name])
        return agreed

    def _remember(self) -> Callable[[], None]:
        """What a forward pass may change, and the way back."""
        restore = snapshot(self.model.modules())
        randomness = random_states(self.model)
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]

        def rewind() -> None:
            restore()
            randomness()
            with torch.no_grad():
                for buffer, values in buffers:
                    buffer.copy_(values)
            self._fill_leaves()

        return rewind

    def _fill_leaves(self) -> None:
        """Give stand-ins of what is not scored, nor opened, the model's values."""
        for name, leaf in self._leaves.items():
            if name not in self.weights and name not in self.gates:
                leaf.data.copy_(self.parameters[name].part)

    def _dense(self) -> dict[str, Tensor]:
        """The model's own parameters by name."""
        return {name: weight.part for name, weight in self.parameters.items()}

    def _opened(self) -> dict[str, Tensor]:
        """Values of the gates that are open."""
        transposed = {n for n in self.gates if self.parameters[n].transposed}
        return gates.open_values(self.gates, self._dense(), self.parts, transposed)

    def _make_positive(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Absolute values in the place of all parameters and buffers; parameters."""
        buffers: dict[int, Tensor] = {}

        def positive(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor.detach().clone()
            return tensor.detach().to(dtype, copy=True).abs_()

        def twin(parameter: nn.Parameter) -> nn.Parameter:
            if id(parameter) not in self._twins:
                made = nn.Parameter(positive(parameter), parameter.requires_grad)
                self._twins[id(parameter)] = made
                return made
            # Made anew at each step, they would be most of its cost.
            kept = self._twins[id(parameter)]
            kept.requires_grad_(parameter.requires_grad)
            kept.data.copy_(parameter)
            if kept.is_floating_point():
                kept.data.abs_()
            return kept

        for module in self.model.modules():
            module.training = False
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    if id(buffer) not in buffers:
                        buffers[id(buffer)] = positive(buffer)
                    module._buffers[key] = buffers[id(buffer)]
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[key] = twin(parameter)
        show_all(self.model)
        return {name: self._twins[id(leaf)] for name, leaf in self._leaves.items()}

    @contextmanager
    def protected(self, by: str) -> Iterator[None]:
        """Take back what someone else writes to the model's own values, or to masks.

        Stand-ins are there to be written to, and have their values again afterwards.

        Args:
            by: Who may do so, for the message.

        Raises:
            MethodError: It was done.
        """
        self._open()
        own: dict[str, Tensor] = {
            name: part_of(w.dense) for name, w in self.parameters.items()
        }
        opened = {n: self.weights[n] for n in self.weights if n in self.gates}
        masks = {f"the mask of {n}": mask for n, mask in (self.masks or {}).items()}
        kept = {
            name: Kept(tensor)
            for name, tensor in (own | self._buffers | opened | masks).items()
            if type(tensor) in (Tensor, nn.Parameter)
            if tensor.layout == torch.strided and not tensor.is_meta
        }
        kept |= {
            f"the gradient of {name}": Kept(gradient)
            for name, weight in self.parameters.items()
            if type(gradient := weight.dense.grad) is Tensor
            and gradient.layout == torch.strided
        }
        flags = {
            name: (weight.dense.requires_grad, weight.dense.grad)
            for name, weight in self.parameters.items()
        }
        written: list[str] = []
        try:
            yield
        finally:
            written += [name for name, one in kept.items() if one.put_back()]
            for name, (trained, gradient) in flags.items():
                dense = self.parameters[name].dense
                if dense.requires_grad != trained or dense.grad is not gradient:
                    dense.requires_grad_(trained).grad = gradient
                    written.append(name)
            for name in self.weights.keys() - self.gates.keys():
                part, now = self.parameters[name].part, self.weights[name]
                if (now.data_ptr(), now.shape) != (part.data_ptr(), part.shape):
                    self.weights[name] = part
                    written.append(name)
            self._fill_leaves()
            self._mask_stand_ins()
        if written:
            raise MethodError(
                f"{by} has written into {name_some(written)}, which are there to read",
                "work out of place, or on a .clone(); only what it returns is used",
            )

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Every module in evaluation mode for a while, then as it was."""
        self._open()
        # That of TorchScript is none of its attributes in Python.
        scripted = [(m, m.training) for m in self.model.modules() if is_scripted(m)]
        with restored(self.model.modules()):
            try:
                for module in self.model.modules():
                    module.training = False
                yield
            finally:
                for module, training in scripted:
                    module.training = training

    def _open(self) -> None:
        """Put stand-ins in the place of weights and buffers."""
        if self._stand_ins:
            return
        self._exit.enter_context(without_trace(self.model, self._loader))
        if self._device.type == "cpu":
            self._exit.enter_context(freed_memory_kept())
        self._exit.callback(torch.clear_autocast_cache)
        self._exit.enter_context(self.parts.reading())
        self.parts.detach(self.model)
        if self._compile:
            mode = None if self._compile is True else self._compile
            self.model.compile(mode=mode)
            # What was compiled lives as long as the model, with its CUDA graphs.
            self._exit.callback(torch.compiler.reset)
        if "torch._dynamo" in sys.modules:
            # A model that was compiled is measured as it is written: compiling it anew
            # for stand-ins would cost more, and has no second derivatives.
            self._exit.enter_context(torch.compiler.set_stance("force_eager"))
        copies: dict[int, Tensor] = {}
        for module in self.model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    if id(buffer) not in copies:
                        copies[id(buffer)] = buffer.detach().clone()
                    module._buffers[key] = copies[id(buffer)]
                    if is_scripted(module):  # it holds them elsewhere, in C++
                        put_back = module._buffers.__setitem__
                        self._exit.callback(put_back, key, buffer)
        opened = self._opened()
        for name, parameter in self.parameters.items():
            scored = name in self.weights
            values = opened.get(name, parameter.part).clone()
            stand_in = nn.Parameter(values, scored or parameter.dense.requires_grad)
            for module, key in parameter.slots():
                module._parameters[key] = stand_in
                if self.parts.sharded:
                    if not isinstance(module._parameters, _PutTogether):
                        vars(module)["_parameters"] = _PutTogether(
                            module._parameters, self.parts
                        )
                    module._parameters.names[key] = name  # type: ignore[attr-defined]
            self._leaves[name] = stand_in
        show_all(self.model)
        self._stand_ins = {name: self._leaves[name] for name in self.weights}
        self._mask_stand_ins()

    def _mask_stand_ins(self) -> None:
        for name, stand_in in self._stand_ins.items():
            if self.masks is None:
                stand_in.data.copy_(self.weights[name])
            else:
                # On a CPU, bytes become floats several times as fast as bools do, and
                # to multiply by floats is faster than by bytes.
                kept = self.masks[name].view(torch.uint8)
                stand_in.data.copy_(kept).mul_(self.weights[name])
        # Autocast keeps a copy of each weight that it has cast once.
        torch.clear_autocast_cache()

    def _batches(self, count: int | None = None) -> Iterator[Any]:
        """The batches of one step, as they come."""
        self._open()
        wanted = count or self._per_step
        number = 0
        if wanted is None or self._iterator is None:
            self._iterator = self._start()
        while wanted is None or number < wanted:
            try:
                batch = next(self._iterator)
            except StopIteration:
                if wanted is None and number:
                    self._go_on_together(False)
                    return
                self._iterator = self._start()
                try:
                    batch = next(self._iterator)
                except StopIteration:
                    raise BatchError(*self._dry(number)) from None
            number += 1
            if wanted is None:
                self._go_on_together(True)
            self._last_batch = batch
            yield batch
            self._on_batch(number)

    def _split(self, batch: Any) -> Iterator[tuple[Any, float]]:
        """The parts of a batch, and the share of its samples that each of them has."""
        most = self._microbatch
        if most is None:
            yield batch, 1.0
            return
        samples = count_samples(batch)
        if not samples:
            raise BatchError(
                "microbatch: expected batches with a tensor whose first dimension are "
                f"the samples, at least one, got {describe(batch)} without",
                "leave microbatch out",
            )
        count = math.ceil(samples / most)
        self._go_on_together(count, f"parts of at most {most} samples")
        # Of about the same size: a batch norm can do little with what is left over.
        for start, end in pairwise(samples * i // count for i in range(count + 1)):
            yield cut(batch, samples, slice(start, end)), (end - start) / samples

    def _go_on_together(self, more: int, what: str = "batches") -> None:
        """Make sure that the ranks of a sharded network have equally much to pass."""
        if self.parts.sharded:
            others = [row[0] for row in self.parts.ranks.gather(more)]
            if min(others) != max(others):
                fewer = others.index(min(others))
                raise BatchError(
                    f"loader: expected as many {what} on every rank, as the ranks of a "
                    f"sharded model score together, got fewer on rank {fewer}"
                )

    def _start(self) -> Iterator[Any]:
        try:
            return iter(self._loader)
        except TypeError:
            if hasattr(type(self._loader), "__iter__"):
                raise  # it has its own reason
            raise TypeError(
                "loader: expected an iterable of batches (a DataLoader, a list), got "
                f"{type(self._loader).__name__}"
            ) from None

    def _dry(self, number: int) -> tuple[str, str]:
        """Why there is no batch, after so many of a step, and what to do."""
        if iter(self._loader) is self._loader:
            return (
                f"loader: it ran dry at step {self.step} after {number} batches of the "
                "step, and can be read only once",
                "pass a DataLoader or a list, which are read again",
            )
        return (
            "loader: expected at least one batch, got none",
            "pass data, and where there are fewer samples than a batch has, a "
            "DataLoader without drop_last",
        )

    def _loss(self, batch: Any, temperature: float = 1.0) -> Tensor:
        """The loss of one batch, with gates open."""

        def measure() -> tuple[Tensor, Mapping[str, Tensor]]:
            with self._autocast():
                return self._checked_loss(batch, temperature), self._leaves

        with self._compiled():
            first = self._measure is None
            loss, _ = self._revealed(measure)
        if first and gates.recomputes(loss):
            raise NoGradientError(
                "the model recomputes activations by torch.utils.checkpoint with "
                "use_reentrant=True, which hides weights from the gradients that "
                "scoring takes",
                "pass use_reentrant=False there, as transformers' "
                'gradient_checkpointing_enable({"use_reentrant": False}) does, or turn '
                "it off until the model is pruned",
            )
        return loss

    @contextmanager
    def _compiled(self) -> Iterator[None]:
        """Compile a pass, if an earlier one has shown the gates."""
        if not self._compile or self._measure is None:
            yield
            return
        if self._device.type == "cuda":
            # A CUDA graph writes to the same memory in each pass, so its gradients are
            # added to tensors of ours.
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            for stand_in in self._stand_ins.values():
                if stand_in.grad is None:
                    stand_in.grad = torch.zeros_like(stand_in)
        with torch.compiler.set_stance("default"):
            yield

    def _refuse_compile(self, what: str) -> None:
        if self._compile:
            raise ValueError(
                "compile: expected a method that needs nothing but gradients, such as "
                f"force, got one that needs {what}; leave compile out"
            )

    def _moved(self, batch: Any) -> Any:
        return to_device(batch, self._device, self._formats)

    def _checked_loss(self, batch: Any, temperature: float) -> Tensor:
        if self._forward is not None:
            source = "forward"
            loss = self._loss_of_forward(self._forward, batch, temperature)
        else:
            source = "loss_fn"
            loss = self._loss_of_pair(batch, temperature)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise BatchError(
                f"{source}: expected a loss of one number, got {describe(loss)}"
            )
        if loss.is_complex():
            raise BatchError(f"{source}: expected a real loss, got {describe(loss)}")
        if not loss.requires_grad:
            raise NoGradientError(
                f"{source}: the loss does not depend on the weights through autograd",
                "compute it from the model's outputs, without detach or no_grad",
            )
        if not torch.isfinite(loss):
            cause, advice = self._explain_loss(batch, bool(loss.isnan()))
            raise NotFiniteError(
                f"the loss is {loss.item()} at step {self.step}: {cause}", advice
            )
        return loss.reshape(())

    def _loss_of_pair(self, batch: Any, temperature: float) -> Any:
        """The loss of ``(inputs, targets)``, by ``loss_fn``."""
        if not is_pair(batch):
            raise BatchError(
                f"loader: expected batches (inputs, targets), got {describe(batch)}",
                f"for other batches {_PASS_FORWARD}",
            )
        inputs, targets = self._moved(batch)
        if isinstance(inputs, Tensor) and inputs.shape[:1] == (0,):
            raise BatchError(
                "loader: expected at least one sample in each batch, got inputs "
                f"{describe(inputs)}",
                "leave empty batches out",
            )
        outputs = self._call(inputs)
        if temperature != 1.0:
            outputs, divided = divide(outputs, temperature)
            if not divided:
                self._warn_of(temperature, f"the outputs are {describe(outputs)}")
        try:
            return self._loss_fn(outputs, targets)
        except _PASSED_ON:
            raise
        except _OF_A_MISFIT as error:
            advice = "make the targets what loss_fn expects, or pass loss_fn="
            if not isinstance(outputs, Tensor):
                advice = "pass a loss_fn= that takes such outputs,"
            raise BatchError(
                f"loss_fn failed on outputs {describe(outputs)} and targets "
                f"{describe(targets)}: {str(error).rstrip('.')}",
                f"{advice} or forward=",
            ) from error

    def _call(self, inputs: Any) -> Any:
        """The outputs; an error that a call in another way may mend says so."""
        try:
            return self.model(inputs)
        except _PASSED_ON:
            raise
        except _OF_THE_LOOK as error:
            try:
                inspect.signature(self.model.forward).bind(inputs)
                strange = isinstance(inputs, Mapping | tuple | list)
            except TypeError:
                strange = True
            if strange or isinstance(error, NotImplementedError):
                raise BatchError(
                    f"the model failed when it was called as model(inputs), on inputs "
                    f"{describe(inputs)}: {str(error).rstrip('.')}",
                    f"for a model that is called otherwise {_PASS_FORWARD}",
                ) from error
            if sys.version_info >= (3, 11):  # the network's own, with a hint below it
                error.add_note(
                    f"raised by model(inputs) on inputs {describe(inputs)}; for a "
                    f"model that is called otherwise {_PASS_FORWARD}"
                )
            raise

    def _loss_of_forward(self, forward: Forward, batch: Any, temperature: float) -> Any:
        """The loss of any batch, by ``forward``, with outputs divided on the way."""
        if temperature != 1.0 and self._outlets:
            rewind = self._remember()
            inside = [
                module
                for module in self.model.modules()
                if module is not self.model
                and not is_scripted(module)
                and any(True for _ in module.parameters())
            ]
            for outlets in (self._outlets, inside):
                dividing = Dividing(outlets, temperature)
                with dividing:
                    loss = forward(self.model, self._moved(batch))
                reason = dividing.failure(loss)
                if not reason:
                    self._outlets = outlets
                    return loss
                rewind()
                if dividing.calls:
                    break
            self._outlets = ()
            self._warn_of(temperature, reason)
        return forward(self.model, self._moved(batch))

    def _warn_of(self, temperature: float, reason: str) -> None:
        problem = (
            f"the temperature of {temperature:g} was not used: {reason}. Divide the "
            "outputs yourself before the loss, in forward=, and pass a subclass of "
            "GraSP whose temperature is 1"
        )
        if problem not in self.problems:
            self.problems.append(problem)

    def _explain_loss(self, batch: Any, is_nan: bool) -> tuple[str, str]:
        """Why the loss of a batch is not finite, and what to do."""
        if broken := self.broken():
            advice = "look at the initialisation, or where these values come from"
            return f"there is a NaN or inf in {name_some(broken)}", advice
        if without := self._without_norm():
            return (
                f"a channel of {name_some(without)} has lost every weight, and "
                "weight_norm divides by its norm, which is 0",
                "take fewer steps or a lower sparsity, remove the weight norm before "
                "pruning, or leave these out with parameters=",
            )
        numbers = [t for t in tensors(batch) if t.is_floating_point()]
        if any(bool(t.isnan().any()) for t in numbers):
            return "there is a NaN in the batch", "look at the data"
        cause = f"an overflow in the network or in the loss, in {self.precision}"
        if is_nan:
            kinds = "0 divided by 0, the root or logarithm of a negative number"
            cause = f"an undefined result ({kinds}) or {cause}"
        advice = f"look at the initialisation and the loss{self.wider()}"
        if any(bool(t.isinf().any()) for t in numbers):
            cause = f"there is an inf in the batch, or {cause}"
            advice = advice.replace("look at ", "look at the data, ", 1)
        return cause, advice

    def _without_norm(self) -> list[str]:
        """Directions of weight_norm of which the mask has left a channel nothing."""
        return [
            name
            for name, mask in (self.masks or {}).items()
            if name.endswith(("_v", ".original1")) and not self.parts.sharded
            if mask.dim() > 1 and not mask.flatten(1).any(1).all()
        ]

    @property
    def precision(self) -> str:
        """The narrowest floating-point type of the passes."""
        if self._autocast is not nullcontext:
            return "bfloat16"
        device = self._device.type
        if torch.is_autocast_enabled(device):
            return str(torch.get_autocast_dtype(device)).removeprefix("torch.")
        weights = (w.dense for w in self.parameters.values())
        types = {w.dtype for w in weights if w.is_floating_point()}
        return str(min(types, key=lambda t: t.itemsize)).removeprefix("torch.")

    def wider(self) -> str:
        """What else to try against an overflow: a wider type, if there is one."""
        if self._autocast is not nullcontext or torch.is_autocast_enabled(
            self._device.type
        ):
            return ", or score without autocast"
        if self.precision == "float64" or self._device.type == "mps":
            return ""
        if self.precision == "float32":
            return ", or score in float64 (model.double(), with batches in float64)"
        return ", or score in float32 instead of 16 bits"

    def broken(self) -> list[str]:
        """Parameters that are not finite, and buffers that hold a NaN.

        An inf in a buffer is an attention mask, as a rule. Sparse tensors are left out:
        PyTorch cannot tell.
        """
        infinite = [
            name
            for name, value in self.model.named_parameters()
            if value.layout == torch.strided and not value.isfinite().all()
        ]
        return infinite + [
            name
            for name, value in self._buffers.items()
            if value.layout == torch.strided and value.isnan().any()
        ]

    def _mean_loss(self, total: float, batches: int) -> float:
        """Note the mean loss of the batches of all ranks; their number on a rank."""
        rows = self.parts.ranks.gather(total, batches)
        count = sum(row[1] for row in rows)
        self.loss = sum(row[0] for row in rows) / count
        return count / len(rows)

    def _complete(
        self,
        sums: _Sums,
        problem: str = "the loss does not use it, or behind a detach or no_grad only",
        advice: str = "leave it out with parameters=, or pass a forward= that uses it",
    ) -> dict[str, Tensor]:
        """The mean of the ranks' sums, in the order of the weights.

        Args:
            sums: Of this rank.
            problem: What it means that there is none for a weight.
            advice: What to do about it.
        """
        sums.average(self.parts)
        missing = [name for name in self.weights if name not in sums]
        if missing:
            raise NoGradientError(
                f"no gradient reached {name_some(missing)} at step {self.step}: "
                f"{problem}",
                advice,
                missing,
            )
        return {name: sums[name] for name in self.weights}


def _check_loss(name: str, function: object, arguments: str) -> None:
    """Make sure that a function can be asked for a loss."""
    if isinstance(function, type) and issubclass(function, nn.Module):
        kind = function.__name__
        raise TypeError(
            f"{name}: expected a callable {arguments} -> loss, got the class {kind}; "
            f"pass an instance, {kind}()"
        )
    if not callable(function):
        raise TypeError(f"{name}: expected a callable, got {type(function).__name__}")
    check_arguments(name, function, f"a callable {arguments} -> loss", 2)


class _PutTogether(dict[str, nn.Parameter | None]):
    """The parameters of a module, as ``_parameters``: whole ones for who reads them."""

    def __init__(self, parameters: Mapping[str, Any], parts: Parts) -> None:
        super().__init__(parameters)
        self.names: dict[str, str] = {}  # in the model, by the key in the module
        self._parts = parts

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if value is None or key not in self.names:
            return value
        return self._parts.read(self.names[key], value)


class _Sums(dict[str, Tensor]):
    """Gradients summed over batches, by parameter name; 16-bit ones in float32."""

    def __init__(self, leaves: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._leaves = leaves

    def add_gradients(
        self,
        outputs: Tensor | Sequence[Tensor],
        vectors: Sequence[Tensor] | None = None,
    ) -> None:
        # Not torch.autograd.grad, whose results can share memory (two weights that
        # are added up have one gradient) and would be overwritten twice by a score.
        torch.autograd.backward(outputs, vectors, inputs=list(self._leaves.values()))
        for name, leaf in self._leaves.items():
            gradient = leaf.grad
            if gradient is None or gradient is self.get(name):
                continue
            dense = gradient.to_dense()  # an embedding may ask for sparse ones
            if dense is gradient and dense.itemsize >= 4:
                self[name] = dense  # the next one is added to it by the backward pass
                continue
            leaf.grad = None
            self.add(name, dense)

    def add(self, name: str, gradient: Tensor) -> None:
        """Add a gradient that is kept if it is the first one."""
        wide = gradient.float() if gradient.itemsize < 4 else gradient
        if name in self:
            self[name].add_(wide)
        else:
            self[name] = wide

    def average(self, parts: Parts) -> None:
        """Average over ranks; what only some of them have is 0 on the others."""
        for leaf in self._leaves.values():
            leaf.grad = None  # or the next sum would begin with this one
        rows = parts.ranks.gather(*(name in self for name in self._leaves))
        for (name, leaf), *held in zip(self._leaves.items(), *rows, strict=True):
            if any(held) and name not in self:
                dtype = torch.promote_types(leaf.dtype, torch.float32)
                self[name] = torch.zeros_like(leaf, dtype=dtype, requires_grad=False)
        parts.average(self)
