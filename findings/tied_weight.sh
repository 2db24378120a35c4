#!/usr/bin/env bash
# Versions: torch 2.14.1 (torch.nn.utils.prune).
# Guess: An embedding and the head share one weight. Pruning the head masks the shared weight for
#   both owners; or it masks the head alone, and prune.remove, which only makes the mask
#   permanent, changes no output.
# Behaviour: The mask is on the head alone: the embedding goes on with all values. prune.remove
#   then writes the zeros into the shared parameter, so that it changes what the embedding gives
#   out.
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
embedding = nn.Embedding(6, 4)
head = nn.Linear(4, 6, bias=False)
head.weight = embedding.weight
tokens = torch.arange(6)


def zeros():
    of_head = int((head.weight == 0).sum())
    of_embedding = int((embedding(tokens) == 0).sum())
    print(f"zeros of 24: {of_head} in the head, {of_embedding} out of the embedding")
    return of_head, of_embedding


dense = zeros()
prune.l1_unstructured(head, "weight", amount=0.5)
masked = zeros()
prune.remove(head, "weight")
removed = zeros()

assert head.weight is embedding.weight
assert (dense, masked, removed) == ((0, 0), (12, 0), (12, 12))
EOF
venv/bin/python -W ignore try.py
