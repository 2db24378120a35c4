"""The callback for Lightning, in a real trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from lightning_modules import (
    KINDS,
    SEEN,
    FetchesItself,
    Small,
    both,
    pruned,
    rows,
    run,
)
from networks import tiny_resnet
from state import same
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from force_plugin import FORCE, Magnitude, force_prune, get_masks, saliency
from force_plugin.errors import BatchError
from force_plugin.lightning import ForcePruning, SaliencyPruning
from force_plugin.zoo import digits

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


def loader() -> DataLoader[Any]:
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


def test_the_callback_prunes_as_force_prune_does_on_the_training_loss(
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = {"method": "snip", "batches": 2, "progress": False}
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
    expected: Any = Classifier()
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
