#!/usr/bin/env bash
# Versions: torch 2.14.1 (DistributedDataParallel, torch.nn.utils.prune), two processes on a CPU.
# Guess: DistributedDataParallel broadcasts buffers before each forward pass, and masks are
#   buffers: if ranks draw different masks, all have those of rank 0 after the first step.
# Behaviour: Only buffers that exist when the model is wrapped are broadcast. With masks that are
#   made afterwards each rank keeps its own, and trains another network; the parameters stay
#   equal, as their gradients are averaged.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
unset PIP_NO_CACHE_DIR # with pip's cache, torch is downloaded once for all scripts
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.14.1 numpy==2.4.6
cat >try.py <<'EOF'
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune


def everywhere(tensor):
    values = [None, None]
    dist.all_gather_object(values, tensor.tolist())
    return values[0] == values[1]


def train(rank, when):
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    torch.manual_seed(rank + 1)  # other masks on each rank
    if when == "before":
        prune.random_unstructured(layer, "weight", amount=0.5)
    model = DistributedDataParallel(layer, broadcast_buffers=True)
    if when == "after":
        prune.random_unstructured(layer, "weight", amount=0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    masks, weights = everywhere(layer.weight_mask), everywhere(layer.weight_orig)
    if rank == 0:
        print(f"pruned {when} wrapping: masks equal {masks}, parameters equal {weights}")
    return masks, weights


def main(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    assert train(rank, "before") == (True, True)
    assert train(rank, "after") == (False, True)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(main, (os.path.abspath("meeting"),), nprocs=2)
EOF
venv/bin/python -W ignore try.py
