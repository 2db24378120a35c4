"""What comes from outside arrives as it was, at any call, and leaves no trace."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from faults import BOTH, WHERE, Batch, batch, prune_it
from state import unchanged
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from force_plugin import FORCE, force_prune, get_masks


@dataclass
class Alarm:
    """Raises after so many calls, and ever after."""

    error: BaseException
    calls: int

    def __call__(self, *args: object) -> None:
        self.calls -= 1
        if self.calls < 0:
            raise self.error


@dataclass
class AlarmedLoader:
    alarm: Alarm

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(5):
            self.alarm()
            yield batch()


def in_the_loader(alarm: Alarm, model: nn.Module) -> dict[str, Any]:
    return {"loader": AlarmedLoader(alarm)}


def in_the_network(alarm: Alarm, model: nn.Module) -> dict[str, Any]:
    model.register_forward_pre_hook(alarm)
    return {}


def behind_a_layer(alarm: Alarm, model: nn.Module) -> dict[str, Any]:
    [*model.modules()][-1].register_forward_hook(alarm)
    return {}


def in_the_backward_pass(alarm: Alarm, model: nn.Module) -> dict[str, Any]:
    model.register_full_backward_pre_hook(alarm)
    return {}


def in_a_forward_function(alarm: Alarm, model: nn.Module) -> dict[str, Any]:
    def forward(network: nn.Module, one: Batch) -> Tensor:
        alarm()
        return cross_entropy(network(one[0]), one[1])

    return {"forward": forward}


def in_a_schedule(alarm: Alarm, model: nn.Module) -> dict[str, Any]:
    def schedule(step: int, steps: int, last: float) -> float:
        alarm()
        return 1 - step / steps * (1 - last)

    return {"schedule": schedule}


def in_a_score(alarm: Alarm, model: nn.Module) -> dict[str, Any]:
    class Mine(FORCE):
        @staticmethod
        def score(weight: Tensor, gradient: Tensor) -> Tensor:
            alarm()
            return FORCE.score(weight, gradient)

    return {"method": Mine}


def while_masks_are_applied(alarm: Alarm, model: nn.Module) -> dict[str, Any]:
    class Mine(FORCE):
        def __init__(self, amount: int) -> None:
            alarm()
            super().__init__(amount)

        def apply_mask(self, module: nn.Module) -> Tensor:
            alarm()
            return super().apply_mask(module)

    return {"method": Mine}


PLACES: dict[str, Callable[[Alarm, nn.Module], dict[str, Any]]] = {
    "in the loader": in_the_loader,
    "in the network": in_the_network,
    "behind a layer": behind_a_layer,
    "in the backward pass": in_the_backward_pass,
    "in a forward function": in_a_forward_function,
    "in a schedule": in_a_schedule,
    "in a score": in_a_score,
    "while masks are applied": while_masks_are_applied,
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("place", PLACES)
def test_an_error_or_ctrl_c_at_any_call_arrives_as_it_was_and_leaves_no_trace(
    place: str, where: str
) -> None:
    def pruning(error: BaseException, calls: int) -> tuple[nn.Module, Alarm, Any]:
        model, alarm = WHERE[where](), Alarm(error, calls)
        options = {"batches": 2, **PLACES[place](alarm, model)}
        return model, alarm, lambda: prune_it(model, **options)

    interrupt = KeyboardInterrupt("by the user")
    _, alarm, prune_ = pruning(interrupt, 1000)
    prune_()
    number = 1000 - alarm.calls
    assert number
    for calls in range(number):
        for error in (interrupt, OSError("disk")):
            model, _, prune_ = pruning(error, calls)
            with unchanged(model), pytest.raises(type(error)) as caught:
                prune_()
            assert caught.value is error


class Scribbling(nn.Linear):
    """Keeps its inputs in a list and counts calls in a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__(6, 4)
        self.inputs: list[Tensor] = []
        self.calls = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x)
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("attribute", ["inputs", "calls"])
@pytest.mark.parametrize("call", BOTH)
def test_what_a_forward_pass_writes_into_attributes_is_taken_back(
    call: str, attribute: str
) -> None:
    model = Scribbling()
    BOTH[call](model)
    assert {"inputs": len(model.inputs), "calls": int(model.calls)}[attribute] == 0


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("finite", [True, False])
def test_a_norm_of_a_channel_without_weights_is_a_warning(finite: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        torch.nn.utils.weight_norm(nn.Linear(8, 16)), nn.Tanh(), nn.Linear(16, 5)
    )
    if not finite:  # a unit that is saturated has no saliency
        nn.init.constant_(model[0].bias[:2], 100.0)
    data = [(torch.randn(16, 8), torch.randint(0, 5, (16,)))]
    pairs = [(model[0], "weight_v"), (model[2], "weight")]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        options: dict[str, Any] = {"parameters": pairs, "progress": False}
        report = force_prune(model, data, 0.3, method="snip", **options)
    found = [str(w.message) for w in said if "NaN or infinite" in str(w.message)]
    assert bool(found) is not finite
    assert not finite or model(data[0][0]).isfinite().all()
    assert all(text in report.warnings for text in found)
    zeros = ~get_masks(model)["0.weight_v"]
    with torch.no_grad():
        model[0].weight_v_orig.fill_(torch.nan)
    assert not model[0].weight_v[zeros].any()
