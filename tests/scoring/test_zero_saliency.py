"""Why a layer has no saliency: the cause that is named, and what naming it costs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import pytest
import timm
import torch
from dead_ends import INPUT, DeadEnd, ends_at, sentence
from kinds_of_methods import WITH_PASSES
from networks import vectors
from state import unchanged
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from force_plugin import diagnose, force_prune, saliency
from force_plugin.errors import NoGradientError

pytestmark = pytest.mark.filterwarnings("ignore:the network collapsed:UserWarning")


Batch = tuple[Tensor, Tensor]


RANKED_BY_WEIGHT = ["force", "iter_snip", "snip", "grasp", "snip_it", "synflow"]


WEIGHTS = "its weights are 0"


METHOD = "the method gives it none"


BEFORE = "it was pruned entirely before"


def images() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64)
    return [(inputs, torch.tensor([1, 3]))]


class Apply(nn.Module):
    """Any function as a module, with a buffer of 0 at hand."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.zero: Tensor
        self.register_buffer("zero", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.zero)


class Skip(nn.Module):
    """A module around which its input passes."""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def dead_relu(width: int) -> nn.Module:
    """Units that never fire."""
    return Apply(lambda x, zero: torch.relu(x - 100))


def chain(*modules: nn.Module) -> nn.Sequential:
    """Modules in a row, in float64; layers are drawn anew with seed 0."""
    torch.manual_seed(0)
    for module in modules:
        for part in module.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                part.reset_parameters()
    return nn.Sequential(*modules).double()


def causes_in(model: nn.Module, loader: Any = None, **options: Any) -> dict[str, str]:
    """The cause of each silent layer, as diagnose has them."""
    with unchanged(model):
        return dict(diagnose(model, loader or vectors(), **options).silent)


def warned(model: nn.Module, loader: Any = None, **options: Any) -> list[str]:
    """What a pruning says of silent layers, by its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = force_prune(
            model,
            vectors() if loader is None else loader,
            **{
                "sparsity": 0.0,
                "method": "snip",
                "progress": False,
                "on_collapse": "warn",
                **options,
            },
        )
    said = [str(w.message) for w in caught if "exactly 0 everywhere" in str(w.message)]
    # The report has the same sentences, in the same order.
    assert said == [w for w in report.warnings if "exactly 0 everywhere" in w]
    return said


# Networks


def linear(fan_in: int, fan_out: int, bias: bool = True) -> nn.Module:
    return nn.Linear(fan_in, fan_out, bias=bias)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "nothing is silent": (
        lambda: chain(linear(5, 6), nn.Tanh(), linear(6, 4)),
        {},
    ),
    "a softmax over one element": (
        lambda: chain(linear(5, 1), nn.Softmax(1), linear(1, 4)),
        {"0.weight": ends_at("softmax")},
    ),
    "units that never fire": (
        lambda: chain(linear(5, 6), nn.Tanh(), linear(6, 6), dead_relu(6)),
        {"0.weight": ends_at("relu"), "2.weight": ends_at("relu")},
    ),
    "what follows them": (
        lambda: chain(linear(5, 6), dead_relu(6), linear(6, 4)),
        {"0.weight": ends_at("relu"), "2.weight": INPUT},
    ),
    "a dead branch": (
        lambda: chain(
            linear(5, 6), Skip(linear(6, 6), dead_relu(6), linear(6, 6)), linear(6, 4)
        ),
        {"1.branch.0.weight": ends_at("relu"), "1.branch.2.weight": INPUT},
    ),
    "a product with a buffer of 0": (
        lambda: chain(
            linear(5, 6),
            Skip(linear(6, 6), Apply(lambda x, zero: x * zero)),
            linear(6, 4),
        ),
        {"1.branch.0.weight": ends_at("mul")},
    ),
    "a norm over one channel": (
        lambda: chain(linear(5, 1), nn.LayerNorm(1), linear(1, 4)),
        {"0.weight": ends_at("native layer norm"), "2.weight": INPUT},
    ),
    "a norm over one channel that has learned an offset": (
        lambda: with_offset(chain(linear(5, 1), nn.LayerNorm(1), linear(1, 4))),
        {"0.weight": ends_at("native layer norm")},
    ),
    "a dead end": (
        lambda: chain(
            linear(5, 6), Apply(lambda x, zero: DeadEnd.apply(x)), linear(6, 4)
        ),
        {"0.weight": ends_at("dead end")},
    ),
}


def with_offset(model: Any) -> nn.Sequential:
    nn.init.constant_(model[1].bias, 0.5)
    return model


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("method", ["force", "snip", "grasp_it", "snip_it"])
def test_the_cause_of_each_silent_layer(kind: str, method: str) -> None:
    make, expected = NETWORKS[kind]
    assert causes_in(make(), method=method) == expected


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_pruning_warns_with_one_sentence_for_each_cause(kind: str) -> None:
    make, expected = NETWORKS[kind]
    model = make()
    layers = sum(isinstance(part, nn.Linear) for part in model.modules())
    sentences = []
    for cause in dict.fromkeys(expected.values()):
        names = [name for name in expected if expected[name] == cause]
        which = f"{len(names)} of {layers} layers ({', '.join(names)})"
        sentences.append(sentence(which, cause))
    assert warned(model) == sentences


def test_the_warning_points_to_the_line_that_prunes() -> None:
    model = NETWORKS["what follows them"][0]()
    with pytest.warns(UserWarning, match="exactly 0 everywhere") as caught:
        force_prune(
            model, vectors(), 0.0, method="snip", progress=False, on_collapse="warn"
        )
    assert {w.filename for w in caught} == {__file__}


BIAS_FREE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "relu": (lambda: chain(linear(5, 6, False), dead_relu(6), linear(6, 4)), "relu"),
    "softmax": (
        lambda: chain(linear(5, 1, False), nn.Softmax(1), linear(1, 4)),
        "softmax",
    ),
    "mul": (
        lambda: chain(
            linear(5, 6, False), Apply(lambda x, zero: x * zero), linear(6, 4)
        ),
        "mul",
    ),
    "convolution": (
        lambda: chain(
            nn.Unflatten(1, (1, 1, 5)),
            nn.Conv2d(1, 6, 1, bias=False),
            dead_relu(6),
            nn.Flatten(),
            linear(30, 4),
        ),
        "relu",
    ),
}


@pytest.mark.parametrize("kind", BIAS_FREE)
def test_a_first_layer_without_bias_has_the_cause_that_it_has_with_one(
    kind: str,
) -> None:
    # Its product has one operand with a graph, as what is made of the weight alone has.
    make, operation = BIAS_FREE[kind]
    assert next(iter(causes_in(make(), method="snip").values())) == ends_at(operation)


def test_convolutions_have_causes_too() -> None:
    model: Any = chain(
        nn.Conv2d(3, 4, 3, padding=1),
        Apply(lambda x, zero: torch.relu(x - 100)),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(64, 4),
    )
    nn.init.zeros_(model[2].bias)
    # A batch norm of zeros is its bias, 0.
    assert causes_in(model, images(), method="snip") == {
        "0.weight": ends_at("relu"),
        "2.weight": INPUT,
        "5.weight": INPUT,
    }


def test_a_checkpointed_layer_has_the_cause_that_it_has_without_a_checkpoint() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, *parts: nn.Module) -> None:
            super().__init__()
            self.parts = nn.Sequential(*parts)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.parts, x, use_reentrant=False)

    model = chain(
        linear(5, 6),
        Checkpointed(linear(6, 6), dead_relu(6), linear(6, 6)),
        linear(6, 4),
    )
    assert causes_in(model, method="snip") == {
        "0.weight": ends_at("relu"),
        "1.parts.0.weight": ends_at("relu"),
        "1.parts.2.weight": INPUT,
    }


def test_a_loss_of_ones_own_may_be_where_it_ends() -> None:
    model = chain(linear(5, 6), nn.Tanh(), linear(6, 4))

    def flat(network: nn.Module, batch: Batch) -> Tensor:
        return network(batch[0]).square().sum().clamp(max=1e-9)

    assert causes_in(model, method="snip", forward=flat) == {
        "0.weight": ends_at("clamp"),
        "2.weight": ends_at("clamp"),
    }


def test_a_perfect_fit_has_no_gradient_at_all() -> None:
    model = chain(linear(5, 6), nn.Tanh(), linear(6, 4))
    inputs = vectors()[0][0]
    batch = (inputs, model(inputs).detach())
    causes = causes_in(model, [batch], method="snip", loss_fn=mse_loss)
    assert causes == dict.fromkeys(["0.weight", "2.weight"], ends_at("mse loss"))


def test_a_real_network_with_a_dead_stage() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    nn.init.constant_(model.layer4[0].bn1.bias, -1000.0)
    generator = torch.Generator().manual_seed(1)
    batch = (torch.randn(2, 3, 32, 32, generator=generator), torch.arange(2))
    # Its branch ends at the ReLU after bn1; the shortcut is alive.
    assert causes_in(model, [batch], method="snip") == {
        "layer4.0.conv1.weight": ends_at("relu"),
        "layer4.0.conv2.weight": INPUT,
    }


# Weights of 0


@pytest.mark.parametrize("method", RANKED_BY_WEIGHT)
def test_weights_of_0_are_their_own_cause_where_gates_stay_closed(method: str) -> None:
    model: Any = chain(linear(5, 6), nn.Tanh(), linear(6, 4))
    nn.init.zeros_(model[2].weight)
    said = warned(deepcopy(model), method=method, open_gates=False, steps=1)
    assert sentence("1 of 2 layers (2.weight)", WEIGHTS) in said
    # Opened, they are drawn anew, and nothing is silent.
    assert warned(model, method=method, steps=1) == []


def test_what_lies_behind_weights_of_0_gets_no_gradient_through_them() -> None:
    model: Any = chain(linear(5, 6), nn.Tanh(), linear(6, 4))
    nn.init.zeros_(model[2].weight)
    assert warned(model, open_gates=False) == [
        sentence("1 of 2 layers (0.weight)", ends_at("addmm")),
        sentence("1 of 2 layers (2.weight)", WEIGHTS),
    ]


def test_magnitudes_are_silent_only_where_the_weights_are_0() -> None:
    model = NETWORKS["what follows them"][0]()
    assert warned(deepcopy(model), [], method="magnitude") == []
    nn.init.zeros_(model[2].weight)
    assert warned(model, [], method="magnitude") == [
        sentence("1 of 2 layers (2.weight)", WEIGHTS)
    ]


def test_a_square_of_the_gradient_does_not_mind_weights_of_0() -> None:
    model: Any = chain(linear(5, 6), nn.Tanh(), linear(6, 4))
    nn.init.zeros_(model[2].weight)
    assert warned(model, method="grasp_it", open_gates=False, steps=1) == [
        sentence("1 of 2 layers (0.weight)", ends_at("addmm"))
    ]


def test_weights_of_0_are_no_cause_where_the_score_does_not_contain_them() -> None:
    model = NETWORKS["units that never fire"][0]()
    nn.init.zeros_(model[2].weight)
    said = warned(model, method="grasp_it", open_gates=False, steps=1)
    assert said == [sentence("2 of 2 layers (0.weight, 2.weight)", ends_at("relu"))]


# Methods that measure something else


def test_grasp_gives_nothing_to_a_layer_without_curvature() -> None:
    # The loss is linear in the outputs: they are the sum of what a layer makes of its
    # inputs, and the Hessian is 0 although the gradient is not.
    model = chain(linear(5, 4))
    options: dict[str, Any] = {"loss_fn": lambda outputs, targets: outputs.sum()}
    assert saliency(model, vectors(), "snip", **options)["0.weight"].all()
    assert warned(model, method="grasp", **options) == [
        sentence("1 of 1 layers (0.weight)", METHOD)
    ]


def test_grasp_names_the_linear_part_of_a_network_only() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.curved = nn.Linear(5, 4)
            self.straight = nn.Linear(5, 4)
            self.double()

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        inputs, targets = batch
        alone = network.straight(inputs).mean()
        return cross_entropy(network.curved(inputs), targets) + alone

    assert warned(Parts(), method="grasp", forward=loss) == [
        sentence("1 of 2 layers (straight.weight)", METHOD)
    ]
    assert warned(Parts(), method="snip", forward=loss) == []


def test_grasp_names_the_end_of_the_gradient_where_there_is_one() -> None:
    make, _ = NETWORKS["a dead branch"]
    assert causes_in(make(), method="grasp") == {
        "1.branch.0.weight": ends_at("relu"),
        "1.branch.2.weight": INPUT,
    }


def test_synflow_has_causes_of_its_own_network() -> None:
    # In absolute values the units fire, while a softmax over one element stays flat.
    make, _ = NETWORKS["units that never fire"]
    model: Any = chain(linear(5, 6), nn.ReLU(), linear(6, 4))
    nn.init.constant_(model[0].bias, -100.0)
    assert causes_in(model, method="snip") == {
        "0.weight": ends_at("relu"),
        "2.weight": INPUT,
    }
    assert causes_in(model, method="synflow") == {}
    assert causes_in(make(), method="synflow") == {
        "0.weight": ends_at("relu"),
        "2.weight": ends_at("relu"),
    }
    softmax, _ = NETWORKS["a softmax over one element"]
    assert causes_in(softmax(), method="synflow") == {"0.weight": ends_at("softmax")}


def test_a_network_that_is_scored_in_evaluation_mode_is_explained_in_it() -> None:
    model = chain(linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), linear(6, 4))
    # With batch statistics half of the units fire, with the running ones none.
    model[1].running_mean.fill_(100.0)
    expected = {"0.weight": ends_at("relu"), "3.weight": INPUT}
    assert causes_in(deepcopy(model).eval(), method="snip") == expected
    assert causes_in(model, method="snip_it") == expected


def test_a_class_of_ones_own_that_scores_0_is_named_as_the_cause() -> None:
    from force_plugin import SNIP

    class Nothing(SNIP):
        @staticmethod
        def score(weight: Tensor, gradient: Tensor) -> Tensor:
            return gradient * 0

    model = chain(linear(5, 4))
    assert causes_in(model, method=Nothing) == {"0.weight": METHOD}


def test_noise_is_never_silent() -> None:
    for make, _ in NETWORKS.values():
        assert warned(make(), [], method="random") == []


# No gradient at all is something else


def test_a_detached_layer_is_an_error_and_not_a_silent_layer() -> None:
    model = chain(
        linear(5, 6), Apply(lambda x, zero: x.detach()), linear(6, 6), linear(6, 4)
    )
    for method in WITH_PASSES:
        with (
            unchanged(model),
            pytest.raises(NoGradientError, match=r"^no gradient reached 0\.weight"),
        ):
            force_prune(model, vectors(), 0.5, method=method, progress=False)
    diagnosis = diagnose(model, vectors())
    assert diagnosis.unused == ("0.weight",)
    assert diagnosis.silent == {}


def test_detached_and_silent_layers_are_told_apart() -> None:
    model = chain(
        linear(5, 6),
        Apply(lambda x, zero: x.detach()),
        linear(6, 6),
        dead_relu(6),
        linear(6, 4),
    )
    diagnosis = diagnose(model, vectors())
    assert diagnosis.unused == ("0.weight",)
    assert diagnosis.silent == {"2.weight": ends_at("relu"), "4.weight": INPUT}


def test_a_layer_that_the_last_batch_does_not_use_is_explained_all_the_same() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.always = nn.Linear(5, 4)
            self.first = nn.Linear(5, 4)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            y = self.always(x)
            return y + self.first(x) * 0 if len(x) == 8 else y

    inputs, targets = vectors()[0]
    batches = [(inputs, targets), (inputs[:4], targets[:4])]
    # In the first batch its gradient is 0, and the second has none of it.
    assert causes_in(Sometimes(), batches, method="snip", batches=2) == {
        "first.weight": "no gradient reaches it"
    }
    # The other way around, the last batch shows where it ends.
    assert causes_in(Sometimes(), batches[::-1], method="snip", batches=2) == {
        "first.weight": ends_at("mul")
    }


# What it costs, and what it leaves alone


class Counted(nn.Module):
    """Counts its passes in a list, behind a method that no restoring looks behind."""

    def __init__(self, model: nn.Module, passes: list[int]) -> None:
        super().__init__()
        self.model, self.note = model, passes.append

    def forward(self, x: Tensor) -> Tensor:
        self.note(len(x))
        return self.model(x)


@pytest.mark.parametrize(
    ("kind", "more"), [("nothing is silent", 0), ("what follows them", 1)]
)
@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("method", ["snip", "force", "grasp_it", "snip_it"])
def test_one_more_pass_is_made_only_where_a_layer_is_silent(
    method: str, batches: int, kind: str, more: int
) -> None:
    passes: list[int] = []
    model = Counted(NETWORKS[kind][0](), passes)
    steps = {"snip": 1, "snip_it": 7}.get(method, 4)
    # At a sparsity of 0 nothing can be disconnected, and nothing is tried.
    warned(model, vectors(3), method=method, batches=batches, steps=4)
    assert len(passes) == steps * batches + more


@pytest.mark.parametrize("kind", NETWORKS)
def test_asking_for_scores_explains_nothing(kind: str) -> None:
    passes: list[int] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saliency(Counted(NETWORKS[kind][0](), passes), vectors(), "snip")
    assert len(passes) == 1


def test_magnitudes_need_no_pass_to_be_explained() -> None:
    passes: list[int] = []
    model = Counted(chain(linear(5, 4)), passes)
    nn.init.zeros_(model.model[0].weight)
    assert len(warned(model, vectors(), method="magnitude")) == 1
    assert passes == []


def test_the_pass_is_of_the_last_batch() -> None:
    passes: list[int] = []
    inputs, targets = vectors()[0]
    batches = [(inputs[:n], targets[:n]) for n in (8, 5, 3)]
    model = Counted(NETWORKS["what follows them"][0](), passes)
    warned(model, batches, batches=3)
    assert passes == [8, 5, 3, 3]


def test_the_loader_is_not_read_again_for_the_cause() -> None:
    read: list[int] = []

    def loader() -> Iterator[Batch]:
        for number, batch in enumerate(vectors(3)):
            read.append(number)
            yield batch

    assert warned(NETWORKS["what follows them"][0](), loader(), batches=2)
    assert read == [0, 1]


class Restless(nn.Module):
    """Draws random numbers and keeps statistics in each pass."""

    def __init__(self, silent: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 4)
        self.side = nn.Linear(6, 4)
        # Both are almost 0, and only one of them is exactly 0.
        gain = torch.tensor(0.0 if silent else 1e-200, dtype=torch.float64)
        self.register_buffer("gain", gain)
        self.register_buffer("passes", torch.ones(()))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.first(x)) * self.passes.clone()
        self.passes.mul_(0.9)
        return self.head(x) + self.side(x) * self.gain


def test_the_steps_after_an_explanation_are_those_without_one() -> None:
    kept = []
    for silent in (True, False):
        model = Restless(silent)
        said = warned(
            model, vectors(2), method="iter_snip", sparsity=0.5, steps=5, batches=2
        )
        assert len(said) == silent
        kept.append([model.first.weight_mask, model.head.weight_mask])
    assert all(torch.equal(one, other) for one, other in zip(*kept, strict=True))


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("method", ["force", "grasp", "synflow", "snip_it"])
def test_explaining_leaves_no_trace(kind: str, method: str) -> None:
    model = NETWORKS[kind][0]()
    model(vectors()[0][0]).sum().backward()
    with unchanged(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diagnose(model, vectors(2), method, batches=2)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_pass_for_the_cause_that_fails_leaves_no_trace(
    error: type[BaseException],
) -> None:
    calls: list[int] = []

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise error("out of luck")
        return cross_entropy(network(batch[0]), batch[1])

    model = NETWORKS["what follows them"][0]()
    with unchanged(model), pytest.raises(error, match="out of luck"):
        force_prune(model, vectors(), 0.5, method="snip", forward=loss, progress=False)
    assert len(calls) == 2


def test_causes_are_those_of_a_model_that_is_pruned_in_part() -> None:
    model = NETWORKS["what follows them"][0]()
    prune.random_unstructured(model[0], "weight", 7)
    assert causes_in(model, method="snip") == NETWORKS["what follows them"][1]


def test_a_layer_that_is_pruned_entirely_is_said_to_be_so() -> None:
    model = chain(linear(5, 6), nn.Tanh(), linear(6, 4))
    prune.l1_unstructured(model[2], "weight", 1.0)
    assert causes_in(model, method="snip") == {
        "0.weight": ends_at("addmm"),
        "2.weight": BEFORE,
    }
    # Nothing is kept of it, and so nothing is said of what is.
    said = warned(model, sparsity=0.5)
    assert said[1] == (
        "1 of 2 layers (2.weight) had a saliency of exactly 0 everywhere at the first "
        f"step: {BEFORE}"
    )


def test_a_mask_does_not_hide_that_what_a_layer_multiplies_is_0() -> None:
    model = NETWORKS["what follows them"][0]()
    prune.random_unstructured(model[2], "weight", 7)
    assert causes_in(model, method="snip") == NETWORKS["what follows them"][1]


def test_causes_do_not_depend_on_what_else_is_scored() -> None:
    make, causes = NETWORKS["a dead branch"]
    model = make()
    for name, cause in causes.items():
        chosen: list[tuple[nn.Module, str]] = [
            (model.get_submodule(name.removesuffix(".weight")), "weight")
        ]
        assert warned(deepcopy_of(model, chosen), parameters=chosen) == [
            sentence(f"1 of 1 layers ({name})", cause)
        ]


def deepcopy_of(model: nn.Module, pairs: list[tuple[nn.Module, str]]) -> nn.Module:
    """A copy of a model, and its own modules in the place of the model's in pairs."""
    copy = deepcopy(model)
    modules: Mapping[nn.Module, nn.Module] = dict(
        zip(model.modules(), copy.modules(), strict=True)
    )
    pairs[:] = [(modules[module], name) for module, name in pairs]
    return copy
