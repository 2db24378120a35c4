"""Batches, losses and models that cannot be scored: one clear error, and no change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from faults import (
    BOTH,
    INF,
    INPUTS,
    NAN,
    TARGETS,
    Batch,
    batch,
    network,
    prune_it,
    sentences,
    words,
)
from state import Identical, unchanged
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot
from torch.nn.utils import parametrizations


@contextmanager
def same_objects(model: nn.Module) -> Iterator[None]:
    """``unchanged`` for models with weights whose values cannot be read."""

    def objects() -> list[tuple[str, str, object]]:
        return [
            (name, f"{key}/{item}", Identical(content))
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            for item, content in (
                value.items() if isinstance(value, dict) else [("", value)]
            )
        ]

    before = objects()
    yield
    assert objects() == before


LOSS_FAILED = "make the targets what loss_fn expects, or pass loss_fn= or forward=$"
NAN_BATCH = "^the loss is nan at step 1: there is a NaN in the batch; look at the data$"


@dataclass(frozen=True)
class Scored:
    """Something that cannot be scored: ``force_prune`` and ``saliency`` refuse it.

    Attributes:
        error: The exception.
        message: A pattern that its text holds.
        options: Of both functions.
        model: Makes the network.
    """

    error: type[Exception]
    message: str
    options: dict[str, Any] = field(default_factory=dict)
    model: Callable[[], nn.Module] = network


def of_batch(error: type[Exception], message: str, *one: Any, **options: Any) -> Scored:
    model = options.pop("model", network)
    return Scored(error, message, {"loader": [one], **options}, model)


def image_network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 10))


def bfloat16() -> nn.Module:
    return network().bfloat16()


class Unreadable:
    """A loader whose data set cannot be handed to workers."""

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("h5py objects cannot be pickled")


MSE = {"loss_fn": mse_loss}
OUTPUTS = one_hot(TARGETS, 4).float()

BATCHES: dict[str, Scored] = {
    "nan targets": of_batch(
        RuntimeError,
        NAN_BATCH,
        INPUTS,
        OUTPUTS * NAN,
        **MSE,
    ),
    "infinite targets": of_batch(
        RuntimeError,
        "^the loss is inf at step 1: there is an inf in the batch, or an overflow in "
        "the network or in the loss, in float32; look at the data, .* in float64",
        INPUTS,
        OUTPUTS + INF,
        **MSE,
    ),
    "nan in a second batch": Scored(
        RuntimeError,
        NAN_BATCH,
        {"loader": [batch(), (INPUTS * NAN, TARGETS)], "batches": 2},
    ),
    "complex targets": of_batch(
        ValueError,
        r"^loss_fn failed on outputs float32\(5, 4\) and targets complex64\(5,\): .*"
        + LOSS_FAILED,
        INPUTS,
        TARGETS + 0j,
    ),
    "no targets": of_batch(
        ValueError, f"and targets a NoneType: .*{LOSS_FAILED}", INPUTS, None
    ),
    "a dictionary of targets": of_batch(
        ValueError, f"and targets a dict: .*{LOSS_FAILED}", INPUTS, {"y": TARGETS}
    ),
    # What a network says of its inputs is left as it is.
    "no inputs": of_batch(TypeError, "must be Tensor, not NoneType", None, TARGETS),
    "arrays": of_batch(TypeError, "not numpy.ndarray", INPUTS.numpy(), TARGETS),
    "float64 for a float32 model": of_batch(
        RuntimeError, "Double and Float", INPUTS.double(), TARGETS
    ),
    "integers for a float32 model": of_batch(
        RuntimeError, "Long and Float", INPUTS.long(), TARGETS
    ),
    "float32 for a bfloat16 model": of_batch(
        RuntimeError, "Float and BFloat16", INPUTS, TARGETS, model=bfloat16
    ),
    "images of another size": of_batch(
        RuntimeError,
        r"\(4x196 and 144x10\)",
        torch.ones(4, 3, 9, 9),
        torch.arange(4),
        model=image_network,
    ),
    "images of another colour": of_batch(
        RuntimeError,
        "to have 3 channels, but got 1",
        torch.ones(4, 1, 8, 8),
        torch.arange(4),
        model=image_network,
    ),
    "one sample for a batch norm": of_batch(
        ValueError, "Expected more than 1 value per channel", INPUTS[:1], TARGETS[:1]
    ),
    "no samples": of_batch(
        ValueError,
        r"^loader: expected at least one sample in each batch, got inputs "
        r"float32\(0, 6\); leave empty batches out$",
        INPUTS[:0],
        TARGETS[:0],
    ),
    "words for synflow": of_batch(
        ValueError,
        r"^SynFlow: expected .* one floating-point tensor .*, got int64\(5, 5\); take",
        *sentences(),
        model=words,
        method="synflow",
    ),
    # Loaders that are none.
    "a pair for a list of pairs": Scored(
        ValueError,
        r"^loader: expected batches \(inputs, targets\), got float32\(5, 6\); for "
        r"other batches pass forward=, a callable \(model, batch\) -> loss$",
        {"loader": batch()},
    ),
    "a dictionary": Scored(
        ValueError, "^loader: .*, got a str; .*forward=", {"loader": {"x": INPUTS}}
    ),
    "a tensor": Scored(
        ValueError, r"^loader: .*, got float32\(6,\); ", {"loader": INPUTS}
    ),
    "no loader": Scored(
        TypeError,
        r"^loader: expected an iterable of batches \(a DataLoader, a list\), got None",
        {"loader": None},
    ),
    # What a loader says itself is left as it is, too.
    "a loader that cannot be read": Scored(
        TypeError, "^h5py objects cannot be pickled$", {"loader": Unreadable()}
    ),
}


# Losses


class Returns(nn.Linear):
    """A network of 6 inputs and 4 outputs that returns something else."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__(6, 4)
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(super().forward(x))


ONE_NUMBER = "^loss_fn: expected a loss of one number, got "

NO_GRADIENT = (
    "^loss_fn: the loss does not depend on the weights through autograd; compute it "
    "from the model's outputs, without detach or no_grad$"
)

LOSSES: dict[str, Scored] = {
    "a constant": Scored(
        RuntimeError, NO_GRADIENT, {"loss_fn": lambda *_: torch.tensor(1.0)}
    ),
    "a constant that needs a gradient": Scored(
        RuntimeError,
        r"^no gradient reached 0\.weight, 3\.weight at step 1: .*leave it out with "
        "parameters=, or pass a forward= that uses it$",
        {"loss_fn": lambda *_: torch.tensor(1.0, requires_grad=True)},
    ),
    "the accuracy": Scored(
        RuntimeError, NO_GRADIENT, {"loss_fn": lambda o, t: (o.argmax(1) == t).sum()}
    ),
    "a detached loss": Scored(
        RuntimeError,
        NO_GRADIENT,
        {"loss_fn": lambda o, t: cross_entropy(o.detach(), t)},
    ),
    "a loss a sample": Scored(
        ValueError,
        ONE_NUMBER + r"float32\(5,\)$",
        {"loss_fn": lambda o, t: cross_entropy(o, t, reduction="none")},
    ),
    "a loss of no number": Scored(
        ValueError, ONE_NUMBER + r"float32\(0,\)$", {"loss_fn": lambda o, t: o[:0, 0]}
    ),
    "a complex loss": Scored(
        ValueError,
        r"^loss_fn: expected a real loss, got complex64\(\)$",
        {"loss_fn": lambda o, t: cross_entropy(o, t) + 0j},
    ),
    "a float": Scored(ValueError, ONE_NUMBER + "a float$", {"loss_fn": lambda *_: 1.0}),
    "a bool": Scored(ValueError, ONE_NUMBER + "a bool$", {"loss_fn": lambda *_: True}),
    "a backward pass": Scored(
        ValueError,
        ONE_NUMBER + "a NoneType$",
        {"loss_fn": lambda o, t: cross_entropy(o, t).backward()},
    ),
    "the class of a loss": Scored(
        TypeError,
        r"^loss_fn: expected a callable .*, got the class CrossEntropyLoss; pass an "
        r"instance, CrossEntropyLoss\(\)$",
        {"loss_fn": nn.CrossEntropyLoss},
    ),
    "a loss of outputs alone": Scored(
        TypeError,
        r"^loss_fn: expected a callable \(outputs, targets\) -> loss, got <lambda>\(o",
        {"loss_fn": lambda outputs: outputs.sum()},
    ),
    "a forward of the model alone": Scored(
        TypeError,
        r"^forward: expected a callable \(model, batch\) -> loss, got <lambda>\(mode",
        {"forward": lambda model: 1},
    ),
    "a forward without the model": Scored(
        RuntimeError,
        "^forward: the loss does not depend on the weights through autograd;",
        {"forward": lambda model, batch: batch[0].sum()},
    ),
    "a forward that raises": Scored(
        ZeroDivisionError, "^division by zero$", {"forward": lambda *_: 1 / 0}
    ),
    "two outputs": Scored(
        ValueError,
        "^loss_fn failed on outputs a tuple of 2 and .*; pass a loss_fn= that takes "
        "such outputs, or forward=$",
        model=lambda: Returns(lambda y: (y, y)),
    ),
    "no output": Scored(
        ValueError, "^loss_fn failed on outputs a NoneTy", model=lambda: Returns(print)
    ),
    "detached outputs": Scored(
        RuntimeError, NO_GRADIENT, model=lambda: Returns(Tensor.detach)
    ),
    "detached outputs for synflow": Scored(
        RuntimeError,
        r"^SynFlow: expected outputs that depend on the weights through autograd, got "
        r"float64\(1, 4\) without a gradient; return them without detach or no_grad$",
        {"method": "synflow"},
        lambda: Returns(Tensor.detach),
    ),
    "no output for synflow": Scored(
        ValueError,
        "^SynFlow: expected a model whose outputs are tensors, got a NoneType; take an",
        {"method": "synflow"},
        lambda: Returns(print),
    ),
}


# Models


def with_value(module: int, name: str, value: float) -> Callable[[], nn.Module]:
    """A network with a number in one of its tensors that is none."""

    def build() -> nn.Module:
        model = network()
        with torch.no_grad():
            getattr(model[module], name).view(-1)[0] = value
        return model

    return build


def with_buffer(value: Tensor) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = network()
        model.register_buffer("attention", value)
        return model

    return build


def overflowing() -> nn.Module:
    model = network()
    with torch.no_grad():
        model[3].weight.fill_(6e4)
        model[3].weight[::2] *= -1
    return model.half()


class Skipping(nn.Module):
    """Uses its layer in the first pass only."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.late = nn.Linear(6, 4), nn.Linear(6, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.body(x) + (self.late(x) if self.calls == 1 else 0)


def half_batch() -> Batch:
    return INPUTS.half(), TARGETS


def integer_linear() -> nn.Module:
    layer = nn.Linear(6, 4)
    layer.weight = nn.Parameter(torch.ones(4, 6, dtype=torch.int8), False)
    return layer


NO_FLOAT = "; only floating-point weights can be scored: prune before quantising$"

MODELS: dict[str, Scored] = {
    "nan in a bias": Scored(
        RuntimeError,
        r"^the loss is nan at step 1: there is a NaN or inf in 0\.bias; look at the in",
        model=with_value(0, "bias", NAN),
    ),
    "nan in a normalisation": Scored(
        RuntimeError,
        r"^the loss is nan at step 1: there is a NaN or inf in 1\.weight;",
        model=with_value(1, "weight", NAN),
    ),
    "nan in running statistics": Scored(
        RuntimeError,
        r"^the loss is nan at step 1: there is a NaN or inf in 1\.running_mean; look",
        model=lambda: with_value(1, "running_mean", NAN)().eval(),
    ),
    # Neither the mask nor the statistics, which batch norm takes from the batch.
    "nan in the batch and inf in an attention mask": Scored(
        RuntimeError,
        NAN_BATCH,
        {"loader": [(INPUTS * NAN, TARGETS)]},
        with_buffer(torch.tensor([0, -INF])),
    ),
    "nan in a normalisation under synflow": Scored(
        RuntimeError,
        r"^the saliency of 0\.weight, 3\.weight is not finite at step 1: there is a NaN"
        r" or inf in 1\.weight; look at the initialisation, or where these values come",
        {"method": "synflow"},
        with_value(1, "weight", NAN),
    ),
    "inf in a weight under magnitude": Scored(
        RuntimeError,
        r"^the saliency of 0\.weight is not finite at step 1",
        {"method": "magnitude"},
        with_value(0, "weight", -INF),
    ),
    "16 bits that overflow": Scored(
        RuntimeError,
        "^the loss is nan at step 1: .* or an overflow in the network or in the loss, "
        "in float16; .*, or score in float32 instead of 16 bits$",
        {"loader": [half_batch()]},
        overflowing,
    ),
    "a gradient of 16 bits that overflows": Scored(
        RuntimeError,
        r"^the saliency of 0\.weight, 3\.weight is not finite at step 1: its gradient "
        ".*, or score in float32 instead of 16 bits$",
        {"loader": [half_batch()], "loss_fn": lambda o, t: 1e6 * o.float().sum()},
        lambda: network().half(),
    ),
    "no prunable layer": Scored(
        ValueError,
        "^nothing to prune: the model has no convolution or linear weight; name what ",
        model=lambda: nn.Sequential(nn.BatchNorm1d(6)),
    ),
    "every weight parametrised": Scored(
        ValueError,
        "^nothing to prune: ParametrizedLinear has no parameter 'weight': it is comp",
        model=lambda: parametrizations.spectral_norm(nn.Linear(6, 4)),
    ),
    "integer weights": Scored(
        ValueError, f"^weight has dtype torch.int8{NO_FLOAT}", model=integer_linear
    ),
    "complex weights": Scored(
        ValueError,
        f"^weight has dtype torch.complex64{NO_FLOAT}",
        model=lambda: nn.Linear(6, 4, dtype=torch.complex64),
    ),
}

SCORED = {"batch": BATCHES, "loss": LOSSES, "model": MODELS}
TABLE = [(kind, name) for kind, table in SCORED.items() for name in table]


@pytest.mark.parametrize(("kind", "name"), TABLE)
@pytest.mark.parametrize("call", BOTH)
def test_what_cannot_be_scored_is_one_clear_error_and_changes_nothing(
    call: str, kind: str, name: str
) -> None:
    row = SCORED[kind][name]
    model = row.model()
    with unchanged(model), pytest.raises(row.error, match=row.message):
        BOTH[call](model, **row.options)


def sparse_layer(layout: torch.layout) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = network()
        weight = model[0].weight.detach().to_sparse(layout=layout)
        model[0].weight = nn.Parameter(weight)
        return model

    return build


SPARSE = r"^0\.weight is sparse \(torch\.sparse_.*\): make it dense with \.to_dense"


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("call", BOTH)
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: network().to("meta"),
            r"^0\.weight is on the meta device and has no values: materialise and init",
        ),
        (
            lambda: nn.Sequential(network(), nn.LazyLinear(4)),
            r"^1\.weight has no shape yet \(a lazy module\): run one batch through the",
        ),
        (sparse_layer(torch.sparse_coo), SPARSE),
        (sparse_layer(torch.sparse_csr), SPARSE),
    ],
    ids=["meta", "lazy", "sparse", "sparse rows"],
)
def test_weights_without_values_are_named(
    build: Callable[[], nn.Module], message: str, call: str
) -> None:
    model = build()
    with same_objects(model), pytest.raises(ValueError, match=message):
        BOTH[call](model)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_a_loss_of_nan_beside_sparse_tensors_is_an_error_all_the_same() -> None:
    model = with_buffer(torch.eye(3).to_sparse_csr())()
    model.other = nn.Parameter(torch.eye(3).to_sparse(), False)
    message = NAN_BATCH
    with same_objects(model), pytest.raises(RuntimeError, match=message):
        prune_it(model, loader=[(INPUTS * NAN, TARGETS)])


def test_a_weight_that_only_a_later_step_leaves_out_is_named_with_the_step() -> None:
    model = Skipping()
    message = r"^no gradient reached late\.weight at step 2: the loss does not use it"
    with unchanged(model), pytest.raises(RuntimeError, match=message):
        prune_it(model)
