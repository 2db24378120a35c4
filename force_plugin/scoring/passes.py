"""Options of the passes through a network, checked and kept in one value."""

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
    """Keywords of every public function that passes batches through a network.

    :func:`force_plugin.force_prune` describes each of them.
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
    """Options of the passes of batches through a network.

    Attributes:
        batches: Number of batches in a step; ``None``: the whole loader at each step.
        loss_fn: ``loss_fn(model(inputs), targets)``, a loss.
        forward: ``forward(model, batch)``, a loss; replaces ``loss_fn``.
        open_gates: Whether closed gates are opened for the measurement.
        microbatch: The largest number of samples to pass through the network at once;
            ``None``: the whole batch.
        autocast: ``torch.bfloat16`` runs the passes under :func:`torch.autocast`.
        channels_last: Whether inputs of 4 or 5 dimensions get a channels-last format.
        compile: Whether :func:`torch.compile` runs the passes, from the second on; a
            string is the mode.

    Raises:
        TypeError, ValueError: An option is not as expected.
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
        """Return the options that a public function got as keywords.

        Args:
            options: :class:`PassOptions`.
            function: Name of the function, for a message.

        Raises:
            TypeError: A keyword is none of the options.
        """
        known = {field.name for field in fields(cls)}
        for name in options:
            if name not in known:
                raise TypeError(
                    f"{function}() got an unexpected keyword argument {name!r}"
                )
        return cls(**options)

    def opening(self, gates: bool) -> Self:
        """Return a copy that opens gates only if ``gates`` is true too."""
        return replace(self, open_gates=self.open_gates and gates)

    def autocasting(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the autocast context for a pass on a device."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, self.autocast)

    @property
    def formats(self) -> Mapping[int, torch.memory_format]:
        """Memory formats of inputs, by their number of dimensions."""
        return CHANNELS_LAST if self.channels_last else {}

    def refuse_compile(self, what: str) -> None:
        """Raise ValueError if the passes are to be compiled.

        Args:
            what: What the method needs and compiled passes lack, for the message.
        """
        if self.compile:
            raise ValueError(
                "compile: expected a method that needs nothing but gradients, such as "
                f"force, got one that needs {what}; leave compile out"
            )


def _check_loss(name: str, function: object, arguments: str) -> None:
    """Raise TypeError if a function cannot be called for a loss."""
    if isinstance(function, type) and issubclass(function, nn.Module):
        kind = function.__name__
        raise TypeError(
            f"{name}: expected a callable {arguments} -> loss, got the class {kind}; "
            f"pass an instance, {kind}()"
        )
    if not callable(function):
        raise TypeError(f"{name}: expected a callable, got {type(function).__name__}")
    check_arguments(name, function, f"a callable {arguments} -> loss", 2)
