"""Computed weights and parts in TorchScript: scored through, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from refusals import Taylor, X, prune_it, refused
from state import unchanged
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from force_plugin import (
    SNIP,
    apply_masks,
    compact,
    diagnose,
    get_masks,
    load_pruned_state_dict,
    make_permanent,
    reinitialise,
    saliency,
    snap_prune,
    sparsity_report,
)
from force_plugin.errors import CompactionError

# They are asked for by the models' own authors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is not supported"),
]


# Weights that are computed


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


def parametrised() -> nn.Module:
    layer = nn.Linear(6, 4)
    parametrize.register_parametrization(layer, "weight", Positive())
    return layer


COMPUTED: dict[str, tuple[Callable[[], nn.Module], str, Callable[[Any], Any]]] = {
    "weight norm of old": (
        lambda: nn.utils.weight_norm(nn.Linear(6, 4)),
        r'\(module, "weight_v"\)',
        lambda m: (m, "weight_v"),
    ),
    "spectral norm of old": (
        lambda: nn.utils.spectral_norm(nn.Linear(6, 4)),
        r'\(module, "weight_orig"\)',
        lambda m: (m, "weight_orig"),
    ),
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Linear(6, 4)),
        r'\(module\.parametrizations\.weight, "original1"\)',
        lambda m: (m.parametrizations.weight, "original1"),
    ),
    "spectral norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(6, 4)),
        r'\(module\.parametrizations\.weight, "original"\)',
        lambda m: (m.parametrizations.weight, "original"),
    ),
    "a parametrisation": (
        parametrised,
        r'\(module\.parametrizations\.weight, "original"\)',
        lambda m: (m.parametrizations.weight, "original"),
    ),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_weight_that_is_computed_says_from_what(name: str) -> None:
    build, instead, pair = COMPUTED[name]
    torch.manual_seed(0)
    model = nn.Sequential(build(), nn.ReLU(), nn.Linear(4, 4))
    computed = (
        r"Linear has no parameter 'weight': it is computed from others whenever the "
        rf"module is called; name what it is computed from, as a rule {instead}$"
    )
    options = {"parameters": [(model[0], "weight")]}
    refused("force_prune", ValueError, rf"^parameters: \w*{computed}", model, **options)
    with unchanged(model), pytest.raises(ValueError, match=rf"^\w*{computed}"):
        SNIP.apply(model[0], "weight", 0.5, importance_scores=torch.ones(4, 6))
    alone = nn.Sequential(build())
    message = rf"^nothing to prune: \w*{computed}"
    refused("force_prune", ValueError, message, alone)
    # What it names can be pruned, and prunes the weight.
    prune_it(model, parameters=[pair(model[0])], sparsity=0.5, method="magnitude")
    model(X)
    assert int((model[0].weight == 0).sum()) == 12


# Parts in TorchScript


def with_part(part: nn.Module, **more: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), part, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )


def block() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())


def traced(part: nn.Module) -> nn.Module:
    return torch.jit.trace(part, torch.randn(4, 8, 6, 6))


PARTS: dict[str, Callable[[], nn.Module]] = {
    "a function": lambda: torch.jit.script(nn.ReLU()),
    "a layer": lambda: torch.jit.script(nn.Conv2d(8, 8, 1)),
    "a block": lambda: torch.jit.script(block()),
    "a traced block": lambda: traced(block()),
    "a traced layer": lambda: traced(nn.Conv2d(8, 8, 1)),
    "within a module": lambda: nn.Sequential(torch.jit.script(block()), nn.ReLU()),
}

PICTURES = torch.randn(4, 3, 8, 8), torch.arange(4)


@pytest.mark.parametrize("method", ["force", "grasp", "snip_it", "magnitude", Taylor])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_in_torchscript_stays_as_it_is(part: str, method: Any) -> None:
    model = with_part(PARTS[part]())
    modes = [module.training for module in model.modules()]
    inner = {n: t.clone() for n, t in model[1].state_dict().items()}
    scores = saliency(model, [PICTURES], method)
    assert list(scores) == ["0.weight", "4.weight"]
    assert len(diagnose(model, [PICTURES], method).stages) == 2
    options = {"loader": [PICTURES], "method": method, "on_collapse": "warn"}
    report = prune_it(model, **options)
    assert [layer.name for layer in report.layers] == ["0.weight", "4.weight"]
    masks = get_masks(model)
    assert sum(int(mask.sum()) for mask in masks.values()) == report.kept == 128
    assert modes == [module.training for module in model.modules()]
    for name, value in model[1].state_dict().items():
        assert torch.equal(value, inner[name]), name
    # It trains, and is loaded, as any other.
    model(PICTURES[0]).sum().backward()
    fresh = with_part(PARTS[part]())
    load_pruned_state_dict(fresh, model.state_dict())
    other = with_part(PARTS[part]())
    apply_masks(other, masks)
    assert str(sparsity_report(other))
    make_permanent(other)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(PICTURES[0]).square().sum().backward()
    optimizer.step()
    assert int((other[0].weight == 0).sum() + (other[4].weight == 0).sum()) == 128


def test_a_part_in_torchscript_is_scored_through() -> None:
    # As what it was made of would be.
    torch.manual_seed(3)
    part = block()
    plain, model = with_part(part), with_part(torch.jit.script(part))
    chosen = [(plain[0], "weight"), (plain[4], "weight")]
    for method in ("snip", "grasp"):
        expected = saliency(plain, [PICTURES], method, parameters=chosen)
        found = saliency(model, [PICTURES], method)
        for name, score in found.items():
            torch.testing.assert_close(score, expected[name])


def test_a_weight_in_torchscript_is_refused_by_name() -> None:
    model = with_part(torch.jit.script(block()))
    part = model[1]
    inner = dict(part.named_modules())["0"]
    for inside, kind in ((inner, "Conv2d"), (part, "Sequential")):
        options = {"parameters": [(inside, "weight")], "loader": [PICTURES]}
        message = (
            rf"^parameters: 'weight' belongs to a {kind} that is TorchScript, whose "
            "weights cannot be replaced; leave it out, or prune the model before torch"
        )
        with pytest.raises(ValueError, match=message):
            prune_it(model, **options)
    with pytest.raises(
        ValueError, match=r"^SynFlow: .* part in TorchScript \(1\); take"
    ):
        prune_it(model, method="synflow", loader=[PICTURES])
    with pytest.raises(
        ValueError, match=r"^'weight' belongs to a Conv2d that is Torch"
    ):
        SNIP.apply(inner, "weight", 0.5, importance_scores=torch.ones(8, 8, 1, 1))
    alone = nn.Sequential(torch.jit.script(nn.Linear(6, 4)))
    message = "no convolution or linear weight outside of its TorchScript parts; name"
    with pytest.raises(ValueError, match=message):
        prune_it(alone)


def test_a_model_with_a_part_in_torchscript_gets_new_values_and_no_smaller() -> None:
    model, fresh = (with_part(torch.jit.script(block())) for _ in range(2))
    prune_it(model, loader=[PICTURES])
    masks = get_masks(model)
    with torch.no_grad():
        for tensor in fresh.state_dict().values():
            tensor.add_(1)
    reinitialise(model, fresh)
    for name, value in fresh.state_dict().items():
        mine = model.state_dict()
        if name in masks:
            assert torch.equal(mine[f"{name}_orig"], value)
        else:
            assert torch.equal(mine[name], value)
    message = "expected one in Python, .* but 1 is TorchScript; put what it was made of"
    with unchanged(model), pytest.raises(CompactionError, match=message):
        compact(model, PICTURES[0])
    with unchanged(fresh), pytest.raises(CompactionError, match=message):
        snap_prune(fresh, PICTURES[0], [PICTURES], 0.5)
