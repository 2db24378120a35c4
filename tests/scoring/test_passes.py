"""How batches are passed through: in parts, with autocast, in a format, compiled."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, NamedTuple

import pytest
import torch
from kinds_of_methods import ITERATIVE
from networks import batches
from state import same, unchanged
from torch import Tensor, nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from force_plugin import METHODS, force_prune, get_masks, saliency
from force_plugin.model.weights_to_prune import find_weights
from force_plugin.scoring.passes import Passes
from force_plugin.scoring.probe import Probe

pytestmark = pytest.mark.filterwarnings("ignore:1 of 4 layers:UserWarning")

Batch = tuple[Tensor, Tensor]
STEPS: dict[str, Any] = {"steps": 3, "progress": False, "on_collapse": "warn"}


class Network(nn.Module):
    """Convolutions and a classifier, in float64, without batch statistics or with."""

    def __init__(self, *, batch_norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6) if batch_norm else nn.GroupNorm(2, 6)
        self.body = nn.Conv2d(6, 6, 3)
        self.head = nn.Linear(96, 5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.body(torch.relu(self.norm(self.stem(x)))))
        return self.head(x.flatten(1))


class Doubtful(Network):
    """With a closed gate, and a layer whose gradient ends."""

    def __init__(self) -> None:
        super().__init__(batch_norm=True)
        self.flat = nn.Conv2d(2, 2, 1).double()
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.sign(self.flat(x)))


def images(count: int = 3, samples: int = 8) -> list[Batch]:
    return batches(count, samples, (2, 6, 6), 5)


def pruned(model: nn.Module, loader: Any = None, **options: Any) -> dict[str, Tensor]:
    """The masks of a pruning."""
    force_prune(model, loader or images(), 0.8, **{**STEPS, **options})
    return get_masks(model)


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether scores are the same but for rounding."""
    return list(a) == list(b) and all(
        (a[name] - b[name]).abs().max() <= 1e-12 * b[name].abs().max() for name in a
    )


def seeing(model: nn.Module, note: Callable[[Any], object]) -> nn.Module:
    """A model whose inputs are noted, in whichever pass."""
    inner = type(model).forward

    class Seeing(type(model)):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            note(x)
            return inner(self, x)

    model.__class__ = Seeing
    return model


# In parts.


@pytest.mark.parametrize(("most", "sizes"), [(1, [1] * 7), (3, [2, 2, 3]), (6, [3, 4])])
def test_a_part_counts_by_its_share_of_the_samples(most: int, sizes: list[int]) -> None:
    model, batches = Network(batch_norm=True), images(2, 7)
    if most == 1:
        model.eval()
    twin = deepcopy(model)
    for x, y in batches:
        for inputs, targets in zip(x.split(sizes), y.split(sizes), strict=True):
            loss = cross_entropy(twin(inputs), targets)
            (loss * len(inputs) / 7 / 2).backward()
    expected = {
        f"{name}.weight": (m.weight * m.weight.grad).abs().detach()
        for name, m in twin.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
    }
    scores = saliency(model, batches, "snip", batches=2, microbatch=most)
    assert close(scores, expected)
    if most != 1:
        assert not close(scores, saliency(model, batches, "snip", batches=2))


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("most", [1, 3, 4])
@pytest.mark.parametrize("method", METHODS)
def test_parts_have_the_gradient_of_the_batch(
    method: str, most: int, batches: int
) -> None:
    def scores(**options: Any) -> dict[str, Tensor]:
        torch.manual_seed(2)
        return saliency(Network(), images(), method, batches=batches, **options)

    assert close(scores(microbatch=most), scores())
    assert same(scores(microbatch=8), scores())


@pytest.mark.parametrize("batches", [1, 2, None])
@pytest.mark.parametrize("method", METHODS)
def test_parts_give_the_masks_of_the_batch(method: str, batches: int | None) -> None:
    masks = []
    for most in (None, 3):
        torch.manual_seed(2)
        options = {"method": method, "batches": batches, "microbatch": most}
        masks.append(pruned(Network(), **options))
    assert same(masks[0], masks[1])


def test_the_loss_is_that_of_the_batch() -> None:
    losses: list[float] = []
    numbers: list[int] = []
    for most in (None, 3):
        model = Network()
        with Probe(
            model,
            find_weights(model),
            images(),
            Passes(batches=3, microbatch=most),
            on_batch=numbers.append,
        ) as probe:
            probe.gradients()
        losses.append(probe.loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    assert numbers == [1, 2, 3] * 2


@pytest.mark.parametrize("way", ["loss_fn", "forward"])
@pytest.mark.parametrize("method", METHODS)
def test_no_pass_is_larger_than_a_part(method: str, way: str) -> None:
    seen: list[int] = []
    model = seeing(Doubtful(), lambda x: seen.append(len(x)))
    options: dict[str, Any] = {"method": method, "microbatch": 3, "batches": 2}
    if way == "forward":
        options["forward"] = lambda model, batch: cross_entropy(
            model(batch[0]), batch[1]
        )
    report = force_prune(model, images(3, 11), 0.998, **STEPS, **options)
    assert max(seen, default=0) <= 3
    if METHODS[method].looks:
        # What comes before and after the gradients has come, too.
        said = " ".join(report.warnings)
        assert "gates opened" in said or method == "synflow"
        assert "the gradient ends at sign" in said
        assert "disconnected" in said


class Labelled(NamedTuple):
    """What some data sets give."""

    image: Tensor
    label: Tensor


class Encoding(UserDict[str, Any]):
    """As the batches of tokenizers."""

    def to(self, device: torch.device) -> Encoding:
        return Encoding({key: value.to(device) for key, value in self.items()})


def nested(build: str, x: Tensor, y: Tensor) -> Any:
    return {
        "dict": {"x": x, "y": y},
        "encoding": Encoding(x=x, y=y),
        "named": Labelled(x, y),
        "list": [[{"x": x}], (y,)],
    }[build]


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, list):
        ((inner,), (y,)) = batch
        return cross_entropy(model(inner["x"]), y)
    if isinstance(batch, Labelled):
        return cross_entropy(model(batch.image), batch.label)
    return cross_entropy(model(batch["x"]), batch["y"])


@pytest.mark.parametrize("build", ["dict", "encoding", "named", "list"])
@pytest.mark.parametrize("method", ["force", "grasp"])
def test_batches_of_other_kinds_are_split(method: str, build: str) -> None:
    seen: list[int] = []
    model = seeing(Network(), lambda x: seen.append(len(x)))
    loader = [nested(build, *batch) for batch in images()]
    options: dict[str, Any] = {"method": method, "forward": loss_of, "batches": 2}
    masks = pruned(model, loader, microbatch=3, **options)
    assert set(seen) == {3, 2}
    assert same(masks, pruned(Network(), loader, **options))


def test_what_does_not_belong_to_a_sample_goes_with_each_part() -> None:
    seen: list[Any] = []
    packed = pack_sequence([torch.randn(5, 2), torch.randn(3, 2)])
    x, y = images()[0]
    word, weight = object(), torch.arange(1, 6).double()
    batch = (word, torch.tensor(0.5), {"x": x, "weight": weight}, packed, y)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch)
        return cross_entropy(model(batch[2]["x"]), batch[-1], batch[2]["weight"])

    saliency(Network(), [batch], "snip", forward=loss, microbatch=3)
    assert [len(part[-1]) for part in seen] == [2, 3, 3]
    for part in seen:
        assert part[0] is word and part[1].item() == 0.5
        assert torch.equal(part[2]["weight"], weight)
        assert isinstance(part[3], PackedSequence)
        assert torch.equal(part[3].data, packed.data)
    assert torch.equal(torch.cat([part[2]["x"] for part in seen]), x)


# In mixed precision.


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("method", [*ITERATIVE, "snip", "grasp"])
def test_autocast_is_that_of_a_region_around_it(method: str, batches: int) -> None:
    def masks(**options: Any) -> dict[str, Tensor]:
        model = Network(batch_norm=True).float()
        loader = [(x.float(), y) for x, y in images()]
        scores = saliency(model, loader, method, batches=batches, **options)
        assert all(score.dtype == torch.float32 for score in scores.values())
        found = pruned(model, loader, method=method, batches=batches, **options)
        return scores | {f"{name}, mask": mask for name, mask in found.items()}

    plain = masks()
    ours = masks(autocast=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = masks()
    assert same(ours, theirs) and not same(ours, plain)


@pytest.mark.parametrize("way", ["loss_fn", "forward"])
def test_network_and_loss_run_under_autocast_and_the_backward_pass_does_not(
    way: str,
) -> None:
    forward, backward = [], []

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            output = super().forward(x)
            forward.append(output.dtype == torch.bfloat16)
            if output.requires_grad:
                output.register_hook(
                    lambda _: backward.append(torch.is_autocast_enabled("cpu"))
                )
            return output

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        forward.append(torch.is_autocast_enabled("cpu"))
        return cross_entropy(outputs, targets)

    options: dict[str, Any] = {"loss_fn": loss_fn}
    if way == "forward":
        options["forward"] = lambda model, batch: loss_fn(model(batch[0]), batch[1])
    model = nn.Sequential(nn.Flatten(), Watched(72, 9), nn.ReLU(), Watched(9, 5))
    loader = [(x.float(), y) for x, y in images()]
    # At the end comes a look at whether anything is connected, by all samples.
    force_prune(model, loader, 0.99, autocast=torch.bfloat16, **STEPS, **options)
    assert all(forward) and backward and not any(backward)
    assert not torch.is_autocast_enabled("cpu")


def test_synflow_stays_in_float64_under_autocast() -> None:
    model = Network().float()
    loader = [(x.float(), y) for x, y in images()]
    scores = saliency(model, loader, "synflow", autocast=torch.bfloat16)
    assert same(scores, saliency(model, loader, "synflow"))


# With channels last.


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("way", ["loss_fn", "forward"])
@pytest.mark.parametrize("method", ["force", "grasp"])
def test_a_convolution_sees_channels_last(
    method: str, way: str, dimensions: int
) -> None:
    conv, last = {
        2: (nn.Conv2d, torch.channels_last),
        3: (nn.Conv3d, torch.channels_last_3d),
    }[dimensions]
    seen: list[bool] = []
    model = nn.Sequential(conv(2, 4, 3), nn.Flatten(), nn.LazyLinear(5))
    x = torch.randn(8, 2, *[5] * dimensions)
    model(x)
    model[0] = seeing(
        model[0], lambda x: seen.append(x.is_contiguous(memory_format=last))
    )
    codes = torch.zeros_like(x, dtype=torch.uint8)
    batch = {"x": [x], "y": torch.arange(8) % 5, "codes": codes}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        assert batch["codes"].is_contiguous()
        return cross_entropy(model(batch["x"][0]), batch["y"])

    options: dict[str, Any] = {"method": method, "channels_last": True}
    loader: list[Any] = [(x, batch["y"])]
    if way == "forward":
        loader, options["forward"] = [batch], loss
    saliency(model, loader, **options)
    force_prune(model, loader, 0.99, **STEPS, **options)
    assert seen and all(seen)
    assert x.is_contiguous()


@pytest.mark.parametrize("method", METHODS)
def test_channels_last_gives_the_same_masks_in_the_same_format(method: str) -> None:
    masks, strides = [], []
    for channels_last in (False, True):
        torch.manual_seed(2)
        model = Network(batch_norm=True)
        masks.append(pruned(model, method=method, channels_last=channels_last))
        tensors = (*model.parameters(), *model.buffers())
        strides.append([tensor.stride() for tensor in tensors])
    assert same(masks[0], masks[1])
    assert strides[0] == strides[1]


# Compiled.


@pytest.fixture(autouse=True)
def _counted() -> None:
    counters.clear()


def compiled() -> tuple[int, int]:
    """How many graphs were compiled since a test began, and how often one broke."""
    broken = sum(counters["graph_break"].values())
    return counters["stats"]["unique_graphs"], broken


@pytest.mark.parametrize("method", ITERATIVE)
def test_compiled_passes_give_the_same_masks(method: str) -> None:
    model, passes = Doubtful(), []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        assert outputs.grad_fn is not None
        passes.append("CompiledFunction" in outputs.grad_fn.name())
        if passes[-1]:  # nothing looks on that would have to be compiled, too
            # But for a method that looks at the outputs of layers itself.
            assert not model.body._forward_hooks or method == "steady_force"
            assert type(model.body._parameters) is dict
        return cross_entropy(outputs, targets)

    options: dict[str, Any] = {"method": method, "batches": 2}
    masks = pruned(model, compile=True, loss_fn=loss_fn, **options)
    assert same(masks, pruned(Doubtful(), **options))
    # With gates closed, with gates open, and why a layer has no gradient.
    eager, steps = 3, 7 if method == "snip_it" else 3
    assert passes.count(False) == eager
    assert passes.count(True) == 2 * steps - 1
    assert compiled() == (1, 0)


def test_a_report_is_that_of_eager_passes() -> None:
    class Reading(Network):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.norm(self.stem(x)))
            x = nn.functional.conv2d(x, self.body.weight, self.body.bias)
            return self.head(torch.tanh(x).flatten(1))

    reports, masks = [], []
    for option in (False, True):
        model = Reading()
        report = force_prune(model, images(), 0.99, compile=option, **STEPS)
        reports.append(report.to_dict())
        masks.append(get_masks(model))
        model(images()[0][0])  # reads the weight as it is pruned
    assert reports[0] == reports[1] and same(masks[0], masks[1])
    assert "disconnected" in " ".join(reports[0]["warnings"])


@pytest.mark.parametrize("earlier", [False, True])
def test_a_model_that_is_pruned_in_part_is_compiled(earlier: bool) -> None:
    masks = []
    for option in (False, True):
        model = Network()
        (force_prune if earlier else prune_l1)(model, images(), 0.3, progress=False)
        masks.append(pruned(model, compile=option))
    assert same(masks[0], masks[1])


def prune_l1(model: Network, *_: Any, **__: Any) -> None:
    prune.l1_unstructured(model.body, "weight", 0.3)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model, backend="eager"),
        lambda model: model.compile(backend="eager") or model,
        lambda model: model.body.compile(backend="eager") or model,
    ],
    ids=["wrapped", "in place", "in part"],
)
def test_a_model_that_was_compiled_is_compiled(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    model = Network()
    force_prune(wrap(model), images(), 0.8, compile=True, **STEPS)
    assert same(get_masks(model), pruned(Network()))


def test_compiled_scoring_leaves_no_trace() -> None:
    model = Doubtful()
    with unchanged(model):
        scores = saliency(model, images(), batches=3, compile=True)
    assert compiled() == (1, 0)
    for forward in (Doubtful.forward, Network.forward):  # nor compiled code
        assert not _debug_get_cache_entry_list(forward)
    assert close(scores, saliency(model, images(), batches=3))


class Breaking(list[Batch]):
    """A loader that raises in the place of a batch."""

    def __init__(self, at: int) -> None:
        super().__init__(images())
        self.at = at

    def __iter__(self) -> Iterator[Batch]:
        for i, batch in enumerate(super().__iter__()):
            if i == self.at:
                raise KeyboardInterrupt
            yield batch


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("method", ["force", "snip_it"])
@pytest.mark.parametrize("batches", [1, None])
@pytest.mark.parametrize(
    "options",
    [
        {"compile": True},
        {"microbatch": 3},
        {"autocast": torch.bfloat16},
        {"channels_last": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_interrupt_leaves_no_trace(
    options: dict[str, Any], batches: int | None, method: str, at: int
) -> None:
    model = Doubtful()
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        pruned(model, Breaking(at), method=method, batches=batches, **options)
    assert not torch.is_autocast_enabled("cpu")
    assert "_compiled_call_impl" not in vars(model)


def test_what_others_compile_is_compiled_afterwards() -> None:
    calls: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(1)
        return graph.forward

    saliency(Network(), images(), batches=2, compile=True)
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert calls


def test_an_error_of_the_compiler_comes_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._inductor import config

    model = Network()
    with (
        config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}),
        unchanged(model),
        pytest.raises(RuntimeError, match="no-such-compiler"),
    ):
        pruned(model, compile=True)


@pytest.mark.parametrize("method", ["grasp", "synflow"])
@pytest.mark.parametrize("call", [force_prune, saliency])
def test_methods_that_cannot_be_compiled(call: Callable[..., Any], method: str) -> None:
    def never() -> Iterator[Any]:
        pytest.fail("a batch was read")
        yield

    model = Network()
    options = {"progress": False} if call is force_prune else {}
    arguments = [0.5] if call is force_prune else []
    with (
        unchanged(model),
        pytest.raises(ValueError, match="compile: expected a method"),
    ):
        call(model, never(), *arguments, method=method, compile=True, **options)


def test_the_mode_is_that_of_torch_compile() -> None:
    model = Network()
    with unchanged(model), pytest.raises(RuntimeError, match="mode=fast, should be"):
        saliency(model, images(), compile="fast")
