"""The methods by their names, and whether a class can be used as one."""

from __future__ import annotations

import difflib
import inspect

from torch import Tensor
from torch.nn.utils import prune

from force_plugin.methods.base import SaliencyMethod
from force_plugin.methods.criteria import (
    FORCE,
    SNIP,
    GraSP,
    GraSPIt,
    IterSNIP,
    Magnitude,
    Random,
    SNIPIt,
    SynFlow,
)
from force_plugin.methods.measurements import Measurements
from force_plugin.methods.scores import is_ours
from force_plugin.selection.schedules import (
    arguments_of,
    check_arguments,
    check_count,
    find_schedule,
)

METHODS: dict[str, type[SaliencyMethod]] = {
    "force": FORCE,
    "iter_snip": IterSNIP,
    "snip": SNIP,
    "grasp": GraSP,
    "grasp_it": GraSPIt,
    "synflow": SynFlow,
    "snip_it": SNIPIt,
    "magnitude": Magnitude,
    "random": Random,
}


_OF_PYTORCH: dict[type, str] = {
    prune.L1Unstructured: 'method="magnitude" does the same',
    prune.RandomUnstructured: 'method="random" does the same',
}


def find_method(method: str | type[SaliencyMethod]) -> type[SaliencyMethod]:
    """The class of a method that is given by name or as a class.

    Raises:
        TypeError: It is neither, or a function of the class takes other arguments than
            it will be given.
        ValueError: No method has this name, or its steps or schedule are none.
    """
    if isinstance(method, type) and issubclass(method, SaliencyMethod):
        _check(method)
        return method
    if not isinstance(method, str):
        raise TypeError(
            "method: expected a name or a subclass of SaliencyMethod, got "
            + _what_came(method)
        )
    if method not in METHODS:
        close = difflib.get_close_matches(method.lower(), METHODS, n=1)
        raise ValueError(
            f"method: expected one of {', '.join(METHODS)}, or a class, got {method!r}"
            + (f"; did you mean {close[0]!r}?" if close else "")
        )
    return METHODS[method]


def scores_of(method: type[SaliencyMethod], probe: Measurements) -> dict[str, Tensor]:
    """:meth:`SaliencyMethod.scores`, or what a class has in its place."""
    if is_ours(method.scores):
        return method.scores(probe)
    with probe.protected(f"{method.__name__}.scores"):
        return method.scores(probe)


def _what_came(method: object) -> str:
    """What is no method, and what to pass instead."""
    kind = method if isinstance(method, type) else type(method)
    name = kind.__name__
    if issubclass(kind, SaliencyMethod):
        return f"an instance of {name}; pass the class itself, method={name}"
    if issubclass(kind, prune.BasePruningMethod):
        instead = "derive it from SaliencyMethod and give it a score"
        if kind.__module__.startswith("torch."):
            instead = "it is for the calls of torch.nn.utils.prune"
        return f"{name}; {_OF_PYTORCH.get(kind, instead)}"
    if inspect.isroutine(method):
        return (
            f"a function; derive a class from SaliencyMethod, and make it its score, "
            f"score = staticmethod({getattr(method, '__name__', 'function')})"
        )
    return f"{name}; leave it out for FORCE" if method is None else name


def _check(method: type[SaliencyMethod]) -> None:
    """Make sure that a class has what a method needs, before anything is measured."""
    _check_function(method, "score", "@staticmethod score(weight, signal)", 2)
    _check_function(method, "measure", "@classmethod measure(cls, probe)", 1)
    if method.steps is not None:
        check_count(f"{method.__name__}.steps", method.steps)
    if method.schedule is not None:
        find_schedule(method.schedule, f"{method.__name__}.schedule")


def _check_function(
    method: type[SaliencyMethod], name: str, expected: str, count: int
) -> None:
    """Make sure that a function can be called on the class, with so many arguments."""
    written, function = inspect.getattr_static(method, name), getattr(method, name)
    label = f"{method.__name__}.{name}"
    if not callable(function):
        raise TypeError(f"{label}: expected {expected}, got {type(written).__name__}")
    if inspect.isfunction(written):
        # Without a decorator nothing is given in the place of self.
        signature = inspect.signature(written)
        if next(iter(signature.parameters), "") in ("self", "cls"):
            raise TypeError(
                f"{label}: expected {expected}, got {name}{arguments_of(signature)} "
                f"without {expected.split()[0]}"
            )
    check_arguments(label, function, expected, count)
