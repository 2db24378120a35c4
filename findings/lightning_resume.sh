#!/usr/bin/env bash
# Versions: lightning 2.6.6, torch 2.14.1.
# Guess: A run with ModelPruning that goes on from its own checkpoint keeps its masks: what was
#   pruned stays 0.
# Behaviour: Checkpoints have plain weights with zeros, and no masks; the callback makes new ones
#   only when the first resumed epoch ends. In that epoch nothing holds the zeros, and nearly all
#   of them are trained away.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
unset PIP_NO_CACHE_DIR # with pip's cache, torch is downloaded once for all scripts
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.14.1 lightning==2.6.6
cat >try.py <<'EOF'
import logging
import tempfile

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
    """Share of zeros in the first layer when the first resumed epoch starts and ends."""

    shares = ()

    def look(self, trainer, module):
        if len(self.shares) < 2:
            self.shares += ((module.net[0].weight == 0).float().mean().item(),)

    on_train_epoch_start = on_train_epoch_end = look


def fit(epochs, checkpoint=None):
    module, watch = Module(), Watch()
    names = [(module.net[0], "weight"), (module.net[2], "weight")]
    pruning = ModelPruning(
        "l1_unstructured",
        parameters_to_prune=names,
        amount=0.5,
        use_lottery_ticket_hypothesis=False,
    )
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch, pruning],
    )
    data = torch.utils.data.DataLoader(torch.randn(64, 8), batch_size=16)
    trainer.fit(module, data, ckpt_path=checkpoint)
    return trainer, watch


with tempfile.TemporaryDirectory() as folder:
    trainer, _ = fit(2)
    trainer.save_checkpoint(f"{folder}/half.ckpt")
    state = torch.load(f"{folder}/half.ckpt", weights_only=True)["state_dict"]
    stored = (state["net.0.weight"] == 0).float().mean().item()
    _, watch = fit(4, f"{folder}/half.ckpt")
print(f"zeros in the checkpoint:          {stored:.0%}")
print(f"when the resumed epoch starts:    {watch.shares[0]:.0%}")
print(f"before it prunes again at its end: {watch.shares[1]:.0%}")

assert stored == watch.shares[0] > 0.5
assert watch.shares[1] < 0.2
EOF
venv/bin/python -W ignore try.py
