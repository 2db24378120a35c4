"""Where gradients end, and the sentences that say so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

INPUT = "what it multiplies is 0"


def ends_at(operation: str) -> str:
    return f"the gradient ends at {operation}"


class DeadEnd(torch.autograd.Function):
    """The identity, with a gradient of 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.name = "a name that hides the method of autograd's nodes"
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)


def sentence(layers: str, cause: str) -> str:
    return (
        f"{layers} had a saliency of exactly 0 everywhere at the first step: {cause}; "
        "what is kept of them is not a choice of the method"
    )
