"""What SNAP-it gives back, what it leaves alone, and what it is called with."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch_pruning as tp
from channel_sets import (
    NETWORKS,
    Batch,
    assert_same,
    chain,
    depthwise,
    float_images,
    gated,
    images,
    made,
    marked,
    naive_snap,
    outputs_group,
    residual,
    snapped,
    trained,
)
from snap_worker import Broken
from state import same, unchanged
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from force_plugin import (
    SaliencyImportance,
    force_prune,
    get_masks,
    make_permanent,
    snap_prune,
)


def test_ignored_layers_keep_their_outputs() -> None:
    model = residual(norm=True)
    small = snapped(model, images(), 0.5, ignored_layers=[model[1].conv2])
    assert small[0].out_channels == small[1].conv2.out_channels == 5
    assert small[1].conv1.out_channels == 3  # of the 6 that can go


def test_ignored_layers_may_be_an_iterator() -> None:
    model = residual(norm=True)
    small = snapped(model, images(), 0.5, ignored_layers=iter([model[1].conv2]))
    assert small[0].out_channels == 5


def test_an_ignored_block_keeps_the_outputs_of_its_layers() -> None:
    model = residual(norm=True)
    torch_prunings = tp.pruner.BasePruner(
        residual(norm=True), images()[0][0], None, ignored_layers=[model[1]]
    )
    assert model[1].conv1 in torch_prunings.ignored_layers
    with pytest.raises(RuntimeError, match="there are none"):
        snapped(model, images(), 0.5, ignored_layers=[model[1]])


def test_ignored_layers_of_another_model_are_an_error() -> None:
    model = chain()
    message = "ignored_layers: expected modules of the model, got another Conv2d"
    with unchanged(model), pytest.raises(ValueError, match=message):
        snapped(model, images(), 0.5, ignored_layers=[chain()[0]])


def test_outputs_keep_their_shape_and_the_last_layer_its_rows() -> None:
    for build, _ in NETWORKS.values():
        model = build()
        small = snapped(model, images(), 0.6)
        assert small(images()[0][0]).shape == (6, 3)
        assert [*small.children()][-1].bias is None or torch.equal(
            small[-1].bias, model[-1].bias
        )


def test_result_gives_what_the_network_gives_without_reading_the_rest() -> None:
    for name in ("residual with norms", "chain with a norm", "depthwise"):
        build, sets = NETWORKS[name]
        model = build().eval()
        kept = naive_snap(model, sets, images(), 0.6, 2)
        small = snapped(model, images(), 0.6, steps=2)
        ones = {n: torch.ones(size) for n, size in sets.sizes(model).items()}
        x = images(seed=5)[0][0]
        with gated(model, sets, ones, kept):
            expected = model(x)
        torch.testing.assert_close(small(x), expected)


def test_result_has_the_types_modes_and_gradients_of_its_original() -> None:
    model = residual(norm=True).float()
    model[1].eval()
    model[0].requires_grad_(False)
    small = snapped(model, float_images(), 0.5)
    assert {p.dtype for p in small.parameters()} == {torch.float32}
    assert [m.training for m in small.modules()] == [
        m.training for m in model.modules()
    ]
    assert {n for n, p in small.named_parameters() if not p.requires_grad} == {
        "0.weight",
        "0.bias",
    }
    assert all(p.grad is None and p.is_leaf for p in small.parameters())
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {p.data_ptr() for p in small.parameters()}


def test_result_trains_and_copies() -> None:
    small = snapped(residual(norm=True), images(), 0.6)
    x = images(seed=5)[0][0]
    losses = trained(small, images())
    assert losses[-1] < losses[0]
    small.eval()
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), loaded):
        assert torch.equal(other(x), small(x))
    again = snapped(small, images(), 0.25)
    assert again(x).shape == (6, 3)


@pytest.mark.parametrize("permanent", [False, True])
def test_masks_are_taken_along(permanent: bool) -> None:
    build, sets = NETWORKS["residual with norms"]
    model: Any = build()
    force_prune(model, images(), 0.6, method="snip", progress=False)
    masks = get_masks(model)
    kept = naive_snap(model, sets, images(), 0.5, 1)
    if permanent:
        make_permanent(model)
    with unchanged(model):
        small: Any = snapped(model, images(), 0.5, steps=1)
    found = get_masks(small)
    assert list(found) == list(masks)
    for name, mask in masks.items():
        layer = name.removesuffix(".weight")
        rows = kept.get(sets.writes.get(layer, ""), torch.ones(len(mask)).bool())
        columns = torch.ones(mask.shape[1]).bool()
        columns = kept.get(sets.reads.get(layer, ""), columns)
        assert torch.equal(found[name], mask[rows][:, columns])
        weight = small.get_submodule(layer).weight
        assert torch.equal(weight, model.get_submodule(layer).weight[rows][:, columns])
    trained(small, images())
    for name, mask in found.items():
        assert not small.get_submodule(name.removesuffix(".weight")).weight[~mask].any()


@pytest.mark.parametrize("build", [chain, lambda: residual(norm=True), depthwise])
@pytest.mark.parametrize("steps", [0, 2])
def test_original_is_untouched(build: Callable[[], nn.Module], steps: int) -> None:
    model = marked(build())
    with unchanged(model):
        snapped(model, images(), 0.6, steps=steps)


def test_original_is_untouched_at_random() -> None:
    model = marked(residual(norm=True))
    torch.manual_seed(1)
    torch.randint(2**62, ())
    drawn_once = torch.get_rng_state()
    torch.manual_seed(1)
    seeded = copy.deepcopy(model)
    snapped(model, [], 0.6, method="random")
    assert torch.equal(torch.get_rng_state(), drawn_once)
    assert_same(model, seeded)
    assert [m.training for m in model.modules()] == [
        m.training for m in seeded.modules()
    ]


def interrupted(*_: Any) -> Tensor:
    raise KeyboardInterrupt


class Late:
    """A loss that fails in a later step, where the network is smaller."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        if model[0].out_channels < 5:
            raise OSError("too late")
        return cross_entropy(model(batch[0]), batch[1])


NAN = [(x * torch.nan, y) for x, y in images()]

FAILURES: dict[str, tuple[type[BaseException], str, Any, dict[str, Any]]] = {
    "loader": (OSError, "the disk is gone", Broken(images()), {}),
    "loss": (KeyboardInterrupt, "^$", images(), {"loss_fn": interrupted}),
    "second step": (OSError, "too late", images(), {"forward": Late()}),
    "nan": (RuntimeError, "nan", NAN, {}),
    "no gradient": (
        RuntimeError,
        "sensitivity of every channel is exactly 0",
        images(),
        {"forward": lambda model, batch: model(batch[0]).sum() * 0},
    ),
    "inputs": (
        RuntimeError,
        "Sequential cannot be run with example_inputs",
        images(),
        {"inputs": torch.zeros(1, 7)},
    ),
    "no tensor": (TypeError, "example_inputs: expected", images(), {"inputs": "x"}),
    "method": (ValueError, 'expected "snap" or "random"', images(), {"method": "x"}),
    "steps": (ValueError, "steps: expected an integer", images(), {"steps": -1}),
    "half a step": (ValueError, "steps: expected an integer", [], {"steps": 1.5}),
    "true steps": (ValueError, "steps: expected an integer", [], {"steps": True}),
    "sparsity": (ValueError, "sparsity: expected", images(), {"sparsity": 1.0}),
    "text": (TypeError, "sparsity: expected a number", [], {"sparsity": "0.5"}),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_original_is_untouched_by_an_error(failure: str) -> None:
    error, message, loader, options = FAILURES[failure]
    model = marked(residual(norm=True))
    with unchanged(model), pytest.raises(error, match=message):
        snapped(model, loader, **{"sparsity": 0.7, **options})


def test_gradient_that_overflows_is_an_error() -> None:
    model = chain()
    message = "the sensitivity of .* is not finite|loss is|gradient"
    with unchanged(model), pytest.raises(RuntimeError, match=message):
        snapped(
            model,
            images(),
            0.5,
            forward=lambda model, batch: (
                model(batch[0]).mul(1e300).mul(1e300).tanh().sum()
            ),
        )


def test_example_inputs_stay_as_they_are() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    model = made(InPlace(), nn.Flatten(), nn.Linear(108, 6), nn.Tanh(), nn.Linear(6, 3))
    inputs = images()[0][0]
    before = inputs.clone()
    snapped(model, [], 0.5, inputs, method="random")
    assert torch.equal(inputs, before)


# What it is called with.


def test_model_and_batches_may_have_names_for_their_inputs() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = chain()

        def forward(self, *, pixels: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
            return {"logits": self.network(pixels * scale)}

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return cross_entropy(model(pixels=batch["pixels"])["logits"], batch["labels"])

    x, y = images()[0]
    small: Any = snap_prune(
        Named(),
        [{"pixels": x, "labels": y}],
        {"pixels": x[:1]},
        0.6,
        forward=forward,
        progress=False,
    )
    assert_same(small.network, snapped(chain(), images(), 0.6))


def test_microbatches_give_what_whole_batches_give() -> None:
    for build, _ in NETWORKS.values():
        whole = snapped(build(), images(), 0.6)
        assert_same(snapped(build(), images(), 0.6, microbatch=2), whole)


@pytest.mark.parametrize("score", ["importance", "snap"])
def test_no_more_samples_than_a_microbatch_pass_at_once(score: str) -> None:
    passed = set()

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        passed.add(len(batch[0]))
        return cross_entropy(model(batch[0]), batch[1])

    model = chain()
    options: dict[str, Any] = {"forward": forward, "microbatch": 2}
    if score == "snap":
        snapped(model, images(), 0.6, **options)
    else:
        importance = SaliencyImportance(model, images(), **options)
        importance(outputs_group(model, "0", [0]))
    assert passed == {2}


def test_loss_function_decides() -> None:
    model = chain()
    watched = snapped(model, images(), 0.6, loss_fn=lambda p, y: p[:, 0].mean())
    assert not same(watched.state_dict(), snapped(model, images(), 0.6).state_dict())


def test_no_grad_and_inference_mode_around_it_do_no_harm() -> None:
    expected = snapped(residual(), images(), 0.6)
    model = residual()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            small = snapped(model, images(), 0.6)
        assert_same(small, expected)
        assert not any(p.is_inference() for p in small.parameters())


def test_a_bar_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    snap_prune(chain(), images(), torch.zeros(1, 3, 6, 6), 0.6, steps=2)
    assert "snap: 100%" in capsys.readouterr().err
    snapped(chain(), images(), 0.6)
    assert capsys.readouterr().err == ""


def test_each_step_takes_the_next_batches() -> None:
    seen: list[int] = []

    class Counted:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for number in range(3):
                seen.append(number)
                yield torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten()
    ).append(nn.Linear(16 * 16, 3))
    example = torch.randn(1, 3, 8, 8)
    snap_prune(model, Counted(), example, 0.5, steps=2, progress=False)
    assert seen == [0, 1, 2, 0]
