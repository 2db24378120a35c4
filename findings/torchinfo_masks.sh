#!/usr/bin/env bash
# Versions: torchinfo 1.8.0, torch 2.14.1.
# Guess: torchinfo counts parameters as they are stored: a mask changes nothing in "Total params"
#   and "Total mult-adds", and neither does prune.remove.
# Behaviour: Weights under a mask of torch.nn.utils.prune are not counted, nor are their
#   multiplications, although the masked model does as many. After prune.remove, with the same
#   zeros, the counts are those of the dense model again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
unset PIP_NO_CACHE_DIR # with pip's cache, torch is downloaded once for all scripts
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.14.1 torchinfo==1.8.0 numpy==2.4.6
cat >try.py <<'EOF'
from torch import nn
from torch.nn.utils import prune
from torchinfo import summary

net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 10))
counts = {}


def count(state):
    found = summary(net, (1, 3, 8, 8), verbose=0)
    counts[state] = found.total_params, found.total_mult_adds
    stored = sum(parameter.numel() for parameter in net.parameters())
    params, operations = counts[state]
    print(f"{state}: {stored} stored, {params} params, {operations} mult-adds")


count("dense")
for layer in (net[0], net[2]):
    prune.l1_unstructured(layer, "weight", amount=0.9)
count("masked")
for layer in (net[0], net[2]):
    prune.remove(layer, "weight")
count("removed")

assert counts["dense"] == counts["removed"] == (3114, 10954)
assert counts["masked"] == (328, 1378)
EOF
venv/bin/python -W ignore try.py
