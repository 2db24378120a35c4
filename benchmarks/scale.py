"""Measure and predict time and memory of scoring by weights, batches, steps and ranks.

    python benchmarks/scale.py --store scale.json       # ten minutes on two cores
    python benchmarks/scale.py --from scale.json --plot docs        # measures nothing
    python benchmarks/scale.py --from scale.json --predict weights=7e9 --gpu h100

FORCE prunes networks of 1e6 to 3e8 weights with small inputs, so that the work beyond
the gradients shows. Two formulas are fitted:

    seconds = once(m) + steps x (batches x gradients + beyond(m))
    bytes   = bytes of a bare step + c x m

Here, m is the number of prunable weights. ``gradients`` is the time of a bare forward
and backward pass of a batch. ``once`` and ``beyond`` have the form a + b x m. The fit
is then compared with networks, steps and batches that were not fitted. Over ranks
(gloo, on the CPU), whole and sharded networks are measured as in sharded_memory.py.

``--predict`` computes time and memory for a transformer that is sharded over GPUs. It
takes weights= and ranks=, batches= and steps= of each rank, and tokens= that pass at
once. The prediction uses assumed numbers; each is printed and marked.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import partial

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
from scale_model import GPUS, Row, fit, predict
from scale_tables import plot, show, show_prediction

SIZE = 32  # height and width of the images: five tokens of a ViT


def tell(what: str) -> None:
    print(f"measuring {what}", file=sys.stderr, flush=True)


def measure_time(
    name: str, samples: int, steps: int, batches: int, args: argparse.Namespace
) -> Row:
    """Return the seconds of a call and of its parts, medians over runs."""
    tell(f"{name}, {steps} steps of {batches}")
    dense = make_model(name, SIZE, args.device)
    batch = make_batch(samples, SIZE, args.device)
    take_turns(dense, batch, 2, batches=batches)  # warm-up
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
    """Return peaks in bytes, minus the memory of a process before it has a model."""
    tell(f"{name}, memory")
    with torch.device("meta"):
        weights = prunable(make_model(name, SIZE, "meta"))
    case = (name, SIZE, samples, 1, args.device)
    sides = {"ours": "force", "bare": ""}
    peaks = {side: fresh(peak_of, method, *case) for side, method in sides.items()}
    return {"model": name, "weights": weights, **peaks}


def measure_microbatch(args: argparse.Namespace) -> list[Row]:
    """Return peaks in bytes of whole batches, and of a large batch in microbatches."""
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
    """Return bytes per weight and seconds per step of a rank, whole and sharded."""
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
    """Return bytes per second, read and written, of copies too large for a cache."""
    source = torch.zeros(1 << 26, device=device)
    target = torch.ones_like(source)
    times = [seconds(partial(target.copy_, source)) for _ in range(7)]
    return 2 * source.nbytes / statistics.median(times)


def measure(args: argparse.Namespace) -> Row:
    """Return all measurements for the fit, and others to compare the fit with."""
    # Networks, and the number of samples in a batch.
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
    # The process's children return freed memory to the system at once.
    record["ranks"] = fresh(measure_ranks, rank_model, image, args.ranks)
    return record


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
