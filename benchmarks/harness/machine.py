"""Describe the machine and the versions of a measurement."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

VERSIONS = {
    "torch": torch.__version__,
    "timm": timm.__version__,
    "numpy": np.__version__,
}


def machine(device: str) -> dict[str, Any]:
    """Return machine, versions, date and command, to store beside results."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = (s.split(":")[1].strip() for s in lines if s.startswith("model name"))
    return {
        "cpu": next(names, platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "python": platform.python_version(),
        **VERSIONS,
        "date": str(date.today()),
        "command": shlex.join(["python", *sys.argv]),
    }


def made_with() -> dict[str, str]:
    """Return the versions and the date for a stored line."""
    names = ("torch", "timm")
    return {name: VERSIONS[name] for name in names} | {"date": str(date.today())}


def in_words(device: str, threads: str | int, *packages: str) -> str:
    """Return a readable line on the machine, with the versions of packages."""
    versions = (f"{name} {VERSIONS[name]}" for name in packages)
    many = f"{threads} threads" if isinstance(threads, int) else threads
    return ", ".join([device, many, platform.machine(), *versions])


def told(record: Mapping[str, Any]) -> str:
    """Return two lines about a stored machine."""
    return (
        "{cpu}, {cores} cores, {threads} threads, on {device}\n"
        "Python {python}, torch {torch}, timm {timm}, {date}".format(**record)
    )


def show_machines(rows: Iterable[Mapping[str, Any]]) -> None:
    """Print the machines and commands with which rows were measured."""
    machines = [row["machine"] for row in rows]
    lines = [told(one) for one in machines] + [one["command"] for one in machines]
    print(*dict.fromkeys(lines), sep="\n")
