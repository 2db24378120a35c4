"""A smaller model that computes the same, without the channels that masks cut off."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from networks import conv_network, tiny_resnet
from smaller_models import (
    as_trained,
    assert_same,
    convolutions,
    fixed_shape,
    images,
    mlp,
    prunable,
    random_masks,
    recurrent,
    row_masks,
    sequences,
    shrink,
    size,
    vectors,
    widths,
    without,
)
from state import unchanged
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from force_plugin import apply_masks, compact, force_prune, get_masks, make_permanent


def small_vgg() -> nn.Module:
    return nn.Sequential(
        *convolutions(3, 16),
        nn.MaxPool2d(2),
        *convolutions(16, 32),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def small_densenet() -> nn.Module:
    return timm.models.densenet.DenseNet(4, (2, 2), num_classes=5, bn_size=2)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "tiny_resnet": (tiny_resnet, 16),
    "test_resnet": (lambda: timm.create_model("test_resnet", num_classes=10), 32),
    "test_convnext": (lambda: timm.create_model("test_convnext", num_classes=10), 32),
    "test_vit": (lambda: timm.create_model("test_vit", num_classes=10), 160),
    "test_efficientnet": (
        lambda: timm.create_model("test_efficientnet", num_classes=10),
        32,
    ),
    "regnetx": (lambda: timm.create_model("regnetx_002", num_classes=10), 32),
    "densenet": (small_densenet, 32),
    "vgg": (small_vgg, 16),
}


def made(name: str, trained: bool = False) -> tuple[Any, Tensor]:
    build, size = NETWORKS[name]
    torch.manual_seed(0)
    model = build().double()
    if trained:
        as_trained(model)
    return model, images(size)


@pytest.mark.filterwarnings("ignore:the masks have disconnected the network")
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_stay_under_random_masks(name: str, trained: bool) -> None:
    model, inputs = made(name, trained)
    apply_masks(model, random_masks(model, 0.03))
    small = shrink(model, inputs)
    if not trained:  # else there may be a constant in each of the channels
        assert size(small) < size(model)
    assert_same(model, small, inputs)


@pytest.mark.filterwarnings("ignore:the masks have disconnected the network")
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit", "vgg"])
def test_outputs_stay_without_rows_and_columns(name: str, trained: bool) -> None:
    model, inputs = made(name, trained)
    apply_masks(model, row_masks(model))
    small = shrink(model, inputs)
    assert size(small) < size(model)
    assert_same(model, small, inputs)


def test_outputs_stay_in_a_resnet_of_full_width() -> None:
    model = timm.create_model("resnet18", num_classes=10).double()
    apply_masks(model, row_masks(model))
    small = shrink(model, images())
    assert size(small) < 0.5 * size(model)
    assert_same(model, small, images())


def _structured(model: nn.Module) -> None:
    for layer in list(prunable(model).values())[:-1]:
        prune.ln_structured(layer, "weight", 0.4, n=2, dim=0)


def _global(model: nn.Module) -> None:
    pairs = [(layer, "weight") for layer in prunable(model).values()]
    prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.99)


def _custom(model: nn.Module) -> None:
    for name, mask in random_masks(model, 0.03).items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        prune.custom_from_mask(layer, "weight", mask)


def _permanent(model: nn.Module) -> None:
    apply_masks(model, random_masks(model, 0.03))
    make_permanent(model)


def _zeros(model: nn.Module) -> None:
    apply_masks(model, random_masks(model, 0.03))
    make_permanent(model, hold_zeros=False)


def _twice(model: nn.Module) -> None:
    _custom(model)
    for layer in prunable(model).values():
        prune.l1_unstructured(layer, "weight", 0.5)


def _norms_and_biases(model: nn.Module) -> None:
    for module in list(model.modules()):
        if isinstance(module, nn.BatchNorm2d):
            prune.l1_unstructured(module, "weight", 0.5)
            prune.l1_unstructured(module, "bias", 0.7)


def _by_force(model: nn.Module) -> None:
    batch = (images(16), torch.arange(2))
    force_prune(model, [batch], sparsity=0.9, steps=3, progress=False)


PRUNINGS: dict[str, Callable[[nn.Module], None]] = {
    "structured": _structured,
    "global": _global,
    "custom": _custom,
    "permanent": _permanent,
    "zeros": _zeros,
    "twice": _twice,
    "norms_and_biases": _norms_and_biases,
    "force": _by_force,
}


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("pruning", PRUNINGS)
def test_outputs_stay_however_it_was_pruned(pruning: str, trained: bool) -> None:
    model, inputs = made("tiny_resnet", trained)
    PRUNINGS[pruning](model)
    masks = get_masks(model)
    small = shrink(model, inputs)
    if not trained and pruning not in ("norms_and_biases", "force"):
        assert size(small) < size(model)
    assert set(get_masks(small)) == set(masks)
    assert prune.is_pruned(small) == prune.is_pruned(model)
    assert_same(model, small, inputs)


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_channels_that_a_masked_normalisation_silences_go(trained: bool) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3)
    ).double()
    if trained:
        as_trained(model)
    mask = torch.arange(8) % 2 == 0
    apply_masks(model, {"1.weight": mask, "1.bias": mask})
    small = shrink(model, images(8))
    assert small[0].out_channels == small[1].num_features == 4
    assert_same(model, small, images(8))


@pytest.mark.parametrize("pruning", ["random", "rows"])
def test_outputs_are_the_same_when_gates_that_were_closed_open(pruning: str) -> None:
    model, inputs = made("tiny_resnet")
    gates = [3, 7]
    for block in gates:
        nn.init.zeros_(model[block].bn2.weight)
    masks = random_masks(model, 0.03) if pruning == "random" else row_masks(model)
    apply_masks(model, masks)
    small = shrink(model, inputs)
    assert size(small) < size(model)
    # A gate does not cut off what is behind it.
    assert small[3].conv1.out_channels > 1
    for one in (model, small):
        for block in gates:
            nn.init.ones_(one[block].bn2.weight)
    assert_same(model, small, inputs)


def test_weak_weights_stay_weak_or_are_refused() -> None:
    # A mask of PyTorch may hold other values than 0 and 1.
    model = nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)
    ).double()
    mask = torch.ones(8, 6, dtype=torch.float64)
    mask[:3], mask[3] = 0, 0.5
    prune.custom_from_mask(model[0], "weight", mask)
    try:
        small = shrink(model, vectors())
    except (RuntimeError, ValueError):
        return
    assert_same(model, small, vectors())


# What stays, and what is left when all is cut off.


@pytest.mark.parametrize("name", ["tiny_resnet", "regnetx", "densenet", "vgg"])
def test_a_channel_stays_everywhere_and_it_is_told(name: str) -> None:
    model, inputs = made(name)
    masks = {f"{n}.weight": torch.zeros(()) for n in prunable(model)}
    shapes = {n: p.shape for n, p in model.named_parameters()}
    apply_masks(model, {n: mask.expand(shapes[n]) for n, mask in masks.items()})
    with pytest.warns(UserWarning, match="the masks have disconnected the network"):
        small = shrink(model, inputs)
    found = widths(small)
    assert min(min(pair) for pair in found.values()) == 1
    assert size(small) < 0.1 * size(model)
    assert found[next(iter(found))][1] == 3
    assert_same(model, small, inputs)


def test_units_that_are_asleep_are_no_disconnection() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    without(model[0], rows=[1])
    with torch.no_grad():
        model[0].bias.fill_(-100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shrink(model, vectors())


def test_a_network_that_is_connected_warns_of_nothing() -> None:
    model, inputs = made("tiny_resnet")
    apply_masks(model, row_masks(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shrink(model, inputs)


@pytest.mark.filterwarnings("ignore:the masks have disconnected the network")
@pytest.mark.parametrize("name", ["tiny_resnet", "test_resnet", "test_vit"])
def test_a_second_time_takes_out_nothing_more(name: str) -> None:
    model, inputs = made(name)
    apply_masks(model, random_masks(model, 0.03))
    small = shrink(model, inputs)
    again = shrink(small, inputs)
    assert widths(again) == widths(small) != widths(model)
    expected = small.state_dict()
    for key, value in again.state_dict().items():
        assert torch.equal(value, expected[key])


def test_masks_that_cut_off_nothing_give_a_copy() -> None:
    model, inputs = made("tiny_resnet")
    apply_masks(model, random_masks(model, 0.9))
    small = shrink(model, inputs)
    state, expected = small.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in state)
    assert not {*map(id, small.parameters())} & {*map(id, model.parameters())}


# The original and the process around it.


def hooked(seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A model with hooks, modes, gradients and a frozen layer."""
    torch.manual_seed(seed)
    model = tiny_resnet()
    apply_masks(model, random_masks(model, 0.02))
    model(images(16).float()).sum().backward()
    model[3].eval()
    model[0].weight_orig.requires_grad_(False)
    model[4].register_forward_hook(print_nothing)
    return model, images(16)


def print_nothing(*_: object) -> None: ...


def test_the_original_is_untouched() -> None:
    model, inputs = hooked()
    with unchanged(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shrink(model, inputs)


@pytest.mark.parametrize("pruning", ["structured", "permanent", "zeros", "force"])
def test_the_original_is_untouched_however_it_was_pruned(pruning: str) -> None:
    model, inputs = made("tiny_resnet")
    PRUNINGS[pruning](model)
    model(inputs).sum().backward()
    with unchanged(model):
        shrink(model, inputs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_can_be_called_where_gradients_are_off(mode: Callable[[], Any]) -> None:
    model, inputs = made("tiny_resnet")
    apply_masks(model, row_masks(model))
    with mode():
        small = shrink(model, inputs)
    assert size(small) < size(model)
    small.train()(inputs).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_the_examples_are_not_changed_and_may_be_of_any_number() -> None:
    model = mlp(6, 12, 3)
    without(model[0], rows=[0, 1])
    for samples in (1, 2, 7):
        inputs = vectors(samples=samples)
        before = inputs.clone()
        assert shrink(model, inputs)[0].out_features == 10
        assert torch.equal(inputs, before) and not inputs.requires_grad


def test_the_same_call_gives_the_same_model() -> None:
    model, inputs = made("test_resnet")
    apply_masks(model, random_masks(model, 0.03))
    one = shrink(model, inputs)
    torch.manual_seed(17)
    other = shrink(model, inputs)
    assert widths(one) == widths(other)


WRONG: dict[str, tuple[Callable[[], Any], Any, type[Exception], str]] = {
    "not_pruned": (conv_network, images(5, 2), ValueError, r"^compact: .*without any"),
    "no_module": (lambda: 3, vectors(), TypeError, r"^model: expected a torch\.nn"),
    "class": (lambda: nn.Linear, vectors(), TypeError, r"^model: .*got type"),
    "no_tensor": (lambda: pruned(), "images", TypeError, r"^example_inputs: .*a str"),
    "nothing": (lambda: pruned(), None, TypeError, r"^example_inputs: expected"),
    "empty": (lambda: pruned(), (), TypeError, r"^example_inputs: .*a tuple of 0"),
    "shape": (
        lambda: pruned(),
        vectors(3),
        RuntimeError,
        r"^Sequential cannot be run with example_inputs.*The model is as it was$",
    ),
    "names": (
        lambda: pruned(),
        {"y": vectors()},
        RuntimeError,
        r"^Sequential cannot be run .*'y'.*The model is as it was$",
    ),
    "untraceable": (
        lambda: pruned(recurrent(nn.GRU)(), "layers.0"),
        sequences(),
        RuntimeError,
        r"^torch-pruning cannot trace Wrapped, .* GRU. The model is as it was$",
    ),
    "fixed": (
        lambda: pruned(fixed_shape(), "layers.0"),
        vectors(),
        RuntimeError,
        r"^Wrapped: none of the channels .*The model is as it was$",
    ),
}


def pruned(model: nn.Module | None = None, layer: str = "0") -> nn.Module:
    model = model or mlp(6, 8, 3)
    without(model.get_submodule(layer), rows=[0, 1, 2])
    return model


@pytest.mark.parametrize("case", WRONG)
def test_an_error_says_what_is_wrong_and_leaves_the_model(case: str) -> None:
    build, inputs, error, message = WRONG[case]
    model = build()
    watched = model if isinstance(model, nn.Module) else nn.ReLU()
    with unchanged(watched), pytest.raises(error, match=message):
        shrink(model, inputs)


# The smaller model.


def test_modes_and_frozen_parameters_are_those_of_the_original() -> None:
    model, inputs = made("tiny_resnet")
    apply_masks(model, row_masks(model))
    model.train()
    model[3].eval()
    model[4].weight_orig.requires_grad_(False)
    small = shrink(model, inputs)
    for (name, one), (other, own) in zip(
        small.named_modules(), model.named_modules(), strict=True
    ):
        assert name == other and one.training is own.training
    frozen = [n for n, p in small.named_parameters() if not p.requires_grad]
    assert frozen == ["4.weight_orig"]
    assert all(p.grad is None for p in small.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_stay(dtype: torch.dtype) -> None:
    model = tiny_resnet().to(dtype)
    apply_masks(model, row_masks(model))
    small = shrink(model, images(16))
    expected = {k: v.dtype for k, v in model.state_dict().items()}
    assert {k: v.dtype for k, v in small.state_dict().items()} == expected
    assert size(small) < size(model)
    # Bit for bit, under the mask and not: nothing of it went through another type.
    own = {n: {*p.flatten().tolist()} for n, p in model.named_parameters()}
    for name, parameter in small.named_parameters():
        assert {*parameter.flatten().tolist()} <= own[name]


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
@pytest.mark.parametrize("permanent", [False, True])
def test_parameters_keep_names_and_order(name: str, permanent: bool) -> None:
    model, inputs = made(name)
    apply_masks(model, row_masks(model))
    order = [n for n, _ in model.named_parameters()]
    if permanent:
        make_permanent(model)
        order = [n for n, _ in model.named_parameters()]
    small = shrink(model, inputs)
    assert [n for n, _ in small.named_parameters()] == order
    assert list(small.state_dict()) == list(model.state_dict())
    for (_, one), (_, own) in zip(
        small.named_parameters(), model.named_parameters(), strict=True
    ):
        assert one.dim() == own.dim() and one.numel() <= own.numel()


@pytest.mark.parametrize("permanent", [False, True])
def test_what_is_pruned_stays_0_in_training(permanent: bool) -> None:
    model, inputs = made("tiny_resnet")
    apply_masks(model, random_masks(model, 0.05))
    if permanent:
        make_permanent(model)
    small = shrink(model, inputs).train()
    masks = get_masks(small)
    assert any(not mask.all() for mask in masks.values())
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1, momentum=0.9)
    before = {n: p.detach().clone() for n, p in small.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(small(inputs), torch.tensor([1, 2])).backward()
        optimizer.step()
    small(inputs)
    for name, mask in masks.items():
        module, _, key = name.rpartition(".")
        assert not getattr(small.get_submodule(module), key)[~mask].any()
    after = dict(small.named_parameters())
    assert any(not torch.equal(after[name], before[name]) for name in after)


def test_it_can_be_copied_and_pruned_further() -> None:
    model, inputs = made("tiny_resnet")
    apply_masks(model, random_masks(model, 0.03))
    small = shrink(model, inputs)
    small(inputs)
    copied = copy.deepcopy(small)
    assert_same(small, copied, inputs)
    force_prune(
        copied, [(inputs, torch.arange(2))], sparsity=0.99, steps=1, progress=False
    )
    for name, mask in get_masks(copied).items():
        assert not (mask & ~get_masks(small)[name]).any()


def test_timm_models_know_the_width_of_their_new_head() -> None:
    model, inputs = made("test_resnet")
    without(model.fc, columns=range(60))
    small = shrink(model, inputs)
    width = small.get_classifier().in_features
    assert width < model.get_classifier().in_features == model.num_features
    assert small.num_features == width
    assert small.forward_head(small.forward_features(inputs), True).shape == (2, width)
    small.reset_classifier(7)
    small.double()
    assert small(inputs).shape == (2, 7)


def test_layers_that_count_channels_count_those_that_stay() -> None:
    model, inputs = made("regnetx")
    apply_masks(model, row_masks(model))
    for module in shrink(model, inputs).modules():
        if isinstance(module, nn.Conv2d):
            rows, columns = module.weight.shape[:2]
            assert module.out_channels == rows
            assert module.in_channels == columns * module.groups
        elif isinstance(module, nn.BatchNorm2d):
            variances = module.get_buffer("running_var")
            assert module.num_features == len(module.weight) == len(variances)
        elif isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape


def losses(model: nn.Module, steps: int, momentum: float = 0.0) -> list[float]:
    inputs = images(6) if isinstance(model[0], nn.Conv2d) else vectors(3)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(inputs).flatten(1).mean(1), torch.ones(2).double())
        loss.backward()
        optimizer.step()
        found.append(float(loss))
    return found


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("build", [mlp, convolutions])
def test_it_trains_as_the_masked_model_does(
    build: Callable[..., nn.Sequential], momentum: float
) -> None:
    torch.manual_seed(1)
    model = build(3, 40, 40, 4) if build is mlp else build(3, 20, 20, 4)
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.bias.requires_grad_(False)
    apply_masks(model, random_masks(model, 0.3 if build is mlp else 0.04))
    small = shrink(model, _inputs(build))
    assert size(small) < 0.8 * size(model)
    expected = losses(model, 6, momentum)
    assert expected[-1] < expected[0]
    assert losses(small, 6, momentum) == pytest.approx(expected, rel=1e-8)


def _inputs(build: object) -> Tensor:
    return vectors(3) if build is mlp else images(6)


def test_channels_that_nobody_reads_are_not_missed_in_training() -> None:
    torch.manual_seed(0)
    model = convolutions(3, 12, 12, 4)
    as_trained(model)
    without(model[3], columns=[0, 1, 5])
    without(model[6], columns=[2, 3, 4, 7])
    small = shrink(model, images(6))
    assert [*widths(small).values()] == [(9, 3), (8, 9), (4, 8)]
    assert losses(small, 5) == pytest.approx(losses(model, 5), rel=1e-8)


def test_progress_is_shown_unless_it_is_not_wanted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shrink(pruned(), vectors())
    assert capsys.readouterr() == ("", "")
    compact(pruned(), vectors())
    shown = capsys.readouterr()
    assert "compact" in shown.err and "100%" in shown.err and not shown.out


@pytest.mark.parametrize("round_to", [1, 4, 8, 64])
def test_a_multiple_stays_as_far_as_there_are_that_many(round_to: int) -> None:
    model = mlp(6, 24, 3)
    without(model[0], rows=[*range(0, 22, 2)])
    small = compact(model, vectors(6), round_to=round_to, progress=False)
    stay = {1: 13, 4: 16, 8: 16, 64: 24}[round_to]
    assert small[0].out_features == small[2].in_features == stay
    assert_same(model, small, vectors(6))


def test_what_is_rounded_to_must_be_a_number_above_0() -> None:
    with pytest.raises(ValueError, match="round_to: expected at least 1, got 0"):
        compact(pruned(), vectors(6), round_to=0)


def test_outputs_that_are_nan_cannot_be_compared() -> None:
    model = pruned()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="its outputs are NaN"):
        compact(model, vectors(6), progress=False)
