"""What a model does in evaluation and in training mode, and whether a cut copy does it.

Some branches run in training only: auxiliary heads, most of all. A copy that lost
channels has to fit there too.
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
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode

from force_plugin.data.containers import mapped, tensors
from force_plugin.errors import CompactionError
from force_plugin.model.module_names import name_some
from force_plugin.model.restoring import random_states, restored
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
    """Have a copy in one of its modes for a while, where its inputs decide all.

    In training mode, every branch is taken that ``self.training`` opens. But random
    values are their means, so that dropout and stochastic depth change nothing, the
    statistics of normalisations are the running ones, and buffers stay as they are.
    Two copies of which one has fewer channels can so be compared.

    Args:
        model: A copy in evaluation mode, as :func:`plain_copy` makes it.
        mode: ``"evaluation"`` changes nothing.
        seed: Of what is random all the same.
    """
    if mode == "evaluation":
        yield
        return
    randomness = random_states(model)
    with restored(model.modules()), _Means():  # type: ignore[no-untyped-call]
        try:
            model.train()
            for module in model.modules():
                if isinstance(module, _NormBase):
                    module.eval()
                for key, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[key] = buffer.clone()
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            yield
        finally:
            randomness()


class _Means(TorchDispatchMode):
    """Random values are their means, of whatever shape they are."""

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
    # The mean of ones and zeros that are integers is the more frequent of them.
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
    """What a whole copy uses and gives out in each of its modes.

    Args:
        plain: A model as :func:`plain_copy` makes it; it stays as it is.
        masks: Masks by parameter name, True = kept; these weights are 0.
        inputs: What it is called with, in float64.

    Attributes:
        few: As many of the inputs as tracing needs.
        trial: The inputs with other values.
        variants: The copy, and one whose closed gates are open: behind a gate that is
            closed at initialisation, nothing is seen of a mistake.
        traced: Modes that are to be traced: training only where it uses other layers
            than evaluation, or gives out something else.
        measured: Names of the layers on which outputs in evaluation mode depend.
        unfollowed: Which layers' weights are used without a call, so that no graph
            shows what they read, in words; ``""``: none.

    Raises:
        CompactionError: It cannot be run, or its outputs are NaN.
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
        except Exception as error:  # it asks for targets, say
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
        """What is wrong with a copy that lost channels, in each of the modes.

        Args:
            cut: The copy; it gets other values.
            altered: What is changed in the whole copies while they are run to compare
                with. Default: nothing.
            values: Compare the values of outputs; else their shapes alone.
            because: What is added where values differ.

        Returns:
            How its outputs differ from those of the whole copies, ``None`` if they are
            the same.
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
        """What could not be looked at, a sentence each.

        Args:
            cut: Whether channels were taken out.
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
    """What a forward pass uses.

    Attributes:
        calls: How often each module is called, by its name.
        parameters: Identities of the parameters on which outputs depend.
        shapes: Of the outputs.
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
    """Identities of the leaves of autograd's graph that outputs depend on."""
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
    """The largest :func:`distance` of outputs of the same shapes; NaN if one is NaN."""
    off = [distance(one, other) for one, other in zip(found, expected, strict=True)]
    return float(torch.tensor([0.0, *off], dtype=torch.float64).max())


def is_bias(name: str) -> bool:
    """Whether a parameter is a bias, by its name."""
    return "bias" in name.rpartition(".")[2]


@torch.no_grad()
def _opened(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """What an initialisation has closed is open, wherever no mask is.

    Returns:
        A copy that shares all other parameters.
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
            module._parameters[key] = opened
    return result
