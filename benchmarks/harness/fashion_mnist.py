"""Load Fashion-MNIST, or scikit-learn's digits if Fashion-MNIST is missing.

On Debian, use ``apt-get install dataset-fashion-mnist``. Elsewhere, put the four idx
files anywhere below a folder (gzipped or not; torchvision's folders work).
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset, Subset, TensorDataset

from force_plugin.zoo import digits

FASHION, DIGITS = "Fashion-MNIST", "scikit-learn's digits"
TRAINING_IMAGES = {FASHION: 60_000, DIGITS: 1437}
DEBIAN = Path("/usr/share/datasets/fashion-mnist")

Data = tuple[Dataset[Any], Dataset[Any]]


def read_idx(folder: Path, name: str) -> Tensor:
    """Return the values of an idx file, gzipped or not, anywhere below a folder."""
    path = next(folder.rglob(f"{name}*"), None)
    if path is None:
        raise SystemExit(f"--data: expected {name} or {name}.gz below {folder}")
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    # Byte 3 is the number of dimensions; their sizes and the values follow.
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    return torch.from_numpy(values.reshape(shape).copy())


def read_part(folder: Path, part: str, border: int = 0) -> tuple[Tensor, Tensor]:
    """Return normalised grey images and their classes.

    Args:
        folder: A folder with the files at any depth.
        part: ``train``, or ``t10k`` for the test images.
        border: Number of black pixels on each side of the 28x28 pixels.
    """
    pixels = pad(read_idx(folder, f"{part}-images-idx3-ubyte"), 4 * (border,))
    targets = read_idx(folder, f"{part}-labels-idx1-ubyte").long()
    # Mean and standard deviation of the training images.
    return (pixels[:, None] / 255 - 0.2860) / 0.3530, targets


def load(data: str, folder: Path, images: int) -> Data:
    """Return ``images`` training images and all test images, of shape 3x32x32."""
    if data == DIGITS:
        train, test = digits(32)
        return Subset(train, range(images)), test
    parts = []
    for part in ("train", "t10k"):
        pixels, targets = read_part(folder, part, border=2)
        parts.append(TensorDataset(pixels.expand(-1, 3, -1, -1), targets))
    return Subset(parts[0], range(images)), parts[1]


def add_folder(parser: argparse.ArgumentParser) -> None:
    """Add ``--data``, for :func:`need_folder`."""
    told = f"default: {DEBIAN}"
    parser.add_argument("--data", type=Path, default=DEBIAN, help=told)


def need_folder(
    parser: argparse.ArgumentParser, folder: Path, otherwise: str = ""
) -> None:
    """End with an error and advice if a folder does not exist."""
    if not folder.is_dir():
        parser.error(
            f"--data: expected the folder of Fashion-MNIST, {folder} is none; "
            f"apt-get install dataset-fashion-mnist{otherwise}"
        )
