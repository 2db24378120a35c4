"""What force_prune keeps: the right ones, by plain formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from itertools import cycle, pairwise
from typing import Any

import pytest
import torch
from naive_pruning import (
    WEIGHTS,
    Score,
    agree,
    convnet,
    hessian_gradient,
    images,
    in_equal_steps,
    mlp,
    naive_gradients,
    naive_steps,
    prunable,
    pruned,
    row,
    snip,
    square,
    vectors,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from force_plugin import FORCE, GraSP, IterSNIP, SaliencyMethod, get_masks, saliency


def exponential(total: int, density: float, steps: int) -> list[int]:
    return [
        math.floor(total * density ** (t / steps) + 1e-9) for t in range(1, steps + 1)
    ]


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

    class Cold(GraSP):
        temperature = 2.0

    forward = lambda model, batch: cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    ways: list[dict[str, Any]] = [{}, {"forward": forward}]
    for options in ways:
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
    found = pruned(model, vectors(5, 3), 0.8, method="synflow", steps=3)
    assert torch.equal(found, kept)


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
    model: Any = mlp(*[16] * 60).float()
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
