"""What the attributes of modules were, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn


def snapshot(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Remember the attributes of modules.

    They hold a module's parameters, buffers, hooks and mode, and whatever its forward
    keeps. References are remembered, not values: what is to be restored must have been
    replaced meanwhile, not overwritten.

    Args:
        modules: The modules themselves; their children are not followed.

    Returns:
        A function that gives the modules their attributes back.
    """
    saved = []
    for module in modules:
        state = vars(module)
        inner = {key: dict(v) for key, v in state.items() if isinstance(v, dict)}
        saved.append((state, dict(state), inner))

    def restore() -> None:
        for state, outer, inner in saved:
            state.clear()
            state.update(outer)
            for key, content in inner.items():
                state[key].clear()
                state[key].update(content)

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
