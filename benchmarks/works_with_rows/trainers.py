"""Rows on trainers."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.optimizer import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from works_with_rows.cases import (
    STEPS,
    Batch,
    Case,
    Losses,
    make_optimizer,
    row,
)
from works_with_rows.further import linear_weights


@row("Lightning's `Trainer.fit`")
def fits_lightning(case: Case) -> None:
    case.alike(partial(fit_lightning, case))


@row("pruned again by Lightning's `ModelPruning(amount=0.5)`")
def fits_lightning_pruning(case: Case) -> None:
    from lightning.pytorch.callbacks import ModelPruning

    model = case.build()
    weights = linear_weights(model)
    fit_lightning(case, model, ModelPruning("l1_unstructured", weights, amount=0.5))
    case.check(model)
    if any((module.weight == 0).float().mean() < 0.5 for module, _ in weights):
        raise AssertionError("less was pruned than asked for")


def fit_lightning(case: Case, model: nn.Module, *callbacks: Any) -> Losses:
    from lightning import LightningModule, Trainer

    losses = []

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Batch, index: int) -> Tensor:
            loss = cross_entropy(self.model(batch[0]), batch[1])
            losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Optimizer:
            return make_optimizer(self)

    trainer = Trainer(
        accelerator="cpu",
        max_epochs=STEPS,
        callbacks=[*callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), one_batch(case))
    return losses


def one_batch(case: Case) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*case.batch), batch_size=len(case.inputs))


@row("Hugging Face accelerate, its state saved and loaded midway")
def accelerates(case: Case) -> None:
    from accelerate import Accelerator

    def loop(model: nn.Module) -> Losses:
        accelerator, losses = Accelerator(cpu=True), []
        model, optimizer, batches = accelerator.prepare(
            model, make_optimizer(model), one_batch(case)
        )
        for _ in range(STEPS):
            for inputs, targets in batches:
                loss = cross_entropy(model(inputs), targets)
                optimizer.zero_grad()
                accelerator.backward(loss)
                optimizer.step()
                losses.append(loss.item())
            with tempfile.TemporaryDirectory() as folder:
                accelerator.save_state(folder)
                accelerator.load_state(folder)
        return losses

    case.alike(loop)


@row("Hugging Face transformers' `Trainer`")
def fits_transformers(case: Case) -> None:
    from transformers import Trainer, TrainingArguments

    def loop(model: nn.Module) -> Losses:
        losses = []

        class Classifier(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
                loss = cross_entropy(self.model(inputs), labels)
                losses.append(loss.item())
                return {"loss": loss}

        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                num_train_epochs=STEPS,
                per_device_train_batch_size=len(case.inputs),
                lr_scheduler_type="constant",
                max_grad_norm=0,
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
            )
            pairs = zip(*case.batch, strict=True)
            Trainer(
                Classifier(),
                arguments,
                train_dataset=[{"inputs": x, "labels": y} for x, y in pairs],
                optimizers=(make_optimizer(model), None),
            ).train()
        return losses

    case.alike(loop)


@row("the loop of torchvision's references, with its average")
def loops_torchvision(case: Case) -> None:
    def loop(model: nn.Module) -> Losses:
        optimizer, losses = make_optimizer(model), []
        schedule = CosineAnnealingLR(optimizer, T_max=STEPS)
        criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        average = AveragedModel(
            model, avg_fn=lambda old, new, _: 0.9 * old + 0.1 * new, use_buffers=True
        )
        for _ in range(STEPS):
            loss = criterion(model(case.inputs), case.batch[1])
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average.update_parameters(model)
            schedule.step()
            averaged = criterion(average(case.inputs), case.batch[1])
            losses += [loss.item(), averaged.item()]
        return losses

    case.alike(loop)
