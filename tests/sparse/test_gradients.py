"""Gradients by non-zeros alone, beside those of PyTorch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from sparse_cases import PROCESSORS, cases, poisoned, processor
from torch import Tensor
from torch.nn.functional import batch_norm, pad

from force_plugin.sparse import code, team
from force_plugin.sparse.convolution import Correlation, Product, Transposed, needs
from force_plugin.sparse.geometry import Geometry, Need
from force_plugin.sparse.rows import Norm

NAN = float("nan")


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("threads", [1, 3])
@given(case=cases())
@settings(max_examples=50, deadline=None)
def test_gradients_of_convolutions_equal_those_of_pytorch(
    case: dict[str, Any], threads: int, name: str
) -> None:
    machine = processor(name)
    window, dtype, batch = case["window"], case["dtype"], case["batch"]
    groups, (ins, outs) = case["groups"], case["each"]
    random = torch.Generator().manual_seed(case["seed"])

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    weight = randn(groups * outs, ins, *window.kernel)
    kept = torch.rand(weight.shape, generator=random) < case["density"]
    x = randn(batch, groups * ins, *case["size"])
    d = randn(batch, groups * outs, *window.outputs(case["size"]))
    of_x, of_weight = by_pytorch(x, weight * kept, d, case)

    geometry = Geometry.room(
        batch, window.outputs(case["size"]), [needs(window, case["size"])]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code, "host", lambda: machine)
        patch.setattr(team, "members", lambda products: threads)
        product = Product(weight, None, window, geometry, groups=groups, kept=kept)
        correlation = Correlation(product)
        back = Transposed(product, masks=False)
        rows = len(product.phases) * product.inputs
        _, packed = poisoned(geometry, rows, dtype, NAN)  # what lies beside would tell
        _, planes = poisoned(geometry, product.outputs, dtype, NAN)
        around, gradients = poisoned(geometry, rows, dtype, NAN)
        product.pack(x, packed)
        geometry.images(planes).copy_(d)
        of_values = correlation(packed, planes)
        back(planes, gradients)
    found = torch.zeros_like(x)
    product.unpack(gradients, found)

    close = 1e-11 if dtype == torch.float64 else 2e-5
    for one, other in ((of_values, of_weight[kept]), (found, of_x)):
        size = float(other.abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(
            one.double(), other, rtol=close, atol=close * (1 + size)
        )
    assert around[0].isnan().all()
    assert around[-1].isnan().all()


def by_pytorch(
    x: Tensor, weight: Tensor, d: Tensor, case: dict[str, Any]
) -> tuple[Tensor, ...]:
    window = case["window"]
    (top, left), (bottom, right) = window.padding, window.after
    leaves = [one.double().requires_grad_() for one in (x, weight)]
    y = torch.conv2d(
        pad(leaves[0], (left, right, top, bottom)),
        leaves[1],
        None,
        window.stride,
        0,
        window.dilation,
        case["groups"],
    )
    return torch.autograd.grad(y, leaves, d.double())


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalisations_and_their_gradients_equal_those_of_pytorch(
    dtype: torch.dtype, relu: bool, adds: bool, name: str
) -> None:
    machine = processor(name)
    random = torch.Generator().manual_seed(0)
    batch, channels, size = 3, 5, (6, 7)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    x = 10 + 3 * randn(batch, channels, *size)
    z, d = randn(*x.shape), randn(*x.shape)
    w, b = randn(channels), randn(channels)
    leaves = [one.double().requires_grad_() for one in (x, w, b, z)]
    y = batch_norm(leaves[0], None, None, leaves[1], leaves[2], True)
    y = y + leaves[3] if adds else y
    y = y.relu() if relu else y
    wanted = leaves if adds else leaves[:3]
    expected = [y, *torch.autograd.grad(y, wanted, d.double())]

    geometry = Geometry.room(batch, size, [Need(7, 9, 1, 1)])

    def planes(value: Tensor | None = None) -> Tensor:
        _, made = poisoned(geometry, channels, dtype, NAN)
        if value is not None:
            geometry.images(made).copy_(value)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code, "host", lambda: machine)
        norm = Norm(geometry, dtype, 1e-5, adds, relu)
        of_x, of_z, result, given = planes(x), planes(z), planes(), planes(d)
        mean, variance = norm.forward(of_x, w, b, of_z if adds else None, result)
        dx = planes() if adds else given  # in place, as a plan does
        dw, db = norm.backward(
            given, of_x, result, w, mean, variance, dx, given if adds else None
        )
    found = [geometry.images(result), geometry.images(dx), dw, db]
    found += [geometry.images(given)] if adds else []
    close = 1e-10 if dtype == torch.float64 else 1e-4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=close, atol=close)
    torch.testing.assert_close(
        mean.double(), x.double().mean((0, 2, 3)), rtol=close, atol=close
    )
    for whole in (result, dx):
        geometry.images(whole).zero_()
        assert not whole.any(), "it wrote beside the images"
