"""What a module itself has registered, without its children."""

from __future__ import annotations

from torch import Tensor, nn


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module by name, a shared one under each of its names.

    A subclass may have a ``named_parameters`` that takes less; it is not called.
    """
    named = nn.Module.named_parameters
    return dict(named(module, recurse=False, remove_duplicate=False))


def own_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of a module by name, a shared one under each of its names."""
    named = nn.Module.named_buffers
    return dict(named(module, recurse=False, remove_duplicate=False))
