"""Functions that remember and restore modules, tensors and random generators."""

from __future__ import annotations

import operator
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from force_plugin.model.reparametrisation import PrunedTensor
from force_plugin.model.torch_internals import own_iterator, registries, version


def snapshot(modules: Iterable[Any]) -> Callable[[], None]:
    """Remember the attributes of modules, and return a function that restores them.

    The attributes hold a module's parameters, buffers, hooks and mode, and everything
    that its forward keeps. Parameters and buffers are remembered as references. So they
    are restored if they were replaced, but not if their values were overwritten. Other
    tensors are remembered with their values. Lists, deques, sets and dictionaries are
    remembered with their items, also inside one another. The contents of other objects
    are not remembered. The attributes of a TorchScript module cannot be replaced, so
    its mode and all its values are remembered.

    Args:
        modules: The modules, or other objects that have attributes. The children of
            modules are not included.

    Returns:
        A function that gives the modules their attributes back. It does not write to
        unchanged attributes. If an attribute cannot be written, all others are restored
        before the error is raised.
    """
    undo: list[Callable[[], object]] = []
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            undo.append(partial(setattr, module, "training", module.training))
            kept = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            undo += [tensor_as_it_is(tensor) for tensor in kept]
            continue
        state = vars(module)
        own = registries(module)
        containers: dict[int, Any] = {id(registry): registry for registry in own}
        others = {id(tensor) for registry in own for tensor in registry.values()}
        ahead = [value for value in state.values() if id(value) not in containers]
        tensors: dict[int, Tensor] = {}
        while ahead:
            value = ahead.pop()
            if isinstance(value, PrunedTensor) or id(value) in others:
                continue
            if isinstance(value, Tensor):
                tensors[id(value)] = value
            elif isinstance(value, _KINDS) and id(value) not in containers:
                containers[id(value)] = value
                items = _items(value)
                ahead += items.values() if isinstance(items, dict) else items
        undo += [
            *(tensor_as_it_is(tensor) for tensor in tensors.values()),
            *map(_items_as_they_are, containers.values()),
            _items_as_they_are(state),
        ]

    def restore() -> None:
        with ExitStack() as stack:
            for each in undo:
                stack.callback(each)

    return restore


_KINDS = (OrderedDict, dict, list, set, deque)


def _items(container: Any) -> Any:
    """Return a copy of a container's items, without calls to methods of a subclass."""
    if isinstance(container, OrderedDict):
        return dict(OrderedDict.items(container))
    if isinstance(container, dict):
        return dict(dict.items(container))
    kind = next(kind for kind in _KINDS if isinstance(container, kind))
    return [*kind.__iter__(container)]


def _items_as_they_are(container: Any) -> Callable[[], None]:
    """Return a function that gives a container its present items back."""
    before = _items(container)
    kind: Any = next(kind for kind in _KINDS if isinstance(container, kind))

    def restore() -> None:
        if _same(before, _items(container)):
            return
        # Call the methods of the built-in class, as a subclass may refuse writes.
        kind.clear(container)
        if isinstance(before, dict):
            for key, value in before.items():
                kind.__setitem__(container, key, value)
        else:
            (kind.update if kind is set else kind.extend)(container, before)

    return restore


def _same(before: Any, after: Any) -> bool:
    """Whether two collections hold the same objects in the same order."""
    if isinstance(before, dict):
        before = [item for pair in before.items() for item in pair]
        after = [item for pair in after.items() for item in pair]
    return len(before) == len(after) and all(map(operator.is_, before, after))


def tensor_as_it_is(tensor: Tensor) -> Callable[[], None]:
    """Return a function that gives a tensor its present values back."""
    if tensor.is_inference():  # inference tensors have no version counter
        return lambda: None
    values, written = tensor.detach().clone(), version(tensor)

    def restore() -> None:
        if version(tensor) != written:
            tensor.data.copy_(values)

    return restore


@contextmanager
def restored(modules: Iterable[Any], *, only_on_error: bool = False) -> Iterator[None]:
    """Return a context that gives modules their attributes back at its end.

    The attributes are those of :func:`snapshot`.

    Args:
        modules: The modules. Their children are not included.
        only_on_error: Restore only after an exception, and keep the changes otherwise.
    """
    restore = snapshot(modules)
    failed = True
    try:
        yield
        failed = False
    finally:
        if failed or not only_on_error:
            restore()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Return a context that restores a model's attributes and all random generators."""
    randomness = random_states(model)
    with restored(model.modules()):
        try:
            yield
        finally:
            randomness()


@contextmanager
def without_trace(model: nn.Module, loader: Iterable[Any]) -> Iterator[None]:
    """Return a context that restores everything that scoring may change.

    These are the attributes of the model's modules, random states, and the loader.
    """
    with undisturbed(model), rewound(loader):
        yield


@contextmanager
def rewound(loader: Iterable[Any]) -> Iterator[None]:
    """Return a context that restores a loader's generators and its own iterator."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = (
        getattr(loader, "sampler", None),
        getattr(batch_sampler, "sampler", None),
    )
    generators = [
        (generator, generator.get_state())
        for part in (loader, batch_sampler, *samplers)
        if isinstance(generator := getattr(part, "generator", None), torch.Generator)
    ]
    with own_iterator(loader) if isinstance(loader, DataLoader) else nullcontext():
        try:
            yield
        finally:
            for generator, saved in generators:
                generator.set_state(saved)


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Return a context in which every module is in evaluation mode."""
    # The mode of a TorchScript module is no Python attribute, so restored() misses it.
    scripted = [
        (module, module.training)
        for module in model.modules()
        if isinstance(module, torch.jit.ScriptModule)
    ]
    with restored(model.modules()):
        try:
            for module in model.modules():
                module.training = False
            yield
        finally:
            for module, training in scripted:
                module.training = training


def random_states(model: nn.Module) -> Callable[[], None]:
    """Return a function that restores the states of all random generators.

    These are the global generators, and the generators that modules hold.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    states: list[tuple[Callable[..., object], Tensor, tuple[int, ...]]]
    states = [(torch.set_rng_state, torch.get_rng_state(), ())]
    for device in {tensor.device for tensor in model.parameters()}:
        if device.index is not None:
            backend = torch.get_device_module(device)
            # There is only one MPS device, and its functions take no index.
            which = () if device.type == "mps" else (device.index,)
            states.append((backend.set_rng_state, backend.get_rng_state(*which), which))

    for module in model.modules():
        ahead: list[Any] = [*vars(module).values()]
        seen = {id(registry) for registry in registries(module)}
        while ahead:
            value = ahead.pop()
            if isinstance(value, torch.Generator):
                states.append((value.set_state, value.get_state(), ()))
            elif isinstance(value, _KINDS) and id(value) not in seen:
                seen.add(id(value))
                inside = _items(value)
                ahead += inside.values() if isinstance(inside, dict) else inside

    def restore() -> None:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for set_state, state, which in states:
            set_state(state, *which)

    return restore


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of any type have the same values, bit for bit."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    bits = (t.detach().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(*bits)


class Kept:
    """A tensor that other code may write to, with a copy of its values.

    Args:
        tensor: The tensor.
    """

    def __init__(self, tensor: Tensor) -> None:  # noqa: D107
        self._tensor = tensor
        self._memory = tensor.data
        self._values = self._memory.clone()

    def put_back(self) -> bool:
        """Give the tensor its memory and values back; return whether it had changed."""
        now = self._tensor.data
        same = (
            now.data_ptr() == self._memory.data_ptr()
            and now.stride() == self._memory.stride()
            and same_bits(now, self._values)
        )
        if not same:
            self._tensor.data = self._memory.copy_(self._values)
        return not same
