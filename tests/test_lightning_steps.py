"""What training_step gets is scored, and training is what it would have been."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning_modules import KINDS, SEEN, FetchesItself, Small, both, pruned, rows, run
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric

from force_plugin.lightning import ForcePruning, SaliencyPruning

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint"),
]


class BeforeTransfer(Small):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[:2]


class AfterTransfer(Small):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch * 3 - 1 if self.trainer.training else batch


class Records:
    def __init__(self, rows: list[Tensor]) -> None:
        self.rows = torch.stack(rows)
        self.moved = False


class Transfer(Small):
    def train_dataloader(self) -> Any:
        return rows(collate_fn=Records)

    def transfer_batch_to_device(self, batch: Any, device: Any, index: int) -> Any:
        batch.moved = True
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch.rows, batch.moved)


class WithoutIndex(Small):
    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return self.loss(batch)


class IndexOfAnotherName(Small):
    def training_step(self, data: Any, i: int, more: str = "x") -> Any:
        return self.loss(data, i, more)


class AnyArguments(Small):
    def training_step(self, *arguments: Any) -> Any:
        return self.loss(*arguments)


class FetchesTwo(Small):
    def train_dataloader(self) -> Any:
        return rows(count=24)

    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        (one, _, _), (two, index, _) = next(dataloader_iter), next(dataloader_iter)
        return self.loss(torch.cat([one, two]), index, dataloader_iter.length)


class NamedLoaders(Small):
    def train_dataloader(self) -> Any:
        return {"a": rows(1), "b": [rows(2), rows(3, batch_size=2)]}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        a, (b, c) = batch["a"], batch["b"]
        return self.loss(torch.cat([a, b, c]), batch_idx, type(batch))


class Combined(Small):
    mode: Any = "min_size"

    def train_dataloader(self) -> Any:
        loaders = [rows(1, count=20), rows(2), rows(3, batch_size=6, count=6)]
        if self.mode == "min_size":
            loaders = [rows(1, count=20), rows(2)]
        return CombinedLoader(loaders, self.mode)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        given = [part for part in batch if part is not None]
        return self.loss(torch.cat(given), batch_idx, len(given))


class CombinedUnequally(Combined):
    mode = "max_size"


class NoBatch(Small):
    def train_dataloader(self) -> Any:
        given: Any = [None, *rows()]
        return DataLoader(given, batch_size=None)


class Streamed(Small):
    def train_dataloader(self) -> Any:
        class Stream(IterableDataset[Any]):
            def __iter__(self) -> Any:
                return iter(torch.cat(list(rows())))

        return DataLoader(Stream(), batch_size=4)


class StateOfTheHooks(Small):
    def setup(self, stage: str) -> None:
        self.made = {stage}

    def on_fit_start(self) -> None:
        self.made.add("fit")

    def on_train_start(self) -> None:
        self.made.add("train")

    def on_train_epoch_start(self) -> None:
        self.scale = 0.5

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.made_for = len(batch), batch_idx

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch, self.made, self.made_for) * self.scale


class LossAmongOthers(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        return {"loss": loss, "predictions": batch, "name": "x"}


class PathsOfTheLogger(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        folder = Path(self.logger.save_dir), self.logger.name, self.trainer.log_dir
        self.logger.experiment.log_metrics({"rows": len(batch)}, batch_idx)
        return self.loss(batch, bool(folder))


class Data(lightning.LightningDataModule):
    def train_dataloader(self) -> Any:
        return rows(5)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch + 1

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch.half().float()


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


@KINDS
@pytest.mark.parametrize(
    ("made", "options"),
    [
        *(
            (made, {})
            for made in (
                Small,
                BeforeTransfer,
                AfterTransfer,
                Transfer,
                WithoutIndex,
                IndexOfAnotherName,
                AnyArguments,
                FetchesItself,
                FetchesTwo,
                NamedLoaders,
                Combined,
                CombinedUnequally,
                Streamed,
                StateOfTheHooks,
                LossAmongOthers,
            )
        ),
        (NoBatch, {"limit_train_batches": 4}),
        (Small, {"precision": "bf16-mixed"}),
        (Small, {"precision": "bf16-true"}),
        (Small, {"precision": "64-true"}),
        (Small, {"overfit_batches": 1}),
        (Small, {"fast_dev_run": True}),
        (Small, {"accumulate_grad_batches": 3}),
        (Small, {"data": Data()}),
        (PathsOfTheLogger, {"logger": True}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else ", ".join(value),
)
def test_it_scores_what_training_step_gets(
    tmp_path: Path, made: Any, options: dict[str, Any], kind: int
) -> None:
    module, callback = made(), both(batches=None)[kind]
    # Without a callback, for what training alone hands over.
    run(made(), default_root_dir=tmp_path, **options)
    expected = list(SEEN)
    run(module, callback, default_root_dir=tmp_path, **options)
    steps, passes = len(expected), len(SEEN) - len(expected)
    training, scoring = SEEN[passes:], SEEN[:passes]
    if kind == 1:
        training, scoring = SEEN[:steps], SEEN[steps:]
    assert equal(training, expected)
    assert scoring
    assert all(any(equal(one, other) for other in expected) for one in scoring)
    assert all(any(equal(one, other) for other in scoring) for one in expected)
    assert pruned(module) == 80


# ---- Nothing of it is left. ----


class Busy(Small):
    """Changes all that a training_step may change."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(16))
        self.net.append(nn.Dropout(0.3))
        self.idle = nn.Linear(2, 2)
        self.accuracy = MeanMetric()
        self.steps = 0
        self.outputs: dict[str, list[Tensor]] = {"loss": []}
        self.recent: deque[int] = deque(maxlen=4)

    def on_train_epoch_start(self) -> None:
        self.by_class: dict[int, list[int]] = defaultdict(list)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        rate = 0.1 * (batch_idx + 1 + self.steps)
        self.optimizers().param_groups[0].setdefault("first", rate)
        self.optimizers().param_groups[0]["lr"] = rate / 10

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch + 0.1 * torch.randn_like(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert isinstance(self.net[1], nn.BatchNorm1d)
        loss = self.loss(batch) + 0 * self.idle(batch[:, :2]).sum()
        value = float(loss.detach())
        self.steps += 1
        self.outputs["loss"].append(loss.detach())
        self.by_class[batch_idx % 2].append(batch_idx)
        self.recent.append(batch_idx)
        self.accuracy(loss.detach())
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict({"loss": loss, "steps": float(self.steps)}, prog_bar=True)
        self.logger.log_metrics({"direct": value}, self.steps)
        self.logger.experiment.log_metrics({"experiment": value}, self.steps)
        trainer: Any = self.trainer
        trainer.datamodule.seen.append(float(batch.sum()))
        trainer.noted = self.steps
        self.lr_schedulers().gamma *= 0.9
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class Counting(lightning.LightningDataModule):
    def __init__(self, **loading: Any) -> None:
        super().__init__()
        self.loading = {"shuffle": True, **loading}
        self.seen: list[float] = []
        self.total = torch.zeros(())

    def train_dataloader(self) -> Any:
        return rows(count=24, **self.loading)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.total += batch.sum()
        return batch


def everything(trainer: Any, module: Busy) -> list[Any]:
    (optimizer,), (config,) = trainer.optimizers, trainer.lr_scheduler_configs
    (logged,) = Path(trainer.default_root_dir).rglob("metrics.csv")
    return [
        *module.net.state_dict().values(),
        *(getattr(module, name) for name in ("steps", "outputs", "by_class", "recent")),
        trainer.datamodule.seen,
        trainer.datamodule.total,
        trainer.noted,
        trainer.global_step,
        {name: float(value) for name, value in trainer.callback_metrics.items()},
        {k: v for k, v in optimizer.param_groups[0].items() if k != "params"},
        config.scheduler.gamma,
        logged.read_text(),
        {
            name: len(times)
            for name, times in trainer.profiler.recorded_durations.items()
            if name.startswith("[LightningModule]")
        },
        torch.rand(3),
        np.random.rand(),
        random.random(),
    ]


def scores(module: Busy, batches: int | None) -> SaliencyPruning:
    """A callback that prunes one weight after each epoch, which is not used."""
    return SaliencyPruning(
        "snip",
        parameters_to_prune=[(module.idle, "weight")],
        amount=1,
        use_lottery_ticket_hypothesis=False,
        scoring={"batches": batches},
    )


def prunes_nothing(module: Busy, batches: int | None) -> ForcePruning:
    return ForcePruning(0.0, batches=batches, progress=False)


@pytest.mark.parametrize(
    ("make", "batches", "loading"),
    [
        (prunes_nothing, 1, {}),
        (prunes_nothing, None, {}),
        (prunes_nothing, 1, {"generator": torch.Generator()}),
        (prunes_nothing, 1, {"num_workers": 1, "persistent_workers": True}),
        (scores, None, {"num_workers": 1}),
        (scores, 1, {"generator": torch.Generator()}),
        (scores, 1, {"num_workers": 1, "persistent_workers": True}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_training_is_what_it_would_have_been(
    tmp_path: Path, make: Any, batches: int | None, loading: dict[str, Any]
) -> None:
    found = []
    for folder in (tmp_path / "alone", tmp_path / "pruned"):
        if "generator" in loading:
            loading["generator"].manual_seed(3)
        lightning.seed_everything(1, verbose=False)
        module = Busy()
        callbacks = [make(module, batches)] if folder.name == "pruned" else []
        trainer = run(
            module,
            *callbacks,
            data=Counting(**loading),
            default_root_dir=folder,
            logger=CSVLogger(folder),
            limit_train_batches=1.0,
            log_every_n_steps=1,
            profiler=SimpleProfiler(folder),
            accumulate_grad_batches=2,
            max_epochs=2,
        )
        found.append(everything(trainer, module))
    assert make is prunes_nothing or int((module.idle.weight == 0).sum()) == 2
    for one, other in zip(*found, strict=True):
        assert equal(one, other), (one, other)


def test_scores_after_validation_are_those_of_training(tmp_path: Path) -> None:
    class Validated(AfterTransfer):
        def val_dataloader(self) -> Any:
            return rows(9)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert not self.training

    module = Validated()
    callback = both(batches=None)[1]
    callback._prune_on_train_epoch_end = False
    trainer = run(module, callback, limit_val_batches=1)
    training, scoring = SEEN[:3], SEEN[3:]
    assert all(any(equal(one, other) for other in training) for one in scoring)
    assert pruned(module) == 80
    trainer.validate(module, verbose=False)
    assert pruned(module) == 80
