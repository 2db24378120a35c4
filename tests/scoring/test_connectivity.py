"""Does anything lead from inputs to outputs? Other inputs must give other outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from force_plugin.scoring.connectivity import find_flow, responds


class Residual(nn.Module):
    """A branch around a branch."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Embeddings(nn.Module):
    """Words and positions, as language models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 6)
        self.positions = nn.Embedding(5, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1])
        found = self.words(input_ids.view(-1, input_ids.shape[1]))
        return self.norm(found + self.positions(positions))


class Language(nn.Module):
    """Takes keywords, gives a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = Embeddings()
        self.body = Residual(nn.Linear(6, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, mask: Tensor | None = None) -> Any:
        states = self.body(self.embeddings(input_ids))
        return {"logits": (self.head(states.mean(1)),), "states": None}


class Blend(nn.Module):
    """A module without children that takes a mask of integers beside its states."""

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        return states * mask[:, None]


class Masked(nn.Module):
    """Takes states, and integers that say which of them count."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.blend = Blend()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.blend(self.stem(x), mask))


class Writing(nn.Module):
    """Works on its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mul_(2))


def vectors() -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def words() -> Tensor:
    return torch.arange(20).view(4, 5) % 10


def chain(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), *more)


def residual() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), Residual(nn.Linear(6, 6)), nn.Linear(6, 4))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "a chain": (chain, vectors),
    "a softmax": (lambda: chain(nn.Softmax(1)), vectors),
    "a normalisation": (lambda: chain(nn.LayerNorm(4)), vectors),
    "batch statistics": (lambda: chain(nn.BatchNorm1d(4)), vectors),
    "a residual": (residual, vectors),
    "in place": (Writing, vectors),
    "words": (Language, words),
}
CUTS = [
    ("a chain", "0.weight", True),
    ("a chain", "2.weight", True),
    ("a softmax", "2.weight", True),
    ("a normalisation", "0.weight", True),
    ("batch statistics", "2.weight", True),
    ("a residual", "0.weight", True),
    ("a residual", "1.branch.weight", False),
    ("in place", "layer.weight", True),
    ("words", "embeddings.words.weight", True),
    ("words", "embeddings.positions.weight", False),
    ("words", "embeddings.norm.weight", True),
    ("words", "body.branch.weight", False),
    ("words", "head.weight", True),
]


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    found = model(inputs.clone())
    return found["logits"][0] if isinstance(found, dict) else found


def depends(model: nn.Module, inputs: Tensor) -> bool:
    """Whether other inputs give other outputs."""
    other = inputs.flip(1) if inputs.is_floating_point() else (inputs * 3 + 1) % 10
    return not torch.equal(outputs(model, inputs), outputs(model, other))


@pytest.mark.parametrize(("network", "name", "cut"), CUTS)
def test_a_layer_of_zeros_cuts_what_nothing_leads_around(
    network: str, name: str, cut: bool
) -> None:
    torch.manual_seed(0)
    make, data = NETWORKS[network]
    model, inputs = make().double(), data()
    if inputs.is_floating_point():
        inputs = inputs.double()
    for broken in (False, True):
        if broken:
            nn.init.zeros_(model.get_parameter(name))
        found = find_flow(model, lambda: model(inputs.clone())).connected
        assert found is depends(model, inputs) is not (broken and cut)


def test_the_model_may_be_called_in_any_way_and_more_than_once() -> None:
    model = Language()

    def run() -> Tensor:
        first, second = model(input_ids=words()), model(words(), mask=torch.ones(4))
        return first["logits"][0] - second["logits"][0]

    assert find_flow(model, run).connected
    nn.init.zeros_(model.head.weight)
    assert find_flow(model, run).connected is False


def test_the_same_word_everywhere_is_no_input_that_differs() -> None:
    model = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 4))
    assert find_flow(model, lambda: model(words())).connected
    assert find_flow(model, lambda: model(torch.ones_like(words()))).connected is False


@pytest.mark.parametrize("name", ["stem", "head"])
def test_integers_beside_floating_point_inputs_hide_no_cut(name: str) -> None:
    model, mask = Masked(), torch.tensor([1, 1, 0, 1])
    assert find_flow(model, lambda: model(vectors(), mask)).connected
    nn.init.zeros_(model.get_parameter(f"{name}.weight"))
    assert find_flow(model, lambda: model(vectors(), mask)).connected is False


def test_a_model_that_is_not_called_says_nothing() -> None:
    assert find_flow(chain(), lambda: None).connected is None


class Wrapper(nn.Module):
    """Calls its parts itself, as a ``training_step`` does, and the loss is a part."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.loss = chain(), chain(), nn.MSELoss()
        self.widen = nn.Linear(4, 6)

    def step(self, inputs: Tensor) -> Tensor:
        found = self.decoder(self.widen(self.encoder(inputs)))
        return self.loss(found, torch.ones(4, 4))


@pytest.mark.parametrize(
    "name", ["encoder.0", "encoder.2", "widen", "decoder.0", "decoder.2"]
)
def test_where_only_parts_are_called_their_inputs_and_the_last_outputs_count(
    name: str,
) -> None:
    torch.manual_seed(0)
    model: Any = Wrapper()
    run = partial(model.step, vectors())
    weight = model.get_submodule(name).weight
    found = find_flow(model, run, [weight])
    assert found.connected and found.gradients[0].any()
    with torch.no_grad():
        weight.zero_()
    assert find_flow(model, run).connected is False


class Config(dict[str, Any]):
    """A dictionary with attributes, like the inputs and outputs of many models."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def test_a_dictionary_of_a_type_of_its_own_stays_one() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = chain()

        def forward(self, batch: Config) -> Config:
            return Config(logits=self.body(batch.x))

    model: Any = Reads()
    given = Config(x=vectors())
    assert find_flow(model, lambda: model(given)).connected
    assert given.x.grad_fn is None  # what was given is not written to
    nn.init.zeros_(model.body[0].weight)
    assert find_flow(model, lambda: model(given)).connected is False


def test_a_loss_may_take_the_gradient_of_its_inputs() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))

    def run() -> Tensor:
        inputs = vectors().requires_grad_()
        total = model(inputs).sum()
        (slope,) = torch.autograd.grad(total, inputs, create_graph=True)
        return slope.square().sum()

    assert find_flow(model, run).connected


def test_what_is_only_read_by_the_loss_has_a_gradient() -> None:
    model, other = chain(), nn.Linear(4, 6)
    weights = [*model.parameters(), *other.parameters()]
    found = find_flow(model, lambda: other(model(vectors())).square().sum(), weights)
    assert all(gradient is not None and gradient.any() for gradient in found.gradients)
    first = nn.Linear(6, 6)
    found = find_flow(model, lambda: model(first(vectors())), [first.weight])
    assert found.gradients[0] is not None and found.gradients[0].any()


@pytest.mark.parametrize("frozen", [False, True])
def test_embeddings_have_gradients_and_serve_when_they_are_frozen(frozen: bool) -> None:
    torch.manual_seed(0)
    model = Language()
    table = model.embeddings.words.weight.requires_grad_(not frozen)
    weights = [] if frozen else [table]
    found = find_flow(model, lambda: model(words()), weights)
    assert found.connected
    assert frozen or found.gradients[0].any()
    nn.init.zeros_(model.embeddings.norm.weight)
    assert find_flow(model, lambda: model(words())).connected is False


class Table(nn.Module):
    """Categories, of which it makes the rows of one embedding, beside numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.numbers = nn.Embedding(20, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        rows = self.rows(categories + torch.tensor([0, 10])).sum(1)
        return self.head(rows + self.numbers(numbers))


def test_a_model_responds_where_samples_that_change_places_change_its_outputs() -> None:
    torch.manual_seed(0)
    model = Table().eval()
    categories = torch.arange(8).view(4, 2)

    def run() -> Tensor:
        return model(categories, vectors())

    nn.init.zeros_(model.numbers.weight)
    assert find_flow(model, run).connected is False  # categories are not seen
    assert responds(model, run)
    nn.init.zeros_(model.rows.weight)
    assert not responds(model, run)
    sequence = Language().eval()  # its positions differ, whatever the words
    nn.init.zeros_(sequence.embeddings.words.weight)
    assert not responds(sequence, lambda: sequence(words()))


def test_outputs_without_a_graph_say_nothing() -> None:
    model = chain()
    with torch.no_grad():
        assert find_flow(model, lambda: model(vectors())).connected is None


def test_no_hook_stays_also_when_the_model_fails() -> None:
    model = chain()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        find_flow(model, lambda: model(torch.zeros(4, 5)))
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
