"""Time and memory of scoring over weights, batches, steps and ranks, and beyond.

    python benchmarks/scale.py --store scale.json       # ten minutes on two cores
    python benchmarks/scale.py --from scale.json --plot docs        # measures nothing
    python benchmarks/scale.py --from scale.json --predict weights=7e9 --gpu h100

FORCE, on networks of 1e6 to 3e8 weights with small inputs, so that what is not the
gradients shows. Fitted are

    seconds = once(m) + steps x (batches x gradients + beyond(m))
    bytes   = those of a bare step + c x m

where m is the number of prunable weights, ``gradients`` the time of a bare forward and
backward pass of a batch, and ``once`` and ``beyond`` are of the form a + b x m. They
are then held against networks, steps and batches that were not fitted. Over ranks
(gloo, on the CPU), whole and sharded networks are those of sharded_memory.py.

``--predict`` computes from it what a transformer, sharded over GPUs, would take:
weights=, ranks=, and of each rank batches= and steps=, and tokens= of what passes at
once. It depends on numbers that are assumed; each is printed, and marked.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import sharded_memory
import timm
import torch
from cost_sections.memory import peak_of
from harness.memory import fresh
from harness.networks import make_batch, make_model, prunable
from harness.options import add_files, add_quick, add_threads, begin, parser_of
from harness.storage import write_json
from harness.timing import seconds
from harness.turns import take_turns

Row = dict[str, Any]
Fit = dict[str, Any]

SIZE = 32  # of the images: five tokens of a ViT


@dataclass(frozen=True)
class Gpu:
    """What its data sheet says, a second, and its memory in bytes."""

    flops: float  # dense bfloat16
    bandwidth: float
    link: float  # NVLink, in one direction
    memory: float


GPUS = {
    "a100": Gpu(312e12, 2.04e12, 300e9, 80e9),
    "h100": Gpu(989e12, 3.35e12, 450e9, 80e9),
    "h200": Gpu(989e12, 4.80e12, 450e9, 141e9),
}
# What of a data sheet's numbers is reached.
UTILISATION = {"flops": 0.4, "bandwidth": 0.8, "link": 0.7}


def tell(what: str) -> None:
    print(f"measuring {what}", file=sys.stderr, flush=True)


def measure_time(
    name: str, samples: int, steps: int, batches: int, args: argparse.Namespace
) -> Row:
    """Seconds of a call and of its parts, medians over runs."""
    tell(f"{name}, {steps} steps of {batches}")
    dense = make_model(name, SIZE, args.device)
    batch = make_batch(samples, SIZE, args.device)
    take_turns(dense, batch, 2, batches=batches)  # warms up
    turns = [take_turns(dense, batch, steps, 1, batches) for _ in range(args.runs)]

    def middle(values: Iterator[float]) -> float:
        return statistics.median(values)

    return {
        "model": name,
        "weights": prunable(dense),
        "samples": samples,
        "steps": steps,
        "batches": batches,
        "bare": middle(t.step()[1] for t in turns),
        "step": middle(t.step()[0] for t in turns),
        "beyond": middle(t.step()[0] - t.step()[1] for t in turns),
        "once": middle(t.once() for t in turns),
        "call": middle(t.all_of_it()[0] for t in turns),
    }


def measure_memory(name: str, samples: int, args: argparse.Namespace) -> Row:
    """Peaks in bytes, over that of a process that has made nothing yet."""
    tell(f"{name}, memory")
    with torch.device("meta"):
        weights = prunable(make_model(name, SIZE, "meta"))
    case = (name, SIZE, samples, 1, args.device)
    sides = {"ours": "force", "bare": ""}
    peaks = {side: fresh(peak_of, method, *case) for side, method in sides.items()}
    return {"model": name, "weights": weights, **peaks}


def measure_microbatch(args: argparse.Namespace) -> list[Row]:
    """Peaks in bytes of whole batches, and of a large one in parts."""
    name, size, large, small = "resnet50", 224, 128, 8
    if args.quick:
        name, size, large, small = "test_resnet", 32, 64, 4
    cases: list[tuple[str, str, int, int | None]] = [
        (f"bare gradients of {small} images", "", small, None),
        (f"force, batches of {small}", "force", small, None),
        (f"force, {large}, microbatch={small}", "force", large, small),
    ]
    rows = []
    for case, method, samples, part in cases:
        tell(f"{name} {size}x{size}, memory of {case}")
        used = fresh(peak_of, method, name, size, samples, 1, args.device, part)
        rows.append({"model": f"{name} {size}x{size}", "case": case, "bytes": used})
    return rows


def measure_ranks(model: str, image: int, ranks: Sequence[int]) -> list[Row]:
    """Bytes a weight and seconds a step of each rank, whole and sharded."""
    settings = argparse.Namespace(model=model, image=image, batch_size=1, steps=3)
    with torch.device("meta"):
        made = timm.create_model(model, img_size=image)
    weights = sum(parameter.numel() for parameter in made.parameters())
    rows = []
    for size in ranks:
        tell(f"{model}, ranks: {size}")
        nothing, _ = sharded_memory.measure(size, "nothing", settings)
        for form in ("whole", "sharded"):
            used, seconds = sharded_memory.measure(size, form, settings)
            row: Row = {"model": model, "weights": weights, "ranks": size, "form": form}
            rows.append(row | {"bytes": (used - nothing) / weights, "seconds": seconds})
    return rows


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of copies that no cache holds."""
    source = torch.zeros(1 << 26, device=device)
    target = torch.ones_like(source)
    times = [seconds(partial(target.copy_, source)) for _ in range(7)]
    return 2 * source.nbytes / statistics.median(times)


def measure(args: argparse.Namespace) -> Row:
    """Everything that is fitted, and what it is held against."""
    # Networks and samples in a batch.
    models = {
        "test_vit": 2,
        "vit_tiny_patch16_224": 2,
        "resnet18": 4,
        "vit_small_patch16_224": 2,
        "resnet50": 4,
        "vit_base_patch16_224": 2,
        "vit_large_patch16_224": 2,
    }
    held_out = [("resnet101", 4, 10, 3), ("vit_medium_patch16_gap_240", 4, 8, 2)]
    more_batches, rank_model, image = [2, 4], "vit_base_patch16_224", 64
    if args.quick:
        models = {"test_resnet": 2, "test_vit": 2, "resnet18": 2}
        held_out, more_batches = [("test_vit3", 2, 5, 2)], [2]
        rank_model, image = "test_vit", 32
    record: Row = {"bandwidth": copy_bandwidth(args.device)}
    record["times"] = [measure_time(n, s, 6, 1, args) for n, s in models.items()]
    middle = list(models)[len(models) // 2]
    record["batches"] = [
        measure_time(middle, models[middle], 6, batches, args)
        for batches in (1, *more_batches)
    ]
    record["held out"] = []
    for name, samples, steps, batches in held_out:
        gradients = measure_time(name, samples, 4, 1, args)["bare"]
        row = measure_time(name, samples, steps, batches, args)
        record["held out"].append(row | {"gradients": gradients})
    record["memory"] = [
        measure_memory(name, samples, args)
        for name, samples in models.items()
        if not args.quick or name == "resnet18"
    ]
    record["microbatch"] = measure_microbatch(args)
    # In a process whose children give back what they free.
    record["ranks"] = fresh(measure_ranks, rank_model, image, args.ranks)
    return record


def line_through(x: Sequence[float], y: Sequence[float], scale: Sequence[float]) -> Fit:
    """Least squares of (a + b x − y) / scale."""
    slope, start = np.polyfit(x, y, 1, w=1 / np.array(scale))
    return {"a": float(start), "b": float(slope)}


def value_of(line: Fit, weights: float) -> float:
    return float(line["a"] + line["b"] * weights)


def fit(record: Row) -> Fit:
    """The numbers of the model, from what was measured."""
    times, memory, ranks = record["times"], record["memory"], record["ranks"]
    weights = [row["weights"] for row in times]
    # What counts is the error in terms of the whole, not of its part.
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


def show(record: Row, fitted: Fit) -> None:
    """What was measured, the model, and its residuals."""
    beyond, once = fitted["beyond"], fitted["once"]
    print("\nseconds, FORCE; beyond: a step less its bare gradients\n")
    print(
        f"{'':30}{'weights':>12}{'bare':>8}{'beyond':>9}{'fit':>8}{'once':>7}{'fit':>6}"
    )
    for row in record["times"]:
        m = row["weights"]
        print(
            f"{row['model']:30}{m:12,}{row['bare']:8.3f}{row['beyond']:9.4f}"
            f"{value_of(beyond, m):8.4f}{row['once']:7.2f}{value_of(once, m):6.2f}"
        )
    moved = beyond["b"] * record["bandwidth"]
    print()
    for name, found in (("beyond", beyond), ("once", once)):
        ends = f"{1e3 * found['a']:.2f} ms + {1e9 * found['b']:.2f} ns x weights"
        print(f"{name:6} = {ends}")
    print(
        f"beyond moves {moved:.0f} bytes a weight and step, at the "
        f"{record['bandwidth'] / 1e9:.1f} GB/s of a copy here"
    )

    print(f"\n{'':30}{'batches':>12}{'bare':>8}{'a batch':>9}{'beyond':>8}")
    for row in record["batches"]:
        print(
            f"{row['model']:30}{row['batches']:12}{row['bare']:8.3f}"
            f"{row['bare'] / row['batches']:9.4f}{row['beyond']:8.4f}"
        )

    print(
        f"\n{'held out':30}{'steps x batches':>17}{'call':>10}{'fit':>10}{'error':>9}"
    )
    for row in record["held out"]:
        predicted = call(fitted, row)
        print(
            f"{row['model']:30}{row['steps']:>13} x {row['batches']}{row['call']:10.3f}"
            f"{predicted:10.3f}{100 * (predicted / row['call'] - 1):8.1f}%"
        )

    print(f"\n{'MiB':30}{'weights':>12}{'bare':>8}{'ours':>9}{'more':>8}{'fit':>8}")
    for row in record["memory"]:
        ours, bare = row["ours"] / 2**20, row["bare"] / 2**20
        guess = fitted["bytes"] * row["weights"] / 2**20
        print(
            f"{row['model']:30}{row['weights']:12,}{bare:8.0f}{ours:9.0f}"
            f"{ours - bare:8.0f}{guess:8.0f}"
        )
    print(f"\nmore = {fitted['bytes']:.1f} bytes x weights")

    print(f"\n{'MiB, ' + record['microbatch'][0]['model']:30}")
    for row in record["microbatch"]:
        print(f"{row['case']:42}{row['bytes'] / 2**20:8.0f}")

    print(f"\n{'ranks':30}{'':12}{'bytes a weight':>17}{'fit':>8}{'s a step':>10}")
    sharded = fitted["sharded"]
    for row in record["ranks"]:
        split = row["form"] == "sharded"
        guess = f"{value_of(sharded, 1 / row['ranks']):8.1f}" if split else f"{'':8}"
        name = f"{row['model']}, {row['form']}"
        print(
            f"{name:36}{row['ranks']:6}{row['bytes']:17.1f}{guess}{row['seconds']:10.3f}"
        )
    print(f"\nsharded = {sharded['a']:.1f} + {sharded['b']:.1f} / ranks bytes a weight")
    for size, rate in fitted["exchange"].items():
        print(
            f"whole: {size} ranks average 4 bytes a weight at {rate / 1e9:.2f} GB/s, "
            "sharing the cores"
        )


def call(fitted: Fit, row: Row) -> float:
    """Seconds of a call, from the time of the gradients of one batch."""
    step = row["batches"] * row["gradients"] + value_of(
        fitted["beyond"], row["weights"]
    )
    return value_of(fitted["once"], row["weights"]) + float(row["steps"] * step)


def predict(record: Row, fitted: Fit, given: dict[str, float], name: str) -> list[Row]:
    """Time and memory of scoring a sharded transformer on GPUs, line by line."""
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
    # The weights twice, forward and backward, and their gradients.
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


def show_prediction(rows: Sequence[Row], given: dict[str, float], name: str) -> None:
    wanted = ", ".join(f"{key} {value:g}" for key, value in given.items())
    print(f"\npredicted on {name}: {wanted}\n")
    for row in rows:
        value = f"{row['value']:.4g} {row['unit']}"
        print(f"{row['what']:25}{value:23}{row['origin']}")


def plot(record: Row, fitted: Fit, folder: Path) -> None:
    """Draw time and memory beyond the bare step over weights."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    times, memory = record["times"], record["memory"]
    m = np.geomspace(*(f(row["weights"] for row in times) for f in (min, max)))
    weights = [row["weights"] for row in times]
    left.loglog(weights, [row["bare"] for row in times], "s", label="bare step")
    left.loglog(weights, [row["beyond"] for row in times], "o", label="beyond it")
    left.loglog(m, [value_of(fitted["beyond"], x) for x in m], label="fit")
    left.set(xlabel="prunable weights", ylabel="seconds a step")
    held = [row["weights"] for row in memory]
    right.loglog(held, [row["bare"] for row in memory], "s", label="bare step")
    more = [row["ours"] - row["bare"] for row in memory]
    right.loglog(held, more, "o", label="beyond it")
    right.loglog(m, fitted["bytes"] * m, label="fit")
    right.set(xlabel="prunable weights", ylabel="bytes")
    left.legend()
    right.legend()
    figure.savefig(folder / "scale.png", dpi=150)


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    asked = {"weights": 7e9, "ranks": 8, "batches": 1, "steps": 60, "tokens": 4096}
    defaults = " ".join(f"{key}={value:g}" for key, value in asked.items())
    add = parser.add_argument
    add_files(parser)
    add("--predict", nargs="*", metavar="KEY=VALUE", help=f"default: {defaults}")
    add("--gpu", default="h100", choices=GPUS)
    add("--ranks", type=int, nargs="+", default=[1, 2, 4], help="to measure")
    add("--runs", type=int, default=3, help="of each measurement of time")
    add_threads(parser)
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add_quick(parser)
    args = parser.parse_args()
    if args.predict is not None:
        for pair in args.predict:
            key, _, value = pair.partition("=")
            if key not in asked:
                parser.error(f"--predict: expected {defaults}, got {pair}")
            asked[key] = float(value)
        args.predict = asked
    return args


def main() -> None:
    args = arguments()
    record = begin(args)
    if not args.source:
        record |= measure(args)
    fitted = fit(record)
    show(record, fitted)
    if args.predict is not None:
        rows = predict(record, fitted, args.predict, args.gpu)
        show_prediction(rows, args.predict, args.gpu)
    if args.store:
        write_json(args.store, record | {"fit": fitted})
    if args.plot:
        plot(record, fitted, args.plot)


if __name__ == "__main__":
    main()
