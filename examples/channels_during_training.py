"""Take channels out of a network every epoch or so, while it trains.

    python examples/channels_during_training.py

SNAP-it during training (Verdenius et al. 2020, arXiv 2006.00896): the sensitivity of
the channels of the network as it is trained so far, and fewer channels after each of
the first epochs. ``snap_prune`` returns a new model, which the optimizer is to be made
for; its share is one of the channels that are left. Beside it the same network, all of
it taken out before training. On scikit-learn's handwritten digits, about fifteen
seconds on two cores.
"""

from __future__ import annotations

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader

from force_plugin import compact_report, snap_prune
from force_plugin.zoo import digits

EPOCHS = 8
DURING = {1: 0.4, 2: 0.6, 3: 0.75}  # epoch: share of the channels taken out so far
BEFORE = {0: 0.75}


def train(sparsities: dict[int, float]) -> list[tuple[float, float]]:
    """Parameters left and test accuracy after each epoch."""
    torch.manual_seed(0)
    train_set, test_set = digits(32)
    batches = DataLoader(train_set, batch_size=64, shuffle=True, drop_last=True)
    model = dense = timm.create_model("test_resnet", num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    example, before, results = train_set[0][0][None], 0.0, []
    for epoch in range(EPOCHS):
        if epoch in sparsities:
            now = 1 - (1 - sparsities[epoch]) / (1 - before)  # of those that are left
            steps = 0 if epoch else 5  # while training, one step at a time
            model = snap_prune(
                model, batches, example, now, steps=steps, batches=4, progress=False
            )
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
            before = sparsities[epoch]
        model.train()
        for inputs, targets in batches:
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            inputs, targets = next(iter(DataLoader(test_set, len(test_set))))
            accuracy = float((model(inputs).argmax(1) == targets).float().mean())
        sizes = compact_report(dense, model, example)
        results.append((sizes.parameters[1] / sizes.parameters[0], accuracy))
    return results


def main() -> None:
    during, before = train(DURING), train(BEFORE)
    print("            during training      before training")
    print("epoch      parameters accuracy  parameters accuracy")
    for epoch, numbers in enumerate(zip(during, before, strict=True), start=1):
        columns = [f"{share:>10.1%}{accuracy:>9.2%}" for share, accuracy in numbers]
        print(f"{epoch:<11}" + "  ".join(columns))


if __name__ == "__main__":
    main()
