"""Masks of the methods' own authors, computed by their public code in float64.

``golden/`` has arrays alone: a network's values, its batches, and the masks.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import chain_a, tiny_resnet
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, nll_loss

from force_plugin import FORCE, SNIPIt, force_prune, get_masks, saliency, snap_prune
from force_plugin.methods import Measurements
from force_plugin.selection.schedules import count_kept, kept_per_step

Batch = tuple[Tensor, Tensor]

SCHEDULES = {"exp": "exponential", "linear": "linear"}
# The authors of SNIP-it and SNAP-it take the first one, of networks that end in logits.
LOSSES = {"nll_of_logits": nll_loss, "cross_entropy": cross_entropy}
DOCS = Path(__file__).parents[2] / "docs"


class Reference:
    """A file of ``golden/``: a network, its batches, and masks by case."""

    def __init__(self, file: str, architecture: Callable[[], nn.Module]) -> None:
        self.architecture = architecture
        self.arrays = np.load(Path(__file__).parents[1] / "golden" / f"{file}.npz")
        self.names = [str(name) for name in self.arrays["names"]]
        self.cases = [str(case) for case in self.arrays["cases"]]

    def network(self, *prefixes: str) -> nn.Module:
        """With the initial values, and with those of other prefixes over them."""
        model = self.architecture()
        for prefix in ("init/", *prefixes):
            values = {
                key.removeprefix(prefix): torch.from_numpy(self.arrays[key])
                for key in self.arrays.files
                if key.startswith(prefix)
            }
            model.load_state_dict(values, strict=prefix == "init/")
        return model.double()

    def batches(self, count: int, prefix: str = "batch") -> list[Batch]:
        return [
            (
                torch.from_numpy(self.arrays[f"{prefix}{i}/x"]).double(),
                torch.from_numpy(self.arrays[f"{prefix}{i}/y"]).long(),
            )
            for i in range(count)
        ]

    def masks(self, case: str, dimensions: int | None = None) -> dict[str, Tensor]:
        """By weight; with ``dimensions=1`` they are of its channels."""
        masks = {}
        for name in self.names:
            shape = self.arrays[f"init/{name}"].shape[:dimensions]
            bits = np.unpackbits(self.arrays[f"{case}/{name}"], count=np.prod(shape))
            masks[name] = torch.from_numpy(bits).bool().view(shape)
        return masks


TINY_RESNET = Reference("tiny_resnet", tiny_resnet)
SNIP = Reference("snip_tiny_resnet", tiny_resnet)
SNIP_IT = Reference("snip_it_tiny_resnet", tiny_resnet)
SNAP_IT = Reference("snap_it_chain_a", chain_a)


def settings(case: str) -> tuple[str, dict[str, str]]:
    """The method of a case, and the rest of it by name."""
    method, *pairs = case.split("|")
    return method, dict(pair.split("=") for pair in pairs)


def joined(masks: dict[str, Tensor]) -> Tensor:
    return torch.cat([mask.flatten() for mask in masks.values()])


def overlap(masks: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """Intersection over union."""
    assert list(masks) == list(others)
    one, other = joined(masks), joined(others)
    return float((one & other).sum() / (one | other).sum())


@pytest.mark.parametrize("case", TINY_RESNET.cases)
def test_masks_are_those_of_the_authors_code(case: str) -> None:
    method, setting = settings(case)
    per_step = int(setting.get("batches", 1))
    if method == "grasp":
        loader = TINY_RESNET.batches(2, "grasp_batch")
    else:
        loader = TINY_RESNET.batches(4)
    model = TINY_RESNET.network()
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
    ours, theirs = get_masks(model), TINY_RESNET.masks(case)
    if method == "grasp":
        # Its authors remove ⌊sparsity · m⌋ - 1 weights, so they keep one or two more
        # than ⌊density · m⌋; all of ours are among theirs.
        kept = joined(ours).sum()
        assert (joined(ours) & joined(theirs)).sum() == kept
        assert kept >= joined(theirs).sum() - 2
    else:
        assert overlap(ours, theirs) == 1.0


class WithoutDeadChannels(FORCE):
    """FORCE in which a channel that has lost every weight gets none back."""

    @classmethod
    def scores(cls, probe: Measurements) -> dict[str, Tensor]:
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
    theirs = joined(TINY_RESNET.masks(case))
    for method in (FORCE, WithoutDeadChannels):
        model = TINY_RESNET.network()
        options: dict[str, Any] = {"steps": 20, "method": method, "progress": False}
        force_prune(model, TINY_RESNET.batches(1), 1 - density, **options)
        ours = joined(get_masks(model))
        differing = (ours != theirs).sum()
        assert differing == 0 if method is FORCE else differing > ours.sum()


@pytest.mark.parametrize("case", SNIP.cases)
def test_snip_is_that_of_its_public_code(case: str) -> None:
    _, setting = settings(case)
    # That code scores a copy whose weights it draws anew.
    drawn = ["reinit/"] if setting["reinit"] == "1" else []
    model = SNIP.network(*drawn).train(setting["mode"] == "train")
    density = float(setting["density"])
    force_prune(model, SNIP.batches(1), 1 - density, method="snip", progress=False)
    assert overlap(get_masks(model), SNIP.masks(case)) == 1.0


# SNIP-it with the counts of its authors' code.


class WithOtherCounts(SNIPIt):
    """SNIP-it on the schedule that ``force_prune`` is given."""

    schedule = None


class OneStep(WithOtherCounts):
    """Their SNIP: one step, in evaluation mode."""

    steps = 1


def authors_counts(total: int, sparsity: float, steps: int) -> list[int]:
    """Kept after each step: what is strictly above the k-th score, that is k − 1.

    Their first of several steps takes half, whatever the sparsity. A step that asks
    for more than are left finds scores of 0 at the k-th place.
    """
    halves = (sparsity - (sparsity - 0.5) * 0.5**i for i in range(steps - 1))
    return [
        *accumulate((count_kept(total, 1 - s) - 1 for s in (*halves, sparsity)), min)
    ]


def snip_it_masks(
    case: str, *, their_counts: bool, loss: str | None = None
) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """The pruned model, its masks, and what it was scored with."""
    name, setting = settings(case)
    model = SNIP_IT.network()
    owners: list[Any] = [
        model.get_submodule(n.removesuffix(".weight")) for n in SNIP_IT.names
    ]
    if setting["outer"] == "0":  # the first and the last layer stay dense
        owners = owners[1:-1]
    count = int(setting["batches"])
    how: dict[str, Any] = {
        "batches": count,
        "loss_fn": LOSSES[loss or setting["loss"]],
        "parameters": [(owner, "weight") for owner in owners],
    }
    total = sum(owner.weight.numel() for owner in owners)
    sparsity = float(setting["sparsity"])
    method: str | type[SNIPIt] = "snip_it"
    schedule: Any = "exponential"
    if name == "snip":
        method = OneStep
    elif their_counts:
        method = WithOtherCounts
    if their_counts:
        counts = authors_counts(total, sparsity, 7 if name == "snip_it" else 1)
        densities = [(kept + 0.5) / total for kept in counts]
        sparsity = 1 - densities[-1]

        def schedule(step: int, steps: int, density: float) -> float:
            return densities[step - 1]

    force_prune(
        model,
        SNIP_IT.batches(count),
        sparsity,
        method=method,
        schedule=schedule,
        progress=False,
        **how,
    )
    masks = get_masks(model)
    weights = {n: torch.from_numpy(SNIP_IT.arrays[f"init/{n}"]) for n in SNIP_IT.names}
    whole = {
        n: masks.get(n, torch.ones_like(w, dtype=torch.bool))
        for n, w in weights.items()
    }
    return model, whole, how


BELOW_HALF = [c for c in SNIP_IT.cases if float(settings(c)[1]["sparsity"]) < 0.5]
FROM_HALF = [c for c in SNIP_IT.cases if c not in BELOW_HALF]


@pytest.mark.parametrize("case", FROM_HALF)
def test_snip_it_is_its_authors_with_their_counts(case: str) -> None:
    _, masks, _ = snip_it_masks(case, their_counts=True)
    assert overlap(masks, SNIP_IT.masks(case)) == 1.0


@pytest.mark.parametrize("case", BELOW_HALF)
def test_below_one_half_their_snip_it_removes_weights_of_saliency_0_too(
    case: str,
) -> None:
    # Half is gone after their first step. The k-th score of all weights, the pruned
    # ones among them, is 0 from then on, and what is not above it goes.
    model, masks, how = snip_it_masks(case, their_counts=True)
    scores = saliency(model.eval(), SNIP_IT.batches(how["batches"]), "snip", **how)
    theirs = {name: mask & (scores[name] != 0) for name, mask in masks.items()}
    assert overlap(theirs, SNIP_IT.masks(case)) == 1.0


# SNAP-it, step by step, with the counts of its authors' code.

HIDDEN = [int(name.removesuffix(".weight")) for name in SNAP_IT.names]


def snap_it_masks(case: str, *, their_counts: bool) -> dict[str, Tensor]:
    """Which channels of the hidden layers stay."""
    method, setting = settings(case)
    model: Any = SNAP_IT.network()
    loader = SNAP_IT.batches(int(setting["batches"]))
    options: dict[str, Any] = {
        "batches": len(loader),
        "loss_fn": LOSSES[setting["loss"]],
        "progress": False,
    }
    example, small = loader[0][0][:2], model
    if not their_counts:
        steps = 5 if method == "snap_it" else 0
        sparsity = float(setting["sparsity"])
        small = snap_prune(model, loader, example, sparsity, steps=steps, **options)
    else:
        for kept in SNAP_IT.arrays[f"{case}/kept_after_each_step"]:
            widths = [len(small[i].weight) for i in HIDDEN]
            # The last channel of a layer is not one of those to choose from.
            free = sum(width for width in widths if width > 1)
            stay = int(kept) - widths.count(1)
            if stay < free:
                share = 1 - (stay + 0.5) / free
                small = snap_prune(small, loader, example, share, steps=0, **options)
    return {  # a channel is known by its bias
        name: torch.isin(model[i].bias, small[i].bias)
        for name, i in zip(SNAP_IT.names, HIDDEN, strict=True)
    }


@pytest.mark.parametrize("case", SNAP_IT.cases)
def test_snap_it_is_its_authors_with_their_counts(case: str) -> None:
    masks = snap_it_masks(case, their_counts=True)
    assert overlap(masks, SNAP_IT.masks(case, dimensions=1)) == 1.0


def test_snap_it_counts_as_its_authors_but_at_one_half_and_in_emptied_layers() -> None:
    total = sum(len(SNAP_IT.arrays[f"init/{name}"]) for name in SNAP_IT.names)
    same = 0
    for case in SNAP_IT.cases:
        method, setting = settings(case)
        theirs = SNAP_IT.arrays[f"{case}/kept_after_each_step"].tolist()
        sparsity = float(setting["sparsity"])
        ours = kept_per_step("snip_it", len(theirs), sparsity, total)
        same += theirs == ours
        if method == "snap_it" and sparsity == 0.5:
            # Later steps remove a share of what is left, and rounding takes one more.
            assert theirs == [ours[0], *(kept - 1 for kept in ours[1:])]
        elif sparsity < 0.93:
            assert theirs == ours
        else:  # the best channel of a layer that would be emptied is one more
            assert all(0 <= t - o <= 2 for t, o in zip(theirs, ours, strict=True))
    text = (DOCS / "structure.md").read_text()
    assert f"the same, in all of {len(SNAP_IT.cases)} cases" in text
    assert f"its counts are ours in {same} of them" in text


def test_the_docs_say_how_far_the_counts_and_the_loss_alone_lead() -> None:
    """Prints the table of ``docs/methods.md`` with ``-rP``."""
    rows = [
        "| sparsity | with their loss, our counts | with cross entropy, our counts |",
        "|---|---|---|",
    ]
    for sparsity in ("0.8", "0.95", "0.99"):
        case = f"snip_it|loss=nll_of_logits|outer=1|batches=4|sparsity={sparsity}"
        shares = [
            overlap(
                snip_it_masks(case, their_counts=False, loss=loss)[1],
                SNIP_IT.masks(case),
            )
            for loss in LOSSES
        ]
        rows.append(
            f"| {float(sparsity):.0%} | "
            + " | ".join(f"{x:.2f}" for x in shares)
            + " |"
        )
    table = "\n".join(rows).replace("%", " %")
    print(table)
    assert table in (DOCS / "methods.md").read_text()
