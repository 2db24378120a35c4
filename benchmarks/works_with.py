"""What people do with a model: does it still work when the model is pruned?

    python benchmarks/works_with.py                              # print the table
    python benchmarks/works_with.py --table docs/works-with-table.md

Each row is run with a dense model, with the same model pruned by plain
``torch.nn.utils.prune``, with ours as ``force_prune`` leaves it, and with ours after
``make_permanent``. It works if nothing is raised, every loss is that of a dense model
whose weights are multiplied by the masks by hand (``atol`` below), and what is pruned
is 0 whenever it is used. What needs several processes has two, with half of the batch
each. A row of a package that is not installed says so.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import pickle
import platform
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import date, timedelta
from functools import partial
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import timm
import timm.layers
import timm.optim
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, prune
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.optimizer import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from force_plugin import (
    apply_masks,
    force_prune,
    get_masks,
    load_pruned_state_dict,
    make_permanent,
)
from force_plugin.files import write_whole
from force_plugin.zoo import digits, load_data

Batch = tuple[Tensor, Tensor]
Masks = dict[str, Tensor]
Losses = list[float]
Run = Callable[[Tensor], Any]

NAME, SIZE, STEPS = "test_vit", 32, 4
# Learning rates of SGD with momentum, AdamW, Lion and Muon, by timm's names for them.
OPTIMIZERS = {"momentum": 0.05, "adamw": 1e-3, "lion": 3e-4, "muon": 0.01}


def dense() -> Any:
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=10, img_size=SIZE)


def make_optimizer(model: nn.Module, name: str = "momentum") -> Optimizer:
    """Decay and momentum would revive what is pruned, if anything did."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Optimizer = timm.optim.create_optimizer_v2(
        trained, name, lr=OPTIMIZERS[name], weight_decay=0.01
    )
    return optimizer


def steps(run: Run, optimizer: Optimizer, inputs: Tensor, targets: Tensor) -> Losses:
    """Train as everybody does."""
    losses = []
    for _ in range(STEPS):
        loss = cross_entropy(run(inputs).float(), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def compare(losses: Losses, by_hand: Losses, atol: float = 1e-5) -> None:
    if not torch.allclose(torch.tensor(losses), torch.tensor(by_hand), atol=atol):
        raise AssertionError(f"losses {losses}, by hand {by_hand}")


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has a tensor, and its name there."""
    path, _, tensor = name.rpartition(".")
    return model.get_submodule(path), tensor


def of_all_ranks(thing: Any) -> list[Any]:
    if not dist.is_initialized():
        return [thing]
    things = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things


def through_a_file(thing: Any, weights_only: bool = True) -> Any:
    file = BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


class ByHand(nn.Module):
    """A dense model whose weights are multiplied by masks in every forward."""

    def __init__(self, model: nn.Module, masks: Masks) -> None:
        super().__init__()
        self.model, self.masks = model, masks

    def forward(self, inputs: Tensor) -> Any:  # noqa: D102
        lent = {
            name: p * self.masks[name] if name in self.masks else p
            for name, p in self.model.named_parameters()
        }
        return functional_call(self.model, lent, (inputs,))


class Case:
    """One kind of model.

    Args:
        masks: What is pruned; nothing in a dense model.
        batch: What it is trained on.
        prune: Makes one of a dense model.
        load: Loads a state dict of such a model into a dense one.
        hold: Makes one of a dense model whose zeros come from a pruning.
    """

    def __init__(
        self,
        masks: Masks,
        batch: Batch,
        prune: Callable[[nn.Module], object] = lambda model: None,
        load: Callable[[nn.Module, Any], object] = nn.Module.load_state_dict,
        hold: Callable[[nn.Module], object] = lambda model: None,
    ) -> None:
        self.masks, self.batch, self.inputs = masks, batch, batch[0]
        self.prune, self.load, self.hold = prune, load, hold

    def build(self) -> Any:
        """The same model again and again."""
        model = dense()
        self.prune(model)
        return model

    def train(self, model: nn.Module, run: Run | None = None, **options: Any) -> None:
        """Take a few steps beside the model that is masked by hand."""
        Training(self, model).go_on(run, **options)

    def alike(self, loop: Callable[[nn.Module], Losses], atol: float = 1e-5) -> None:
        """A loop that trains whatever it is given must not see a difference."""
        model = self.build()
        losses = loop(model)
        self.check(model)
        compare(losses, loop(ByHand(dense(), self.masks)), atol)

    def check(self, model: nn.Module, masks: Masks | None = None) -> None:
        """What is pruned must be 0 when it is used, and the same on all ranks."""
        masks = self.masks if masks is None else masks
        zeros: Masks = {}

        def look(module: nn.Module, args: Any, *, name: str, tensor: str) -> None:
            zeros[name] = getattr(module, tensor).detach() == 0

        hooks = []
        for name in masks:
            module, tensor = owner(model, name)
            hook = partial(look, name=name, tensor=tensor)
            hooks.append(module.register_forward_pre_hook(hook))
        model.eval()(self.inputs.to(next(model.parameters()).dtype))
        for handle in hooks:
            handle.remove()
        if any(not zeros[name][~mask].all() for name, mask in masks.items()):
            raise AssertionError("what was pruned has come back to life")
        for others in of_all_ranks(zeros):
            if any(not torch.equal(others[name], zeros[name]) for name in zeros):
                raise AssertionError("the ranks have other zeros")


class Training:
    """A model in training, and beside it a dense one that is masked by hand.

    Args:
        case: The kind of model.
        model: One of them, or a dense one that is to become one.
        name: Its optimizer.
        start: The dense model that it was made of, where it is another than usual.
        masks: What is pruned in it, where it is not what is in all of its kind.
    """

    def __init__(
        self,
        case: Case,
        model: nn.Module,
        name: str = "momentum",
        start: nn.Module | None = None,
        masks: Masks | None = None,
    ) -> None:
        self.case, self.model, self.name = case, model, name
        self.by_hand = ByHand(start or dense(), case.masks if masks is None else masks)
        self.optimizers = [make_optimizer(m, name) for m in (model, self.by_hand)]

    def go_on(self, run: Run | None = None, atol: float = 1e-5) -> Training:
        """A few steps of both: the same losses, and zeros."""
        own, by_hand = self.optimizers
        rank = dist.get_rank() if dist.is_initialized() else 0
        ranks = len(of_all_ranks(rank))
        part = [tensor[rank::ranks] for tensor in self.case.batch]
        self.model.train()
        losses = steps(self.model if run is None else run, own, *part)
        self.case.check(self.model, self.by_hand.masks)
        expected = steps(self.by_hand, by_hand, *self.case.batch)
        mean = torch.tensor(of_all_ranks(losses)).mean(0).tolist()
        # Muon computes in bfloat16: it shows in which order the ranks are added up.
        compare(mean, expected, 2e-3 if ranks > 1 and self.name == "muon" else atol)
        return self

    def go_on_with(self, model: nn.Module) -> Training:
        """With another model, and what the optimizer remembers."""
        optimizer = make_optimizer(model, self.name)
        optimizer.load_state_dict(through_a_file(self.optimizers[0].state_dict()))
        self.model, self.optimizers[0] = model, optimizer
        return self.go_on()


def first_batch() -> Batch:
    loader = load_data(dense(), digits()[0], image_size=SIZE, batch_size=8)
    batch: Batch = next(iter(loader))
    return batch


def masks_by_force() -> Masks:
    model = dense()
    loader = load_data(model, digits()[0], image_size=SIZE, batch_size=8)
    force_prune(model, loader, 0.8, steps=5, progress=False)
    return get_masks(model)


def forms(masks: Masks, batch: Batch) -> dict[str, Case]:
    def plain(model: nn.Module) -> None:
        for name, mask in masks.items():
            prune.custom_from_mask(*owner(model, name), mask)

    def ours(model: nn.Module) -> None:
        apply_masks(model, masks)

    def permanent(model: nn.Module) -> None:
        ours(model)
        make_permanent(model)

    def load_permanent(model: nn.Module, state: Any) -> None:
        model.load_state_dict(state)
        make_permanent(model)

    hold = make_permanent
    return {
        "dense": Case({}, batch),
        "torch.nn.utils.prune": Case(masks, batch, plain),
        "ours": Case(masks, batch, ours, load_pruned_state_dict, hold),
        "ours, permanent": Case(masks, batch, permanent, load_permanent, hold),
    }


Row = Callable[[Case], None]
ROWS: dict[str, Row] = {}
ON_TWO_RANKS: set[str] = set()


def row(label: str) -> Callable[[Row], Row]:
    """Add a function to the table."""
    return lambda function: ROWS.setdefault(label, function)


def on_two_ranks(function: Row) -> Row:
    """Run a function of the table in two processes."""
    ON_TWO_RANKS.add(function.__name__)
    return function


# Optimizers.


@row("training with SGD with momentum, AdamW, Lion and Muon")
def trains(case: Case) -> None:
    for name in OPTIMIZERS:
        Training(case, case.build(), name).go_on()


@row("pruned in the middle of training with each of these four")
def prunes_midway(case: Case) -> None:
    for name in OPTIMIZERS:
        training = Training(case, dense(), name, masks={}).go_on()
        case.prune(training.model)
        training.by_hand.masks = case.masks
        training.go_on()


@row("every optimizer of `torch.optim`, new or with momentum from before")
def steps_of_torch(case: Case) -> None:
    for name in torch.optim.__all__:
        kind = getattr(torch.optim, name)
        # SparseAdam is for gradients that are sparse tensors.
        if isinstance(kind, type) and name not in ("Optimizer", "SparseAdam"):
            stays_zero(case, partial(make_of_torch, kind))


def make_of_torch(kind: Any, model: nn.Module) -> Optimizer:
    matrices_only = kind.__name__ == "Muon"
    some = [p for p in model.parameters() if p.ndim == 2 or not matrices_only]
    optimizer: Optimizer = kind(some, lr=0.01)
    return optimizer


@row("every optimizer of timm's factory, new or with momentum from before")
def steps_of_timm(case: Case) -> None:
    make = timm.optim.create_optimizer_v2
    for name in timm.optim.list_optimizers():
        # The others need a package for GPUs; Kron compiles itself for minutes.
        info = timm.optim.get_optimizer_info(name)
        if not isinstance(info.opt_class, str) and "kron" not in name:
            stays_zero(case, partial(make, opt=name, lr=0.01, weight_decay=0.05))


def stays_zero(case: Case, make: Callable[..., Optimizer]) -> None:
    model = case.build()
    optimizer = make(model)
    for _ in range(2):
        step_by_closure(case, model, optimizer)
    case.check(model)

    model = dense()
    optimizer = make(model)
    step_by_closure(case, model, optimizer)
    case.prune(model)
    for _ in range(2):
        step_by_closure(case, model, optimizer)
    case.check(model)


def step_by_closure(case: Case, model: nn.Module, optimizer: Optimizer) -> None:
    twice = getattr(optimizer, "is_second_order", False)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(case.inputs), case.batch[1])
        loss.backward(create_graph=twice)
        return loss

    optimizer.step(closure)


@row("parameters in the dense model's order (what optimizer checkpoints go by)")
def keeps_order(case: Case) -> None:
    names = [name.removesuffix("_orig") for name, _ in case.build().named_parameters()]
    if names != [name for name, _ in dense().named_parameters()]:
        raise AssertionError("another order")


# Copies, averages, files.


@row("`copy.deepcopy`")
def copies(case: Case) -> None:
    case.train(copy.deepcopy(case.build()))


@row("`copy.deepcopy` in the middle of training, the copy trains on")
def copies_midway(case: Case) -> None:
    for name in OPTIMIZERS:
        training = Training(case, case.build(), name).go_on()
        training.go_on_with(copy.deepcopy(training.model))


@row("pickle")
def pickles(case: Case) -> None:
    case.train(pickle.loads(pickle.dumps(case.build())))


@row("`torch.save` and `torch.load` of the module, then `copy.deepcopy`")
def saves_module(case: Case) -> None:
    model = through_a_file(case.build(), weights_only=False)
    case.train(copy.deepcopy(model))


@row("`torch.save` and `torch.load(weights_only=True)` of the state dict")
def saves_state(case: Case) -> None:
    model = doubled(case.build())
    model.load_state_dict(through_a_file(case.build().state_dict()))
    case.train(model)


@row("restart: the state dicts into a fresh model (ours: `load_pruned_state_dict`)")
def restarts(case: Case) -> None:
    for name in OPTIMIZERS:
        training = Training(case, case.build(), name).go_on()
        fresh = doubled(dense())
        case.load(fresh, through_a_file(training.model.state_dict()))
        training.go_on_with(fresh)


@row("restart from a plain state dict, by `prune.remove` (ours: `make_permanent`)")
def restarts_plain(case: Case) -> None:
    for name in OPTIMIZERS:
        training = Training(case, case.build(), name).go_on()
        remove(case, training.model)
        fresh = doubled(dense())
        fresh.load_state_dict(through_a_file(training.model.state_dict()))
        case.hold(fresh)
        Training(case, fresh, name, start=training.by_hand.model).go_on()


def doubled(model: nn.Module) -> nn.Module:
    """With other values, which a state dict is to replace."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


def remove(case: Case, model: nn.Module) -> None:
    for name in case.masks:
        module, tensor = owner(model, name)
        if hasattr(module, f"{tensor}_orig"):
            prune.remove(module, tensor)


@row("timm's `ModelEmaV3`")
def averages_ema(case: Case) -> None:
    is_averaged(case, partial(ModelEmaV3, decay=0.5), ModelEmaV3.update)


@row("`swa_utils.AveragedModel`")
def averages_swa(case: Case) -> None:
    is_averaged(case, AveragedModel, AveragedModel.update_parameters)


@row("`swa_utils.AveragedModel(use_buffers=True)`")
def averages_buffers(case: Case) -> None:
    make = partial(AveragedModel, use_buffers=True)
    is_averaged(case, make, AveragedModel.update_parameters)


def is_averaged(
    case: Case, make: Callable[..., Any], update: Callable[[Any, Any], object]
) -> None:
    for name in OPTIMIZERS:
        training = Training(case, case.build(), name)
        models = (training.model, training.by_hand)
        averages = [make(model) for model in models]
        for _ in range(2):
            training.go_on()
            for average, model in zip(averages, models, strict=True):
                update(average, model)
        case.check(averages[0].module)
        outputs = [average.module.eval()(case.inputs) for average in averages]
        torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


# The forward pass.


@row("`torch.compile(fullgraph=True)`")
def compiles(case: Case) -> None:
    torch._dynamo.reset()
    model = case.build()
    case.train(model, torch.compile(model, fullgraph=True))


@row("gradient checkpointing, `set_grad_checkpointing`")
def checkpoints(case: Case) -> None:
    model = case.build()
    model.set_grad_checkpointing()
    case.train(model)


@row("autocast in bfloat16")
def autocasts_bfloat16(case: Case) -> None:
    model = case.build()
    case.train(model, torch.autocast("cpu", torch.bfloat16)(model), atol=0.05)


@row("autocast in float16 with a `GradScaler`")
def autocasts_float16(case: Case) -> None:
    def loop(model: nn.Module) -> Losses:
        optimizer, scaler = make_optimizer(model), torch.amp.GradScaler("cpu")
        losses = []
        for _ in range(STEPS):
            with torch.autocast("cpu", torch.float16):
                loss = cross_entropy(model(case.inputs), case.batch[1])
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        return losses

    case.alike(loop, atol=0.05)


@row("`.to(dtype)`, there and back")
def changes_type(case: Case) -> None:
    model = case.build().to(torch.float64)
    model(case.inputs.double())
    case.train(model.to(torch.float32))


@row("`.to(device)` and `.to_empty`")
def changes_device(case: Case) -> None:
    model = case.build().to("meta").to_empty(device="cpu")
    model.load_state_dict(case.build().state_dict())
    case.train(model)


@row("channels-last")
def channels_last(case: Case) -> None:
    model, form = case.build(), torch.channels_last
    model.to(memory_format=form)
    case.train(model, lambda inputs: model(inputs.contiguous(memory_format=form)))


@row("`torch.export`")
def exports(case: Case) -> None:
    model = case.build().eval()
    exported = torch.export.export(model, (case.inputs,))
    torch.testing.assert_close(exported.module()(case.inputs), model(case.inputs))


@row("`torch.jit.trace`")
def is_traced(case: Case) -> None:
    model = case.build().eval()
    traced = torch.jit.trace(model, case.inputs)
    torch.testing.assert_close(traced(case.inputs), model(case.inputs))


def scripted(model: nn.Module, inputs: Tensor) -> None:
    model.eval()
    script = torch.jit.script(model)
    torch.testing.assert_close(script(inputs), model(inputs))


@row("`torch.jit.script`")
def is_scripted(case: Case) -> None:
    with timm.layers.set_scriptable(True):
        model = case.build()
    scripted(model, case.inputs)


@row("`torch.jit.script` after `prune.remove`")
def is_scripted_once_removed(case: Case) -> None:
    with timm.layers.set_scriptable(True):
        model = case.build()
    for module in model.modules():
        if isinstance(module, nn.Module) and hasattr(module, "weight_mask"):
            prune.remove(module, "weight")
    scripted(model, case.inputs)


@row("ONNX export")
def exports_onnx(case: Case) -> None:
    from onnx.reference import ReferenceEvaluator

    model = case.build().eval()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        torch.onnx.export(model, (case.inputs,), path, dynamo=True, verbose=False)
        session = ReferenceEvaluator(path)
        (outputs,) = session.run(None, {session.input_names[0]: case.inputs.numpy()})
    expected = model(case.inputs)
    torch.testing.assert_close(torch.tensor(outputs), expected, atol=1e-3, rtol=1e-3)


@row("`torch.func.functional_call`, then `copy.deepcopy`")
def calls_functionally(case: Case) -> None:
    model = case.build()
    lent = {name: 2 * p for name, p in model.named_parameters()}
    functional_call(model, lent, (case.inputs,)).sum().backward()
    case.train(copy.deepcopy(model))


@row("an ensemble by `torch.func.vmap`, then `copy.deepcopy`")
def runs_ensembles(case: Case) -> None:
    models = [case.build().eval() for _ in range(2)]
    parameters, buffers = stack_module_state(models)

    def run(parameters: Any, buffers: Any) -> Any:
        return functional_call(models[0], (parameters, buffers), (case.inputs,))

    outputs = vmap(run, randomness="different")(parameters, buffers)
    expected = models[1](case.inputs)
    torch.testing.assert_close(outputs[1], expected, atol=1e-4, rtol=1e-4)
    copy.deepcopy(models[0])


# Training.


@row("frozen but for its head, `train()` and `eval()` in turns")
def is_frozen(case: Case) -> None:
    model, start = case.build(), dense()
    for one in (model, start):
        one.requires_grad_(False)
        one.get_classifier().requires_grad_(True)
    training = Training(case, model, start=start)
    for _ in range(2):
        training.go_on()


@row("`reset_classifier`, then pruned")
def resets_classifier(case: Case) -> None:
    model, start = dense(), dense()
    for one in (model, start):
        torch.manual_seed(1)
        one.reset_classifier(10)
    case.prune(model)
    Training(case, model, start=start).go_on()


@row("gradient accumulation")
def accumulates(case: Case) -> None:
    def loop(model: nn.Module) -> Losses:
        optimizer, losses = make_optimizer(model), []
        for _ in range(STEPS):
            optimizer.zero_grad()
            for half in (slice(0, 4), slice(4, 8)):
                inputs, targets = (tensor[half] for tensor in case.batch)
                loss = cross_entropy(model(inputs), targets) / 2
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
        return losses

    case.alike(loop)


@row("gradients clipped by their norm")
def clips(case: Case) -> None:
    def loop(model: nn.Module) -> Losses:
        optimizer, norms = make_optimizer(model), []
        for _ in range(STEPS):
            optimizer.zero_grad()
            cross_entropy(model(case.inputs), case.batch[1]).backward()
            norms.append(clip_grad_norm_(model.parameters(), 0.1).item())
            optimizer.step()
        return norms

    case.alike(loop, atol=1e-4)


# Pruning further.


@row("pruned again by `force_prune`, to 90 %")
def prunes_again(case: Case) -> None:
    model = case.build()
    Training(case, model, masks=prune_more(case, model)).go_on()


@row("pruned again by `prune.global_unstructured(amount=0.5)`")
def prunes_again_by_hand(case: Case) -> None:
    model = case.build()
    prune.global_unstructured(linear_weights(model), prune.L1Unstructured, amount=0.5)
    Training(case, model, masks=only_more(case, model)).go_on()


@row("`prune.remove`, then pruned again by `force_prune`")
def prunes_removed(case: Case) -> None:
    model = case.build()
    remove(case, model)
    Training(case, model, masks=prune_more(case, model)).go_on()


@row("pruned again in the middle of training, the optimizer goes on")
def prunes_gradually(case: Case) -> None:
    for name in OPTIMIZERS:
        training = Training(case, case.build(), name).go_on()
        training.by_hand.masks = prune_more(case, training.model)
        training.go_on()


def prune_more(case: Case, model: nn.Module) -> Masks:
    force_prune(model, [case.batch], 0.9, steps=2, progress=False)
    return only_more(case, model)


def only_more(case: Case, model: nn.Module) -> Masks:
    masks = get_masks(model)
    if any((masks[name] & ~mask).any() for name, mask in case.masks.items()):
        raise AssertionError("the new masks keep what was pruned before")
    return masks


def linear_weights(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(m, "weight") for m in model.modules() if isinstance(m, nn.Linear)]


# Several processes.


@row("`nn.DataParallel`")
def runs_data_parallel(case: Case) -> None:
    model = case.build()
    case.train(model, nn.DataParallel(model))


@row("`DistributedDataParallel`, two processes")
@on_two_ranks
def runs_distributed(case: Case) -> None:
    for name in OPTIMIZERS:
        training = Training(case, case.build(), name)
        training.go_on(DistributedDataParallel(training.model))


@row("FSDP2, `fully_shard`, two processes")
@on_two_ranks
def is_sharded(case: Case) -> None:
    for name in OPTIMIZERS:
        model = case.build()
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        Training(case, model, name).go_on()


# Trainers.


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


def outcome(function: Row, case: Case) -> str:
    """``works``, ``not installed``, or the error in one line."""
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            function(case)
    except ModuleNotFoundError:
        return "not installed"
    except Exception as error:
        said = f"{type(error).__name__}: {error}".replace("`", "")
        return textwrap.shorten(said, 200)
    return "works"


def outcomes(function: Row, masks: Masks, batch: Batch) -> list[str]:
    """Of each form of the model."""
    if function.__name__ not in ON_TWO_RANKS or dist.is_initialized():
        return [outcome(function, case) for case in forms(masks, batch).values()]
    with tempfile.TemporaryDirectory() as folder:
        arguments = (function, masks, batch, Path(folder))
        torch.multiprocessing.spawn(run_rank, arguments, nprocs=2)
        return json.loads(Path(folder, "outcomes").read_text())


def run_rank(
    rank: int, function: Row, masks: Masks, batch: Batch, folder: Path
) -> None:
    """What each of two processes does."""
    prepare()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    of_ranks = of_all_ranks(outcomes(function, masks, batch))
    pairs = zip(*of_ranks, strict=True)
    cells = [first if first != "works" else second for first, second in pairs]
    if rank == 0:
        Path(folder, "outcomes").write_text(json.dumps(cells))
    dist.destroy_process_group()


def prepare() -> None:
    # The fused kernels have no second derivative, which some optimizers want.
    timm.layers.set_fused_attn(False)
    # Trainers tell what hardware they find.
    logging.disable(logging.WARNING)


def in_markdown(kinds: list[str], results: dict[str, list[str]]) -> str:
    errors: list[str] = []
    lines = [f"| | {' | '.join(kinds)} |", f"|---|{'---|' * len(kinds)}"]
    for label, cells in results.items():
        known = ("works", "not installed", *errors)
        errors += [cell for cell in dict.fromkeys(cells) if cell not in known]
        shown = [f"breaks ({errors.index(c) + 1})" if c in errors else c for c in cells]
        lines.append(f"| {label} | {' | '.join(shown)} |")
    works = [str(cells.count("works")) for cells in zip(*results.values(), strict=True)]
    lines += [f"| **of {len(results)}, work** | {' | '.join(works)} |", ""]
    lines += [f"{number}. {error}" for number, error in enumerate(errors, start=1)]
    lines += [
        "",
        f"timm's `{NAME}`, FORCE at 80 %. torch {torch.__version__}, timm "
        f"{timm.__version__}, {platform.machine()}, {date.today()}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [function.__name__ for function in ROWS.values()]
    parser.add_argument(
        "--rows", nargs="+", choices=names, metavar="NAME", help="only these functions"
    )
    parser.add_argument("--table", type=Path, help="also write the table, in Markdown")
    args = parser.parse_args()

    prepare()
    masks, batch = masks_by_force(), first_batch()
    results = {}
    for label, function in ROWS.items():
        if args.rows is None or function.__name__ in args.rows:
            print(f"{function.__name__:24}", end="", flush=True, file=sys.stderr)
            results[label] = outcomes(function, masks, batch)
            print(*(f"{cell[:13]:14}" for cell in results[label]), file=sys.stderr)
    table = in_markdown(list(forms(masks, batch)), results)
    print(table)
    if args.table:
        write_whole(args.table, table.encode())


if __name__ == "__main__":
    main()
