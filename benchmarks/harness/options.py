"""Options that several commands share."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from harness.machine import machine, told


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help text is a script's docstring."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add ``--threads``, for :func:`use_threads`."""
    told = "of PyTorch (default: its own)"
    parser.add_argument("--threads", type=int, metavar="N", help=told)


def use_threads(args: argparse.Namespace) -> None:
    """Set the number of PyTorch's threads, if ``--threads`` is given."""
    if args.threads:
        torch.set_num_threads(args.threads)


def add_quick(parser: argparse.ArgumentParser) -> None:
    """Add ``--quick``."""
    told = "small models: does it run?"
    parser.add_argument("--quick", action="store_true", help=told)


def add_files(
    parser: argparse.ArgumentParser, store: Path | None = None, draws: bool = True
) -> None:
    """Add ``--store``, ``--from`` and, if the command draws, ``--plot``.

    Args:
        parser: The parser of a command.
        store: Default file to store results in.
        draws: Whether the command can draw its results.
    """
    add = parser.add_argument
    add("--store", type=Path, metavar="FILE", default=store, help="JSON file to write")
    add("--from", dest="source", type=Path, metavar="FILE", help="measure nothing")
    if draws:
        add("--plot", type=Path, metavar="DIR", help="draw it into this folder")


def begin(args: argparse.Namespace) -> dict[str, Any]:
    """Return the stored record of ``--from``, or a new record of this machine."""
    warnings.simplefilter("ignore")
    use_threads(args)
    if args.source:
        record: dict[str, Any] = json.loads(args.source.read_text("utf-8"))
    else:
        record = machine(args.device) | {"quick": args.quick}
    print(told(record))
    commands = record.get("sections", {}).values() or [record["command"]]
    print(*dict.fromkeys(commands), sep="\n")
    return record
