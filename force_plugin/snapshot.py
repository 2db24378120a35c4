"""What the attributes of modules were, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def snapshot(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Remember the attributes of modules.

    They hold a module's parameters, buffers, hooks and mode, and whatever its forward
    keeps. Of parameters and buffers references are remembered, not values: what is to
    be restored must have been replaced meanwhile, not overwritten. Of other attributes
    it is the values of tensors and the items of lists, sets and dictionaries; what
    other objects hold is not followed.

    Args:
        modules: The modules themselves; their children are not followed.

    Returns:
        A function that gives the modules their attributes back.
    """
    saved = []
    for module in modules:
        state = vars(module)
        items = {
            key: kind(value)
            for key, value in state.items()
            for kind in (dict, list, set)
            if isinstance(value, kind)
        }
        values = {
            key: (value, value.detach().clone(), value._version)
            for key, value in state.items()
            # A pruned tensor is made anew in every forward.
            if isinstance(value, Tensor)
            and f"{key}_orig" not in module._parameters
            and not value.is_inference()
        }
        saved.append((state, dict(state), items, values.values()))

    def restore() -> None:
        for state, attributes, items, values in saved:
            state.clear()
            state.update(attributes)
            for key, content in items.items():
                kept = state[key]
                kept.clear()
                (kept.extend if isinstance(kept, list) else kept.update)(content)
            for tensor, value, version in values:
                if tensor._version != version:
                    with torch.no_grad():
                        tensor.copy_(value)

    return restore


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
