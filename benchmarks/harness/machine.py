"""Where and with what something was measured."""

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
    """All of it, to be stored beside results."""
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
    """What a stored line says of its origin."""
    names = ("torch", "timm")
    return {name: VERSIONS[name] for name in names} | {"date": str(date.today())}


def in_words(device: str, threads: str | int, *packages: str) -> str:
    """A line for people, with versions of these packages."""
    versions = (f"{name} {VERSIONS[name]}" for name in packages)
    many = f"{threads} threads" if isinstance(threads, int) else threads
    return ", ".join([device, many, platform.machine(), *versions])


def told(record: Mapping[str, Any]) -> str:
    """Two lines about a stored machine."""
    return (
        "{cpu}, {cores} cores, {threads} threads, on {device}\n"
        "Python {python}, torch {torch}, timm {timm}, {date}".format(**record)
    )


def show_machines(rows: Iterable[Mapping[str, Any]]) -> None:
    """Print where, with what and by which commands rows were measured."""
    machines = [row["machine"] for row in rows]
    lines = [told(one) for one in machines] + [one["command"] for one in machines]
    print(*dict.fromkeys(lines), sep="\n")
