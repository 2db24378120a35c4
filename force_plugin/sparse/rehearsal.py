"""From a model to a plan of its training, which is used only if it computes the same.

Its first steps are compared with those of the dense model: outputs and all gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from force_plugin.data.containers import tensors
from force_plugin.model.restoring import random_states
from force_plugin.sparse.convolution import Correlation, Product, Transposed
from force_plugin.sparse.graph import Graph, Layer, arguments, bare_layers, shape_of
from force_plugin.sparse.non_zeros import NonZeros
from force_plugin.sparse.plan import (
    Choice,
    Unsupported,
    difference,
    key_of,
    not_followed,
    rooms_of,
)
from force_plugin.sparse.report import LayerExecution
from force_plugin.sparse.steps import Dense, Values, as_images
from force_plugin.sparse.timing import in_turns
from force_plugin.sparse.training import TrainingPlan, holders


def planned_training(
    model: nn.Module,
    dense: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    choice: Choice,
) -> TrainingPlan | Unsupported:
    """Return a plan that computes what a model and its gradients are, and no slower.

    Args:
        model: A model with parameters of non-zeros, in training mode.
        dense: A copy with dense parameters.
        args: Positional inputs.
        kwargs: Inputs by name.
        choice: What the user wants.

    Returns:
        The plan, or the reason why the model is better run as it is.
    """
    with ExitStack() as stack:
        stack.callback(random_states(model))
        buffers = [(one, one.clone()) for one in model.buffers()]
        stack.callback(lambda: [one.copy_(before) for one, before in buffers])
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        try:
            graph = Graph(dense, args, kwargs, trains=True)
        except Exception as error:
            return Unsupported(not_followed(error))
        if graph.obstacle:
            return Unsupported(graph.obstacle)
        layers, held = bare_layers(graph, graph.tensors), holders(graph, model)
        runs = {}
        for layer in tqdm(layers, "sparsify", leave=False, disable=not choice.progress):
            holder = held.get(arguments(layer.last)[1])
            if holder is None:
                total = layer.weight.numel()
                why = "its weight is no parameter of non-zeros"
                one = LayerExecution(layer.name, layer.kept, total, "dense", why)
            else:
                layer.kept = len(holder.places)
                one = choice.of(layer, times_of_training)
            runs[layer.name] = one
        known = tuple(runs.values())
        if not any(one.runs == "sparse" for one in known):
            return Unsupported("no layer is faster by its non-zeros", known)
        given = graph.given(args, kwargs).values()
        wanted = [isinstance(one, Tensor) and one.requires_grad for one in given]
        plan = TrainingPlan(graph, layers, runs, model, wanted)
        graph.tensors.clear()  # the plan reads the parameters themselves
        own, theirs = (
            _Step(way, of, args, kwargs) for way, of in ((plan, model), (dense, dense))
        )
        expected = _from_the_same(theirs)
        try:
            steps = [_from_the_same(own) for _ in range(2)]  # with new memory, with old
        except Exception as error:
            return Unsupported(
                f"its plan fails: {type(error).__name__}: {error}", known
            )
        _jitter(dense)
        jittered = _from_the_same(theirs)
        for found in steps:
            if (off := _off(found, expected, jittered, model)) is not None:
                return Unsupported(f"its plan has other {off}", known)
        if choice.otherwise != "measure":
            return plan
        sparse, as_before = in_turns([own, theirs])
        plan.sparse_ms, plan.dense_ms = 1e3 * sparse, 1e3 * as_before
        if sparse > as_before:
            why = "as a whole it is faster"
            return Unsupported(why, known, plan.sparse_ms, plan.dense_ms)
        return plan


Results = tuple[list[Tensor], list[Tensor | None]]


class _Step:
    """A forward and a backward pass.

    Args:
        way: Computes the outputs.
        model: Has the parameters.
        args: Positional inputs.
        kwargs: Inputs by name.
    """

    def __init__(
        self,
        way: Callable[..., Any],
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._way, self._given = way, (args, kwargs)
        self._parameters = [one for one in model.parameters() if one.requires_grad]

    def __call__(self) -> Results:
        """Return the outputs, and the gradients of parameters."""
        args, kwargs = self._given
        outputs = [*tensors(self._way(*args, **kwargs))]
        real = [one for one in outputs if one.requires_grad]
        # Any loss will do that does not treat all numbers alike.
        loss: Any = sum(
            (one * torch.linspace(0.5, 1, one.numel()).to(one).view(one.shape)).sum()
            for one in real
        )
        found = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        return [one.detach() for one in outputs], [*found]


def _from_the_same(step: _Step) -> Results:
    """Return the results of a step that begins with the same random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return step()


def _jitter(model: nn.Module) -> None:
    """Change each weight by a rounding."""
    with torch.no_grad():
        for one in model.parameters():
            if one.is_floating_point():
                signs = torch.empty_like(one).bernoulli_() * 2 - 1
                one.mul_(1 + signs * torch.finfo(one.dtype).eps)


def _off(
    found: Results, expected: Results, jittered: Results, model: nn.Module
) -> str | None:
    """Return in words how outputs or gradients differ, ``None`` if by roundings.

    Args:
        found: What the plan computes.
        expected: What the dense model computes.
        jittered: What it computes if each weight is off by a rounding. Behind a channel
            of little variance, a normalisation makes much of roundings.
        model: The model with parameters of non-zeros.
    """
    if (off := difference(found[0], expected[0])) is not None:
        return f"outputs: {off}"
    places = {
        id(one.non_zeros): one.places
        for one in model.modules()
        if isinstance(one, NonZeros)
    }
    wanted = [one for one in model.named_parameters() if one[1].requires_grad]
    triples = zip(found[1], expected[1], jittered[1], strict=True)
    pairs = []
    for (name, parameter), (one, other, third) in zip(wanted, triples, strict=True):
        if (one is None) != (other is None):
            return f"gradients: only one way has that of {name}"
        if one is not None and other is not None and third is not None:
            own = places.get(id(parameter))
            other, third = (
                part.double() if own is None else part.double().flatten()[own][:, None]
                for part in (other, third)
            )
            pairs.append((name, one, other, float((third - other).norm())))
    whole = sum(float(other.square().sum()) for _, _, other, _ in pairs) ** 0.5
    for name, one, other, noise in pairs:
        size = float(other.norm()) + whole / len(pairs) ** 0.5
        error = float((one.double() - other).norm())
        if not error <= _CLOSE.get(one.dtype, 1e-2) * size + 10 * noise:
            return f"gradients: that of {name} is off by {error / size:.3g}"
    return None


# Largest error of gradients beside roundings, as a share of their norm.
_CLOSE = {torch.float32: 1e-3, torch.float64: 1e-6}


def times_of_training(layer: Layer) -> tuple[float, float]:
    """Return the seconds of a layer, forward and backward, by its non-zeros and not."""
    shape, dtype = shape_of(layer.source), layer.weight.dtype
    (geometry,) = rooms_of([layer]).values()
    kept = torch.zeros(layer.weight.numel(), dtype=torch.bool)
    kept[torch.linspace(0, len(kept) - 1, layer.kept).long()] = True
    kept = kept.view(layer.weight.shape)
    product = Product(
        layer.weight, None, layer.window, geometry, groups=layer.groups, kept=kept
    )
    back, correlation = Transposed(product), Correlation(product)
    planes, gradients = product.packed(dtype), product.packed(dtype)
    out = geometry.zeros(product.outputs, dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    moves = layer.axis == 1 and key_of(shape, 1) != key_of(shape_of(layer.last), 1)
    images = as_images(x.detach()) if moves else None
    weight = layer.weight.clone().requires_grad_()
    dense = Dense(replace(layer, weight=weight))
    values: Values = {layer.source: x}

    def by_non_zeros() -> None:
        for direction in range(3):
            if images is not None:
                product.pack(images, planes)
            if direction == 0:
                product(planes, out)
            elif direction == 1:
                correlation(planes, out)
            else:
                back(out, gradients)

    def by_pytorch() -> None:
        dense(values)
        y = values[layer.scaled]
        torch.autograd.grad(y, (x, weight), torch.ones_like(y))

    with torch.enable_grad():
        sparse, as_before = in_turns([by_non_zeros, by_pytorch])
    return sparse, as_before
