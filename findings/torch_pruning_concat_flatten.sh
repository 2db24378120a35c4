#!/usr/bin/env bash
# Versions: torch-pruning 1.6.1, torch 2.14.1.
# Guess: Two convolutions of 16 channels are concatenated, flattened at 4 x 4 and read by a linear
#   layer. Taking channel 0 out of the second one leaves the first alone and takes columns 256 to
#   271 out of the linear layer.
# Behaviour: The group of the second convolution contains the first one too: channel 0 of both
#   goes, and the linear layer loses columns 0 to 15 only. It then expects 496 features and gets
#   480. With global pooling before the flattening (1 x 1), all is as guessed. The 512 features of
#   the last reader are not the 32 channels of the inputs, which is taken for a concatenation
#   along another dimension, so that no offsets are set.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
unset PIP_NO_CACHE_DIR # with pip's cache, torch is downloaded once for all scripts
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.14.1 torch-pruning==1.6.1
cat >try.py <<'EOF'
import torch
import torch_pruning
from torch import nn


class Net(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 1)
        self.second = nn.Conv2d(3, 16, 1)
        self.pool = nn.AdaptiveAvgPool2d(size)
        self.linear = nn.Linear(32 * size * size, 10)

    def forward(self, x):
        both = torch.cat([self.first(x), self.second(x)], 1)
        return self.linear(self.pool(both).flatten(1))


def prune(size):
    net = Net(size)
    columns = net.linear.in_features
    with torch.no_grad():  # each column has its number as its value
        net.linear.weight.copy_(torch.arange(float(columns)).expand(10, columns))
    graph = torch_pruning.DependencyGraph().build_dependency(net, torch.randn(2, 3, 4, 4))
    graph.get_pruning_group(net.second, torch_pruning.prune_conv_out_channels, [0]).prune()
    left = {int(value) for value in net.linear.weight[0]}
    gone = sorted(set(range(columns)) - left)
    given = (net.first.out_channels + net.second.out_channels) * size * size
    channels = net.first.out_channels, net.second.out_channels
    read = net.linear.in_features
    print(f"{size} x {size}: {channels} channels, {given} features for {read} columns")
    print(f"    columns taken out: {gone}")
    return channels, gone, given, read


assert prune(1) == ((16, 15), [16], 31, 31)
assert prune(4) == ((15, 15), list(range(16)), 480, 496)
EOF
venv/bin/python -W ignore try.py
