"""How batches are passed through a network is said alike to every function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_type_hints

import pytest
import torch
from state import unchanged
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from force_plugin import (
    SaliencyImportance,
    diagnose,
    force_prune,
    saliency,
    snap_prune,
)
from force_plugin.scoring.passes import Passes, PassOptions

Call = Callable[..., Any]


def network(seen: list[Tensor] | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 4)
    )
    if seen is not None:
        model[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    return model


def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(6, 3, 4, 4), torch.arange(6) % 4) for _ in range(3)]


def importance(model: nn.Module, loader: Any, **options: Any) -> None:
    measured = SaliencyImportance(model, loader, "snip", **options)
    measured._measure({module: name for name, module in model.named_modules()})


CALLS: dict[str, Call] = {
    "force_prune": lambda m, d, **o: force_prune(
        m, d, 0.5, method="snip", progress=False, **o
    ),
    "saliency": lambda m, d, **o: saliency(m, d, "snip", **o),
    "diagnose": lambda m, d, **o: diagnose(m, d, "snip", **o),
    "SaliencyImportance": importance,
    "snap_prune": lambda m, d, **o: snap_prune(
        m, d, d[0][0], 0.3, steps=1, progress=False, **o
    ),
}
every_call = pytest.mark.parametrize("call", CALLS)


def scored(seen: list[Tensor]) -> list[Tensor]:
    """Inputs of the passes that measure, which are in float32."""
    return [inputs for inputs in seen if inputs.dtype != torch.float64]


def test_the_keywords_are_those_of_the_value() -> None:
    assert [*get_type_hints(PassOptions)] == [field.name for field in fields(Passes)]


@every_call
def test_a_microbatch_is_the_most_that_is_passed(call: str) -> None:
    seen: list[Tensor] = []
    CALLS[call](network(seen), batches(), microbatch=2, batches=2)
    assert {len(inputs) for inputs in scored(seen)} <= {1, 2}
    assert len(scored(seen)) >= 6


@every_call
def test_inputs_have_channels_last(call: str) -> None:
    seen: list[Tensor] = []
    CALLS[call](network(seen), batches(), channels_last=True)
    assert any(
        inputs.is_contiguous(memory_format=torch.channels_last)
        for inputs in scored(seen)
    )


@every_call
def test_passes_run_under_autocast(call: str) -> None:
    kinds = set()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        kinds.add(outputs.dtype)
        return cross_entropy(outputs, targets)

    CALLS[call](network(), batches(), autocast=torch.bfloat16, loss_fn=loss)
    assert kinds == {torch.bfloat16}


@every_call
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"microbach": 2}, TypeError, "got an unexpected keyword argument 'microbach'"),
        ({"batches": 0}, ValueError, "^batches: "),
        ({"autocast": torch.float16}, ValueError, "^autocast: expected torch.bfloat16"),
        ({"loss_fn": nn.MSELoss}, TypeError, "pass an instance"),
        ({"forward": 1}, TypeError, "^forward: expected a callable"),
    ],
)
def test_what_is_not_as_expected_is_named_by_each(
    call: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model, data = network(), batches()
    with unchanged(model), pytest.raises(error, match=message) as caught:
        CALLS[call](model, data, **options)
    if "microbach" in options:
        assert str(caught.value).startswith(f"{call}()")
