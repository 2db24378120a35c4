#!/usr/bin/env bash
# Versions: torch 2.14.1 (torch.nn.utils.prune, torch.nn.MultiheadAttention).
# Guess: out_proj of an attention is an nn.Linear, and can be masked as any nn.Linear: its forward
#   pass uses what weight_orig and weight_mask are now.
# Behaviour: The attention reads out_proj.weight and never calls out_proj, so that the hook of the
#   mask never runs. The weight stays what it was when it was pruned: loading other values changes
#   no output, and the second backward pass is an error, as it goes through the graph of the
#   first.
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
x = torch.randn(1, 3, 4)


def change(owner, linear, call):
    """By how much do outputs change with five times the weights in the state dict?"""
    prune.l1_unstructured(linear, "weight", amount=0.5)
    with torch.no_grad():
        before = call()
        state = {key: value.clone() for key, value in owner.state_dict().items()}
        for key in state:
            if key.endswith("weight_orig"):
                state[key] *= 5
        owner.load_state_dict(state)
        return (call() - before).abs().max().item()


linear = nn.Linear(4, 4)
attention = nn.MultiheadAttention(4, 2, batch_first=True)
assert isinstance(attention.out_proj, nn.Linear)
alone = change(linear, linear, lambda: linear(x))
inside = change(attention, attention.out_proj, lambda: attention(x, x, x)[0])
print(f"outputs after loading other weights: Linear {alone:.3f}, out_proj {inside:.3f}")

attention = nn.MultiheadAttention(4, 2, batch_first=True)
prune.l1_unstructured(attention.out_proj, "weight", amount=0.5)
attention(x, x, x)[0].sum().backward()
second = ""
try:
    attention(x, x, x)[0].sum().backward()
except RuntimeError as error:
    second = str(error)
print(f"second backward pass: {second[:60]}")

assert alone > 0.01
assert inside == 0
assert "backward through the graph a second time" in second
EOF
venv/bin/python -W ignore try.py
