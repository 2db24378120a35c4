"""Models that FSDP2 has sharded, over two ranks, against one process that has it all.

The ranks are real processes, started once for all tests.
"""

from __future__ import annotations

import pytest
import timm
import torch
from distributed_worker import STEPS, FirstColumns, Network, chain, images, train
from processes import Seen, launch
from sharding_worker import Gated, Normalised, Silent, Tied, reconstruct, vectors
from state import same
from torch import Tensor

from force_plugin import (
    METHODS,
    diagnose,
    force_prune,
    get_masks,
    make_permanent,
    saliency,
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return launch("sharding_worker.py", tmp_path_factory.mktemp("ranks"), 240)


# The same as one process.


@pytest.mark.parametrize("per_step", [1, 2, None])
@pytest.mark.parametrize("method", METHODS)
def test_masks_are_those_of_one_process(
    ranks: Seen, method: str, per_step: int | None
) -> None:
    model = Network()
    torch.manual_seed(10)  # rank 0's
    report = force_prune(model, images(), 0.8, method=method, batches=per_step, **STEPS)
    for seen in ranks:
        assert same(seen[f"masks {method} {per_step}"], get_masks(model))
        assert seen[f"report {method} {per_step}"] == report.to_dict()
        counted = seen[f"counted {method} {per_step}"]
        assert counted["layers"] == report.to_dict()["layers"]


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_those_of_one_process(ranks: Seen, method: str) -> None:
    model = Network()
    torch.manual_seed(10)
    alone = saliency(model, images(), method)
    for seen in ranks:
        assert same(seen[f"scores {method}"], alone, 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_masks_of_batches_in_parts_are_those_of_one_process(
    ranks: Seen, method: str
) -> None:
    model = Network()
    torch.manual_seed(10)
    force_prune(model, images(), 0.8, method=method, batches=2, **STEPS)
    for seen in ranks:
        assert same(seen[f"in parts {method}"], get_masks(model))


def test_score_is_given_all_of_a_weight(ranks: Seen) -> None:
    alone = saliency(Network(), images(), Normalised)
    for seen in ranks:
        assert same(seen["rows"], alone, 1e-9)


def test_no_rank_has_more_scores_than_its_own(ranks: Seen) -> None:
    total = sum(mask.numel() for mask in ranks[0]["masks snip 1"].values())
    held = [seen["held"] for seen in ranks]
    assert sum(held) == total
    assert max(held) < 0.6 * total


def test_k_largest_of_all_parts_are_those_of_the_whole(ranks: Seen) -> None:
    assert [seen["selections"] for seen in ranks] == [[], []]


def test_gates_are_opened_as_in_one_process(ranks: Seen) -> None:
    model = Gated()
    report = force_prune(model, vectors(), 0.5, **STEPS)
    text = " ".join(report.warnings)
    assert all(name in text for name in ("norm.weight", "gain", "last.weight"))
    for seen in ranks:
        masks, found = seen["gated"]
        assert same(masks, get_masks(model))
        assert found == report.to_dict()
        assert seen["diagnosis"] == str(diagnose(Gated(), vectors(), sparsity=0.5))


@pytest.mark.filterwarnings("ignore:1 of 4 layers:UserWarning")
def test_silent_layers_are_explained_as_in_one_process(ranks: Seen) -> None:
    model = Silent()
    report = force_prune(model, vectors(), 0.5, **STEPS)
    text = " ".join(report.warnings)
    assert "what it multiplies is 0" in text
    assert "the gradient ends at sign" in text
    for seen in ranks:
        assert seen["silent"] == report.to_dict()
        assert same(seen["silent, permanent"], get_masks(model))


def test_idle_weights_are_those_of_one_process(ranks: Seen) -> None:
    with pytest.warns(UserWarning, match=r"25 of the 33 weights .* \(76 %\) are idle"):
        report = force_prune(
            chain(), vectors(), 45 / 78, method=FirstColumns, progress=False
        )
    for seen in ranks:
        assert seen["idle"] == report.to_dict()


@pytest.mark.parametrize("how", ["one unit", "two units"])
def test_shared_weights_and_weights_that_are_read(ranks: Seen, how: str) -> None:
    model = Tied()
    force_prune(model, vectors(), 0.5, forward=reconstruct, **STEPS)
    for seen in ranks:
        assert same(seen[how], get_masks(model))


@pytest.mark.parametrize("how", ["replicas", "no replicas", "columns", "not resharded"])
def test_other_ways_to_shard(ranks: Seen, how: str) -> None:
    model = Network()
    report = force_prune(model, images(), 0.8, **STEPS)
    masks = get_masks(model)
    for seen in ranks:
        found, described = seen[how]
        assert same(found, masks)
        assert described == report.to_dict()
    if f"{how}, trained" in ranks[0]:
        make_permanent(model)
        check_training(ranks, f"{how}, trained", model, masks)


def test_vision_transformer(ranks: Seen) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit2", num_classes=5, img_size=32).double().eval()
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(8, 3, 32, 32, generator=generator, dtype=torch.float64)
    y = torch.randint(5, (8,), generator=generator)
    report = force_prune(model, [(x, y)], 0.9, **STEPS)
    for seen in ranks:
        masks, found = seen["vit"]
        assert same(masks, get_masks(model))
        assert found == report.to_dict()


# What it leaves behind.


def check_training(
    ranks: Seen, what: str, model: torch.nn.Module, masks: dict[str, Tensor]
) -> None:
    """Training of the shards is that of one process, and the zeros stay."""
    alone = train(model, images())
    losses = torch.tensor([seen[what]["losses"] for seen in ranks]).mean(0)
    assert losses.tolist() == pytest.approx(alone["losses"], rel=1e-6)
    for seen in ranks:
        for key in ("gradients", "state"):
            assert same(seen[what][key], alone[key], 1e-9)
        for name, mask in masks.items():
            assert not seen[what]["state"][name][~mask].any()
            assert not seen[what]["gradients"][name][~mask].any()


def test_training_is_that_of_one_process(ranks: Seen) -> None:
    model = Network()
    force_prune(model, images(), 0.8, **STEPS)
    masks = get_masks(model)
    make_permanent(model)
    check_training(ranks, "trained", model, masks)


def test_gradients_that_were_there_are_left_alone(ranks: Seen) -> None:
    for seen in ranks:
        assert same(*seen["gradients"])


def test_pruned_further(ranks: Seen) -> None:
    for seen in ranks:
        kept, earlier, masks = seen["again"]
        assert kept == sum(int(mask.sum()) for mask in masks.values()) == 70
        assert not any((masks[name] & ~earlier[name]).any() for name in masks)


def test_pruned_further_where_it_was_permanent_before(ranks: Seen) -> None:
    for seen in ranks:
        earlier, masks = seen["permanent, again"]
        assert sum(int(mask.sum()) for mask in masks.values()) == 70
        assert not any((masks[name] & ~earlier[name]).any() for name in masks)


def test_restart_holds_the_zeros_of_a_checkpoint(ranks: Seen) -> None:
    for seen in ranks:
        before, after = seen["restart"]
        assert same(before, after)
        for name, mask in before.items():
            assert not seen["restart, trained"]["state"][name][~mask].any()


# What goes wrong. The worker compares shards, gradients and hooks before and after.


FAILURES = {
    "empty loader": "BatchError: loader: expected at least one batch",
    "loader raises": "OSError: the disk is gone",
    "loss": "KeyboardInterrupt",
    "backward": "OSError: broken in the backward pass",
    "no such method": "ValueError: method: expected one of",
} | {
    f"forward {module} {method}": f"OSError: broken in {module or 'all'}"
    for module in ("stem", "body", "head", "")
    for method in ("force", "grasp", "synflow")
}


@pytest.mark.parametrize("what", FAILURES)
def test_rank_that_fails_fails_all(ranks: Seen, what: str) -> None:
    first, second = (seen["failures"][what] for seen in ranks)
    assert second.startswith(FAILURES[what])
    assert first.startswith("RankError: rank 1 of 2 failed")
    assert FAILURES[what] in first


def test_ranks_with_other_numbers_of_batches(ranks: Seen) -> None:
    for seen in ranks:
        said = seen["failures"]["fewer batches"]
        assert "as many batches on every rank" in said
        assert said.endswith("fewer on rank 1")


@pytest.mark.parametrize("method", ["force", "grasp"])
def test_ranks_with_other_numbers_of_parts(ranks: Seen, method: str) -> None:
    for seen in ranks:
        said = seen["failures"][f"fewer parts {method}"]
        assert "as many microbatches of at most 2 samples on every rank" in said
        assert said.endswith("fewer on rank 1")


def test_shards_are_not_compiled(ranks: Seen) -> None:
    for seen in ranks:
        said = seen["failures"]["compiled"]
        assert "compile: expected a model that is not sharded" in said


def test_forward_that_depends_on_the_batch(ranks: Seen) -> None:
    for seen in ranks:
        assert "the same weights in the same order" in seen["failures"]["routed"]


@pytest.mark.parametrize(
    ("what", "said"),
    {
        "tensor parallel": "0.weight is sharded otherwise than by fully_shard alone",
        "partly": "1.weight is not sharded, and other weights are",
        "fsdp 1": "the model is a FullyShardedDataParallel (FSDP1)",
        "permanent": "stem.weight was pruned before it was sharded",
        "masks": "expected one that is not sharded, but stem.weight",
        "saved": "expected a model that is not sharded, got shards of stem.weight",
        "loaded": "expected a model that is not sharded, got shards of stem.weight",
    }.items(),
)
def test_models_that_cannot_be_pruned(ranks: Seen, what: str, said: str) -> None:
    for seen in ranks:
        assert said in seen["misfits"][what]
