"""The methods by their names, and checks of a user's class."""

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
from force_plugin.methods.steady_force import SteadyFORCE
from force_plugin.selection.schedules import (
    arguments_of,
    check_arguments,
    check_count,
    find_schedule,
)

METHODS: dict[str, type[SaliencyMethod]] = {
    "force": FORCE,
    "iter_snip": IterSNIP,
    "steady_force": SteadyFORCE,
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
    """Return the class of a method that is given by name or as a class.

    Raises:
        TypeError: ``method`` is neither a name nor a class, or ``score`` or
            ``measure`` of the class cannot be called with the arguments that they get.
        ValueError: No method has this name, or ``steps`` or ``schedule`` of the class
            is not valid.
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
    """Return the result of :meth:`SaliencyMethod.scores`, or of a class's own version.

    A version from outside this package may write to the model. Its writes are undone,
    and are an error.
    """
    if is_ours(method.scores):
        return method.scores(probe)
    with probe.protected(f"{method.__name__}.scores"):
        return method.scores(probe)


def _what_came(method: object) -> str:
    """Describe an argument that is no method, and say what to pass instead."""
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
    """Raise an error if a class cannot be used as a method, before any measurement."""
    _check_function(method, "score", "@staticmethod score(weight, signal)", 2)
    _check_function(method, "measure", "@classmethod measure(cls, probe)", 1)
    if method.steps is not None:
        check_count(f"{method.__name__}.steps", method.steps)
    if method.refining != 0:
        check_count(f"{method.__name__}.refining", method.refining)
    if method.schedule is not None:
        find_schedule(method.schedule, f"{method.__name__}.schedule")


def _check_function(
    method: type[SaliencyMethod], name: str, expected: str, count: int
) -> None:
    """Raise TypeError if a class has no function that takes ``count`` arguments."""
    written, function = inspect.getattr_static(method, name), getattr(method, name)
    label = f"{method.__name__}.{name}"
    if not callable(function):
        raise TypeError(f"{label}: expected {expected}, got {type(written).__name__}")
    if inspect.isfunction(written):
        # The function is called on the class, so without a decorator it gets no self.
        signature = inspect.signature(written)
        if next(iter(signature.parameters), "") in ("self", "cls"):
            raise TypeError(
                f"{label}: expected {expected}, got {name}{arguments_of(signature)} "
                f"without {expected.split()[0]}"
            )
    check_arguments(label, function, expected, count)
