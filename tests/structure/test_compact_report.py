"""What a smaller model saves: channels, parameters, multiplications."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from networks import conv_network, tiny_resnet
from state import unchanged
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn.utils import prune

from force_plugin import compact, compact_report
from force_plugin.structure.compact_report import CompactReport, LayerSize


def without_rows(layer: Any, *rows: int) -> None:
    mask = torch.ones_like(layer.weight)
    mask[list(rows)] = 0
    prune.custom_from_mask(layer, "weight", mask)


def pair() -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, inputs = tiny_resnet(), torch.randn(2, 3, 16, 16)
    without_rows(model[3].conv1, *range(20))
    without_rows(model[7].conv1, *range(10))
    return model, compact(model, inputs, progress=False), inputs


def network() -> nn.Module:
    """On 3×8×8 it multiplies 4·3·9·64 + 4·9·64 + 2·4·36 + 72·5 times."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
        nn.ReLU(),
        nn.Conv2d(4, 2, 1),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


def test_multiplications_of_convolutions_are_counted_by_hand() -> None:
    model = network()
    report = compact_report(model, model, torch.randn(1, 3, 8, 8))
    by_hand = 4 * 3 * 9 * 64 + 4 * 9 * 64 + 2 * 4 * 64 + 32 * 5
    assert report.multiplications == (by_hand, by_hand)


@pytest.mark.parametrize("fused", [False, True])
def test_multiplications_of_an_attention_are_counted_by_hand(fused: bool) -> None:
    model = Attention(16, num_heads=4)
    model.fused_attn = fused
    report = compact_report(model, model, torch.randn(3, 5, 16))
    tokens, width = 5, 16
    by_hand = tokens * width * 3 * width + 2 * tokens**2 * width + tokens * width**2
    assert report.multiplications == (by_hand, by_hand)


@pytest.mark.parametrize("samples", [1, 2, 7])
def test_they_are_those_of_one_sample(samples: int) -> None:
    model, small, _ = pair()
    one = compact_report(model, small, torch.randn(1, 3, 16, 16))
    assert compact_report(model, small, torch.randn(samples, 3, 16, 16)) == one


def test_multiplications_of_the_smaller_model_are_those_of_a_small_one() -> None:
    model, small, inputs = pair()
    assert small[3].conv1.out_channels == 4 and small[7].conv1.out_channels == 38
    before, after = compact_report(model, small, inputs).multiplications
    saved = 2 * 20 * 24 * 9 * 16 * 16 + 2 * 10 * 48 * 9 * 8 * 8
    assert before - after == saved


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit"])
def test_counts_are_those_of_torch_pruning(name: str) -> None:
    model = timm.create_model(name, num_classes=10).eval()
    size = model.default_cfg["input_size"]
    inputs = torch.randn(1, *size)
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    without_rows(layer, 0)
    small = compact(model, inputs, progress=False)
    report = compact_report(model, small, inputs)
    with torch.no_grad():
        model(inputs), small(inputs)  # what prune leaves can be copied then
    for one, place in ((model, 0), (small, 1)):
        assert report.parameters[place] == tp.utils.count_ops_and_params(one, inputs)[1]


def test_parameters_under_a_mask_count_and_tied_ones_once() -> None:
    model, small, inputs = pair()
    report = compact_report(model, small, inputs)
    assert report.parameters == (
        sum(p.numel() for p in tiny_resnet().parameters()),
        sum(p.numel() for p in small.parameters()),
    )
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert compact_report(tied, tied, torch.ones(1, 3)).parameters == (15, 15)


def test_channels_are_those_of_the_layers() -> None:
    model, small, inputs = pair()
    report = compact_report(model, small, inputs)
    layers = {layer.name: (layer.inputs, layer.outputs) for layer in report.layers}
    assert layers == {
        "0": ((3, 3), (24, 24)),
        "3.conv1": ((24, 24), (24, 4)),
        "3.conv2": ((24, 4), (24, 24)),
        "4": ((24, 24), (48, 48)),
        "7.conv1": ((48, 48), (48, 38)),
        "7.conv2": ((48, 38), (48, 48)),
        "10": ((48, 48), (10, 10)),
    }
    assert report.channels == (226, 226 - 30)


def test_the_table_says_all_of_it() -> None:
    model, small, inputs = pair()
    report = compact_report(model, small, inputs)
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "inputs", "outputs"]
    cells = {line.split("  ")[0].strip(): line for line in lines}
    assert cells["3.conv1"].split() == ["3.conv1", "24", "24", "->", "4"]
    assert cells["3.conv2"].split() == ["3.conv2", "24", "->", "4", "24"]
    for name in ("channels", "parameters", "multiplications"):
        before, after = getattr(report, name)
        share = f"{100 * after / before:.2f}"
        expected = [name, f"{before:,}", "->", f"{after:,}", share, "%"]
        assert cells[name].split() == expected


@pytest.mark.parametrize("depth", [1, 30])
def test_the_table_has_at_most_80_columns(depth: int) -> None:
    model: nn.Module = nn.Linear(3, 4)
    for _ in range(depth):
        model = nn.ModuleDict({"a_long_name": model})
    deep = Deep(model)
    table = str(compact_report(deep, deep, torch.randn(1, 3)))
    assert max(map(len, table.splitlines())) <= 80
    model, small, inputs = pair()
    table = str(compact_report(model, small, inputs))
    assert max(map(len, table.splitlines())) <= 80


class Deep(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        module = self.inner
        while isinstance(module, nn.ModuleDict):
            module = module["a_long_name"]
        return module(x)


def test_no_two_rows_look_alike() -> None:
    names = [f"{'x' * 90}.{i}.{'y' * 90}" for i in range(12)] + ["a", "b.c"]
    layers = tuple(LayerSize(name, (3, 2), (10**9, 10**8)) for name in names)
    lines = str(CompactReport(layers, (1, 1), (1, 1), (1, 1))).splitlines()
    rows = [line.split()[0] for line in lines[2 : 2 + len(names)]]
    assert len({*rows}) == len(names) and max(map(len, lines)) <= 80
    assert rows[-2:] == ["a", "b.c"]


def test_numbers_of_many_digits_fit_the_table() -> None:
    with torch.device("meta"):
        model = nn.Linear(10**6, 10**7)
    table = str(compact_report(model, model, torch.randn(1, 10**6, device="meta")))
    assert f"{10**13:,}" in table
    assert max(map(len, table.splitlines())) <= 80


def test_it_is_plain_lists_and_numbers_for_json() -> None:
    report = compact_report(*pair())
    told = json.loads(json.dumps(report.to_dict()))
    assert told["parameters"] == list(report.parameters)
    assert told["channels"] == list(report.channels)
    assert told["multiplications"] == list(report.multiplications)
    assert told["layers"][1] == {
        "name": "3.conv1",
        "inputs": [24, 24],
        "outputs": [24, 4],
    }
    assert set(told) == {"layers", "channels", "parameters", "multiplications"}


def test_models_are_untouched() -> None:
    model, small, inputs = pair()
    small.train()
    model.train()
    with unchanged(model), unchanged(small):
        compact_report(model, small, inputs)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, numbers: Tensor, scale: Tensor) -> Tensor:
        return self.layer(self.embedding(numbers) * scale)


@pytest.mark.parametrize("kind", ["tuple", "list", "mapping"])
def test_inputs_may_be_several(kind: str) -> None:
    numbers, scale = torch.arange(6).view(2, 3), torch.ones(2, 1, 1)
    inputs: dict[str, Any] = {
        "tuple": (numbers, scale),
        "list": [numbers, scale],
        "mapping": {"scale": scale, "numbers": numbers},
    }
    model = Two()
    assert compact_report(model, model, inputs[kind]).multiplications[0] == 3 * 4 * 2


def test_a_parameter_that_is_expanded_may_be_given_to_a_module() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 3))
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.token.expand(len(x), -1)) + self.layer(x)

    model = Tokens()
    model.layer.bias.requires_grad_(False)
    with unchanged(model):
        report = compact_report(model, model, torch.zeros(2, 3))
    assert report.multiplications[0] == 2 * 3 * 4
    assert [one.requires_grad for one in model.parameters()] == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inputs_are_brought_to_the_type_of_the_model(dtype: torch.dtype) -> None:
    model = conv_network().to(dtype)
    images = torch.randn(2, 2, 5, 5)
    expected = compact_report(conv_network(), conv_network(), images)
    assert compact_report(model, model, images) == expected


WRONG: dict[str, tuple[Callable[[], tuple[Any, ...]], type[Exception], str]] = {
    "before": (
        lambda: (3, nn.Linear(3, 3), torch.ones(1, 3)),
        TypeError,
        r"^before: expected a torch\.nn\.Module, got int",
    ),
    "after": (
        lambda: (nn.Linear(3, 3), None, torch.ones(1, 3)),
        TypeError,
        r"^after: expected a torch\.nn\.Module, got NoneType",
    ),
    "layers": (
        lambda: (conv_network(), tiny_resnet(), torch.ones(1, 3)),
        ValueError,
        r"^after: expected a model with the same layers .* has ",
    ),
    "inputs": (
        lambda: (nn.Linear(3, 3), nn.Linear(3, 3), "images"),
        TypeError,
        r"^example_inputs: expected .*got a str",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_says_what_is_wrong(case: str) -> None:
    build, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        compact_report(*build())


def test_a_model_that_fails_is_left_as_it_was() -> None:
    model, inputs = conv_network(), torch.randn(2, 3)
    with unchanged(model), pytest.raises(RuntimeError):
        compact_report(model, model, inputs)
