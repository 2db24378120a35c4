"""Measure the milliseconds of each part of a step."""

from __future__ import annotations

import argparse
import cProfile
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from harness.networks import bare, forward
from harness.turns import take_turns

from cost_sections.rows import Row, step_case
from force_plugin import force_prune
from force_plugin.methods.base import SaliencyMethod
from force_plugin.methods.registry import scores_of
from force_plugin.pruning.doubts import Doubts
from force_plugin.pruning.loop import _measured
from force_plugin.scoring.gradients import Gradients, Sums
from force_plugin.scoring.probe import Probe
from force_plugin.selection.top_k import top_k_masks


def measure(args: argparse.Namespace) -> Iterator[Row]:
    case = step_case(args)
    take_turns(case.dense, case.batch, 2)  # warm-up
    with cProfile.Profile() as profile:
        turns = take_turns(case.dense, case.batch, case.steps, case.turn)
    entries = {entry.code: entry for entry in profile.getstats()}

    def spent(function: Any, caller: Any) -> float:
        """Return the milliseconds per step of a function that ``caller`` calls."""
        inner, outer = (inspect.unwrap(f).__code__ for f in (function, caller))
        calls = (outer in entries and entries[outer].calls) or []
        for call in calls:
            if call.code is inner:
                return 1000 * call.totaltime / case.steps
        raise LookupError(
            f"{caller.__qualname__} does not call {function.__qualname__} any more: "
            "change the parts of this section"
        )

    gradients = spent(Probe.gradients, SaliencyMethod.measure)
    ours = {
        "forward": spent(Probe._loss_of, Gradients.mean),
        "backward": spent(Sums.add_gradients, Gradients.mean),
        "scores": spent(scores_of, _measured) - gradients,
        "selection": spent(top_k_masks, force_prune),
        "masks on stand-ins": spent(Probe.prune, force_prune),
        "notes": spent(Doubts.on_selection, force_prune)
        + spent(Doubts.on_first_scores, force_prune),
        "connected": spent(Probe.flow, _measured),
    }
    theirs = {
        "forward": spent(forward, bare),
        "backward": spent(torch.autograd.backward, bare),
    }
    for parts, times in ((ours, turns.ours), (theirs, turns.bare)):
        total = 1000 * sum(times) / case.steps
        parts["the rest"] = total - sum(parts.values())
        parts["all"] = total
    setting = f"{case.setting}, {case.steps} steps"
    for part, spent_on_it in ours.items():
        row = {"section": "profile", "setting": setting, "case": part}
        yield row | {"ours": spent_on_it, "bare": theirs.get(part, 0.0)}


def show(rows: Sequence[Row]) -> None:
    print(f"\nprofile: {rows[0]['setting']}, force, ms a step under cProfile\n")
    print(f"{'':22}{'ours':>10}{'bare':>10}{'more':>10}{'% of bare':>12}")
    for row in rows:
        more = row["ours"] - row["bare"]
        share = 100 * more / rows[-1]["bare"]
        sides = f"{row['ours']:10.2f}{row['bare']:10.2f}"
        print(f"{row['case']:22}{sides}{more:10.2f}{share:12.2f}")
