"""Prune in a loop like that of torchvision's classification reference, or for it.

    python examples/torchvision_loop.py
    python examples/torchvision_loop.py path/to/references/classification/train.py

Trains a torchvision ShuffleNet at 90 % sparsity on scikit-learn's handwritten digits
with what ``references/classification/train.py`` has: SGD without weight decay on
normalisations, label smoothing, a warm-up, an average of the weights, checkpoints of
everything. About ten seconds on two cores.

With the path of that script (https://github.com/pytorch/vision; it is not in
torchvision's wheel), the script trains, continues from a checkpoint and evaluates, as
it is, and the zeros of every checkpoint are counted. About half a minute.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torchvision
from timm_train import print_zeros, write_images  # the example beside this one
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.data import DataLoader

from force_plugin import force_prune, make_permanent, sparsity_report
from force_plugin.hold import save_pruned
from force_plugin.zoo import digits

MODEL = "shufflenet_v2_x0_5"
EPOCHS = 6


def make_model() -> nn.Module:
    return torchvision.models.get_model(MODEL, num_classes=10)


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader) -> float:
    model.eval()
    right = [model(inputs).argmax(1) == targets for inputs, targets in batches]
    return float(torch.cat(right).float().mean())


def train_with(script: Path, folder: Path) -> None:
    """Prune, and leave the training to torchvision's own script."""
    torch.manual_seed(0)
    write_images(folder / "data")
    model = make_model()
    train = DataLoader(digits(32)[0], batch_size=64, shuffle=True)
    force_prune(model, train, 0.9, steps=5, progress=False)
    save_pruned(model, folder / "pruned.safetensors")

    # The first line is ours.
    command = f"""
        {sys.executable} -m force_plugin.hold --initial-weights
        {folder}/pruned.safetensors {script} --model {MODEL} --data-path {folder}/data
        --device cpu --workers 0 --batch-size 64 --lr 0.1 --label-smoothing 0.1
        --train-crop-size 32 --val-crop-size 32 --val-resize-size 32
        --model-ema --model-ema-steps 1 --model-ema-decay 0.99 --output-dir""".split()
    subprocess.run([*command, str(folder / "first"), "--epochs", "2"], check=True)
    # What the script saves of its arguments, its --resume refuses to load.
    saved = torch.load(folder / "first" / "checkpoint.pth", weights_only=False)
    del saved["args"]
    torch.save(saved, folder / "resume.pth")
    command += [str(folder / "second"), "--resume", str(folder / "resume.pth")]
    subprocess.run([*command, "--epochs", "4"], check=True)
    subprocess.run([*command, "--test-only"], check=True)
    print_zeros(
        folder / "pruned.safetensors",
        sorted(folder.glob("*/model_*.pth")),
        "model",
        "model_ema",
    )


def train_here() -> None:
    """The same in a loop of one's own."""
    torch.manual_seed(0)
    train_set, test_set = digits(32)
    train = DataLoader(train_set, batch_size=64, shuffle=True, drop_last=True)
    test = DataLoader(test_set, batch_size=256)
    model = make_model()

    force_prune(model, train, 0.9, steps=5, progress=False)  # these two lines
    make_permanent(model)  # are ours

    normalisations = [p for p in model.parameters() if p.ndim == 1]
    others = [p for p in model.parameters() if p.ndim > 1]
    groups: list[dict[str, Any]] = [
        {"params": others},
        {"params": normalisations, "weight_decay": 0},
    ]
    optimizer = torch.optim.SGD(
        groups,
        lr=0.1,
        momentum=0.9,
        weight_decay=1e-4,
    )
    schedule = lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=1),
            lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS - 1),
        ],
        milestones=[1],
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)

    for _ in range(EPOCHS):
        model.train()
        for inputs, targets in train:
            loss = criterion(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average.update_parameters(model)
        schedule.step()

    for name, trained in (("model", model), ("average", average)):
        sparsity = sparsity_report(trained).sparsity
        print(f"{name:<8} accuracy {accuracy(trained, test):.2%}", end="  ")
        print(f"sparsity {sparsity:.2%}")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint.pth")
        torch.save({"model": model.state_dict()}, path)
        model = make_model()  # an unpruned one takes the checkpoint as it is
        model.load_state_dict(torch.load(path)["model"])
    print(f"loaded   accuracy {accuracy(model, test):.2%}", end="  ")
    print(f"sparsity {sparsity_report(model).sparsity:.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("script", nargs="?", type=Path, help="torchvision's train.py")
    script = parser.parse_args().script
    if script is None:
        train_here()
        return
    with tempfile.TemporaryDirectory() as folder:
        train_with(script, Path(folder))


if __name__ == "__main__":
    main()
