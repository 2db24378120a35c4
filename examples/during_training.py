"""Prune a little more every few epochs, while the network trains.

    python examples/during_training.py

SNIP-it during training (Verdenius et al. 2020, arXiv 2006.00896): SNIP's scores of the
network as it is trained so far, and a sparsity that rises over the epochs. A weight
that is pruned stays pruned, and the optimizer goes on with the same parameters. Beside
it, the same network pruned once, before training. On scikit-learn's handwritten digits,
about fifteen seconds on two cores.
"""

from __future__ import annotations

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader

from force_plugin import force_prune, get_masks
from force_plugin.zoo import digits

EPOCHS = 8
DURING = dict(enumerate([0.8, 0.9, 0.95, 0.97, 0.98]))  # epoch: sparsity
BEFORE = {0: 0.98}


def train(sparsities: dict[int, float]) -> list[tuple[float, float]]:
    """Sparsity and test accuracy after each epoch."""
    torch.manual_seed(0)
    train_set, test_set = digits(32)
    batches = DataLoader(train_set, batch_size=64, shuffle=True, drop_last=True)
    model = timm.create_model("test_resnet", num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    results = []
    for epoch in range(EPOCHS):
        if epoch in sparsities:  # these three lines are ours
            share = sparsities[epoch]
            force_prune(model, batches, share, method="snip", batches=4, progress=False)
        model.train()
        for inputs, targets in batches:
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        model.eval()
        with torch.no_grad():
            inputs, targets = next(iter(DataLoader(test_set, len(test_set))))
            accuracy = float((model(inputs).argmax(1) == targets).float().mean())
        kept = torch.cat([mask.flatten() for mask in get_masks(model).values()])
        results.append((1 - float(kept.float().mean()), accuracy))
    return results


def main() -> None:
    during, before = train(DURING), train(BEFORE)
    print("              during training     before training")
    print("epoch       sparsity  accuracy  sparsity  accuracy")
    for epoch, numbers in enumerate(zip(during, before, strict=True), start=1):
        columns = [f"{s:>8.2%}{a:>10.2%}" for s, a in numbers]
        print(f"{epoch:<12}" + "  ".join(columns))


if __name__ == "__main__":
    main()
