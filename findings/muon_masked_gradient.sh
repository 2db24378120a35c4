#!/usr/bin/env bash
# Versions: torch 2.14.1 (torch.optim).
# Guess: A pruned weight is 0, and its gradient is set to 0 before each step. Without momentum
#   from before and without weight decay no optimizer of torch.optim moves it.
# Behaviour: SGD and AdamW leave it at 0. Muon replaces the matrix of gradients by a nearly
#   orthogonal one, which has no zeros where the gradient had them: after one step the pruned
#   weights have values.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
unset PIP_NO_CACHE_DIR # with pip's cache, torch is downloaded once for all scripts
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.14.1
cat >try.py <<'EOF'
import torch

torch.manual_seed(0)
mask = torch.rand(32, 32) < 0.3
weight = torch.randn(32, 32) * mask
gradient = torch.randn(32, 32) * mask
pruned = int((~mask).sum())
optimizers = {
    "SGD": lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW([p], lr=0.1, weight_decay=0),
    "Muon": lambda p: torch.optim.Muon([p], lr=0.1, weight_decay=0),
}
moved = {}
for name, make in optimizers.items():
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = gradient.clone()
    make(parameter).step()
    moved[name] = int((parameter[~mask] != 0).sum())
    print(f"{name}: {moved[name]} of {pruned} pruned weights are not 0 after one step")

assert moved["SGD"] == moved["AdamW"] == 0
assert moved["Muon"] > 0.9 * pruned
EOF
venv/bin/python -W ignore try.py
