"""Networks that are called otherwise, and parts that SynFlow cannot pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from refusals import TwoInputs, X, Y, by_call, network, prune_it, refused
from state import unchanged
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from force_plugin.errors import BatchError, NoGradientError, PruningError

# They are asked for by the models' own authors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is not supported"),
]


class TwoInTurn(TwoInputs):
    def forward(self, pair: Any) -> Tensor:  # type: ignore[override]
        return super().forward(pair[0], pair["y"])


class ByName(TwoInputs):
    def forward(self, *, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x)


class WithoutForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 4)


def bert() -> nn.Module:
    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_labels": 4,
    }
    config = BertConfig(vocab_size=20, intermediate_size=8, **sizes)
    return BertForSequenceClassification(config).eval()


IDS = torch.arange(20).view(5, 4)

OTHERWISE: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "two inputs": (TwoInputs, (X, Y)),
    "a pair of inputs": (TwoInputs, ((X, X), Y)),
    "a pair without a name": (TwoInTurn, ((X, X), Y)),
    "a dictionary of inputs": (network, ({"x": X}, Y)),
    "inputs by name": (ByName, (X, Y)),
    "no forward": (WithoutForward, (X, Y)),
    "a dictionary for a bert": (bert, ({"input_ids": IDS}, Y)),
}


@pytest.mark.parametrize("method", ["force", "grasp"])
@by_call
@pytest.mark.parametrize("name", OTHERWISE)
def test_a_network_that_is_called_otherwise_points_to_forward(
    name: str, call: str, method: str
) -> None:
    build, one = OTHERWISE[name]
    message = (
        r"(?s)^the model failed when it was called as model\(inputs\), on inputs .*; "
        r"for a model that is called otherwise pass forward=, a callable \(model, ba"
    )
    refused(call, BatchError, message, build(), loader=[one], method=method)


def test_an_error_within_a_network_is_left_as_it_is_with_a_hint_below_it() -> None:
    model = network()
    with unchanged(model), pytest.raises(RuntimeError, match="mat1 and mat2") as raised:
        prune_it(model, loader=[(X[:, :3], Y)])
    assert not isinstance(raised.value, PruningError)
    (hint,) = getattr(raised.value, "__notes__", ["forward="])
    assert "forward=" in hint


def test_outputs_that_a_loss_does_not_take_point_to_forward() -> None:
    message = r"^loss_fn failed on outputs a SequenceClassifierOutput and .*forward=$"
    refused("saliency", BatchError, message, bert(), loader=[(IDS, Y)], method="snip")
    refused("saliency", BatchError, message, bert(), loader=[(IDS, Y)], method="grasp")


class Casting(nn.Module):
    def __init__(self, cast: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.fc, self.cast = nn.Linear(6, 8), nn.Linear(8, 4), cast

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.cast(self.stem(x).relu()))


SYNFLOW: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "a cast": (
        lambda: Casting(Tensor.float),
        (X, Y),
        r"the model fails on float64\(1, 6\), .*leave casts such as \.float\(\) out",
    ),
    "a cast to 16 bits": (
        lambda: Casting(Tensor.half),
        (X, Y),
        "the model fails on fl",
    ),
    "two inputs": (TwoInputs, (X, Y), r".*; SynFlow calls model\(inputs\) with one"),
    "a pair of inputs": (
        TwoInputs,
        ((X, X), Y),
        "expected batches .*, got a tuple of 2",
    ),
    "a dictionary": (
        network,
        {"x": X},
        "expected batches .*, got a dict; take another",
    ),
    "words": (bert, (IDS, Y), r"expected batches .*, got int64\(5, 4\); take another"),
}


@by_call
@pytest.mark.parametrize("name", SYNFLOW)
def test_what_synflow_cannot_pass_is_called_synflows(name: str, call: str) -> None:
    build, one, message = SYNFLOW[name]
    options = {"loader": [one], "method": "synflow", "forward": lambda m, b: m(b)}
    message = f"(?s)^SynFlow: {message}"
    refused(call, BatchError, message, build(), **options)


def test_a_weight_that_synflow_does_not_reach_is_not_to_be_mended_by_forward() -> None:
    class Unused(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 4)
            self.spare = nn.Linear(4, 4)

    message = (
        r"^no gradient reached spare\.weight at step 1: the outputs do not depend on it"
        r"; leave it out with parameters=, or take another method$"
    )
    refused("saliency", NoGradientError, message, Unused(), method="synflow")
