"""The loop: its batches and formats, what it shows, and training afterwards."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from fractions import Fraction
from itertools import cycle
from typing import Any, NamedTuple

import pytest
import timm
import torch
from naive_pruning import (
    Batch,
    agree,
    convnet,
    images,
    in_equal_steps,
    mlp,
    naive_steps,
    prunable,
    pruned,
    row,
    snip,
    vectors,
)
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from force_plugin import METHODS, force_prune, get_masks, saliency


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
        model: Any = convnet()
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
            guard=False,
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
    compiled: Any = torch.compile(inner, backend="eager")
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
