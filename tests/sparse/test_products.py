"""Convolutions and linear layers by their non-zeros, beside PyTorch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from sparse_cases import PROCESSORS, cases, poisoned, processor
from torch import Tensor, fx

from force_plugin.sparse import code, team
from force_plugin.sparse.activations import ACTIVATIONS, APPROXIMATE
from force_plugin.sparse.code import normalise
from force_plugin.sparse.convolution import Product, Window, needs
from force_plugin.sparse.geometry import Geometry, Need
from force_plugin.sparse.steps import LayerNorm, Place

FUNCTIONS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "relu6": torch.nn.functional.relu6,
    "hardswish": torch.nn.functional.hardswish,
    "hardsigmoid": torch.nn.functional.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}
POISON = 1e30


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("threads", [1, 3])
@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_convolutions_equal_those_of_pytorch(
    case: dict[str, Any], threads: int, name: str
) -> None:
    machine = processor(name)
    window, dtype, batch = case["window"], case["dtype"], case["batch"]
    groups, (ins, outs) = case["groups"], case["each"]
    random = torch.Generator().manual_seed(case["seed"])

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    weight = randn(groups * outs, ins, *window.kernel)
    weight *= torch.rand(weight.shape, generator=random) < case["density"]
    bias = randn(groups * outs) if case["bias"] else None
    x = randn(batch, groups * ins, *case["size"])
    (top, left), (bottom, right) = window.padding, window.after
    expected = torch.conv2d(
        torch.nn.functional.pad(x, (left, right, top, bottom)).double(),
        weight.double(),
        None if bias is None else bias.double(),
        window.stride,
        0,
        window.dilation,
        groups,
    )
    assert window.outputs(case["size"]) == expected.shape[2:]
    geometry = Geometry.room(
        batch, window.outputs(case["size"]), [needs(window, case["size"])]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code, "host", lambda: machine)
        product = Product(
            weight,
            bias,
            window,
            geometry,
            groups=groups,
            activation=case["activation"],
            adds=case["adds"],
        )
    outside, packed = poisoned(
        geometry, len(product.phases) * product.inputs, dtype, POISON
    )
    product.pack(x, packed)
    around, planes = poisoned(geometry, product.outputs, dtype, POISON)
    geometry.images(planes).fill_(POISON)  # what was there before does not count
    added = None
    if case["adds"]:
        added = geometry.zeros(product.outputs, dtype)
        geometry.images(added).copy_(randn(*expected.shape))
        expected = expected + geometry.images(added)
    expected = FUNCTIONS[case["activation"]](expected)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(team, "members", lambda products: threads)
        product(packed, planes, added)

    found = geometry.images(planes)
    close = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(
        found.double(),
        expected,
        rtol=close,
        atol=close * (1 + float(expected.abs().max())),
    )
    found.zero_()
    assert not planes.any(), "it wrote beside the images"
    for whole in (around, outside):
        assert (whole[0] == POISON).all()
        assert (whole[-1] == POISON).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_off_by_roundings_alone(name: str) -> None:
    geometry = Geometry.room(1, (1, 6000))
    for dtype in (torch.float32, torch.float64):
        if dtype == torch.float64 and name in APPROXIMATE:
            continue
        one = torch.ones(1, 1, 1, 1, dtype=dtype)
        product = Product(one, None, Window((1, 1)), geometry, activation=name)
        x = torch.linspace(-120, 120, 6000, dtype=dtype)
        x[:1000] = torch.linspace(-2, 2, 1000, dtype=dtype)
        planes, out = product.packed(dtype), geometry.zeros(1, dtype)
        product.pack(x.view(1, 1, 1, -1), planes)
        product(planes, out)
        expected = FUNCTIONS[name](x.double())
        off = (geometry.images(out).flatten() - expected).abs()
        rounding = torch.finfo(dtype).eps
        # PyTorch's own GELU in float32 is off by as much: it adds 1 to erf too.
        assert float((off / (1 + x.abs())).max()) < 4 * rounding


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_infinities_and_nan_are_those_of_pytorch(name: str) -> None:
    geometry = Geometry.room(1, (1, 3))
    one = torch.ones(1, 1, 1, 1)
    product = Product(one, None, Window((1, 1)), geometry, activation=name)
    x = torch.tensor([torch.inf, -torch.inf, torch.nan])
    planes, out = product.packed(x.dtype), geometry.zeros(1, x.dtype)
    product.pack(x.view(1, 1, 1, -1), planes)
    product(planes, out)
    found = geometry.images(out).flatten()
    # In float32, PyTorch 2.14 has NaN for the GELU of infinity.
    expected = FUNCTIONS[name](x.double()).float()
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 1, 3), (3, 4, 5, 37)])
def test_layer_norms_equal_those_of_pytorch(
    shape: tuple[int, ...], affine: bool, dtype: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(0)
    x = 100 + torch.randn(shape, generator=random, dtype=dtype)
    weight = torch.randn(shape[-1], generator=random, dtype=dtype) if affine else None
    bias = torch.randn(shape[-1], generator=random, dtype=dtype) if affine else None
    lead = [1, *shape[:-1]][-3:]
    geometry = Geometry.room(
        lead[0], (lead[1], lead[2]), [Need(lead[1], lead[2] + 1, 0, 0)]
    )
    places = [
        Place(geometry, geometry.zeros(shape[-1], dtype), shape, -1) for _ in range(2)
    ]
    places[0].view.copy_(x)
    step = LayerNorm(
        fx.Graph().placeholder("x"), places[0], weight, bias, 1e-6, places[1]
    )
    step({})
    expected = torch.nn.functional.layer_norm(
        x.double(),
        shape[-1:],
        None if weight is None else weight.double(),
        None if bias is None else bias.double(),
        1e-6,
    )
    close = 1e-11 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(
        places[1].view.double(), expected, rtol=close, atol=close
    )


def test_a_kernel_is_compiled_once() -> None:
    assert normalise(torch.float32) is normalise(torch.float32)
