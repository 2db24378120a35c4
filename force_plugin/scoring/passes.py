"""How a network is passed through: one value that checks itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import Self

from force_plugin.data.containers import CHANNELS_LAST
from force_plugin.selection.schedules import check_arguments, check_count

Loader = Iterable[Any]
LossFn = Callable[[Any, Any], Tensor]
Forward = Callable[[Any, Any], Tensor]


class PassOptions(TypedDict, total=False):
    """Keywords of every function that passes batches through a network.

    They are those of :func:`force_plugin.force_prune`, which says what each does.
    """

    batches: int | None
    loss_fn: LossFn
    forward: Forward | None
    open_gates: bool
    microbatch: int | None
    autocast: torch.dtype | None
    channels_last: bool
    compile: bool | str


@dataclass(frozen=True)
class Passes:
    """How batches are passed through a network.

    Attributes:
        batches: Batches a step, ``None`` for a whole pass of the loader a step.
        loss_fn: ``loss_fn(model(inputs), targets)``.
        forward: ``forward(model, batch)``, a loss; replaces ``loss_fn``.
        open_gates: Measure with closed gates opened.
        microbatch: The most samples that are passed through the network at once.
        autocast: ``torch.bfloat16`` runs the passes under :func:`torch.autocast`.
        channels_last: Hand inputs of 4 or 5 dimensions over with channels last.
        compile: Run the passes by :func:`torch.compile`, from the second on; a string
            is its mode.

    Raises:
        TypeError, ValueError: One of them is not as expected.
    """

    batches: int | None = 1
    loss_fn: LossFn = nn.functional.cross_entropy
    forward: Forward | None = None
    open_gates: bool = True
    microbatch: int | None = None
    autocast: torch.dtype | None = None
    channels_last: bool = False
    compile: bool | str = False

    def __post_init__(self) -> None:
        for name in ("batches", "microbatch"):
            count = getattr(self, name)
            if count is not None:
                check_count(name, count)
        _check_loss("loss_fn", self.loss_fn, "(outputs, targets)")
        if self.forward is not None:
            _check_loss("forward", self.forward, "(model, batch)")
        if self.autocast not in (None, torch.bfloat16):
            raise ValueError(
                f"autocast: expected torch.bfloat16 or None, got {self.autocast!r}"
                + (
                    "; in it small gradients underflow to 0 without a GradScaler"
                    if self.autocast is torch.float16
                    else ""
                )
            )

    @classmethod
    def of(cls, options: Mapping[str, Any], function: str) -> Self:
        """Those that a function was given as keywords.

        Args:
            options: :class:`PassOptions`.
            function: Its name, for a message.

        Raises:
            TypeError: It has no such keyword.
        """
        known = {field.name for field in fields(cls)}
        for name in options:
            if name not in known:
                raise TypeError(
                    f"{function}() got an unexpected keyword argument {name!r}"
                )
        return cls(**options)

    def opening(self, gates: bool) -> Self:
        """The same, with gates opened only if that is wanted besides."""
        return replace(self, open_gates=self.open_gates and gates)

    def autocasting(self, device: torch.device) -> AbstractContextManager[object]:
        """The context that a pass runs in."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, self.autocast)

    @property
    def formats(self) -> Mapping[int, torch.memory_format]:
        """Memory formats of inputs, by their number of dimensions."""
        return CHANNELS_LAST if self.channels_last else {}

    def refuse_compile(self, what: str) -> None:
        """Raise ValueError if the passes are to be compiled, which does not serve."""
        if self.compile:
            raise ValueError(
                "compile: expected a method that needs nothing but gradients, such as "
                f"force, got one that needs {what}; leave compile out"
            )


def _check_loss(name: str, function: object, arguments: str) -> None:
    """Make sure that a function can be asked for a loss."""
    if isinstance(function, type) and issubclass(function, nn.Module):
        kind = function.__name__
        raise TypeError(
            f"{name}: expected a callable {arguments} -> loss, got the class {kind}; "
            f"pass an instance, {kind}()"
        )
    if not callable(function):
        raise TypeError(f"{name}: expected a callable, got {type(function).__name__}")
    check_arguments(name, function, f"a callable {arguments} -> loss", 2)
