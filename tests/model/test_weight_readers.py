"""Weights that others read, in whatever way, and hooks that compute from them."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from masked_by_hand import assert_at_rest, sgd
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear
from torch.nn.utils import prune, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from force_plugin import (
    apply_masks,
    force_prune,
    get_masks,
    load_pruned_state_dict,
    make_permanent,
)


class Reader(nn.Module):
    """Two layers whose weights are read without calling them, or not as usual."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    @property
    def last(self) -> Tensor:
        return self.layers[1].weight  # type: ignore[return-value]


TORCH_2_7 = torch.__version__.startswith("2.7.")


class Tied(Reader):
    """An autoencoder that calls its only layer, and reads the weight for the rest."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](torch.tanh(self.layers[0](x))) @ self.layers[0].weight


class Aliased(Reader):
    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layers.children()
        return second(first(x)) @ first.weight


class Loop(Reader):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = (x @ layer.weight.T + layer.bias).tanh()
        return x


class ByName(Reader):
    def forward(self, x: Tensor) -> Tensor:
        for number in "01":
            x = linear(x, getattr(self.layers, number).weight).tanh()
        return x


class Direct(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1].forward(self.layers[0].forward(x).tanh())


class Helped(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return _product(_product(x, self), self)


def _product(x: Tensor, model: Reader) -> Tensor:
    return (x * model.layers[0].weight.abs().sum()) @ model.last


class Listed(Reader):
    """The weights are in a list that PyTorch is given, and among keyword arguments."""

    def forward(self, x: Tensor) -> Tensor:
        layers: Any = self.layers
        both = torch.stack([layer.weight for layer in layers])
        return linear(input=x, weight=both.sum(0))


class _Linear(torch.autograd.Function):
    """Is given the tensor itself, and not what it is at the moment."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows, columns = gradient.flatten(0, -2), x.flatten(0, -2)
        return gradient @ weight, rows.T @ columns


class OwnFunction(Reader):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = _Linear.apply(x, layer.weight).tanh()
        return x


class Recomputed(Reader):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(linear, x, layer.weight, use_reentrant=False).tanh()
        return x


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.GRU(6, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.body.forward(x)[0]


READERS: dict[str, Callable[[], nn.Module]] = {
    "tied": Tied,
    "aliased": Aliased,
    "loop": Loop,
    "by name": ByName,
    "direct": Direct,
    "helped": Helped,
    "listed": Listed,
    "function": OwnFunction,
    "recomputed": Recomputed,
    "recurrent": Recurrent,
    "inside": lambda: nn.Sequential(nn.Linear(6, 6), Tied(), nn.Linear(6, 6)),
    "attention": lambda: nn.TransformerEncoderLayer(6, 2, 8, 0, batch_first=True),
}


def loss_of(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(inputs).square().sum()


def matrices(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [
        (module, key)
        for module in model.modules()
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 2
    ]


def resumed(model: nn.Module, x: Tensor) -> None:
    other = copy.deepcopy(model)
    scored(other, x)
    load_pruned_state_dict(model, other.state_dict())


def scored(model: nn.Module, x: Tensor) -> None:
    options: dict[str, Any] = {"parameters": matrices(model), "progress": False}
    force_prune(model, [x], 0.5, steps=2, forward=loss_of, **options)


def masked(model: nn.Module, x: Tensor) -> None:
    apply_masks(
        model,
        {
            name: torch.rand(parameter.shape) < 0.5
            for name, parameter in model.named_parameters()
            if parameter.ndim == 2
        },
    )


def unscored(model: nn.Module, x: Tensor) -> None:
    options: dict[str, Any] = {"parameters": matrices(model), "progress": False}
    force_prune(model, [], 0.5, method="magnitude", **options)


PRUNINGS = {"scored": scored, "masks": masked, "resumed": resumed, "none": unscored}
Run = Callable[[nn.Module], Callable[[Tensor], Tensor]]

RUNS: dict[str, Run] = {
    "plain": lambda model: model,
    "forward": lambda model: model.forward,
    "copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "compiled": lambda model: torch.compile(model, fullgraph=True, backend="aot_eager"),
    "checkpointed": lambda model: lambda x: checkpoint(model, x, use_reentrant=False),
}


def assert_trains_as_by_hand(
    model: nn.Module, dense: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor
) -> None:
    """Two steps with the losses and gradients of what is multiplied by hand."""
    masks = get_masks(model)
    assert masks
    owner = run if isinstance(run, nn.Module) else model
    own = {n.removeprefix("_orig_mod."): p for n, p in owner.named_parameters()}
    for _ in range(2):
        dense.zero_grad()
        owner.zero_grad()
        loss = run(x).square().sum()
        loss.backward()
        product = {
            name: parameter * masks[name] if name in masks else parameter
            for name, parameter in dense.named_parameters()
        }
        expected = functional_call(dense, product, (x,)).square().sum()
        expected.backward()
        torch.testing.assert_close(loss, expected)
        for name, parameter in dense.named_parameters():
            mine = own[f"{name}_orig" if name in masks else name]
            torch.testing.assert_close(mine.grad, parameter.grad)
            with torch.no_grad():
                if mine.grad is not None and parameter.grad is not None:
                    mine.sub_(mine.grad, alpha=0.01)
                    parameter.sub_(parameter.grad, alpha=0.01)
        assert any(own[f"{name}_orig"].grad.any() for name in masks)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("pruning", PRUNINGS)
def test_a_weight_that_is_read_trains_however_it_was_pruned(
    pruning: str, reader: str
) -> None:
    torch.manual_seed(0)
    model = READERS[reader]().double()
    dense, x = copy.deepcopy(model), torch.randn(3, 5, 6, dtype=torch.float64)
    PRUNINGS[pruning](model, x)
    assert_trains_as_by_hand(model, dense, model, x)
    assert_at_rest(model)
    copy.deepcopy(model)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("way", RUNS)
def test_a_weight_that_is_read_trains_however_the_model_runs(
    way: str, reader: str
) -> None:
    if reader == "recurrent" and way in ("compiled", "checkpointed"):
        pytest.skip("PyTorch's own error, for a GRU that is not called")
    if (way, reader) in (("compiled", "function"), ("checkpointed", "recomputed")):
        pytest.skip("PyTorch refuses to be given such a tensor there, with an error")
    if way == "compiled" and reader in ("loop", "helped") and TORCH_2_7:
        pytest.skip("torch 2.7 compiles no .T and no methods of such a tensor")
    torch.manual_seed(0)
    model = READERS[reader]().double()
    dense, x = copy.deepcopy(model), torch.randn(3, 5, 6, dtype=torch.float64)
    masked(model, x)
    torch._dynamo.reset()
    assert_trains_as_by_hand(model, dense, RUNS[way](model), x)
    assert_at_rest(model)
    copy.deepcopy(model)


def test_synflow_sees_who_reads_what_as_well() -> None:
    # It measures with other stand-ins than the methods that take gradients of a loss.
    torch.manual_seed(0)
    model = Aliased().double()
    dense, x = copy.deepcopy(model), torch.randn(3, 6, dtype=torch.float64)
    force_prune(model, [x], 0.5, method="synflow", steps=2, progress=False)
    assert_trains_as_by_hand(model, dense, model, x)


def test_a_loss_can_read_a_weight() -> None:
    model = Tied()
    masked(model, torch.empty(0))
    layer = model.layers[0]
    layer.weight.norm().backward()
    expected = layer.weight_orig * layer.weight_mask
    expected = expected / expected.norm()
    torch.testing.assert_close(layer.weight_orig.grad, expected.detach())


def test_what_is_read_is_the_weight_of_now() -> None:
    model: Any = nn.Linear(6, 4)
    mask = torch.rand(4, 6) < 0.5
    apply_masks(model, {"weight": mask})
    weight, by_hand = model.weight, model.weight_orig
    for change in (
        lambda: by_hand.data.add_(1),
        lambda: model.double(),
        lambda: model.weight_mask.fill_(True),
    ):
        change()
        assert torch.equal(weight, by_hand * model.weight_mask)
        assert weight.dtype == by_hand.dtype and weight.shape == by_hand.shape
        assert str(weight.detach()) == str((by_hand * model.weight_mask).detach())
    prune.remove(model, "weight")
    assert torch.equal(model.weight, by_hand) and torch.equal(weight, by_hand)
    weight.sum().backward()
    assert model.weight.grad is not None
    prune.l1_unstructured(model, "weight", 0.5)
    assert int(weight.count_nonzero()) == 12


def test_a_weight_of_what_is_gone_is_an_error() -> None:
    model, gone = nn.Linear(6, 4), nn.Linear(6, 4)
    for one in (model, gone):
        apply_masks(one, {"weight": torch.rand(4, 6) < 0.5})
    read, of_gone = model.weight, gone.weight
    del model.weight_orig, gone, one
    gc.collect()
    for weight in (read, of_gone):
        with pytest.raises(RuntimeError, match="a module that is gone, or has no such"):
            weight.sum()


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("change", ["moved", "frozen", "replaced", "swapped"])
def test_a_function_of_ones_own_trains_the_parameter_of_now(
    change: str, called: bool
) -> None:
    if change == "swapped" and not called:
        pytest.skip("PyTorch has poisoned the graph that there was, with an error")
    model, x = OwnFunction(), torch.randn(3, 6, dtype=torch.float64)
    masked(model, x)
    if change == "moved":
        model.double()
    elif change == "frozen":
        model = OwnFunction().double().requires_grad_(False)
        masked(model, x)
        assert not model.layers[0].weight.requires_grad
        model(x).sum()
        model.requires_grad_(True)
    elif change == "replaced":
        state = copy.deepcopy(model).double().state_dict()
        model.load_state_dict(state, assign=True)
    else:
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            model.double()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
    for layer in model.layers if called else ():
        layer(x)  # which has it noticed
    model(x).sum().backward()
    for layer in model.layers:
        assert layer.weight_orig.grad.dtype == torch.float64
        assert not layer.weight_orig.grad[~layer.weight_mask].any()


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.mul_(2),
        lambda w: w.clamp_(0, 1),
        lambda w: w.copy_(torch.ones(4, 6)),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: w.__iadd__(1),
        lambda w: torch.add(w, 1, out=w),
        lambda w: torch._foreach_mul_([w], 2.0),
        nn.init.zeros_,
        nn.init.kaiming_normal_,
    ],
)
def test_what_is_written_into_a_tensor_that_is_computed_is_not_lost_in_silence(
    write: Callable[[Tensor], object],
) -> None:
    model = nn.Linear(6, 4)
    apply_masks(model, {"weight": torch.rand(4, 6) < 0.5})
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad(), pytest.raises(RuntimeError, match="write into weight_orig"):
        write(model.weight)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_no_optimizer_takes_a_tensor_that_is_computed() -> None:
    model = nn.Linear(6, 4)
    apply_masks(model, {"weight": torch.rand(4, 6) < 0.5})
    with pytest.raises(ValueError, match="non-leaf"):
        torch.optim.SGD([model.weight], 0.1)


def test_a_weight_by_itself_can_be_saved() -> None:
    model = nn.Linear(6, 4)
    apply_masks(model, {"weight": torch.rand(4, 6) < 0.5})
    loaded = pickle.loads(pickle.dumps(model.weight))
    gc.collect()
    assert torch.equal(loaded, model.weight)
    saved = safetensors.torch.save({"weight": model.weight})
    assert torch.equal(safetensors.torch.load(saved)["weight"], model.weight)


def test_a_weight_copied_by_itself_is_a_tensor() -> None:
    model = nn.Linear(6, 4)
    apply_masks(model, {"weight": torch.rand(4, 6) < 0.5})
    alone = copy.deepcopy(model.weight)
    assert type(alone) is Tensor and torch.equal(alone, model.weight)
    assert not alone.requires_grad


def test_a_layer_can_be_called_by_itself_while_another_reads_it() -> None:
    model = Tied()
    masked(model, torch.empty(0))
    model.layers[0](torch.randn(2, 6)).sum().backward()
    assert_at_rest(model)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 7))
    assert_at_rest(model)
    copy.deepcopy(model)


# Forward pre-hooks that compute from the pruned tensor, in every order.


def equalised(layer: nn.Module, prepend: bool = False) -> nn.Module:
    """StyleGAN's learning rates: a hook computes the weight from another parameter."""
    weight = layer._parameters.pop("weight")
    assert weight is not None
    layer.weight_v, layer.weight = nn.Parameter(weight.data), weight.data

    def compute(layer: Any, inputs: object) -> None:
        layer.weight = layer.weight_v * 2

    layer.register_forward_pre_hook(compute, prepend=prepend)
    return layer


def noting(layer: nn.Module, prepend: bool = False) -> nn.Module:
    """A hook that has the gradient of a norm of the weight in the output."""

    def before(layer: Any, inputs: Any) -> Any:
        return (inputs[0] * layer.weight.norm(),)

    layer.register_forward_pre_hook(before, prepend=prepend)
    return layer


def spectral(layer: nn.Module, prepend: bool = False) -> nn.Module:
    return spectral_norm(layer).eval()  # in training, each forward changes a buffer


def norm(layer: nn.Module, prepend: bool = False) -> nn.Module:
    return weight_norm(layer)


HOOKED: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "weight_norm, v": (norm, "weight_v"),
    "weight_norm, g": (norm, "weight_g"),
    "spectral_norm": (spectral, "weight_orig"),
    "equalised": (equalised, "weight_v"),
    "a user's own": (noting, "weight"),
}


@pytest.mark.parametrize("hooked", HOOKED)
@pytest.mark.parametrize("order", ["before", "first", "after"])
@pytest.mark.parametrize("way", ["plain", "copy", "pickle"])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_a_hook_computes_from_the_pruned_tensor_of_this_forward(
    way: str, order: str, hooked: str
) -> None:
    wrap, name = HOOKED[hooked]
    if way == "pickle" and wrap in (equalised, noting):
        pytest.skip("local functions cannot be pickled")
    if way != "plain" and wrap is norm:
        pytest.skip("weight_norm itself leaves what cannot be copied")
    later = order == "after" and name == "weight"
    both = []
    for _ in range(2):
        torch.manual_seed(0)
        layer = nn.Linear(6, 4).double()
        both.append(nn.Sequential(layer if later else wrap(layer, order == "first")))
    model, dense = both
    mask = torch.rand(dense.get_parameter(f"0.{name}").shape) < 0.5
    apply_masks(model, {f"0.{name}": mask})
    for one in both if later else ():
        wrap(one[0])
    x = torch.randn(3, 6, dtype=torch.float64)
    assert_trains_as_by_hand(model, dense, RUNS[way](model), x)


@pytest.mark.parametrize("hooked", HOOKED)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_a_hook_computes_from_what_was_made_permanent(hooked: str) -> None:
    torch.manual_seed(0)
    wrap, name = HOOKED[hooked]
    model = nn.Sequential(wrap(nn.Linear(6, 4)))
    mask = torch.rand(model[0]._parameters[name].shape) < 0.5
    apply_masks(model, {f"0.{name}": mask})
    make_permanent(model)
    optimizer = sgd(model)
    before = getattr(model[0], name).detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, torch.randn(3, 6)).backward()
        optimizer.step()
    after = getattr(model[0], name).detach()
    assert not after[~mask].any() and (after != before)[mask].all()
