"""What PyTorch keeps private and this package needs, with the reason for each.

No other file uses a private name of PyTorch's modules, tensors, prunings or loaders.
The nodes of autograd's graph are in :mod:`force_plugin.model.autograd_nodes`.
``tests/model/test_torch_internals.py`` sees to both, and names what has changed when a
new version of PyTorch keeps something elsewhere.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import _C, Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as ConvNd
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import (
    TreeSpec,
    tree_flatten,
    tree_leaves,
    tree_map_only,
    tree_unflatten,
)
from torch.utils.data import DataLoader

__all__ = [  # from where PyTorch's own documentation imports them, or with a reason
    "BatchNorm",  # the base of all batch norms, of other people's too
    "ConvNd",  # the base of all convolutions
    "DisableTorchFunctionSubclass",
    "NormBase",  # the base of batch and instance norms
    "TorchDispatchMode",
    "TreeSpec",  # torch.export describes arguments and results with it
    "tree_flatten",
    "tree_leaves",
    "tree_map_only",
    "tree_unflatten",
]

REGISTRIES = ("_parameters", "_buffers", "_modules")
"""Attributes of a module that hold what it has registered, each a dictionary."""

_BOUND = ("forward", "_compiled_call_impl")
"""Attributes that some trainers set on an instance, and bind to the module itself."""


def registries(module: nn.Module) -> list[dict[str, Any]]:
    """The dictionaries of parameters, buffers and children of a module.

    A copy of them is the way back from a change. ``named_parameters`` and its like
    leave names out that stand for ``None``. Those of TorchScript are no dictionaries.
    """
    return [vars(module)[key] for key in REGISTRIES if key in vars(module)]


def uninitialised(
    kind: type[nn.Module],
    attributes: Mapping[str, Any],
    parameters: Mapping[str, Any],
    buffers: Mapping[str, Any],
    children: Mapping[str, Any],
) -> nn.Module:
    """Make a module in evaluation mode, whose class asks for unknown arguments.

    Args:
        kind: The class. Its constructor is not called.
        attributes: Attributes of the module. Hooks among them are dropped.
        parameters: Parameters by name, ``None`` too.
        buffers: Buffers by name, ``None`` too.
        children: Submodules by name, ``None`` too.
    """
    made: nn.Module = object.__new__(kind)
    own = {key: value for key, value in attributes.items() if key not in _BOUND}
    vars(made).update(own | vars(nn.Module()), training=False)
    contents = (parameters, buffers, children)
    vars(made).update(zip(REGISTRIES, map(dict, contents), strict=True))
    return made


def put_parameter(module: nn.Module, key: str, parameter: Tensor) -> None:
    """Put a tensor in the place of a parameter, and tell nobody.

    ``register_parameter`` and ``setattr`` call the hooks of
    ``register_module_parameter_registration_hook``, which would hold the zeros of a
    tensor that a module is only lent.
    """
    module._parameters[key] = parameter  # type: ignore[assignment]


def put_buffer(module: nn.Module, key: str, buffer: Tensor) -> None:
    """Put a tensor in the place of a buffer, and tell nobody.

    ``setattr`` calls the hooks of ``register_module_buffer_registration_hook``, and a
    ``__setattr__`` of the module's class, which may refuse or count what is written.
    """
    module._buffers[key] = buffer


def read_through(module: nn.Module, key: str, read: Callable[[Any], Tensor]) -> None:
    """Have a function of a parameter in its place for everything that reads it.

    No hook of PyTorch runs when an attribute is read. A parametrisation would change
    the class of the module, and its names.

    Args:
        module: Its attributes have to be restored by the caller.
        key: Name of the parameter.
        read: Called with the parameter whenever it is read.
    """
    if not isinstance(module._parameters, _ReadThrough):
        vars(module)["_parameters"] = _ReadThrough(module._parameters)
    module._parameters.reads[key] = read  # type: ignore[attr-defined]


class _ReadThrough(dict[str, Any]):
    def __init__(self, parameters: Mapping[str, Any]) -> None:
        super().__init__(parameters)
        self.reads: dict[str, Callable[[Any], Tensor]] = {}

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        read = self.reads.get(key)
        return value if value is None or read is None else read(value)


def rename_parameter(module: nn.Module, key: str, new: str) -> None:
    """Give a parameter another name in its place, and tell nobody.

    PyTorch's own pruning deletes and registers it: it comes last then, and optimizers
    count on the order.
    """
    own = module._parameters
    order = [new if name == key else name for name in own]
    own[new] = own.pop(key)
    reorder_parameters(module, order)


def parameter_order(module: nn.Module) -> list[str]:
    """The names of a module's own parameters in order, those of ``None`` too."""
    return list(module._parameters)


def reorder_parameters(module: nn.Module, order: list[str]) -> None:
    """Put a module's own parameters into the order of their names."""
    parameters = {key: module._parameters[key] for key in order}
    module._parameters.clear()
    module._parameters.update(parameters)


def is_persistent(module: nn.Module, key: str) -> bool:
    """Whether a buffer belongs to the state dict; hooks may add and drop keys there."""
    return key not in module._non_persistent_buffers_set


def forward_hooks(module: nn.Module) -> list[Any]:
    """The hooks that run after the forward; PyTorch lists them nowhere."""
    return [*module._forward_hooks.values()]


def forward_pre_hooks(module: nn.Module) -> list[Any]:
    """The hooks that run before the forward; PyTorch lists them nowhere."""
    return [*module._forward_pre_hooks.values()]


def replace_forward_pre_hook(module: nn.Module, old: Any, new: Any) -> None:
    """Put a hook in the place of another; to register it would make it the last."""
    for key, hook in module._forward_pre_hooks.items():
        if hook is old:
            module._forward_pre_hooks[key] = new


def remove_hooks(module: nn.Module, unwanted: Callable[[Any], bool]) -> None:
    """Remove hooks around the forward whose handles others have."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if unwanted(hook):
                del hooks[key]


def tensor_name(hook: prune.BasePruningMethod) -> str:
    """The name of the tensor that a pruning hook prunes, in its module."""
    name: str = hook._tensor_name
    return name


def set_tensor_name(hook: prune.BasePruningMethod, name: str) -> None:
    """Tell a pruning hook which tensor it prunes, as its ``apply`` does."""
    hook._tensor_name = name


def seen_as(kind: type[nn.Module], module: nn.Module) -> nn.Module:
    """Return a module of another class with all that a module has, except its hooks.

    Both share the dictionaries of parameters, buffers and children.
    """
    made: nn.Module = object.__new__(kind)
    vars(made).update(vars(module))
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        vars(made)[hooks] = OrderedDict()
    return made


def hooks_of(module: nn.Module) -> list[Any]:
    """Return the dictionaries of hooks that run in a forward or backward pass."""
    state = vars(module)
    names = "forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks"
    return [state[f"_{name}"] for name in names]


def state_of(module: nn.Module, values: bool = True) -> list[object]:
    """Return what changes with a module's mode, tensors, children and hooks.

    A few microseconds, as this runs before each forward pass.

    Args:
        module: The module, without its children.
        values: Whether writes to a tensor count, except those to ``tensor.data``.
    """
    state = vars(module)
    hooks = sum(map(len, hooks_of(module)))
    found = [state["training"], hooks, *map(id, state["_modules"].values())]
    for own in (state["_parameters"], state["_buffers"]):
        for tensor in own.values():
            if tensor is not None and not values:
                found += id(tensor), tensor.requires_grad
            elif tensor is not None:
                # Tensors of inference mode have no version.
                written = -1 if tensor.is_inference() else tensor._version
                found += id(tensor), tensor.data_ptr(), written, tensor.requires_grad
    return found


class OwnState(nn.Module):
    """A module whose entries in a state dict are not its parameters as they are.

    A hook of a state dict would stay behind when the class of the module changes.
    """

    def write_state(
        self, state_dict: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Change the entries of the module's parameters."""
        raise NotImplementedError

    def read_state(
        self, state_dict: dict[str, Any], prefix: str, errors: list[str]
    ) -> dict[str, Any] | None:
        """Return entries for the module's parameters, or ``None`` after an error."""
        raise NotImplementedError

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self.write_state(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = self.read_state(state_dict, prefix, error_msgs)
        if own is not None:
            others = strict, missing_keys, unexpected_keys, error_msgs
            super()._load_from_state_dict(own, prefix, local_metadata, *others)


def is_followed() -> bool:
    """Whether something follows what tensors compute, so that it has to be PyTorch's.

    That is ``torch.func``, ``torch.jit.trace``, or a dispatch mode.
    """
    return bool(
        _C._are_functorch_transforms_active()
        or _C._get_tracing_state() is not None
        or _C._len_torch_dispatch_stack()
    )


def keeps_graph() -> bool:
    """Whether the backward pass in progress was called with ``retain_graph``."""
    return bool(_C._autograd._get_current_graph_task_keep_graph())


def version(tensor: Tensor) -> int:
    """The number of times that a tensor was written to in place."""
    return tensor._version


def tell_of_hooks(parameter: nn.Parameter) -> None:
    """Have autograd run the hooks of a parameter again.

    ``torch.utils.swap_tensors`` exchanges them, but not what the engine knows of them.
    """
    hooks = parameter._post_accumulate_grad_hooks
    parameter._post_accumulate_grad_hooks = hooks


def metadata(state_dict: Any) -> Mapping[str, Any] | None:
    """The versions of modules that a state dict of PyTorch carries beside its keys."""
    found: Mapping[str, Any] | None = getattr(state_dict, "_metadata", None)
    return found


def set_metadata(state_dict: Any, versions: Mapping[str, Any]) -> None:
    """Give a state dict the versions of modules."""
    state_dict._metadata = versions


@contextmanager
def own_iterator(loader: DataLoader[Any]) -> Iterator[None]:
    """Let a loader begin an epoch, and have it go on with its own one afterwards.

    A loader with persistent workers has one iterator, and starts it anew for each
    epoch; somebody may be in the middle of it. They would also draw no new seed.
    """
    state = dict(vars(loader))
    vars(loader)["_iterator"] = None
    try:
        yield
    finally:
        vars(loader).update(state)
