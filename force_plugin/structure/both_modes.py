"""Compare a model with a copy that lost channels, in evaluation and training mode.

Some branches run in training mode only, auxiliary heads above all. The channels of a
cut copy have to fit in these branches too.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from force_plugin.data.containers import mapped, tensors
from force_plugin.errors import CompactionError
from force_plugin.model.module_names import name_some
from force_plugin.model.registered import own_buffers
from force_plugin.model.restoring import random_states, restored
from force_plugin.model.torch_internals import (
    NormBase,
    TorchDispatchMode,
    put_buffer,
    put_parameter,
)
from force_plugin.model.weights import named_parameters
from force_plugin.scoring.gates import CLOSED
from force_plugin.structure.channel_layers import layers_of
from force_plugin.structure.cut_copies import deep_copy, fill
from force_plugin.structure.example_inputs import (
    TOLERANCE,
    call,
    distance,
    jittered,
    many_samples,
    outputs_of,
)

Mode = Literal["evaluation", "training"]


@contextmanager
def in_mode(model: nn.Module, mode: Mode, seed: int = 0) -> Iterator[None]:
    """Put a copy into a mode inside a ``with`` block, with deterministic outputs.

    In training mode, the copy runs every branch that ``self.training`` opens. Random
    values are replaced by their means, so dropout and stochastic depth change nothing.
    Normalisations use their running statistics. Buffers get their old values back at
    the end. A copy with fewer channels can so be compared with the whole copy.

    Args:
        model: A copy in evaluation mode, as :func:`plain_copy` makes it.
        mode: ``"evaluation"`` changes nothing.
        seed: Seed of the random generators, for random values that are not replaced.
    """
    if mode == "evaluation":
        yield
        return
    randomness = random_states(model)
    with restored(model.modules()), _Means():  # type: ignore[no-untyped-call]
        try:
            model.train()
            for module in model.modules():
                if isinstance(module, NormBase):
                    module.eval()
                for key, buffer in own_buffers(module).items():
                    put_buffer(module, key, buffer.clone())
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            yield
        finally:
            randomness()


class _Means(TorchDispatchMode):
    """A dispatch mode in which random functions return their means."""

    supports_higher_order_operators = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        mean = _MEANS.get(getattr(func, "overloadpacket", None))
        return result if mean is None else mean(result, *args)


def _filled(result: Tensor, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return result.copy_(value)
    # An integer tensor cannot hold the mean of 0 and 1: it gets the likelier value.
    return result.fill_(value if result.is_floating_point() else round(value))


def _kept(results: tuple[Tensor, Tensor], values: Tensor, *args: Any) -> Any:
    return results[0].copy_(values), results[1].fill_(True)


_aten = torch.ops.aten
_MEANS: dict[Any, Callable[..., Any]] = {
    _aten.rand: lambda result, *_: result.fill_(0.5),
    _aten.rand_like: lambda result, *_: result.fill_(0.5),
    _aten.uniform_: lambda result, _, low=0, high=1: result.fill_((low + high) / 2),
    _aten.randn: lambda result, *_: result.zero_(),
    _aten.randn_like: lambda result, *_: result.zero_(),
    _aten.normal_: lambda result, _, mean=0, std=1: result.fill_(mean),
    _aten.normal: lambda result, mean, *_: _filled(result, mean),
    _aten.exponential_: lambda result, _, rate=1: result.fill_(1 / rate),
    _aten.bernoulli_: lambda result, _, p=0.5: _filled(result, p),
    _aten.bernoulli: lambda result, own, p=None: _filled(
        result, own if p is None else p
    ),
    _aten.native_dropout: _kept,
}


class Behaviour:
    """The layers that a whole copy uses, and its outputs, in each mode.

    Args:
        plain: A model as :func:`plain_copy` makes it; it is not changed.
        masks: Masks by parameter name, True = kept. The masked weights of ``plain``
            are 0.
        inputs: The inputs that the copy is called with, in float64.

    Attributes:
        few: The part of the inputs that tracing needs.
        trial: The inputs with other values.
        variants: The copy, and a second copy whose closed gates are open. A gate that
            is closed at initialisation would hide a mistake behind it.
        traced: Modes to trace. Training mode is traced only if it uses other layers
            or parameters than evaluation mode, or has outputs of other shapes.
        measured: Names of the layers on which outputs in evaluation mode depend.
        unfollowed: A message that names layers whose weights are used without a call,
            so that no graph shows their inputs; ``""`` if there are none.

    Raises:
        CompactionError: The copy cannot be run, or its outputs are NaN.
    """

    def __init__(  # noqa: D107
        self, plain: nn.Module, masks: Mapping[str, Tensor], inputs: Any
    ) -> None:
        self._kind = type(plain).__name__
        self.few = many_samples(inputs, 2)
        self.variants = (plain, _opened(plain, masks))
        self.trial = mapped(jittered, inputs)
        try:
            uses = [_find_uses(plain, self.few, "evaluation")]
            self._expected: dict[Mode, list[list[Tensor]]] = {
                "evaluation": self._outputs_of_all("evaluation")
            }
        except Exception as error:
            raise CompactionError(
                f"{self._kind} cannot be run with example_inputs in float64: "
                f"{type(error).__name__}: {error}. The model is as it was"
            ) from error
        if _any_nan(self._expected["evaluation"][0]):
            raise CompactionError(
                f"{self._kind}: its outputs are NaN, so that they cannot be "
                "compared; look at the weights. The model is as it was"
            )
        self._refused = ""
        self._exact = False  # whether values can be compared in training mode
        try:
            uses.append(_find_uses(plain, self.few, "training"))
            self._expected["training"] = self._outputs_of_all("training")
            again = _outputs(plain, "training", self.trial, seed=1)
        except Exception as error:  # e.g. the model asks for targets
            self._refused = f"{type(error).__name__}: {error}"
            self._expected.pop("training", None)
            uses = uses[:1]
        else:
            expected = self._expected["training"][0]
            self._exact = _difference(again, expected) <= TOLERANCE
        self.traced: tuple[Mode, ...] = ("evaluation",)
        if len(uses) > 1 and uses[0] != uses[1]:
            self.traced = ("evaluation", "training")
        self.measured = {
            name
            for name, layer in layers_of(plain)
            if id(layer.weight) in uses[0].parameters
        }
        uncalled = [
            name
            for name, layer in layers_of(plain)
            if not any(name in one.calls for one in uses)
            and any(id(layer.weight) in one.parameters for one in uses)
            and not isinstance(_around(plain, name), nn.MultiheadAttention)
        ]
        self.unfollowed = ""
        if uncalled:
            self.unfollowed = (
                f"torch-pruning cannot follow what {name_some(uncalled)} may read, as "
                "the weight is used without a call"
            )
        self._unused = [
            name
            for name, module in plain.named_modules()
            if (own := {id(one) for one in module.parameters(recurse=False)})
            and not any(name in one.calls or own & one.parameters for one in uses)
        ]

    def problem(
        self,
        cut: nn.Module,
        altered: Callable[[nn.Module], AbstractContextManager[object]] | None = None,
        *,
        values: bool = True,
        because: str = "",
    ) -> str | None:
        """Return how a cut copy differs from the whole copies, ``None`` if not at all.

        Args:
            cut: The copy that lost channels. Its parameters get the values of the
                whole copies.
            altered: Returns a context in which a whole copy is changed while it runs
                for the comparison. Default: no change.
            values: Whether to compare the values of outputs, not only their shapes.
            because: Text to append to the message where values differ.

        Returns:
            A message about the first difference in outputs, or about an error in the
            cut copy. ``None`` if the outputs are equal.
        """
        for number, variant in enumerate(self.variants):
            fill(cut, variant)
            for mode, known in self._expected.items():
                where = "in training mode " if mode == "training" else ""
                try:
                    found = _outputs(cut, mode, self.trial)
                except Exception as error:
                    return f"{where}it would fail: {type(error).__name__}: {error}"
                expected = known[number]
                if [o.shape for o in found] != [o.shape for o in expected]:
                    return f"{where}the outputs would have other shapes"
                if not values or (mode == "training" and not self._exact):
                    continue
                if altered is not None:
                    with altered(variant):
                        expected = _outputs(variant, mode, self.trial)
                if not (off := _difference(found, expected)) <= TOLERANCE:
                    return (
                        f"{where}an output would change by {off:.3g} of the largest"
                        f"{because}"
                    )
        return None

    def complaints(self, cut: bool) -> Iterator[str]:
        """Yield a message for each mode and layer that could not be checked.

        Args:
            cut: Whether channels were removed.
        """
        unused = f"{name_some(self._unused)} of {self._kind}" if self._unused else ""
        if self._refused:
            also = f", which does not use {unused}" if unused else ""
            yield (
                f"{self._kind} cannot be run in training mode with example_inputs "
                f"alone ({self._refused}): only evaluation mode was compared{also}"
            )
        elif unused and cut:
            yield (
                f"neither evaluation nor training mode uses {unused}: it stays as it "
                "is, and may no longer fit what has lost channels"
            )

    def _outputs_of_all(self, mode: Mode) -> list[list[Tensor]]:
        return [_outputs(variant, mode, self.trial) for variant in self.variants]


class _Uses(NamedTuple):
    """The modules and parameters that a forward pass uses.

    Attributes:
        calls: Number of calls of each module, by its name.
        parameters: Identities of the parameters on which outputs depend.
        shapes: Shapes of the outputs.
    """

    calls: Counter[str]
    parameters: frozenset[int]
    shapes: list[torch.Size]


def _find_uses(model: nn.Module, inputs: Any, mode: Mode) -> _Uses:
    calls: Counter[str] = Counter()

    def count(name: str, *args: object) -> None:
        calls[name] += 1

    with (
        in_mode(model, mode),
        restored(model.modules()),
        torch.enable_grad(),
        ExitStack() as hooks,
    ):
        for name, module in model.named_modules():
            handle = module.register_forward_pre_hook(partial(count, name))
            hooks.callback(handle.remove)
        outputs = [*tensors(call(model, mapped(torch.clone, inputs)))]
    return _Uses(calls, _leaves(outputs), [output.shape for output in outputs])


def _around(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _leaves(outputs: Iterable[Tensor]) -> frozenset[int]:
    """Return the identities of autograd's leaves on which outputs depend."""
    found = {id(output) for output in outputs if output.is_leaf}
    stack = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(stack)
    while stack:
        function = stack.pop()
        if (leaf := getattr(function, "variable", None)) is not None:
            found.add(id(leaf))
        for following, _ in function.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return frozenset(found)


def _outputs(model: nn.Module, mode: Mode, inputs: Any, seed: int = 0) -> list[Tensor]:
    with in_mode(model, mode, seed):
        return outputs_of(model, inputs)


def _any_nan(outputs: Iterable[Tensor]) -> bool:
    return any(bool(output.isnan().any()) for output in outputs)


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest :func:`distance` between outputs; NaN if an output is NaN."""
    off = [distance(one, other) for one, other in zip(found, expected, strict=True)]
    return float(torch.tensor([0.0, *off], dtype=torch.float64).max())


def is_bias(name: str) -> bool:
    """Return whether a parameter's name says that it is a bias."""
    return "bias" in name.rpartition(".")[2]


@torch.no_grad()
def _opened(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy with random values in the weights that the initialisation closed.

    Closed weights are zeros, and all weights of a parameter without a value above
    ``CLOSED``. Weights under a mask stay 0, and biases keep their values. The copy
    shares all other parameters with the model.
    """
    memo = {id(parameter): parameter for parameter in model.parameters()}
    result = deep_copy(model, memo)
    for name, weight in named_parameters(result).items():
        values = weight.dense
        if not values.is_floating_point() or is_bias(name) or not values.numel():
            continue
        closed = values == 0
        if values.abs().max() <= CLOSED:
            closed = torch.ones_like(closed)
        if name in masks:
            closed &= masks[name].to(closed.device)
        if not closed.any():
            continue
        fan_in = values[0].numel() if values.dim() > 1 else 1
        drawn = (torch.rand_like(values) + 0.5) / fan_in**0.5
        opened = nn.Parameter(torch.where(closed, drawn, values))
        for module, key in weight.slots():
            put_parameter(module, key, opened)
    return result
