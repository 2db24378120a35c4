#!/usr/bin/env bash
# Versions: torch 2.14.1 (torch.nn.utils.prune).
# Guess: reset_parameters() of a masked layer, or torch.nn.init on its weight, draws new values
#   under the same mask.
# Behaviour: Both write into the product that the hook computed last; weight_orig is untouched,
#   and the next forward pass brings the old values back. Only the bias, which has no mask, is
#   new. There is no error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
unset PIP_NO_CACHE_DIR # with pip's cache, torch is downloaded once for all scripts
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.14.1
cat >try.py <<'EOF'
import torch
from torch import nn
from torch.nn.utils import prune

torch.manual_seed(0)
layer = nn.Linear(4, 4)
prune.l1_unstructured(layer, "weight", amount=0.5)
x = torch.ones(1, 4)
layer(x)
weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()

layer.reset_parameters()
written = not torch.equal(layer.weight, weight)
layer(x)
back = torch.equal(layer.weight, weight)
new_bias = not torch.equal(layer.bias, bias)
print(f"reset_parameters: weight is new {written}, old again after a forward pass {back}")
print(f"reset_parameters: bias is new {new_bias}")

nn.init.ones_(layer.weight)
layer(x)
ignored = torch.equal(layer.weight, weight)
print(f"nn.init.ones_: old again after a forward pass {ignored}")

assert written and back and new_bias and ignored
EOF
venv/bin/python -W ignore try.py
