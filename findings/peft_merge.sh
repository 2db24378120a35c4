#!/usr/bin/env bash
# Versions: peft 0.21.2, torch 2.14.1.
# Guess: LoRA on a layer that is masked by torch.nn.utils.prune: merge_and_unload() gives a layer
#   that computes the same as before, the update included; or it is an error.
# Behaviour: The merge adds the update to weight, which is the product of weight_orig and the
#   mask. The next forward pass computes it anew: the update is gone, without a word, and the
#   model is the base model again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
unset PIP_NO_CACHE_DIR # with pip's cache, torch is downloaded once for all scripts
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.14.1 peft==0.21.2
cat >try.py <<'EOF'
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import prune


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x)


def merge(masked):
    torch.manual_seed(0)
    x, net = torch.randn(4, 8), Net()
    if masked:
        prune.l1_unstructured(net.linear, "weight", amount=0.5)
    with torch.no_grad():
        base = net(x)
        tuned = get_peft_model(net, LoraConfig(r=2, target_modules=["linear"]))
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_()  # in place of training
        before = tuned(x)
        after = tuned.merge_and_unload()(x)
    effect = (before - base).abs().max().item()
    left = (after - base).abs().max().item()
    print(f"masked {masked}: effect of LoRA {effect:.3f}, after merging {left:.3f}")
    return effect, left


effect, left = merge(False)
assert effect > 0.1 and abs(effect - left) < 1e-4
effect, left = merge(True)
assert effect > 0.1 and left == 0
EOF
venv/bin/python -W ignore try.py
