#!/usr/bin/env bash
# Versions: accelerate 1.15.0, safetensors 0.8.0, torch 2.14.1.
# Guess: load_checkpoint_in_model, given the dense checkpoint for a model that is masked already,
#   is an error, as load_state_dict and safetensors.torch.load_model are: weight is not a
#   parameter of such a layer.
# Behaviour: It is no error: strict is False by default. The bias of the checkpoint is loaded, the
#   weight keeps its random values, and a logged line says that some weights of the checkpoint
#   were not used.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
unset PIP_NO_CACHE_DIR # with pip's cache, torch is downloaded once for all scripts
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.14.1 accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6
cat >try.py <<'EOF'
import torch
from accelerate import load_checkpoint_in_model
from safetensors.torch import load_model, save_file
from torch import nn
from torch.nn.utils import prune

torch.manual_seed(0)
dense, masked = nn.Linear(4, 4), nn.Linear(4, 4)
prune.l1_unstructured(masked, "weight", amount=0.5)
before = masked.weight_orig.detach().clone()
save_file(dense.state_dict(), "dense.safetensors")

refused = []
for name, load in (
    ("load_state_dict", lambda: masked.load_state_dict(dense.state_dict())),
    ("safetensors.torch.load_model", lambda: load_model(masked, "dense.safetensors")),
):
    try:
        load()
    except RuntimeError:
        refused.append(name)
print("refused by", refused)

with torch.no_grad():
    masked.bias.zero_()
load_checkpoint_in_model(masked, "dense.safetensors")
bias = torch.equal(masked.bias, dense.bias)
weight = torch.equal(masked.weight_orig, before)
print(f"load_checkpoint_in_model: bias loaded {bias}, weight as it was {weight}")

assert len(refused) == 2
assert bias and weight
EOF
venv/bin/python -W ignore try.py
