"""What is no gate, and what a network does on its way, which nobody feels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gated_networks import (
    SCALES,
    Dense,
    Gated,
    TrainThenEvaluate,
    assert_opens,
    assert_opens_nothing,
    gated_by,
    opened_by_hand,
    residual,
    scaled,
    scored,
    shuffled,
)
from state import assert_same
from timm.layers import LayerScale
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from force_plugin import saliency


@pytest.mark.parametrize(
    ("value", "closed"),
    [
        (0.01, True),
        (-0.01, True),
        (0.0101, False),
        (-0.0101, False),
        (0.1, False),
        (1.0, False),
        (-1.0, False),
    ],
)
def test_a_gate_is_closed_up_to_a_hundredth(value: float, closed: bool) -> None:
    model = Gated(torch.full((6,), value, dtype=torch.float64), scaled)
    if closed:
        assert_opens(model, ["q7"], SCALES)
    else:
        assert_opens_nothing(model)


def test_a_gate_with_a_single_open_channel_is_open() -> None:
    gate = torch.zeros(6)
    gate[3] = 0.5
    assert_opens_nothing(Gated(gate, scaled))
    assert_opens_nothing(Gated(-gate, scaled))
    assert_opens_nothing(Gated(gate, lambda x, f, g: torch.addcmul(x, f, g)))
    model = residual()
    model[1].gate.weight.data[2] = 0.5
    assert_opens_nothing(model)


class Attention(nn.Module):
    """One head with a class token, positions and a table of relative positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(1, 6)
        self.qkv = nn.Linear(6, 18)
        self.head = nn.Linear(6, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 6))
        self.positions = nn.Parameter(torch.zeros(1, 6, 6))
        self.table = nn.Parameter(torch.zeros(11))
        places = torch.arange(6)
        self.register_buffer("distances", places[:, None] - places + 5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x[..., None])
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = q @ k.mT / 6**0.5 + self.table[self.distances]
        return self.head((weights.softmax(-1) @ v).mean(1))


def response_normalised(x: Tensor, f: Tensor, g: Tensor, bias: Tensor) -> Tensor:
    """The global response normalisation of ConvNeXt V2."""
    n = f.norm(dim=0, keepdim=True)
    n = n / (n.mean(-1, keepdim=True) + 1e-6)
    return x + f + torch.addcmul(bias, g, f * n)


OPEN: dict[str, Callable[[], nn.Module]] = {
    "a bias": lambda: Gated(torch.zeros(6), lambda x, f, g: x + f + g),
    "a class token, positions and a table of relative positions": Attention,
    "the weight of a norm that is centred at 0": lambda: Gated(
        torch.zeros(6),
        lambda x, f, g: x + f * f.square().mean(-1, keepdim=True).rsqrt() * (1 + g),
    ),
    "the slope of a PReLU": lambda: Gated(
        torch.zeros(6), lambda x, f, g: F.prelu(f, g)
    ),
    "a global response normalisation": lambda: Gated(
        torch.zeros(6), response_normalised, bias=torch.zeros(6)
    ),
    "a residual scale beside the activations": lambda: Gated(
        torch.zeros(6), lambda x, f, g: x + f + g * f
    ),
    "a logit of a sigmoid": lambda: Gated(
        torch.zeros(6), lambda x, f, g: x + f * g.sigmoid()
    ),
    "an exponent": lambda: Gated(torch.zeros(6), lambda x, f, g: x + f * g.exp()),
    "a power": lambda: Gated(
        torch.zeros(6), lambda x, f, g: x + f * (2 + x.detach().abs()) ** g
    ),
    "the logits of a softmax over branches": lambda: Gated(
        torch.zeros(2), lambda x, f, g: x * g.softmax(0)[0] + f * g.softmax(0)[1]
    ),
    "an offset of a lerp that is open": lambda: Gated(
        torch.zeros(6), lambda x, f, g: torch.lerp(x, f, (0.5 + g).expand_as(f))
    ),
    "a factor that is small, then made large": lambda: Gated(
        torch.full((6,), 0.005), lambda x, f, g: x + f * (g * 100)
    ),
    "a factor of another parameter": lambda: Gated(
        torch.zeros(6),
        lambda x, f, g, other: x + f + g * other,
        other=torch.linspace(-1, 1, 6),
    ),
    "a factor of the data": lambda: Gated(
        torch.zeros(6), lambda x, f, g: x + f + g * x.detach()
    ),
    "a bias in a gate that a layer computes": lambda: Gated(
        torch.zeros(6), lambda x, f, g: x + f * (1e-3 * x.tanh() + g)
    ),
    "a parameter that nothing uses": lambda: Gated(
        torch.zeros(6), lambda x, f, g: x + f
    ),
    "a parameter that is used without its gradient": lambda: Gated(
        torch.zeros(6), lambda x, f, g: x + f + g.detach() * f
    ),
}


@pytest.mark.parametrize("what", OPEN)
def test_a_zero_that_hides_no_weight_is_no_gate(what: str) -> None:
    assert_opens_nothing(OPEN[what]())


def test_a_factor_of_the_input_is_no_gate() -> None:
    class Scaled(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + x * self.q7)

    assert_opens_nothing(Scaled(torch.zeros(5), lambda x, f, g: x + f))


def test_a_gate_before_what_is_not_to_be_pruned_is_no_gate() -> None:
    model = Gated(
        torch.zeros(6),
        lambda x, f, g, lstm: x + f + g * lstm(x[:, None])[0][:, 0],
        lstm=nn.LSTM(6, 6, batch_first=True),
    )
    assert_opens_nothing(model)


def test_a_gate_before_layers_that_are_left_out_is_no_gate() -> None:
    model: Any = Gated(torch.zeros(6), scaled)
    chosen = [(model.k1, "weight"), (model.k3, "weight")]
    scores = scored(model, parameters=chosen)
    expected = scored(model, parameters=chosen, open_gates=False)
    assert_same(scores, expected)
    chosen += [(model.k2[0], "weight")]
    scores = scored(model, parameters=chosen)
    by_hand: Any = opened_by_hand(model, ["q7"])
    chosen = [(m, "weight") for m in (by_hand.k1, by_hand.k3, by_hand.k2[0])]
    expected = scored(by_hand, parameters=chosen, open_gates=False)
    assert_same(scores, expected)


def test_a_buffer_of_zeros_is_no_gate() -> None:
    model = gated_by(LayerScale(6, 0))
    gamma = model.last.gamma.detach()
    del model.last.gamma
    model.last.register_buffer("gamma", gamma)
    assert_opens_nothing(model)


def test_a_mask_of_zeros_in_the_data_is_no_gate() -> None:
    model = Gated(torch.zeros(6), lambda x, f, g: x + g + f * (x.detach() > 1e9))
    assert_opens_nothing(model)


def test_only_what_multiplies_counts_as_a_gate() -> None:
    model: Any = residual()
    nn.init.ones_(model[1].gate.weight)
    # Biases of 0 are usual, and add.
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    assert_opens_nothing(model)


# What a network does on its way is felt by nobody.


def test_a_frozen_parameter_of_zeros_may_be_written_to_in_forward() -> None:
    # RuntimeError: a leaf Variable that requires grad is being used in an in-place
    # operation. Candidates get requires_grad=True, frozen ones as well.
    def count(x: Tensor, f: Tensor, g: Tensor, calls: Tensor) -> Tensor:
        calls += 1
        return x + f

    model = Gated(torch.ones(()), count, calls=torch.zeros(1))
    model.calls.requires_grad_(False)
    assert_opens_nothing(model)


def test_what_a_frozen_zero_multiplies_may_be_written_to_in_forward() -> None:
    # RuntimeError: a variable needed for gradient computation has been modified. For
    # the gradient of the frozen parameter, which nobody needs, autograd keeps f.
    model = Gated(torch.zeros(6), lambda x, f, g: f.add_(f * g).add_(x))
    model.q7.requires_grad_(False)
    assert_opens_nothing(model)


def test_a_product_with_a_complex_filter_is_scored_as_it_is() -> None:
    # TypeError: aminmax not implemented for ComplexDouble. GFNet and Fourier neural
    # operators have such filters; any zero bias besides makes scoring look at them.
    def filtered(x: Tensor, f: Tensor, g: Tensor, filters: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(f) * torch.view_as_complex(filters)
        return x + torch.fft.irfft(spectrum, n=6)

    filters = torch.linspace(-1, 1, 8).view(4, 2)
    model: Any = Gated(torch.ones(()), filtered, filters=filters)
    nn.init.zeros_(model.k3.bias)
    assert_opens_nothing(model)


@pytest.mark.parametrize("shape", [(), (4, 1)])
def test_a_weight_of_small_values_that_is_scaled_is_no_gate(
    shape: tuple[int, ...],
) -> None:
    # It is set to 1: all its values are at most 0.01, and it is part of a product. As
    # a weight of 64 inputs it is far from closed.
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * self.gain, self.bias)

    torch.manual_seed(0)
    head = Scaled(64, 4)
    head.gain = nn.Parameter(torch.ones(shape))
    nn.init.uniform_(head.weight, -0.009, 0.009)
    model = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), head).double()
    values = scored(model, Dense)["2.weight"]
    assert torch.equal(values, head.weight)
    assert_opens_nothing(model)


def test_a_checkpoint_that_draws_anew_is_scored_as_it_is() -> None:
    # The scores differ: to read what a checkpoint has saved is to compute it again,
    # and here that draws random numbers.
    def join(x: Tensor, f: Tensor, g: Tensor, norm: nn.Module) -> Tensor:
        def branch(f: Tensor) -> Tensor:
            return F.dropout(norm(f))

        return (
            x
            + g
            + F.dropout(
                checkpoint(branch, f, use_reentrant=False, preserve_rng_state=False)
            )
        )

    model = Gated(torch.zeros(6), join, norm=nn.LayerNorm(6))
    results = []
    for gates in (True, False):
        torch.manual_seed(3)
        results.append(saliency(model, shuffled(), "snip", batches=2, open_gates=gates))
    assert_same(*results)


def test_a_norm_in_a_checkpoint_keeps_the_statistics_of_a_single_pass() -> None:
    # The same cause: each look computes the branch again, and its batch norm takes
    # part in the running statistics once more. A method that measures in evaluation
    # mode afterwards sees them.
    def join(x: Tensor, f: Tensor, g: Tensor, norm: nn.Module) -> Tensor:
        return x + g + checkpoint(norm, f, use_reentrant=False)

    model = Gated(torch.zeros(6), join, norm=nn.BatchNorm1d(6))
    scores = scored(model, TrainThenEvaluate)
    expected = scored(model, TrainThenEvaluate, open_gates=False)
    assert_same(scores, expected)


def test_a_parameter_that_forward_updates_is_that_of_a_single_pass() -> None:
    # Buffers are put back before the second pass, parameters are not: an average that
    # is kept in a frozen parameter takes part twice.
    def centred(x: Tensor, f: Tensor, g: Tensor, average: Tensor) -> Tensor:
        with torch.no_grad():
            average.lerp_(x.mean(0), 0.1)
        return (x - average).tanh() + f * g

    model = Gated(torch.zeros(6), centred, average=torch.zeros(6))
    model.average.requires_grad_(False)
    assert_opens(model, ["q7"], SCALES)


def test_a_generator_of_the_models_own_is_that_of_a_single_pass() -> None:
    # Only the global generators are put back before the second pass.
    def noisy(x: Tensor, f: Tensor, g: Tensor) -> Tensor:
        return x + f * g + torch.rand(6, generator=generator, dtype=x.dtype)

    generator = torch.Generator()
    results = []
    for value, gates in ((0.0, True), (1.0, False)):
        generator.manual_seed(3)
        model: Any = Gated(torch.full((6,), value), noisy)
        model.generator = generator
        results.append(scored(model, open_gates=gates))
    assert_same(*results)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(8, dtype=torch.float64).to_sparse(),
        lambda: torch.ones(6).to(torch.float8_e4m3fn),
    ],
    ids=["sparse", "float8"],
)
def test_a_parameter_that_has_no_largest_value_is_left_alone(
    make: Callable[[], Tensor],
) -> None:
    # NotImplementedError: aminmax is not implemented for sparse tensors and float8.
    model = Gated(torch.ones(()), lambda x, f, g: x + f)
    model.other = nn.Parameter(make(), requires_grad=False)
    scores = scored(model)
    assert_same(scores, scored(model, open_gates=False))
