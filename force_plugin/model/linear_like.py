"""Tests whether a module multiplies its input by its own weight, as a linear layer.

The class of a module does not tell: transformers' ``Conv1D`` and users' own linear
layers are modules like any other. Instead, a stand-in of the module, with random
parameters and without hooks, gets random vectors. If the weight is a factor of a matrix
product, the gradient of the output for a vector is an outer product with this vector.
It is no outer product if the weight is a table to look up, is added, scales each value
separately, or is compared by distances. The module itself is neither called nor
changed.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from types import BuiltinFunctionType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from force_plugin.model.module_names import unwrapped
from force_plugin.model.registered import own_parameters
from force_plugin.model.reparametrisation import find_hook
from force_plugin.model.restoring import random_states
from force_plugin.model.torch_internals import registries, uninitialised

_SAMPLES = 3
_TOLERANCE = 1e-3
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype)

Verdict = Callable[[nn.Module, nn.Parameter], int | None]
# Verdicts that are known, as a model has many modules of the same kind.
_known: WeakKeyDictionary[type, dict[tuple[Any, ...], int | None]] = WeakKeyDictionary()


def output_axis(module: nn.Module, name: str) -> int | None:
    """Return the axis of a module's matrix that is the axis of its outputs.

    Args:
        module: Any module.
        name: Name of a parameter of the module with two dimensions, pruned or not.

    Returns:
        0 for a matrix ``[outputs, inputs]``, as in :class:`torch.nn.Linear`; 1 for
        ``[inputs, outputs]``; ``None`` if the matrix is no factor of a matrix product.
        It is also ``None`` if the module takes other arguments than a tensor of
        vectors, or if its other parameters are larger than the matrix. PyTorch's own
        modules are not tested, and give ``None`` too.
    """
    return _tried(module, name, _axis)


def looks_up(module: nn.Module, name: str) -> bool:
    """Whether a module looks up rows of its matrix by their numbers, as an embedding.

    Args:
        module: Any module.
        name: Name of a parameter of the module with two dimensions, pruned or not.
    """
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return True
    return _tried(module, name, _row) is not None


def _tried(module: nn.Module, name: str, verdict: Verdict) -> int | None:
    # PyTorch's own modules are known by their classes.
    if type(module).__module__.startswith("torch.nn.modules."):
        return None
    if isinstance(module, torch.jit.ScriptModule):
        return None
    key = name if find_hook(module, name) is None else f"{name}_orig"
    matrix = own_parameters(module)[key]
    every = sum(0 if is_lazy(p) else p.numel() for p in module.parameters())
    if matrix.numel() < 2 or every > 2 * matrix.numel():
        return None
    likeness = [_likeness(one) for one in module.modules()]
    if None in likeness:
        return _isolated(module, name, verdict)
    known = _known.setdefault(type(module), {})
    case = (verdict.__name__, name, *likeness)
    if case not in known:
        known[case] = _isolated(module, name, verdict)
    return known[case]


def _likeness(module: nn.Module) -> tuple[Any, ...] | None:
    """Return a key that is equal for modules that behave alike.

    It is ``None`` if an attribute of the module does not allow a key.
    """
    kind, settings = type(module), []
    for key, value in vars(module).items():
        if key in _VANILLA or isinstance(value, Tensor):
            continue
        if isinstance(value, FunctionType | BuiltinFunctionType):
            value = f"{value.__module__}.{value.__qualname__}"
        for one in value if isinstance(value, tuple) else (value,):
            if not isinstance(one, _PLAIN):
                return None
        settings.append((key, value))
    shapes = [
        (key, None if is_lazy(p) else tuple(p.shape))
        for key, p in own_parameters(module).items()
    ]
    return kind.__module__, kind.__qualname__, tuple(settings), tuple(shapes)


_VANILLA = frozenset(vars(nn.Module()))


def _isolated(module: nn.Module, name: str, verdict: Verdict) -> int | None:
    """Return a verdict on a stand-in of a module, without a trace in the process."""
    with ExitStack() as state:
        state.callback(random_states(module))
        state.enter_context(torch.inference_mode(False))
        state.enter_context(torch.enable_grad())
        state.enter_context(torch.autocast("cpu", enabled=False))
        state.enter_context(torch.device("cpu"))
        state.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        try:
            stand_in = _stand_in(module)
            return verdict(stand_in, stand_in.get_parameter(name))
        # The code of a module may raise any error if it is called in another way.
        except Exception:
            return None


def _axis(module: nn.Module, matrix: nn.Parameter) -> int | None:
    # The number of inputs, by the axis of the outputs.
    sizes = dict(enumerate(reversed(matrix.shape)))
    # Inputs are vectors, sequences of one vector, or a vector along the channels.
    for before, after in (((), ()), ((1,), ()), ((), (1,))):
        found = []
        for size in set(sizes.values()):
            inputs = _random(0, _SAMPLES, *before, size, *after)
            try:
                gradients = _gradients(module, matrix, inputs)
            except Exception:  # as a rule, the module takes another size
                continue
            axes = [axis for axis in _outer(*gradients) if sizes[axis] == size]
            found.append(axes[0] if axes else None)
        # A module that takes vectors of both sizes does not multiply by the matrix.
        if len(found) == 1 and found[0] is not None:
            return found[0]
    return None


def _row(module: nn.Module, matrix: nn.Parameter) -> int | None:
    row = len(matrix) // 2
    for shape in ((_SAMPLES,), (_SAMPLES, 1)):
        try:
            gradient, *_ = _gradients(module, matrix, torch.full(shape, row))
        except Exception:  # as a rule, the module takes no row numbers
            continue
        chosen = gradient[row].norm()
        if chosen > 0 and gradient.norm() <= chosen * (1 + _TOLERANCE):
            return row
    return None


def _gradients(
    module: nn.Module, matrix: nn.Parameter, inputs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of three random sums of the outputs, by the matrix.

    The first two sums are over the outputs for the first sample, the third is over the
    outputs for the second sample.
    """
    output: Any = type(module).forward(module, inputs)
    while isinstance(output, tuple | list):
        output = output[0]
    if len(output) != len(inputs):
        raise ValueError("expected as many samples as went in")
    one, other, next_one = (
        torch.autograd.grad(of, matrix, _random(seed, *of.shape), retain_graph=True)[0]
        for of, seed in ((output[0], 1), (output[0], 2), (output[1], 1))
    )
    return one.to_dense(), other.to_dense(), next_one.to_dense()


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _outer(one: Tensor, other: Tensor, next_one: Tensor) -> list[int]:
    """Return the axes that may be the axis of outputs.

    For the axis of outputs, the gradients are outer products with an input.

    Args:
        one: Gradient of a sum of the outputs for an input.
        other: Gradient of another sum of the outputs for this input.
        next_one: Gradient of a sum of the outputs for another input.
    """
    factors = [_factors(gradient) for gradient in (one, other, next_one)]
    axes = []
    for axis in (0, 1):
        # The factor across this axis is the input, if both sums of outputs share it.
        went_in, again, next_in = (pair[1 - axis] for pair in factors)
        alike, changes = _alike(went_in, again), not _alike(went_in, next_in)
        # If a single row of the matrix is looked up or added, the gradient is an outer
        # product too, but its factor has a single value other than 0.
        several = went_in.count_nonzero() > 1
        if alike and (len(went_in) == 1 or (changes and several)):
            axes.append(axis)
    return axes


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two unit vectors are parallel."""
    return bool((one - (one @ other) * other).norm() <= _TOLERANCE)


def _factors(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit vectors whose outer product is proportional to a matrix.

    Both vectors are NaN if the matrix is no outer product.
    """
    right = gradient[gradient.norm(dim=1).argmax()]
    right = right / right.norm()
    left = gradient @ right
    if not (gradient - left.outer(right)).norm() <= _TOLERANCE * left.norm():
        left, right = left * math.nan, right * math.nan
    return left / left.norm(), right


def _stand_in(module: nn.Module) -> nn.Module:
    """Return a module of the same class with random parameters, in evaluation mode."""
    made: dict[int, nn.Parameter] = {}

    def values(parameter: nn.Parameter) -> nn.Parameter:
        fresh = nn.Parameter(_random(3 + len(made), *parameter.shape))
        return made.setdefault(id(parameter), fresh)

    def twin(module: nn.Module) -> nn.Module:
        module = unwrapped(module)
        own, buffers, children = map(dict, registries(module))
        attributes = {
            key: _cpu_copy(value)
            for key, value in vars(module).items()
            if f"{key}_orig" not in own  # a pruned tensor
        }
        buffers = {key: _cpu_copy(value) for key, value in buffers.items()}
        parameters = {}
        for key, parameter in own.items():
            name = key.removesuffix("_orig")
            if find_hook(module, name) is None:
                name = key
            else:
                buffers.pop(f"{name}_mask")
            parameters[name] = None if parameter is None else values(parameter)
        twins = {
            key: None if child is None else twin(child)
            for key, child in children.items()
        }
        return uninitialised(type(module), attributes, parameters, buffers, twins)

    return twin(module)


def _cpu_copy(value: Any) -> Any:
    """Return a copy of a value on the CPU, whose changes leave the original alone."""
    if isinstance(value, Tensor):
        value = value.detach()
        value = torch.zeros(value.shape) if value.is_meta else value.cpu().clone()
        return value.float() if value.is_floating_point() else value
    return copy.copy(value) if type(value) in (list, dict, set) else value
