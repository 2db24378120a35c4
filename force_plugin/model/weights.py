"""Which weights of a model can be pruned, and where each of them lives."""

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
"""Modules whose ``weight`` is pruned unless the caller chooses: every
convolution, transposed ones too, and every linear layer, subclasses included.
So is the matrix of what behaves as a linear layer."""

_NO_WEIGHTS = re.compile(r"(^|_)(bias|pos)|tokens?\d*$")
"""Parameters that are added to activations or put beside them, by their own names."""


@dataclass(eq=False)
class Weight:
    """One prunable tensor of a model.

    Attributes:
        name: Name of the parameter as ``model.named_parameters()`` gives it before
            any pruning, e.g. ``"layer1.0.conv1.weight"``, and before anything was
            wrapped around the model or a part of it.
        owners: Every ``(module, tensor name)`` that holds this parameter. A weight
            that several modules share is one weight with several owners.
        dense: The parameter with all its values (``weight_orig`` where the model is
            pruned already).
        mask: Bool tensor of the same shape, True = kept, of the first owner that is
            pruned, or whose zeros are held; ``None`` where none is.
    """

    name: str
    dense: nn.Parameter
    mask: Tensor | None = None
    owners: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def local(self) -> Tensor:
        """The values without gradient; of a sharded parameter, this rank's shard."""
        return local_values(self.dense.detach())

    @property
    def prunable(self) -> bool:
        """Whether it is pruned unless the caller chooses.

        It is the weight of a convolution or linear layer, or of a module that behaves
        as a linear layer, and no embedding has it too.
        """
        if self._axis is None:
            return False
        shared = len(self.owners) > 1 and self.dense.dim() == 2
        return not shared or not any(looks_up(*owner) for owner in self.owners)

    @property
    def weighs(self) -> bool:
        """Whether it is one of the model's matrices and kernels.

        These are all floating-point parameters of at least two dimensions that are
        longer than 1, embeddings too, but none that is added to activations: biases,
        positions and tokens, which are known by their names, and what has a first
        dimension of 1.
        """
        if self._axis is not None:
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
        """Whether it is a matrix ``[inputs, outputs]``, as transformers' ``Conv1D``."""
        return self._axis == 1

    @property
    def shape(self) -> torch.Size:
        """Its shape, of a matrix with the outputs first."""
        return self.dense.shape[::-1] if self.transposed else self.dense.shape

    def rows(self, values: Tensor) -> Tensor:
        """Values of its shape, of a matrix with the outputs first."""
        return values.t() if self.transposed else values

    @property
    def _axis(self) -> int | None:
        """The axis of its output channels, if a layer has it."""
        layers = [module for module, tensor in self.owners if tensor == "weight"]
        if any(isinstance(module, PRUNABLE_MODULES) for module in layers):
            return 0
        if is_lazy(self.dense) or self.dense.dim() != 2:
            return None
        if not self.dense.is_floating_point():
            return None
        axes = (output_axis(module, "weight") for module in layers)
        return next((axis for axis in axes if axis is not None), None)

    def slots(self) -> list[tuple[nn.Module, str]]:
        """Where the parameter is registered: ``(module, key in the module)``."""
        return [(module, parameter_key(module, name)) for module, name in self.owners]


def mask_of(module: nn.Module, name: str) -> Tensor | None:
    """Mask of a tensor that :mod:`torch.nn.utils.prune` has pruned, else ``None``.

    It is the hook that tells: other modules have buffers called ``weight_mask`` too.
    """
    if find_hook(module, name) is None:
        return None
    return own_buffers(module).get(f"{name}_mask")


def is_scripted(module: nn.Module) -> bool:
    """Whether it is TorchScript, which can be run, but not be given other weights."""
    return isinstance(module, torch.jit.ScriptModule)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as those of FSDP2; their import takes half a second."""
    return hasattr(tensor, "device_mesh")


def local_values(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: all of it, unless it is sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole_of(tensor: Tensor) -> Tensor:
    """All values of a tensor; of one that is sharded, every rank must ask for them."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


HELD = "_held_zeros"
"""Attribute of a module in which a permanent pruning keeps its masks, by tensor name,
as ``kept``."""


def pruned_so_far(module: nn.Module, name: str) -> Tensor | None:
    """Bool mask of a tensor that was pruned, made permanent or not, else ``None``."""
    mask = mask_of(module, name)
    mask = None if mask is None else mask.bool()
    held = vars(module).get(HELD, {}).get(name)
    if held is None:
        return mask
    parameter = own_parameters(module).get(parameter_key(module, name))
    # Another parameter may have come in its place.
    if parameter is None or held.kept.shape != parameter.shape:
        return mask
    kept: Tensor = held.kept.to(parameter.device).bool()
    return kept if mask is None else kept & mask


def parameter_key(module: nn.Module, name: str) -> str:
    """The name of the parameter of a tensor ``name`` of a module, pruned or not."""
    return name if mask_of(module, name) is None else f"{name}_orig"


def named_parameters(model: nn.Module) -> dict[str, Weight]:
    """Every parameter of a model by its name, shared ones once, pruned or not.

    They are in the order of the modules.

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
            continue  # its parameters are TorchScript's, and stay as they are
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
