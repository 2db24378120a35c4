"""The callback for Lightning, in a real trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import tiny_resnet
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from force_plugin import FORCE, Magnitude, force_prune, get_masks, saliency
from force_plugin.zoo import digits

lightning = pytest.importorskip("lightning", reason="needs pip install lightning")

from lightning.pytorch.callbacks import ModelPruning  # noqa: E402

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
