#!/usr/bin/env bash
# Versions: lightning 2.6.6, torch 2.14.1, on a CPU.
# Guess: ModelPruning with use_lottery_ticket_hypothesis=True, its default, sets the weights back
#   to their initial values after each pruning.
# Behaviour: It does so once. The first time, the live parameter is given the storage of the kept
#   copy, which training then overwrites: from the second pruning on, weights are "set back" to
#   what they are.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
unset PIP_NO_CACHE_DIR # with pip's cache, torch is downloaded once for all scripts
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.14.1 lightning==2.6.6
cat >try.py <<'EOF'
import logging

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelPruning
from torch import nn

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.manual_seed(0)


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

    def training_step(self, batch, index):
        return (self.net(batch) - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Watch(Callback):
    """How far the weights are from their initial values when an epoch starts."""

    def __init__(self, module):
        self.initial = module.net[0].weight.detach().clone()
        self.distances = []

    def on_train_epoch_start(self, trainer, module):
        layer = module.net[0]
        weight = getattr(layer, "weight_orig", layer.weight)
        self.distances.append((weight - self.initial).abs().max().item())


module = Module()
watch = Watch(module)
names = [(module.net[0], "weight"), (module.net[2], "weight")]
pruning = ModelPruning("l1_unstructured", parameters_to_prune=names, amount=0.2)
trainer = lightning.Trainer(
    max_epochs=4,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=[watch, pruning],
)
trainer.fit(module, torch.utils.data.DataLoader(torch.randn(64, 8), batch_size=16))
for epoch, distance in enumerate(watch.distances):
    print(f"epoch {epoch} starts {distance:.4f} away from the initial weights")

assert watch.distances[1] == 0
assert watch.distances[2] > 0.001
assert watch.distances[3] > 0.001
EOF
venv/bin/python -W ignore try.py
