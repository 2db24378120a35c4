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

from force_plugin.masks.apply import get_masks
from force_plugin.masks.permanent import make_permanent
from force_plugin.model.torch_internals import (
    TreeSpec,
    forward_hooks,
    forward_pre_hooks,
    is_followed,
    seen_as,
    state_of,
    tree_flatten,
)
from force_plugin.model.weights import is_sharded, named_parameters
from force_plugin.sparse.code import digest
from force_plugin.sparse.plan import Choice, Plan, Unsupported, planned
from force_plugin.sparse.report import ExecutionReport
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
    plan: str | Mapping[str, str] = "measure",
    progress: bool = True,
) -> nn.Module:
    """Return a copy of a pruned model that leaves its zeros out, for inference on CPUs.

    The copy computes the same function. Convolutions and linear layers multiply their
    non-zeros alone, wherever this is faster on this machine, with batch normalisations,
    residual sums and activations in the same pass. Everything else runs as before.

    The copy is a module of the model's class, with the parameters and the state dict of
    the dense model. It notices changed weights, other modes and other shapes of inputs,
    and plans again. The dense forward pass runs in training mode, under autocast, for
    gradients, on other devices, and while a model is compiled or traced.

    Args:
        model: Any model with masks, with a permanent pruning or without channels that
            :func:`force_plugin.compact` removed. It stays as it is.
        example_inputs: Inputs of the shapes that matter most: a tensor, a tuple of
            arguments or a mapping of keyword arguments. Times are measured with them.
        plan: ``"measure"`` (default) takes the faster of both for each layer.
            ``"sparse"`` and ``"dense"`` fix it for all layers. A mapping from names of
            layers to these words fixes it for some.
        progress: Show a progress bar on standard error while layers are measured.

    Returns:
        The copy, in evaluation mode, without gradients for parameters. See
        :func:`execution_report` for what runs how.

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
        copy.eval().requires_grad_(False)
    copy.__dict__["_execution"] = Execution(choice)
    copy.__class__ = _sparse_class(kind)
    args, kwargs = _arguments(inputs)
    choice.progress = progress
    try:
        with torch.no_grad():
            copy(*args, **kwargs)
    finally:
        choice.progress = False
    return copy


def densify(model: nn.Module) -> nn.Module:
    """Return a copy of a sparsified model with its own class and forward pass.

    Args:
        model: A model that :func:`sparsify` returned. It stays as it is.

    Returns:
        The copy: a dense model with the same parameters, pruned weights at 0.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: The model is not sparsified.
    """
    execution = _execution_of(model)
    copy = deep_copy(model)
    copy.__class__ = execution.own_class(type(copy))
    del copy.__dict__["_execution"]
    return copy


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


class Sparsified(nn.Module):
    """What the class of a sparsified model has before the model's own class."""

    _execution: Execution

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the plan for inputs of these shapes, or the dense forward pass."""
        return self._execution(self, super().forward, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = super().__reduce_ex__(protocol)
        own = self._execution.own_class(type(self))
        return _empty, (own,), *made[2:]


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _sparse_class(own: type[nn.Module]) -> type[nn.Module]:
    if own not in _classes:
        names = {"__module__": __name__, "__doc__": own.__doc__}
        # Files and tables name the class, and it is the model's.
        _classes[own] = type(own.__name__, (Sparsified, own), names)
    return _classes[own]


def _empty(own: type[nn.Module]) -> nn.Module:
    kind = _sparse_class(own)
    return kind.__new__(kind)


class Execution:
    """How a model runs: plans by the shapes of inputs.

    Args:
        choice: What the user wants of which layer.
    """

    def __init__(self, choice: Choice) -> None:  # noqa: D107
        self.choice = choice
        self._start()

    def _start(self) -> None:
        self._plans: OrderedDict[Any, Plan | Unsupported] = OrderedDict()
        self._last: Plan | Unsupported | None = None
        self._state: State | None = None
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {"choice": self.choice}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.choice = state["choice"]
        self._start()

    @staticmethod
    def own_class(kind: type[nn.Module]) -> type[nn.Module]:
        """Return the class that a model had before."""
        return kind.__mro__[2]

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
        leaves, structure = tree_flatten((args, kwargs))
        if not _is_plain(leaves):
            return dense(*args, **kwargs)
        with self._lock:
            plan = self._plan(model, leaves, structure, args, kwargs)
            if isinstance(plan, Unsupported):
                return dense(*args, **kwargs)
            with torch.no_grad():
                return plan(*args, **kwargs)

    def _plan(
        self,
        model: nn.Module,
        leaves: list[Any],
        structure: TreeSpec,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Plan | Unsupported:
        if self._state is None or self._state.changed():
            self._state = State(model)
            self._plans.clear()
        key = structure, tuple(map(_shape, leaves))
        plan = self._plans.get(key)
        if plan is None:
            plan = self._refused(model) or planned(
                seen_as(self.own_class(type(model)), model), args, kwargs, self.choice
            )
            self._plans[key] = plan
            if len(self._plans) > _MOST_PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        self._last = plan
        return plan

    def _refused(self, model: nn.Module) -> Unsupported | None:
        """Return why a model in its present state runs dense, if it does."""
        for name, module in model.named_modules():
            if module.training:
                return Unsupported(f"{name or 'the model'} is in training mode")
            if name and (forward_hooks(module) or forward_pre_hooks(module)):
                return Unsupported(f"{name} has hooks, which have to see its values")
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            if tensor.requires_grad:
                return Unsupported(f"{name} requires gradients")
            if tensor.device.type != "cpu":
                return Unsupported(f"{name} is on {tensor.device}, not on the CPU")
        return None


def _is_plain(leaves: Iterable[Any]) -> bool:
    """Whether a call can be planned: plain tensors on the CPU, nothing that traces."""
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            plain = type(leaf) in (Tensor, nn.Parameter) and leaf.device.type == "cpu"
            if not plain or leaf.layout != torch.strided or not leaf.numel():
                return False
            if leaf.requires_grad and torch.is_grad_enabled():
                return False
        elif not isinstance(leaf, int | float | str | None):
            return False
    return not (
        torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or is_followed()
    )


def _shape(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf), leaf)


class State:
    """What a plan depends on: weights, modes, hooks and modules.

    Whatever is written to a tensor counts its version up, except what is written to
    ``tensor.data``. For this, some numbers of each tensor are looked at.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:  # noqa: D107
        self._parts = [*model.modules()]
        self._seen = self._look()
        places = [
            place
            for tensor in (*model.parameters(), *model.buffers())
            for place in _samples(tensor)
        ]
        self._places = np.array(places, np.uint64)
        self._numbers = self._digest()

    def changed(self) -> bool:
        """Whether anything has changed."""
        return self._look() != self._seen or self._digest() != self._numbers

    def _look(self) -> list[object]:
        return [one for part in self._parts for one in state_of(part)]

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
