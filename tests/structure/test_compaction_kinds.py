"""Smaller models of all kinds: the same outputs, or it is said why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from smaller_models import (
    Wrapped,
    as_trained,
    assert_same,
    fixed_shape,
    images,
    outputs,
    random_masks,
    recurrent,
    row_masks,
    sequences,
    shrink,
    shrink_or_complain,
    size,
    vectors,
    widths,
    without,
)
from state import unchanged
from torch import Tensor, nn

from force_plugin import apply_masks


class Called(nn.Module):
    """A module that is called twice between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(6, 8, bias=False), nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return self.last(torch.relu(self.twice(torch.relu(self.twice(y)))))


class Two(nn.Module):
    """Two inputs; a dictionary with a tuple and a dictionary in it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8, bias=False), nn.Linear(4, 8, bias=False)
        self.c, self.d = nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor, other: Tensor) -> dict[str, Any]:
        y = torch.relu(self.a(x)) + torch.relu(self.b(other))
        return {"two": (self.c(y), {"d": self.d(y)}), "name": "two", "none": None}


def tied() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False)
    )
    model[2].weight = model[0].weight
    return model.append(nn.Linear(6, 3))


def tokens() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 12), nn.ReLU()).append(
        nn.Linear(12, 4)
    )


def tied_tokens() -> nn.Module:
    model = nn.Sequential(
        nn.Embedding(9, 8), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)
    ).append(nn.Linear(8, 9, bias=False))
    model[4].weight = model[0].weight
    return model


def shuffled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(4, 3, 3)
    )


def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.Conv2d(16, 8, 3)
    ).extend([nn.InstanceNorm2d(8), nn.PReLU(8), nn.Upsample(9), nn.Conv2d(8, 3, 3)])


def over_channels() -> nn.Module:
    return Wrapped(
        lambda m, x: m[1](m[0](x).softmax(1) + m[0](x).mean(1, keepdim=True)),
        nn.Linear(6, 8, bias=False),
        nn.Linear(8, 3),
    )


def multihead() -> nn.Module:
    return Wrapped(
        lambda m, x: m[2](m[1](y := m[0](x), y, y)[0]),
        nn.Linear(6, 8, bias=False),
        nn.MultiheadAttention(8, 2, batch_first=True),
        nn.Linear(8, 3),
    )


def features() -> nn.Module:
    return timm.create_model("test_resnet", features_only=True)


def parametrised(norm: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.ReLU(), norm(nn.Linear(8, 8)), nn.Linear(8, 3)
    )


def numbers() -> Tensor:
    return torch.arange(9).view(3, 3)


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "called_twice": (Called, vectors()),
    "tied": (tied, vectors()),
    "two_by_name": (Two, {"x": vectors(), "other": vectors(4)}),
    "two_in_order": (Two, (vectors(), vectors(4))),
    "tokens": (tokens, numbers()),
    "tied_tokens": (tied_tokens, numbers()),
    "shuffled": (shuffled, images(8)),
    "normalised": (normalised, images(8)),
    "over_channels": (over_channels, vectors()),
    "fixed_shape": (fixed_shape, vectors()),
    "gru": (recurrent(nn.GRU), sequences()),
    "lstm": (recurrent(nn.LSTM), sequences()),
    "multihead": (multihead, sequences()),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(6, 2, 16, 0, batch_first=True),
        sequences(),
    ),
    "features": (features, images()),
    "layer": (lambda: nn.Linear(6, 3), vectors()),
    "weight_norm": (
        parametrised(torch.nn.utils.parametrizations.weight_norm),
        vectors(),
    ),
    "spectral_norm": (
        parametrised(torch.nn.utils.parametrizations.spectral_norm),
        vectors(),
    ),
}

SHRINK = {"called_twice", "two_by_name", "two_in_order", "tokens", "tied_tokens"}


SHRINK |= {"encoder", "features"}


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("masks", ["random", "rows"])
@pytest.mark.parametrize("case", MODELS)
def test_outputs_stay_or_it_is_said_why_not(
    case: str, masks: str, trained: bool
) -> None:
    build, inputs = MODELS[case]
    torch.manual_seed(0)
    model = build().double().eval()
    if trained:
        as_trained(model)
    known = {name for name, _ in model.named_parameters()}
    made = random_masks(model, 0.15) if masks == "random" else row_masks(model)
    apply_masks(model, {name: mask for name, mask in made.items() if name in known})
    small = shrink_or_complain(model, inputs)
    if case in SHRINK and masks == "rows" and not trained:
        assert small is not None and size(small) < size(model)


def test_a_mask_on_one_owner_of_a_weight_is_not_put_on_the_other() -> None:
    model = tied().double()
    without(model[0], rows=[0, 1])
    model[2].weight = model[0].weight_orig
    shrink_or_complain(model, vectors())


def test_weights_that_stay_tied_are_one_parameter() -> None:
    model = tied_tokens().double()
    without(model[1], rows=[0, 1])
    model[1].bias.data[:2] = 0
    small = shrink(model, numbers())
    assert small[1].out_features == 10
    assert small[4].weight is small[0].weight is not model[0].weight


def test_a_layer_that_is_called_in_training_only_still_fits() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8, bias=False), nn.Linear(8, 3)
            self.auxiliary = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.a(x))
            return self.b(y) + self.auxiliary(y) if self.training else self.b(y)

    model = Auxiliary().double()
    without(model.a, rows=[0, 1])
    small = shrink_or_complain(model, vectors())
    if small is not None:
        torch.testing.assert_close(
            small.train()(vectors()), model.train()(vectors()), rtol=1e-10, atol=1e-10
        )


def test_outputs_that_are_infinite_are_compared_too() -> None:
    hidden = torch.tensor([False, True, False])
    model = Wrapped(
        lambda m, x: m[1](torch.relu(m[0](x))).masked_fill(hidden, -torch.inf),
        nn.Linear(6, 8, bias=False),
        nn.Linear(8, 3),
    )
    without(model.layers[0], rows=[0, 1])
    small = shrink(model, vectors())
    assert small.layers[0].out_features == 6
    assert_same(model, small, vectors())


def test_sets_that_cannot_be_cut_stay_beside_those_that_can() -> None:
    model = Wrapped(
        lambda m, x: m[2](torch.relu(m[1](m[0](x).view(-1, 4, 2).flatten(1)))),
        nn.Linear(6, 8, bias=False),
        nn.Linear(8, 8, bias=False),
        nn.Linear(8, 3),
    )
    without(model.layers[0], rows=[1, 2, 3])
    without(model.layers[1], rows=[0])
    with pytest.warns(UserWarning, match=r"^1 of 2 sets .* layers\.0, for one"):
        small = shrink(model, vectors())
    assert [*widths(small).values()] == [(8, 6), (7, 8), (3, 7)]
    assert_same(model, small, vectors())


@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_small_outputs_are_compared_as_strictly_as_large_ones(scale: float) -> None:
    layers = [nn.Linear(8, 8, bias=False) for _ in range(12)]

    def share(m: Any, x: Tensor) -> Tensor:
        for layer in m[:-1]:
            x = torch.relu(layer(x))
        return m[-1](x / x.shape[1])

    model = Wrapped(share, *layers, nn.Linear(8, 3, bias=False))
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(scale * torch.rand(8, 8))
    without(layers[-1], rows=[0, 1])
    assert (float(outputs(model.double(), vectors(8))[0].abs().max()) > 1e-10) == (
        scale == 1
    )
    with unchanged(model), pytest.raises(RuntimeError, match=r"change by 0\.333"):
        shrink(model, vectors(8))
