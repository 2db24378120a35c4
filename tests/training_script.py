"""A training script as others write them. It does not know of this package.

python training_script.py OUT [--initial-checkpoint FILE] [--resume FILE] [--opt NAME]
       [--zero-head]
"""

from __future__ import annotations

import argparse

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--initial-checkpoint", default="")
    parser.add_argument("--resume")
    parser.add_argument("--zero-head", action="store_true")
    parser.add_argument("--opt", default="adamw")
    args = parser.parse_args()

    torch.manual_seed(1)
    path = args.initial_checkpoint
    model = timm.create_model("test_resnet", num_classes=10, checkpoint_path=path)
    average = ModelEmaV3(model, decay=0.5)
    if args.zero_head:
        torch.nn.init.zeros_(model.fc.weight)
    # With momentum and weight decay, which move weights whose gradient is 0.
    optimizer = create_optimizer_v2(model, args.opt, lr=0.01, weight_decay=0.05)
    if args.resume:
        saved = torch.load(args.resume)
        model.load_state_dict(saved["model"])
        average.module.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        inputs, targets = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model)
    torch.save(
        {
            "model": model.state_dict(),
            "average": average.module.state_dict(),
            "optimizer": optimizer.state_dict(),
        },
        args.out,
    )


if __name__ == "__main__":
    main()
