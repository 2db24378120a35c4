#!/usr/bin/env bash
# Versions: transformers 5.24.0, torch 2.14.1.
# Guess: Nearly all weights of a transformer are in nn.Linear layers: pruning these prunes the
#   model, and dim=0 of prune.ln_structured takes out output units.
# Behaviour: The layers inside GPT-2 are no nn.Linear but Conv1D, whose weight is stored as inputs
#   x outputs: dim=0 takes out inputs. Mixtral's experts are two tensors of three dimensions in a
#   module that is no nn.Linear either, and so is its router: of the weights in its blocks under a
#   tenth is in nn.Linear.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
unset PIP_NO_CACHE_DIR # with pip's cache, torch is downloaded once for all scripts
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.14.1 transformers==5.24.0
cat >try.py <<'EOF'
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import GPT2Config, GPT2Model, MixtralConfig, MixtralModel

mixtral = MixtralModel(
    MixtralConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
    )
)
gpt2 = GPT2Model(
    GPT2Config(
        vocab_size=100,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=None,
        eos_token_id=None,
    )
)


def share(blocks):
    matrices = sum(p.numel() for p in blocks.parameters() if p.dim() > 1)
    linear = sum(m.weight.numel() for m in blocks.modules() if isinstance(m, nn.Linear))
    print(f"{type(blocks[0]).__name__}: {linear} of {matrices} weights are in nn.Linear")
    return linear / matrices


of_gpt2, of_mixtral = share(gpt2.h), share(mixtral.layers)
experts = mixtral.layers[0].mlp.experts
print("experts:", {name: tuple(p.shape) for name, p in experts.named_parameters()})

layer = gpt2.h[0].mlp.c_fc  # from 64 to 256
prune.ln_structured(layer, "weight", amount=0.5, n=2, dim=0)
with torch.no_grad():
    outputs = (layer(torch.randn(8, 64)) != layer.bias).any(0).sum().item()
inputs = int((layer.weight != 0).any(1).sum())
print(f"dim=0 of {type(layer).__name__}: {inputs} of 64 inputs left, {outputs} of 256 outputs")

assert of_gpt2 == 0
assert 0 < of_mixtral < 0.1
assert all(p.dim() == 3 for p in experts.parameters())
assert (inputs, outputs) == (32, 256)
EOF
venv/bin/python -W ignore try.py
