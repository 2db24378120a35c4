#!/usr/bin/env bash
# Versions: torch 2.14.1 (torch.distributed.algorithms._checkpoint).
# Guess: For a model with checkpoint_wrapper around its blocks, names in named_parameters() and
#   keys of state_dict() are the same, as for other modules: masks by one fit the other.
# Behaviour: named_parameters() and named_modules() have "_checkpoint_wrapped_module." in the
#   name; state_dict() takes it out. No name of a wrapped parameter is a key of the state dict.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
unset PIP_NO_CACHE_DIR # with pip's cache, torch is downloaded once for all scripts
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.14.1
cat >try.py <<'EOF'
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

net = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2, bias=False)), nn.Linear(2, 2, bias=False))
names = [name for name, _ in net.named_parameters()]
keys = list(net.state_dict())
print("named_parameters:", names)
print("state_dict:      ", keys)
net.load_state_dict(net.state_dict())

assert names == ["0._checkpoint_wrapped_module.weight", "1.weight"]
assert keys == ["0.weight", "1.weight"]
EOF
venv/bin/python -W ignore try.py
