#!/usr/bin/env bash
# Versions: torch 2.14.1, onnx 1.23.2, onnxscript 0.7.2.
# Guess: torch.onnx.export folds constants: of a masked layer it writes one weight, the product
#   with its mask.
# Behaviour: It depends on the size. At 64 x 64 there is one weight. At 256 x 256 the file has
#   weight_orig and weight_mask, twice the bytes, and a Mul that is computed in each run; the
#   values under the mask are in the file.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
unset PIP_NO_CACHE_DIR # with pip's cache, torch is downloaded once for all scripts
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.14.1 onnx==1.23.2 onnxscript==0.7.2
cat >try.py <<'EOF'
import torch
from torch import nn
from torch.nn.utils import prune


def export(width):
    net = nn.Sequential(nn.Linear(width, width, bias=False)).eval()
    prune.l1_unstructured(net[0], "weight", amount=0.9)
    program = torch.onnx.export(net, (torch.ones(1, width),), dynamo=True, verbose=False)
    graph = program.model_proto.graph
    nodes = [node.op_type for node in graph.node]
    values = sum(torch.Size(tensor.dims).numel() for tensor in graph.initializer)
    names = sorted(tensor.name for tensor in graph.initializer)
    print(f"{width} x {width}: nodes {nodes}, {values} values in {names}")
    return nodes, values


assert export(64) == (["Gemm"], 64 * 64)
assert export(256) == (["Mul", "Gemm"], 2 * 256 * 256)
EOF
venv/bin/python -W ignore try.py
