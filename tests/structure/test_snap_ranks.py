"""SNAP-it in two processes."""

from __future__ import annotations

import pytest
import torch
from channel_sets import NETWORKS, images, outputs_group, residual, snapped
from processes import Seen, launch
from state import same

from force_plugin import SaliencyImportance


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return launch("snap_worker.py", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("network", NETWORKS)
def test_two_processes_take_the_same_channels_as_one(ranks: Seen, network: str) -> None:
    model = NETWORKS[network][0]()
    alone = snapped(model, images(2), 0.6, steps=2, batches=2)
    for seen in ranks:
        assert same(seen[network], alone.state_dict())


def test_two_processes_take_a_wrapped_model(ranks: Seen) -> None:
    alone = snapped(residual(), images(2), 0.6)
    for seen in ranks:
        assert same(seen["wrapped"], alone.state_dict())


def test_at_random_rank_0_decides(ranks: Seen) -> None:
    model = residual()
    torch.manual_seed(10)
    alone = snapped(model, [], 0.6, method="random")
    for seen in ranks:
        assert same(seen["random"], alone.state_dict())


def test_importance_is_that_of_the_whole_batch(ranks: Seen) -> None:
    model = residual()
    alone = SaliencyImportance(model, images(), "snip")
    expected = {"0": alone(outputs_group(model, "0", [3, 1]))}
    for seen in ranks:
        assert same(seen["importance"], expected, 1e-9)


def test_rank_that_fails_fails_all(ranks: Seen) -> None:
    assert ranks[1]["fails"].startswith("OSError: the disk is gone")
    assert ranks[0]["fails"].startswith("RankError: rank 1 of 2 failed")


@pytest.mark.parametrize("what", ["sparsity", "weights"])
def test_ranks_that_differ_are_an_error(ranks: Seen, what: str) -> None:
    for seen in ranks:
        assert seen[what].startswith("RankError")
