"""Check that common uses of a model still work when the model is pruned.

    python benchmarks/works_with.py                              # print the table
    python benchmarks/works_with.py --table docs/works-with-table.md

Each row runs with four forms of a model: dense, pruned by plain
``torch.nn.utils.prune``, after ``force_prune``, and after ``make_permanent``. A row
works if three conditions hold. Nothing is raised. Every loss equals the loss of a dense
model whose weights are multiplied by the masks by hand (``atol`` below). Pruned weights
are 0 whenever they are used.

Rows that need several processes have two, with half of the batch each. A row of a
package that is not installed says so.
"""

from __future__ import annotations

import json
import logging
import platform
import sys
import tempfile
import textwrap
import warnings
from contextlib import redirect_stdout
from datetime import date, timedelta
from io import StringIO
from pathlib import Path

import timm
import timm.layers
import torch
import torch.distributed as dist
from harness.options import parser_of
from torch.multiprocessing.spawn import spawn
from works_with_rows import (
    cases,
    copies,
    further,
    optimizers,
    passes,
    processes,
    trainers,
    training,
)
from works_with_rows.cases import (
    NAME,
    ON_TWO_RANKS,
    Batch,
    Case,
    Masks,
    Row,
    first_batch,
    forms,
    masks_by_force,
    of_all_ranks,
)

from force_plugin.files import write_whole

# Sections in the order of the table.
SECTIONS = (optimizers, copies, passes, training, further, processes, trainers)
ROWS = {
    label: function
    for section in SECTIONS
    for label, function in cases.ROWS.items()
    if function.__module__ == section.__name__
}


def outcome(function: Row, case: Case) -> str:
    """Return ``works``, ``not installed``, or the error in one line."""
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            function(case)
    except ModuleNotFoundError:
        return "not installed"
    except Exception as error:
        said = f"{type(error).__name__}: {error}".replace("`", "")
        return textwrap.shorten(said, 200)
    return "works"


def outcomes(function: Row, masks: Masks, batch: Batch) -> list[str]:
    """Return the outcome of a row for each form of the model."""
    if function.__name__ not in ON_TWO_RANKS or dist.is_initialized():
        return [outcome(function, case) for case in forms(masks, batch).values()]
    with tempfile.TemporaryDirectory() as folder:
        arguments = (function, masks, batch, Path(folder))
        spawn(run_rank, arguments, nprocs=2)
        told: list[str] = json.loads(Path(folder, "outcomes").read_text())
        return told


def run_rank(
    rank: int, function: Row, masks: Masks, batch: Batch, folder: Path
) -> None:
    """Run a row in one of two processes; the first writes the outcomes to a file."""
    prepare()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    of_ranks = of_all_ranks(outcomes(function, masks, batch))
    pairs = zip(*of_ranks, strict=True)
    cells = [first if first != "works" else second for first, second in pairs]
    if rank == 0:
        Path(folder, "outcomes").write_text(json.dumps(cells))
    dist.destroy_process_group()


def prepare() -> None:
    # Some optimizers need a second derivative, which fused kernels do not have.
    timm.layers.set_fused_attn(False)
    # Trainers would log the hardware that they find.
    logging.disable(logging.WARNING)


def in_markdown(kinds: list[str], results: dict[str, list[str]]) -> str:
    errors: list[str] = []
    lines = [f"| | {' | '.join(kinds)} |", f"|---|{'---|' * len(kinds)}"]
    for label, cells in results.items():
        known = ("works", "not installed", *errors)
        errors += [cell for cell in dict.fromkeys(cells) if cell not in known]
        shown = [f"breaks ({errors.index(c) + 1})" if c in errors else c for c in cells]
        lines.append(f"| {label} | {' | '.join(shown)} |")
    works = [str(cells.count("works")) for cells in zip(*results.values(), strict=True)]
    lines += [f"| **of {len(results)}, work** | {' | '.join(works)} |", ""]
    lines += [f"{number}. {error}" for number, error in enumerate(errors, start=1)]
    lines += [
        "",
        f"timm's `{NAME}`, FORCE at 80 %. torch {torch.__version__}, timm "
        f"{timm.__version__}, {platform.machine()}, {date.today()}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__)
    names = [function.__name__ for function in ROWS.values()]
    parser.add_argument(
        "--rows", nargs="+", choices=names, metavar="NAME", help="only these functions"
    )
    parser.add_argument("--table", type=Path, help="also write the table, in Markdown")
    args = parser.parse_args()

    prepare()
    masks, batch = masks_by_force(), first_batch()
    results = {}
    for label, function in ROWS.items():
        if args.rows is None or function.__name__ in args.rows:
            print(f"{function.__name__:24}", end="", flush=True, file=sys.stderr)
            results[label] = outcomes(function, masks, batch)
            print(*(f"{cell[:13]:14}" for cell in results[label]), file=sys.stderr)
    table = in_markdown(list(forms(masks, batch)), results)
    print(table)
    if args.table:
        write_whole(args.table, table.encode())


if __name__ == "__main__":
    main()
