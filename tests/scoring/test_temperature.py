"""GraSP's temperature, wherever the loss comes from: used, or said not to be."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from lightning import LightningModule
from state import unchanged
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from force_plugin import GraSP, diagnose, force_prune, get_masks, saliency

Batch = tuple[Tensor, Tensor]
SAID = "^the temperature of 200 was not used: "


class Plain(GraSP):
    """GraSP without a temperature."""

    temperature = 1.0


def body() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(128, 10)).double()


class Net(LightningModule):
    """A network that hands its outputs over in some way."""

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda outputs: outputs) -> None:
        super().__init__()
        self.net = body()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        self.kept = cross_entropy(out := self.net(x), torch.arange(len(x)) % 10)
        return self.wrap(out)

    def training_step(self, batch: Batch, number: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])


class Inner(Net):
    def training_step(self, batch: Batch, number: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])


class Named(NamedTuple):
    logits: Tensor
    number: int


class Opaque:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def batches(count: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(20, 1, 8, 8, generator=generator).double(),
            torch.arange(20) % 10,
        )
        for _ in range(count)
    ]


def masks_of(
    model: nn.Module, method: type[GraSP] = GraSP, **options: Any
) -> tuple[list[Tensor], list[str]]:
    """The masks, and what was said of the temperature."""
    usual: dict[str, Any] = {"progress": False, "on_collapse": "warn"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = force_prune(model, sparsity=0.8, method=method, **usual, **options)
    said = [text for text in report.warnings if "temperature" in text]
    assert said == [str(w.message) for w in caught if "temperature" in str(w.message)]
    return [*get_masks(model).values()], said


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def loss(outputs: Tensor, batch: Batch) -> Tensor:
    return cross_entropy(outputs, batch[1])


USED: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Any], Tensor]]] = {
    "a tensor": (Net, lambda m, b: loss(m(b[0]), b)),
    "a keyword": (Net, lambda m, b: loss(m(x=b[0]), b)),
    "a sequential": (body, lambda m, b: loss(m(b[0]), b)),
    "a tuple": (lambda: Net(lambda y: (y, 3)), lambda m, b: loss(m(b[0])[0], b)),
    "a list": (
        lambda: Net(lambda y: [[y], y.detach()]),
        lambda m, b: loss(m(b[0])[0][0], b),
    ),
    "a dictionary": (
        lambda: Net(lambda y: {"y": y}),
        lambda m, b: loss(m(b[0])["y"], b),
    ),
    "a named tuple": (
        lambda: Net(lambda y: Named(y, 3)),
        lambda m, b: loss(m(b[0]).logits, b),
    ),
    "an output of transformers": (
        lambda: Net(lambda y: SequenceClassifierOutput(logits=y)),
        lambda m, b: loss(m(b[0]).logits, b),
    ),
    "logits beside a loss": (
        lambda: Net(lambda y: SequenceClassifierOutput(loss=y.sum(), logits=y)),
        lambda m, b: loss(m(b[0]).logits, b),
    ),
    "a training step": (Net, lambda m, b: m.training_step(b, 0)),
    "a training step around a part": (Inner, lambda m, b: m.training_step(b, 0)),
    "a part": (Net, lambda m, b: loss(m.net(b[0]), b)),
    "checkpointed": (
        Net,
        lambda m, b: loss(checkpoint(m, b[0], use_reentrant=False), b),
    ),
}


@pytest.mark.parametrize("options", [{}, {"microbatch": 7}, {"batches": 2}], ids=str)
@pytest.mark.parametrize("name", USED)
def test_outputs_are_divided_where_they_leave_the_model(
    name: str, options: dict[str, Any]
) -> None:
    build, forward = USED[name]
    options = {"loader": batches(2), **options}
    expected, _ = masks_of(body(), **options)
    plain, _ = masks_of(body(), Plain, **options)
    assert not same(expected, plain)
    masks, said = masks_of(build(), forward=forward, **options)
    assert not said
    assert same(masks, expected)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = nn.Linear(16, 8).double(), nn.Linear(8, 8).double()

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.head(self.cell(torch.cat([x, h], 1)).tanh())


def unrolled(model: nn.Module, batch: Batch, detach: bool = False) -> Tensor:
    h = torch.zeros(20, 8).double()
    for row in batch[0].squeeze(1).unbind(1)[:3]:
        h = model(row, h.detach() if detach else h)
    return cross_entropy(h, batch[1] % 8)


def from_within(model: Any, batch: Batch) -> Tensor:
    model(batch[0])
    return model.kept


UNUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Any], Tensor], str]] = {
    "a loss": (
        lambda: Net(lambda y: y.square().mean()),
        lambda m, b: m(b[0]),
        "the loss .* from within the model",
    ),
    "a loss in a dictionary": (
        lambda: Net(lambda y: {"loss": y.square().mean(), "y": y}),
        lambda m, b: m(b[0])["loss"],
        "the loss that forward= returns comes from within the model",
    ),
    "a loss of transformers": (
        lambda: Net(
            lambda y: SequenceClassifierOutput(loss=y.square().mean(), logits=y)
        ),
        lambda m, b: m(b[0]).loss,
        "the loss that forward= returns comes from within the model",
    ),
    "an attribute": (Net, from_within, "the loss .* comes from within the model"),
    "several parts": (
        Net,
        lambda m, b: loss(m.net[6](m.net[:6](b[0])), b),
        "forward= calls several modules of the model, and not the model",
    ),
    "the method": (
        body,
        lambda m, b: loss(m.forward(b[0]), b),
        "forward= calls several",
    ),
    "outputs that enter again": (
        Recurrent,
        unrolled,
        "outputs of the model are inputs",
    ),
    "detached outputs that enter again": (
        Recurrent,
        lambda m, b: unrolled(m, b, detach=True),
        "outputs of the model are inputs of it again",
    ),
    "outputs of another kind": (
        lambda: Net(Opaque),
        lambda m, b: loss(m(b[0]).logits, b),
        "the outputs of the model are a Opaque",
    ),
}


@pytest.mark.parametrize("name", UNUSED)
def test_a_temperature_that_cannot_be_used_is_said_once(name: str) -> None:
    build, forward, reason = UNUSED[name]
    options: dict[str, Any] = {"forward": forward, "loader": batches(3), "batches": 3}
    masks, said = masks_of(build(), **options)
    (text,) = said
    assert re.search(SAID + reason, text)
    assert "Divide the outputs yourself" in text and "whose temperature is 1" in text
    plain, quiet = masks_of(build(), Plain, **options)
    assert not quiet
    assert same(masks, plain)


def test_views_are_divided_each() -> None:
    def views(divide: float) -> Callable[[Any, Batch], Tensor]:
        return lambda m, b: cross_entropy(
            m(b[0]) / divide @ (m(b[0].flip(3)) / divide).T, torch.arange(20)
        )

    options: dict[str, Any] = {"loader": batches()}
    masks, said = masks_of(body(), forward=views(1), **options)
    by_hand, _ = masks_of(body(), Plain, forward=views(200), **options)
    assert not said
    assert same(masks, by_hand)


def test_a_bert_with_its_own_loss_and_with_ours() -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_labels": 3,
        "attn_implementation": "eager",
    }
    config = BertConfig(vocab_size=40, intermediate_size=16, **sizes)
    ids, labels = torch.arange(40).view(4, 10), torch.arange(4) % 3

    def build() -> nn.Module:
        torch.manual_seed(0)
        return BertForSequenceClassification(config).eval()

    loader = [{"input_ids": ids, "labels": labels}]
    _, said = masks_of(build(), loader=loader, forward=lambda m, b: m(**b).loss)
    assert "comes from within the model" in said[0]
    for keys in (["input_ids"], ["input_ids", "labels"]):
        ours, said = masks_of(
            build(),
            loader=loader,
            forward=lambda m, b, keys=keys: cross_entropy(
                m(**{key: b[key] for key in keys}).logits, b["labels"]
            ),
        )
        assert not said
        by_hand, _ = masks_of(
            build(),
            Plain,
            loader=loader,
            forward=lambda m, b: cross_entropy(
                m(input_ids=b["input_ids"]).logits / 200, b["labels"]
            ),
        )
        assert same(ours, by_hand)


@pytest.mark.parametrize("call", [saliency, diagnose])
def test_without_a_report_it_is_a_warning(call: Callable[..., object]) -> None:
    build, forward, reason = UNUSED["a loss"]
    model = build()
    with unchanged(model), pytest.warns(UserWarning, match=SAID + reason) as caught:
        call(model, batches(), "grasp", forward=forward)
    (said,) = [w for w in caught if "temperature" in str(w.message)]
    assert said.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, method in (("a loss", Plain), ("a tensor", GraSP)):
            build, forward, *_ = (UNUSED | USED)[name]
            call(build(), batches(), method, forward=forward)


def test_outputs_of_pairs_are_divided_whatever_holds_them() -> None:
    expected, _ = masks_of(body(), loader=batches())
    wrapped = Net(lambda y: SequenceClassifierOutput(logits=y))
    masks, said = masks_of(
        wrapped, loader=batches(), loss_fn=lambda o, t: cross_entropy(o.logits, t)
    )
    assert not said
    assert same(masks, expected)
    _, said = masks_of(
        Net(Opaque), loader=batches(), loss_fn=lambda o, t: cross_entropy(o.logits, t)
    )
    assert said[0].startswith(
        "the temperature of 200 was not used: the outputs are a O"
    )


@pytest.mark.parametrize(
    "temperature", [0, -1.0, float("nan"), float("inf"), "2", None]
)
def test_a_temperature_that_is_none(temperature: Any) -> None:
    method = type("Mine", (GraSP,), {"temperature": temperature})
    model = body()
    with (
        unchanged(model),
        pytest.raises((TypeError, ValueError), match=r"^temperature: expected a "),
    ):
        force_prune(model, batches(), 0.5, method=method, progress=False)


def test_looking_for_the_outputs_leaves_no_trace() -> None:
    unused = [(build, forward) for build, forward, _ in UNUSED.values()]
    for build, forward in [*USED.values(), *unused]:
        model = build()
        with unchanged(model):
            saliency(model, batches(), "grasp", forward=forward)
