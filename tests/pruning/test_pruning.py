"""What force_prune keeps: exactly as many weights as asked for, of those named."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from fractions import Fraction
from typing import Any

import pytest
import torch
from kinds_of_methods import WITH_LOSS
from naive_pruning import (
    WEIGHTS,
    Batch,
    Score,
    agree,
    convnet,
    hessian_gradient,
    images,
    mlp,
    naive_gradients,
    prunable,
    pruned,
    row,
    snip,
    square,
    vectors,
)
from timm.layers import ScaledStdConv2d, StdConv2d
from timm.models.beit import Beit
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.nn.utils import prune

from force_plugin import (
    METHODS,
    apply_masks,
    force_prune,
    get_masks,
    saliency,
    sparsity_report,
)

# Exactly as many.


def share(sparsity: float) -> int:
    """⌊(1 − sparsity) · m⌋, with the sparsity as the decimal number it stands for."""
    return math.floor((1 - Fraction(str(sparsity))) * WEIGHTS)


@pytest.mark.parametrize(
    "sparsity", [0.0, 0.001, 0.05, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 1 - 1 / WEIGHTS]
)
@pytest.mark.parametrize("method", METHODS)
def test_exactly_the_share_asked_for_is_kept(method: str, sparsity: float) -> None:
    model = convnet()
    report = force_prune(
        model,
        images(),
        sparsity,
        method=method,
        steps=3,
        on_collapse="warn",
        progress=False,
    )
    kept = max(1, share(sparsity))
    assert int(row(get_masks(model)).sum()) == kept
    assert (report.kept, report.total) == (kept, WEIGHTS)
    assert report.layers == sparsity_report(model).layers
    assert report.method == method


@pytest.mark.parametrize("kept", range(1, 36))
def test_any_number_can_be_kept(kept: int) -> None:
    model = nn.Linear(7, 5)
    assert int(pruned(model, [], 1 - kept / 35, method="magnitude").sum()) == kept


@pytest.mark.parametrize(("sparsity", "kept"), [(0.95, 50), (0.99, 10), (0.9, 100)])
def test_the_rounding_of_the_sparsity_costs_no_weight(
    sparsity: float, kept: int
) -> None:
    # 1 - 0.95 is a little more than 0.05, 1 - 0.9 a little less than 0.1.
    model = nn.Linear(50, 20)
    assert int(pruned(model, [], sparsity, method="random").sum()) == kept


@pytest.mark.parametrize("method", ["magnitude", "synflow"])
def test_of_equal_scores_the_first_are_kept(method: str) -> None:
    model: Any = mlp(4, 4, 4, bias=False)
    for layer in (model[0], model[2]):
        nn.init.constant_(layer.weight, 0.25)
    kept = pruned(model, vectors(4, 4), 0.4, method=method, steps=1)
    assert kept.tolist() == [True] * 19 + [False] * 13


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("method", WITH_LOSS)
def test_exactly_as_many_are_kept_where_every_saliency_is_0(
    method: str, sparsity: float
) -> None:
    model = convnet()
    # SNIP-it divides by the loss.
    flat = lambda outputs, targets: 1 + outputs.sum() * 0  # noqa: E731
    with pytest.warns(UserWarning, match="3 of 3 layers .*saliency of exactly 0"):
        kept = pruned(model, images(), sparsity, method=method, steps=3, loss_fn=flat)
    assert int(kept.sum()) == share(sparsity)


# Which weights.


def test_only_the_weights_that_are_named_are_pruned() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 6)
            self.body = nn.Linear(6, 5)
            self.head = nn.Linear(5, 3)

        def forward(self, words: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(self.embedding(words).mean(1))))

    torch.manual_seed(0)
    model = Words().double()
    batch = torch.arange(30).view(6, 5) % 11, torch.arange(6) % 3
    pairs = [(model.embedding, "weight"), (model.body, "bias"), (model.head, "weight")]
    expected = deepcopy(model)
    cross_entropy(expected(batch[0]), batch[1]).backward()
    scores = {
        name: (p * p.grad).abs().detach()
        for name, p in expected.named_parameters()
        if name in ("embedding.weight", "body.bias", "head.weight")
    }
    # In the model's order, whatever the pairs' own; a generator is read once.
    generator = (pair for pair in [*pairs, pairs[0]])
    ours = saliency(model, [batch], "snip", parameters=generator)
    assert {name: ours[name].shape for name in ours} == {
        name: score.shape for name, score in scores.items()
    }
    assert agree({name: ours[name] for name in scores}, scores)

    generator = (pair for pair in [*pairs, pairs[0]])
    report = force_prune(
        model,
        [batch],
        0.5,
        method="snip",
        parameters=generator,
        progress=False,
    )
    assert (report.kept, report.total) == (43, 86)
    assert set(get_masks(model)) == set(scores)
    assert not hasattr(model.body, "weight_mask")


def test_a_recurrent_layer_is_pruned_by_its_parameters() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 5, batch_first=True)
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0][:, -1])

    torch.manual_seed(0)
    model = Recurrent().double()
    batch = torch.randn(6, 7, 4, dtype=torch.float64), torch.arange(6) % 3
    names = ["weight_ih_l0", "weight_hh_l0"]
    force_prune(
        model,
        [batch],
        0.8,
        steps=3,
        parameters=[(model.lstm, name) for name in names],
        progress=False,
    )
    dense = Recurrent().double()
    state = dict(model.state_dict())
    for name in names:
        orig, mask = state.pop(f"lstm.{name}_orig"), state.pop(f"lstm.{name}_mask")
        state[f"lstm.{name}"] = orig * mask
    dense.load_state_dict(state)
    assert torch.allclose(model(batch[0]), dense(batch[0]))
    assert sum(int(mask.sum()) for mask in get_masks(model).values()) == 36


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Conv1d(2, 4, 3), (5, 2, 6)),
        (lambda: nn.Conv2d(2, 4, 3, groups=2), (5, 2, 6, 6)),
        (lambda: nn.Conv3d(2, 4, 3), (5, 2, 4, 4, 4)),
        (lambda: nn.ConvTranspose1d(2, 4, 3), (5, 2, 6)),
        (lambda: nn.ConvTranspose2d(2, 4, 3), (5, 2, 6, 6)),
        (lambda: nn.ConvTranspose3d(2, 4, 3), (5, 2, 3, 3, 3)),
        (lambda: StdConv2d(2, 4, 3), (5, 2, 6, 6)),
        (lambda: ScaledStdConv2d(2, 4, 3), (5, 2, 6, 6)),
    ],
)
def test_convolutions_of_every_kind_are_pruned(
    layer: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    conv = layer()
    outputs = conv(torch.zeros(shape)).flatten(1).shape[1]
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(outputs, 3)).double()
    batch = torch.randn(shape, dtype=torch.float64), torch.arange(5) % 3

    twin = deepcopy(model)
    cross_entropy(twin(batch[0]), batch[1]).backward()
    expected = (twin[0].weight * twin[0].weight.grad).abs()
    assert torch.allclose(saliency(model, [batch], "snip")["0.weight"], expected)

    total = conv.weight.numel() + 3 * outputs
    assert int(pruned(model, [batch], 0.5, steps=2).sum()) == total // 2
    # The same network, with the zeros in its weights.
    twin[0].weight.data *= model[0].weight_mask
    twin[3].weight.data *= model[3].weight_mask
    assert torch.equal(model(batch[0]), twin(batch[0]))


class Tied(nn.Module):
    """A layer whose weight is used in three places, two of them modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.again = self.body

    def forward(self, words: Tensor) -> Tensor:
        x = torch.tanh(self.body(self.embedding(words)))
        return self.head(self.again(x))


def test_a_shared_weight_counts_once_and_is_masked_wherever_it_is_used() -> None:
    torch.manual_seed(0)
    model: Any = Tied().double()
    batch = torch.arange(10) % 5, (torch.arange(10) * 3) % 5
    twin = deepcopy(model)
    cross_entropy(twin(batch[0]), batch[1]).backward()
    expected = {
        "embedding.weight": (twin.head.weight * twin.head.weight.grad).abs().detach(),
        "body.weight": (twin.body.weight * twin.body.weight.grad).abs().detach(),
    }
    both: Any = {"parameters": [(model.head, "weight"), (model.body, "weight")]}
    assert agree(saliency(model, [batch], "snip", **both), expected)

    report = force_prune(model, [batch], 0.7, steps=3, progress=False, **both)
    assert (report.kept, report.total) == (19, 66)
    assert {layer.name for layer in report.layers} == set(expected)
    assert model.head.weight_orig is model.embedding.weight_orig
    assert torch.equal(model.head.weight_mask, model.embedding.weight_mask)
    assert list(get_masks(model)) == list(expected)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    model(batch[0])
    for layer in (model.head, model.embedding, model.body):
        assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)
    assert torch.equal(model.head.weight, model.embedding.weight)


def test_a_shared_weight_that_one_owner_has_pruned_gets_one_mask() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    prune.l1_unstructured(second, "weight", amount=4)
    model = nn.Sequential(first, second)
    force_prune(
        model, [(torch.randn(5, 4), torch.arange(5) % 4)], 0.5, steps=2, progress=False
    )
    assert torch.equal(first.weight_mask.bool(), second.weight_mask.bool())
    assert int(first.weight_mask.sum()) == 8


class Sum(nn.Module):
    """A layer whose weight is the sum of two, as in re-parametrised networks."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 4, bias=False)
        self.b = nn.Linear(5, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.a.weight + self.b.weight)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize(("method", "score"), [("snip", snip), ("grasp_it", square)])
def test_weights_that_share_their_gradient_are_scored_apart(
    method: str, score: Score, batches: int
) -> None:
    torch.manual_seed(0)
    model, loader = Sum().double(), vectors(5, 4)
    gradients = naive_gradients(model, loader[:batches])
    expected = {
        name: score(weight.detach(), gradients[name])
        for name, weight in prunable(model).items()
    }
    assert agree(saliency(model, loader, method, batches=batches), expected)


def test_grasp_and_synflow_score_weights_that_share_their_gradient_apart() -> None:
    torch.manual_seed(0)
    model, loader = Sum().double(), vectors(5, 4, count=1)
    assert agree(saliency(model, loader, "grasp"), hessian_gradient(model, loader))
    # Each output is the sum of all inputs of 1, so every flow is 1.
    expected = {name: w.detach().abs() for name, w in prunable(model).items()}
    assert agree(saliency(model, loader, "synflow"), expected)


@pytest.mark.parametrize("method", ["snip", "force", "grasp_it"])
def test_a_gradient_that_is_one_number_for_all_weights_is_scored(method: str) -> None:
    class Total(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return self.weight.sum()

    model = Total(5, 4)
    scores = saliency(model, vectors(5, 4), method, loss_fn=lambda loss, _: loss)
    expected = torch.ones(4, 5) if method == "grasp_it" else model.weight.abs()
    assert torch.equal(scores["weight"], expected)


# Layers whose weight is read by another module's forward.


class Mean(nn.Module):
    """Logits from the mean of a sequence that a layer of attention has changed."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.attention, nn.MultiheadAttention):
            return self.head(self.attention(x, x, x)[0].mean(1))
        return self.head(self.attention(x).mean(1))


def multihead_attention() -> tuple[nn.Module, Batch]:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    return Mean(layer), (torch.randn(6, 4, 8), torch.arange(6) % 3)


def encoder_layer() -> tuple[nn.Module, Batch]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return Mean(layer), (torch.randn(6, 4, 8), torch.arange(6) % 3)


def beit() -> tuple[nn.Module, Batch]:
    model = Beit(
        img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=3
    )
    return model, (torch.randn(6, 3, 8, 8), torch.arange(6) % 3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [multihead_attention, encoder_layer, beit])
def test_a_model_that_reads_the_weight_of_another_module_can_be_trained(
    build: Callable[[], tuple[nn.Module, Batch]], method: str
) -> None:
    torch.manual_seed(0)
    model, batch = build()
    force_prune(model, [batch], 0.6, method=method, steps=2, progress=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    # What the forward pass uses is what the optimizer has trained.
    outputs = []
    model.eval()
    with torch.no_grad():
        outputs.append(model(batch[0]))
        for module in model.modules():
            if hasattr(module, "weight_mask"):
                prune.remove(module, "weight")
        outputs.append(model(batch[0]))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-6)


@pytest.mark.parametrize("build", [multihead_attention, encoder_layer, beit])
def test_a_model_that_reads_the_weight_of_another_module_can_be_pruned_again(
    build: Callable[[], tuple[nn.Module, Batch]],
) -> None:
    torch.manual_seed(0)
    model, batch = build()
    first = pruned(model, [batch], 0.5, steps=2)
    second = pruned(model, [batch], 0.75, steps=2)
    assert int(second.sum()) == len(second) // 4
    assert not (second & ~first).any()


@pytest.mark.parametrize("build", [multihead_attention, encoder_layer, beit])
def test_a_model_that_reads_the_weight_of_another_module_can_be_given_masks(
    build: Callable[[], tuple[nn.Module, Batch]],
) -> None:
    (source, batch), (model, _) = build(), build()
    force_prune(source, [batch], 0.6, steps=2, progress=False)
    apply_masks(model, get_masks(source))
    for _ in range(2):
        cross_entropy(model(batch[0]), batch[1]).backward()
    assert get_masks(model).keys() == get_masks(source).keys()


def test_grasp_passes_unchanged_batches_twice() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(0.5)

    layers = mlp(5, 6, 3)
    halved = [(inputs / 2, targets) for inputs, targets in vectors(5, 3)]
    expected = saliency(layers, halved, "grasp", batches=2)
    scores = saliency(
        nn.Sequential(InPlace(), layers), vectors(5, 3), "grasp", batches=2
    )
    assert agree(dict(zip(expected, scores.values(), strict=True)), expected)


# Pruning again.


@pytest.mark.parametrize("method", METHODS)
def test_pruning_again_only_removes_more(method: str) -> None:
    model = convnet()
    options: dict[str, Any] = {"method": method, "steps": 3}
    first = pruned(model, images(), 0.5, **options)
    same = pruned(model, images(), 0.5, **options)
    second = pruned(model, images(), 0.9, **options)
    assert torch.equal(first, same)
    assert (int(first.sum()), int(second.sum())) == (186, 37)
    assert not (second & ~first).any()
    with pytest.raises(ValueError, match=r"pruned to 0\.90.* already.*got 0\.8"):
        force_prune(model, images(), 0.8, **options)


@pytest.mark.parametrize("method", WITH_LOSS)
@pytest.mark.filterwarnings("ignore:.*saliency of exactly 0")
def test_what_was_pruned_stays_pruned_where_every_saliency_is_0(method: str) -> None:
    model = convnet()
    scores = {(model[i], "weight"): model[i].weight.detach() for i in (0, 3, 6)}
    scores[model[0], "weight"] = torch.full((6, 2, 3, 3), -9.0)  # goes first
    prune.global_unstructured(scores, METHODS[method], scores, amount=200)
    before = row(get_masks(model))
    after = pruned(
        model,
        images(),
        0.75,
        method=method,
        steps=3,
        loss_fn=lambda outputs, targets: 1 + outputs.sum() * 0,
    )
    assert int(after.sum()) == 93
    assert not (after & ~before).any()


@pytest.mark.parametrize("method", ["force", "iter_snip", "grasp", "synflow"])
def test_a_pruning_by_pytorch_is_respected(method: str) -> None:
    model = convnet()
    pairs = [(model[i], "weight") for i in (0, 3, 6)]
    prune.global_unstructured(pairs, prune.RandomUnstructured, amount=200)
    before = row(get_masks(model))
    after = pruned(model, images(), 0.75, method=method, steps=3)
    assert int(after.sum()) == 93
    assert not (after & ~before).any()


def test_a_pruned_model_is_scored_as_it_is_pruned() -> None:
    model = convnet()
    pruned(model, images(), 0.6, steps=2)
    twin = convnet()
    for name, mask in get_masks(model).items():
        prunable(twin)[name].data *= mask
    gradients = naive_gradients(twin, images()[:1])
    scores = saliency(model, images(), "snip")
    for name, mask in get_masks(model).items():
        dense = prunable(convnet())[name].detach()
        expected = (dense * gradients[name]).abs()
        assert torch.allclose(scores[name][mask], expected[mask], rtol=1e-9)
