"""A training script as others write them. It does not know of this package.

python training_script.py OUT [--initial-checkpoint FILE] [--resume FILE] [--opt NAME]
       [--zero-head] [--average timm|torch]
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

DECAY = 0.5


class ExponentialMovingAverage(AveragedModel):
    """An average of the weights, as in torchvision's references."""

    def __init__(self, model: nn.Module) -> None:
        def average(averaged: Tensor, value: Tensor, number: Any) -> Tensor:
            return DECAY * averaged + (1 - DECAY) * value

        super().__init__(model, avg_fn=average, use_buffers=True)

    def update(self, model: nn.Module) -> None:
        self.update_parameters(model)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--initial-checkpoint", default="")
    parser.add_argument("--resume")
    parser.add_argument("--zero-head", action="store_true")
    parser.add_argument("--opt", default="adamw")
    parser.add_argument("--average", choices=["timm", "torch"], default="timm")
    args = parser.parse_args()

    torch.manual_seed(1)
    path = args.initial_checkpoint
    model = timm.create_model("test_resnet", num_classes=10, checkpoint_path=path)
    if args.average == "timm":  # a copy, and an average from the first step on
        average = ModelEmaV3(model, decay=DECAY)
    else:
        average = ExponentialMovingAverage(model)
    if args.zero_head:
        nn.init.zeros_(model.fc.weight)
    # With momentum and weight decay, which move weights whose gradient is 0.
    optimizer = create_optimizer_v2(model, args.opt, lr=0.01, weight_decay=0.05)
    if args.resume:
        saved = torch.load(args.resume)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
    called = model
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
        called = DistributedDataParallel(model)
        torch.manual_seed(int(os.environ["RANK"]))
    called.train()
    for _ in range(3):
        optimizer.zero_grad()
        inputs, targets = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
        nn.functional.cross_entropy(called(inputs), targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model)
    torch.save(
        {
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
        },
        args.out + os.environ.get("RANK", ""),
    )


if __name__ == "__main__":
    main()
