"""Classes between a module and its own class, as FSDP2 and parametrisations make them.

Parameters, names and methods of the module stay, and only some of them are others.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_classes: dict[tuple[type, type], type] = {}


class Subclassed(nn.Module):
    """What such a class has before the module's own class."""

    @classmethod
    def own_class(cls) -> type[nn.Module]:
        """Return the class that a module had before."""
        return _layers(cls)[0].__bases__[1]

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = super().__reduce_ex__(protocol)
        layers = _layers(type(self))
        added = [layer.__bases__[0] for layer in reversed(layers)]
        return _empty, (layers[-1].__bases__[1], *added), *made[2:]


def _layers(kind: type) -> list[type]:
    """Return the classes that :func:`subclass` made, the last of them first."""
    return [one for one in kind.__mro__ if one in _classes.values()]


def subclass(added: type[Subclassed], own: type[nn.Module]) -> type[nn.Module]:
    """Return a class with what is added before the module's own class.

    Args:
        added: What is added.
        own: The module's own class.
    """
    if (added, own) not in _classes:
        names = {"__module__": added.__module__, "__doc__": own.__doc__}
        # Files and tables name the class, and it is the module's.
        _classes[added, own] = type(own.__name__, (added, own), names)
    return _classes[added, own]


def _empty(own: type[nn.Module], *added: type[Subclassed]) -> nn.Module:
    for one in added:
        own = subclass(one, own)
    return own.__new__(own)
