"""Forms of a model, their training, and checks of losses and zeros."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from io import BytesIO
from typing import Any

import timm
import timm.optim
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune
from torch.optim.optimizer import Optimizer

from force_plugin import (
    apply_masks,
    force_prune,
    get_masks,
    load_pruned_state_dict,
    make_permanent,
)
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
    """Return an optimizer with weight decay, which could revive pruned weights."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Optimizer = timm.optim.create_optimizer_v2(
        trained, name, lr=OPTIMIZERS[name], weight_decay=0.01
    )
    return optimizer


def steps(run: Run, optimizer: Optimizer, inputs: Tensor, targets: Tensor) -> Losses:
    """Train in the usual way, and return the losses."""
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
    """Return the module that owns a tensor, and the tensor's name in the module."""
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
    """A form of the model: dense, or pruned in one of several ways.

    Args:
        masks: Masks by parameter name; empty for a dense model.
        batch: Batch that the model is trained on.
        prune: Turns a dense model into this form.
        load: Loads a state dict of this form into a dense model.
        hold: Turns a dense model with pruned zeros into this form.
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
        """Return a new model in this form; all are equal."""
        model = dense()
        self.prune(model)
        return model

    def train(self, model: nn.Module, run: Run | None = None, **options: Any) -> None:
        """Take a few steps, and compare them with a model masked by hand."""
        Training(self, model).go_on(run, **options)

    def alike(self, loop: Callable[[nn.Module], Losses], atol: float = 1e-5) -> None:
        """Check that a training loop gives equal losses for a model masked by hand."""
        model = self.build()
        losses = loop(model)
        self.check(model)
        compare(losses, loop(ByHand(dense(), self.masks)), atol)

    def check(self, model: nn.Module, masks: Masks | None = None) -> None:
        """Raise unless pruned weights are 0 in use, and all ranks have equal zeros."""
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
    """The training of a model, and of a dense model that is masked by hand.

    Args:
        case: The form of the model.
        model: A model in this form, or a dense model that will get this form.
        name: Name of the optimizer.
        start: The dense model that ``model`` was made from. Default: ``dense()``.
        masks: The masks of ``model``. Default: the masks of ``case``.
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
        """Take a few steps of both models, and check losses and zeros."""
        own, by_hand = self.optimizers
        rank = dist.get_rank() if dist.is_initialized() else 0
        ranks = len(of_all_ranks(rank))
        part = [tensor[rank::ranks] for tensor in self.case.batch]
        self.model.train()
        losses = steps(self.model if run is None else run, own, *part)
        self.case.check(self.model, self.by_hand.masks)
        expected = steps(self.by_hand, by_hand, *self.case.batch)
        mean = torch.tensor(of_all_ranks(losses)).mean(0).tolist()
        # Muon computes in bfloat16, so the order of sums over ranks changes the loss.
        compare(mean, expected, 2e-3 if ranks > 1 and self.name == "muon" else atol)
        return self

    def go_on_with(self, model: nn.Module) -> Training:
        """Continue with another model, and the state of the optimizer."""
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
    """Return a decorator that adds a function to the table."""
    return lambda function: ROWS.setdefault(label, function)


def on_two_ranks(function: Row) -> Row:
    """Mark a function of the table to run in two processes."""
    ON_TWO_RANKS.add(function.__name__)
    return function
