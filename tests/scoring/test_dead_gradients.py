"""Where a gradient ends on its way from the loss, and the sentences that say it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dead_ends import INPUT, DeadEnd, ends_at, sentence
from networks import vectors
from torch import Tensor, nn

from force_plugin.scoring.dead_gradients import find_ends, sentences

pytestmark = pytest.mark.filterwarnings("ignore:the network collapsed:UserWarning")


# find_ends on graphs


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_a_leaf_that_gets_a_gradient_has_no_cause() -> None:
    w, v = leaf(1, 2), leaf(3, 4)
    assert find_ends((w * v).sum(), {"w": w, "v": v}) == {"w": "", "v": ""}


def test_a_gradient_that_is_0_in_part_is_a_gradient() -> None:
    w = leaf(-1, 2)
    assert find_ends(torch.relu(w).sum(), {"w": w}) == {"w": ""}


def test_one_leaf_of_two_is_explained_without_the_other() -> None:
    w, v = leaf(1, 2), leaf(0, 0)
    # ∂(w·v)/∂w = v = 0, while v gets w.
    assert find_ends((w * v).sum(), {"w": w})["w"]
    w, v = leaf(1, 2), leaf(0, 0)
    found = find_ends((w * v).sum(), {"v": v, "w": w})
    assert list(found) == ["v", "w"]
    assert found["v"] == ""
    assert found["w"]


@pytest.mark.parametrize(
    ("operation", "function"),
    [
        ("relu", lambda y: torch.relu(y - 100)),
        ("mul", lambda y: y * 0),
        ("softmax", lambda y: y[:, :1].softmax(1)),
        ("log softmax", lambda y: y[:, :1].log_softmax(1)),
        ("clamp", lambda y: y.clamp(100, 200)),
        ("hardtanh", lambda y: nn.functional.hardtanh(y + 100)),
        ("sign", lambda y: y.sign()),
        ("floor", lambda y: y.floor()),
        ("native layer norm", lambda y: nn.functional.layer_norm(y[..., None], (1,))),
        ("dead end", DeadEnd.apply),
        ("where", lambda y: torch.where(y > 1e9, y, 1.0)),
        ("tanh", lambda y: (y + 1000).tanh()),
        ("sigmoid", lambda y: (y - 10000).sigmoid()),
        ("mm", lambda y: y @ torch.zeros(6, 3, dtype=y.dtype)),
    ],
)
def test_the_operation_at_which_a_gradient_ends_is_named(
    operation: str, function: Callable[[Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 6).double()
    output = function(layer(vectors()[0][0])).exp().sum()
    assert find_ends(output, {"w": layer.weight}) == {"w": ends_at(operation)}


def test_an_operation_behind_the_end_is_not_blamed() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 6).double()
    y = torch.relu(torch.tanh(layer(vectors()[0][0])) - 100)
    output = (y.sigmoid() * 3).exp().sum()
    assert find_ends(output, {"w": layer.weight}) == {"w": ends_at("relu")}


def test_a_leaf_that_is_not_in_the_graph_gets_no_gradient() -> None:
    w, v = leaf(1, 2), leaf(3, 4)
    assert find_ends(w.sum(), {"v": v, "w": w}) == {
        "v": "no gradient reaches it",
        "w": "",
    }


def test_a_gradient_ends_at_the_last_operation_that_gets_one() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 6).double()
    y = torch.relu(layer(vectors()[0][0]) - 100)
    # The shortest path crosses a product with 0 first. Another one goes around it, and
    # the ReLU gets a gradient: it is what would have to change.
    output = (-y * 0).sum() + y.tanh().tanh().tanh().exp().sum()
    assert find_ends(output, {"w": layer.weight}) == {"w": ends_at("relu")}


def test_a_gradient_may_end_in_several_places() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 6).double()
    y = layer(vectors()[0][0])
    # Two of the three branches end alike. In the third, the floor gets no gradient.
    branches = [torch.relu(y - 100), torch.relu(y - 200), (y.floor() * 0).exp()]
    output = torch.stack([branch.exp().sum() for branch in branches]).sum()
    assert find_ends(output, {"w": layer.weight}) == {"w": ends_at("mul, relu")}


def test_a_path_that_is_open_counts_however_long_it_is() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 6).double()
    y = layer(vectors()[0][0])
    # The shortest path ends at a product with 0.
    output = (y * 0).sum() + y.tanh().tanh().tanh().sum()
    assert find_ends(output, {"w": layer.weight}) == {"w": ""}


def test_a_weight_that_meets_only_zeros_multiplies_0() -> None:
    for bias in (True, False):
        linear, conv = nn.Linear(5, 6, bias=bias), nn.Conv2d(3, 4, 3, bias=bias)
        output = linear(torch.zeros(8, 5)).exp().sum()
        assert find_ends(output, {"w": linear.weight}) == {"w": INPUT}
        output = conv(torch.zeros(2, 3, 6, 6)).exp().sum()
        assert find_ends(output, {"w": conv.weight}) == {"w": INPUT}


def test_an_input_that_is_0_in_part_is_not_said_to_be_0() -> None:
    layer = nn.Linear(5, 6, bias=False)
    x = torch.ones(2, 5)
    x[0] = 0
    # A loss of the sample that is 0: the other one gets no gradient.
    output = (layer(x) * torch.tensor([[1.0], [0.0]])).exp().sum()
    assert find_ends(output, {"w": layer.weight}) == {"w": ends_at("mm")}


def test_only_what_the_weight_itself_multiplies_is_said_to_be_0() -> None:
    layer, zeros = nn.Linear(5, 6), torch.zeros(2, 5)
    signs = torch.tensor([[1.0], [-1.0]])
    # Two gradients that cancel: a bias multiplies nothing.
    output = (layer(zeros) * signs).sum()
    assert find_ends(output, {"b": layer.bias}) == {"b": ends_at("addmm")}
    # A factor of the weight could be 0 as well.
    gain = nn.Parameter(torch.ones(6, 1))
    output = nn.functional.linear(zeros, layer.weight * gain).exp().sum()
    assert find_ends(output, {"w": layer.weight}) == {"w": ends_at("mm")}
    # At its other use it multiplies something.
    dead = torch.relu(nn.functional.linear(zeros + 1, layer.weight) - 100)
    output = (layer(zeros) + dead).exp().sum()
    assert find_ends(output, {"w": layer.weight}) == {"w": ends_at("addmm, relu")}


def test_what_multiplies_the_outputs_of_a_layer_is_not_what_its_weight_multiplies() -> (
    None
):
    weight = nn.Parameter(torch.ones(5, 6))
    # A graph without edges, by which the features of its nodes are passed on.
    edges, features = torch.zeros(8, 8), torch.ones(8, 5)
    output = (edges @ (features @ weight)).exp().sum()
    assert find_ends(output, {"w": weight}) == {"w": ends_at("mm")}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_inputs_have_causes_too(layout: torch.layout) -> None:
    weight = nn.Parameter(torch.ones(5, 6))
    for x, cause in ((torch.zeros(8, 5), INPUT), (torch.ones(8, 5), ends_at("relu"))):
        y = x.to_sparse(layout=layout) @ weight
        output = torch.relu(y - 100).sum() if cause != INPUT else y.exp().sum()
        assert find_ends(output, {"w": weight}) == {"w": cause}


def test_looking_for_the_end_leaves_no_gradient_and_no_hook() -> None:
    w: Any = leaf(-1, -2)
    y = torch.relu(w)
    calls: list[Tensor] = []
    y.register_hook(calls.append)
    find_ends((y * 2).sum(), {"w": w})
    assert w.grad is None
    assert len(calls) == 1
    # The same leaf in another graph.
    (w * w).sum().backward()
    gradient: Any = w.grad
    assert torch.equal(gradient, 2 * w.detach())


# Sentences


def test_each_cause_gets_one_sentence_in_the_order_of_its_first_layer() -> None:
    causes = {"c": "it rains", "a": "it snows", "b": "it rains"}
    assert sentences(causes, 7) == [
        sentence("2 of 7 layers (c, b)", "it rains"),
        sentence("1 of 7 layers (a)", "it snows"),
    ]
    assert sentences({}, 7) == []


def test_the_first_three_of_many_layers_are_named() -> None:
    causes = dict.fromkeys("abcde", "it rains")
    assert sentences(causes, 5) == [
        sentence("5 of 5 layers (a, b, c and 2 more)", "it rains")
    ]
