"""Masks of the methods' own authors, computed by their public code in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from networks import tiny_resnet

from force_plugin import force_prune, get_masks

GOLDEN = np.load(Path(__file__).parent / "golden" / "tiny_resnet.npz")
SCHEDULES = {"exp": "exponential", "linear": "linear"}


def network() -> torch.nn.Module:
    model = tiny_resnet()
    model.load_state_dict(
        {
            key.removeprefix("init/"): torch.from_numpy(GOLDEN[key])
            for key in GOLDEN.files
            if key.startswith("init/")
        }
    )
    return model.double()


def batches(prefix: str, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (
            torch.from_numpy(GOLDEN[f"{prefix}{i}/x"]).double(),
            torch.from_numpy(GOLDEN[f"{prefix}{i}/y"]).long(),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("case", [str(case) for case in GOLDEN["cases"]])
def test_masks_are_those_of_the_authors_code(case: str) -> None:
    method, *pairs = case.split("|")
    setting = dict(pair.split("=") for pair in pairs)
    per_step = int(setting.get("batches", 1))
    loader = batches("grasp_batch", 2) if method == "grasp" else batches("batch", 4)
    model = network()
    force_prune(
        model,
        # One batch a step: the authors' code takes the first one at every step.
        loader[:1] if per_step == 1 else loader,
        1 - float(setting["density"]),
        method=method,
        steps=int(setting["steps"]),
        schedule=SCHEDULES[setting.get("schedule", "exp")],
        batches=per_step,
        progress=False,
    )
    masks = get_masks(model)
    assert list(masks) == [str(name) for name in GOLDEN["names"]]
    ours = torch.cat([mask.flatten() for mask in masks.values()]).numpy()
    theirs = np.concatenate(
        [
            np.unpackbits(GOLDEN[f"{case}/{name}"], count=mask.numel()).astype(bool)
            for name, mask in masks.items()
        ]
    )
    overlap = (ours & theirs).sum() / (ours | theirs).sum()
    if method == "grasp":
        # Its authors remove ⌊sparsity · m⌋ - 1 weights, so they keep one or two more
        # than ⌊density · m⌋; all of ours are among theirs.
        assert (ours & theirs).sum() == ours.sum() >= theirs.sum() - 2
    else:
        assert overlap == 1.0
