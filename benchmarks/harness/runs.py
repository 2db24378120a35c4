"""Define trainings of timm's networks on small images, and their shared options."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset

from harness.fashion_mnist import DEBIAN, DIGITS, FASHION, TRAINING_IMAGES
from harness.tables import percent
from harness.training import batches_of

EPOCHS = {FASHION: 4, DIGITS: 40}


@dataclass(frozen=True)
class Run:
    """The options that determine the result of a training."""

    data: str
    images: int
    epochs: int
    batch: int
    lr: float
    model: str = ""
    seed: int = 0
    gates: str = "dense"  # "dense" is not pruned; or "open", "closed"
    sparsity: float = 0.0
    steps: int = 0

    def __str__(self) -> str:
        """Return the options that differ between runs of a command."""
        pruned = f"{percent(self.sparsity)}, gates {self.gates}"
        return f"{self.model}, seed {self.seed}, {pruned if self.sparsity else 'dense'}"

    def loader(self, images: Dataset[Any]) -> DataLoader[Any]:
        """Return a new loader of batches, in the order that the seed fixes."""
        return batches_of(images, self.batch, self.seed)


def add_training(
    parser: argparse.ArgumentParser, images: int, epochs: int | None = None
) -> None:
    """Add the options that all runs of a command share, for :func:`shared_run`.

    Args:
        parser: The parser of the command.
        images: Default number of training images.
        epochs: Default number of epochs. ``None``: it depends on the data.
    """
    add = parser.add_argument
    told = "default: 4; for the digits 40" if epochs is None else None
    add("--data", help=f"a folder, or digits (default: {DEBIAN})")
    add("--images", type=int, default=images, help="training images")
    add("--epochs", type=int, default=epochs, help=told)
    add("--batch", type=int, default=128)
    add("--lr", type=float, default=2e-3, help="highest learning rate")


def shared_run(args: argparse.Namespace) -> Run:
    """Return a run with the shared options; sets ``args.data`` if it is not given."""
    args.data = args.data or (str(DEBIAN) if DEBIAN.exists() else "digits")
    data = DIGITS if args.data == "digits" else FASHION
    images = min(args.images, TRAINING_IMAGES[data])
    return Run(data, images, args.epochs or EPOCHS[data], args.batch, args.lr)
