"""Scoring leaves no trace, and a pruning that fails leaves none either."""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from kinds_of_methods import ITERATIVE, WITH_LOSS, WITH_PASSES
from state import differences, process_state, state_of, unchanged
from torch import Tensor, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.nn.functional import cross_entropy
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.utils import prune
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from force_plugin import (
    apply_masks,
    compact,
    diagnose,
    force_prune,
    saliency,
    snap_prune,
)
from force_plugin.hold import save_pruned

Batch = tuple[Tensor, Tensor]

QUIET = [*WITH_PASSES, "magnitude"]
"""Every method but "random", which advances the global generator by design."""


# A model that leaves traces wherever a forward pass can.


class Restless(nn.Module):
    """Counts, remembers, draws random numbers and updates statistics in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.2)
        self.hidden = nn.Linear(4 * 16, 8)
        self.head: Any = nn.Linear(8, 3)
        self.calls = 0
        self.memory: dict[str, Any] = {"shapes": None}
        self.register_buffer("average", torch.zeros(()))
        self.temporary: Tensor
        self.register_buffer("temporary", torch.ones(2), persistent=False)
        self.register_buffer("nothing", None)
        self.handle = self.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.memory["shapes"] = x.shape
        self.memory[f"call {self.calls}"] = x
        self.last_inputs = x
        self.average.mul_(0.9).add_(0.1 * x.detach().mean())
        self.temporary = self.temporary * 2
        self.head.touched = True
        self.handle.remove()
        x = torch.relu(self.bn(self.conv(x))).flatten(1)
        noise = torch.rand(1) * random.random() * float(np.random.rand())
        return self.head(torch.relu(self.hidden(self.drop(x)))) + noise


def restless(kind: str = "fresh") -> nn.Module:
    """A model with a past: frozen parts, gradients, mixed modes, hooks, a closed gate.

    Args:
        kind: ``"fresh"``; ``"pruned"`` or ``"pruned twice"`` for one that is pruned in
            part already.
    """
    torch.manual_seed(0)
    model = Restless()
    inputs = torch.randn(4, 2, 4, 4)
    model(inputs).sum().backward()
    model.head.weight.grad = None
    model.conv.weight.requires_grad_(False)
    model.bn.bias.requires_grad_(False)
    nn.init.zeros_(model.bn.weight)
    model.conv.eval()
    model.drop.eval()
    model.hidden.register_forward_pre_hook(lambda *_: None)
    model.hidden.register_forward_hook(lambda *_: None)
    model.head.register_full_backward_hook(lambda *_: None)
    model.bn.register_forward_hook(lambda *_, **__: None, with_kwargs=True)
    if kind.startswith("pruned"):
        prune.l1_unstructured(model.hidden, "weight", 0.2)
        prune.random_unstructured(model.hidden, "bias", 2)
        if kind == "pruned twice":
            prune.l1_unstructured(model.hidden, "weight", 0.2)
        model(inputs).sum().backward()
    return model


def data(count: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(6, 2, 4, 4, generator=generator),
            torch.randint(3, (6,), generator=generator),
        )
        for _ in range(count)
    ]


# Scoring.


@pytest.mark.parametrize("kind", ["fresh", "pruned"])
@pytest.mark.parametrize("batches", [1, 3, None])
@pytest.mark.parametrize("method", QUIET)
def test_scoring_leaves_no_trace(method: str, batches: int | None, kind: str) -> None:
    model = restless(kind)
    with unchanged(model):
        saliency(model, data(), method, batches=batches)


def test_the_traces_that_are_looked_for_are_made_by_a_plain_forward() -> None:
    model = restless()
    before, around = state_of(model), process_state()
    model(data()[0][0]).sum().backward()
    changed = differences(before, state_of(model))
    assert {
        "/calls",
        "/memory/shapes",
        "/memory/call 2",
        "/last_inputs",
        "/_buffers/average",
        "/_buffers/temporary",
        "bn/_buffers/running_mean",
        "bn/_buffers/num_batches_tracked",
        "head/_parameters/weight",
        "hidden/_parameters/bias",
    } <= set(changed)
    assert differences(around, process_state()) == ["torch", "python", "numpy"]


def test_scoring_does_not_write_to_weights_that_the_forward_writes_to() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # With max_norm, an embedding rescales its own rows in every forward.
            self.embedding = nn.Embedding(10, 6, max_norm=0.5)
            self.head = nn.Linear(6, 4)

        def forward(self, words: Tensor) -> Tensor:
            return self.head(self.embedding(words).mean(1))

    model = Words()
    words = torch.arange(10).view(2, 5)
    with unchanged(model):
        saliency(model, [(words, torch.tensor([0, 1]))], "snip")


def test_a_weight_that_the_forward_clips_keeps_its_value() -> None:
    class Clipped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data.clamp_(-0.01, 0.01)
            return super().forward(x)

    model, batch = Clipped(6, 4), (torch.randn(5, 6), torch.arange(5) % 4)
    with unchanged(model):
        saliency(model, [batch], "snip")


def test_generators_in_a_models_containers_are_put_back() -> None:
    class Noisy(nn.Linear):
        own: Any

        def forward(self, x: Tensor) -> Tensor:
            noise = torch.randn(x.shape, generator=self.own["deep"][0])
            return super().forward(x + noise)

    model, batch = Noisy(6, 4), (torch.randn(5, 6), torch.arange(5) % 4)
    generator = torch.Generator().manual_seed(3)
    model.own = {"deep": [generator]}
    before = generator.get_state()
    for call in (saliency, diagnose):
        call(model, [batch])
        assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("place", ["loader", "sampler", "batch_sampler"])
def test_a_loaders_own_generator_is_put_back(place: str) -> None:
    generator = torch.Generator().manual_seed(3)
    dataset = TensorDataset(torch.randn(12, 2, 4, 4), torch.arange(12) % 3)
    sampler = RandomSampler(dataset, generator=generator)
    loaders: dict[str, DataLoader[Any]] = {
        "loader": DataLoader(dataset, 4, shuffle=True, generator=generator),
        "sampler": DataLoader(dataset, 4, sampler=sampler),
        "batch_sampler": DataLoader(
            dataset, batch_sampler=BatchSampler(sampler, 4, drop_last=False)
        ),
    }
    model = restless()
    with unchanged(model, generator):
        saliency(model, loaders[place], "snip", batches=2)


def test_a_loader_that_keeps_its_workers_shuffles_as_if_it_had_not_been_read() -> None:
    def order(score: bool) -> list[int]:
        torch.manual_seed(0)
        dataset = TensorDataset(torch.randn(12, 6), torch.arange(12))
        loader = DataLoader(
            dataset, 3, shuffle=True, num_workers=1, persistent_workers=True
        )
        model = nn.Linear(6, 12)
        if score:
            saliency(model, loader, "snip")
        return [int(target) for _, targets in loader for target in targets]

    assert order(score=True) == order(score=False)


# Failures.


class Breaking:
    """A loader that raises in the place of a batch."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.at = at
        self.error = error

    def __iter__(self) -> Iterator[Batch]:
        for i, batch in enumerate(data()):
            if i == self.at:
                raise self.error
            yield batch


@dataclass
class Countdown:
    """A loss that is as usual until its last call."""

    calls: int
    then: Callable[[Tensor], Tensor]

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls -= 1
        loss = cross_entropy(outputs, targets)
        return loss if self.calls > 0 else self.then(loss)


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object) -> None:
        raise error

    return fail


def expect_no_trace_of_a_failure(
    error: type[BaseException],
    method: str,
    loader: Any,
    model: nn.Module | None = None,
    **options: Any,
) -> None:
    model = model or restless()
    with unchanged(model), pytest.raises(error):
        force_prune(model, loader, 0.7, **{"steps": 3, "method": method, **options})


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("method", WITH_LOSS)
def test_a_loader_that_raises_leaves_no_trace(
    method: str, at: int, error: BaseException
) -> None:
    loader = Breaking(at, error)
    expect_no_trace_of_a_failure(type(error), method, loader, batches=None)


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("method", ITERATIVE)
def test_a_loader_that_raises_at_a_later_step_leaves_no_trace(
    method: str, at: int
) -> None:
    loader = Breaking(at, OSError("disk"))
    expect_no_trace_of_a_failure(OSError, method, loader, restless("pruned"))


def test_a_loader_that_raises_before_synflow_leaves_no_trace() -> None:
    expect_no_trace_of_a_failure(OSError, "synflow", Breaking(0, OSError("disk")))


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize(
    ("error", "then"),
    [
        (ValueError, raising(IndexError("in the loss"))),
        (KeyboardInterrupt, raising(KeyboardInterrupt())),
        (RuntimeError, lambda loss: loss * float("nan")),
        (RuntimeError, lambda loss: loss.detach()),
        (ValueError, lambda loss: loss.expand(2)),
    ],
    ids=["raises", "interrupted", "nan", "detached", "two numbers"],
)
@pytest.mark.parametrize("method", WITH_LOSS)
def test_a_loss_that_fails_leaves_no_trace(
    method: str,
    error: type[BaseException],
    then: Callable[[Tensor], Tensor],
    calls: int,
) -> None:
    loss_fn = Countdown(calls, then)
    expect_no_trace_of_a_failure(error, method, data(), batches=2, loss_fn=loss_fn)


@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize("method", WITH_PASSES)
def test_an_interrupt_inside_of_the_network_leaves_no_trace(
    method: str, calls: int
) -> None:
    model = restless()
    left = calls

    def interrupt(*_: object) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1

    model.hidden.register_forward_hook(interrupt)
    batches = 1 if method == "synflow" else 2
    expect_no_trace_of_a_failure(
        KeyboardInterrupt, method, data(), model, batches=batches
    )


class Stubborn(nn.Linear):
    """A layer that cannot be pruned, the last one of a network."""

    def register_forward_pre_hook(self, *_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["fresh", "pruned", "pruned twice"])
def test_an_interrupt_while_the_masks_are_applied_leaves_no_trace(kind: str) -> None:
    model = restless(kind)
    model.head = Stubborn(8, 3)
    expect_no_trace_of_a_failure(KeyboardInterrupt, "snip", data(), model)


def test_an_interrupt_while_attention_is_pruned_leaves_no_trace() -> None:
    class Attentive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)
            self.head = Stubborn(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(2).mean(1, keepdim=True).unflatten(2, (4, 4)).mean(2)
            return self.head(self.attention(x, x, x)[0].mean(1))

    expect_no_trace_of_a_failure(KeyboardInterrupt, "snip", data(), Attentive())


# Success.


@pytest.mark.parametrize("kind", ["fresh", "pruned"])
@pytest.mark.parametrize("method", QUIET)
def test_a_pruning_changes_nothing_but_the_masks(method: str, kind: str) -> None:
    model = restless(kind)
    before, around = state_of(model), process_state()
    force_prune(model, data(), 0.7, method=method, steps=3, progress=False)
    after = state_of(model)
    assert differences(around, process_state()) == []

    weights = ["conv", "hidden", "head"]
    for name in weights:
        # The very same parameter, with its value and gradient, under PyTorch's name.
        own = f"{name}/_parameters/weight"
        old = own if own in before else f"{own}_orig"
        assert after[f"{own}_orig"] == before[old]
    expected = {
        f"{name}/{entry}"
        for name in weights
        for entry in (
            "_parameters/weight",
            "_parameters/weight_orig",
            "_buffers/weight_mask",
            "weight",
            "_forward_pre_hooks/order",
            "_forward_hooks/order",
            "_forward_hooks_always_called/order",
        )
    }
    others = [key for key in differences(before, after) if key not in expected]
    # One hook more in each module, or one in the place of an earlier pruning's, and one
    # behind it.
    before_forward = [key for key in others if "/_forward_pre_hooks/" in key]
    behind_forward = [key for key in others if "/_forward_hooks/" in key]
    called = [key for key in others if "/_forward_hooks_always_called/" in key]
    for hooks in (before_forward, behind_forward, called):
        assert sorted(hook.split("/")[0] for hook in hooks) == sorted(weights)
    assert set(others) == {*before_forward, *behind_forward, *called}


def test_a_hook_can_still_be_removed_by_its_handle() -> None:
    model = restless()
    calls: list[int] = []
    handle = model.hidden.register_forward_hook(lambda *_: calls.append(1))
    force_prune(model, data(), 0.7, steps=2, progress=False)
    calls.clear()
    handle.remove()
    model(data()[0][0])
    assert calls == []


# Training afterwards.


def train(prepare: Callable[[nn.Module, DataLoader[Any]], object]) -> list[float]:
    """Losses of a training with dropout, batch norm and shuffling."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = Restless()
    # Not that the losses depend on what the forward pass keeps; it is kept, too.
    dataset = TensorDataset(torch.randn(24, 2, 4, 4), torch.arange(24) % 3)
    loader = DataLoader(dataset, batch_size=8, shuffle=True)
    prepare(model, loader)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", QUIET)
def test_a_training_goes_on_as_if_nothing_had_been_scored(method: str) -> None:
    assert train(
        lambda model, loader: saliency(model, loader, method, batches=2)
    ) == train(lambda model, loader: None)


def test_a_training_goes_on_as_if_nothing_had_failed() -> None:
    def fail(model: nn.Module, loader: DataLoader[Any]) -> None:
        loss_fn = Countdown(5, raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            force_prune(model, loader, 0.9, batches=2, steps=3, loss_fn=loss_fn)

    assert train(fail) == train(lambda model, loader: None)


def test_a_pruning_that_removes_nothing_does_not_change_a_training() -> None:
    def prune_nothing(model: nn.Module, loader: DataLoader[Any]) -> None:
        force_prune(model, loader, 0.0, steps=2, progress=False)

    assert train(prune_nothing) == train(lambda model, loader: None)


# Whatever the mode around it.


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", QUIET)
def test_scoring_works_without_grad_mode_around_it(
    method: str, mode: Callable[[], AbstractContextManager[Any]]
) -> None:
    model = restless()
    model.bn.reset_parameters()
    batches = data()
    expected = saliency(model, batches, method, batches=2)
    with mode(), unchanged(model):
        scores = saliency(model, batches, method, batches=2)
    assert all(torch.equal(scores[name], expected[name]) for name in expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("gate", ["bn", "head"])
def test_gates_are_opened_without_grad_mode_around_it(
    gate: str, mode: Callable[[], AbstractContextManager[Any]]
) -> None:
    model: Any = restless()
    model.bn.reset_parameters()
    nn.init.zeros_(model.get_submodule(gate).weight)
    batches = data()
    expected = saliency(model, batches, "snip")
    with mode():
        scores = saliency(model, batches, "snip")
    assert all(torch.equal(scores[name], expected[name]) for name in expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_pruned_without_grad_mode_can_be_trained_saved_and_loaded(
    mode: Callable[[], AbstractContextManager[Any]],
) -> None:
    model = restless()
    model.bn.reset_parameters()
    batches = data()
    with mode():
        force_prune(model, batches, 0.5, steps=2, progress=False)
    inputs, targets = batches[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    model.load_state_dict(model.state_dict())


# Attributes that are containers, some of which do not let anyone write to them.


def refusing(kind: type, *, reading: bool = False) -> type:
    """A class of containers whose every mutator raises, or every reader, too."""
    names = """__setitem__ __delitem__ __iadd__ __ior__ append add clear discard extend
        insert move_to_end pop popitem remove reverse setdefault sort update"""
    if reading:
        names += " __iter__ __len__ __getitem__ __contains__ __eq__ items keys values"

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise TypeError("this cannot be done")

    return type(
        f"Refusing{kind.__name__}",
        (kind,),
        {name: refuse for name in names.split() if hasattr(kind, name)},
    )


class Checked(dict[str, Any]):
    """Takes nothing but numbers, and no key twice."""

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self or not isinstance(value, int):
            raise ValueError("expected a new number")
        super().__setitem__(key, value)

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("set one at a time")


def refusing_ordered() -> Any:
    made = refusing(OrderedDict)()
    for key in "ab":
        OrderedDict.__setitem__(made, key, 1)
    return made


def in_itself() -> list[Any]:
    own: list[Any] = [1]
    own.append(own)
    return own


CONTAINERS: dict[str, Callable[[], Any]] = {
    "dict": lambda: {"a": 1, "b": [2]},
    "ordered": lambda: OrderedDict(a=1, b=2),
    "default": lambda: defaultdict(list, a=[1]),
    "list": lambda: [1, {"a": 2}],
    "set": lambda: {1, 2},
    "deque": lambda: deque([1, 2], maxlen=2),
    "fx dict": lambda: immutable_dict(a=1, b=2),
    "fx list": lambda: immutable_list([1, 2]),
    "checked": lambda: Checked(a=1, b=2),
    "refusing dict": lambda: refusing(dict)(a=1, b=2),
    "refusing ordered": refusing_ordered,
    "refusing list": lambda: refusing(list)([1, 2]),
    "refusing set": lambda: refusing(set)({1, 2}),
    "refusing deque": lambda: refusing(deque)([1, 2]),
    "unreadable dict": lambda: refusing(dict, reading=True)(a=1),
    "unreadable list": lambda: refusing(list, reading=True)([1]),
    "nested": lambda: {"a": [immutable_list([1]), refusing(dict)(b={1})]},
    "in itself": in_itself,
}
KINDS: tuple[Any, ...] = (OrderedDict, dict, list, set, deque)


def content(value: Any) -> Any:
    """What is in a container, past all that its class may do about it."""
    for kind in KINDS:
        if isinstance(value, kind):
            items = (
                kind.items(value) if issubclass(kind, dict) else kind.__iter__(value)
            )
            return [id(value), *(id(i) if i is value else content(i) for i in items)]
    return [content(v) for v in value] if isinstance(value, tuple) else value


def scribble(value: Any) -> None:
    """Change a container past its class, and what is in it."""
    kind = next((kind for kind in KINDS if isinstance(value, kind)), None)
    if kind is None:
        return
    inside = [*(kind.values(value) if issubclass(kind, dict) else kind.__iter__(value))]
    if issubclass(kind, dict):
        kind.__setitem__(value, "new", 1)
    else:
        (set.add if kind is set else kind.append)(value, "new")
    for item in inside:
        if item is not value:
            scribble(item)


class Settings(nn.Sequential):
    """A small network whose layers all have a container among their attributes."""

    def __init__(self, make: Callable[[], Any], writes: bool = False) -> None:
        super().__init__(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3))
        self.writes = writes
        self.counts: list[Any] = [torch.zeros(2), {"seen": torch.zeros(2)}]
        for module in self.modules():
            module.config = make()

    def forward(self, x: Tensor) -> Tensor:
        for module in self.modules() if self.writes else ():
            scribble(module.config)
        if self.writes:
            self.counts[0].add_(1)
            self.counts[1]["seen"].add_(1)
        return super().forward(x)


def settings_of(model: Settings) -> list[Any]:
    counts = [model.counts[0].tolist(), model.counts[1]["seen"].tolist()]
    return [*(content(module.config) for module in model.modules()), counts]


def failing(outputs: Tensor, targets: Tensor) -> Tensor:
    raise ZeroDivisionError("the user's own")


CALLS: dict[str, Callable[[nn.Module, Any], object]] = {
    "force_prune": lambda m, d: force_prune(m, d, 0.5, steps=2, progress=False),
    "synflow": lambda m, d: force_prune(m, d, 0.5, method="synflow", progress=False),
    "saliency": lambda m, d: saliency(m, d, "snip_it"),
    "diagnose": diagnose,
    "a loss that fails": lambda m, d: saliency(m, d, loss_fn=failing),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_are_what_they_were_whatever_their_class_allows(
    name: str, writes: bool, call: str
) -> None:
    torch.manual_seed(0)
    model = Settings(CONTAINERS[name], writes)
    before, weight = settings_of(model), model[0].weight
    data = [(torch.randn(4, 2, 4, 4), torch.tensor([0, 1, 2, 0]))]
    if call == "a loss that fails":
        with pytest.raises(ZeroDivisionError, match="the user's own"):
            CALLS[call](model, data)
    else:
        CALLS[call](model, data)
    assert settings_of(model) == before
    assert weight is model.get_parameter(
        "0.weight_orig" if prune.is_pruned(model) else "0.weight"
    )


@pytest.mark.parametrize("name", [*CONTAINERS, "proxy"])
@pytest.mark.parametrize("call", ["compact", "snap_prune", "save_pruned"])
def test_a_copy_takes_containers_of_any_class(
    call: str, name: str, tmp_path: Path
) -> None:
    proxy = MappingProxyType({"a": 1})
    torch.manual_seed(0)
    model = Settings(CONTAINERS.get(name, lambda: proxy))
    x = torch.randn(4, 2, 4, 4)
    masks = {"0.weight": torch.ones(4, 2, 3, 3, dtype=torch.bool)}
    masks["0.weight"][1] = False
    before = settings_of(model)
    if call == "snap_prune":
        data = [(x, torch.tensor([0, 1, 2, 0]))]
        small = snap_prune(model, data, x, 0.5, progress=False)
        assert small[0].out_channels == 2
    elif call == "compact":
        apply_masks(model, masks)
        model[0].bias.data.zero_()
        small = compact(model, x)
        assert small[0].out_channels == 3 and torch.equal(small(x), small(x))
        torch.testing.assert_close(small(x), model(x))
    else:
        apply_masks(model, masks)
        save_pruned(model, tmp_path / "weights")
    assert settings_of(model) == before


@pytest.mark.parametrize("call", ["saliency", "a loss that fails"])
def test_what_cannot_be_restored_keeps_nothing_else_from_it(call: str) -> None:
    class Broken(Settings):
        def forward(self, x: Tensor) -> Tensor:
            self.grown.resize_(3)  # another size than what is to be written back
            return super().forward(x)

    model = Broken(CONTAINERS["dict"], writes=True)
    model.grown = torch.zeros(2)
    model[0].training = False
    before, parameters = settings_of(model), dict(model.named_parameters())
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    data = [(torch.randn(4, 2, 4, 4), torch.tensor([0, 1, 2, 0]))]
    with pytest.raises(RuntimeError, match="size"):
        CALLS[call](model, data)
    assert settings_of(model) == before and not model[0].training
    assert all(p is model.get_parameter(n) for n, p in parameters.items())
    assert hooks == [len(m._forward_pre_hooks) for m in model.modules()]


@pytest.mark.parametrize("method", WITH_PASSES)
def test_nobody_is_told_of_what_stands_in_for_parameters_and_buffers(
    method: str,
) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    told: list[str] = []

    def note(module: nn.Module, name: str, tensor: Any) -> None:
        told.append(name)

    handles = [
        register_module_buffer_registration_hook(note),
        register_module_parameter_registration_hook(note),
    ]
    try:
        saliency(model, [(torch.randn(5, 6), torch.arange(5) % 4)], method)
    finally:
        for handle in handles:
            handle.remove()
    assert not told
