"""How a mask sits on a weight: PyTorch's reparametrisation, so that it can be copied.

A pruned module has ``weight_orig`` (the parameter), ``weight_mask`` (a buffer) and a
forward pre-hook that computes ``weight`` from the two, as any that
:mod:`torch.nn.utils.prune` has pruned. There, ``weight`` keeps the values and the
autograd graph of the last forward: :func:`copy.deepcopy` refuses such a tensor, and who
reads it without calling its module trains nothing. Here, outside of the forward,
``weight`` is a :class:`PrunedTensor`, which is computed whenever it is read.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._pytree import tree_map_only


class PrunedTensor(Tensor):
    """A pruned tensor of a module that is not running: mask ⊙ parameter, as they are.

    Every function of PyTorch that is given one is called with the product of that
    moment, which has its graph. So it does not matter who reads it (a hook of whatever
    order, another module, a loss), nor whether its owner is called. The tensor itself
    has a single number in memory, and a graph that leads to the parameter: by that its
    gradients come from a :class:`torch.autograd.Function`, which is given it as it is.

    Args:
        module: Owner of the tensor. It is not kept alive.
        name: Name of the tensor within the module, e.g. ``"weight"``.
        original: The parameter, or the one that the module is about to get.
    """

    _owner: ref[nn.Module]
    _name: str
    # Identity of the parameter that its own graph leads to.
    _original: int
    _pointed_to: Tensor
    _kept: nn.Module | None

    @staticmethod
    def __new__(cls, module: nn.Module, name: str, original: Tensor) -> PrunedTensor:
        """Make one that refers to its module."""
        owner = ref(module)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = original
            if not original.requires_grad:  # it may be trained later
                leaf = torch.zeros((), requires_grad=True)
            made: PrunedTensor
            made = _Masked.apply(leaf, original, owner, name).as_subclass(cls)
        made._owner, made._name, made._original = owner, name, id(original)
        made._kept = None
        return made

    def fits(self, original: nn.Parameter) -> bool:
        """Whether its graph leads to a parameter, as that is now."""
        with torch._C.DisableTorchFunctionSubclass():
            return (
                self._original == id(original)
                and self.dtype == original.dtype
                and self.device == original.device
            )

    def read(self, whole: bool = True) -> Tensor:
        """What it is at this moment; the parameter alone unless ``whole``.

        Once the pruning was removed, it is the parameter that has its name.

        Raises:
            RuntimeError: The module is gone, or has no such parameter any more.
        """
        module = self._owner()
        own: Mapping[str, nn.Parameter | None] = (
            {} if module is None else module._parameters
        )
        original, permanent = own.get(f"{self._name}_orig"), own.get(self._name)
        if module is not None and original is not None:
            return masked(module, self._name) if whole else original
        if permanent is not None:
            return permanent
        raise RuntimeError(
            f"the pruned tensor {self._name!r} belongs to a module that is gone, or "
            f"has no such parameter any more; read module.{self._name} anew"
        )

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function with what such tensors among its arguments are now."""
        if function in _OF_ITSELF:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        for written in _written(function, args, kwargs or {}):
            raise RuntimeError(
                f"the pruned tensor {written._name!r} is computed whenever it is read, "
                f"and what is written into it would be lost: write into "
                f"{written._name}_orig, or take reinitialise(model, fresh) for new "
                "initial values"
            )
        if function is Tensor.data_ptr:
            # What it points to is there as long as the tensor, or till the next call.
            tensor: PrunedTensor = args[0]
            tensor._pointed_to = tensor.read().detach().contiguous()
            return tensor._pointed_to.data_ptr()
        whole = function not in _OF_THE_PARAMETER
        args, kwargs = tree_map_only(
            PrunedTensor, lambda tensor: tensor.read(whole), (args, kwargs or {})
        )
        return function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """That of the copied module, where this one is copied; else its values."""
        copied = memo.get(id(self._owner()))
        if isinstance(copied, nn.Module):
            original = copy.deepcopy(self.read(whole=False), memo)
            return PrunedTensor(copied, self._name, original)
        return self.read().detach()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """A pickle has it with its module."""
        original = self.read(whole=False)
        return _from_pickle, (self._owner(), self._name, original)


def _written(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[PrunedTensor]:
    """The pruned tensors that a function of PyTorch is about to write into."""
    name = getattr(function, "__name__", "")
    targets = [kwargs.get("out")]
    if name == "__setitem__" or (_IN_PLACE.fullmatch(name) and name not in _NO_WRITES):
        targets += args[:1]
    found = []
    for target in targets:
        # No union, which the torch.compile of torch 2.7 does not know.
        several = target if isinstance(target, (tuple, list)) else [target]
        found += [one for one in several if isinstance(one, PrunedTensor)]
    return found


_IN_PLACE = re.compile(r"__i(add|sub|mul|truediv|pow|and|or|xor)__|\w*[a-z0-9]_")
_NO_WRITES = {"requires_grad_", "share_memory_"}


def _from_pickle(module: nn.Module, name: str, original: Tensor) -> PrunedTensor:
    made = PrunedTensor(module, name, original)
    made._kept = module  # which may be there for its sake alone
    return made


class _Masked(torch.autograd.Function):
    """The graph of a pruned tensor, which saves nothing, so that it serves for ever."""

    @staticmethod
    def forward(
        ctx: Any, leaf: Tensor, original: Tensor, owner: ref[nn.Module], name: str
    ) -> Tensor:
        ctx.leaf, ctx.owner, ctx.name = id(leaf), owner, name
        # NaN is what code would read that passes __torch_function__ by.
        number = torch.full((), math.nan, dtype=original.dtype, device=original.device)
        return number.expand(original.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        module = ctx.owner()
        own = {} if module is None else module._parameters
        original = own.get(f"{ctx.name}_orig", own.get(ctx.name))
        if f"{ctx.name}_orig" in own:
            gradient = gradient.masked_fill(getattr(module, f"{ctx.name}_mask") == 0, 0)
        if original is None or not original.requires_grad:
            return None, None, None, None
        if id(original) == ctx.leaf and original.dtype == gradient.dtype:
            return gradient, None, None, None
        # It was frozen then, has taken another's place, or is of another type by now.
        torch.autograd.backward(original, gradient.to(original))
        return None, None, None, None


def _getters(*names: str) -> list[Callable[..., Any]]:
    return [getattr(Tensor, name).__get__ for name in names]


# Dicts, as the torch.compile of torch 2.7 fails where a set is asked.
_OF_ITSELF = dict.fromkeys([*_getters("is_leaf", "grad_fn", "grad"), Tensor.stride])
"""Its own graph, and the strides, by which torch.compile knows it."""

_OF_THE_PARAMETER = dict.fromkeys(
    [
        *_getters("shape", "dtype", "device", "ndim", "requires_grad"),
        Tensor.size,
        Tensor.dim,
        Tensor.numel,
        Tensor.is_floating_point,
    ]
)
"""What needs no product."""


def masked(module: nn.Module, name: str) -> Tensor:
    """A pruned tensor of a module: its parameter, with the zeros of its mask."""
    original: Tensor = getattr(module, f"{name}_orig")
    mask: Tensor = getattr(module, f"{name}_mask")
    if mask.dtype == torch.bool:
        # Zeros also of what is not finite; and autograd keeps no mask in floats.
        return torch.where(mask, original, 0.0)
    return mask.to(original.dtype) * original


class Reparametrisation(prune.BasePruningMethod):
    """The hook of a pruned tensor: computes it for a forward."""

    def __call__(self, module: nn.Module, inputs: object) -> None:
        """Compute the tensor from parameter and mask, for a forward."""
        setattr(module, self._tensor_name, self.apply_mask(module))

    def apply_mask(self, module: nn.Module) -> Tensor:
        """The tensor with zeros where it is pruned.

        Mirrors :meth:`torch.nn.utils.prune.BasePruningMethod.apply_mask`.
        """
        return masked(module, self._tensor_name)

    def remove(self, module: nn.Module) -> None:
        """Undo the reparametrisation; the pruned entries of the parameter are 0."""
        with _as_it_was(module, self._tensor_name):
            super().remove(module)


class Container(Reparametrisation, prune.PruningContainer):
    """Several prunings of one tensor."""


class _AtRest:
    """Puts the pruned tensor back when a forward is over."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.name = name
        self.tensor = PrunedTensor(module, name, getattr(module, f"{name}_orig"))
        # It goes with the module into a pickle, and in another process sees to it that
        # hooks to come get other numbers than this one and those before it.
        self.handle = module.register_forward_hook(self, always_call=True)

    def __call__(self, module: nn.Module, inputs: object, output: object) -> None:
        if find_hook(module, self.name) is None:
            # PyTorch's own pruning, and its prune.remove, do not know of this hook.
            self.handle.remove()
        else:
            self.show(module)

    def show(self, module: nn.Module) -> None:
        """Put it in its place, with a graph that leads to the parameter of now."""
        tensor = self.tensor
        original = module._parameters.get(f"{self.name}_orig")
        # A call may lend another tensor to the module.
        if (
            isinstance(original, nn.Parameter)
            and not torch.compiler.is_compiling()
            and not tensor.fits(original)
        ):
            tensor = PrunedTensor(module, self.name, original)
            if tensor._original == self.tensor._original:  # it has moved
                self.tensor = tensor
        if tensor._kept is not None:  # it is there with its module
            tensor._kept = None
        setattr(module, self.name, tensor)


def _at_rest(module: nn.Module, name: str) -> _AtRest | None:
    for hook in module._forward_hooks.values():
        if isinstance(hook, _AtRest) and hook.name == name:
            return hook
    return None


def find_hook(module: nn.Module, name: str) -> prune.BasePruningMethod | None:
    """The hook that prunes a tensor of a module, if it is pruned."""
    for hook in _pruning_hooks(module):
        if hook._tensor_name == name:
            return hook
    return None


def _pruning_hooks(module: nn.Module) -> Iterator[prune.BasePruningMethod]:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            yield hook


def reparametrise(
    module: nn.Module, name: str, mask: Tensor, method: Reparametrisation
) -> Reparametrisation:
    """Put a mask on a tensor, in the place of one that may be there already.

    Args:
        module: Module that holds the tensor.
        name: Name of the tensor within the module, e.g. ``"weight"``.
        mask: Bool tensor of its shape and on its device, True = kept. It is not copied.
        method: The hook. It joins those of earlier prunings in a :class:`Container`.

    Returns:
        The hook that the module has afterwards.

    Raises:
        ValueError: The module has something else where parameter and mask are kept.
    """
    method._tensor_name = name
    earlier = find_hook(module, name)
    hook = method
    if earlier is None:
        require_free(module, name, name)
        order = list(module._parameters)
        # Not register_parameter: this is no other owner of the parameter.
        module._parameters[f"{name}_orig"] = module._parameters.pop(name)
        reorder(module, [f"{name}_orig" if key == name else key for key in order])
        module.register_forward_pre_hook(hook)
    else:
        hook = Container()
        hook._tensor_name = name
        for one in (*getattr(earlier, "_pruning_methods", (earlier,)), method):
            hook.add_pruning_method(one)
        for key, value in module._forward_pre_hooks.items():
            if value is earlier:
                module._forward_pre_hooks[key] = hook
    module.register_buffer(f"{name}_mask", mask)
    if _at_rest(module, name) is None:
        _AtRest(module, name)
    show(module, name)
    return hook


def require_free(module: nn.Module, name: str, shown: str) -> None:
    """Raise ValueError if a pruning would take a name that a module uses for itself.

    Args:
        module: Owner of a tensor.
        name: Name of the tensor within the module.
        shown: Its name for a message.
    """
    for key in (f"{name}_orig", f"{name}_mask"):
        if find_hook(module, name) is None and hasattr(module, key):
            raise ValueError(
                f"{shown} cannot be pruned: its module has a {key} of its own, and "
                "torch.nn.utils.prune keeps something else under this name; give it "
                "another one, or leave the layer out with parameters="
            )


def show(module: nn.Module, name: str) -> None:
    """Have the values of now in the place of a pruned tensor.

    It has a graph where PyTorch's own hook has put it.
    """
    if (rest := _at_rest(module, name)) is not None:
        rest.show(module)
        return
    hook = find_hook(module, name)
    assert hook is not None
    with torch.enable_grad():
        setattr(module, name, hook.apply_mask(module))  # type: ignore[no-untyped-call]


def show_all(model: nn.Module) -> None:
    """The same for all tensors of a model that are pruned, but not by PyTorch's own."""
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            for hook in module._forward_hooks.values():
                if isinstance(hook, _AtRest):
                    hook.show(module)


def remove(module: nn.Module, name: str) -> None:
    """Undo the reparametrisation of a tensor, PyTorch's own too.

    Mirrors :func:`torch.nn.utils.prune.remove`, which does not know what a pruning of
    this package has left where another has followed it.
    """
    with _as_it_was(module, name):
        prune.remove(module, name)  # type: ignore[no-untyped-call]


@contextmanager
def _as_it_was(module: nn.Module, name: str) -> Iterator[None]:
    """Leave no hook behind, and the parameter in its place."""
    order = list(module._parameters)
    yield
    reorder(module, [name if key == f"{name}_orig" else key for key in order])
    if (rest := _at_rest(module, name)) is not None:
        rest.handle.remove()


def reorder(module: nn.Module, order: list[str]) -> None:
    """Keep parameters in the dense model's order, which optimizers count on."""
    parameters = {key: module._parameters[key] for key in order}
    module._parameters.clear()
    module._parameters.update(parameters)
