"""Load the weights of a file into the module of a script that fits the weights."""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from force_plugin.errors import FileFormatError, NotPrunedError
from force_plugin.model.module_names import name_some


def say(message: str) -> None:
    """Print a message to standard error, on the process of rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"force_plugin.hold: {message}", file=sys.stderr)


_AnyTensor = TypeVar("_AnyTensor", bound=Tensor)


def weights_of(parameters: Iterable[tuple[str, _AnyTensor]]) -> dict[str, _AnyTensor]:
    """Return parameters without biases and normalisations, which may start at 0."""
    return {name: p for name, p in parameters if p.ndim > 1 and p.is_floating_point()}


def least_value(dtype: torch.dtype) -> float:
    """Return the value that replaces a 0 in a weight that was not pruned."""
    return max(1e-30, torch.finfo(dtype).tiny)


class InitialWeights:
    """Load the weights of a file into the first called module that fits the weights.

    Earlier copies of the module, such as an average of its weights, get the file's
    weights too. A module that has the zeros of the file comes from a checkpoint, and is
    not changed.

    Args:
        path: Safetensors file, as :func:`save_pruned` writes it.

    Raises:
        FileFormatError: The file cannot be read.
        NotPrunedError: The weights of the file contain no zeros.
    """

    def __init__(self, path: str) -> None:  # noqa: D107 (the class has it)
        expected = (
            "expected a safetensors file of pruned weights, as force-prune and "
            f"force_plugin.hold.save_pruned write it, got {path!r}"
        )
        try:
            values = load_file(path)
        except (OSError, SafetensorError) as error:
            raise FileFormatError(f"{expected}: {error}") from None
        if not any(
            (weight == 0).any() for weight in weights_of(values.items()).values()
        ):
            raise NotPrunedError(f"{expected}, which has no zeros among its weights")
        self._path = path
        self._values = {_plain(key): value for key, value in values.items()}
        self._shapes = {key: value.shape for key, value in self._values.items()}
        self._found = False
        # Name and shapes of the called module that fits the weights best.
        self._closest: tuple[str, dict[str, torch.Size]] | None = None
        self._hooks = (
            register_module_forward_pre_hook(self._before_forward),
            register_optimizer_step_pre_hook(self._before_first_step),
        )

    def remove(self) -> None:
        """Free the weights, and remove the hooks on modules and optimizers."""
        for hook in self._hooks:
            hook.remove()
        self._values.clear()

    def require(self, moment: str) -> None:
        """Raise RuntimeError if no called module has fitted the weights until now."""
        if self._found:
            return
        came = "none that has parameters was called"
        if self._closest is not None:
            name, shapes = self._closest
            differing = [
                f"{key} is {_shown(shapes.get(key))} instead of "
                f"{_shown(self._shapes.get(key))}"
                for key in {**shapes, **self._shapes}
                if shapes.get(key) != self._shapes.get(key)
            ]
            came = f"the closest that was called is {name}, where "
            came += name_some(differing) or "no parameter requires a gradient"
        raise RuntimeError(
            "force_plugin.hold: expected a module with the keys and shapes of "
            f"{self._path} to be called before {moment}, got none; {came}. Write the "
            "file from the model that the script makes, with as many classes; what is "
            "called as model.forward(inputs) or after model.compile() is not seen"
        )

    def _before_first_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.require(f"the first step of {type(optimizer).__name__}")

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        # Nothing can be loaded while torch.compile traces. Modules without parameters,
        # such as transforms, are ignored.
        if torch.compiler.is_compiling() or next(module.parameters(), None) is None:
            return
        shapes = _shapes(module)
        # A teacher may have equal keys, but is frozen.
        trained = any(parameter.requires_grad for parameter in module.parameters())
        if shapes == self._shapes and trained:
            self._found = True
            self._start(module)
            self.remove()
        elif self._closest is None or (
            len(shapes.items() ^ self._shapes.items())
            < len(self._closest[1].items() ^ self._shapes.items())
        ):
            self._closest = type(module).__name__, shapes

    def _start(self, module: nn.Module) -> None:
        """Load the values into a module and its copies, and print a message."""
        name = type(module).__name__
        weights = _named_weights(module)
        # Weights with values that are pruned in the file, but not in the module.
        dense = {
            key: weight.clone()
            for key, weight in weights.items()
            if weight[(self._values[key] == 0).to(weight.device)].any()
        }
        if not dense:
            say(
                f"did not load {self._path}: {name} has its zeros already, as from a "
                "checkpoint"
            )
            return
        gc.collect()  # objects without references are no averages
        classes = {type(part) for part in module.modules()}
        copies = {id(next(module.parameters())): module}
        copies |= {
            id(next(other.parameters())): other  # wrappers share their parameters
            for other in gc.get_objects()
            if type(other) in classes
            and _shapes(other) == self._shapes
            and _equal(_named_weights(other), weights)
        }
        for copy in copies.values():
            copy.load_state_dict(
                {
                    key: _as(self._values[_plain(key)], value)
                    for key, value in copy.state_dict().items()
                }
            )
        others = {1: "", 2: " and a copy of it"}
        say(
            f"loaded {self._path} into {name}"
            + others.get(len(copies), f" and {len(copies) - 1} copies of it")
        )
        tensors = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
        left = sum(_is_copy(tensor, dense.values()) for tensor in tensors)
        if left:
            say(
                f"warning: {left} other tensors have its weights from before; an "
                "average that starts from those will not be pruned, so let it start "
                "after the first call of the model"
            )


def _plain(key: str) -> str:
    """Return a state-dict key without torch.compile's and DDP's prefixes."""
    return re.sub(r"^(module\.)+", "", key.replace("_orig_mod.", ""))


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {
        _plain(key): value.shape
        for key, value in module.state_dict().items()
        if isinstance(value, Tensor) and not is_lazy(value)
    }


def _shown(shape: torch.Size | None) -> str:
    return "nothing" if shape is None else str(tuple(shape))


def _named_weights(module: nn.Module) -> dict[str, Tensor]:
    return {_plain(n): p for n, p in weights_of(module.named_parameters()).items()}


def _equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return all(torch.equal(some[key], others[key].to(some[key])) for key in some)


def _is_copy(tensor: Tensor, weights: Collection[Tensor]) -> bool:
    """Return whether a tensor is no weight itself, but equals a weight."""
    return not any(tensor is weight for weight in weights) and any(
        tensor.shape == weight.shape
        # An average may have a higher precision.
        and tensor.dtype in (weight.dtype, torch.float32)
        and tensor.layout == torch.strided
        and not tensor.is_meta
        and torch.equal(tensor, weight.to(tensor))
        for weight in weights
    )


def _as(value: Tensor, like: Tensor) -> Tensor:
    """Return a tensor in the precision of ``like``, without additional zeros."""
    result = value.to(like.dtype)
    if result.is_floating_point():
        result.masked_fill_((result == 0) & (value != 0), least_value(result.dtype))
    return result
