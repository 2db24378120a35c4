"""Masks of the methods' own authors, computed by their public code in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from networks import tiny_resnet

from force_plugin import FORCE, force_prune, get_masks
from force_plugin.scoring import Probe

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


class WithoutDeadChannels(FORCE):
    """FORCE in which a channel that has lost every weight gets none back."""

    @classmethod
    def scores(cls, probe: Probe) -> dict[str, torch.Tensor]:
        scores = super().scores(probe)
        for name, mask in (probe.masks or {}).items():
            scores[name][~mask.flatten(1).any(1)] = 0
        return scores


@pytest.mark.parametrize("density", [0.05, 0.01])
def test_the_authors_masks_are_those_in_which_dead_channels_return(
    density: float,
) -> None:
    # They empty layers of some networks; held back, they would be another method.
    case = f"force|steps=20|schedule=exp|batches=1|density={density}"
    for method in (FORCE, WithoutDeadChannels):
        model = network()
        options = {"steps": 20, "method": method, "progress": False}
        force_prune(model, batches("batch", 1), 1 - density, **options)
        differing = sum(
            int((mask.flatten().numpy() != theirs).sum())
            for name, mask in get_masks(model).items()
            for theirs in [np.unpackbits(GOLDEN[f"{case}/{name}"], count=mask.numel())]
        )
        kept = sum(int(mask.sum()) for mask in get_masks(model).values())
        assert differing == 0 if method is FORCE else differing > kept
