"""How a mask sits on a weight: PyTorch's reparametrisation, so that it can be copied.

A pruned module has ``weight_orig`` (the parameter), ``weight_mask`` (a buffer) and a
forward pre-hook that computes ``weight`` from the two, as any that
:mod:`torch.nn.utils.prune` has pruned. There, ``weight`` keeps its autograd graph, and
:func:`copy.deepcopy` refuses such a tensor, so a model that was pruned has no EMA and
does not go through a trainer that copies it. Here the graph lasts as long as the
forward does: a forward hook puts the same values without it in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import prune


class Reparametrisation(prune.BasePruningMethod):
    """The hook of a pruned tensor, and what it leaves outside of the forward."""

    def __call__(self, module: nn.Module, inputs: object) -> None:
        """Compute the tensor from parameter and mask, for a forward."""
        name = self._tensor_name
        own = isinstance(getattr(module, f"{name}_orig"), nn.Parameter)
        if not own or torch.compiler.is_exporting():
            # Someone has lent the module other values (torch.func.functional_call);
            # they are not to be found in it afterwards.
            outside = f"_{name}_outside"
            setattr(module, outside, getattr(module, outside, getattr(module, name)))
        setattr(module, name, self.apply_mask(module))

    def apply_mask(self, module: nn.Module) -> Tensor:
        """The tensor with zeros where it is pruned.

        Mirrors :meth:`torch.nn.utils.prune.BasePruningMethod.apply_mask`.
        """
        original: Tensor = getattr(module, f"{self._tensor_name}_orig")
        mask: Tensor = getattr(module, f"{self._tensor_name}_mask")
        traced = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        if mask.dtype == torch.bool and not (traced or torch.compiler.is_compiling()):
            # On a CPU, bytes become floats several times as fast as bools do.
            mask = mask.view(torch.uint8)
        return mask.to(original.dtype) * original

    def remove(self, module: nn.Module) -> None:
        """Undo the reparametrisation; the pruned entries of the parameter are 0."""
        with _as_it_was(module, self._tensor_name):
            super().remove(module)


class Container(Reparametrisation, prune.PruningContainer):
    """Several prunings of one tensor."""


class _Detach:
    """Leaves a pruned tensor without its graph when the forward is over."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.name = name
        # It goes with the module into a pickle, and in another process sees to it that
        # hooks to come get other numbers than this one and those before it.
        self.handle = module.register_forward_hook(self, always_call=True)

    def __call__(self, module: nn.Module, inputs: object, output: object) -> None:
        # A reader may want the tensor, and its gradient, also after this call.
        if not getattr(module, f"_{self.name}_readers", 0):
            self.detach(module)

    def detach(self, module: nn.Module) -> None:
        inside = getattr(module, self.name)
        outside = getattr(module, f"_{self.name}_outside", None)
        if outside is not None:
            delattr(module, f"_{self.name}_outside")
        # After a prune.remove that does not know of this hook it is a parameter.
        if not isinstance(inside, nn.Parameter):
            value = inside.detach() if outside is None else outside
            setattr(module, self.name, value)


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
    """
    method._tensor_name = name
    earlier = find_hook(module, name)
    hook = method
    if earlier is None:
        order = list(module._parameters)
        module.register_parameter(f"{name}_orig", module._parameters.pop(name))
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
    if not any(
        isinstance(after, _Detach) and after.name == name
        for after in module._forward_hooks.values()
    ):
        _Detach(module, name)
    module.register_buffer(f"{name}_mask", mask)
    setattr(module, name, hook.apply_mask(module).detach())
    return hook


def show(module: nn.Module, name: str) -> None:
    """Compute a pruned tensor anew, with a graph where its hook leaves one."""
    hook = find_hook(module, name)
    assert hook is not None
    detached = any(
        isinstance(after, _Detach) and after.name == name
        for after in module._forward_hooks.values()
    )
    with torch.enable_grad():
        shown = hook.apply_mask(module)  # type: ignore[no-untyped-call]
    setattr(module, name, shown.detach() if detached else shown)


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
    for hook in list(module._forward_hooks.values()):
        if isinstance(hook, _Detach) and hook.name == name:
            hook.handle.remove()


def reorder(module: nn.Module, order: list[str]) -> None:
    """Keep parameters in the dense model's order, which optimizers count on."""
    parameters = {key: module._parameters[key] for key in order}
    module._parameters.clear()
    module._parameters.update(parameters)


class _Reader:
    """Computes a module's pruned tensors when another is about to read them.

    The hook of a pruned tensor runs when its owner is called. Some attention layers
    never call their projections, they only read the weight:
    :class:`torch.nn.MultiheadAttention`, timm's BEiT and Swin V2. An autoencoder with
    tied weights calls a layer first, and reads its weight later.
    """

    def __init__(self, reader: nn.Module, path: str) -> None:
        self.path = path
        self.handles = (
            reader.register_forward_pre_hook(self),
            reader.register_forward_hook(self.finish, always_call=True),
        )

    def __call__(self, reader: nn.Module, inputs: object) -> None:
        owner = reader.get_submodule(self.path)
        for hook in _pruning_hooks(owner):
            readers = f"_{hook._tensor_name}_readers"
            setattr(owner, readers, getattr(owner, readers, 0) + 1)
            hook(owner, inputs)

    def finish(self, reader: nn.Module, inputs: object, output: object) -> None:
        owner = reader.get_submodule(self.path)
        for hook in owner._forward_hooks.values():
            if isinstance(hook, _Detach):
                readers = f"_{hook.name}_readers"
                # None has begun where the hook of another has failed before this one.
                setattr(owner, readers, max(getattr(owner, readers, 0) - 1, 0))
                hook(owner, inputs, output)


def read_by(reader: nn.Module, path: str) -> None:
    """Have the pruned tensors of a submodule at hand in the forward of a module.

    Args:
        reader: Module that takes tensors of the other without calling it.
        path: Name of the other as ``reader.named_modules()`` gives it.
    """
    if not any(hook.path == path for hook in _readers(reader)):
        _Reader(reader, path)


def forget_readers(model: nn.Module) -> None:
    """Take off the hooks of readers whose owners are not pruned any more."""
    for module in model.modules():
        for hook in _readers(module):
            if not any(_pruning_hooks(module.get_submodule(hook.path))):
                for handle in hook.handles:
                    handle.remove()


def _readers(module: nn.Module) -> list[_Reader]:
    hooks = module._forward_pre_hooks.values()
    return [hook for hook in hooks if isinstance(hook, _Reader)]
