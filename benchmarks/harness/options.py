"""Options that several commands have."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from harness.machine import machine, told


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the text at the head of a script."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add ``--threads``, for :func:`use_threads`."""
    told = "of PyTorch (default: its own)"
    parser.add_argument("--threads", type=int, metavar="N", help=told)


def use_threads(args: argparse.Namespace) -> None:
    """Give PyTorch as many threads as were asked for."""
    if args.threads:
        torch.set_num_threads(args.threads)


def add_quick(parser: argparse.ArgumentParser) -> None:
    """Add ``--quick``."""
    told = "small models: does it run?"
    parser.add_argument("--quick", action="store_true", help=told)


def add_files(
    parser: argparse.ArgumentParser, store: Path | None = None, draws: bool = True
) -> None:
    """Add where results are stored, read from and, if they are, drawn.

    Args:
        parser: Of a command.
        store: Where they are stored unless another file is given.
        draws: Whether there is something to draw.
    """
    add = parser.add_argument
    add("--store", type=Path, metavar="FILE", default=store, help="JSON file to write")
    add("--from", dest="source", type=Path, metavar="FILE", help="measure nothing")
    if draws:
        add("--plot", type=Path, metavar="DIR", help="draw it into this folder")


def begin(args: argparse.Namespace) -> dict[str, Any]:
    """What is stored in a file, or where and with what it is to be measured."""
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
