#!/usr/bin/env bash
# Versions: torch 2.14.1 (torch.jit.script, torch.nn.utils.prune).
# Guess: scripted[0] of a scripted nn.Sequential is the scripted layer: a mask on it either is an
#   error or takes part in the forward pass.
# Behaviour: scripted[0] is the nn.Linear that was scripted, in Python, while the attribute "0" is
#   the scripted layer. A mask on scripted[0] is put there without an error, and outputs of the
#   scripted model do not change.
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
net = nn.Sequential(nn.Linear(4, 4))
scripted = torch.jit.script(net)
x = torch.ones(1, 4)
before = scripted(x)
indexed, attribute = scripted[0], getattr(scripted, "0")
print(f"scripted[0] is {type(indexed).__name__}, the attribute is {type(attribute).__name__}")

prune.l1_unstructured(indexed, "weight", amount=0.75)
unchanged = torch.equal(scripted(x), before)
print(f"after pruning scripted[0]: outputs of the scripted model unchanged {unchanged}")

assert indexed is net[0]
assert isinstance(attribute, torch.jit.ScriptModule)
assert unchanged
assert not torch.equal(net(x), before)
EOF
venv/bin/python -W ignore try.py
