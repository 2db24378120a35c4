"""Measure the authors' code beside ours."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import authors

from cost_sections.rows import Row


def measure(args: argparse.Namespace) -> Iterator[Row]:
    name, samples, steps = ("resnet18", 20, 3) if args.quick else ("resnet50", 128, 20)
    rows = authors.compare(
        args.force_repo,
        args.grasp_repo,
        model=name,
        size=32,
        batch_size=samples,
        steps=steps,
        runs=args.runs or 3,
        threads=args.threads,
    )
    setting = f"{name} 32x32, batch {samples}, {steps} steps"
    for row in rows:
        base = row["seconds"]["bare"]["median"]
        ratio = {key: time / base for key, time in row["seconds"]["ours"].items()}
        case = {"section": "authors", "setting": setting, "case": row["method"]}
        yield case | {"ratio": ratio, "measured": row}


def show(rows: Sequence[Row]) -> None:
    print(f"\nauthors: {rows[0]['setting']}\n")
    print(authors.table([row["measured"] for row in rows]))
