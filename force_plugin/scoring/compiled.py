"""Passes that :func:`torch.compile` runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from force_plugin.parallel.shards import Shards


class Compiled:
    """Compiles the passes of a network, except the first pass, which looks for gates.

    Args:
        model: The network.
        mode: A mode of :func:`torch.compile`; True: its default mode; False: do not
            compile.
        device: The device of the network.
        shards: The division of parameters among the processes. A sharded network
            cannot be compiled.

    Raises:
        ValueError: The network is to be compiled, and it is sharded.
    """

    def __init__(  # noqa: D107 (the class has it)
        self, model: nn.Module, mode: bool | str, device: torch.device, shards: Shards
    ) -> None:
        if mode and shards.sharded:
            raise ValueError(
                "compile: expected a model that is not sharded, as parameters that "
                "are put together when they are read cannot be compiled; leave compile "
                "out, or prune the model before it is sharded"
            )
        self._model = model
        self._mode = mode
        self._device = device

    def begin(self, undo: ExitStack) -> None:
        """Compile the model when it is called, until ``undo`` is closed."""
        if self._mode:
            self._model.compile(mode=None if self._mode is True else self._mode)
            # Compiled code and its CUDA graphs would live as long as the model.
            undo.callback(torch.compiler.reset)

    @contextmanager
    def passing(
        self, first: bool, leaves: Mapping[str, nn.Parameter]
    ) -> Iterator[None]:
        """Compile a pass, unless it is the first pass.

        Args:
            first: Whether it is the first pass.
            leaves: The parameters that get gradients in this pass.
        """
        if not self._mode or first:
            yield
            return
        if self._device.type == "cuda":
            # A CUDA graph reuses its memory in each pass. So its gradients are added to
            # tensors outside of that memory.
            torch.compiler.cudagraph_mark_step_begin()
            for leaf in leaves.values():
                if leaf.grad is None:
                    leaf.grad = torch.zeros_like(leaf)
        with torch.compiler.set_stance("default"):
            yield
