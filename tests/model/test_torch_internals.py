"""What the package needs of PyTorch's private parts is there, in two files."""

import ast
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.functional import linear
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.utils import prune
from torch.utils.data import DataLoader

import force_plugin
from force_plugin.model import autograd_nodes, torch_internals
from force_plugin.model.autograd_nodes import (
    dimension,
    has_weight,
    is_layer,
    layer_inputs,
    operation,
    products,
    shapes_of_results,
    sizes_before,
)
from force_plugin.model.torch_internals import (
    DisableTorchFunctionSubclass,
    TorchDispatchMode,
    forward_hooks,
    forward_pre_hooks,
    is_followed,
    is_persistent,
    metadata,
    own_iterator,
    parameter_order,
    put_buffer,
    put_parameter,
    read_through,
    registries,
    remove_hooks,
    rename_parameter,
    reorder_parameters,
    replace_forward_pre_hook,
    seen_as,
    set_metadata,
    set_tensor_name,
    state_of,
    tell_of_hooks,
    tensor_name,
    tree_map_only,
    uninitialised,
    version,
)

PACKAGE = Path(force_plugin.__file__).parent
FILES = {Path(module.__file__ or "") for module in (torch_internals, autograd_nodes)}


def private_names() -> set[str]:
    """The private names of modules, tensors, prunings, loaders and nodes."""
    conv = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    output = conv(torch.ones(2, 1, 2, 2))
    split = output.split(1)[0]
    things = [
        nn.Module(),
        output,
        split.view(-1).grad_fn,
        split.grad_fn,
        output.grad_fn,
        prune.L1Unstructured(1),
        prune.PruningContainer(),
        DataLoader([1]),  # type: ignore[arg-type]
    ]
    named = {name for thing in things for name in (*dir(thing), *vars_of(thing))}
    return {name for name in named if name[0] == "_" and name[:2] != "__"}


def vars_of(thing: object) -> list[str]:
    return list(getattr(thing, "__dict__", {}))


def uses(tree: ast.AST, private: set[str]) -> Iterator[tuple[int, str]]:
    """Where a module uses a private name of PyTorch's, by line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in private:
            if not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Constant) and node.value in private:
            yield node.lineno, repr(node.value)
        elif isinstance(node, ast.ImportFrom) and (node.module or "")[:5] == "torch":
            path = [*(node.module or "").split("."), *(a.name for a in node.names)]
            if any(name[0] == "_" for name in path):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch._C":
            yield node.lineno, ast.unparse(node)


def test_private_names_of_pytorch_are_in_two_files() -> None:
    private = private_names()
    assert {"_parameters", "_saved_dim", "_version", "_iterator"} <= private
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {used}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path not in FILES
        for line, used in uses(ast.parse(path.read_text()), private)
    ]
    assert not found, (
        "a public way, or a function of model/torch_internals.py with its reason, "
        "takes the place of: " + "; ".join(found)
    )


class Every(nn.Module):
    """Something of each kind, and nothing of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).view(2, 3))
        self.register_parameter("bias", None)
        self.scale = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("drawn", torch.zeros(2), persistent=False)
        self.register_buffer("missing", None)
        self.layer = nn.Linear(2, 2)
        self.register_module("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        bias: Any = self.bias
        return linear(x, self.weight, bias)


def names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(recurse=False)]


def the_registries_of_a_module() -> None:
    parameters, buffers, children = registries(Every())
    assert [*parameters] == ["weight", "bias", "scale"]
    assert [*buffers] == ["mean", "drawn", "missing"]
    assert [*children] == ["layer", "nothing"]


def a_module_that_was_not_initialised() -> None:
    module = Every()
    module.register_forward_hook(lambda *_: torch.zeros(1))
    vars(module)["forward"] = lambda x: x
    made = uninitialised(Every, vars(module), *registries(module))
    assert isinstance(made, Every) and not made.training
    assert torch.equal(made(torch.ones(1, 3)), torch.tensor([[3.0, 12.0]]))
    made.weight = nn.Parameter(torch.zeros(2, 3))
    assert module.weight.any()


def a_parameter_put_in_the_place_of_another() -> None:
    module, told = Every(), []
    handle = register_module_parameter_registration_hook(lambda *args: told.append(1))
    try:
        put_parameter(module, "weight", leaf := nn.Parameter(torch.ones(2, 3)))
    finally:
        handle.remove()
    assert module.weight is leaf and not told and names(module) == ["weight", "scale"]


def a_buffer_put_in_the_place_of_another() -> None:
    class Closed(Every):
        closed = False

        def __setattr__(self, name: str, value: Any) -> None:
            if self.closed:
                raise AttributeError(name)
            super().__setattr__(name, value)

    module = Closed()
    Closed.closed = True
    put_buffer(module, "drawn", ones := torch.ones(2))
    assert module.drawn is ones and "drawn" not in module.state_dict()


def a_parameter_that_is_read_through_a_function() -> None:
    module = Every()
    own = module.weight
    read_through(module, "weight", lambda weight: 2 * weight)
    assert torch.equal(module(torch.ones(1, 3)), torch.tensor([[6.0, 24.0]]))
    assert dict(module.named_parameters())["weight"] is own
    assert isinstance(module.scale, nn.Parameter) and module.bias is None


def another_name_for_a_parameter() -> None:
    module = Every()
    rename_parameter(module, "weight", "weight_orig")
    assert names(module) == ["weight_orig", "scale"]
    assert not hasattr(module, "weight")
    assert parameter_order(module) == ["weight_orig", "bias", "scale"]
    reorder_parameters(module, ["scale", "bias", "weight_orig"])
    assert names(module) == ["scale", "weight_orig"]


def buffers_of_a_state_dict() -> None:
    module = Every()
    assert is_persistent(module, "mean") == ("mean" in module.state_dict())
    assert is_persistent(module, "drawn") == ("drawn" in module.state_dict())


def hooks_around_a_forward() -> None:
    module, said = nn.Identity(), []

    def hook(word: str) -> Callable[..., None]:
        return lambda *args: said.append(word)

    first, second, third = hook("first"), hook("second"), hook("third")
    after = hook("after")
    module.register_forward_pre_hook(first)
    module.register_forward_pre_hook(second)
    module.register_forward_hook(after)
    assert forward_pre_hooks(module) == [first, second]
    assert forward_hooks(module) == [after]
    replace_forward_pre_hook(module, first, third)
    module(0)
    assert said == ["third", "second", "after"]
    remove_hooks(module, lambda one: one in (second, after))
    module(0)
    assert said == ["third", "second", "after", "third"]


def the_tensor_of_a_pruning() -> None:
    module = nn.Linear(2, 2)
    prune.identity(module, "bias")
    (hook,) = forward_pre_hooks(module)
    assert tensor_name(hook) == "bias"
    container = prune.PruningContainer()
    set_tensor_name(container, "bias")
    container.add_pruning_method(hook)  # refuses those of another tensor
    assert [*container] == [hook]


def a_module_of_another_class() -> None:
    class Other(Every):
        pass

    module = Every()
    module.register_forward_hook(lambda *_: torch.zeros(1))
    seen = seen_as(Other, module)
    assert isinstance(seen, Other)
    assert seen(torch.ones(1, 3)).shape == (1, 2)
    module.weight = nn.Parameter(torch.zeros(2, 3))
    assert not seen.weight.any()


def the_state_of_a_module() -> None:
    module = Every()
    changes: list[Callable[[], object]] = [
        lambda: module.weight.requires_grad_(False),
        lambda: module.weight.add_(1),
        lambda: setattr(module, "weight", nn.Parameter(torch.ones(2, 3))),
        lambda: module.mean.zero_(),
        lambda: setattr(module.weight, "data", torch.zeros(2, 3)),
        lambda: setattr(module, "layer", nn.Linear(2, 2)),
        lambda: module.register_forward_pre_hook(lambda *_: None),
        lambda: module.eval(),
    ]
    for change in changes:
        before = state_of(module)
        assert state_of(module) == before
        change()
        assert state_of(module) != before


def what_follows_tensors() -> None:
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(is_followed())
        return x

    look(torch.ones(1))
    with torch.device("cpu"):
        look(torch.ones(1))
    assert seen == [False, False]
    torch.func.vmap(look)(torch.ones(1))
    with Mode():
        look(torch.ones(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        torch.jit.trace(look, torch.ones(1), check_trace=False)
    assert len(seen) > 4
    assert all(seen[2:])


def the_version_of_a_tensor() -> None:
    tensor = torch.ones(2)
    before = version(tensor)
    tensor.add_(1)
    assert version(tensor) == before + 1


def hooks_after_tensors_were_swapped() -> None:
    parameter, other, ran = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2)), []
    parameter.register_post_accumulate_grad_hook(lambda p: ran.append(1))
    torch.utils.swap_tensors(parameter, other)
    torch.utils.swap_tensors(parameter, other)
    tell_of_hooks(parameter)
    parameter.sum().backward()
    assert ran == [1]


def versions_in_a_state_dict() -> None:
    state = nn.BatchNorm1d(2).state_dict()
    versions = metadata(state)
    assert versions == {"": {"version": 2}}
    set_metadata(state, {"": {"version": 1}})
    fresh = nn.BatchNorm1d(2)
    del state["num_batches_tracked"]  # of version 2
    fresh.load_state_dict(state)
    assert metadata({}) is None


def an_epoch_beside_another() -> None:
    numbers: Any = range(4)
    loader: Any = DataLoader(numbers, num_workers=1, persistent_workers=True)
    epoch = iter(loader)
    seen = [next(epoch).item()]
    with own_iterator(loader):
        assert [batch.item() for batch in loader] == [0, 1, 2, 3]
    assert [*seen, *(batch.item() for batch in epoch)] == [0, 1, 2, 3]
    assert iter(loader) is epoch


def tensors_of_a_class_of_their_own() -> None:
    class Own(Tensor):
        calls = 0

        @classmethod
        def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
            cls.calls += 1
            return super().__torch_function__(*args, **kwargs)

    tensor = torch.ones(2).as_subclass(Own)
    before = Own.calls
    with DisableTorchFunctionSubclass():
        assert tensor.add(1).sum() == 4
    assert Own.calls == before
    found = tree_map_only(Own, lambda one: "own", [{"a": tensor}, (torch.ones(1), 2)])
    assert found[0] == {"a": "own"} and isinstance(found[1][0], Tensor)


def node_of(tensor: Tensor) -> Node:
    assert tensor.grad_fn is not None
    return tensor.grad_fn


def layers_in_a_graph() -> None:
    image, vectors = torch.rand(2, 1, 4, 4), torch.rand(2, 3)
    layers = [
        (nn.Conv2d(1, 1, 3), image),
        (nn.ConvTranspose1d(1, 1, 3), torch.rand(2, 1, 4)),
        (nn.Linear(3, 2), vectors),
        (nn.Linear(3, 2, bias=False), vectors),
    ]
    for layer, inputs in layers:
        node = node_of(layer(inputs))
        assert is_layer(node), operation(node)
        way = [operand for operand, _ in node.next_functions if operand is not None]
        (weight,) = [operand for operand in way if has_weight(node, operand)]
        leaf: Any = weight
        while leaf.next_functions:  # a transposition
            leaf = leaf.next_functions[0][0]
        assert leaf.variable is layer.weight
        assert torch.equal(layer_inputs(node), inputs)


def products_in_a_graph() -> None:
    x, w = torch.rand(2, 3, requires_grad=True), torch.rand(3, requires_grad=True)

    def multiplied(result: Tensor) -> dict[int, tuple[int, bool]]:
        node = node_of(result)
        for product in products(node):
            operand = node.next_functions[product.factor][0]
            assert operand is not None and product.values is not None
            assert torch.equal(product.values, operand.variable)  # type: ignore[attr-defined]
        return {p.factor: (p.behind, p.normalises) for p in products(node)}

    assert multiplied(x * w) == {0: (1, False), 1: (0, False)}
    assert multiplied(torch.addcmul(x, x, w)) == {1: (2, False), 2: (1, False)}
    assert multiplied(torch.lerp(x, x, x))[2] == (1, False)
    batch, layer, group = nn.BatchNorm1d(3), nn.LayerNorm(3), nn.GroupNorm(1, 3)
    for norm in (batch, layer, group):
        assert multiplied(norm(x)) == {1: (0, True)}
    assert not products(node_of(x.relu()))


def shapes_in_a_graph() -> None:
    x = torch.rand(2, 6, 1, requires_grad=True)
    assert tuple(sizes_before(node_of(x.view(12))) or ()) == (2, 6, 1)
    assert tuple(sizes_before(node_of(x.expand(2, 6, 4))) or ()) == (2, 6, 1)
    for dim in (1, -2):
        split = node_of(x.split([2, 4], dim)[0])
        assert shapes_of_results(split) == [[2, 2, 1], [2, 4, 1]]
        assert dimension(split) == dim
        assert dimension(node_of(torch.cat([x, x], dim))) == dim
    assert sizes_before(node_of(x.relu())) is None
    assert dimension(node_of(x.relu())) is None


@pytest.mark.parametrize(
    "relied_on",
    [
        the_registries_of_a_module,
        a_module_that_was_not_initialised,
        a_parameter_put_in_the_place_of_another,
        a_buffer_put_in_the_place_of_another,
        a_parameter_that_is_read_through_a_function,
        another_name_for_a_parameter,
        buffers_of_a_state_dict,
        hooks_around_a_forward,
        the_tensor_of_a_pruning,
        a_module_of_another_class,
        the_state_of_a_module,
        what_follows_tensors,
        the_version_of_a_tensor,
        hooks_after_tensors_were_swapped,
        versions_in_a_state_dict,
        an_epoch_beside_another,
        tensors_of_a_class_of_their_own,
        layers_in_a_graph,
        products_in_a_graph,
        shapes_in_a_graph,
    ],
    ids=lambda check: check.__name__,
)
def test_pytorch_still_keeps_it_there(relied_on: Callable[[], None]) -> None:
    try:
        relied_on()
    except Exception as error:
        name = relied_on.__name__
        where = "autograd_nodes" if name.endswith("graph") else "torch_internals"
        raise AssertionError(
            f"PyTorch {torch.__version__} keeps this otherwise: "
            f"{name.replace('_', ' ')}. Mend force_plugin/model/{where}.py."
        ) from error
