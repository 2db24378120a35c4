"""Models that leave their zeros out: :func:`sparsify` and :func:`densify`.

The class of a sparsified model is a subclass of the model's own class, as FSDP2 and
``torch.nn.utils.parametrize`` do it. So parameters, names and methods stay, and only
the forward pass is another.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from force_plugin.masks.apply import apply_masks, get_masks
from force_plugin.masks.permanent import make_permanent
from force_plugin.model.torch_internals import (
    TreeSpec,
    hooks_of,
    is_followed,
    seen_as,
    state_of,
    tree_flatten,
)
from force_plugin.model.weights import is_sharded, named_parameters
from force_plugin.sparse.classes import Subclassed, subclass
from force_plugin.sparse.code import digest
from force_plugin.sparse.non_zeros import give_dense, hold_non_zeros
from force_plugin.sparse.plan import Choice, Plan, Unsupported, planned
from force_plugin.sparse.rehearsal import planned_training
from force_plugin.sparse.report import ExecutionReport
from force_plugin.sparse.training import TrainingPlan
from force_plugin.structure.cut_copies import deep_copy
from force_plugin.structure.example_inputs import checked_inputs

# Plans for as many shapes of inputs are kept: training, validation, a last batch.
_MOST_PLANS = 4
# How many numbers of each tensor tell whether it was overwritten.
_LOOKED_AT = 8


def sparsify(
    model: nn.Module,
    example_inputs: Any,
    *,
    train: bool = False,
    plan: str | Mapping[str, str] = "measure",
    progress: bool = True,
) -> nn.Module:
    """Return a copy of a pruned model that leaves its zeros out, on CPUs.

    The copy computes the same function. Convolutions and linear layers multiply their
    non-zeros alone, wherever this is faster on this machine, with batch normalisations,
    residual sums and activations in the same pass. Everything else runs as before.

    The copy is a module of the model's class, and its state dict is that of the dense
    model. It notices changed weights, other modes and other shapes of inputs, and plans
    again. The dense forward pass runs under autocast, on other devices, and while a
    model is compiled or traced.

    With ``train``, the copy can be trained: the weights of its convolutions and linear
    layers become parameters of the non-zeros alone, of shape ``[non-zeros, 1]``, and so
    do their gradients and what an optimizer keeps of them. Pass the parameters of the
    copy to an optimizer. Batch normalisations run in the kernels' layout too. In
    evaluation mode without gradients it runs as without ``train``.

    Args:
        model: Any model with masks, with a permanent pruning or without channels that
            :func:`force_plugin.compact` removed. It stays as it is.
        example_inputs: Inputs of the shapes that matter most: a tensor, a tuple of
            arguments or a mapping of keyword arguments. Times are measured with them.
        train: Return a copy in training mode (default: False, for inference). If the
            model has no masks, the zeros of its weights are the pruned weights.
        plan: ``"measure"`` (default) takes the faster of both for each layer.
            ``"sparse"`` and ``"dense"`` fix it for all layers. A mapping from names of
            layers to these words fixes it for some.
        progress: Show a progress bar on standard error while layers are measured.

    Returns:
        The copy: with ``train`` in training mode, otherwise in evaluation mode and
        without gradients for parameters. See :func:`execution_report` for what runs
        how.

    Raises:
        TypeError: ``model`` is no module, or there is no tensor among the inputs.
        ValueError: ``plan`` has another word or names no layer, the model is sharded or
            sparsified already, or its forward pass belongs to the instance.
        ImportError: llvmlite is missing: ``pip install force-plugin[sparse]``.
    """
    kind, choice = _checked(model), Choice(plan)
    layers = {
        name for name, module in model.named_modules() if hasattr(module, "weight")
    }
    if unknown := sorted({*choice.fixed} - layers):
        raise ValueError(
            f"plan: expected names of layers of {kind.__name__}, got {unknown[0]!r}"
        )
    inputs = checked_inputs(model, example_inputs, "example_inputs")
    with torch.inference_mode(False):
        copy = deep_copy(model)
        if get_masks(copy):
            make_permanent(copy)
        if train:
            hold_non_zeros(copy, get_masks(copy) or _zeros_in(copy))
            copy.train()
        else:
            copy.eval().requires_grad_(False)
    execution = Execution(choice, train)
    copy.__dict__["_execution"] = execution
    copy.__class__ = subclass(Sparsified, type(copy))
    choice.progress = progress
    try:
        execution.prepare(copy, *_arguments(inputs))
    finally:
        choice.progress = False
    return copy


def densify(model: nn.Module) -> nn.Module:
    """Return a copy of a sparsified model with its own class and forward pass.

    Args:
        model: A model that :func:`sparsify` returned. It stays as it is.

    Returns:
        The copy: a dense model with the same weights, pruned weights at 0. If the model
        was sparsified with ``train``, they are held at 0, see
        :func:`force_plugin.make_permanent`.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: The model is not sparsified.
    """
    _execution_of(model)
    copy, masks = _dense_copy(model)
    if masks:
        apply_masks(copy, masks)
        make_permanent(copy)
    return copy


def _dense_copy(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a copy with its own class and dense parameters, and their masks."""
    assert isinstance(model, Sparsified)
    with torch.inference_mode(False):
        copy = deep_copy(model)
        del copy.__dict__["_execution"]
        copy.__class__ = model.own_class()
        return copy, give_dense(copy)


def _zeros_in(model: nn.Module) -> dict[str, Tensor]:
    return {name: one.detach() != 0 for name, one in model.named_parameters()}


def execution_report(model: nn.Module) -> ExecutionReport:
    """Return which layers of a sparsified model run how, and why.

    Args:
        model: A model that :func:`sparsify` returned.

    Returns:
        The report of the plan that was used last.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: The model is not sparsified.
    """
    return _execution_of(model).report()


class Sparsified(Subclassed):
    """What the class of a sparsified model has before the model's own class."""

    _execution: Execution

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the plan for inputs of these shapes, or the dense forward pass."""
        return self._execution(self, super().forward, args, kwargs)


class Execution:
    """How a model runs: plans by the shapes of inputs.

    Args:
        choice: What the user wants of which layer.
        train: Whether the model can be trained.
    """

    def __init__(self, choice: Choice, train: bool) -> None:  # noqa: D107
        self.choice, self._train = choice, train
        self._start()

    def _start(self) -> None:
        self._plans = {trains: Plans() for trains in (False, True)}
        self._last: Plan | TrainingPlan | Unsupported | None = None
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {"choice": self.choice, "_train": self._train}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def report(self) -> ExecutionReport:
        """Return the report of the plan that was used last."""
        return ExecutionReport.of(self._last)

    def __call__(
        self,
        model: nn.Module,
        dense: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Return the outputs of a model.

        Args:
            model: The model.
            dense: Its dense forward pass.
            args: Positional arguments.
            kwargs: Arguments by name.
        """
        trains = self._train and model.training and torch.is_grad_enabled()
        infers = not (self._train and (model.training or torch.is_grad_enabled()))
        leaves, structure = tree_flatten((args, kwargs))
        if not (trains or infers) or not _is_plain(leaves, trains):
            return dense(*args, **kwargs)
        with self._lock:
            plan = self._plan(model, trains, leaves, structure, args, kwargs)
            if isinstance(plan, Unsupported):
                return dense(*args, **kwargs)
            with torch.set_grad_enabled(trains):
                return plan(*args, **kwargs)

    def prepare(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Plan for inputs of these shapes.

        Args:
            model: The model.
            args: Positional arguments.
            kwargs: Arguments by name.
        """
        leaves, structure = tree_flatten((args, kwargs))
        if _is_plain(leaves, self._train):
            self._plan(model, self._train, leaves, structure, args, kwargs)

    def _plan(
        self,
        model: nn.Module,
        trains: bool,
        leaves: list[Any],
        structure: TreeSpec,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Plan | TrainingPlan | Unsupported:
        plans = self._plans[trains]
        if plans.state is None or plans.state.changed():
            plans.state = State(model, values=not trains)
            plans.clear()
        key = structure, tuple(map(_shape, leaves))
        plan = plans.get(key)
        if plan is None:
            plan = self._refused(model, trains) or self._made(
                model, trains, args, kwargs
            )
            plans[key] = plan
            if len(plans) > _MOST_PLANS:
                plans.popitem(last=False)
            if trains:  # to measure, steps were taken
                plans.state = State(model, values=False)
        plans.move_to_end(key)
        self._last = plan
        return plan

    def _made(
        self,
        model: nn.Module,
        trains: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Plan | TrainingPlan | Unsupported:
        if trains:
            dense, _ = _dense_copy(model)
            return planned_training(model, dense, args, kwargs, self.choice)
        if self._train:
            dense, _ = _dense_copy(model)
            dense.requires_grad_(False)
        else:
            assert isinstance(model, Sparsified)
            dense = seen_as(model.own_class(), model)
        return planned(dense, args, kwargs, self.choice)

    def _refused(self, model: nn.Module, trains: bool) -> Unsupported | None:
        """Return why a model in its present state runs dense, if it does."""
        for name, module in model.named_modules():
            if module.training and not trains:
                return Unsupported(f"{name or 'the model'} is in training mode")
            if name and any(map(len, hooks_of(module))):
                return Unsupported(f"{name} has hooks, which have to see its values")
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            if tensor.requires_grad and not self._train:
                return Unsupported(f"{name} requires gradients")
            if tensor.device.type != "cpu":
                return Unsupported(f"{name} is on {tensor.device}, not on the CPU")
        return None


class Plans(OrderedDict[Any, "Plan | TrainingPlan | Unsupported"]):
    """Plans by inputs, the one that was used last at the end.

    Attributes:
        state: The state of the model for which they hold.
    """

    state: State | None = None


def _is_plain(leaves: Iterable[Any], trains: bool) -> bool:
    """Whether a call can be planned: plain tensors on the CPU, nothing that traces."""
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            plain = type(leaf) in (Tensor, nn.Parameter) and leaf.device.type == "cpu"
            if not plain or leaf.layout != torch.strided or not leaf.numel():
                return False
            if leaf.requires_grad and torch.is_grad_enabled() and not trains:
                return False
        elif not isinstance(leaf, int | float | str | None):
            return False
    return not (
        torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or is_followed()
    )


def _shape(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.requires_grad
    return type(leaf), leaf


class State:
    """What a plan depends on: modes, hooks, modules and tensors.

    Whatever is written to a tensor counts its version up, except what is written to
    ``tensor.data``. For this, some numbers of each tensor are looked at.

    Args:
        model: The model.
        values: Whether it depends on the values of tensors.
    """

    def __init__(self, model: nn.Module, values: bool) -> None:  # noqa: D107
        self._parts, self._values = [*model.modules()], values
        self._seen = self._look()
        places = [
            place
            for tensor in (*model.parameters(), *model.buffers())
            for place in (_samples(tensor) if values else ())
        ]
        self._places = np.array(places, np.uint64)
        self._numbers = self._digest()

    def changed(self) -> bool:
        """Whether anything has changed."""
        return self._look() != self._seen or self._digest() != self._numbers

    def _look(self) -> list[object]:
        return [one for part in self._parts for one in state_of(part, self._values)]

    def _digest(self) -> int:
        if not len(self._places):
            return 0
        return digest()(self._places.ctypes.data, len(self._places))


def _samples(tensor: Tensor) -> list[int]:
    """Return addresses of some numbers of a tensor that are not 0."""
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return []
    dense = torch.ops.aten.is_non_overlapping_and_dense(tensor)
    if tensor.itemsize < 4 or not dense:
        return []
    kept = tensor.detach().as_strided((tensor.numel(),), (1,)).nonzero()[:, 0]
    some = kept[:: max(1, len(kept) // _LOOKED_AT)][:_LOOKED_AT].tolist()
    return [tensor.data_ptr() + place * tensor.itemsize for place in some]


def _checked(model: nn.Module) -> type[nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}"
        )
    if isinstance(model, Sparsified):
        raise ValueError(
            "sparsify: expected a dense model, got one that is sparsified already; "
            "densify(model) is the way back"
        )
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise TypeError(
            f"sparsify: expected an eager model, got {type(model).__name__}; pass the "
            "model from which it was made"
        )
    if "forward" in vars(model):
        raise ValueError(
            f"sparsify: {type(model).__name__}.forward is replaced on this instance; "
            "expected a forward method of the class"
        )
    if any(is_sharded(weight.dense) for weight in named_parameters(model).values()):
        raise ValueError("sparsify: expected a whole model, got a model in shards")
    return type(model)


def _execution_of(model: nn.Module) -> Execution:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}"
        )
    if not isinstance(model, Sparsified):
        raise ValueError(
            "model: expected a model that sparsify returned, got a dense "
            f"{type(model).__name__}"
        )
    return model._execution


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})
