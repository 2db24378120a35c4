"""Random convolutions, and memory in which a step aside is noticed."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from force_plugin.sparse.code import Host, host
from force_plugin.sparse.convolution import Window
from force_plugin.sparse.geometry import Geometry


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a convolution: window, sizes, groups, density, type."""

    def pair(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
        return st.tuples(st.integers(low, high), st.integers(low, high))

    window = Window(
        kernel=draw(pair(1, 5)),
        stride=draw(pair(1, 3)),
        padding=draw(pair(0, 4)),
        after=draw(pair(0, 4)),
        dilation=draw(pair(1, 3)),
    )
    least = [
        max(1, d * (k - 1) + 1 - before - after)
        for d, k, before, after in zip(
            window.dilation, window.kernel, window.padding, window.after, strict=True
        )
    ]
    return {
        "window": window,
        "size": tuple(n + draw(st.integers(0, 9)) for n in least),
        "batch": draw(st.integers(1, 3)),
        "groups": draw(st.sampled_from([1, 1, 2, 3])),
        "each": draw(pair(1, 4)),
        "density": draw(st.sampled_from([0.0, 0.02, 0.3, 1.0])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "bias": draw(st.booleans()),
        "adds": draw(st.booleans()),
        "activation": draw(st.sampled_from(["none", "relu", "hardswish"])),
        "seed": draw(st.integers(0, 99)),
    }


def poisoned(
    geometry: Geometry, channels: int, dtype: torch.dtype, poison: float
) -> tuple[Tensor, Tensor]:
    """Return planes of zeros inside a larger tensor of one number."""
    around = torch.full((channels + 2, geometry.step), poison, dtype=dtype)
    around[1:-1] = 0
    return around, around[1:-1]


# LLVM's levels of x86-64: SSE2, AVX2, AVX-512.
PROCESSORS = {"x86-64": 16, "x86-64-v3": 32, "x86-64-v4": 64, "this": 0}


def processor(name: str) -> Host:
    """Return a processor, or skip the test if this machine cannot run its code."""
    here = host()
    if name == "this":
        return here
    if (
        platform.machine() not in ("x86_64", "AMD64")
        or PROCESSORS[name] > here.register
    ):
        pytest.skip(f"this machine does not run code for {name}")
    return Host(name, "", PROCESSORS[name])
