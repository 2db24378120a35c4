"""Measure the k largest scores over the fastest of three other methods."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator

import selection

from cost_sections.rows import Row, make_row


def measure(args: argparse.Namespace) -> Iterator[Row]:
    sizes = [100_000] if args.quick else [int(size) for size in args.sizes]
    kinds = ["normal"] if args.quick else list(selection.INPUTS)
    shares = ["1 %"] if args.quick else list(selection.SHARES)
    for row in selection.rows(sizes, kinds, shares, args.runs or 3, args.device):
        times = row["times"]
        ours = times.pop("ours")
        fastest = min(times, key=lambda name: statistics.median(times[name]))
        yield make_row(
            "selection",
            f"{row['size']:,} scores, the fastest of {', '.join(times)}",
            f"{row['scores']}, {row['asked']}",
            "ms",
            list(zip(ours, times[fastest], strict=True)),
            1.10,
            size=row["size"],
            medians={name: statistics.median(times[name]) for name in times},
        )
