"""Errors that name their cause: who has failed, what came, and what to do about it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from state import unchanged
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import weight_norm as old_weight_norm
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification

from force_plugin import (
    FORCE,
    SNIP,
    SaliencyMethod,
    apply_masks,
    compact,
    diagnose,
    force_prune,
    get_masks,
    load_pruned_state_dict,
    make_permanent,
    reinitialise,
    saliency,
    shuffle_masks,
    snap_prune,
    sparsity_report,
)
from force_plugin.errors import (
    BatchError,
    CompactionError,
    MethodError,
    NoGradientError,
    NotFiniteError,
    NothingToPruneError,
    PruningError,
)

# They are asked for by the models' own authors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is not supported"),
]

NAN, INF = float("nan"), float("inf")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.linspace(-1, 1, 30).view(5, 6).sin().to(dtype), torch.arange(5) % 4


def prune_it(model: nn.Module, **options: Any) -> Any:
    usual = {"loader": [batch()], "sparsity": 0.5, "steps": 2, "progress": False}
    return force_prune(model, **{**usual, **options})


CALLS: dict[str, Callable[..., object]] = {
    "force_prune": prune_it,
    "saliency": lambda m, **o: saliency(m, **{"loader": [batch()], **o}),
    "diagnose": lambda m, **o: diagnose(m, **{"loader": [batch()], **o}),
}
by_call = pytest.mark.parametrize("call", CALLS)


def refused(
    call: str, error: type[Exception], message: str, model: nn.Module, **options: Any
) -> None:
    """Assert that a call says this, and that the model is what it was."""
    with unchanged(model), pytest.raises(error, match=message) as raised:
        CALLS[call](model, **options)
    if isinstance(raised.value, PruningError):
        assert raised.value.problem in str(raised.value)


# What is passed as a method


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    return (weight * gradient) ** 2


class Taylor(SaliencyMethod):
    score = staticmethod(taylor)


class Own(prune.BasePruningMethod):
    PRUNING_TYPE = "unstructured"


NO_METHOD: dict[str, tuple[Any, str]] = {
    "an instance": (
        Taylor(0.5),
        "an instance of Taylor; pass the class itself, method",
    ),
    "an instance of ours": (FORCE(3), "an instance of FORCE; pass the class itself"),
    "pytorch's magnitude": (prune.L1Unstructured, 'L1.*; method="magnitude" does the'),
    "an instance of it": (prune.L1Unstructured(0.5), 'L1U.*; method="magnitude" does'),
    "pytorch's random": (prune.RandomUnstructured, 'Ran.*; method="random" does the'),
    "pytorch's structured": (
        prune.LnStructured,
        "LnStructured; it is for the calls of torch.nn.utils.prune$",
    ),
    "a method for pytorch": (
        Own,
        "Own; derive it from SaliencyMethod and give it a sc",
    ),
    "a function": (
        taylor,
        r"a function; derive a class from SaliencyMethod, and make it its score, "
        r"score = staticmethod\(taylor\)$",
    ),
    "a lambda": (lambda w, g: w * g, "a function; derive a class from SaliencyMethod"),
    "a function of torch": (torch.mul, r"a function; .*staticmethod\(mul\)$"),
    "a module": (nn.Linear(2, 2), "Linear$"),
    "none": (None, "NoneType; leave it out for FORCE$"),
    "a list": (["force"], "list$"),
}


@by_call
@pytest.mark.parametrize("name", NO_METHOD)
def test_what_is_no_method_is_told_what_it_is(name: str, call: str) -> None:
    method, came = NO_METHOD[name]
    message = rf"^method: expected a name or a subclass of SaliencyMethod, got {came}"
    refused(call, TypeError, message, network(), method=method)


class ByItself(SaliencyMethod):
    def score(self, weight: Tensor, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.abs()


class Bound(SaliencyMethod):
    # Called on the class, ``self`` would be the weight.
    def score(self, weight: Tensor) -> Tensor:  # type: ignore[override]
        return weight.abs()


class OfTheClass(SaliencyMethod):
    @classmethod
    def score(cls, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.abs()


class OfThree(SaliencyMethod):
    @staticmethod
    def score(weight: Tensor, gradient: Tensor, more: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.abs()


class OfOne(SaliencyMethod):
    @staticmethod
    def score(gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.abs()


class OfNames(SaliencyMethod):
    @staticmethod
    def score(*, weight: Tensor, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.abs()


class NoFunction(SaliencyMethod):
    score = torch.ones(3)  # type: ignore[assignment]


class Measured(SaliencyMethod):
    def measure(self, probe: Any) -> Any:  # type: ignore[override]
        return probe.gradients()

    score = staticmethod(taylor)


class MeasuredStatically(SaliencyMethod):
    @staticmethod
    def measure(cls: Any, probe: Any) -> Any:  # type: ignore[override]
        return probe.gradients()

    score = staticmethod(taylor)


class MeasuresNothing(SaliencyMethod):
    @classmethod
    def measure(cls) -> Any:  # type: ignore[override]
        return {}

    score = staticmethod(taylor)


STATIC = r"score: expected @staticmethod score\(weight, signal\), got "
CLASS = r"measure: expected @classmethod measure\(cls, probe\), got "
WRONG_METHODS: dict[str, tuple[type[SaliencyMethod], str]] = {
    "self": (
        ByItself,
        rf"ByItself\.{STATIC}score\(self, weight, gradient\) without @staticmethod$",
    ),
    "self for the weight": (
        Bound,
        rf"Bound\.{STATIC}score\(self, weight\) without @static",
    ),
    "too few of a class": (OfTheClass, rf"OfTheClass\.{STATIC}score\(gradient\)$"),
    "three": (OfThree, rf"OfThree\.{STATIC}score\(weight, gradient, more\)$"),
    "one": (OfOne, rf"OfOne\.{STATIC}score\(gradient\)$"),
    "names": (OfNames, rf"OfNames\.{STATIC}score\(\*, weight, gradient\)$"),
    "a tensor": (NoFunction, rf"NoFunction\.{STATIC}Tensor$"),
    "a measure of self": (
        Measured,
        rf"Measured\.{CLASS}measure\(self, probe\) without @classmethod$",
    ),
    "a static measure": (
        MeasuredStatically,
        rf"MeasuredStatically\.{CLASS}measure\(cls, probe\)$",
    ),
    "a measure of nothing": (MeasuresNothing, rf"MeasuresNothing\.{CLASS}measure\(\)$"),
}


@by_call
@pytest.mark.parametrize("name", WRONG_METHODS)
def test_a_function_of_a_method_that_cannot_be_called_is_named(
    name: str, call: str
) -> None:
    method, message = WRONG_METHODS[name]
    never = iter([pytest.fail] * 0)  # no batch is read
    refused(call, TypeError, f"^{message}", network(), method=method, loader=never)


def test_a_function_that_can_be_called_may_be_written_in_any_way() -> None:
    class Undecorated(SaliencyMethod):
        def score(weight: Tensor, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return taylor(weight, gradient)

    class WithMore(SaliencyMethod):
        @classmethod
        def score(cls, weight: Tensor, signal: Tensor, power: int = 2) -> Tensor:  # type: ignore[override]
            return (weight * signal) ** power

    class Free(SaliencyMethod):
        score = staticmethod(lambda *both: taylor(*both))

    class Static(SaliencyMethod):
        score = staticmethod(taylor)

        @staticmethod
        def measure(probe: Any) -> Any:  # type: ignore[override]
            return probe.gradients()

    expected = saliency(network(), [batch()], Taylor)
    for method in (Undecorated, WithMore, Free, Static):
        scores = saliency(network(), [batch()], method)
        assert all(torch.equal(scores[n], s) for n, s in expected.items())


def scoring(score: Callable[..., Any], **more: Any) -> type[SaliencyMethod]:
    return type("Mine", (SaliencyMethod,), {"score": staticmethod(score), **more})


RETURNED: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "nothing": (lambda w, g: None, r"got a NoneType$"),
    "a float": (lambda w, g: 1.0, r"got a float$"),
    "an array": (lambda w, g: np.ones(w.shape), r"got a ndarray$"),
    "a pair": (lambda w, g: (w, g), r"got a tuple of 2$"),
    "a sum": (lambda w, g: g.sum(), r"for 0\.weight, got \(\)$"),
    "a score a channel": (lambda w, g: g.sum(1), r"got \(8,\)$"),
    "the other way round": (lambda w, g: g.T, r"got \(6, 8\)$"),
}


@pytest.mark.parametrize("name", RETURNED)
def test_a_score_that_is_no_tensor_of_the_shape_is_told_what_it_is(name: str) -> None:
    score, came = RETURNED[name]
    message = rf"^Mine\.score: expected a tensor of the weight's shape \(8, 6\).*{came}"
    refused("force_prune", MethodError, message, network(), method=scoring(score))


def test_scores_of_other_kinds_are_refused_or_taken_as_they_are() -> None:
    for score, message in (
        (lambda w, g: g.to("meta"), "meta device, which has no values$"),
        (lambda w, g: g + 1j, "expected real scores .*; take their .abs"),
    ):
        refused("saliency", MethodError, message, network(), method=scoring(score))
    plain = saliency(network(), [batch()], scoring(lambda w, g: g.abs()))
    for score in (
        lambda w, g: g.abs().to_sparse(),
        lambda w, g: nn.Parameter(g.abs()),
        lambda w, g: g.abs().T.contiguous().T,
    ):
        found = saliency(network(), [batch()], scoring(score))
        assert all(torch.equal(found[n], s) for n, s in plain.items())
        assert not any(s.requires_grad for s in found.values())
    by_eights = scoring(lambda w, g: g.abs().to(torch.float8_e4m3fn))
    assert prune_it(network(), method=by_eights).sparsity == 0.5


@pytest.mark.parametrize("signal", [None, 3.0, [1, 2], torch.ones(2)])
def test_a_measure_that_returns_no_mapping_is_named(signal: Any) -> None:
    measure = classmethod(lambda cls, probe: signal)
    message = (
        r"^Mine\.measure: expected a mapping of parameter names to signals, .*got "
    )
    method = scoring(taylor, measure=measure)
    refused("force_prune", TypeError, message, network(), method=method)


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
    options = {"method": method, "loader": [batch(next(model.parameters()).dtype)]}
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
            {"loader": [(batch()[0].fill_(NAN), batch()[1])]},
            network,
            "there is a NaN in the batch; look at the data$",
        ),
        (
            {"loader": [(batch()[0].fill_(INF), batch()[1])]},
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
                "loader": [batch(torch.float64)],
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
        return self[2](self[1](first))  # type: ignore[no-any-return]


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
        force_prune(model, [batch()], 0.5, progress=False)
    if sys.version_info >= (3, 11):
        assert "pass forward=" in "".join(caught.value.__notes__)


def test_quantised_layers_are_called_so() -> None:
    model = nn.Sequential(torch.ao.nn.quantized.Linear(6, 4))
    with pytest.raises(NothingToPruneError, match="prune the model before it is quant"):
        force_prune(model, [batch()], 0.5, progress=False)


@pytest.mark.parametrize("key", ["weight_mask", "weight_orig"])
@pytest.mark.parametrize("kind", ["buffer", "parameter", "attribute"])
def test_a_name_that_a_layer_uses_itself_is_not_taken(kind: str, key: str) -> None:
    model = network()
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


# Networks that are called otherwise


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x) + self.b(y)  # type: ignore[no-any-return]


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
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=20, intermediate_size=8, num_labels=4, **sizes)
    return BertForSequenceClassification(config).eval()


X, Y = batch()
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
        return self.fc(self.cast(self.stem(x).relu()))  # type: ignore[no-any-return]


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


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"schedule": lambda step, steps: 0.5},
            r"schedule: .*got <lambda>\(step, steps\)",
        ),
        (
            {"schedule": lambda: 0.5},
            r"schedule: expected a callable .*got <lambda>\(\)$",
        ),
        (
            {"schedule": lambda a, b, c, d: 0.5},
            r"schedule: .*got <lambda>\(a, b, c, d\)$",
        ),
        ({"schedule": lambda *, step: 0.5}, r"schedule: .*got <lambda>\(\*, step\)$"),
        (
            {"schedule": lambda *_: None},
            "schedule: expected a density, .*, got NoneType",
        ),
        ({"schedule": lambda *_: [0.5]}, "schedule: expected a density, .*, got list$"),
        ({"schedule": lambda *_: torch.ones(2)}, "schedule: .* a number, got Tensor$"),
        (
            {"loss_fn": nn.MSELoss},
            r"loss_fn: .*got the class MSELoss; pass .*MSELoss\(\)$",
        ),
        (
            {"loss_fn": lambda o: o.sum()},
            r"loss_fn: expected .* loss, got <lambda>\(o\)$",
        ),
        ({"loss_fn": lambda a, b, c: a}, r"loss_fn: .*, got <lambda>\(a, b, c\)$"),
        ({"forward": lambda b: b}, r"forward: expected .* loss, got <lambda>\(b\)$"),
        (
            {"forward": nn.CrossEntropyLoss},
            r"forward: .*got the class CrossEntropyLoss;",
        ),
    ],
)
def test_a_function_of_other_arguments_is_told_those_it_has(
    options: dict[str, Any], message: str
) -> None:
    refused("force_prune", TypeError, f"^{message}", network(), **options)


def test_a_schedule_of_sparsities_is_recognised() -> None:
    message = r"must be 0\.2, got 0\.8, which is the sparsity; return 1 minus it$"
    options = {
        "sparsity": 0.8,
        "schedule": lambda step, steps, d: step / steps * (1 - d),
    }
    refused("force_prune", ValueError, message, network(), **options)


def cosine(step: int, steps: int, density: float) -> float:
    return 1 - (1 - density) * step / steps


@pytest.mark.parametrize(
    ("method", "schedule", "said"),
    [
        ("snip_it", "linear", "schedule='linear' was not used: snip_it has its own"),
        ("snip_it", cosine, "schedule=cosine was not used: snip_it has its own"),
        ("snip_it", "exponential", None),
        ("snip_it", "snip_it", None),
        ("snip", "linear", "schedule='linear' was not used: snip has a single step"),
        ("random", cosine, "schedule=cosine was not used: random has a single step"),
        ("force", "linear", None),
        ("force", cosine, None),
    ],
)
def test_a_schedule_that_a_method_does_not_take_is_said_not_to_be_used(
    method: str, schedule: Any, said: str | None
) -> None:
    report = prune_it(network(), method=method, schedule=schedule)
    assert [t for t in report.warnings if "schedule" in t] == ([said] if said else [])


@pytest.mark.parametrize("method", ["snip_it", "snip", "force"])
def test_a_schedule_is_checked_also_where_it_is_not_used(method: str) -> None:
    for schedule, error in (("cosine", ValueError), (3, TypeError)):
        options = {"method": method, "schedule": schedule}
        refused("force_prune", error, "^schedule: expected ", network(), **options)


@pytest.mark.parametrize(
    ("generator", "came"),
    [
        (0, r"got int; pass torch\.Generator\(\)\.manual_seed\(0\)$"),
        (7, r"got int; pass torch\.Generator\(\)\.manual_seed\(7\)$"),
        (np.random.default_rng(0), r"got Generator; pass torch\.Generator"),
        (torch.tensor(0), "got Tensor; pass"),
        ("cpu", "got str; pass"),
    ],
)
def test_what_is_no_generator_is_told_how_to_make_one(
    generator: Any, came: str
) -> None:
    masks = {"weight": torch.eye(3) == 1}
    with pytest.raises(
        TypeError, match=f"^generator: expected a torch.Generator, {came}"
    ):
        shuffle_masks(masks, generator)


@pytest.mark.parametrize("fresh", [0, None, network, {}])
def test_what_is_no_fresh_model_is_not_blamed_on_the_model(fresh: Any) -> None:
    model = network()
    prune_it(model)
    with (
        unchanged(model),
        pytest.raises(TypeError, match=r"^fresh: expected a torch\.nn"),
    ):
        reinitialise(model, fresh)


# Weights that are computed


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


def parametrised() -> nn.Module:
    layer = nn.Linear(6, 4)
    parametrize.register_parametrization(layer, "weight", Positive())
    return layer


COMPUTED: dict[str, tuple[Callable[[], nn.Module], str, Callable[[Any], Any]]] = {
    "weight norm of old": (
        lambda: nn.utils.weight_norm(nn.Linear(6, 4)),
        r'\(module, "weight_v"\)',
        lambda m: (m, "weight_v"),
    ),
    "spectral norm of old": (
        lambda: nn.utils.spectral_norm(nn.Linear(6, 4)),
        r'\(module, "weight_orig"\)',
        lambda m: (m, "weight_orig"),
    ),
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Linear(6, 4)),
        r'\(module\.parametrizations\.weight, "original1"\)',
        lambda m: (m.parametrizations.weight, "original1"),
    ),
    "spectral norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(6, 4)),
        r'\(module\.parametrizations\.weight, "original"\)',
        lambda m: (m.parametrizations.weight, "original"),
    ),
    "a parametrisation": (
        parametrised,
        r'\(module\.parametrizations\.weight, "original"\)',
        lambda m: (m.parametrizations.weight, "original"),
    ),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_weight_that_is_computed_says_from_what(name: str) -> None:
    build, instead, pair = COMPUTED[name]
    torch.manual_seed(0)
    model = nn.Sequential(build(), nn.ReLU(), nn.Linear(4, 4))
    computed = (
        r"Linear has no parameter 'weight': it is computed from others whenever the "
        rf"module is called; name what it is computed from, as a rule {instead}$"
    )
    options = {"parameters": [(model[0], "weight")]}
    refused("force_prune", ValueError, rf"^parameters: \w*{computed}", model, **options)
    with unchanged(model), pytest.raises(ValueError, match=rf"^\w*{computed}"):
        SNIP.apply(model[0], "weight", 0.5, importance_scores=torch.ones(4, 6))
    alone = nn.Sequential(build())
    message = rf"^nothing to prune: \w*{computed}"
    refused("force_prune", ValueError, message, alone)
    # What it names can be pruned, and prunes the weight.
    prune_it(model, parameters=[pair(model[0])], sparsity=0.5, method="magnitude")
    model(X)
    assert int((model[0].weight == 0).sum()) == 12


# Parts in TorchScript


def with_part(part: nn.Module, **more: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), part, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )


def block() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())


def traced(part: nn.Module) -> nn.Module:
    return torch.jit.trace(part, torch.randn(4, 8, 6, 6))  # type: ignore[no-any-return,no-untyped-call]


PARTS: dict[str, Callable[[], nn.Module]] = {
    "a function": lambda: torch.jit.script(nn.ReLU()),
    "a layer": lambda: torch.jit.script(nn.Conv2d(8, 8, 1)),
    "a block": lambda: torch.jit.script(block()),
    "a traced block": lambda: traced(block()),
    "a traced layer": lambda: traced(nn.Conv2d(8, 8, 1)),
    "within a module": lambda: nn.Sequential(torch.jit.script(block()), nn.ReLU()),
}
PICTURES = torch.randn(4, 3, 8, 8), torch.arange(4)


@pytest.mark.parametrize("method", ["force", "grasp", "snip_it", "magnitude", Taylor])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_in_torchscript_stays_as_it_is(part: str, method: Any) -> None:
    model = with_part(PARTS[part]())
    modes = [module.training for module in model.modules()]
    inner = {n: t.clone() for n, t in model[1].state_dict().items()}
    scores = saliency(model, [PICTURES], method)
    assert list(scores) == ["0.weight", "4.weight"]
    assert len(diagnose(model, [PICTURES], method).stages) == 2
    options = {"loader": [PICTURES], "method": method, "on_collapse": "warn"}
    report = prune_it(model, **options)
    assert [layer.name for layer in report.layers] == ["0.weight", "4.weight"]
    masks = get_masks(model)
    assert sum(int(mask.sum()) for mask in masks.values()) == report.kept == 128
    assert modes == [module.training for module in model.modules()]
    for name, value in model[1].state_dict().items():
        assert torch.equal(value, inner[name]), name
    # It trains, and is loaded, as any other.
    model(PICTURES[0]).sum().backward()
    fresh = with_part(PARTS[part]())
    load_pruned_state_dict(fresh, model.state_dict())
    other = with_part(PARTS[part]())
    apply_masks(other, masks)
    assert str(sparsity_report(other))
    make_permanent(other)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(PICTURES[0]).square().sum().backward()
    optimizer.step()
    assert int((other[0].weight == 0).sum() + (other[4].weight == 0).sum()) == 128


def test_a_part_in_torchscript_is_scored_through() -> None:
    # As what it was made of would be.
    torch.manual_seed(3)
    part = block()
    plain, model = with_part(part), with_part(torch.jit.script(part))
    chosen = [(plain[0], "weight"), (plain[4], "weight")]
    for method in ("snip", "grasp"):
        expected = saliency(plain, [PICTURES], method, parameters=chosen)
        found = saliency(model, [PICTURES], method)
        for name, score in found.items():
            torch.testing.assert_close(score, expected[name])


def test_a_weight_in_torchscript_is_refused_by_name() -> None:
    model = with_part(torch.jit.script(block()))
    part = model[1]
    inner = dict(part.named_modules())["0"]
    for inside, kind in ((inner, "Conv2d"), (part, "Sequential")):
        options = {"parameters": [(inside, "weight")], "loader": [PICTURES]}
        message = (
            rf"^parameters: 'weight' belongs to a {kind} that is TorchScript, whose "
            "weights cannot be replaced; leave it out, or prune the model before torch"
        )
        with pytest.raises(ValueError, match=message):
            prune_it(model, **options)
    with pytest.raises(
        ValueError, match=r"^SynFlow: .* part in TorchScript \(1\); take"
    ):
        prune_it(model, method="synflow", loader=[PICTURES])
    with pytest.raises(
        ValueError, match=r"^'weight' belongs to a Conv2d that is Torch"
    ):
        SNIP.apply(inner, "weight", 0.5, importance_scores=torch.ones(8, 8, 1, 1))
    alone = nn.Sequential(torch.jit.script(nn.Linear(6, 4)))
    message = "no convolution or linear weight outside of its TorchScript parts; name"
    with pytest.raises(ValueError, match=message):
        prune_it(alone)


def test_a_model_with_a_part_in_torchscript_gets_new_values_and_no_smaller() -> None:
    model, fresh = (with_part(torch.jit.script(block())) for _ in range(2))
    prune_it(model, loader=[PICTURES])
    masks = get_masks(model)
    with torch.no_grad():
        for tensor in fresh.state_dict().values():
            tensor.add_(1)
    reinitialise(model, fresh)
    for name, value in fresh.state_dict().items():
        mine = model.state_dict()
        if name in masks:
            assert torch.equal(mine[f"{name}_orig"], value)
        else:
            assert torch.equal(mine[name], value)
    message = "expected one in Python, .* but 1 is TorchScript; put what it was made of"
    with unchanged(model), pytest.raises(CompactionError, match=message):
        compact(model, PICTURES[0])
    with unchanged(fresh), pytest.raises(CompactionError, match=message):
        snap_prune(fresh, PICTURES[0], [PICTURES], 0.5)


def test_nothing_of_this_warns_where_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_it(network(), method=Taylor, sparsity=0.2)
