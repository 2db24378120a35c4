"""What force_prune keeps: exactly as many weights as asked for, and the right ones."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from fractions import Fraction
from itertools import cycle, pairwise
from typing import Any, NamedTuple

import pytest
import timm
import torch
from sklearn.datasets import load_digits
from timm.layers import ScaledStdConv2d, StdConv2d
from timm.models.beit import Beit
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from force_plugin import (
    FORCE,
    METHODS,
    IterSNIP,
    SaliencyMethod,
    apply_masks,
    force_prune,
    get_masks,
    saliency,
    sparsity_report,
)

Batch = tuple[Tensor, Tensor]
Score = Callable[[Tensor, Tensor], Tensor]

WEIGHTS = 6 * 2 * 9 + 4 * 6 * 9 + 3 * 16
"""Number of weights of the small convolutional network."""

WITH_LOSS = ["force", "iter_snip", "snip", "grasp", "grasp_it", "snip_it"]


# Networks and data.


def convnet() -> nn.Sequential:
    """Two convolutions, a batch norm and a classifier, in float64."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).double()


def images(count: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, 2, 4, 4, generator=generator, dtype=torch.float64),
            torch.randint(3, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def mlp(*widths: int, bias: bool = True) -> nn.Sequential:
    """Linear layers with ReLU between them, in float64."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def vectors(width: int, classes: int, count: int = 2) -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(10, width, generator=generator, dtype=torch.float64),
            torch.randint(classes, (10,), generator=generator),
        )
        for _ in range(count)
    ]


def pruned(model: nn.Module, loader: Any, sparsity: float, **options: Any) -> Tensor:
    """All masks of a pruning, in one row."""
    # Masks of small networks cut them through easily; what is said of it has tests.
    force_prune(
        model,
        loader,
        sparsity,
        **{"progress": False, "on_collapse": "warn", **options},
    )
    return row(get_masks(model))


def row(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def agree(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether scores are the same up to rounding."""
    return list(ours) == list(theirs) and all(
        torch.allclose(ours[name], theirs[name], rtol=1e-9, atol=1e-15)
        for name in theirs
    )


# The methods once more, as plainly as possible.


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    }


def naive_gradients(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Tensor]:
    twin = deepcopy(model)
    for inputs, targets in batches:
        (cross_entropy(twin(inputs), targets) / len(batches)).backward()
    return {name: weight.grad for name, weight in prunable(twin).items()}


class Step(NamedTuple):
    """What one step of the naive loop has kept, and how many scores were not 0."""

    masks: dict[str, Tensor]
    alive: int


def naive_steps(
    model: nn.Module,
    batches: Iterator[Batch],
    kept_after: Iterable[int],
    score: Score,
    *,
    regrow: bool = False,
    per_step: int = 1,
) -> list[Step]:
    """Algorithm 1 by a loop over copies of the model."""
    dense = {name: weight.detach().clone() for name, weight in prunable(model).items()}
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in dense.items()}
    history = []
    for kept in kept_after:
        twin = deepcopy(model)
        for name, weight in prunable(twin).items():
            weight.data *= masks[name]
        gradients = naive_gradients(twin, [next(batches) for _ in range(per_step)])
        scores = row({name: score(dense[name], gradients[name]) for name in dense})
        if not regrow:
            scores[~row(masks)] = -1
        flat = torch.zeros(len(scores), dtype=torch.bool)
        flat[scores.argsort(descending=True, stable=True)[:kept]] = True
        parts = flat.split([weight.numel() for weight in dense.values()])
        masks = {
            name: part.view(dense[name].shape)
            for name, part in zip(dense, parts, strict=True)
        }
        history.append(Step(masks, int((scores > 0).sum())))
    return history


def snip(weight: Tensor, gradient: Tensor) -> Tensor:
    return (weight * gradient).abs()


def square(weight: Tensor, gradient: Tensor) -> Tensor:
    return gradient**2


def exponential(total: int, density: float, steps: int) -> list[int]:
    return [
        math.floor(total * density ** (t / steps) + 1e-9) for t in range(1, steps + 1)
    ]


def in_equal_steps(total: int, density: float, steps: int) -> list[int]:
    return [
        math.floor(total * (1 - t / steps * (1 - density)) + 1e-9)
        for t in range(1, steps + 1)
    ]


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
    model = mlp(4, 4, 4, bias=False)
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


# The right ones.


@pytest.mark.parametrize("schedule", ["exponential", "linear"])
@pytest.mark.parametrize("per_step", [1, 2])
@pytest.mark.parametrize("sparsity", [0.6, 0.9, 0.97])
@pytest.mark.parametrize(
    ("method", "score", "regrow"),
    [("force", snip, True), ("iter_snip", snip, False), ("grasp_it", square, False)],
)
def test_the_masks_are_those_of_a_naive_loop(
    method: str,
    score: Score,
    regrow: bool,
    sparsity: float,
    per_step: int,
    schedule: str,
) -> None:
    counts = exponential if schedule == "exponential" else in_equal_steps
    *_, expected = naive_steps(
        convnet(),
        cycle(images(3)),
        counts(WEIGHTS, 1 - sparsity, 5),
        score,
        regrow=regrow,
        per_step=per_step,
    )
    model = convnet()
    pruned(
        model,
        images(3),
        sparsity,
        method=method,
        steps=5,
        schedule=schedule,
        batches=per_step,
    )
    masks = get_masks(model)
    assert list(masks) == list(expected.masks)
    assert torch.equal(row(masks), row(expected.masks))


@pytest.mark.parametrize("batches", [1, 2, 3])
@pytest.mark.parametrize(
    ("method", "score"),
    [("snip", snip), ("force", snip), ("iter_snip", snip), ("grasp_it", square)],
)
def test_scores_are_those_of_a_plain_backward_pass(
    method: str, score: Score, batches: int
) -> None:
    model = convnet()
    gradients = naive_gradients(model, images()[:batches])
    expected = {
        name: score(weight.detach(), gradients[name])
        for name, weight in prunable(model).items()
    }
    assert agree(saliency(model, images(), method, batches=batches), expected)


def hessian_gradient(
    model: nn.Module, batches: Sequence[Batch], temperature: float = 200
) -> dict[str, Tensor]:
    """θ ⊙ Hg of the summed losses, by torch.autograd.functional.hvp."""
    twin = deepcopy(model)
    weights = {name: weight.detach() for name, weight in prunable(twin).items()}

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([weight.numel() for weight in weights.values()])
        values = {
            name: part.view(weights[name].shape)
            for name, part in zip(weights, parts, strict=True)
        }
        total = flat.new_zeros(())
        for inputs, targets in batches:
            outputs = torch.func.functional_call(twin, values, (inputs,))
            total = total + cross_entropy(outputs / temperature, targets)
        return total

    theta = row(weights)
    g = torch.autograd.functional.vjp(loss, theta)[1]
    hg = torch.autograd.functional.hvp(loss, theta, g)[1]
    parts = (theta * hg).split([weight.numel() for weight in weights.values()])
    return {
        name: part.view(weights[name].shape)
        for name, part in zip(weights, parts, strict=True)
    }


@pytest.mark.parametrize("batches", [1, 2, 3])
@pytest.mark.parametrize("build", [convnet, lambda: mlp(32, 7, 3)])
def test_grasp_scores_are_those_of_a_hessian_vector_product(
    build: Callable[[], nn.Module], batches: int
) -> None:
    loader = images(3)
    if build is not convnet:
        loader = [(inputs.flatten(1), targets) for inputs, targets in loader]
    expected = hessian_gradient(build(), loader[:batches])
    assert agree(saliency(build(), loader, "grasp", batches=batches), expected)


class Attention(nn.Module):
    """A head of self-attention by PyTorch's fused function."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
        return self.head(scaled_dot_product_attention(q, k, v).flatten(1, 2).mean(1))


def test_grasp_differentiates_attention_twice() -> None:
    torch.manual_seed(0)
    model = Attention().double()
    batch = torch.randn(4, 5, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    with sdpa_kernel(SDPBackend.MATH):
        expected = hessian_gradient(model, [batch])
    assert agree(saliency(model, [batch], "grasp"), expected)


def test_grasp_divides_outputs_by_its_temperature() -> None:
    model, loader = convnet(), images(1)

    class Cold(METHODS["grasp"]):  # type: ignore[misc]
        temperature = 2.0

    forward = lambda model, batch: cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    for options in ({}, {"forward": forward}):
        scores = saliency(model, loader, Cold, **options)
        assert agree(scores, hessian_gradient(model, loader, 2))


def test_synflow_scores_are_those_of_matrix_products() -> None:
    model = mlp(5, 7, 6, 3)
    w1, w2, w3 = (model[i].weight.detach() for i in (0, 2, 4))
    kept = torch.ones(35 + 42 + 18, dtype=torch.bool)
    for step, left in enumerate(exponential(95, 0.2, 3), start=1):
        m1, m2, m3 = (w.abs() for w in (w1, w2, w3))
        if step > 1:
            parts = kept.split([35, 42, 18])
            m1, m2, m3 = (
                m * part.view(m.shape)
                for m, part in zip((m1, m2, m3), parts)  # noqa: B905
            )
        ones = torch.ones(5, dtype=torch.float64)
        h1 = m1 @ ones + model[0].bias.detach().abs()
        h2 = m2 @ h1 + model[2].bias.detach().abs()
        last = torch.ones(3, dtype=torch.float64)
        flows = [
            torch.outer(m2.T @ (m3.T @ last), ones),
            torch.outer(m3.T @ last, h1),
            torch.outer(last, h2),
        ]
        scores = [w.abs() * flow for w, flow in zip((w1, w2, w3), flows, strict=True)]
        if step == 1:
            ours = saliency(model, vectors(5, 3), "synflow")
            assert agree(ours, dict(zip(ours, scores, strict=True)))
        flat = torch.cat([score.flatten() for score in scores])
        order = flat.masked_fill(~kept, -1).argsort(descending=True, stable=True)
        kept = torch.zeros_like(kept)
        kept[order[:left]] = True
    ours = pruned(model, vectors(5, 3), 0.8, method="synflow", steps=3)
    assert torch.equal(ours, kept)


def test_synflow_takes_the_absolute_value_of_statistics_in_evaluation_mode() -> None:
    model = convnet()
    model[1].running_mean.normal_()
    twin = deepcopy(model).eval()
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.data = tensor.data.abs()
    twin(torch.ones(1, 2, 4, 4, dtype=torch.float64)).sum().backward()
    expected = {name: (w * w.grad).abs() for name, w in prunable(twin).items()}
    assert agree(saliency(model, images(), "synflow"), expected)


def test_synflow_does_not_overflow_in_a_deep_network() -> None:
    model = mlp(*[16] * 60).float()
    for layer in model[::2]:
        layer.weight.data *= 50  # a flow of about 1e100
    loader = [(inputs.float(), targets) for inputs, targets in vectors(16, 16)]
    scores = saliency(model, loader, "synflow")
    assert max(score.max() for score in scores.values()) > 1e50
    assert int(pruned(model, loader, 0.9, method="synflow", steps=3).sum()) == 1510


def test_snip_it_scores_in_evaluation_mode_and_divides_by_the_loss() -> None:
    model = nn.Sequential(*convnet()[:-1], nn.Dropout(), convnet()[-1])
    model[1].running_mean.normal_()
    batches = images(2)
    gradients = naive_gradients(deepcopy(model).eval(), batches)
    losses = [cross_entropy(deepcopy(model).eval()(x), y).item() for x, y in batches]
    mean = sum(losses) / 2
    expected = {
        name: (weight.detach() * gradients[name]).abs() / mean
        for name, weight in prunable(model).items()
    }
    assert agree(saliency(model, batches, "snip_it", batches=2), expected)


def test_snip_it_follows_its_own_schedule() -> None:
    sparsities = [0.95 - 0.45 * 0.5**i for i in range(6)] + [0.95]
    counts = [math.floor(WEIGHTS * (1 - s) + 1e-9) for s in sparsities]
    assert counts[0] == WEIGHTS // 2
    *_, expected = naive_steps(convnet().eval(), cycle(images(1)), counts, snip)
    ours = pruned(
        convnet().eval(), images(1), 0.95, method="snip_it", schedule="linear"
    )
    assert torch.equal(ours, row(expected.masks))


def masks_of_steps(base: type[SaliencyMethod], sparsity: float) -> list[Tensor]:
    """The masks after every step, from within a method."""
    seen: list[Tensor] = []

    class Watching(base):  # type: ignore[misc, valid-type]
        @classmethod
        def measure(cls, probe: Any) -> Mapping[str, Tensor | None]:
            if probe.masks:
                seen.append(row(probe.masks))
            return super().measure(probe)

    last = pruned(convnet(), images(), sparsity, method=Watching, steps=6)
    return [*seen, last]


def test_iter_snip_never_brings_a_weight_back() -> None:
    masks = masks_of_steps(IterSNIP, 0.97)
    assert len(masks) == 6
    assert not any((later & ~earlier).any() for earlier, later in pairwise(masks))


def test_force_brings_weights_back() -> None:
    masks = masks_of_steps(FORCE, 0.97)
    assert any((later & ~earlier).any() for earlier, later in pairwise(masks))


# Batches.


class Recorder:
    """A loader of numbered batches that tells which were read."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.read: list[int] = []

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        for number in range(self.length):
            self.read.append(number)
            yield number, images(1)[0]


@pytest.mark.parametrize(
    ("length", "batches", "read"),
    [
        (5, 2, [0, 1, 2, 3, 4, 0]),
        (5, 1, [0, 1, 2]),
        (1, 1, [0, 0, 0]),
        (2, 3, [0, 1, 0, 1, 0, 1, 0, 1, 0]),
        (3, None, [0, 1, 2] * 3),
    ],
)
def test_each_step_takes_the_next_batches_from_the_beginning_after_the_end(
    length: int, batches: int | None, read: list[int]
) -> None:
    loader, used = Recorder(length), []

    def forward(model: nn.Module, batch: tuple[int, Batch]) -> Tensor:
        number, (inputs, targets) = batch
        used.append(number)
        return cross_entropy(model(inputs), targets)

    pruned(convnet(), loader, 0.9, steps=3, batches=batches, forward=forward)
    # The last batch is passed once more through the pruned network.
    assert loader.read == read
    assert used == [*read, read[-1]]


def test_grasp_reads_its_batches_once_and_passes_all_but_the_last_twice() -> None:
    loader, used = Recorder(3), []

    def forward(model: nn.Module, batch: tuple[int, Batch]) -> Tensor:
        used.append(batch[0])
        return cross_entropy(model(batch[1][0]), batch[1][1])

    saliency(convnet(), loader, "grasp", batches=2, forward=forward)
    assert (loader.read, used) == ([0, 1], [0, 1, 0])


def test_synflow_reads_one_batch_and_one_shot_methods_read_a_step() -> None:
    read = {}
    for method in ("synflow", "snip", "magnitude", "random"):
        loader = Recorder(5)
        as_pairs = ((inputs, targets) for _, (inputs, targets) in loader)
        pruned(convnet(), as_pairs, 0.9, steps=3, method=method, batches=2)
        read[method] = loader.read
    assert read == {"synflow": [0], "snip": [0, 1], "magnitude": [], "random": []}


def shuffled(workers: int = 0) -> DataLoader[Any]:
    inputs, targets = zip(*images(4), strict=True)
    dataset = TensorDataset(torch.cat(inputs), torch.cat(targets))
    return DataLoader(dataset, batch_size=4, shuffle=True, num_workers=workers)


@pytest.mark.parametrize("batches", [1, 3, None])
def test_a_shuffled_loader_gives_the_same_masks_with_the_same_seed(
    batches: int | None,
) -> None:
    results = []
    for seed in (0, 0, 1):
        model = convnet()
        torch.manual_seed(seed)
        results.append(pruned(model, shuffled(), 0.9, steps=4, batches=batches))
    assert torch.equal(results[0], results[1])
    if batches is not None:
        assert not torch.equal(results[0], results[2])


def test_a_loader_with_a_worker_gives_the_same_masks() -> None:
    results = []
    for workers in (0, 1):
        model = convnet()
        torch.manual_seed(0)
        results.append(pruned(model, shuffled(workers), 0.9, steps=2, batches=5))
    assert torch.equal(*results)


class Sample(NamedTuple):
    image: Tensor
    label: Tensor


def test_batches_of_any_form_reach_forward_in_that_form() -> None:
    (inputs, targets) = images(1)[0]
    expected = saliency(convnet(), [(inputs, targets)], "snip")
    for batch, forward in (
        (
            {"image": inputs, "more": [{"label": targets}], "id": "a"},
            lambda m, b: cross_entropy(m(b["image"]), b["more"][0]["label"]),
        ),
        (
            Sample(inputs, targets),
            lambda m, b: cross_entropy(m(b.image), b.label),
        ),
        ((inputs, targets, 0.5), lambda m, b: cross_entropy(m(b[0]), b[1])),
        (None, lambda m, b: cross_entropy(m(inputs), targets)),
    ):
        assert agree(saliency(convnet(), [batch], "snip", forward=forward), expected)


def test_a_named_tuple_of_two_is_a_pair() -> None:
    batch = Sample(*images(1)[0])
    expected = saliency(convnet(), images(1), "snip")
    assert agree(saliency(convnet(), [batch], "snip"), expected)


def test_another_loss_is_used() -> None:
    model, (inputs, _) = mlp(5, 4), vectors(5, 4)[0]
    targets = torch.rand(10, 4, dtype=torch.float64)
    scores = saliency(
        model, [(inputs, targets)], "snip", loss_fn=nn.functional.mse_loss
    )
    nn.functional.mse_loss(model(inputs), targets).backward()
    expected = (model[0].weight * model[0].weight.grad).abs()
    assert torch.allclose(scores["0.weight"], expected)


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
    model = Tied().double()
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
    assert torch.allclose(*outputs, atol=1e-6)


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
    options = {"method": method, "steps": 3}
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


# Training afterwards.


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    ],
    ids=["SGD", "AdamW"],
)
@pytest.mark.parametrize("method", ["force", "synflow"])
def test_a_plain_training_keeps_the_zeros_and_learns(
    method: str, make: Callable[[Any], torch.optim.Optimizer]
) -> None:
    bunch = load_digits()
    inputs = torch.from_numpy(bunch.images).float().flatten(1) / 16
    targets = torch.from_numpy(bunch.target).long()
    model = mlp(64, 32, 10).float()
    loader = [(inputs[i : i + 256], targets[i : i + 256]) for i in range(0, 1797, 256)]
    mask = pruned(model, loader, 0.9, method=method, steps=5)

    optimizer = make(model.parameters())
    first = cross_entropy(model(inputs), targets).item()
    for _ in range(15):
        for x, y in loader:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
            model(x[:1])
            weights = torch.cat([layer.weight.flatten() for layer in model[::2]])
            assert not weights[~mask].any()
    assert torch.equal(row(get_masks(model)), mask)
    assert cross_entropy(model(inputs), targets).item() < 0.5 * first


# Number formats and memory formats.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_of_16_bits_is_scored_and_pruned(
    method: str, dtype: torch.dtype
) -> None:
    model = convnet().to(dtype)
    loader = [(inputs.to(dtype), targets) for inputs, targets in images()]
    scores = saliency(model, loader, method, batches=2)
    if method not in ("magnitude", "random"):
        assert all(score.dtype.itemsize >= 4 for score in scores.values())
    kept = pruned(model, loader, 0.9, method=method, steps=3, batches=2)
    assert int(kept.sum()) == 37
    assert model[0].weight_orig.dtype == dtype
    assert model(loader[0][0]).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_of_16_bits_is_multiplied_in_32(dtype: torch.dtype) -> None:
    model = mlp(5, 4).to(dtype)
    batch = vectors(5, 4)[0][0].to(dtype), vectors(5, 4)[0][1]
    scores = saliency(model, [batch], "snip")
    cross_entropy(model(batch[0]), batch[1]).backward()
    expected = (model[0].weight.float() * model[0].weight.grad.float()).abs()
    assert torch.equal(scores["0.weight"], expected)


@pytest.mark.parametrize("method", ["force", "iter_snip"])
def test_every_step_inside_of_autocast_measures_the_network_as_it_is_then(
    method: str,
) -> None:
    # Autocast keeps the 16-bit copies that it has made of weights until it ends.
    def forward(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(model(batch[0].float()), batch[1])

    options = {"method": method, "steps": 5, "forward": forward}
    expected = pruned(convnet().float(), images(), 0.9, **options)
    with torch.autocast("cpu", torch.bfloat16):
        inside = pruned(convnet().float(), images(), 0.9, **options)
    assert torch.equal(inside, expected)


def test_layers_of_several_number_formats_are_ranked_together() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(40, 50).bfloat16(), nn.Linear(40, 50), nn.Linear(40, 50).double()
    )
    values = torch.cat([layer.weight.detach().double().flatten() for layer in model])
    for removed in range(100, 6000, 590):
        expected = torch.zeros(6000, dtype=torch.bool)
        order = values.abs().argsort(descending=True, stable=True)
        expected[order[: 6000 - removed]] = True
        twin = deepcopy(model)
        kept = pruned(twin, [], removed / 6000, method="magnitude")
        assert torch.equal(kept, expected)


@pytest.mark.parametrize("method", ["force", "grasp", "synflow", "magnitude"])
@pytest.mark.parametrize("ties", [False, True])
def test_a_channels_last_model_gets_the_same_masks(method: str, ties: bool) -> None:
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = convnet()
        if ties and method == "magnitude":
            for weight in prunable(model).values():
                nn.init.ones_(weight)
        model.to(memory_format=memory_format)
        results.append(pruned(model, images(), 0.8, method=method, steps=3))
        weight = model[3].weight_orig
        assert weight.is_contiguous(memory_format=memory_format)
    assert torch.equal(*results)


# What is shown and said.


def test_the_progress_bar_shows_the_steps_and_the_density(
    capsys: pytest.CaptureFixture[str],
) -> None:
    force_prune(convnet(), images(), 0.9, steps=3)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "force: 100%" in shown.err
    assert "3/3" in shown.err
    # 37 of 372 weights.
    assert "density 0.09946" in shown.err


def test_nothing_is_shown_without_progress(capsys: pytest.CaptureFixture[str]) -> None:
    force_prune(convnet(), images(), 0.9, steps=3, progress=False)
    saliency(convnet(), images())
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")


@pytest.mark.parametrize(("method", "regrow"), [("force", True), ("iter_snip", False)])
def test_a_collapse_is_reported_with_its_step(method: str, regrow: bool) -> None:
    # A deep network without skips is cut through when a layer is emptied.
    model = mlp(*[6] * 21, bias=False)
    for i in range(1, len(model), 2):
        model[i] = nn.Tanh()
    loader = vectors(6, 6, count=1)
    counts = in_equal_steps(720, 0.003, 60)
    steps = naive_steps(model, cycle(loader), counts, snip, regrow=regrow)
    assert steps[0].alive == 720
    number, kept, alive = next(
        (number, kept, step.alive)
        for number, (kept, step) in enumerate(zip(counts, steps, strict=True), start=1)
        if step.alive < 0.9 * kept  # a few may be 0 by chance
    )
    assert number < 60

    message = rf"collapsed at step {number} of 60: {alive} weights .* {kept} were to"
    with pytest.warns(UserWarning, match=message):
        report = force_prune(
            model,
            loader,
            0.997,
            method=method,
            schedule="linear",
            on_collapse="warn",
            progress=False,
        )
    assert any("collapsed" in text for text in report.warnings)
    assert report.kept == 2
    assert torch.equal(row(get_masks(model)), row(steps[-1].masks))


def test_weights_that_never_had_a_saliency_are_no_collapse() -> None:
    # On maps of 1x1, eight of the nine taps of a 3x3 kernel see only padding.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.Flatten()).double()
    inputs = torch.randn(5, 4, 1, 1, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = force_prune(
            model, [(inputs, torch.arange(5) % 3)], 0.9, steps=3, progress=False
        )
    assert report.kept == 10
    assert int(model[0].weight_mask[:, :, 1, 1].sum()) == 10


def test_a_sound_pruning_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = force_prune(convnet(), images(), 0.5, steps=3, progress=False)
    assert report.warnings == ()


# Models of timm.


@pytest.mark.filterwarnings("ignore:.*had a saliency of exactly 0")
@pytest.mark.parametrize("method", ["force", "grasp", "synflow", "snip_it"])
@pytest.mark.parametrize(
    "name",
    ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "resnet10t"],
)
def test_a_model_of_timm_is_pruned_and_trains(name: str, method: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    total = sum(weight.numel() for weight in prunable(model).values())
    size = model.pretrained_cfg["input_size"] if name == "test_vit" else (3, 64, 64)
    batch = torch.randn(2, *size), torch.tensor([3, 8])
    report = force_prune(model, [batch], 0.9, method=method, steps=2, progress=False)
    assert report.total == total
    assert report.kept == math.floor(Fraction("0.1") * total)
    # In SynFlow's network of absolute values, the sigmoids of SE blocks saturate.
    if method != "synflow":
        assert not any("saliency of exactly 0" in text for text in report.warnings)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        loss = cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
    assert loss.isfinite()


@pytest.mark.parametrize("method", ["force", "grasp", "synflow"])
def test_a_compiled_model_gets_the_masks_of_the_plain_one_and_trains(
    method: str,
) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    plain, inner = build(), build()
    compiled = torch.compile(inner, backend="eager")
    batch = (torch.randn(5, 6).double(), torch.arange(5) % 3)
    compiled(batch[0])
    for model in (plain, compiled):
        force_prune(model, [batch], 0.5, method=method, steps=3, progress=False)
    expected = get_masks(plain)
    masks = get_masks(inner)
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())
    assert not compiled._forward_pre_hooks
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(cross_entropy(compiled(batch[0]), batch[1]))
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]
