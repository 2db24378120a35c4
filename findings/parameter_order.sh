#!/usr/bin/env bash
# Versions: torch 2.14.1 (torch.nn.utils.prune).
# Guess: After prune.remove a model has the parameters of the dense model again, in the same
#   order, so that a flat vector of all parameters can be moved from one to the other.
# Behaviour: prune.remove registers the parameter anew, after the bias. Between models of the same
#   architecture, vector_to_parameters then puts weights into biases and biases into weights,
#   without an error as the total fits.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
unset PIP_NO_CACHE_DIR # with pip's cache, torch is downloaded once for all scripts
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.14.1
cat >try.py <<'EOF'
import copy

import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
twin = copy.deepcopy(net)
never_pruned = [name for name, _ in twin.named_parameters()]

prune.l1_unstructured(net[0], "weight", amount=3)
prune.remove(net[0], "weight")
removed = [name for name, _ in net.named_parameters()]
print("never pruned:  ", never_pruned)
print("after remove():", removed)

vector_to_parameters(parameters_to_vector(net.parameters()), twin.parameters())
x = torch.randn(4, 3)
difference = (net(x) - twin(x)).abs().max().item()
print(f"after copying the vector, outputs differ by {difference:.3f}")
twin.load_state_dict(net.state_dict())  # by name: as it should be
assert torch.equal(net(x), twin(x))

assert never_pruned == ["0.weight", "0.bias", "1.weight", "1.bias"]
assert removed == ["0.bias", "0.weight", "1.weight", "1.bias"]
assert difference > 0.01
EOF
venv/bin/python -W ignore try.py
