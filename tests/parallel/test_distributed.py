"""Two ranks, each with half of every batch, against one process with the whole batch.

The ranks are real processes, started once for all tests of a kind.
"""

from __future__ import annotations

import pytest
import torch
from distributed_worker import (
    STEPS,
    FirstColumns,
    Network,
    Routed,
    chain,
    images,
    routed,
    train,
)
from processes import Seen, launch
from state import same
from torch.nn.functional import cross_entropy

from force_plugin import METHODS, force_prune, get_masks, make_permanent, saliency


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return launch("distributed_worker.py", tmp_path_factory.mktemp("ranks"))


# The same mask as one process.


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


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_those_of_one_process(ranks: Seen, method: str) -> None:
    torch.manual_seed(10)
    alone = saliency(Network(), images(), method)
    assert same(ranks[0][f"scores {method}"], alone, 1e-9)
    assert same(ranks[0][f"scores {method}"], ranks[1][f"scores {method}"])


@pytest.mark.parametrize("method", ["force", "snip_it", "grasp"])
def test_each_batch_counts_once_where_ranks_have_more_of_them(
    ranks: Seen, method: str
) -> None:
    alone = saliency(Network(), images()[:3], method, batches=None)
    if method == "grasp":  # g and Hg are sums there, and here means over two ranks
        alone = {name: scores / 4 for name, scores in alone.items()}
    for seen in ranks:
        assert same(seen[f"uneven {method}"], alone, 1e-9)


def test_gradient_of_a_branch_that_one_rank_takes(ranks: Seen) -> None:
    model = Routed()
    model.gain.data.fill_(1.0)  # as it is while scoring
    for rank in (0, 1):
        x, y = routed(rank)
        (cross_entropy(model(x), y) / 2).backward()
    naive = {
        f"{name}.weight": (getattr(model, name).weight * grad).abs().detach()
        for name in ("shared", "branch", "head")
        if (grad := getattr(model, name).weight.grad) is not None
    }
    for seen in ranks:
        assert same(seen["routed scores"], naive, 1e-9)


def test_gates_that_one_rank_finds_are_open_on_all(ranks: Seen) -> None:
    for seen in ranks:
        (warnings,) = seen["gates"]
        assert any("1 branch scales of 0, set to 1 (gain)" in text for text in warnings)
        assert seen["gates masks"]["branch.weight"].any()
    assert same(ranks[0]["gates masks"], ranks[1]["gates masks"])


def test_idle_weights_are_those_of_one_process(ranks: Seen) -> None:
    batch = (torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3)
    with pytest.warns(UserWarning, match=r"25 of the 33 weights .* \(76 %\) are idle"):
        report = force_prune(
            chain(), [batch], 45 / 78, method=FirstColumns, progress=False
        )
    for seen in ranks:
        assert seen["idle"] == report.to_dict()


def test_network_that_leads_through_on_one_rank_is_connected(ranks: Seen) -> None:
    for seen in ranks:
        assert seen["dead on one"] == ["no error", "no error"]


# Training afterwards.


@pytest.mark.parametrize(
    "order",
    [
        "wrapped, then pruned",
        "pruned, then wrapped",
        "permanent, then wrapped",
        "pruned, then sharded",
        "permanent, then sharded",
    ],
)
def test_training_is_that_of_one_process(ranks: Seen, order: str) -> None:
    model = Network()
    force_prune(model, images(), 0.8, **STEPS)
    masks = get_masks(model)
    plain = order.startswith("permanent")
    if plain:
        make_permanent(model)
    alone = train(model, images())
    first, second = (seen[order] for seen in ranks)
    losses = torch.tensor(
        [first["losses"], second["losses"]], dtype=torch.float64
    ).mean(0)
    assert losses.tolist() == pytest.approx(alone["losses"], rel=1e-9)
    assert same(first["gradients"], second["gradients"])
    for key in ("gradients", "state"):
        inner = {n.removeprefix("module."): v for n, v in first[key].items()}
        assert same(inner, alone[key], 1e-9)
        if plain:
            assert not any(inner[name][~mask].any() for name, mask in masks.items())


def test_names_are_those_of_the_wrapped_module(ranks: Seen) -> None:
    for seen in ranks:
        assert seen["names"] == 3 * [["stem.weight", "body.weight", "head.weight"]]
        wrapped, inside = seen["wrapped diagnosis"]
        assert wrapped == inside


# What goes wrong.


@pytest.mark.parametrize("call", ["force_prune", "saliency"])
def test_model_that_is_pruned_and_sharded_is_an_error(ranks: Seen, call: str) -> None:
    for seen in ranks:
        assert "stem.weight was pruned before" in seen[f"pruned and sharded {call}"]
        assert "body is a DistributedDataParallel" in seen[f"nested {call}"]


@pytest.mark.parametrize("call", ["force", "magnitude", "saliency"])
def test_weights_that_differ_are_an_error_before_a_batch_is_read(
    ranks: Seen, call: str
) -> None:
    for seen in ranks:
        assert "the model's parameters: expected the same" in seen[f"seeds {call}"]
        assert "torch.manual_seed" in seen[f"seeds {call}"]
        assert seen["read"] == []


@pytest.mark.parametrize(
    "option", ["sparsity", "steps", "method", "open_gates", "guard"]
)
def test_arguments_that_differ_are_an_error(ranks: Seen, option: str) -> None:
    for seen in ranks:
        assert "the arguments, or the model: expected" in seen[f"other {option}"]


def test_masks_that_differ_are_an_error(ranks: Seen) -> None:
    for seen in ranks:
        assert "the masks of step 1: expected the same" in seen["other masks"]


FAILURES = {
    "dry": "BatchError: loader: it ran dry at step 3",
    "no loader": "TypeError: loader: expected an iterable of batches",
    "loader raises": "OSError: the disk is gone",
    "nan": "NotFiniteError: the loss is nan at step 3",
    "nan in the first": "NotFiniteError: the loss is nan at step 1",
    "nan in the last": "NotFiniteError: the loss is nan at step 4",
    "nan in grasp": "NotFiniteError: the loss is nan at step 1",
    "interrupt": "KeyboardInterrupt",
    "no such method": "ValueError: method: expected one of",
    "sparsity out of range": "ValueError: sparsity",
    "no such schedule": "ValueError: schedule: expected one of",
}


@pytest.mark.parametrize("what", FAILURES)
def test_rank_that_fails_fails_all(ranks: Seen, what: str) -> None:
    first, second = (seen[f"fails: {what}"] for seen in ranks)
    assert second.startswith(FAILURES[what])
    assert first.startswith("RankError: rank 1 of 2 failed")
    assert FAILURES[what] in first


def test_warning_made_an_error_fails_all(ranks: Seen) -> None:
    first, second = (seen["warnings are errors"] for seen in ranks)
    assert first.startswith("UserWarning: the pruned network is disconnected")
    assert second.startswith("RankError: rank 0 of 2 failed")


# What is shown.


def test_progress_and_warnings_are_rank_0s(ranks: Seen) -> None:
    assert "snip: 100%" in ranks[0]["bar"]
    assert ranks[1]["bar"] == ""
    assert len(ranks[0]["warnings"]) == len(set(ranks[0]["warnings"])) == 2
    assert ranks[1]["warnings"] == []


def test_one_rank_diagnoses_by_itself(ranks: Seen) -> None:
    assert "700 of them" in ranks[0]["diagnosis"]
