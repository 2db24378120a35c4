"""The report that counts the masks and zeros of a model."""

from __future__ import annotations

import pytest
import torch
from masked import pruned_thrice
from networks import conv_network as network
from networks import tied_layers as tied
from state import unchanged
from torch import nn
from torch.nn.utils import prune

from force_plugin import apply_masks, sparsity_report


def counts(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        layer.name: (layer.kept, layer.total) for layer in sparsity_report(model).layers
    }


DENSE = {"0.weight": (72, 72), "3.weight": (180, 180), "5.weight": (15, 15)}


def test_the_report_of_a_dense_model_counts_its_convolutions_and_linear_layers() -> (
    None
):
    model = network()
    assert counts(model) == DENSE
    report = sparsity_report(model)
    assert (report.kept, report.total, report.sparsity) == (267, 267, 0)
    assert [layer.shape for layer in report.layers] == [(4, 2, 3, 3), (5, 36), (3, 5)]
    assert report.warnings == () and report.method is None


def test_the_report_is_the_same_before_and_after_pruning_is_made_permanent() -> None:
    model = network()
    prune.l1_unstructured(model[0], "weight", 12)
    apply_masks(model, {"5.weight": torch.eye(3, 5)})
    pruned = DENSE | {"0.weight": (60, 72), "5.weight": (3, 15)}
    assert counts(model) == pruned
    report = sparsity_report(model)
    assert report.kept == 60 + 180 + 3
    assert report.sparsity == (12 + 12) / 267
    for layer in (model[0], model[5]):
        prune.remove(layer, "weight")
    assert counts(model) == pruned
    assert sparsity_report(model) == report


def test_weights_that_are_zero_without_a_mask_count_as_removed() -> None:
    model = network()
    with torch.no_grad():
        model[5].weight[0] = 0
    assert counts(model)["5.weight"] == (10, 15)
    apply_masks(model, {"5.weight": torch.ones(3, 5)})
    assert counts(model)["5.weight"] == (15, 15)


def test_a_pruned_bias_is_counted_while_it_is_pruned() -> None:
    model = network()
    prune.l1_unstructured(model[3], "bias", 2)
    prune.l1_unstructured(model[1], "weight", 1)
    prune.l1_unstructured(model[3], "weight", 80)
    biased = {"1.weight": (3, 4), "3.bias": (3, 5), "3.weight": (100, 180)}
    assert counts(model) == DENSE | biased
    for module, name in (
        (model[3], "bias"),
        (model[1], "weight"),
        (model[3], "weight"),
    ):
        prune.remove(module, name)
    assert counts(model) == DENSE | {"3.weight": (100, 180)}


def test_a_shared_weight_is_counted_once() -> None:
    model = tied()
    assert counts(model) == {"0.weight": (9, 9)}
    apply_masks(model, {"0.weight": torch.eye(3)})
    assert counts(model) == {"0.weight": (3, 9)}


def test_a_layer_without_any_weight_is_left_out_pruned_or_not() -> None:
    model = network()
    model[5].weight = nn.Parameter(torch.empty(3, 0))
    expected = {name: count for name, count in DENSE.items() if name != "5.weight"}
    assert counts(model) == expected
    apply_masks(model, {"5.weight": torch.ones(3, 0)})
    assert counts(model) == expected


@pytest.mark.parametrize(
    "model",
    [nn.ReLU(), nn.Sequential(), nn.BatchNorm2d(3), nn.Embedding(3, 3)],
    ids=str,
)
def test_a_model_without_anything_to_prune_has_no_report(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"^model: .*no convolution or linear weight"):
        sparsity_report(model)


def test_a_report_changes_nothing() -> None:
    model = pruned_thrice(network())
    with unchanged(model):
        sparsity_report(model)
