"""What ModelPruning does around a pruning, and the copies of other callbacks."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning_modules import Small, both, pruned, rows, run
from state import same
from torch import Tensor, nn

from force_plugin import Magnitude, get_masks
from force_plugin.lightning import SaliencyPruning

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint"),
]


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
    # PyTorch's prune.remove changes the order.
    ours, theirs = ({k: s[k].float() for k in sorted(s)} for s in found)
    assert same(ours, theirs)
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
    state = module.state_dict()
    ours, theirs = ({k: s[k] for k in sorted(s)} for s in (saved, state))
    assert same(ours, theirs)
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
