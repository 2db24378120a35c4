"""Fit the cost model of ``scale.py``, and predict costs on other machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Row = dict[str, Any]
Fit = dict[str, Any]


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU per second, from its data sheet, and its memory in bytes."""

    flops: float  # dense bfloat16
    bandwidth: float
    link: float  # NVLink, in one direction
    memory: float


GPUS = {
    "a100": Gpu(312e12, 2.04e12, 300e9, 80e9),
    "h100": Gpu(989e12, 3.35e12, 450e9, 80e9),
    "h200": Gpu(989e12, 4.80e12, 450e9, 141e9),
}
# The assumed share of a data sheet's rates that is reached.
UTILISATION = {"flops": 0.4, "bandwidth": 0.8, "link": 0.7}


def line_through(x: Sequence[float], y: Sequence[float], scale: Sequence[float]) -> Fit:
    """Return a and b by least squares of (a + b x − y) / scale."""
    slope, start = np.polyfit(x, y, 1, w=1 / np.array(scale))
    return {"a": float(start), "b": float(slope)}


def value_of(line: Fit, weights: float) -> float:
    return float(line["a"] + line["b"] * weights)


def fit(record: Row) -> Fit:
    """Return the numbers of the cost model, fitted to measurements."""
    times, memory, ranks = record["times"], record["memory"], record["ranks"]
    weights = [row["weights"] for row in times]
    # The error is weighted by the time of the whole step, not of the part.
    scale = [row["step"] for row in times]
    found: Fit = {
        part: line_through(weights, [row[part] for row in times], scale)
        for part in ("beyond", "once")
    }
    m = np.array([row["weights"] for row in memory])
    more = np.array([row["ours"] - row["bare"] for row in memory])
    found["bytes"] = float(more @ m / (m @ m))
    sharded = [row for row in ranks if row["form"] == "sharded"]
    shares = [1 / row["ranks"] for row in sharded]
    found["sharded"] = line_through(
        shares, [row["bytes"] for row in sharded], [1.0] * len(sharded)
    )
    whole = {row["ranks"]: row for row in ranks if row["form"] == "whole"}
    found["exchange"] = {
        size: 2 * (size - 1) / size * 4 * row["weights"] / more_seconds
        for size, row in whole.items()
        if size > 1 and (more_seconds := row["seconds"] - whole[1]["seconds"]) > 0
    }
    return found


def call(fitted: Fit, row: Row) -> float:
    """Return the seconds of a call, from the time of the gradients of a batch."""
    step = row["batches"] * row["gradients"] + value_of(
        fitted["beyond"], row["weights"]
    )
    return value_of(fitted["once"], row["weights"]) + float(row["steps"] * step)


def predict(record: Row, fitted: Fit, given: dict[str, float], name: str) -> list[Row]:
    """Return time and memory to score a sharded transformer on GPUs, in lines."""
    gpu = GPUS[name]
    m, ranks = given["weights"], given["ranks"]
    speed = {key: rate * getattr(gpu, key) for key, rate in UTILISATION.items()}
    rows: list[Row] = []

    def say(what: str, value: float, unit: str, origin: str) -> float:
        rows.append({"what": what, "value": value, "unit": unit, "origin": origin})
        return value

    for key, unit in (
        ("flops", "FLOP/s"),
        ("bandwidth", "bytes/s"),
        ("link", "bytes/s"),
    ):
        origin = f"assumed: {UTILISATION[key]:.0%} of the data sheet"
        say(f"{name}: {key}", speed[key], unit, origin)
    width = say("width", (128 * m / 12) ** (1 / 3), "", "assumed: 12 x layers x width²")
    layers = say("layers", width / 128, "", "assumed: width / 128")

    work = 6 * m * given["tokens"] * given["batches"]
    say("FLOPs of a step", work, "a rank", "6 x weights x tokens x batches")
    gradients = say("gradients", work / speed["flops"], "s a step", "computed")
    # Weights are sent twice (forward and backward), and gradients once.
    sent = 3 * 4 * m * (ranks - 1) / ranks * given["batches"]
    say("exchanged", sent, "bytes a rank", "float32: 2 gathers, 1 reduction")
    exchange = say("exchange", sent / speed["link"], "s a step", "computed, no overlap")
    moved = fitted["beyond"]["b"] * record["bandwidth"]
    say("memory traffic", moved, "bytes a weight", "measured here, on the CPU")
    beyond = moved * m / ranks / speed["bandwidth"]
    say("masks, scores, selection", beyond, "s a step", "computed, its part of them")
    step = say("step", gradients + exchange + beyond, "s", "computed")
    say("step over bare", step / (gradients + exchange), "", "computed")
    say("all steps", given["steps"] * step / 60, "minutes", "computed")

    fixed, part = fitted["sharded"]["a"], fitted["sharded"]["b"]
    each = say("memory", fixed + part / ranks, "bytes a weight", "measured, as fitted")
    # Korthikanti et al. 2022, arXiv 2205.05198, without the attention matrices.
    activations = 34 * width * layers * given["tokens"]
    say("activations", activations / 1e9, "GB", "assumed: 34 x width x layers")
    total = each * m + activations
    say("memory of a rank", total / 1e9, "GB", f"computed; it has {gpu.memory / 1e9:g}")
    return rows
