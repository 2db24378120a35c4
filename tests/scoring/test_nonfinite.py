"""Numbers that are none are blamed on what made them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from networks import waves
from refusals import TwoInputs, by_call, network, refused, scoring, taylor
from state import unchanged
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as old_weight_norm
from torch.utils.checkpoint import checkpoint

from force_plugin import FORCE, SNIP, apply_masks, force_prune, saliency
from force_plugin.errors import NoGradientError, NotFiniteError, NothingToPruneError

# They are asked for by the models' own authors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is not supported"),
]

NAN, INF = float("nan"), float("inf")


# Numbers that are none


def root(x: Tensor) -> Tensor:
    return (x - x.detach()).sqrt()  # 0, with an infinite slope


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return root(x)


def rooted(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 4), Root(), nn.Linear(4, 4)).to(dtype)


def broken(name: str, value: float = NAN) -> nn.Sequential:
    model = network()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[1] = value
    return model


def at_layer(value: float) -> Callable[[Tensor, Tensor], Tensor]:
    def score(weight: Tensor, gradient: Tensor) -> Tensor:
        score = gradient.abs()
        if len(weight) == 4:
            score[0, 0] = value
        return score

    return score


def measuring(value: float) -> Any:
    def measure(cls: Any, probe: Any) -> Any:
        signal = probe.gradients()
        signal["2.weight"][0, 0] = value
        return signal

    return classmethod(measure)


SCORE = r"the weight and its signal are finite, and Mine\.score makes NaN or inf of th"

NUMBERS: dict[str, tuple[Any, str, str, Callable[[], nn.Module]]] = {
    # method, of which layers, cause, model
    **{
        f"a score of {value}": (scoring(at_layer(value)), "2.weight", SCORE, network)
        for value in (NAN, INF, -INF)
    },
    "a logarithm": (
        scoring(lambda w, g: w.log()),
        "0.weight, 2.weight",
        SCORE,
        network,
    ),
    "0 by 0": (scoring(lambda w, g: (g - g) / (g - g)), "0.", SCORE, network),
    "a score of our signal": (
        type("Mine", (SNIP,), {"score": staticmethod(at_layer(NAN))}),
        "2.weight",
        SCORE,
        network,
    ),
    "a score that overwrites its signal": (
        scoring(lambda w, g: g.mul_(INF)),
        "0.",
        SCORE,
        network,
    ),
    "a measure": (
        scoring(taylor, measure=measuring(NAN)),
        "2.weight",
        r"what Mine\.measure returned for it is NaN or inf; look at this method",
        network,
    ),
    "a measure for our score": (
        type("Mine", (SNIP,), {"measure": measuring(INF)}),
        "2.weight",
        r"what Mine\.measure returned for it is NaN or inf",
        network,
    ),
    "a gradient": (
        "force",
        "0.weight",
        "its gradient is NaN or inf, or too large for float32; .*score in float64 ",
        rooted,
    ),
    "a gradient of a score of one's own": (
        scoring(taylor),
        "0.weight",
        "its gradient is NaN or inf, or too large for float32;",
        rooted,
    ),
    "a gradient in 16 bits": (
        "snip",
        "0.weight",
        "its gradient .* for bfloat16; .* score in float32 instead of 16 bits$",
        lambda: rooted(torch.bfloat16),
    ),
    "a gradient in 64 bits": (
        "snip",
        "0.weight",
        "its gradient .* for float64; look at the data and the initialisation$",
        lambda: rooted(torch.float64),
    ),
    "a weight": (
        "magnitude",
        "2.weight",
        r"there is a NaN or inf in 2\.weight; look at the initialisation, or where",
        lambda: broken("2.weight", INF),
    ),
    "a weight and a score of one's own": (
        scoring(
            lambda w, g: w, measure=classmethod(lambda c, p: dict.fromkeys(p.weights))
        ),
        "0.weight",
        r"there is a NaN or inf in 0\.weight",
        lambda: broken("0.weight"),
    ),
    "a bias under synflow": (
        "synflow",
        "2.weight",
        r"there is a NaN or inf in 0\.bias",
        lambda: broken("0.bias"),
    ),
}


@by_call
@pytest.mark.parametrize("name", NUMBERS)
def test_a_saliency_that_is_not_finite_is_blamed_on_what_made_it(
    name: str, call: str
) -> None:
    method, layers, cause, build = NUMBERS[name]
    model = build()
    options = {"method": method, "loader": [waves(next(model.parameters()).dtype)]}
    message = rf"^the saliency of {layers}.* is not finite at step 1: {cause}"
    refused(call, NotFiniteError, message, model, **options)


def test_a_product_that_overflows_under_synflow_is_called_one() -> None:
    # A linear attention multiplies three of them, and casts to float32.
    torch.manual_seed(0)
    model = timm.create_model("efficientvit_b0", num_classes=4)
    message = (
        r"is not finite at step 1: its gradient is NaN or inf, as a product over many "
        r"layers without signs overflows float64, or a narrower type that the forward "
        r"casts to; take another method$"
    )
    pictures = torch.ones(2, 3, 32, 32)
    with unchanged(model), pytest.raises(NotFiniteError, match=message):
        saliency(model, [(pictures, torch.arange(2))], "synflow")


@pytest.mark.parametrize(
    ("options", "model", "message"),
    [
        (
            {"loader": [(waves()[0].fill_(NAN), waves()[1])]},
            network,
            "there is a NaN in the batch; look at the data$",
        ),
        (
            {"loader": [(waves()[0].fill_(INF), waves()[1])]},
            network,
            "there is an inf in the batch, or an undefined .* or an overflow in the ",
        ),
        (
            {"loss_fn": lambda o, t: cross_entropy(o, t) * INF},
            network,
            "an overflow in the network or in the loss, in float32; .* in float64 ",
        ),
        (
            {
                "loss_fn": lambda o, t: cross_entropy(o, t) * INF,
                "autocast": torch.bfloat16,
            },
            network,
            "an overflow .* in bfloat16; .*, or score without autocast$",
        ),
        (
            {
                "loss_fn": lambda o, t: cross_entropy(o, t) * INF,
                "loader": [waves(torch.float64)],
            },
            lambda: network().double(),
            "an overflow .* in float64; look at the initialisation and the loss$",
        ),
        (
            {},
            lambda: broken("2.bias"),
            r"there is a NaN or inf in 2\.bias; look at the in",
        ),
    ],
)
def test_a_loss_that_is_not_finite_is_blamed_on_what_made_it(
    options: dict[str, Any], model: Callable[[], nn.Module], message: str
) -> None:
    message = rf"^the loss is \w+ at step 1: {message}"
    refused("force_prune", NotFiniteError, message, model(), **options)


@pytest.mark.parametrize("norm", [old_weight_norm, parametrizations.weight_norm])
def test_a_norm_of_what_was_pruned_is_blamed_for_its_nan(norm: Any) -> None:
    model = network()
    layer = norm(model[0])
    pair = (layer, "weight_v") if hasattr(layer, "weight_v") else None
    pair = pair or (layer.parametrizations.weight, "original1")
    with torch.no_grad():
        getattr(*pair)[0] *= 1e-9  # a channel that nobody misses
        model[2].weight[:, 0] = 0
    message = r"^the loss is nan at step 2: a channel of .* has lost every weight, and "
    named = [pair, (model[2], "weight")]
    refused("force_prune", NotFiniteError, message, model, steps=3, parameters=named)


class Recomputed(nn.Sequential):
    """Layers of which the first is computed again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        first = checkpoint(self[0], x.requires_grad_(), use_reentrant=True)
        return self[2](self[1](first))


def test_a_reentrant_checkpoint_is_blamed_for_gradients_that_are_not_there() -> None:
    for options in ({}, {"method": "grasp"}):
        model, message = Recomputed(*network()), "use_reentrant=True, which hides"
        refused("force_prune", NoGradientError, message, model, **options)


def test_a_network_that_insists_on_its_arguments_is_told_of_forward() -> None:
    class Insisting(TwoInputs):
        def forward(self, x: Tensor, y: Any = None) -> Tensor:
            assert y is not None, "y is needed"
            return super().forward(x, y)

    model = Insisting()
    with pytest.raises(AssertionError, match="y is needed") as caught:
        force_prune(model, [waves()], 0.5, progress=False)
    if sys.version_info >= (3, 11):
        assert "pass forward=" in "".join(caught.value.__notes__)


def test_quantised_layers_are_called_so() -> None:
    model = nn.Sequential(torch.ao.nn.quantized.Linear(6, 4))
    with pytest.raises(NothingToPruneError, match="prune the model before it is quant"):
        force_prune(model, [waves()], 0.5, progress=False)


@pytest.mark.parametrize("key", ["weight_mask", "weight_orig"])
@pytest.mark.parametrize("kind", ["buffer", "parameter", "attribute"])
def test_a_name_that_a_layer_uses_itself_is_not_taken(kind: str, key: str) -> None:
    model: Any = network()
    if kind == "buffer":
        model[2].register_buffer(key, torch.ones(4, 6))
    elif kind == "parameter":
        model[2].register_parameter(key, nn.Parameter(torch.ones(4, 6)))
    else:
        setattr(model[2], key, 1)
    message = rf"^2\.weight cannot be pruned: its module has a {key} of its own"
    for call in ("force_prune", "saliency"):
        refused(call, ValueError, message, model)
    mask = torch.ones_like(model[2].weight, dtype=torch.bool)
    with unchanged(model), pytest.raises(ValueError, match=message):
        apply_masks(model, {"2.weight": mask})
    with unchanged(model), pytest.raises(ValueError, match=f"has a {key} of its own"):
        FORCE.apply(model[2], "weight", 0.5, importance_scores=mask.float())
