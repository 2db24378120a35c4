"""Modules for Lightning that note what they get, and a run of them."""

from __future__ import annotations

import copy
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from force_plugin.lightning import ForcePruning, SaliencyPruning

# Outside of every module, so that what was noted while scoring is still there.
SEEN: list[list[Any]] = []


class Small(lightning.LightningModule):
    """Notes what comes, in the order in which it comes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

    def train_dataloader(self) -> Any:
        return rows()

    def loss(self, *seen: Any) -> Tensor:
        outputs = self.net(seen[0])
        SEEN.append([copy.deepcopy(value) for value in (*seen, outputs.dtype)])
        return outputs.float().square().mean()  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch, batch_idx, self.training, self.trainer.training)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def rows(seed: int = 0, count: int = 12, **options: Any) -> DataLoader[Any]:
    numbers: Any = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return DataLoader(numbers, **{"batch_size": 4, **options})


class FetchesItself(Small):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        batch, index, loader = next(dataloader_iter)
        return self.loss(batch, index, loader)


def run(
    module: lightning.LightningModule,
    *callbacks: Any,
    data: Any = None,
    resume: Any = None,
    **options: Any,
) -> lightning.Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_train_batches": 3,
        "max_epochs": 1,
    }
    trainer = lightning.Trainer(callbacks=list(callbacks), **{**quiet, **options})
    SEEN.clear()
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return trainer


def both(**scoring: Any) -> list[Any]:
    """A callback of each kind that prunes half of the 160 weights of a Small module."""
    return [
        ForcePruning(0.5, steps=2, progress=False, **scoring),
        SaliencyPruning(
            "force",
            parameter_names=["weight"],
            scoring=scoring,
            use_lottery_ticket_hypothesis=False,
        ),
    ]


def pruned(module: nn.Module) -> int:
    weights = [part.weight for part in module.modules() if isinstance(part, nn.Linear)]
    return sum(int((weight == 0).sum()) for weight in weights)


KINDS = pytest.mark.parametrize("kind", [0, 1], ids=["Force", "Saliency"])
