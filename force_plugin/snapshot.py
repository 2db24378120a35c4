"""What the attributes of modules were, and the way back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def restored(
    modules: Iterable[nn.Module], *, only_on_error: bool = False
) -> Iterator[None]:
    """Give modules their attributes back at the end, or only after an error.

    The attributes of a module hold its parameters, buffers, hooks and mode, and
    whatever its forward keeps. References are kept, not values: what is to be restored
    must have been replaced meanwhile, not overwritten.

    Args:
        modules: The modules themselves; their children are not followed.
        only_on_error: Keep the changes unless an exception passes through.
    """
    saved = []
    for module in modules:
        state = vars(module)
        inner = {key: dict(v) for key, v in state.items() if isinstance(v, dict)}
        saved.append((state, dict(state), inner))
    failed = True
    try:
        yield
        failed = False
    finally:
        if failed or not only_on_error:
            for state, outer, inner in saved:
                state.clear()
                state.update(outer)
                for key, content in inner.items():
                    state[key].clear()
                    state[key].update(content)
