"""Real processes, for the tests that need several ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from interpreter import ranks

Seen = list[dict[str, Any]]
HERE = Path(__file__).parent


def launch(worker: str, folder: Path, seconds: float = 120) -> Seen:
    """What two ranks that run a script have seen."""
    for done in ranks(HERE / worker, folder, seconds=seconds):
        assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def take_part(run: Callable[[int], dict[str, Any]]) -> None:
    """What a worker does: join the ranks, and leave what it has seen in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    torch.save(run(rank), Path(sys.argv[1]) / f"{rank}.pt")
    dist.barrier()  # nobody leaves while others still exchange something
    dist.destroy_process_group()
