"""The callback for Lightning, in a real trainer."""

from __future__ import annotations

import copy
import logging
import random
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import tiny_resnet
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from force_plugin import FORCE, Magnitude, force_prune, get_masks, saliency
from force_plugin.zoo import digits

lightning = pytest.importorskip("lightning", reason="needs pip install lightning")

from lightning.fabric.utilities.exceptions import (  # noqa: E402
    MisconfigurationException,
)
from lightning.pytorch.callbacks import (  # noqa: E402
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.profilers import SimpleProfiler  # noqa: E402
from lightning.pytorch.utilities.combined_loader import CombinedLoader  # noqa: E402
from torchmetrics import MeanMetric  # noqa: E402

from force_plugin.errors import BatchError  # noqa: E402
from force_plugin.lightning import ForcePruning, SaliencyPruning  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint"),
]


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = tiny_resnet()

    def training_step(self, batch: Any, index: int) -> dict[str, Tensor]:
        inputs, targets = batch
        loss = nn.functional.cross_entropy(self.net(inputs), targets)
        self.log("loss", loss)
        return {"loss": loss}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def loader() -> DataLoader:
    # In one order: Lightning draws from the generator of another.
    images = Subset(digits(16)[0], range(128))
    return DataLoader(images, batch_size=32)


def fit(
    folder: Path, *callbacks: Any, steps: int = 2, resume: Path | None = None
) -> tuple[Classifier, Path]:
    """A trained module and its checkpoint."""
    module = Classifier()
    trainer = lightning.Trainer(
        max_steps=steps,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, loader(), ckpt_path=resume)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return module, folder / f"{steps}.ckpt"


def zeros(module: nn.Module) -> dict[str, Tensor]:
    return {n: p == 0 for n, p in module.named_parameters() if p.ndim > 1}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_callback_prunes_as_force_prune_does_on_the_training_loss(
    tmp_path: Path,
) -> None:
    options = {"method": "snip", "batches": 2, "progress": False}
    callback = ForcePruning(0.8, **options)
    module, _ = fit(tmp_path, callback)
    expected = Classifier()
    report = force_prune(expected.net, loader(), 0.8, **options)
    masks = {f"net.{name}": ~mask for name, mask in get_masks(expected.net).items()}
    assert same(zeros(module), masks)
    assert callback.report is not None
    assert callback.report.kept == report.kept
    assert "log" not in vars(module)


def test_the_callback_leaves_plain_checkpoints_and_goes_on_from_them(
    tmp_path: Path,
) -> None:
    module, checkpoint = fit(tmp_path, ForcePruning(0.8, steps=2, progress=False))
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["state_dict"].keys() == Classifier().state_dict().keys()

    callback = ForcePruning(0.8, method="random", progress=False)
    resumed, _ = fit(tmp_path, callback, steps=4, resume=checkpoint)
    assert same(zeros(resumed), zeros(module))  # not pruned again, at random
    assert callback.report is not None
    assert callback.report.sparsity == pytest.approx(0.8, abs=1e-4)
    assert not same(dict(resumed.named_parameters()), dict(module.named_parameters()))


def test_the_callback_takes_another_loss(tmp_path: Path) -> None:
    def forward(module: Classifier, batch: Any) -> Tensor:
        return module.net(batch[0]).square().mean()

    options = {"method": "snip", "progress": False}
    module, _ = fit(tmp_path, ForcePruning(0.8, forward=forward, **options))
    expected = Classifier()
    force_prune(expected, loader(), 0.8, forward=forward, method="snip", progress=False)
    masks = {name: ~mask for name, mask in get_masks(expected).items()}
    assert same(zeros(module), masks)


def test_a_wrong_argument_of_the_callback_is_that_of_force_prune(
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match="sparsity"):
        fit(tmp_path, ForcePruning(1.5))


def test_lightnings_own_pruning_takes_the_classes_that_need_no_scores(
    tmp_path: Path,
) -> None:
    def own(method: Any) -> Any:
        return ModelPruning(
            method,
            parameter_names=["weight"],
            amount=0.5,
            use_lottery_ticket_hypothesis=False,
        )

    module, _ = fit(tmp_path, own(Magnitude), steps=4)  # one epoch
    weights = [w for n, w in module.named_parameters() if n.endswith("weight")]
    pruned = sum(int((weight == 0).sum()) for weight in weights)
    assert pruned == sum(weight.numel() for weight in weights) // 2
    with pytest.raises(ValueError, match="FORCE ranks weights by their saliency"):
        fit(tmp_path, own(FORCE), steps=4)


class Watch(lightning.Callback):
    """Scores by hand at the end of each epoch, before it is pruned, and the masks."""

    def __init__(self) -> None:
        self.scores: list[dict[str, Tensor]] = []
        self.masks: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pairs = chosen(pl_module)
        self.masks.append(get_masks(pl_module))
        scores = saliency(pl_module.net, loader(), "force", batches=2, parameters=pairs)
        self.scores.append({f"net.{name}": score for name, score in scores.items()})


def chosen(module: nn.Module) -> list[tuple[nn.Module, str]]:
    return [
        (part, "weight")
        for part in module.modules()
        if isinstance(part, nn.Conv2d | nn.Linear)
    ]


def test_lightnings_own_pruning_with_the_scores_that_a_method_needs(
    tmp_path: Path,
) -> None:
    class Chosen(SaliencyPruning):
        def filter_parameters_to_prune(self, parameters_to_prune: Any = ()) -> Any:
            return [
                pair
                for pair in parameters_to_prune
                if isinstance(pair[0], nn.Conv2d | nn.Linear)
            ]

    watch = Watch()
    callback = Chosen(
        "force",
        parameter_names=["weight"],
        amount=0.5,
        use_lottery_ticket_hypothesis=False,
        scoring={"batches": 2},
    )
    module, _ = fit(tmp_path, watch, callback, steps=8)  # two epochs
    final = {name: ~zero for name, zero in zeros(module).items()}
    before = {name: torch.ones_like(mask) for name, mask in final.items()}
    for scores, masks in zip(watch.scores, [watch.masks[1], final], strict=True):
        ranked = torch.cat(
            [s.masked_fill(~before[n], -torch.inf).flatten() for n, s in scores.items()]
        )
        kept = torch.cat([masks[n].flatten() for n in scores])
        left = int(sum(mask.sum() for mask in before.values()))
        assert int(kept.sum()) == left - round(left / 2)
        assert ranked[kept].min() >= ranked[~kept].max()
        before = masks


# ---- What training_step gets, in each way that Lightning has of handing it over. ----

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
        return outputs.float().square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch, batch_idx, self.training, self.trainer.training)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def rows(seed: int = 0, count: int = 12, **options: Any) -> DataLoader:
    numbers = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return DataLoader(numbers, **{"batch_size": 4, **options})


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


class FetchesItself(Small):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        batch, index, loader = next(dataloader_iter)
        return self.loss(batch, index, loader)


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
    mode = "min_size"

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
        return DataLoader([None, *rows()], batch_size=None)


class Streamed(Small):
    def train_dataloader(self) -> Any:
        class Stream(IterableDataset):
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


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


KINDS = pytest.mark.parametrize("kind", [0, 1], ids=["Force", "Saliency"])


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
        self.trainer.datamodule.seen.append(float(batch.sum()))
        self.trainer.noted = self.steps
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


def everything(trainer: lightning.Trainer, module: Busy) -> list[Any]:
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


# ---- Steps without a loss. ----


class Skips(Small):
    """Returns None for some batches, as a step does that finds a corrupt one."""

    skipped: tuple[int, ...] = (0,)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx in self.skipped:
            return None
        return self.loss(batch, batch_idx)


class SkipsTheRest(Small):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 2 else None


class SkipsWhatItFetches(Small):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        batch, index, _ = next(dataloader_iter)
        return None if index == 0 else self.loss(batch, index)


class Returns(Small):
    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.result(self.loss(batch))


class Manual(Small):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.calls += 1
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


@KINDS
@pytest.mark.parametrize(
    ("made", "skipped", "batches"),
    [
        (Skips, (0,), 1),
        (Skips, (1, 2), 2),
        (Skips, (0, 1), None),
        (SkipsTheRest, (2,), None),
        (SkipsWhatItFetches, (0,), None),
    ],
)
def test_batches_that_are_skipped_are_left_out(
    made: Any, skipped: tuple[int, ...], batches: int | None, kind: int
) -> None:
    module = made()
    module.skipped = skipped
    run(module, both(batches=batches)[kind])
    assert pruned(module) == 80
    given = [row for index, row in enumerate(rows()) if index not in skipped]
    assert all(any(torch.equal(seen[0], row) for row in given) for seen in SEEN)

    # The masks are those of these batches alone.
    if kind == 0:
        expected = made()
        force_prune(
            expected,
            given,
            0.5,
            steps=2,
            batches=batches,
            forward=lambda module, batch: module.loss(batch),
            progress=False,
        )
        masks = get_masks(expected)
        assert same(
            {n: p != 0 for n, p in module.named_parameters() if n in masks}, masks
        )


NOTHING = "training_step.*returned None for all 3"
MANUAL = "training_step: Manual has automatic_optimization=False.*forward=.*loss_fn="


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Returns(lambda loss: None), NOTHING),
        (lambda: Returns(lambda loss: {"a": loss, "b": 1}), "training_step.*'a', 'b'"),
        (lambda: Returns(lambda loss: {}), "training_step.*a dict with nothing"),
        (lambda: Returns(lambda loss: {"loss": 1.0}), "training_step.*loss a float"),
        (lambda: Returns(lambda loss: loss.expand(2)), r"training_step.*float32\(2,\)"),
        (lambda: Returns(lambda loss: loss.detach()), "training_step.*without a grad"),
        (lambda: Returns(lambda loss: [loss]), "training_step.*a list of 1"),
        (lambda: Returns(lambda loss: "loss"), "training_step.*a str"),
        (Manual, MANUAL),
    ],
)
def test_a_step_without_a_loss_is_one_clear_error(make: Any, said: str) -> None:
    module = make()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(BatchError, match=said):
        run(module, both()[0])
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert "log" not in vars(module)
    assert getattr(module, "calls", 0) == 0


@pytest.mark.parametrize(
    ("make", "said"),
    [(lambda: Returns(lambda loss: None), NOTHING), (Manual, MANUAL)],
)
def test_a_step_without_a_loss_is_one_clear_error_after_an_epoch(
    make: Any, said: str
) -> None:
    module = make()
    with pytest.raises(BatchError, match=said):
        run(module, both()[1])
    assert not pruned(module)
    assert getattr(module, "calls", 3) == 3


@KINDS
@pytest.mark.parametrize(
    "scoring",
    [
        {"forward": lambda module, batch: module.net(batch).square().mean()},
        {"forward": lambda module, batch: module.net(batch).sum(), "batches": None},
    ],
)
def test_another_loss_serves_where_the_step_has_none(
    scoring: dict[str, Any], kind: int
) -> None:
    module = Manual()
    run(module, both(**scoring)[kind])
    assert module.calls == 3
    assert len(SEEN) == 3  # training alone
    assert pruned(module) == 80


def test_a_method_without_a_loss_takes_any_step() -> None:
    for made in (Manual, FetchesItself):
        module = made()
        run(module, ForcePruning(0.5, method="magnitude", progress=False))
        assert pruned(module) == 80


def test_a_loader_that_is_read_once_is_said() -> None:
    class Once(Small):
        def train_dataloader(self) -> Any:
            return iter([*rows(count=40)])

    module = Once()
    with pytest.warns(UserWarning, match="can be read only once"):
        run(module, both()[0])
    assert pruned(module) == 80
    with (
        pytest.warns(UserWarning, match="can be read only once"),
        pytest.raises(BatchError, match="but there is none"),
    ):
        run(Once(), ForcePruning(0.5, batches=None, progress=False))


def test_training_that_ends_before_its_first_batch_prunes_nothing() -> None:
    callback = both()[0]
    with pytest.warns(UserWarning, match="nothing is pruned"):
        run(Small(), callback, max_epochs=0)
    assert callback.report is None


# ---- What ModelPruning does around it. ----


class Still(Small):
    """Is not changed by its steps.

    Lightning ranks by the weights before the last step, where they are pruned already.
    """

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def kept(module: nn.Module) -> dict[str, Tensor]:
    return {
        name.removesuffix("_orig"): parameter.detach().clone()
        for name, parameter in module.named_parameters()
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"amount": 0.3},
        {"amount": 7},
        {"amount": lambda epoch: 0.2 * epoch},
        {"apply_pruning": lambda epoch: epoch != 1},
        {"apply_pruning": False},
        {"parameter_names": ["weight"]},
        {"parameter_names": ["bias"], "amount": 2},
        {"use_lottery_ticket_hypothesis": lambda epoch: epoch == 0},
        {"make_pruning_permanent": False},
        {"verbose": 1},
        {"verbose": 2, "parameter_names": ["weight"]},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_by_magnitude_it_prunes_and_logs_as_model_pruning_does(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    found, lines = [], []
    options = {"use_lottery_ticket_hypothesis": False, **options}
    for made in (ModelPruning, SaliencyPruning):
        module = Still()
        method = Magnitude if made is ModelPruning else "magnitude"
        caplog.clear()
        with caplog.at_level(logging.INFO, "lightning.pytorch.callbacks.pruning"):
            run(module, made(method, **options), max_epochs=3)
        found.append(module.state_dict())
        # Lightning has no name for a class.
        lines.append(
            [m.replace("`None`", "`Magnitude`") for m in caplog.messages if "App" in m]
        )
    assert same(*({k: v.float() for k, v in state.items()} for state in found))
    assert lines[0] == lines[1]
    assert bool(lines[1]) == bool(options.get("verbose"))


@pytest.mark.parametrize("method", ["magnitude", "snip", "random"])
def test_each_tensor_by_itself(method: str) -> None:
    module = Small()
    callback = SaliencyPruning(
        method,
        use_global_unstructured=False,
        parameter_names=["weight"],
        amount=0.25,
        use_lottery_ticket_hypothesis=False,
    )
    run(module, callback, max_epochs=2)
    for part, left in ((module.net[0], 72), (module.net[2], 18)):  # of 128 and 32
        assert int(part.weight.count_nonzero()) == left


class Epochs(lightning.Callback):
    """Values and masks at the start of each epoch, and a copy of the module."""

    def __init__(self) -> None:
        self.values: list[dict[str, Tensor]] = []
        self.masks: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.values.append(kept(pl_module))
        self.masks.append(get_masks(pl_module))
        assert same(kept(copy.deepcopy(pl_module)), self.values[-1])


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_weights_are_set_back_as_often_as_they_are_pruned(precision: Any) -> None:
    module, epochs = Small(), Epochs()
    run(
        module,
        SaliencyPruning("snip", amount=0.2, parameter_names=["weight"]),
        epochs,
        max_epochs=4,
        precision=precision,
    )
    assert len({int(mask["net.0.weight"].sum()) for mask in epochs.masks[1:]}) == 3
    for values in epochs.values:
        for name in ("net.0.weight", "net.2.weight"):
            assert torch.equal(values[name], epochs.values[0][name])
    assert module.net[0].weight.dtype == epochs.values[0]["net.0.weight"].dtype


def test_the_weights_are_resampled() -> None:
    module, epochs = Small(), Epochs()
    callback = SaliencyPruning(
        "snip", parameter_names=["weight"], resample_parameters=True
    )
    run(module, callback, epochs, max_epochs=3)
    one, other = (values["net.0.weight"] for values in epochs.values[1:])
    assert not torch.equal(one, other)
    assert not torch.equal(one, epochs.values[0]["net.0.weight"])


@pytest.mark.parametrize("lottery", [False, True])
def test_a_checkpoint_goes_on_with_masks_and_initial_values(
    tmp_path: Path, lottery: bool
) -> None:
    def callbacks(module: Small) -> list[Any]:
        return [
            SaliencyPruning(
                method,
                parameters_to_prune=[(module.net[number], "weight")],
                amount=0.3,
                use_lottery_ticket_hypothesis=lottery,
            )
            for number, method in ((0, "snip"), (2, "magnitude"))
        ]

    straight, epochs = Small(), Epochs()
    run(straight, *callbacks(straight), epochs, max_epochs=4)
    first = Small()
    saves = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    options = {"default_root_dir": tmp_path, "enable_checkpointing": True}
    run(first, *callbacks(first), saves, max_epochs=2, **options)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == Small().state_dict().keys()

    resumed, watch = Small(), Epochs()
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.add_(1)  # another initialisation
    run(
        resumed, *callbacks(resumed), watch, max_epochs=4, resume=tmp_path / "last.ckpt"
    )
    assert watch.masks[0].keys() == {"net.0.weight", "net.2.weight"}
    for ours, theirs in zip(watch.masks, epochs.masks[2:], strict=True):
        assert same(ours, theirs)
    assert same(resumed.state_dict(), straight.state_dict())


def test_names_with_mask_in_them_can_be_saved(tmp_path: Path) -> None:
    class Masked(Small):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("attention_mask", torch.ones(2))
            self.my_mask_net = self.net

    module = Masked()
    callback = SaliencyPruning("magnitude", parameter_names=["weight"])
    saves = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    run(module, callback, saves, enable_checkpointing=True, default_root_dir=tmp_path)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert same(saved, module.state_dict())
    assert int((saved["my_mask_net.0.weight"] == 0).sum()) > 0


def test_a_pruned_module_can_be_tested_and_fitted_again() -> None:
    class Tested(Small):
        def test_dataloader(self) -> Any:
            return rows()

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.loss(batch)

    module = Tested()
    callback = SaliencyPruning(
        "snip", parameter_names=["weight"], make_pruning_permanent=False
    )
    trainer = run(module, callback)
    trainer.test(module, verbose=False)
    assert pruned(module) == 80
    assert get_masks(module)
    run(module, callback)
    assert pruned(module) == 120


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pruning_dim": 0}, "SNIP prunes single weights, without pruning_dim"),
        ({"pruning_dim": 0, "pruning_norm": 1}, "pruning_dim and pruning_norm"),
        ({"parameter_names": ["chocolate"]}, "chocolate isn't in"),
        ({"verbose": 3}, "must be any of"),
        ({"amount": "half"}, "`amount` should be provided"),
    ],
)
def test_a_wrong_option_is_an_error(options: dict[str, Any], said: str) -> None:
    with pytest.raises(MisconfigurationException, match=said):
        SaliencyPruning("snip", **options)


@pytest.mark.parametrize(
    ("amount", "said"), [(1000, "amount: 1000 weights to remove"), (1.5, "amount")]
)
def test_a_wrong_amount_is_an_error_and_prunes_nothing(amount: Any, said: str) -> None:
    module = Small()
    callback = SaliencyPruning("snip", amount=amount, parameter_names=["weight"])
    with pytest.raises(ValueError, match=said):
        run(module, callback)
    assert not get_masks(module)


# ---- Averages, and what else callbacks have copied by then. ----


class OwnAverage(lightning.Callback):
    """A copy that is made by a hook, and moves towards the module."""

    def __init__(self, hook: str, copied: Any) -> None:
        self.copied: Any = None
        setattr(self, hook, lambda trainer, module: self.start(copied(module)))

    def start(self, copied: Any) -> None:
        self.copied = copied

    def tensors(self) -> dict[str, Tensor]:
        held = self.copied
        held = held.state_dict() if isinstance(held, nn.Module) else held
        return {name.removeprefix("module."): value for name, value in held.items()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
        for name, value in self.tensors().items():
            value.lerp_(pl_module.state_dict()[name].to(value), 0.1)


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize(
    "hook", ["on_fit_start", "on_train_start", "on_train_epoch_start"]
)
@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda module: copy.deepcopy(module).double(),
        lambda module: {n: p.clone() for n, p in module.state_dict().items()},
        lambda module: nn.ModuleDict({"module": copy.deepcopy(module)}),
    ],
    ids=["module", "double", "state", "wrapped"],
)
def test_copies_of_other_callbacks_have_the_zeros(
    copied: Any, hook: str, ours_first: bool
) -> None:
    module, average = Small(), OwnAverage(hook, copied)
    callbacks = [both()[0], average]
    run(module, *(callbacks if ours_first else callbacks[::-1]))
    assert pruned(module) == 80
    for name, value in average.tensors().items():
        zero = module.state_dict()[name] == 0
        assert torch.equal(value == 0, zero)


@pytest.mark.parametrize(
    "average",
    [
        lambda: EMAWeightAveraging(decay=0.9),
        lambda: EMAWeightAveraging(decay=0.9, update_starting_at_step=4),
        lambda: StochasticWeightAveraging(0.1, swa_epoch_start=1),
        lambda: StochasticWeightAveraging(0.1, swa_epoch_start=0.5),
    ],
)
@pytest.mark.parametrize("ours_first", [True, False])
def test_lightnings_averages_have_the_zeros(average: Any, ours_first: bool) -> None:
    class Validated(Small):
        def val_dataloader(self) -> Any:
            return rows(9)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.global_step:
                VALIDATED.append(pruned(self))

    VALIDATED.clear()
    module = Validated()
    callbacks = [both()[0], average()]
    run(module, *(callbacks if ours_first else callbacks[::-1]), max_epochs=3)
    assert pruned(module) == 80
    assert set(VALIDATED) == {80}


VALIDATED: list[int] = []
