#!/usr/bin/env bash
# Versions: torch 2.14.1 (torch.nn.utils.prune).
# Guess: With importance_scores, L1Unstructured and global_unstructured keep the weights with the
#   highest scores, as the documentation speaks of the importance of each element.
# Behaviour: The scores are ranked by absolute value: of -5, -1, 0 and 3 the weights with -5 and 3
#   are kept. Signed scores, as those of GraSP, keep the weights that the method would prune
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

scores = torch.tensor([[-5.0, -1.0, 0.0, 3.0]])


def kept(name, scores):
    layer = nn.Linear(4, 1, bias=False)
    if name == "l1_unstructured":
        prune.l1_unstructured(layer, "weight", amount=2, importance_scores=scores)
    else:
        key = (layer, "weight")
        method = prune.L1Unstructured
        prune.global_unstructured([key], method, importance_scores={key: scores}, amount=2)
    values = scores[layer.weight_mask == 1].tolist()
    print(f"{name}, scores {scores.flatten().tolist()}: kept {values}")
    return values


for name in ("l1_unstructured", "global_unstructured"):
    assert kept(name, scores) == [-5, 3]
    assert kept(name, scores - scores.min()) == [5, 8]  # no sign: as guessed
EOF
venv/bin/python -W ignore try.py
