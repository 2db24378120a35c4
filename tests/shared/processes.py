"""Real processes under torchrun, for the tests that need several ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

Seen = list[dict[str, Any]]
HERE = Path(__file__).parent


def launch(worker: str, folder: Path, seconds: float = 120) -> Seen:
    """What two ranks that run a script have seen."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(HERE / worker), str(folder)]
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        # The ranks are children of torchrun.
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"{worker} took more than {seconds} s\n{output[-4000:]}")
    assert process.returncode == 0, output[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def take_part(run: Callable[[int], dict[str, Any]]) -> None:
    """What a worker does: join the ranks, and leave what it has seen in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    torch.save(run(rank), Path(sys.argv[1]) / f"{rank}.pt")
    dist.barrier()  # nobody leaves while others still exchange something
    dist.destroy_process_group()
