"""Prune for timm's own ``train.py``, which then trains as it is.

    python examples/timm_train.py
    python examples/timm_train.py path/to/pytorch-image-models/train.py

Writes scikit-learn's handwritten digits as a folder of images, prunes a small ResNet on
it at 95 %, and saves the weights that training starts from. With the path of a
``train.py`` (https://github.com/huggingface/pytorch-image-models; it is not in timm's
wheel), trains, continues from a checkpoint, and looks at the zeros of every checkpoint;
without, prints the command. About half a minute on two cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from timm.utils import random_seed

from force_plugin import force_prune
from force_plugin.hold import save_pruned
from force_plugin.zoo import digits, load_data, load_dataset, load_model

MODEL = "test_resnet"


def write_images(folder: Path) -> None:
    """``train/CLASS/NUMBER.png`` and ``val/CLASS/NUMBER.png``, 32x32 pixels."""
    for split, part in zip(("train", "val"), digits(), strict=True):
        low, high = part.images.min(), part.images.max()
        grey = ((part.images - low) / (high - low) * 255).byte().squeeze(1).numpy()
        for number, (pixels, target) in enumerate(zip(grey, part.targets, strict=True)):
            path = folder / split / str(int(target)) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).convert("RGB").resize((32, 32)).save(path)


def prune(folder: Path, path: Path) -> None:
    """What ``force-prune`` does, in Python."""
    random_seed(0)
    model = load_model(MODEL, num_classes=10)
    loader = load_data(model, load_dataset(folder), image_size=32, batch_size=64)
    report = force_prune(model, loader, 0.95, steps=10, progress=False)
    save_pruned(model, path)
    print(f"pruned: sparsity {report.sparsity:.2%}, written to {path.name}")


def print_zeros(start: Path, checkpoints: list[Path], *keys: str) -> None:
    """How many of the weights that were pruned are still 0 in each checkpoint."""
    print("pruned weights that are 0:")
    weights = {name: w for name, w in load_file(start).items() if w.ndim > 1}
    for path in checkpoints:
        saved = torch.load(path, map_location="cpu", weights_only=False)
        counts = []
        for key in keys:
            state = {k.removeprefix("module."): v for k, v in saved[key].items()}
            pruned = [state[name][w == 0] for name, w in weights.items()]
            zeros = sum(int((values == 0).sum()) for values in pruned)
            counts.append(f"{zeros:,} of {sum(map(len, pruned)):,} in {key}")
        print(f"  {path.parent.name}/{path.name}: {', '.join(counts)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("script", nargs="?", type=Path, help="timm's train.py")
    script = parser.parse_args().script

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "data")
        prune(folder / "data", folder / "pruned.safetensors")

        # The first line is ours, and the checkpoint to start from.
        command = f"""
            {sys.executable} -m force_plugin.hold {script or "train.py"}
            --initial-checkpoint {folder}/pruned.safetensors
            --model {MODEL} --num-classes 10 --img-size 32 --data-dir {folder}/data
            --device cpu --workers 0 --no-prefetcher --batch-size 64 --lr 0.1
            --amp --amp-dtype bfloat16 --model-ema --model-ema-decay 0.9
            --output {folder}/runs --experiment""".split()
        if script is None:
            shown = " ".join([*command, "NAME"]).replace(name, "FOLDER")
            print("now, with timm's train.py:\n ", shown.replace(command[0], "python"))
            return
        subprocess.run([*command, "first", "--epochs", "2"], check=True)
        last = folder / "runs" / "first" / "last.pth.tar"
        subprocess.run(
            [*command, "second", "--epochs", "4", "--resume", str(last)], check=True
        )
        print_zeros(
            folder / "pruned.safetensors",
            sorted(folder.glob("runs/*/*.pth.tar")),
            "state_dict",
            "state_dict_ema",
        )


if __name__ == "__main__":
    main()
