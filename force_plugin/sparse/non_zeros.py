"""Layers whose weight is a parameter of its non-zeros alone.

Gradients and the state of an optimizer then are as small as the non-zeros. The layer's
``weight`` is still the dense tensor, computed when it is read, and so is its entry in
the state dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from force_plugin.model.registered import own_parameters
from force_plugin.model.torch_internals import OwnState, put_parameter, version
from force_plugin.sparse.classes import Subclassed, subclass

_LAYERS = nn.Conv1d, nn.Conv2d, nn.Linear


class NonZeros(OwnState, Subclassed):
    """What the class of such a layer has before the layer's own class.

    Its parameter ``weight`` has the shape ``[non-zeros, 1]``. It has two dimensions, as
    optimizers and schedules of weight decay tell weights from biases by their number.
    """

    _places: Tensor  # where the non-zeros are in the flat weight
    _shape: torch.Size  # of the dense weight
    _shown: tuple[Tensor, int] | None  # the last entry of a state dict, its version

    @property
    def weight(self) -> Tensor:
        """The dense weight."""
        values = self.non_zeros
        flat = values.new_zeros(self._shape.numel())
        return flat.index_copy(0, self.places, values[:, 0]).view(self._shape)

    @property
    def non_zeros(self) -> nn.Parameter:
        """The parameter."""
        self.take_over()
        return own_parameters(self)["weight"]

    @property
    def places(self) -> Tensor:
        """Where the non-zeros are in the flat weight, on the device of the weight."""
        device = own_parameters(self)["weight"].device
        if self._places.device != device:
            self._places = self._places.to(device)
        return self._places

    @property
    def kept(self) -> Tensor:
        """The mask: True where the weight is kept."""
        flat = torch.zeros(self._shape.numel(), dtype=torch.bool)
        flat[self._places.cpu()] = True
        return flat.view(self._shape)

    def take_over(self) -> None:
        """Take over what was written to the entry of a state dict.

        Averages of weights write there, for one, as for every other module these
        entries are the parameters.
        """
        if self._shown is not None:
            (shown, before), self._shown = self._shown, None
            if version(shown) != before:
                with torch.no_grad():
                    values = shown.detach().flatten()[self.places]
                    self.non_zeros.copy_(values[:, None])

    def write_state(  # noqa: D102
        self, state_dict: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        dense = self.weight if keep_vars else self.weight.detach()
        self._shown = dense, version(dense)
        state_dict[f"{prefix}weight"] = dense

    def read_state(  # noqa: D102
        self, state_dict: dict[str, Any], prefix: str, errors: list[str]
    ) -> dict[str, Any] | None:
        self._shown = None
        name = f"{prefix}weight"
        given = state_dict.get(name)
        if not isinstance(given, Tensor) or given.shape != self._shape:
            return state_dict  # PyTorch says what is wrong
        flat, places = given.detach().flatten(), self.places.to(given.device)
        others = int(flat.count_nonzero() - flat[places].count_nonzero())
        if others:
            errors.append(
                f"{name}: expected zeros where the weight is pruned, got {others} "
                "other values; sparsify the model with the masks of that checkpoint"
            )
            return None
        return {**state_dict, name: flat[places][:, None]}

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.take_over()
        return super().__reduce_ex__(protocol)


def hold_non_zeros(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Turn weights of convolutions and linear layers into their non-zeros, in place.

    Args:
        model: A model without hooks that prune.
        masks: By parameter name, True where a weight is kept.
    """
    kept = {
        id(parameter): masks[name]
        for name, parameter in model.named_parameters()
        if name in masks and not masks[name].all()
    }
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        weight = own_parameters(module).get("weight")
        if not isinstance(module, _LAYERS) or weight is None or id(weight) not in kept:
            continue
        places = kept[id(weight)].flatten().nonzero()[:, 0]
        if id(weight) not in made:
            values = weight.detach().flatten()[places][:, None].clone()
            made[id(weight)] = nn.Parameter(values, weight.requires_grad)
        put_parameter(module, "weight", made[id(weight)])
        vars(module).update(_places=places, _shape=weight.shape, _shown=None)
        kind = subclass(NonZeros, type(module))
        module.__class__ = kind  # type: ignore[assignment]


def give_dense(model: nn.Module) -> dict[str, Tensor]:
    """Turn all weights into dense parameters, in place, and return their masks.

    Args:
        model: The model.
    """
    masks, made = {}, dict[int, nn.Parameter]()
    for name, module in model.named_modules():
        if isinstance(module, NonZeros):
            values = module.non_zeros
            if id(values) not in made:
                dense = module.weight.detach()
                made[id(values)] = nn.Parameter(dense, values.requires_grad)
                masks[f"{name}.weight" if name else "weight"] = module.kept
            module.__class__ = module.own_class()  # type: ignore[assignment]
            put_parameter(module, "weight", made[id(values)])
            for own in ("_places", "_shape", "_shown"):
                del vars(module)[own]
    return masks
