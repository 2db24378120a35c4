"""What goes wrong, and where: one clear error, and a model that is what it was.

A row of a table is a call that fails, the error, and what its text says; where the
fault comes from outside (the network, the loader, Ctrl-C), it arrives as it was raised.
Arguments that ``test_errors.py`` has are not repeated here.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.model_selection  # noqa: F401 (its own imports may draw from random)
import timm
import torch
from networks import tiny_resnet
from safetensors.torch import save_file
from state import Identical, unchanged
from timm.models.vgg import VGG
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot
from torch.nn.utils import parametrizations, prune

from force_plugin import (
    FORCE,
    METHODS,
    SNIP,
    IterSNIP,
    LayerReport,
    SaliencyMethod,
    SparsityReport,
    apply_masks,
    force_prune,
    get_masks,
    load_masks,
    make_permanent,
    saliency,
    save_masks,
    sparsity_report,
)
from force_plugin.cli import main
from force_plugin.errors import CollapseError
from force_plugin.zoo import count_classes, digits, load_data, load_dataset, load_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*saliency of exactly 0 everywhere:UserWarning"),
]

NAN, INF = float("nan"), float("inf")
Batch = tuple[Any, Any]
ADVICE = "ake more steps, more batches, a lower sparsity or another method"
ONCE = "ake more batches, a lower sparsity or a method that prunes in steps"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))


def batch() -> Batch:
    return torch.linspace(-1, 1, 30).view(5, 6).sin(), torch.arange(5) % 4


def words(sparse: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    embedding = nn.Embedding(10, 6, sparse=sparse)
    return nn.Sequential(embedding, nn.Flatten(), nn.Linear(30, 8), nn.Linear(8, 4))


def sentences() -> Batch:
    return torch.arange(25).view(5, 5) % 10, TARGETS


def prune_it(model: nn.Module, **options: Any) -> SparsityReport:
    """``force_prune`` in three steps, quietly."""
    usual = {"loader": [batch()], "sparsity": 0.5, "steps": 3, "progress": False}
    return force_prune(model, **{**usual, **options})


def score_it(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    return saliency(model, **{"loader": [batch()], **options})


BOTH: dict[str, Callable[..., object]] = {"force_prune": prune_it, "saliency": score_it}


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


# Arguments: of every function, another type or value than it takes.


@dataclass(frozen=True)
class Fault:
    """A call that fails.

    Attributes:
        call: The call, given a network.
        error: The exception.
        message: A pattern that its text holds.
        model: Makes the network.
    """

    call: Callable[[Any], object]
    error: type[BaseException]
    message: str
    model: Callable[[], nn.Module] = network


def pruned() -> nn.Sequential:
    model = network()
    prune_it(model, sparsity=0.25)
    return model


def permanent() -> nn.Sequential:
    model = pruned()
    make_permanent(model)
    return model


def scored(layer: nn.Module, **options: Any) -> object:
    """``FORCE.apply`` with scores."""
    usual = {
        "name": "weight",
        "amount": 0.5,
        "importance_scores": torch.linspace(0, 1, 48).view(8, 6),
    }
    return FORCE.apply(layer, **{**usual, **options})


def density(value: Any) -> Callable[[int, int, float], Any]:
    """A schedule with a wrong first density."""
    return lambda step, steps, last: value if step == 1 else last


def report(*kept: int) -> SparsityReport:
    return SparsityReport(
        tuple(LayerReport(f"{i}.weight", (9,), k, 9) for i, k in enumerate(kept))
    )


STRANGER = nn.Linear(6, 8)
MASK = {"0.weight": torch.ones(8, 6)}
NO_NUMBER = r"sparsity: expected a number, got "
NO_INTEGER = r": expected an integer, got "
NO_METHOD = r"^method: expected a name or a subclass of SaliencyMethod, got "
COLLAPSE = r'^on_collapse: expected "raise" or "warn", got '
NO_PAIRS = r'^parameters: expected pairs \(module, "weight"\) .*, got '
NO_MASKS = r"^masks: expected a mapping of parameter names to tensors, got "
NO_MODULE = r"^model: expected a torch.nn.Module, got "
NO_PATH = r"expected str, bytes or os.PathLike object, not "
TO_COMPARE = "^compare: expected a mapping of labels to reports, got "
UNPRUNED = (
    r"^make_permanent: expected a model pruned with torch.nn.utils.prune, or .*, got "
    "one without any mask or zero$"
)

ARGUMENTS: dict[str, Fault] = {
    # force_prune
    "a sparsity in a list": Fault(
        lambda m: prune_it(m, sparsity=[0.5]), TypeError, NO_NUMBER + "list$"
    ),
    "a sparsity in a tensor": Fault(
        lambda m: prune_it(m, sparsity=torch.tensor(0.5)), TypeError, NO_NUMBER + "Tens"
    ),
    "a complex sparsity": Fault(
        lambda m: prune_it(m, sparsity=0.5 + 0j), TypeError, NO_NUMBER + "complex$"
    ),
    "an infinite sparsity": Fault(
        lambda m: prune_it(m, sparsity=INF),
        ValueError,
        r"^sparsity: expected the fraction .*0 <= sparsity < 1, got inf$",
    ),
    "true steps": Fault(
        lambda m: prune_it(m, steps=True), TypeError, f"^steps{NO_INTEGER}bool$"
    ),
    "no steps": Fault(
        lambda m: prune_it(m, steps=None), TypeError, f"^steps{NO_INTEGER}NoneType$"
    ),
    "true batches": Fault(
        lambda m: prune_it(m, batches=True), TypeError, f"^batches{NO_INTEGER}bool$"
    ),
    "half a batch": Fault(
        lambda m: prune_it(m, batches=0.5), TypeError, f"^batches{NO_INTEGER}float$"
    ),
    "a schedule of nan": Fault(
        lambda m: prune_it(m, schedule=density(NAN)),
        ValueError,
        r"^schedule: densities must lie between 0 and 1 .*, got nan, 0\.5, 0\.5$",
    ),
    "a schedule of words": Fault(
        lambda m: prune_it(m, schedule=density("half")),
        TypeError,
        r"^schedule: expected a density, a number, got float, str$",
    ),
    "a schedule of densities": Fault(
        lambda m: prune_it(m, schedule=[0.9, 0.7, 0.5]),
        TypeError,
        r"^schedule: expected a name or a callable .*, got list$",
    ),
    "a method and its amount": Fault(
        lambda m: prune_it(m, method=FORCE(0.5)),
        TypeError,
        NO_METHOD + "an instance of FORCE; pass the class itself, method=FORCE$",
    ),
    "two methods": Fault(
        lambda m: prune_it(m, method=["force"]), TypeError, NO_METHOD + "list$"
    ),
    "a method of pytorch": Fault(
        lambda m: prune_it(m, method=prune.L1Unstructured),
        TypeError,
        NO_METHOD + 'L1Unstructured; method="magnitude" does the same$',
    ),
    "another on_collapse": Fault(
        lambda m: prune_it(m, on_collapse="ignore"), ValueError, COLLAPSE + "'ignore'$"
    ),
    "no on_collapse": Fault(
        lambda m: prune_it(m, on_collapse=None), ValueError, COLLAPSE + "None$"
    ),
    "a false on_collapse": Fault(
        lambda m: prune_it(m, on_collapse=False), ValueError, COLLAPSE + "False$"
    ),
    "a list for on_collapse": Fault(
        lambda m: prune_it(m, on_collapse=["warn"]), ValueError, COLLAPSE + r"\['warn'"
    ),
    "the model for its parameters": Fault(
        lambda m: prune_it(m, parameters=m), TypeError, NO_PAIRS + "Linear: Linear"
    ),
    "one pair for all": Fault(
        lambda m: prune_it(m, parameters=(m[0], "weight")), TypeError, NO_PAIRS
    ),
    "a dictionary of parameters": Fault(
        lambda m: prune_it(m, parameters=dict(m.named_parameters())),
        TypeError,
        NO_PAIRS + r"str: 0\.weight$",
    ),
    "weights without elements": Fault(
        lambda m: prune_it(m, parameters=[(m[0], "weight")]),
        ValueError,
        r"^nothing to prune: the weights \(0\.weight\) have no elements; name what to ",
        lambda: nn.Sequential(nn.Linear(6, 0), nn.Linear(0, 4)),
    ),
    "parameters that raise": Fault(
        lambda m: prune_it(m, parameters=(1 / 0 for _ in m)),
        ZeroDivisionError,
        "^division by zero$",
    ),
    # saliency
    "saliency of no method": Fault(
        lambda m: score_it(m, method=None), TypeError, NO_METHOD + "NoneType; leave it "
    ),
    "saliency of no batch": Fault(
        lambda m: score_it(m, batches=0), ValueError, "^batches: expected at least 1"
    ),
    "saliency by no loss": Fault(
        lambda m: score_it(m, loss_fn="mse"),
        TypeError,
        "^loss_fn: expected a callable, got str$",
    ),
    "saliency by no forward": Fault(
        lambda m: score_it(m, forward=m[0].weight),
        TypeError,
        "^forward: expected a callable, got Parameter$",
    ),
    "saliency of no parameters": Fault(
        lambda m: score_it(m, parameters=[]),
        ValueError,
        r"^nothing to prune: parameters= is empty; name what to prune with parameters=",
    ),
    "saliency of another model's parameters": Fault(
        lambda m: score_it(m, parameters=[(STRANGER, "weight")]),
        ValueError,
        "^parameters: a Linear given with 'weight' is not part of the model; take",
    ),
    # masks
    "a report for masks": Fault(
        lambda m: apply_masks(m, sparsity_report(m)), TypeError, NO_MASKS + "SparsityR"
    ),
    "names for masks": Fault(
        lambda m: apply_masks(m, {"0.weight"}), TypeError, NO_MASKS + "set$"
    ),
    "masks for the model": Fault(
        lambda m: apply_masks(MASK, m), TypeError, NO_MODULE + "dict$"
    ),
    "a mask of statistics": Fault(
        lambda m: apply_masks(m, {"1.running_mean": torch.ones(8)}),
        ValueError,
        r"^masks: 1 of 1 names are no parameters of the model: "
        r"'1\.running_mean'; the model's own begin with 0\.weight, 0\.bias, 1\.weight$",
    ),
    "a mask of a module": Fault(
        lambda m: apply_masks(m, {"0": torch.ones(8, 6)}),
        ValueError,
        "no parameters of the model: '0';",
    ),
    "a mask by pytorch's name": Fault(
        lambda m: apply_masks(m, {"0.weight_orig": torch.ones(8, 6)}),
        ValueError,
        r"'0\.weight_orig' \(did you mean '0\.weight'\?\); the model's own begin with",
        pruned,
    ),
    "a mask of minus ones": Fault(
        lambda m: apply_masks(m, {"0.weight": -torch.ones(8, 6)}),
        ValueError,
        r"^masks: 0\.weight holds other values than 0 and 1$",
        pruned,
    ),
    "a mask of 255": Fault(
        lambda m: apply_masks(m, {"0.weight": torch.full((8, 6), 255).byte()}),
        ValueError,
        r"^masks: 0\.weight holds other values than 0 and 1$",
    ),
    "a path for masks to save": Fault(
        lambda m: save_masks("masks", MASK), TypeError, NO_MASKS + "str$"
    ),
    "a report to save": Fault(
        lambda m: save_masks(sparsity_report(m), "masks"), TypeError, NO_MASKS + "Spar"
    ),
    "no path to save to": Fault(
        lambda m: save_masks(MASK, None), TypeError, NO_PATH + "NoneType$"
    ),
    "masks to load masks from": Fault(
        lambda m: load_masks(MASK), TypeError, NO_PATH + "dict$"
    ),
    # make_permanent
    "nothing to make permanent": Fault(make_permanent, ValueError, UNPRUNED),
    "a permanent model made permanent": Fault(
        lambda m: make_permanent(m, hold_zeros=False), ValueError, UNPRUNED, permanent
    ),
    **{
        f"{type(wrong).__name__} made permanent": Fault(
            lambda m, wrong=wrong: make_permanent(wrong),
            TypeError,
            f"{NO_MODULE}{type(wrong).__name__}$",
        )
        for wrong in (None, MASK, "resnet18", nn.Linear)
    },
    # methods as pytorch calls them
    "a pruning of a module's name": Fault(
        lambda m: scored(m[0], name=None),
        ValueError,
        "^Linear has no parameter None; it has w",
    ),
    "a pruning of a layer without weight": Fault(
        lambda m: scored(m[2]), ValueError, "^Tanh has no parameter 'weight'; it has"
    ),
    "a pruning by a tensor": Fault(
        lambda m: scored(m[0], amount=torch.tensor(0.5)),
        TypeError,
        "^amount: expected a float or an int, got Tensor$",
        pruned,
    ),
    "a pruning of all and more": Fault(
        lambda m: scored(m[0], amount=INF),
        ValueError,
        r"^amount: expected a fraction in \[0, 1\] .*, got inf$",
        pruned,
    ),
    "a pruning by other scores": Fault(
        lambda m: scored(m[0], importance_scores=torch.ones(6, 8)),
        ValueError,
        r"^importance_scores: expected the shape of weight, \(8, 6\), got \(6, 8\)$",
        pruned,
    ),
    "a pruning by complex scores": Fault(
        lambda m: scored(m[0], importance_scores=torch.ones(8, 6) * 1j),
        ValueError,
        "^importance_scores: expected real numbers, got torch.complex64; take their",
        pruned,
    ),
    "a mask of nan scores": Fault(
        lambda m: SNIP(0.5).compute_mask(torch.full((3,), NAN), torch.ones(3)),
        ValueError,
        "^importance_scores: expected numbers, got NaN$",
    ),
    "a mask of more than there are": Fault(
        lambda m: SNIP(4).compute_mask(torch.ones(3), torch.ones(3)),
        ValueError,
        "^amount: 4 weights to remove, but only 3 are left$",
    ),
    # reports
    "a report of more than all": Fault(
        lambda m: LayerReport("fc", (9,), 10, 9),
        ValueError,
        "^fc: expected 0 <= kept <= total and total >= 1, got kept=10 and total=9$",
    ),
    "a report of nan": Fault(
        lambda m: LayerReport("fc", (9,), NAN, 9),
        ValueError,
        "^fc: .* got kept=nan and total=9$",
    ),
    "a report of no layers": Fault(
        lambda m: SparsityReport([]),
        ValueError,
        "^layers: a report needs at least one layer$",
    ),
    "a report of masks": Fault(
        lambda m: sparsity_report(get_masks(m)), TypeError, NO_MODULE + "dict$"
    ),
    "a comparison of other layers": Fault(
        lambda m: report(1, 2).plot(compare={"snip": sparsity_report(m)}),
        ValueError,
        r"^compare\['snip'\]: expected the same layers .* layer 1 is '3\.weight' inst",
    ),
    "a list to compare with": Fault(
        lambda m: report(1).plot(compare=[report(1)]), TypeError, TO_COMPARE + "list$"
    ),
    "a report to compare with": Fault(
        lambda m: report(1).plot(compare=report(1)), TypeError, TO_COMPARE + "Sparsity"
    ),
    "masks to compare with": Fault(
        lambda m: report(1).plot(compare={"snip": MASK}),
        TypeError,
        r"^compare\['snip'\]: expected a SparsityReport, got dict$",
    ),
    # the zoo
    "digits without a test": Fault(
        lambda m: digits(test_fraction=0.0), ValueError, r"\(0\.0, 1\.0\).*Got 0\.0"
    ),
    "classes of nothing": Fault(
        lambda m: count_classes(None),
        ValueError,
        "^dataset: NoneType does not say how many .*; give num_classes yourself$",
    ),
    "a model without a name": Fault(
        lambda m: load_model("", num_classes=3),
        ValueError,
        r"^model: expected a name from timm\.list_models\(\), got ''$",
    ),
    "a number for a model's name": Fault(
        lambda m: load_model(5, num_classes=3),
        TypeError,
        r"^model: expected a name from timm\.list_models\(\), got int$",
    ),
    "a number for a data set's name": Fault(
        lambda m: load_dataset(dataset=5),
        TypeError,
        "^dataset: expected a name such as 'torch/cifar10', got int$",
    ),
    "data for no model": Fault(
        lambda m: load_data(None, digits()[0]), TypeError, NO_MODULE + "NoneType$"
    ),
    "batches of no images": Fault(
        lambda m: load_data(m, digits()[0], batch_size=0),
        ValueError,
        "batch_size should be a positive integer value, but got batch_size=0",
    ),
    "fewer workers than none": Fault(
        lambda m: load_data(m, digits()[0], workers=-1),
        ValueError,
        "num_workers option should be non-negative",
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_wrong_argument_is_one_clear_error_and_changes_nothing(name: str) -> None:
    fault = ARGUMENTS[name]
    model = fault.model()
    with unchanged(model), pytest.raises(fault.error, match=fault.message):
        fault.call(model)


# Batches


INPUTS, TARGETS = batch()
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


class Extra(nn.Linear):
    """A layer of 6 inputs and 4 outputs that holds another parameter, too."""

    def __init__(self, extra: Tensor) -> None:
        super().__init__(6, 4)
        self.extra = nn.Parameter(extra, extra.is_floating_point())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * self.extra.sum().real.float()


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


# What is no fault, though it looks like one


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return network()


@pytest.mark.parametrize(
    "build",
    [lambda: network().requires_grad_(False), in_inference_mode],
    ids=["frozen", "made in inference mode"],
)
def test_a_model_without_gradients_is_pruned_as_any_other(
    build: Callable[[], nn.Module],
) -> None:
    model, usual = build(), network()
    needed = [parameter.requires_grad for parameter in model.parameters()]
    with unchanged(model):
        scores = score_it(model)
    for name, score in score_it(usual).items():
        assert torch.equal(scores[name], score)
    assert prune_it(model) == prune_it(usual)
    assert [parameter.requires_grad for parameter in model.parameters()] == needed


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_gets_the_same_masks_and_keeps_his_mode(
    mode: Callable[[], Any],
) -> None:
    model, usual = network(), network()
    prune_it(usual)
    with mode():
        with unchanged(model):
            score_it(model)
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        prune_it(model)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    for name, mask in get_masks(usual).items():
        assert torch.equal(get_masks(model)[name], mask)
    # None of its tensors is one that autograd refuses.
    cross_entropy(model(INPUTS), TARGETS).backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_error_under_a_caller_without_gradients_leaves_him_his_mode(
    mode: Callable[[], Any],
) -> None:
    model = network()
    with mode(), unchanged(model), pytest.raises(ValueError, match=r"^loader: "):
        prune_it(model, loader=[INPUTS])


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("method", ["force", "grasp", "grasp_it"])
def test_an_embedding_with_sparse_gradients_is_scored_as_one_without(
    method: str, batches: int
) -> None:
    scores = []
    for sparse in (False, True):
        model = words(sparse)
        chosen = [(model[0], "weight"), (model[3], "weight")]
        options = {"parameters": chosen, "method": method, "batches": batches}
        scores.append(score_it(model, loader=[sentences()], **options))
    for name, score in scores[0].items():
        assert torch.equal(scores[1][name], score)


def by_hand(name: str) -> Callable[[], nn.Module]:
    """A network of which PyTorch has pruned a layer."""

    def build() -> nn.Module:
        model = network()
        if name == "twice":
            prune.l1_unstructured(model[0], "weight", 0.1)
            prune.random_unstructured(model[0], "weight", 0.1)
        elif name == "structure":
            prune.ln_structured(model[0], "weight", 2, n=2, dim=0)
        else:
            prune.l1_unstructured(model[0], "bias", 2)
        return model

    return build


def tied() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 4)
    )
    model[3].weight = model[0].weight
    return model


def parametrised() -> nn.Module:
    model = network()
    model[0] = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(6, 6)),
        parametrizations.weight_norm(nn.Linear(6, 8)),
    )
    return model


def closed() -> nn.Module:
    model = network()
    nn.init.zeros_(model[1].weight)
    return model


def with_a_past() -> nn.Module:
    model = network()
    model[3].register_forward_hook(lambda *_: None)
    model[0].register_full_backward_hook(lambda *_: None)
    inputs, targets = batch()
    cross_entropy(model(inputs.requires_grad_()), targets).backward()
    model[0].bias.grad = None
    return model


WHERE: dict[str, Callable[[], nn.Module]] = {
    "fresh": network,
    "in evaluation mode": lambda: network().eval(),
    "frozen": lambda: network().requires_grad_(False),
    "made in inference mode": in_inference_mode,
    "with gradients and hooks": with_a_past,
    "with a closed gate": closed,
    "with tied weights": tied,
    "with parametrised weights": parametrised,
    "with complex parameters": lambda: Extra(torch.ones(3) + 1j),
    "with integer parameters": lambda: Extra(torch.ones(3).int()),
    "with empty parameters": lambda: Extra(torch.ones(3, 0)),
    "pruned": pruned,
    "pruned twice by pytorch": by_hand("twice"),
    "pruned by structure": by_hand("structure"),
    "with a pruned bias": by_hand("bias"),
}


@pytest.mark.parametrize("where", WHERE)
def test_a_healthy_pruning_of_any_of_these_models_keeps_exactly_what_is_asked(
    where: str,
) -> None:
    model = WHERE[where]()
    modes = [module.training for module in model.modules()]
    result = prune_it(model)
    assert result.kept == result.total // 2
    masks = get_masks(model)
    assert sum(int(masks[layer.name].sum()) for layer in result.layers) == result.kept
    assert [module.training for module in model.modules()] == modes


# Faults at a moment: what comes from outside arrives as it was, and leaves no trace


@dataclass
class Alarm:
    """Raises after so many calls, and ever after."""

    error: BaseException
    calls: int

    def __call__(self, *args: object) -> None:
        self.calls -= 1
        if self.calls < 0:
            raise self.error


@dataclass
class AlarmedLoader:
    alarm: Alarm

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(5):
            self.alarm()
            yield batch()


def in_the_loader(alarm: Alarm, model: nn.Module) -> dict[str, Any]:
    return {"loader": AlarmedLoader(alarm)}


def in_the_network(alarm: Alarm, model: nn.Module) -> dict[str, Any]:
    model.register_forward_pre_hook(alarm)
    return {}


def behind_a_layer(alarm: Alarm, model: nn.Module) -> dict[str, Any]:
    [*model.modules()][-1].register_forward_hook(alarm)
    return {}


def in_the_backward_pass(alarm: Alarm, model: nn.Module) -> dict[str, Any]:
    model.register_full_backward_pre_hook(alarm)
    return {}


def in_a_forward_function(alarm: Alarm, model: nn.Module) -> dict[str, Any]:
    def forward(network: nn.Module, one: Batch) -> Tensor:
        alarm()
        return cross_entropy(network(one[0]), one[1])

    return {"forward": forward}


def in_a_schedule(alarm: Alarm, model: nn.Module) -> dict[str, Any]:
    def schedule(step: int, steps: int, last: float) -> float:
        alarm()
        return 1 - step / steps * (1 - last)

    return {"schedule": schedule}


def in_a_score(alarm: Alarm, model: nn.Module) -> dict[str, Any]:
    class Mine(FORCE):
        @staticmethod
        def score(weight: Tensor, gradient: Tensor) -> Tensor:
            alarm()
            return FORCE.score(weight, gradient)

    return {"method": Mine}


def while_masks_are_applied(alarm: Alarm, model: nn.Module) -> dict[str, Any]:
    class Mine(FORCE):
        def __init__(self, amount: int) -> None:
            alarm()
            super().__init__(amount)

        def apply_mask(self, module: nn.Module) -> Tensor:
            alarm()
            return super().apply_mask(module)

    return {"method": Mine}


PLACES: dict[str, Callable[[Alarm, nn.Module], dict[str, Any]]] = {
    "in the loader": in_the_loader,
    "in the network": in_the_network,
    "behind a layer": behind_a_layer,
    "in the backward pass": in_the_backward_pass,
    "in a forward function": in_a_forward_function,
    "in a schedule": in_a_schedule,
    "in a score": in_a_score,
    "while masks are applied": while_masks_are_applied,
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("place", PLACES)
def test_an_error_or_ctrl_c_at_any_call_arrives_as_it_was_and_leaves_no_trace(
    place: str, where: str
) -> None:
    def pruning(error: BaseException, calls: int) -> tuple[nn.Module, Alarm, Any]:
        model, alarm = WHERE[where](), Alarm(error, calls)
        options = {"batches": 2, **PLACES[place](alarm, model)}
        return model, alarm, lambda: prune_it(model, **options)

    interrupt = KeyboardInterrupt("by the user")
    _, alarm, prune_ = pruning(interrupt, 1000)
    prune_()
    number = 1000 - alarm.calls
    assert number
    for calls in range(number):
        for error in (interrupt, OSError("disk")):
            model, _, prune_ = pruning(error, calls)
            with unchanged(model), pytest.raises(type(error)) as caught:
                prune_()
            assert caught.value is error


# Methods of one's own


def method_of(score: Callable[..., Any], **attributes: Any) -> type[SaliencyMethod]:
    return type("Mine", (SaliencyMethod,), {"score": staticmethod(score), **attributes})


class LaterOn(IterSNIP):
    """Gives one weight another score, from the second step on."""

    value = 0.0
    steps_seen = 0

    @classmethod
    def measure(cls, probe: Any) -> Any:
        cls.steps_seen = probe.step
        return super().measure(probe)

    @classmethod
    def score(cls, weight: Tensor, gradient: Tensor) -> Tensor:
        score = IterSNIP.score(weight, gradient)
        if cls.steps_seen > 1 and len(score) == 4:
            score[0, 0] = cls.value
        return score


METHODS_OF_ONES_OWN: dict[str, tuple[Any, type[Exception], str]] = {
    **{
        f"a score of {value} at step 2": (
            type("Mine", (LaterOn,), {"value": value}),
            RuntimeError,
            r"^the saliency of 3\.weight is not finite at step 2: .* Mine\.score makes",
        )
        for value in (NAN, INF, -INF)
    },
    "a score that raises": (
        method_of(lambda weight, signal: 1 / 0),
        ZeroDivisionError,
        "^division by zero$",
    ),
    "a score of the weight alone": (
        method_of(lambda weight: weight),
        TypeError,
        r"^Mine\.score: expected @staticmethod score\(weight, signal\), got <lambda>\(",
    ),
    "a score that is no tensor": (
        method_of(lambda weight, signal: weight.numpy()),
        ValueError,
        r"^Mine\.score: expected a tensor of the weight's shape \(8, 6\) for 0\.weight",
    ),
    "complex scores": (
        method_of(lambda weight, signal: weight * (1 + 1j)),
        ValueError,
        r"^Mine\.score: expected real scores for 0\.weight, got torch.complex64; take",
    ),
    "no score": (
        type("Mine", (SaliencyMethod,), {}),
        TypeError,
        r"^Mine has no score: expected a subclass of SaliencyMethod with a static sc",
    ),
    "no method at all": (SaliencyMethod, TypeError, "^SaliencyMethod has no score: "),
    "another number of steps": (
        method_of(lambda weight, signal: weight, steps=2.5),
        TypeError,
        r"^Mine\.steps: expected an integer, got float$",
    ),
    "another schedule": (
        method_of(lambda weight, signal: weight, schedule="cosine"),
        ValueError,
        r"^Mine\.schedule: expected one of exponential, linear, .*, got 'cosine'$",
    ),
}


@pytest.mark.parametrize("name", METHODS_OF_ONES_OWN)
def test_a_method_of_ones_own_that_fails_changes_nothing(name: str) -> None:
    method, error, message = METHODS_OF_ONES_OWN[name]
    model = network()
    with unchanged(model), pytest.raises(error, match=message):
        prune_it(model, method=method)


# Networks without skip connections, which one empty layer disconnects


def vgg(norm: bool, bias: bool) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    channels = 3
    for width in (8, 0, 12, 12, 0):
        if not width:
            layers.append(nn.MaxPool2d(2))
            continue
        layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=bias))
        layers += [nn.BatchNorm2d(width)] if norm else []
        layers.append(nn.ReLU())
        channels = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10, bias=bias)]
    return nn.Sequential(*layers)


def timms_vgg(norm: bool) -> nn.Module:
    torch.manual_seed(0)
    norm_layer = nn.BatchNorm2d if norm else None
    config = [4, "M", 2, "M"]
    return VGG(config, num_classes=10, mlp_ratio=0.002, norm_layer=norm_layer)


CHAINS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: vgg(norm=False, bias=False),
    "with biases": lambda: vgg(norm=False, bias=True),
    "with batch norm": lambda: vgg(norm=True, bias=False),
    "with batch norm and biases": lambda: vgg(norm=True, bias=True),
    "timm's": lambda: timms_vgg(norm=False),
    "timm's with batch norm": lambda: timms_vgg(norm=True),
    **{
        name: lambda name=name: timm.create_model(name, num_classes=10)
        for name in timm.list_models("test_vgg*")
    },
}


def images(seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(10, 3, 16, 16, generator=generator), torch.arange(10)


def layers_of(model: nn.Module) -> dict[str, int]:
    """Names and sizes of the prunable weights."""
    return {layer.name: layer.total for layer in sparsity_report(model).layers}


def emptying(layer: str) -> type[SaliencyMethod]:
    """A method that scores one layer lowest, and reads a batch as others do."""

    class Emptying(SaliencyMethod):
        steps = 1

        @classmethod
        def measure(cls, probe: Any) -> dict[str, bool]:
            return {name: name == layer for name in probe.gradients()}

        @staticmethod
        def score(weight: Tensor, lowest: bool) -> Tensor:
            return torch.full_like(weight, -1) if lowest else weight.abs()

    return Emptying


def share_of(layer: str, model: nn.Module) -> float:
    """The sparsity that removes as many weights as a layer has."""
    sizes = layers_of(model)
    return sizes[layer] / sum(sizes.values())


EACH_LAYER = [(name, layer) for name in CHAINS for layer in layers_of(CHAINS[name]())]


@pytest.mark.parametrize(("chain", "layer"), EACH_LAYER)
def test_a_layer_that_is_emptied_in_a_chain_is_an_error_that_names_it(
    chain: str, layer: str
) -> None:
    model = CHAINS[chain]()
    message = (
        "^the pruned network is disconnected: its outputs do not depend on its inputs;"
        rf" 1 of {len(layers_of(model))} layers \({layer}\) lost every weight"
        r"(; small initial weights in 1 of them: 0\.11 times [\w' ]*)?; t"
        f'{ONCE}, or on_collapse="warn" to prune all the same$'
    )
    with unchanged(model), pytest.raises(RuntimeError, match=message):
        prune_it(
            model,
            loader=[images()],
            sparsity=share_of(layer, model),
            method=emptying(layer),
        )


@pytest.mark.parametrize(("chain", "layer"), EACH_LAYER)
def test_on_collapse_warn_prunes_it_and_its_outputs_are_the_same_for_any_inputs(
    chain: str, layer: str
) -> None:
    model = CHAINS[chain]()
    sizes = layers_of(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = prune_it(
            model,
            loader=[images()],
            sparsity=share_of(layer, model),
            method=emptying(layer),
            on_collapse="warn",
        )
    said = (
        "the pruned network is disconnected: its outputs do not depend on its inputs. "
        f"T{ONCE}"
    )
    # Each of them once; it is the caller that they point at.
    assert [(w.category, w.filename) for w in caught] == 2 * [(UserWarning, __file__)]
    lost = f"1 of {len(sizes)} layers ({layer}) lost every weight"
    assert result.warnings[:2] == (said, lost)
    assert str(caught[0].message) == said
    assert str(caught[1].message).startswith(lost)
    assert result.kept == result.total - sizes[layer]
    assert [empty.name for empty in result.empty_layers] == [layer]
    assert not get_masks(model)[layer].any()
    model.eval()
    assert torch.equal(model(images(1)[0]), model(100 * images(2)[0]))


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_leaves_the_model_unpruned() -> None:
    model = vgg(norm=True, bias=False)
    options = {
        "loader": [images()],
        "sparsity": share_of("4.weight", model),
        "method": emptying("4.weight"),
        "on_collapse": "warn",
    }
    with unchanged(model), pytest.raises(UserWarning, match="disconnected"):
        prune_it(model, **options)


def test_a_network_that_is_disconnected_on_the_way_is_an_error_with_the_step() -> None:
    class Second(IterSNIP):
        @staticmethod
        def score(weight: Tensor, gradient: Tensor) -> Tensor:
            lowest = weight.shape == (12, 8, 3, 3)
            return IterSNIP.score(weight, gradient).sub_(float(lowest))

    model = vgg(norm=False, bias=False)
    message = (
        r"^the network was disconnected at step 1 of 3: no gradient reaches any weight "
        r"through the mask; \d of 4 layers \(3\.weight.*\) lost every weight, the "
        r"first at step 1; a single step would have left weights in \d of them"
        rf"; t{ADVICE}, or on_collapse="
    )
    options = {
        "loader": [images()],
        "method": Second,
        "sparsity": 0.8,
        "schedule": lambda step, steps, last: [0.6, 0.4, last][step - 1],
    }
    with unchanged(model), pytest.raises(RuntimeError, match=message):
        prune_it(model, **options)
    with pytest.warns(UserWarning, match=r"^the network was disconnected at step 1 of"):
        result = prune_it(model, **options, on_collapse="warn")
    assert result.kept == result.total // 5


def all_kept(model: nn.Module) -> dict[str, Tensor]:
    layers = sparsity_report(model).layers
    return {ly.name: torch.ones(ly.shape, dtype=torch.bool) for ly in layers}


def keeping(
    masks: dict[str, Tensor], measure_by: str = "gradients"
) -> type[SaliencyMethod]:
    """A method that has chosen already; it reads a batch as all others."""

    class Keeping(SaliencyMethod):
        steps = 1

        @classmethod
        def measure(cls, probe: Any) -> dict[str, Tensor]:
            getattr(probe, measure_by)()
            return masks

        @staticmethod
        def score(weight: Tensor, mask: Tensor) -> Tensor:
            return mask.double()

    return Keeping


def as_chosen(model: nn.Module, masks: dict[str, Tensor], **options: Any) -> Any:
    kept = sum(int(mask.sum()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    return prune_it(
        model,
        loader=[images()],
        sparsity=1 - kept / total,
        method=keeping(masks),
        **options,
    )


@pytest.mark.parametrize("chain", CHAINS)
def test_layers_that_do_not_meet_are_an_error_though_none_of_them_is_empty(
    chain: str,
) -> None:
    model = CHAINS[chain]()
    masks = all_kept(model)
    first, second, *_ = masks.values()
    # The first layer writes channel 0 alone, the second one reads all others.
    first[1:] = False
    second[:, 0] = False
    message = rf"^the pruned network is disconnected: .* its inputs; t{ONCE}, or"
    with unchanged(model), pytest.raises(RuntimeError, match=message):
        as_chosen(model, masks)
    with pytest.warns(UserWarning, match="^the pruned network is disconnected: "):
        result = as_chosen(model, masks, on_collapse="warn")
    assert result.empty_layers == ()
    for name, mask in get_masks(model).items():
        assert torch.equal(mask, masks[name])
    model.eval()
    assert torch.equal(model(images(1)[0]), model(100 * images(2)[0]))
    # One weight that is read again, and they meet.
    model = CHAINS[chain]()
    second[0, 0] = True
    said = "\n".join(as_chosen(model, masks).warnings)
    assert "disconnected" not in said
    if chain in ("plain", "with batch norm"):  # no bias gets past an empty channel
        # Units that nothing wakes in the dense network either are not counted.
        assert re.search(r"that stay \(8[78] %\) are idle: the outputs do not", said)


def without_a_path(masks: list[Tensor]) -> int:
    """Weights of a chain of linear layers that no path of kept weights goes through."""
    entering = [torch.ones(masks[0].shape[1], dtype=torch.float64)]
    for mask in masks:
        entering.append(mask.double() @ entering[-1])
    leaving = torch.ones(len(masks[-1]), dtype=torch.float64)
    idle = 0
    for mask, before in zip(reversed(masks), reversed(entering[:-1]), strict=True):
        idle += int((mask & (torch.outer(leaving, before) == 0)).sum())
        leaving = mask.double().T @ leaving
    return idle


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("microbatch", [None, 4])
def test_more_idle_weights_than_others_are_said_aloud(
    seed: int, microbatch: int | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    widths = (5, 20, 20, 20, 6)
    torch.manual_seed(seed)
    layers = [nn.Linear(*pair, bias=False) for pair in pairwise(widths)]
    masks = {
        f"{2 * place}.weight": torch.rand(
            layer.weight.shape, generator=generator, dtype=torch.float64
        )
        < 0.02 + 0.01 * seed
        for place, layer in enumerate(layers)
    }
    for place, mask in enumerate(masks.values()):
        mask[0, 0] = True  # one path, at least
        mask[1:, 0] &= place == 0
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))
    kept = sum(int(mask.sum()) for mask in masks.values())
    idle = without_a_path([*masks.values()])
    inputs = torch.randn(16, 5, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = prune_it(
            model,
            loader=[(inputs, torch.arange(16) % 6)],
            sparsity=1 - kept / sum(mask.numel() for mask in masks.values()),
            method=keeping(masks),
            microbatch=microbatch,
        )
    said = [line for line in report.warnings if "idle" in line]
    if idle > kept / 2:
        (line,) = said
        share = f"{100 * idle / kept:.0f}"
        start = f"{idle:,} of the {kept:,} weights that stay ({share} %) are idle: "
        assert line.startswith(start)
        assert f"T{ONCE}" in line
    else:
        assert not said


def test_weights_that_few_samples_do_not_wake_are_not_idle() -> None:
    # Each of the units is woken by a sample of its own.
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(32) + 0.01)
    inputs = 2 * torch.eye(32) - 1.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = prune_it(
            model,
            loader=[(inputs, torch.arange(32) % 4)],
            sparsity=0.1,
            method="snip",
        )
    assert not any("idle" in line for line in report.warnings)


class Experts(nn.Module):
    """Each sample goes through one of several experts."""

    def __init__(self, count: int = 8) -> None:
        super().__init__()
        self.router = nn.Linear(16, count)
        self.experts = nn.ModuleList(nn.Linear(16, 32) for _ in range(count))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(1)
        best = weights.argmax(1)
        rows = [
            weights[place, chosen] * self.experts[chosen](x[place])
            for place, chosen in enumerate(best.tolist())
        ]
        return self.head(torch.stack(rows))  # type: ignore[no-any-return]


def test_weights_that_a_batch_does_not_use_in_the_dense_network_are_not_idle() -> None:
    torch.manual_seed(0)
    loader = [(torch.randn(2, 16), torch.tensor([0, 1])) for _ in range(64)]
    report = prune_it(Experts(), loader=loader, sparsity=0.5, method="snip", batches=64)
    assert not any("idle" in line for line in report.warnings)


def test_the_last_look_fails_no_pruning() -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for width in (6, 8):
            layers += [nn.Linear(width, 8), nn.BatchNorm1d(8), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(8, 4))

    # A normalisation over a batch of one fails; these methods are in evaluation mode.
    one = [(torch.rand(1, 6), torch.zeros(1).long())]
    for method in ("synflow", "snip_it"):
        assert prune_it(network(), loader=one, method=method).sparsity == 0.5
    masks = all_kept(network())
    first, second, _ = masks.values()
    first[1:] = False
    second[:, 0] = False

    kept = sum(int(mask.sum()) for mask in masks.values())
    share = 1 - kept / sum(mask.numel() for mask in masks.values())
    chosen = keeping(masks, "synflow_gradients")
    with pytest.raises(RuntimeError, match=r"^the pruned network is disconnected"):
        prune_it(network(), loader=one, sparsity=share, method=chosen)

    class ByNumpy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.from_numpy(np.log1p(np.abs(x.numpy()))))  # type: ignore[no-any-return]

    loader = [(torch.randn(8, 6), torch.arange(8) % 4)]
    assert prune_it(ByNumpy(), loader=loader).sparsity == 0.5


def test_a_training_step_that_calls_a_part_of_the_model_is_looked_at() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = vgg(norm=False, bias=False)

        def training_step(self, batch: Batch) -> Tensor:
            return cross_entropy(self.model(batch[0]), batch[1])

    model = Module()
    masks = all_kept(model)
    first, second, *_ = masks.values()
    first[1:] = False
    second[:, 0] = False
    with pytest.raises(RuntimeError, match=r"^the pruned network is disconnected"):
        as_chosen(model, masks, forward=lambda m, found: m.training_step(found))


def test_a_network_that_looks_integers_up_beside_numbers_is_connected() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.numbers = nn.Embedding(20, 6), nn.Linear(6, 6)
            self.head = nn.Linear(6, 4)

        def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
            rows = self.rows(inputs[0] + torch.tensor([0, 10])).sum(1)
            return self.head(rows + self.numbers(inputs[1]))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    inputs = torch.randint(10, (8, 2)), torch.randn(8, 6)
    model = Table()
    masks = all_kept(model)
    masks["numbers.weight"][:] = False
    method = keeping(masks)
    options = {"sparsity": 36 / 60, "method": method}
    prune_it(model, loader=[(inputs, torch.arange(8) % 4)], **options)
    model = Table()
    nn.init.zeros_(model.rows.weight)
    with pytest.raises(RuntimeError, match=r"^the pruned network is disconnected"):
        prune_it(model, loader=[(inputs, torch.arange(8) % 4)], **options)


def test_an_empty_layer_beside_a_skip_connection_is_no_error_but_a_warning() -> None:
    torch.manual_seed(0)
    model = tiny_resnet()
    layer = "3.conv2.weight"
    lost = f"1 of 7 layers ({layer}) lost every weight"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = prune_it(
            model,
            loader=[images()],
            sparsity=share_of(layer, model),
            method=emptying(layer),
        )
    assert [str(w.message) for w in caught] == [lost]
    assert result.warnings[0] == lost
    assert [empty.name for empty in result.empty_layers] == [layer]
    model.eval()
    assert not torch.equal(model(images(1)[0]), model(images(2)[0]))


def test_magnitude_reads_no_data_and_only_names_the_layer_that_it_emptied() -> None:
    model = vgg(norm=True, bias=False)
    with torch.no_grad():
        model[4].weight.mul_(1e-9)
    sparsity = share_of("4.weight", model)
    result = prune_it(model, method="magnitude", sparsity=sparsity, loader=None)
    assert result.warnings[0] == "1 of 4 layers (4.weight) lost every weight"


@pytest.mark.parametrize(
    "options",
    [
        {"loader": [(torch.zeros(5, 6), TARGETS)]},
        {"loss_fn": lambda o, t: 0 * cross_entropy(o, t)},
    ],
    ids=["zero inputs", "zero loss"],
)
@pytest.mark.parametrize("method", ["force", "iter_snip", "snip", "grasp", "grasp_it"])
def test_where_every_saliency_is_0_there_is_nothing_to_rank_by(
    method: str, options: dict[str, Any]
) -> None:
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 4))
    options = {"method": method, **options}
    message = (
        "^every saliency is exactly 0 at the first step: there is nothing to rank by; "
        r".*; look at the data, the loss and the initialisation, or on_collapse=\"warn"
        '" to prune all the same$'
    )
    with unchanged(model), pytest.raises(RuntimeError, match=message):
        prune_it(model, **options)
    with pytest.warns(UserWarning, match="^every saliency is exactly 0 at the first"):
        result = prune_it(model, on_collapse="warn", **options)
    assert result.kept == result.total // 2
    assert any("nothing to rank by. Look at the data" in w for w in result.warnings)


@pytest.mark.parametrize("method", ["force", "snip", "grasp_it", "synflow"])
def test_a_dead_branch_is_a_warning_that_names_it(method: str) -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.dead = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + (self.dead(x) - 1000).relu()

    model = Dead()
    message = r"1 of 2 layers \(dead\.weight\) had a saliency of exactly 0 everywhere"
    with pytest.warns(UserWarning, match=message):
        result = prune_it(model, method=method)
    assert result.kept == result.total // 2
    assert any("(dead.weight) had a saliency" in line for line in result.warnings)


# What is no collapse, and what is


def asleep(bias: float) -> Callable[[], nn.Module]:
    """A network with units that few samples wake."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        first = nn.Linear(20, 64)
        with torch.no_grad():
            first.bias.sub_(bias)
        layers = nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)
        return nn.Sequential(first, *layers)

    return build


def half_asleep() -> nn.Module:
    model = asleep(0.5)()
    prune.random_unstructured(model.get_submodule("2"), "weight", 0.5)
    return model


def on_small_maps() -> nn.Module:
    """On maps of 1x1, eight in nine taps of a kernel see only padding."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels, width in ((3, 8), (8, 16), (16, 32)):
        layers += [nn.Conv2d(channels, width, 3, 2, 1), nn.ReLU()]
    layers += [nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32, 5))


def some(*shape: int) -> list[Batch]:
    """Small batches, each of which wakes others."""
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(6, *shape, generator=generator), torch.arange(6) % 5)
        for _ in range(12)
    ]


SOUND: dict[str, tuple[Callable[[], nn.Module], list[Batch]]] = {
    "all awake": (asleep(-1.0), some(20)),
    "some asleep": (asleep(0.0), some(20)),
    "half asleep": (asleep(0.5), some(20)),
    "most asleep": (asleep(1.0), some(20)),
    "pruned before": (half_asleep, some(20)),
    "small maps": (on_small_maps, some(3, 8, 8)),
    "a transformer": (
        lambda: timm.create_model("test_vit", num_classes=5),
        [(x[:2], y[:2]) for x, y in some(3, 160, 160)[:2]],
    ),
}


@pytest.mark.parametrize("method", ["force", "iter_snip", "grasp_it", "snip_it"])
@pytest.mark.parametrize("sparsity", [0.0, 0.02, 0.1, 0.5])
@pytest.mark.parametrize("name", SOUND)
def test_what_is_pruned_a_little_has_not_collapsed(
    name: str, sparsity: float, method: str
) -> None:
    build, loader = SOUND[name]
    if name == "pruned before":
        sparsity = max(sparsity, 0.4)
    result = prune_it(build(), loader=loader, sparsity=sparsity, method=method, steps=8)
    assert not re.search("collapsed|disconnected|idle", " ".join(result.warnings))


@pytest.mark.parametrize("regrow", [False, True])
@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        # Of 100 weights, those with a saliency at first and then; 30 are to stay.
        (100, 26, True),
        (100, 27, False),  # of a batch that passes a dropout, say
        (100, 30, False),
        (100, 12, True),
        (90, 20, True),
        (90, 25, False),
        (40, 14, True),
        (40, 20, False),
        (20, 9, True),
        (20, 15, False),
        (20, 20, False),
    ],
)
def test_a_collapse_is_told_from_what_the_dense_network_had(
    first: int, second: int, said: bool, regrow: bool
) -> None:
    class Told(SaliencyMethod):
        regrows = regrow

        @classmethod
        def measure(cls, probe: Any) -> dict[str, Tensor]:
            probe.gradients()
            alive = first if probe.step == 1 else second
            return {"weight": (torch.arange(100) < alive).view(10, 10).float()}

        @staticmethod
        def score(weight: Tensor, signal: Tensor) -> Tensor:
            return signal

    options = {
        "method": Told,
        "loader": [(torch.randn(8, 10), torch.arange(8))],
        "sparsity": 0.7,
        "steps": 2,
        "schedule": "linear",
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = prune_it(nn.Linear(10, 10), **options)
    text = f"^the network collapsed at step 2 of 2: {second} weights have a saliency "
    assert any(re.search(text, line) for line in result.warnings) is said
    assert any(re.search(text, str(w.message)) for w in caught) is said
    beside = f"({first} at the first step)"
    assert any(beside in line for line in result.warnings) is (said and first < 100)


@pytest.mark.parametrize(
    ("method", "steps", "advice"),
    [
        ("force", 3, ADVICE),
        ("force", 1, ADVICE),
        ("snip", 3, ONCE),
        ("grasp", 3, ONCE),
        ("snip_it", 3, "ake more batches, a lower sparsity or another method"),
        ("synflow", 3, "ake more steps, a lower sparsity or another method"),
    ],
)
def test_what_to_take_instead_is_what_the_method_leaves_to_the_caller(
    method: str, steps: int, advice: str
) -> None:
    class Emptying(METHODS[method]):  # type: ignore[misc]
        @classmethod
        def scores(cls, probe: Any) -> dict[str, Tensor]:
            scores = super().scores(probe)
            return {n: s - 1e9 if n == "3.weight" else s for n, s in scores.items()}

    model = vgg(norm=False, bias=False)
    sparsity = share_of("3.weight", model)
    options = {"method": Emptying, "loader": [images()], "steps": steps}
    with unchanged(model), pytest.raises(CollapseError, match="disconnected") as raised:
        prune_it(model, sparsity=sparsity, **options)
    assert "lost every weight" in raised.value.problem
    said = f't{advice}, or on_collapse="warn" to prune all the same'
    assert raised.value.advice == said
    with pytest.warns(UserWarning, match=rf"disconnected.*\. T{advice}$"):
        prune_it(model, sparsity=sparsity, on_collapse="warn", **options)


def test_layers_that_an_earlier_pruning_has_emptied_are_not_lost_now() -> None:
    model = tiny_resnet()
    layer: Any = model.get_submodule("3.conv2")
    prune.custom_from_mask(layer, "weight", torch.zeros_like(layer.weight))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = prune_it(model, loader=[images()], sparsity=0.7, method="snip")
    empty = [one.name for one in result.empty_layers]
    assert empty == ["3.conv1.weight", "3.conv2.weight"]  # the first leads nowhere
    lost = "1 of 7 layers (3.conv1.weight) lost every weight"
    assert lost in result.warnings
    assert [str(w.message) for w in caught if "lost every" in str(w.message)] == [lost]


# Files


WHOLE = {"0.weight": torch.eye(8, 6) == 1, "3.weight": torch.eye(4, 8) == 1}


def test_bytes_behind_the_masks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "masks"
    save_masks(WHOLE, path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=f"^{path}: not a masks file, or one that is"):
        load_masks(path)


def write_by_hand(path: Path, bits: Tensor, shapes: str) -> None:
    """A file of a mask "a" as another program might write it: its checksum is right."""
    written = f'{{"a": {shapes}}}'
    checksum = hashlib.sha256(written.encode() + bits.numpy().tobytes()).hexdigest()
    metadata = {"shapes": written, "sha256": checksum, "format": "force_plugin masks"}
    save_file({"a": bits}, path, metadata)


def test_a_file_by_hand_is_read_where_its_bits_fit_its_shapes(tmp_path: Path) -> None:
    write_by_hand(tmp_path / "masks", torch.full((2,), 255).byte(), "[9]")
    assert load_masks(tmp_path / "masks")["a"].tolist() == [True] * 9


@pytest.mark.parametrize(
    ("bits", "shapes"),
    [
        (torch.ones(2, dtype=torch.int8), "[9]"),
        (torch.ones(2), "[9]"),
        (torch.ones(1, 2, dtype=torch.uint8), "[9]"),
        (torch.ones(2, dtype=torch.uint8), "[3]"),
        (torch.ones(1, dtype=torch.uint8), "[9]"),
        (torch.ones(2, dtype=torch.uint8), "[9.0]"),
        (torch.ones(2, dtype=torch.uint8), '"9"'),
        (torch.ones(2, dtype=torch.uint8), "[-3, -3]"),
        (torch.ones(1, dtype=torch.uint8), f"[{2**62}, 4]"),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else f"{value.dtype} {value.shape}"
    ),
)
def test_bits_that_are_none_or_of_another_number_are_refused(
    bits: Tensor, shapes: str, tmp_path: Path
) -> None:
    path = tmp_path / "masks"
    write_by_hand(path, bits, shapes)
    with pytest.raises(ValueError, match=f"^{path}: not a masks file"):
        load_masks(path)


def test_a_folder_or_a_path_through_a_file_is_no_masks_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "masks", ""):
        with pytest.raises(FileNotFoundError, match=f"^{path}: no such file; pass"):
            load_masks(path)


def test_a_path_that_cannot_be_written_is_named_by_the_system(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, error in (
        (tmp_path, IsADirectoryError),
        (tmp_path / "file" / "masks", FileNotFoundError),
        (tmp_path / ("long" * 99), OSError),
    ):
        with pytest.raises(error, match=f"'{path}'"):
            save_masks(WHOLE, path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize(
    "change", [Tensor.to_sparse, lambda mask: mask.to("meta")], ids=["sparse", "meta"]
)
def test_a_mask_without_values_is_named(
    change: Callable[[Tensor], Tensor], dtype: torch.dtype, tmp_path: Path
) -> None:
    masks = {"0.weight": change(torch.ones(8, 6, dtype=dtype))}
    model = network()
    message = r"^masks: 0\.weight has layout .* on device .*; expected a dense tensor"
    with unchanged(model), pytest.raises(ValueError, match=message):
        apply_masks(model, masks)
    with pytest.raises(ValueError, match=message):
        save_masks(masks, tmp_path / "masks")
    assert not [*tmp_path.iterdir()]


def test_masks_are_not_saved_under_a_name_that_cannot_be_read_again(
    tmp_path: Path,
) -> None:
    message = "^masks: expected parameter names, got '__metadata__', which is res"
    with pytest.raises(ValueError, match=message):
        save_masks({"__metadata__": torch.ones(3)}, tmp_path / "masks")
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's full device")
def test_a_full_disk_is_an_error() -> None:
    with pytest.raises(OSError, match="No space left on device"):
        save_masks(WHOLE, "/dev/full")


def test_masks_of_another_model_do_not_change_it(tmp_path: Path) -> None:
    model = pruned()
    save_masks(get_masks(model), tmp_path / "masks")
    other = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 4))
    message = (
        r"^masks: 1 of 2 names are no parameters of the model: '3\.weight'; .*"
        r"0\.weight \(8, 6\) instead of \(9, 6\)$"
    )
    with unchanged(other), pytest.raises(ValueError, match=message):
        apply_masks(other, load_masks(tmp_path / "masks"))


# Plots

A_FOLDER = "^path: expected a file, got the folder "
FORMATS = r"^Format '.*' is not supported \(supported formats: .*pdf.*png.*svg"


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("plot.xyz", ValueError, FORMATS),
        ("plot.safetensors", ValueError, FORMATS),
        (
            "no/plot.png",
            FileNotFoundError,
            "^path: expected a file in an existing fold",
        ),
        ("file/plot.png", FileNotFoundError, "^path: expected .*; create the folder f"),
        ("folder.png", IsADirectoryError, A_FOLDER + "'folder.png'; add the name"),
        # Matplotlib would write folder.png and .png.
        ("folder", IsADirectoryError, A_FOLDER + "'folder'; add the name"),
        ("", IsADirectoryError, A_FOLDER + "''; add the name"),
        (5, TypeError, NO_PATH + "int$"),
        (["plot.png"], TypeError, NO_PATH + "list$"),
    ],
)
def test_a_plot_that_cannot_be_written_leaves_nothing_behind(
    path: Any,
    error: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    if error is IsADirectoryError:
        Path(path).mkdir(exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=message):
        report(3, 6).plot(path)
    assert sorted(tmp_path.rglob("*")) == before


# Data and the command line


def test_a_file_for_a_folder_of_images_is_named(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    path.touch()
    message = rf"^data: cannot read class/\*\.jpg or .* from data={path}: "
    with pytest.raises(ValueError, match=message):
        load_dataset(path)


def test_images_that_cannot_be_read_leave_the_model_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "broken.jpg").write_bytes(b"no image")
    model = load_model("test_resnet", num_classes=2)
    loader = load_data(model, load_dataset(tmp_path), image_size=32)
    with unchanged(model), pytest.raises(RuntimeError, match="Failed to load"):
        prune_it(model, loader=loader)


QUICK = ["--steps", "2", "--batch-size", "8", "--quiet"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["test_resnet", "--sparsity", "0.9", "more"], 2, "unrecognized arguments: mo"),
        (
            ["test_resnet", "--sparsity", "0.9", "--on-collapse", "ignore"],
            2,
            r"argument --on-collapse: invalid choice: 'ignore' \(choose from .*raise",
        ),
        (
            ["test_resnet", "--sparsity", "0.9", "--image-size", "0"],
            2,
            "argument --image-size: expected a whole number >= 1, got 0",
        ),
        (
            ["test_resnet", "--sparsity", "0.9", "--num-classes", "0"],
            2,
            "argument --num-classes: expected a whole number >= 1, got 0",
        ),
        (
            ["test_resnet", "--sparsity", "0.9", "--model-kwargs", "in_chans=three"],
            2,
            "model: test_resnet does not take .*'in_chans': 'three'",
        ),
        (
            ["test_resnet", "--sparsity", "0.9", "--batch-size", "1"],
            2,
            "Expected more than 1 value per channel",
        ),
        (
            ["test_resnet", "--sparsity", "0.9999", "--method", "iter_snip"],
            1,
            "disconnected.* lost every weight, .*--on-collapse warn",
        ),
        *(
            (
                ["test_resnet", "--sparsity", "0.9", option, "-1"],
                2,
                f"argument {option}: expected a whole number >= 0, got -1",
            )
            for option in ("--workers", "--seed")
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_that_fails_is_one_line_and_writes_no_masks(
    arguments: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*arguments[:1], *QUICK, *arguments[1:], "--out", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert caught.value.code == status
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert re.search(f"^force-prune: error: .*{message}", printed.err)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# Networks whose batches are no pairs of images and targets


@pytest.mark.parametrize("layer", ["0.weight", "3.weight", "5.weight"])
@pytest.mark.parametrize("kind", ["forward", "dictionary"])
def test_a_disconnected_chain_is_an_error_whatever_the_batches_look_like(
    kind: str, layer: str
) -> None:
    inputs, targets = images()

    class Keyed(nn.Sequential):
        def forward(self, x: Any) -> Tensor:
            return super().forward(x["image"])

    torch.manual_seed(0)
    model = Keyed(*[*vgg(norm=False, bias=True)])
    options: dict[str, Any] = {"loader": [({"image": inputs}, targets)]}
    if kind == "forward":
        options = {
            "loader": [{"image": inputs, "target": targets}],
            "forward": lambda model, one: cross_entropy(model(one), one["target"]),
        }
    sparsity = share_of(layer, model)
    message = rf"^the pruned network is disconnected: .* layers \({layer}\) lost every"
    with unchanged(model), pytest.raises(RuntimeError, match=message):
        prune_it(model, sparsity=sparsity, method=emptying(layer), **options)


def test_a_disconnected_network_for_words_is_an_error() -> None:
    model = words()
    message = r"^the pruned network is disconnected: .* layers \(2\.weight\) lost every"
    with unchanged(model), pytest.raises(RuntimeError, match=message):
        prune_it(
            model,
            loader=[sentences()],
            sparsity=share_of("2.weight", model),
            method=emptying("2.weight"),
        )


# What is taken back that a model or a method has written


def test_making_permanent_that_is_interrupted_half_way_keeps_the_dense_values() -> None:
    class Stubborn(nn.Linear):
        """A layer that cannot be given its weight back."""

        armed = False

        def __setattr__(self, name: str, value: Any) -> None:
            if self.armed and name == "weight":
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), Stubborn(8, 4))
    masks = {
        name: torch.eye(*p.shape) for name, p in model.named_parameters() if "w" in name
    }
    apply_masks(model, masks)
    Stubborn.armed = True
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        make_permanent(model)


class Scribbling(nn.Linear):
    """Keeps its inputs in a list and counts calls in a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__(6, 4)
        self.inputs: list[Tensor] = []
        self.calls = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x)
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("attribute", ["inputs", "calls"])
@pytest.mark.parametrize("call", BOTH)
def test_what_a_forward_pass_writes_into_attributes_is_taken_back(
    call: str, attribute: str
) -> None:
    model = Scribbling()
    BOTH[call](model)
    assert {"inputs": len(model.inputs), "calls": int(model.calls)}[attribute] == 0


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("finite", [True, False])
def test_a_norm_of_a_channel_without_weights_is_a_warning(finite: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        torch.nn.utils.weight_norm(nn.Linear(8, 16)), nn.Tanh(), nn.Linear(16, 5)
    )
    if not finite:  # a unit that is saturated has no saliency
        nn.init.constant_(model[0].bias[:2], 100.0)
    data = [(torch.randn(16, 8), torch.randint(0, 5, (16,)))]
    pairs = [(model[0], "weight_v"), (model[2], "weight")]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        options: dict[str, Any] = {"parameters": pairs, "progress": False}
        report = force_prune(model, data, 0.3, method="snip", **options)
    found = [str(w.message) for w in said if "NaN or infinite" in str(w.message)]
    assert bool(found) is not finite
    assert not finite or model(data[0][0]).isfinite().all()
    assert all(text in report.warnings for text in found)
    zeros = ~get_masks(model)["0.weight_v"]
    with torch.no_grad():
        model[0].weight_v_orig.fill_(torch.nan)
    assert not model[0].weight_v[zeros].any()
