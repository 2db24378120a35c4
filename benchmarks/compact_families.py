"""Compact a model of every timm family, and check its size and its outputs.

    python benchmarks/compact_families.py             # all, resumes where it stopped
    python benchmarks/compact_families.py --models resnet50 convnext_tiny
    python benchmarks/compact_families.py --table docs/compact-table.md

FORCE prunes the models of ``benchmarks/families.py`` at timm's own initialisation, at
90, 99 and 99.5 % in 10 steps on scikit-learn's digits. Each compacted model is compared
with its pruned model on other images, in float64 and evaluation mode. A second
comparison opens the closed gates, because closed gates hide differences. Then the
compacted model takes a training step, goes through a file, and is compared again. Each
model is a line of JSON in ``--out``. If a model cannot be compacted, its line has the
error, and the model must be unchanged bit for bit.

The whole run takes two hours on one core. Processes can share the run, as with
``families.py``.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
import tempfile
import time
import traceback
import warnings
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from families import add_sweep, families_to_run, loss_fn, prepare
from harness.machine import made_with
from harness.options import parser_of, use_threads
from harness.reports import is_disconnected
from harness.storage import append_line, read_lines
from harness.tables import markdown
from torch import Tensor, nn

from force_plugin import (
    compact,
    compact_report,
    force_prune,
    load_compact,
    save_compact,
)
from force_plugin.files import write_whole
from force_plugin.scoring.gates import CLOSED

HERE = Path(__file__).parent
SPARSITIES = (0.9, 0.99, 0.995)


def opened(model: nn.Module) -> nn.Module:
    """Return a copy with all closed gates of at most one dimension opened."""
    copy = deepcopy(model)
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            closed = parameter.dim() <= 1 and parameter.abs().max() <= CLOSED
            if closed and "bias" not in name:
                parameter.fill_(0.5)
    return copy


def outputs_of(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the outputs of a model in evaluation mode and float64."""
    with torch.no_grad():
        outputs = deepcopy(model).double().eval()(images.double())
    return list(outputs) if isinstance(outputs, tuple | list) else [outputs]


def distance(one: nn.Module, other: nn.Module, images: Tensor) -> float:
    """Return the largest difference of outputs, as a share of the largest output."""
    shares = [0.0]
    for a, b in zip(outputs_of(one, images), outputs_of(other, images), strict=True):
        difference, largest = float((a - b).abs().max()), float(b.abs().max())
        if difference != 0:  # outputs of 1e-20 are common in evaluation mode
            share = difference / largest if largest else float("inf")
            shares.append(share if share >= 0 else float("inf"))  # not a number
    return max(shares)


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(
        torch.equal(value, other[name]) for name, value in state.items()
    )


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Prune and compact one model, and return all measurements."""
    start = time.perf_counter()
    model, loader, size = prepare(name, args)
    result: dict[str, Any] = {
        "image_size": size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "force": {},
    }
    batches = [batch for _, batch in zip(range(10), loader, strict=False)]
    images, targets = batches[-1]
    for sparsity in args.sparsities:
        pruned = deepcopy(model)
        torch.manual_seed(1)
        try:
            report = force_prune(
                pruned,
                batches,
                sparsity,
                steps=10,
                loss_fn=loss_fn,
                on_collapse="warn",
                progress=False,
            )
        except RuntimeError as error:
            result["force"][str(sparsity)] = {"no_mask": str(error)}
            continue
        cut = is_disconnected(report.warnings)
        one: dict[str, Any] = {"disconnected": cut}
        result["force"][str(sparsity)] = one
        before = {name: t.clone() for name, t in pruned.state_dict().items()}
        began = time.perf_counter()
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                small = compact(pruned, images[:1], progress=False)
        except RuntimeError as error:
            one["error"] = str(error)
            if not same(before, pruned.state_dict()):
                raise RuntimeError("compact failed and changed the model") from error
            continue
        one["seconds"] = round(time.perf_counter() - began, 1)
        one["warnings"] = [str(w.message) for w in caught]
        sizes = compact_report(pruned, small, images[:1])
        one |= {
            "channels": sizes.channels,
            "parameters": sizes.parameters,
            "multiplications": sizes.multiplications,
            "distance": distance(small, pruned, images),
            "distance_opened": distance(opened(small), opened(pruned), images),
        }
        if not same(before, pruned.state_dict()):
            raise RuntimeError("compact changed the model")
        optimizer = torch.optim.SGD(small.parameters(), lr=1e-3)
        loss_fn(small.train()(images), targets).backward()
        optimizer.step()
        with tempfile.TemporaryDirectory() as folder:
            save_compact(small, Path(folder) / "small.safetensors")
            loaded = load_compact(deepcopy(model), Path(folder) / "small.safetensors")
        one["distance_loaded"] = distance(loaded, small, images)
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def short(text: str) -> str:
    """Return the reason within an error or a warning of compact."""
    found = re.search(r"(?:taken out|for one\)|trace [^:]*|float64): (.*)", text)
    reason = found[1] if found else text
    return reason.removesuffix(". The model is as it was")[:160]


def table(results: list[dict[str, Any]]) -> str:
    """Return the results in Markdown: a row for each model, and what stays uncut."""
    titles = ["model (family)", "size"]
    for sparsity in SPARSITIES:
        titles += [f"{sparsity:.1%}".replace(".0%", "%"), "outputs"]
    rows, notes = [], []
    for result in sorted(results, key=lambda r: (r["family"], r["model"])):
        name = f"`{result['model']}` ({result['family']})"
        if "error" in result:
            notes.append(f"- {name}: {result['error']}")
            continue
        cells = [name, str(result["image_size"])]
        reasons = []
        for sparsity in SPARSITIES:
            one = result["force"][str(sparsity)]
            if "distance" not in one:
                cells += ["no mask" if "no_mask" in one else "stays", ""]
                reasons.append(short(one.get("no_mask") or one["error"]))
                continue
            before, after = one["multiplications"]
            mark = " ✂" if one["disconnected"] else ""
            off = max(one["distance"], one["distance_opened"], one["distance_loaded"])
            cells += [f"{after / before:.3f}{mark}", f"{off:.0e}"]
            reasons += [short(w) for w in one["warnings"] if "disconnected" not in w]
        rows.append(cells)
        notes += [f"- {name}: {reason}" for reason in dict.fromkeys(reasons)][:1]
    run = max(results, key=lambda r: r["date"])
    lines = [
        *markdown(titles, rows),
        "",
        "Share of the dense model's multiplications after FORCE and compact (✂: the "
        "mask has disconnected the network), and the largest difference of outputs in "
        "float64, as a share of the largest. "
        f"torch {run['torch']}, timm {run['timm']}, "
        f"torch-pruning {run['torch_pruning']}, {run['machine']}, {run['date']}.",
        "",
        "What stays, and why:",
        "",
        *notes,
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = parser_of(__doc__)
    add_sweep(parser, HERE / "compact_families.jsonl")
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    args = parser.parse_args()
    if args.table:
        write_whole(args.table, table(read_lines(args.out)).encode())
        return
    use_threads(args)
    todo = families_to_run(args)
    for number, (name, family) in enumerate(todo.items(), start=1):
        print(f"[{number}/{len(todo)}] {name}", file=sys.stderr, flush=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = run(name, args)
        except Exception as error:  # go on with the other models
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        facts = {
            "model": name,
            "family": family,
            "torch_pruning": version("torch-pruning"),
            "machine": platform.machine(),
            **made_with(),
            **result,
        }
        append_line(args.out, facts)


if __name__ == "__main__":
    main()
