"""Write and print the results of ``force-prune``."""

from __future__ import annotations

import csv
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from force_plugin.files import write_whole
from force_plugin.hold import save_pruned
from force_plugin.masks.apply import get_masks
from force_plugin.masks.files import save_masks
from force_plugin.methods.registry import METHODS
from force_plugin.report.sparsity import SparsityReport


def write_results(
    model: nn.Module, report: SparsityReport, out: Path, options: dict[str, Any]
) -> None:
    """Write masks, weights and reports into a folder."""
    # Paths and devices are written as text.
    options = json.loads(json.dumps(options, default=str))
    save_masks(get_masks(model), out / "masks.safetensors", made_by(options))
    save_pruned(model, out / "pruned.safetensors")
    _write_csv(report, out / "report.csv")
    report.plot(out / "sparsity.png")
    _write_json(report, out / "report.json", options)  # last: all files exist


def print_results(report: SparsityReport, out: Path, quiet: bool) -> None:
    """Print a report and the names of its files, or only warnings if ``quiet``."""
    if quiet:
        for warning in report.warnings:
            print(f"force-prune: warning: {warning}", file=sys.stderr)
        return
    print(report)
    print(
        f"\nwritten to {out}:\n"
        "  masks.safetensors  a bit for each weight, 1 = kept, and what made them\n"
        "  pruned.safetensors the initial weights, 0 where pruned, to train from\n"
        "  report.json        the options of this run and the table above\n"
        "  report.csv         the table above, a row a layer\n"
        "  sparsity.png       the share of weights kept in each layer"
    )


def make_writable(out: Path) -> None:
    """Make a folder and check that a file can be written in it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Permissions are not enough: read-only mounts, full quotas, the root user.
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OSError(
            f"argument --out: expected a folder to write to, got {str(out)!r}: "
            f"{error.strerror}"
        ) from error


def made_by(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that decide the masks, with the actual steps and schedule."""
    method = METHODS[options["method"]]
    used = {
        "steps": method.steps or options["steps"],
        "schedule": method.schedule or options["schedule"],
    }
    other = {"download", "workers", "out", "quiet"}
    return {key: used.get(key, options[key]) for key in options if key not in other}


def _write_json(report: SparsityReport, path: Path, options: dict[str, Any]) -> None:
    text = json.dumps({"options": options, **report.to_dict()}, indent=2)
    write_whole(path, f"{text}\n".encode())


def _write_csv(report: SparsityReport, path: Path) -> None:
    layers = report.to_dict()["layers"]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(layers[0]))
    writer.writeheader()
    for layer in layers:
        writer.writerow({**layer, "shape": "x".join(map(str, layer["shape"]))})
    write_whole(path, text.getvalue().encode())
