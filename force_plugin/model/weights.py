"""The weights of a model: which can be pruned, and which modules own them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from force_plugin.model.linear_like import looks_up, output_axis
from force_plugin.model.module_names import named_modules, unwrapped
from force_plugin.model.registered import own_buffers, own_parameters
from force_plugin.model.reparametrisation import find_hook
from force_plugin.model.torch_internals import ConvNd

PRUNABLE_MODULES: tuple[type[nn.Module], ...] = (ConvNd, nn.Linear)
"""Modules whose ``weight`` is pruned unless the caller chooses. These are all
convolutions, transposed convolutions, linear layers and their subclasses. The matrix of
a module that behaves as a linear layer is pruned too."""

_NO_WEIGHTS = re.compile(r"(^|_)(bias|pos)|tokens?\d*$")
"""Names of parameters that are added to activations or put beside them."""


@dataclass(eq=False)
class Weight:
    """A parameter of a model.

    Attributes:
        name: Name of the parameter in ``model.named_parameters()`` before any pruning,
            e.g. ``"layer1.0.conv1.weight"``, and without the names of wrappers around
            the model or a part of it.
        owners: Every ``(module, tensor name)`` that holds this parameter. A parameter
            that several modules share is a single weight with several owners.
        dense: The parameter with all its values (``weight_orig`` if the model is
            pruned already).
        mask: Bool tensor of the parameter's shape, True = kept, of the first owner that
            is pruned, or whose zeros are held; ``None`` if no owner is.
    """

    name: str
    dense: nn.Parameter
    mask: Tensor | None = None
    owners: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def local(self) -> Tensor:
        """The values without gradient, or this rank's shard of a sharded parameter."""
        return local_values(self.dense.detach())

    @property
    def prunable(self) -> bool:
        """Whether the parameter is pruned unless the caller chooses.

        This goes for the weight of a convolution, of a linear layer, or of a module
        that behaves as a linear layer, unless an embedding shares the weight.
        """
        if self.channel_axis is None:
            return False
        shared = len(self.owners) > 1 and self.dense.dim() == 2
        return not shared or not any(looks_up(*owner) for owner in self.owners)

    @property
    def weighs(self) -> bool:
        """Whether the parameter is a matrix or a kernel.

        A matrix or kernel is a floating-point parameter with at least two dimensions
        longer than 1. Embeddings count too. Parameters that are added to activations do
        not count. These are biases, positions and tokens, which are known by their
        names, and parameters with a first dimension of 1. The weight of a layer always
        counts.
        """
        if self.channel_axis is not None:
            return True
        if is_lazy(self.dense) or not self.dense.is_floating_point():
            return False
        shape = self.dense.shape
        return (
            sum(size > 1 for size in shape) > 1
            and shape[0] > 1
            and not any(_NO_WEIGHTS.search(tensor) for _, tensor in self.owners)
        )

    @property
    def transposed(self) -> bool:
        """Whether the parameter is a matrix ``[inputs, outputs]``.

        The weight of transformers' ``Conv1D`` is an example.
        """
        return self.channel_axis == 1

    @property
    def shape(self) -> torch.Size:
        """The shape of the parameter, with the output channels first."""
        return self.dense.shape[::-1] if self.transposed else self.dense.shape

    def rows(self, values: Tensor) -> Tensor:
        """Return a tensor of the parameter's shape with the output channels first."""
        return values.t() if self.transposed else values

    @property
    def channel_axis(self) -> int | None:
        """The axis of the output channels; ``None`` if no layer has the parameter.

        It is 0 for all convolutions, transposed convolutions too.
        """
        layers = [module for module, tensor in self.owners if tensor == "weight"]
        if any(isinstance(module, PRUNABLE_MODULES) for module in layers):
            return 0
        if is_lazy(self.dense) or self.dense.dim() != 2:
            return None
        if not self.dense.is_floating_point():
            return None
        axes = (output_axis(module, "weight") for module in layers)
        return next((axis for axis in axes if axis is not None), None)

    @property
    def channels(self) -> int:
        """Number of output channels; the first size if no layer has the parameter."""
        groups = self._transposed_groups
        if groups:
            return self.dense.shape[1] * groups
        return self.shape[0] if self.shape else 1

    def by_channel(self, values: Tensor) -> Tensor:
        """Return a tensor of the parameter's shape with a row for each channel."""
        groups = self._transposed_groups
        if groups:
            parts = values.view(groups, -1, *values.shape[1:])
            return parts.transpose(1, 2).flatten(0, 1).flatten(1)
        return self.rows(values).flatten(1)

    @property
    def _transposed_groups(self) -> int | None:
        """The groups of a transposed convolution, whose inputs come first."""
        for module, tensor in self.owners:
            if tensor == "weight" and isinstance(module, ConvNd) and module.transposed:
                return module.groups
        return None

    def slots(self) -> list[tuple[nn.Module, str]]:
        """Return each ``(module, name in the module)`` of the parameter."""
        return [(module, parameter_key(module, name)) for module, name in self.owners]


def mask_of(module: nn.Module, name: str) -> Tensor | None:
    """Return the mask of a tensor that :mod:`torch.nn.utils.prune` has pruned.

    It is ``None`` if no pruning hook is found. A buffer ``weight_mask`` alone does not
    tell, as other modules have buffers of this name too.
    """
    if find_hook(module, name) is None:
        return None
    return own_buffers(module).get(f"{name}_mask")


def is_scripted(module: nn.Module) -> bool:
    """Whether a module is TorchScript, which can run, but takes no other weights."""
    return isinstance(module, torch.jit.ScriptModule)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, as in FSDP2.

    The class is not imported, as the import takes half a second.
    """
    return hasattr(tensor, "device_mesh")


def local_values(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole_of(tensor: Tensor) -> Tensor:
    """Return all values of a tensor. If it is sharded, every rank must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


HELD = "_held_zeros"
"""Attribute of a module in which a permanent pruning keeps its notes, by tensor name.
The ``kept`` of a note is a mask."""


def pruned_so_far(module: nn.Module, name: str) -> Tensor | None:
    """Return the bool mask of a pruned tensor, permanent or not, or ``None``."""
    mask = mask_of(module, name)
    mask = None if mask is None else mask.bool()
    held = vars(module).get(HELD, {}).get(name)
    if held is None:
        return mask
    parameter = own_parameters(module).get(parameter_key(module, name))
    # Another parameter may have replaced the held parameter.
    if parameter is None or held.kept.shape != parameter.shape:
        return mask
    kept: Tensor = held.kept.to(parameter.device).bool()
    return kept if mask is None else kept & mask


def parameter_key(module: nn.Module, name: str) -> str:
    """Return the name of a tensor's parameter in the module, pruned or not."""
    return name if mask_of(module, name) is None else f"{name}_orig"


def named_parameters(model: nn.Module) -> dict[str, Weight]:
    """Return every parameter of a model by name, pruned or not.

    The order is that of the modules. A parameter that several modules share is listed
    once.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}"
        )
    model = unwrapped(model)
    if is_scripted(model):
        raise TypeError(
            "model: expected a torch.nn.Module in Python, got a TorchScript module; "
            "prune it before torch.jit.script or torch.jit.trace"
        )
    found: dict[int, Weight] = {}
    for prefix, module in named_modules(model):
        if is_scripted(module):
            continue  # the parameters of a TorchScript module cannot be replaced
        for key, parameter in own_parameters(module).items():
            tensor = key.removesuffix("_orig")
            if mask_of(module, tensor) is None:
                tensor = key
            mask = pruned_so_far(module, tensor)
            weight = found.setdefault(
                id(parameter),
                Weight(
                    name=f"{prefix}.{tensor}" if prefix else tensor, dense=parameter
                ),
            )
            weight.owners.append((module, tensor))
            if mask is not None and weight.mask is None:
                weight.mask = mask
    return {weight.name: weight for weight in found.values()}
