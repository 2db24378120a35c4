"""Prune in a loop like that of torchvision's classification reference.

    python examples/torchvision_loop.py

Trains a torchvision ShuffleNet at 90 % sparsity on scikit-learn's handwritten digits
with what ``references/classification/train.py`` has: SGD without weight decay on
normalisations, label smoothing, a warm-up, an average of the weights, checkpoints of
everything. About ten seconds on two cores.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.data import DataLoader

from force_plugin import force_prune, make_permanent, sparsity_report
from force_plugin.zoo import digits

EPOCHS = 6


def make_model() -> nn.Module:
    return torchvision.models.get_model("shufflenet_v2_x0_5", num_classes=10)


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader) -> float:
    model.eval()
    right = [model(inputs).argmax(1) == targets for inputs, targets in batches]
    return float(torch.cat(right).float().mean())


def main() -> None:
    torch.manual_seed(0)
    train_set, test_set = digits(32)
    train = DataLoader(train_set, batch_size=64, shuffle=True, drop_last=True)
    test = DataLoader(test_set, batch_size=256)
    model = make_model()

    force_prune(model, train, 0.9, steps=5, progress=False)  # these two lines
    make_permanent(model)  # are ours

    normalisations = [p for p in model.parameters() if p.ndim == 1]
    others = [p for p in model.parameters() if p.ndim > 1]
    optimizer = torch.optim.SGD(
        [{"params": others}, {"params": normalisations, "weight_decay": 0}],
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


if __name__ == "__main__":
    main()
