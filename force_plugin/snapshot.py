"""What modules and random generators were, and the way back."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader


def snapshot(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Remember the attributes of modules.

    They hold a module's parameters, buffers, hooks and mode, and whatever its forward
    keeps. Of parameters and buffers references are remembered, not values: what is to
    be restored must have been replaced meanwhile, not overwritten. Of other attributes
    it is the values of tensors and the items of lists, deques, sets and dictionaries,
    also of those in one another; what other objects hold is not followed.

    Args:
        modules: The modules themselves; their children are not followed.

    Returns:
        A function that gives the modules their attributes back.
    """
    saved = []
    for module in modules:
        state = vars(module)
        items = [(held, _items(held)) for held in _containers(state.values())]
        values = {
            key: (value, value.detach().clone(), value._version)
            for key, value in state.items()
            # A pruned tensor is made anew in every forward.
            if isinstance(value, Tensor)
            and f"{key}_orig" not in state.get("_parameters", ())
            and not value.is_inference()
        }
        saved.append((state, dict(state), items, values.values()))

    def restore() -> None:
        for state, attributes, items, values in saved:
            state.clear()
            state.update(attributes)
            for held, content in items:
                held.clear()
                (held.update if hasattr(held, "update") else held.extend)(content)
            for tensor, value, version in values:
                if tensor._version != version:
                    with torch.no_grad():
                        tensor.copy_(value)

    return restore


def _containers(values: Iterable[Any]) -> Iterator[Any]:
    """The lists, deques, sets and dictionaries among values, and those in them."""
    ahead, seen = [*values], set()
    while ahead:
        value = ahead.pop()
        if isinstance(value, dict | list | set | deque) and id(value) not in seen:
            seen.add(id(value))
            ahead += value.values() if isinstance(value, dict) else value
            yield value


def _items(held: Any) -> Any:
    return dict(held) if isinstance(held, dict) else list(held)


@contextmanager
def restored(
    modules: Iterable[nn.Module], *, only_on_error: bool = False
) -> Iterator[None]:
    """Give modules their attributes back at the end, as :func:`snapshot` does.

    Args:
        modules: The modules themselves; their children are not followed.
        only_on_error: Keep the changes unless an exception passes through.
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
    """Give a model's attributes and the global random generators back as they were."""
    randomness = random_states(model)
    with restored(model.modules()):
        try:
            yield
        finally:
            randomness()


@contextmanager
def without_trace(model: nn.Module, loader: Iterable[Any]) -> Iterator[None]:
    """Restore what scoring may change: attributes of modules and random states."""
    with undisturbed(model), rewound(loader):
        yield


@contextmanager
def rewound(loader: Iterable[Any]) -> Iterator[None]:
    """Restore what reading a loader may change: its generators, its own iterator."""
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
    state = dict(vars(loader)) if isinstance(loader, DataLoader) else {}
    if isinstance(loader, DataLoader):
        # Workers that persist would start their epoch anew, and somebody may be in the
        # middle of it.
        vars(loader)["_iterator"] = None
    try:
        yield
    finally:
        for generator, saved in generators:
            generator.set_state(saved)
        if isinstance(loader, DataLoader):
            # Workers that persist would draw no new seed for the first epoch.
            vars(loader).update(state)


def random_states(model: nn.Module) -> Callable[[], None]:
    """The states of all global random generators, and the way back."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    states: list[tuple[Callable[..., object], Tensor, tuple[int, ...]]]
    states = [(torch.set_rng_state, torch.get_rng_state(), ())]
    for device in {tensor.device for tensor in model.parameters()}:
        if device.index is not None:
            backend = torch.get_device_module(device)
            # There is one MPS device, and its functions take no index.
            which = () if device.type == "mps" else (device.index,)
            states.append((backend.set_rng_state, backend.get_rng_state(*which), which))

    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Generator):
                states.append((value.set_state, value.get_state(), ()))

    def restore() -> None:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for set_state, state, which in states:
            set_state(state, *which)

    return restore
