"""What goes wrong is one clear error, and the model is what it was before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kinds_of_methods import WITH_PASSES
from networks import perceptron, waves
from state import unchanged
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, IterableDataset

from force_plugin import SaliencyMethod, force_prune, saliency
from force_plugin.errors import NotFiniteError

NAN, INF = float("nan"), float("inf")


def network() -> nn.Sequential:
    return perceptron(nn.BatchNorm1d(8), nn.ReLU())


def batch(value: float | None = None) -> tuple[Tensor, Tensor]:
    """Five samples, the first input of which may be replaced."""
    inputs, targets = waves()
    if value is not None:
        inputs[0, 0] = value
    return inputs, targets


def expect(
    error: type[Exception],
    message: str,
    model: Any = None,
    loader: Any = None,
    sparsity: Any = 0.5,
    **options: Any,
) -> None:
    """Assert that a pruning raises this error and changes nothing."""
    model = network() if model is None else model
    loader = [batch()] if loader is None else loader
    with unchanged(model), pytest.raises(error, match=message):
        force_prune(model, loader, sparsity, **{"steps": 3, **options})


# Arguments.


@pytest.mark.parametrize(
    ("sparsity", "error", "message"),
    [
        (1, ValueError, r"sparsity: .*0 <= sparsity < 1, got 1$"),
        (1.5, ValueError, r"sparsity: .*got 1\.5"),
        (95, ValueError, r"sparsity: .*got 95; 95 % is 0\.95"),
        (-0.1, ValueError, r"sparsity: .*got -0\.1"),
        (NAN, ValueError, r"sparsity: .*got nan"),
        (0.9999, ValueError, r"sparsity: 0\.9999 leaves none of the 80 prunable"),
        ("0.9", TypeError, r"sparsity: expected a number, got str"),
        (None, TypeError, r"sparsity: expected a number, got NoneType"),
        (True, TypeError, r"sparsity: expected a number, got bool"),
    ],
)
def test_a_wrong_sparsity(sparsity: Any, error: type[Exception], message: str) -> None:
    expect(error, message, sparsity=sparsity)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, r"steps: expected at least 1, got 0"),
        ({"steps": -1}, ValueError, r"steps: expected at least 1, got -1"),
        ({"steps": 2.5}, TypeError, r"steps: expected an integer, got float"),
        ({"steps": "60"}, TypeError, r"steps: expected an integer, got str"),
        ({"batches": 0}, ValueError, r"batches: expected at least 1, got 0"),
        ({"batches": "all"}, TypeError, r"batches: expected an integer, got str"),
        ({"schedule": "cosine"}, ValueError, r"exponential, linear.*got 'cosine'"),
        ({"schedule": 3}, TypeError, r"schedule: expected .*, got int"),
        (
            {"schedule": lambda step, steps, density: 0.9},
            ValueError,
            r"schedule: the density after the last step must be 0\.5, got 0\.9",
        ),
        (
            {"schedule": lambda step, steps, density: 0.5 if step != 2 else 0.8},
            ValueError,
            r"schedule: .*never increase, got 0\.5, 0\.8, 0\.5",
        ),
        (
            {"schedule": lambda step, steps, density: 1.5 if step == 1 else density},
            ValueError,
            r"schedule: .*between 0 and 1.*got 1\.5",
        ),
        ({"microbatch": 0}, ValueError, r"microbatch: expected at least 1, got 0"),
        ({"microbatch": 0.5}, TypeError, r"microbatch: expected an integer, got float"),
        (
            {"autocast": torch.float16},
            ValueError,
            r"autocast: expected torch\.bfloat16 or None, got torch\.float16; .*",
        ),
        ({"autocast": True}, ValueError, r"autocast: expected .*, got True"),
        ({"loss_fn": "mse"}, TypeError, r"loss_fn: expected a callable, got str"),
        ({"loss_fn": None}, TypeError, r"loss_fn: expected a callable, got NoneType"),
        ({"forward": 1}, TypeError, r"forward: expected a callable, got int"),
    ],
)
def test_a_wrong_option(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    expect(error, message, **options)


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ("forse", ValueError, r"got 'forse'; did you mean 'force'\?"),
        ("GraSP-It", ValueError, r"got 'GraSP-It'; did you mean 'grasp_it'\?"),
        ("xyz", ValueError, r"expected one of force, iter_snip, .*, got 'xyz'$"),
        (3, TypeError, r"method: expected a name or a subclass .*, got int"),
        (nn.Linear, TypeError, r"method: .*subclass of SaliencyMethod, got Linear"),
        (None, TypeError, r"method: .*got NoneType"),
    ],
)
@pytest.mark.parametrize("call", ["force_prune", "saliency"])
def test_a_wrong_method(
    call: str, method: Any, error: type[Exception], message: str
) -> None:
    if call == "force_prune":
        expect(error, message, method=method)
        return
    with pytest.raises(error, match=message):
        saliency(network(), [batch()], method)


def test_an_argument_is_checked_before_a_batch_is_read() -> None:
    def never() -> Iterator[Any]:
        pytest.fail("a batch was read")
        yield

    wrong: list[dict[str, Any]] = [
        *({"steps": 0}, {"batches": 0}, {"method": "x"}, {"schedule": "x"}),
        *({"microbatch": 0}, {"autocast": torch.float16}),
    ]
    for options in wrong:
        with pytest.raises(ValueError, match="expected"):
            force_prune(network(), never(), 0.5, **options)


def test_an_argument_is_checked_before_the_progress_bar_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ValueError, match="batches"):
        force_prune(network(), [batch()], 0.5, batches=0)
    assert capsys.readouterr().err == ""


# Models.


@pytest.mark.parametrize("model", [None, "resnet18", nn.Linear, torch.zeros(2)])
@pytest.mark.parametrize("call", [force_prune, saliency])
def test_a_model_that_is_no_module(model: Any, call: Callable[..., Any]) -> None:
    name = type(model).__name__
    with pytest.raises(TypeError, match=rf"model: expected .*Module, got {name}"):
        call(model, [batch()], 0.5 if call is force_prune else "snip")


def lazy_weight() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.LazyLinear(4))


def lazy_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.LazyBatchNorm1d(), nn.Linear(8, 4))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Sequential(nn.ReLU()), r"nothing to prune: .*parameters="),
        (lambda: nn.Embedding(4, 4), r"nothing to prune: .*parameters="),
        (lambda: nn.Linear(0, 4), r"nothing to prune"),
        (lambda: nn.Linear(6, 4, device="meta"), r"^weight is on the meta device"),
        (lazy_weight, r"^1\.weight has no shape yet \(a lazy module\)"),
        (lazy_norm, r"^1\.weight has no shape yet \(a lazy module\)"),
    ],
    ids=["no weights", "none by default", "empty", "meta", "lazy", "lazy norm"],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_model_that_cannot_be_pruned(
    build: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        force_prune(build(), [batch()], 0.5)


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        (lambda model: [], ValueError, r"nothing to prune: parameters= is empty"),
        (
            lambda model: model.parameters(),
            TypeError,
            r'parameters: expected pairs \(module, "weight"\) .*got Parameter',
        ),
        (lambda model: [model[0]], TypeError, r"expected pairs .*got Linear"),
        (lambda model: [("weight", model[0])], TypeError, r"expected pairs .*tuple"),
        (lambda model: [(model[0], "weight", 1)], TypeError, r"expected pairs"),
        (lambda model: ["0.weight"], TypeError, r"expected pairs .*got str: 0\.weight"),
        (lambda model: 5, TypeError, r"parameters: expected .*got int"),
        (
            lambda model: [(nn.Linear(6, 8), "weight")],
            ValueError,
            r"parameters: a Linear given with 'weight' is not part of the model",
        ),
        (
            lambda model: [(model[0], "wieght")],
            ValueError,
            r"Linear has no parameter 'wieght'; it has weight, bias",
        ),
        (
            lambda model: [(model[1], "running_mean")],
            ValueError,
            r"BatchNorm1d has no parameter 'running_mean'; it has weight, bias",
        ),
        (lambda model: [(model[2], "weight")], ValueError, r"ReLU .*it has none"),
    ],
)
def test_wrong_parameters(
    pairs: Callable[[nn.Module], Any], error: type[Exception], message: str
) -> None:
    model = network()
    expect(error, message, model, parameters=pairs(model))


def test_a_pruned_model_cannot_be_pruned_to_less() -> None:
    model = network()
    force_prune(model, [batch()], 0.8, steps=2, on_collapse="warn", progress=False)
    expect(ValueError, r"sparsity: .*pruned to 0\.8 already.*got 0\.5", model)


# Loaders.


class Empty(IterableDataset[Any]):
    """A data set of no samples, of which nobody knows the length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


@pytest.mark.parametrize("method", ["force", "synflow", "grasp"])
@pytest.mark.parametrize("batches", [1, None])
@pytest.mark.parametrize(
    "loader", [[], (), DataLoader(Empty())], ids=["list", "tuple", "loader"]
)
def test_an_empty_loader(loader: Any, batches: int | None, method: str) -> None:
    message = r"loader: expected at least one batch, got none"
    expect(ValueError, message, loader=loader, batches=batches, method=method)


@pytest.mark.parametrize(
    ("count", "batches", "step", "after"),
    [(2, None, 2, 0), (3, 2, 2, 1), (1, 2, 1, 1), (2, 1, 3, 0), (0, 1, 1, 0)],
)
def test_a_generator_that_runs_dry(
    count: int, batches: int | None, step: int, after: int
) -> None:
    message = rf"ran dry at step {step} after {after} batches.*DataLoader or a list"
    loader = (batch() for _ in range(count))
    expect(ValueError, message, loader=loader, batches=batches)


@pytest.mark.parametrize("loader", [5, object(), lambda: [batch()]])
def test_a_loader_that_is_not_iterable(loader: Any) -> None:
    name = type(loader).__name__
    expect(TypeError, rf"loader: expected an iterable .*got {name}", loader=loader)


@pytest.mark.parametrize(
    ("wrong", "came"),
    [
        (batch()[0], r"float32\(5, 6\)"),
        ({"inputs": batch()[0]}, "a dict"),
        ((*batch(), 3), "a tuple of 3"),
        ([batch()[0]], "a list of 1"),
        ("ab", "a str"),
        (None, "a NoneType"),
    ],
)
@pytest.mark.parametrize("method", ["force", "grasp"])
def test_a_batch_that_is_no_pair(wrong: Any, came: str, method: str) -> None:
    message = rf"loader: expected batches \(inputs, targets\), got {came}; .*forward="
    expect(ValueError, message, loader=[batch(), wrong], batches=2, method=method)


@pytest.mark.parametrize(
    ("wrong", "came"),
    [
        ([0.5, {"x": torch.tensor(1.0)}], "a list of 2"),
        ({"x": "ab"}, "a dict"),
        (batch()[0][:0], r"float32\(0, 6\)"),
    ],
)
@pytest.mark.parametrize("method", ["force", "grasp"])
def test_a_batch_without_samples_to_split(wrong: Any, came: str, method: str) -> None:
    message = rf"microbatch: expected .*, got {came} without; leave microbatch out"
    expect(ValueError, message, loader=[batch(), wrong], batches=2, microbatch=3)


@pytest.mark.parametrize("wrong", [({"x": batch()[0]}, 0), {"x": batch()[0]}])
def test_a_batch_of_which_synflow_cannot_tell_the_shape(wrong: Any) -> None:
    message = r"^SynFlow: expected .* one floating-point tensor .*, got a dict; take"
    expect(ValueError, message, loader=[wrong], method="synflow")


def test_synflow_does_not_ask_for_the_forward_that_it_was_given() -> None:
    with pytest.raises(ValueError, match="SynFlow") as raised:
        saliency(
            network(),
            [{"x": batch()[0]}],
            "synflow",
            forward=lambda model, batch: model(batch["x"]).sum(),
        )
    assert "pass forward=" not in str(raised.value)


# Losses and gradients.


def second_call(value: Callable[[Tensor], Any]) -> Callable[[Tensor, Tensor], Any]:
    """A cross-entropy whose second value is another one."""
    calls = 0

    def loss_fn(outputs: Tensor, targets: Tensor) -> Any:
        nonlocal calls
        calls += 1
        loss = cross_entropy(outputs, targets)
        return loss if calls == 1 else value(loss)

    return loss_fn


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (lambda x: x.expand(3), ValueError, r"expected a loss of one number.*\(3,\)"),
        (lambda x: x.item(), ValueError, r"loss_fn: .*one number, got a float"),
        (lambda x: None, ValueError, r"loss_fn: .*one number, got a NoneType"),
        (lambda x: (x, x), ValueError, r"loss_fn: .*one number, got a tuple of 2"),
        (lambda x: x.detach(), RuntimeError, r"loss_fn: .*without detach or no_grad"),
        (lambda x: x * NAN, RuntimeError, r"the loss is nan at step 2"),
        (lambda x: x * INF, RuntimeError, r"the loss is inf at step 2"),
    ],
    ids=["vector", "float", "None", "pair", "detached", "nan", "inf"],
)
def test_a_loss_that_cannot_be_used(
    value: Callable[[Tensor], Any], error: type[Exception], message: str
) -> None:
    expect(error, message, loss_fn=second_call(value))


def test_a_wrong_loss_of_forward_is_called_forwards() -> None:
    message = r"forward: expected a loss of one number, got float32\(5, 4\)"
    expect(ValueError, message, forward=lambda model, batch: model(batch[0]))


def test_a_network_that_runs_without_gradients() -> None:
    class Frozen(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    expect(RuntimeError, r"without detach or no_grad", Frozen(6, 4))


@pytest.mark.parametrize(
    ("targets", "loss_fn", "came"),
    [
        (torch.arange(5) % 4 + 0.5, cross_entropy, r"float32\(5, 4\).*float32\(5,\)"),
        (torch.arange(3), cross_entropy, r"float32\(5, 4\).*int64\(3,\)"),
        (torch.arange(5), cross_entropy, r"Target 4 is out of bounds"),
        (torch.rand(3, 4), mse_loss, r"float32\(5, 4\).*float32\(3, 4\)"),
        ([0, 1, 2, 3, 0], cross_entropy, r"float32\(5, 4\).*a list of 5"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_targets_that_the_loss_does_not_take(
    targets: Any, loss_fn: Callable[..., Any], came: str
) -> None:
    expect(ValueError, rf"(?s){came}", loader=[(batch()[0], targets)], loss_fn=loss_fn)


def test_the_error_of_a_loss_is_the_cause() -> None:
    with pytest.raises(ValueError, match="in the loss") as raised:
        saliency(network(), [batch()], loss_fn=lambda *_: {}["in the loss"])
    assert isinstance(raised.value.__cause__, KeyError)


def test_the_error_of_a_network_is_left_as_it_is() -> None:
    inputs, targets = batch()
    expect(RuntimeError, r"mat1 and mat2 shapes", loader=[(inputs[:, :3], targets)])


class Unused(nn.Module):
    """A network with a layer that its forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 4)
        self.spare = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("method", WITH_PASSES)
@pytest.mark.parametrize("batches", [1, 2])
def test_a_weight_without_gradient_is_named(method: str, batches: int) -> None:
    message = r"no gradient reached spare\.weight at step 1: .*parameters="
    expect(RuntimeError, message, Unused(), method=method, batches=batches)


def test_a_weight_that_is_left_out_needs_no_gradient() -> None:
    model = Unused()
    chosen = [(model.body, "weight")]
    report = force_prune(
        model, [batch()], 0.5, steps=2, parameters=chosen, progress=False
    )
    assert [layer.name for layer in report.layers] == ["body.weight"]


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("method", ["force", "grasp", "grasp_it", "snip_it"])
def test_a_wrong_number_in_the_inputs_names_the_step(method: str, value: float) -> None:
    loader = [batch(), batch(value)]
    step = 1 if method == "grasp" else 2
    batches = 2 if method == "grasp" else 1
    expect(
        RuntimeError, rf"at step {step}", loader=loader, method=method, batches=batches
    )


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("method", ["force", "grasp", "synflow", "magnitude"])
def test_a_wrong_number_in_a_weight_names_the_layer(method: str, value: float) -> None:
    model = network()
    with torch.no_grad():
        model[3].weight[1, 2] = value
    expect(RuntimeError, r"3\.weight", model, method=method)


def test_a_gradient_that_is_not_finite_names_the_layer_and_the_step() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.detach()).sqrt()  # 0, with an infinite slope

    model = nn.Sequential(nn.Linear(6, 4), Root(), nn.Linear(4, 4))
    message = r"saliency of 0\.weight is not finite at step 1: its gradient"
    expect(RuntimeError, message, model)


# Methods of one's own.


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (
            lambda weight, signal: weight.sum(),
            r"shape \(8, 6\) for 0\.weight, got \(\)",
        ),
        (
            lambda weight, signal: weight.T,
            r"shape \(8, 6\) for 0\.weight, got \(6, 8\)",
        ),
        (lambda weight, signal: 1.0, r"expected a tensor .*, got a float$"),
        (lambda weight, signal: None, r"expected a tensor .*, got a NoneType$"),
        (
            lambda weight, signal: weight.tolist(),
            r"expected a tensor .*, got a list of",
        ),
        (lambda weight, signal: (weight, signal), r"expected .*, got a tuple of 2$"),
    ],
)
def test_a_score_of_another_shape(score: Callable[..., Any], message: str) -> None:
    method = type("Mine", (SaliencyMethod,), {"score": staticmethod(score)})
    expect(ValueError, rf"Mine\.score: .*{message}", method=method)


def test_a_score_that_is_not_a_number_names_the_layer() -> None:
    class Logarithm(SaliencyMethod):
        @staticmethod
        def score(weight: Tensor, signal: Tensor) -> Tensor:
            return weight.log()

    message = (
        r"^the saliency of 0\.weight, 3\.weight is not finite at step 1: the weight and"
        r" its signal are finite, and Logarithm\.score makes NaN or inf of them; mend"
    )
    expect(NotFiniteError, message, method=Logarithm)


def test_a_second_derivative_that_pytorch_lacks_is_said_to_be_lacking() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Hardsigmoid(), nn.Linear(8, 3))
    batch = (torch.randn(5, 6), torch.arange(5) % 3)
    with (
        unchanged(model),
        pytest.raises(RuntimeError, match="GraSP needs second deriv"),
    ):
        force_prune(model, [batch], 0.5, method="grasp", progress=False)


def test_steps_that_a_method_does_not_take_are_said_not_to_be_used() -> None:
    model = nn.Linear(6, 3)
    batch = (torch.randn(5, 6), torch.arange(5) % 3)
    options: dict[str, Any] = {"method": "snip", "progress": False}
    assert force_prune(model, [batch], 0.1, **options).warnings == ()
    report = force_prune(model, [batch], 0.5, steps=10, **options)
    assert report.warnings == ("steps=10 was not used: snip has its own number",)
