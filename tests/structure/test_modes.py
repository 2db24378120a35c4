"""Branches that run in training only, layers that never run, and smaller models."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch_pruning as tp
import torchvision
from state import unchanged
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from force_plugin import SaliencyImportance, apply_masks, compact, snap_prune
from force_plugin.data.containers import tensors
from force_plugin.structure.both_modes import Behaviour, in_mode
from force_plugin.structure.cut_copies import plain_copy


class Pair(NamedTuple):
    out: Tensor
    aux: Tensor


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.training else x


Branch = Callable[[Any, Tensor, Tensor], Any]


class Branched(nn.Module):
    """Two convolutions side by side; in training mode, a branch behind them.

    Args:
        branch: What comes out in training mode, of the network, both convolutions and
            the output.
        layers: What it consists of.
    """

    def __init__(self, branch: Branch, **layers: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3)
        self.c, self.head = nn.Conv2d(32, 8, 3), nn.Linear(8, 5)
        self.branch, self.flag = branch, False
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(torch.cat([self.a(x), self.b(x)], 1))
        out = self.head(pooled(torch.relu(self.c(h))))
        return self.branch(self, h, out) if self.training or self.flag else out


def pooled(h: Tensor) -> Tensor:
    return h.mean((2, 3))


def squares(h: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(h, 2).flatten(1)


def tokens(h: Tensor) -> Tensor:
    return h.flatten(2).transpose(1, 2)


def build(name: str) -> Any:
    torch.manual_seed(0)
    make = CUT.get(name) or STAYS[name]
    return make().double()


# What a branch reads is cut along with what the rest reads.
CUT: dict[str, Callable[[], nn.Module]] = {
    "list": lambda: Branched(
        lambda m, h, out: [out, m.aux(pooled(h))], aux=nn.Linear(32, 5)
    ),
    "named_tuple": lambda: Branched(
        lambda m, h, out: Pair(out, m.aux(pooled(h))), aux=nn.Linear(32, 5)
    ),
    "dictionary": lambda: Branched(
        lambda m, h, out: {"out": out, "aux": (m.aux(pooled(h)), None)},
        aux=nn.Linear(32, 5),
    ),
    "flattening": lambda: Branched(
        lambda m, h, out: (out, m.aux(squares(h))), aux=nn.Linear(128, 5)
    ),
    "two_heads": lambda: Branched(
        lambda m, h, out: (out, m.aux(pooled(h)), m.other(pooled(torch.relu(m.d(h))))),
        aux=nn.Linear(32, 5),
        d=nn.Conv2d(32, 6, 1),
        other=nn.Linear(6, 5),
    ),
    "shared_head": lambda: Branched(
        lambda m, h, out: (out, m.head(m.aux(pooled(h)))), aux=nn.Linear(32, 8)
    ),
    "shared_convolution": lambda: Branched(
        lambda m, h, out: (out, m.head(pooled(torch.relu(m.c(h.flip(3))))))
    ),
    "batch_norm": lambda: Branched(
        lambda m, h, out: (out, m.aux(pooled(m.norm(h)))),
        norm=nn.BatchNorm2d(32),
        aux=nn.Linear(32, 5),
    ),
    "depthwise": lambda: Branched(
        lambda m, h, out: (out, m.aux(pooled(m.filters(h)))),
        filters=nn.Conv2d(32, 32, 3, groups=32),
        aux=nn.Linear(32, 5),
    ),
    "tokens": lambda: Branched(
        lambda m, h, out: (out, m.aux(tokens(h)).mean(1)), aux=nn.Linear(32, 5)
    ),
    "noise": lambda: Branched(
        lambda m, h, out: (out, m.aux(pooled(m.noise(h)))),
        noise=Noise(),
        aux=nn.Linear(32, 5),
    ),
    "noise_alone": lambda: Branched(
        lambda m, h, out: m.head(pooled(torch.relu(m.c(m.noise(h))))), noise=Noise()
    ),
    "dropout": lambda: Branched(
        lambda m, h, out: (out, m.aux(m.drop(pooled(h)))),
        drop=nn.Dropout(0.7),
        aux=nn.Linear(32, 5),
    ),
    "drop_path": lambda: Branched(
        lambda m, h, out: (out, m.aux(pooled(h + m.drop(h)))),
        drop=DropPath(0.5),
        aux=nn.Linear(32, 5),
    ),
    "stochastic_depth": lambda: Branched(
        lambda m, h, out: (out, m.aux(pooled(h + m.drop(h)))),
        drop=StochasticDepth(0.5, "batch"),
        aux=nn.Linear(32, 5),
    ),
    "own_scale": lambda: Branched(
        lambda m, h, out: m.head(pooled(torch.relu(m.c(h * m.scale)))),
        scale=nn.Parameter(torch.rand(32, 1, 1)),
    ),
}


def kept_aside(m: Any, h: Tensor, out: Tensor) -> Tensor:
    m.kept = m.aux(pooled(h))
    return out


# It cannot be cut along, or torch-pruning takes the wrong inputs.
STAYS: dict[str, Callable[[], nn.Module]] = {
    "detached": lambda: Branched(
        lambda m, h, out: (out, m.aux(pooled(h.detach()))), aux=nn.Linear(32, 5)
    ),
    "kept_aside": lambda: Branched(
        kept_aside,
        aux=nn.Linear(32, 5),
    ),
    "noise_of_one_width": lambda: Branched(
        lambda m, h, out: m.head(pooled(torch.relu(m.c(h + torch.randn(32, 1, 1)))))
    ),
    "shuffle": lambda: Branched(
        lambda m, h, out: (out, m.aux(pooled(h.unflatten(1, (4, 8)).flatten(1, 2)))),
        aux=nn.Linear(32, 5),
    ),
    "halves": lambda: Branched(
        lambda m, h, out: (out, m.aux(pooled(h[:, :16] + h[:, 16:]))),
        aux=nn.Linear(16, 5),
    ),
}


def images(samples: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 3, 12, 12, generator=generator, dtype=torch.float64)


def masked(model: Any) -> Any:
    """Whatever reads ``a`` and ``b`` reads twelve of their sixteen channels each."""
    read = torch.arange(32) % 16 < 12
    masks = {"c.weight": read.view(1, -1, 1, 1).expand(8, 32, 3, 3)}
    if hasattr(model, "d"):
        masks["d.weight"] = read.view(1, -1, 1, 1).expand(6, 32, 1, 1)
    aux = getattr(model, "aux", None)
    if isinstance(aux, nn.Linear):
        columns = read[:16] if aux.in_features == 16 else read
        columns = columns.repeat_interleave(max(1, aux.in_features // 32))
        masks["aux.weight"] = columns.expand(aux.weight.shape)
    apply_masks(model, masks)
    return model


def in_training(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Outputs in training mode, but for leaves: dropout and batch norm stand still."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if next(module.children(), None) is None:
            module.eval()
    with torch.no_grad():
        return list(tensors(model(inputs)))


def loss(model: nn.Module, batch: Any) -> Tensor:
    outputs = [output.square().mean() for output in tensors(model(batch[0]))]
    return torch.stack(outputs).sum()


def assert_trains(model: nn.Module, inputs: Tensor) -> None:
    model.train()
    loss(model, (inputs,)).backward()
    used = [p for p in model.parameters() if p.grad is not None]
    assert all(p.grad.shape == p.shape for p in used)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CUT)
def test_compact_cuts_what_runs_in_training_only(name: str) -> None:
    model = masked(build(name))
    with unchanged(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        small = compact(model, images(2), progress=False)
    assert (small.a.out_channels, small.b.out_channels) == (12, 12)
    assert_same(in_training(small, images()), in_training(model, images()))
    assert_trains(small, images())


def snapped(model: nn.Module, sparsity: float = 0.5, **options: Any) -> Any:
    options = {"steps": 1, "forward": loss, "progress": False, **options}
    loader = [(images(), None)]
    return snap_prune(model, loader, images(2), sparsity, **options)


def without_channels(model: Any, small: Any) -> Any:
    """A copy whose channels are 0 that a smaller one has lost of ``a`` and ``b``."""
    model = copy.deepcopy(model)
    for name in "ab":
        layer, left = model.get_submodule(name), small.get_submodule(name).weight
        stay = (layer.weight[:, None] == left).flatten(2).all(2).any(1)
        assert int(stay.sum()) == len(left)
        with torch.no_grad():
            layer.weight[~stay] = 0
            layer.bias[~stay] = 0
    return model


@pytest.mark.filterwarnings("ignore:1 of 3 sets of channels stay")
@pytest.mark.parametrize("name", CUT)
def test_snap_prune_cuts_what_runs_in_training_only(name: str) -> None:
    model = build(name)
    with unchanged(model):
        small = snapped(model, ignored_layers=[model.c])
    assert small.a.out_channels + small.b.out_channels <= 20
    found, *of_branch = in_training(small, images())
    expected, *others = in_training(without_channels(model, small), images())
    assert_same([found], [expected])
    if name not in ("batch_norm", "depthwise"):  # their biases are read, too
        assert_same(of_branch, others)
    assert_trains(small, images())


@pytest.mark.parametrize("name", STAYS)
def test_channels_stay_that_cannot_be_cut_in_training_mode(name: str) -> None:
    model = masked(build(name))
    with unchanged(model), pytest.raises(RuntimeError, match="in training mode "):
        compact(model, images(2), progress=False)
    with pytest.warns(UserWarning, match="stay as they are .*in training mode "):
        small = snapped(build(name))
    assert small.a.out_channels == 16
    assert_trains(small, images())


def test_values_are_compared_behind_dropout() -> None:
    def rolled(m: Any, h: Tensor, out: Tensor) -> Any:
        return out, m.aux(F.dropout(pooled(h).roll(1, 1), 0.4))

    torch.manual_seed(0)
    model = Branched(rolled, aux=nn.Linear(32, 5)).double()
    with pytest.warns(UserWarning, match="in training mode an output would change by"):
        assert snapped(model).a.out_channels == 16


def test_a_branch_that_cannot_be_cut_leaves_the_rest_to_be_cut() -> None:
    model = masked(build("detached"))
    apply_masks(model, {"head.weight": (torch.arange(8) < 6).expand(5, 8)})
    message = (
        r"2 of 3 sets .*that of a, for one.*: in training mode it would fail: Runt"
    )
    with pytest.warns(UserWarning, match=message):
        small = compact(model, images(2), progress=False)
    assert (small.a.out_channels, small.c.out_channels) == (16, 6)
    assert_same(in_training(small, images()), in_training(model, images()))


@pytest.mark.filterwarnings("ignore:the masks have disconnected the network")
def test_channels_that_training_alone_reads_stay() -> None:
    model = build("list")
    apply_masks(model, {"c.weight": torch.zeros(8, 32, 3, 3)})
    small = compact(model, images(2), progress=False)
    assert (small.a.out_channels, small.aux.in_features) == (16, 32)
    assert_same(in_training(small, images()), in_training(model, images()))


def test_channels_without_a_rank_stay_with_a_warning() -> None:
    message = "1 of 4 sets of channels stay as they are .*that of d, .* have no rank"
    with pytest.warns(UserWarning, match=message):
        small = snapped(build("two_heads"))
    assert small.d.out_channels == 6


def test_what_adds_to_the_rest_in_training_only_is_cut_with_it() -> None:
    class Adding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x) + self.b(x) if self.training else self.a(x)
            return self.head(torch.relu(y))

    x = images().flatten(1)[:, :6]
    small = snap_prune(
        Adding().double(), [(x, None)], x, 0.5, forward=loss, progress=False
    )
    assert (small.a.out_features, small.b.out_features) == (4, 4)
    assert_trains(small, x)


def test_what_is_handed_over_is_looked_at_once_more() -> None:
    def narrow(m: Any, h: Tensor, out: Tensor) -> Any:
        return out, m.aux(pooled(h)) if h.shape[1] > 10 else out

    torch.manual_seed(0)
    model = Branched(narrow, aux=nn.Linear(32, 5)).double()
    with unchanged(model), pytest.raises(RuntimeError, match="without these channels"):
        snapped(model, 0.8, ignored_layers=[model.c])


def test_a_gate_that_is_closed_hides_nothing_from_snap_prune() -> None:
    def gated(m: Any, h: Tensor, out: Tensor) -> Any:
        return out + m.gate * m.aux(pooled(h).roll(1, 1))

    torch.manual_seed(0)
    gate = nn.Parameter(torch.zeros(5))
    model = Branched(gated, aux=nn.Linear(32, 5), gate=gate).double()
    with pytest.warns(UserWarning, match="in training mode an output would change"):
        assert snapped(model).a.out_channels == 16


# Layers that never run, and modes that do not.


UNUSED: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(16, 5),
    "convolution": lambda: nn.Conv2d(16, 4, 1),
    "all_inputs": lambda: nn.Linear(32, 5),
    "attention": lambda: nn.MultiheadAttention(16, 2),
    "batch_norm": lambda: nn.BatchNorm2d(16),
    "embedding": lambda: nn.Embedding(9, 16),
    "flagged": lambda: nn.Linear(16, 5),
}


@pytest.mark.parametrize("name", UNUSED)
def test_layers_that_never_run_keep_nothing_and_are_named(name: str) -> None:
    torch.manual_seed(0)
    model = Branched(lambda m, h, out: out, unused=UNUSED[name]()).double()
    message = "neither evaluation nor training mode uses unused.* of Branched"
    with pytest.warns(UserWarning, match=message):
        small = compact(masked(model), images(2), progress=False)
    assert (small.a.out_channels, small.b.out_channels) == (12, 12)
    with pytest.warns(UserWarning, match=message):
        assert snapped(model).a.out_channels < 16
    for key, value in model.unused.state_dict().items():
        assert torch.equal(small.unused.state_dict()[key], value)


READS: dict[str, Branch] = {
    "function": lambda m, h, out: (out, F.linear(pooled(h), m.aux.weight)),
    "forward": lambda m, h, out: (out, m.aux.forward(pooled(h))),
}


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("name", READS)
def test_layers_that_are_read_without_a_call_are_named(name: str, always: bool) -> None:
    torch.manual_seed(0)
    model = Branched(READS[name], aux=nn.Linear(32, 5)).double()
    model.flag = always
    message = "stay .*torch-pruning cannot follow what aux may read, as the weight is"
    with pytest.warns(UserWarning, match=message):
        small = compact(masked(model), images(2), progress=False)
    assert_same(in_training(small, images()), in_training(model, images()))
    with pytest.warns(UserWarning, match=message):
        assert_trains(snapped(model), images())


@pytest.mark.parametrize("head", [False, True])
def test_a_model_that_needs_targets_in_training_is_not_refused(head: bool) -> None:
    def refuse(m: Any, h: Tensor, out: Tensor) -> Any:
        raise ValueError("targets should not be none")

    torch.manual_seed(0)
    layers = {"aux": nn.Linear(32, 5)} if head else {}
    model = Branched(refuse, **layers).double()
    message = (
        r"Branched cannot be run in training mode .*\(ValueError: targets should not "
        "be none.*only evaluation mode was compared"
    ) + (", which does not use aux" if head else "$")
    with pytest.warns(UserWarning, match=message):
        small = compact(masked(model), images(2), progress=False)
    assert small.a.out_channels == 12
    with pytest.warns(UserWarning, match=message):
        assert snapped(model).a.out_channels < 16


# The two modes of a copy.


RANDOM: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.4),
    "feature_dropout": lambda x: F.dropout1d(x, 0.4),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.4, training=True),
    "uniform": lambda x: x * torch.rand_like(x) + torch.rand(x.shape),
    "normal": lambda x: x + torch.randn_like(x) + torch.randn(x.shape),
    "in_place": lambda x: x + torch.empty_like(x).normal_(1, 2).uniform_(-1, 3),
    "of_a_mean": lambda x: torch.normal(x, 2.0) + torch.normal(0.0, 1.0, x.shape),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.3)),
    "bernoulli_in_place": lambda x: x * x.new_empty(x.shape).bernoulli_(0.3),
    "mask": lambda x: x * torch.empty(x.shape, dtype=torch.bool).bernoulli_(0.7),
    "gumbel": lambda x: F.gumbel_softmax(x),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.4),
}


@pytest.mark.parametrize("kind", RANDOM)
def test_random_values_are_their_means(kind: str) -> None:
    class Random(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return RANDOM[kind](x) if self.training else x

    model, x = Random().eval(), torch.rand(4, 8, 8, dtype=torch.float64)
    state = torch.get_rng_state()
    found = []
    for seed in (0, 1):
        with in_mode(model, "training", seed):
            found.append(model(x))
    assert torch.equal(*found)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert not torch.equal(model.train()(x), model(x))
    if kind in ("dropout", "feature_dropout"):
        torch.testing.assert_close(found[0], x)


def test_gradients_pass_where_random_values_are_their_means() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.4), nn.Linear(8, 3)).eval()
    with in_mode(model, "training"):
        model(torch.rand(4, 8)).sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(0)
    model(torch.rand(4, 8)).sum().backward()
    assert all(grad is not None and grad.any() for grad in expected)


def test_buffers_and_parameters_are_those_of_before() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), Counting()).eval()
    with unchanged(model), in_mode(model, "training"):
        model(torch.rand(4, 8))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count: Tensor
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += self.training
        return x


ONCE: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: timm.create_model(
        "test_resnet", drop_path_rate=0.2, drop_rate=0.2
    ),
    "vit": lambda: timm.create_model(
        "test_vit", img_size=32, drop_path_rate=0.2, attn_drop_rate=0.2
    ),
    "convnext": lambda: timm.create_model("test_convnext", drop_path_rate=0.2),
}


@pytest.mark.parametrize("name", ONCE)
def test_training_is_traced_only_where_it_uses_something_else(name: str) -> None:
    x = torch.randn(2, 3, 32, 32).double()
    behaviour = Behaviour(plain_copy(ONCE[name]()), {}, x)
    assert behaviour.traced == ("evaluation",)
    assert list(behaviour.complaints(True)) == []
    behaviour = Behaviour(plain_copy(build("list")), {}, images())
    assert behaviour.traced == ("evaluation", "training")


# Models of others.


def googlenet() -> nn.Module:
    return torchvision.models.googlenet(num_classes=5, init_weights=False)


def distilled() -> nn.Module:
    name = "deit_tiny_distilled_patch16_224"
    options = {"img_size": 32, "depth": 2, "num_classes": 5, "drop_rate": 0.1}
    return timm.create_model(name, **options)


MODELS: dict[str, tuple[Callable[[], nn.Module], int, str, int]] = {
    "googlenet": (googlenet, 64, "inception4a.branch1.conv", 96),
    "distilled": (distilled, 32, "blocks.0.mlp.fc1", 384),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_as_they_come(name: str) -> None:
    make, size, layer, left = MODELS[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(2, 3, size, size)
    weight: Any = model.get_submodule(layer).weight
    rows = torch.arange(len(weight)) < left
    mask = rows.view(-1, *[1] * (weight.dim() - 1)).expand(weight.shape)
    apply_masks(model, {f"{layer}.weight": mask})
    if (bias := model.get_submodule(layer).bias) is not None:
        bias.data[~rows] = 0
    with unchanged(model):
        small: Any = compact(model, x, progress=False)
    assert len(small.get_submodule(layer).weight) == left
    for one, other in zip(in_training(small, x), in_training(model, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert_trains(small, x)


# Pruners of torch-pruning.


def both(model: nn.Module, inputs: Tensor) -> list[Any]:
    """What comes out in training mode and in evaluation mode."""
    return [model.train(mode)(inputs) for mode in (True, False)]


def test_importance_says_which_layers_no_graph_shows() -> None:
    def train(model: nn.Module, batch: Any) -> Tensor:
        return loss(model.train(), batch)

    widths = []
    for forward in (None, both):
        model = build("list")
        importance = SaliencyImportance(model, [(images(), None)], forward=train)
        pruner = tp.pruner.BasePruner(
            model,
            images(2),
            importance,
            pruning_ratio=0.5,
            ignored_layers=[model.head, model.aux],
            forward_fn=forward,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pruner.step()
        said = [str(one.message) for one in caught if "not show" in str(one.message)]
        assert len(said) == (forward is None)
        assert all("does not show aux: " in one for one in said)
        widths.append((model.a.out_channels, model.aux.in_features))
    assert widths == [(8, 32), (8, 16)]
    assert_trains(model, images())
