"""Prune with a callback of Lightning; the module and the trainer stay as they are.

    pip install lightning
    python examples/lightning_callback.py

Trains a small ResNet at 95 % sparsity on scikit-learn's handwritten digits, in bfloat16
and with an average of the weights, then goes on from the checkpoint in a new module.
About ten seconds on two cores.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import lightning
import timm
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

from force_plugin import sparsity_report
from force_plugin.lightning import ForcePruning
from force_plugin.zoo import digits


class Classifier(lightning.LightningModule):
    """Nothing in here knows about pruning."""

    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model("test_resnet", num_classes=10)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        inputs, targets = batch
        loss = nn.functional.cross_entropy(self.model(inputs), targets)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        inputs, targets = batch
        right = (self.model(inputs).argmax(1) == targets).float().mean()
        self.log("accuracy", right, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def make_trainer(folder: str, epochs: int) -> lightning.Trainer:
    return lightning.Trainer(
        max_epochs=epochs,
        callbacks=[
            ForcePruning(0.95, steps=10, progress=False),  # the one line that is ours
            EMAWeightAveraging(decay=0.9),
        ],
        precision="bf16-mixed",
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main() -> None:
    lightning.seed_everything(0, verbose=False)
    train_set, test_set = digits(32)
    train = DataLoader(train_set, batch_size=64, shuffle=True, drop_last=True)
    test = DataLoader(test_set, batch_size=256)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, epochs=4)
        model = Classifier()
        trainer.fit(model, train, test)
        print(f"accuracy {trainer.callback_metrics['accuracy']:.2%}")
        print(f"sparsity {sparsity_report(model).sparsity:.2%}")

        (checkpoint,) = Path(folder).rglob("*.ckpt")
        trainer = make_trainer(folder, epochs=6)
        model = Classifier()
        trainer.fit(model, train, test, ckpt_path=checkpoint)
        print(f"resumed: accuracy {trainer.callback_metrics['accuracy']:.2%}")
        print(f"resumed: sparsity {sparsity_report(model).sparsity:.2%}")


if __name__ == "__main__":
    main()
