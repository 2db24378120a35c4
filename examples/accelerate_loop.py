"""Prune before ``accelerator.prepare``; the loop stays as it is.

    pip install accelerate
    python examples/accelerate_loop.py
    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py

Trains a small ResNet at 95 % sparsity on scikit-learn's handwritten digits, in
bfloat16, and loads its state back. About five seconds on two cores.
"""

from __future__ import annotations

import tempfile

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

from force_plugin import force_prune, make_permanent, sparsity_report
from force_plugin.zoo import digits

EPOCHS = 4


def main() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    set_seed(0)
    train_set, test_set = digits(32)
    train = DataLoader(train_set, batch_size=64, shuffle=True, drop_last=True)
    test = DataLoader(test_set, batch_size=256)
    model = timm.create_model("test_resnet", num_classes=10).to(accelerator.device)
    set_seed(0, device_specific=True)  # each process scores batches of its own

    force_prune(model, train, 0.95, steps=10, progress=False)  # these two lines
    make_permanent(model)  # are ours

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, train, test = accelerator.prepare(model, optimizer, train, test)
    model.train()
    for _ in range(EPOCHS):
        for inputs, targets in train:
            optimizer.zero_grad()
            with accelerator.autocast():
                loss = nn.functional.cross_entropy(model(inputs), targets)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    model.eval()
    right = []
    with torch.no_grad():
        for inputs, targets in test:
            hits = model(inputs).argmax(1) == targets
            right.append(accelerator.gather_for_metrics(hits))
    accelerator.print(f"accuracy {torch.cat(right).float().mean():.2%}")
    accelerator.print(f"sparsity {sparsity_report(model).sparsity:.2%}")

    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        accelerator.load_state(folder)
    accelerator.print(f"loaded: sparsity {sparsity_report(model).sparsity:.2%}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
