"""Measure the cost of scoring over the gradients that scoring needs.

    python benchmarks/cost.py                              # about an hour on two cores
    python benchmarks/cost.py --only step memory --store cost.json
    python benchmarks/cost.py --compare cost.json          # exit status 1: it got worse
    python benchmarks/cost.py --from cost.json --plot docs # measures nothing
    python benchmarks/cost.py --only step --noise 1 --store noisy.json

A line compares a pair. "Ours" is a whole ``force_prune``; "bare" is the forward and
backward passes alone. Both take turns in one process. Within a long call, the loader
stops our clock, takes an equal number of bare steps, and continues. A ratio is the
ratio of medians; its spread comes from the pairs. The sections, chosen with ``--only``:

step       ResNet-50 at 32x32, batch 128, as in the FORCE paper's CIFAR experiments
large      224x224, ten batches a step
synflow    over the passes of a positive float64 network that was converted once
steady     SteadyFORCE over FORCE
grasp      over one bare step of an equal number of samples
guard      memory of FORCE with and without the guard, and of SteadyFORCE
memory     peak over a bare step's peak, in new processes, in bytes a prunable weight
selection  the k largest scores over the fastest of three others; about 10 GB at 1e9
below      options that make a step cheaper than bare, and their cost in exactness
authors    the authors' code; needs --force-repo and --grasp-repo
profile    milliseconds of each part of a step

``--store`` keeps the file's rows of other sections, if measured on the same machine.

Some work is done once in a call: stand-ins, the search for gates, the last look at the
mask, and pruning the model. In sections with few steps, this work counts as in a call
of 60 steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from cost_sections import (
    authors,
    below,
    grasp,
    guard,
    large,
    memory,
    profile,
    selection,
    steady,
    step,
    synflow,
)
from cost_sections.printing import show
from cost_sections.rows import Row, identity, is_worse
from harness.options import add_files, add_quick, add_threads, begin, parser_of
from harness.storage import write_json

SECTIONS: dict[str, ModuleType] = {
    "step": step,
    "large": large,
    "synflow": synflow,
    "grasp": grasp,
    "steady": steady,
    "guard": guard,
    "memory": memory,
    "selection": selection,
    "below": below,
    "authors": authors,
    "profile": profile,
}


@contextmanager
def noise(processes: int) -> Iterator[None]:
    """Run busy processes beside the measurement."""
    busy = [sys.executable, "-c", "while True: pass"]
    started = [subprocess.Popen(busy) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help="default: all")
    add_files(parser)
    add("--compare", type=Path, metavar="FILE", help="exit with 1 if any got worse")
    add("--noise", type=int, default=0, metavar="N", help="busy processes beside it")
    add("--runs", type=int, metavar="N", help="of each pair (default: 3 or 5)")
    add_threads(parser)
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add(
        "--sizes",
        type=float,
        nargs="+",
        default=[1e6, 1e7, 1e8, 1e9],
        help="of selection",
    )
    options = below.OPTIONS
    add("--options", nargs="+", choices=options, metavar="OPTION", help="of below")
    add("--force-repo", type=Path, metavar="PATH", help="a clone of naver/force")
    add("--grasp-repo", type=Path, metavar="PATH", help="a clone of alecwangcq/GraSP")
    add_quick(parser)
    args = parser.parse_args()
    if args.quick:
        args.runs = args.runs or 1
    # Compilation takes a minute.
    quick = [option for option in options if option != "compile"]
    args.options = args.options or (quick if args.quick else list(options))
    repos = args.force_repo or args.grasp_repo or args.source
    if args.only is None:
        args.only = [name for name in SECTIONS if repos or name != "authors"]
    elif "authors" in args.only and not repos:
        parser.error("--only authors: pass --force-repo, --grasp-repo or both")
    return args


def keep_others(args: argparse.Namespace, record: Row) -> list[Row]:
    """Return a file's rows of other sections, if measured on the same machine."""
    if args.source or not args.store or not args.store.exists():
        return []
    earlier = json.loads(args.store.read_text("utf-8"))
    kept = [row for row in earlier["rows"] if row["section"] not in args.only]
    differing = [
        f"{key}: {earlier.get(key)!r}, now {value!r}"
        for key, value in record.items()
        if key not in ("date", "command") and earlier.get(key) != value
    ]
    if kept and differing:
        raise SystemExit(
            f"--store {args.store}: expected a new file, or one that was measured "
            f"under the same conditions, got {'; '.join(differing)}"
        )
    record["sections"] = {
        section: told
        for section, told in earlier["sections"].items()
        if section not in args.only
    }
    return kept


def main() -> None:
    args = arguments()
    record = begin(args)
    stored: dict[Any, Row] = {}
    if args.compare:
        rows = json.loads(args.compare.read_text("utf-8"))["rows"]
        stored = {identity(row): row for row in rows if row.get("ratio")}
    record.setdefault("noise", args.noise)
    if record["noise"]:
        print(f"busy processes beside it: {record['noise']}")
    others = keep_others(args, record)
    told = record.setdefault("sections", {})
    done: list[Row] = []
    with ExitStack() as stack:
        if not args.source:
            stack.enter_context(noise(args.noise))
        for section in args.only:
            if args.source:
                rows = [row for row in record["rows"] if row["section"] == section]
            else:
                rows = SECTIONS[section].measure(args)
                told[section] = f"{record['date']}: {record['command']}"
            done += show(rows, stored, getattr(SECTIONS[section], "show", None))
            if args.store:  # the next section may be interrupted
                write_json(args.store, record | {"rows": others + done})
    if args.plot:
        from cost_sections.plots import plot

        plot(done, args.plot)
    worse = [
        row
        for row in done
        if identity(row) in stored and is_worse(row, stored[identity(row)])
    ]
    if args.compare:
        print(f"\n{len(worse)} of {len(done)} worse than in {args.compare}")
    raise SystemExit(1 if worse else 0)


if __name__ == "__main__":
    main()
