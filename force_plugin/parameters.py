"""Which weights of a model can be pruned, and where each of them lives."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from force_plugin.errors import NothingToPruneError, Remark
from force_plugin.names import named_modules, unwrapped
from force_plugin.products import looks_up, output_axis
from force_plugin.reparametrisation import find_hook, require_free

PRUNABLE_MODULES: tuple[type[nn.Module], ...] = (_ConvNd, nn.Linear)
"""Modules whose ``weight`` is pruned unless the caller chooses: every
convolution, transposed ones too, and every linear layer, subclasses included.
So is the matrix of what behaves as a linear layer."""

_NO_WEIGHTS = re.compile(r"(^|_)(bias|pos)|tokens?\d*$")
"""Parameters that are added to activations or put beside them, by their own names."""


@dataclass(eq=False)
class Weight:
    """One prunable tensor of a model.

    Attributes:
        name: Name of the parameter as ``model.named_parameters()`` gives it before
            any pruning, e.g. ``"layer1.0.conv1.weight"``, and before anything was
            wrapped around the model or a part of it.
        owners: Every ``(module, tensor name)`` that holds this parameter. A weight
            that several modules share is one weight with several owners.
        dense: The parameter with all its values (``weight_orig`` where the model is
            pruned already).
        mask: Bool tensor of the same shape, True = kept, of the first owner that is
            pruned, or whose zeros are held; ``None`` where none is.
    """

    name: str
    dense: nn.Parameter
    mask: Tensor | None = None
    owners: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def part(self) -> Tensor:
        """The values without gradient; of a sharded parameter, this rank's part."""
        return part_of(self.dense.detach())

    @property
    def prunable(self) -> bool:
        """Whether it is pruned unless the caller chooses.

        It is the weight of a convolution or linear layer, or of a module that behaves
        as a linear layer, and no embedding has it too.
        """
        if self._axis is None:
            return False
        shared = len(self.owners) > 1 and self.dense.dim() == 2
        return not shared or not any(looks_up(*owner) for owner in self.owners)

    @property
    def weighs(self) -> bool:
        """Whether it is one of the model's matrices and kernels.

        These are all floating-point parameters of at least two dimensions that are
        longer than 1, embeddings too, but none that is added to activations: biases,
        positions and tokens, which are known by their names, and what has a first
        dimension of 1.
        """
        if self._axis is not None:
            return True
        if is_lazy(self.dense) or not self.dense.is_floating_point():
            return False
        shape = self.dense.shape
        return (
            sum(size > 1 for size in shape) > 1
            and shape[0] > 1
            and not any(_NO_WEIGHTS.search(tensor) for _, tensor in self.owners)
        )

    @property
    def transposed(self) -> bool:
        """Whether it is a matrix ``[inputs, outputs]``, as transformers' ``Conv1D``."""
        return self._axis == 1

    @property
    def shape(self) -> torch.Size:
        """Its shape, of a matrix with the outputs first."""
        return self.dense.shape[::-1] if self.transposed else self.dense.shape

    def rows(self, values: Tensor) -> Tensor:
        """Values of its shape, of a matrix with the outputs first."""
        return values.t() if self.transposed else values

    @property
    def _axis(self) -> int | None:
        """The axis of its output channels, if a layer has it."""
        layers = [module for module, tensor in self.owners if tensor == "weight"]
        if any(isinstance(module, PRUNABLE_MODULES) for module in layers):
            return 0
        if is_lazy(self.dense) or self.dense.dim() != 2:
            return None
        if not self.dense.is_floating_point():
            return None
        axes = (output_axis(module, "weight") for module in layers)
        return next((axis for axis in axes if axis is not None), None)

    def slots(self) -> list[tuple[nn.Module, str]]:
        """Where the parameter is registered: ``(module, key in its _parameters)``."""
        return [(module, parameter_key(module, name)) for module, name in self.owners]


def mask_of(module: nn.Module, name: str) -> Tensor | None:
    """Mask of a tensor that :mod:`torch.nn.utils.prune` has pruned, else ``None``.

    It is the hook that tells: other modules have buffers called ``weight_mask`` too.
    """
    if find_hook(module, name) is None:
        return None
    return module._buffers.get(f"{name}_mask")


def is_scripted(module: nn.Module) -> bool:
    """Whether it is TorchScript, which can be run, but not be given other weights."""
    return isinstance(module, torch.jit.ScriptModule)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as those of FSDP2; their import takes half a second."""
    return hasattr(tensor, "device_mesh")


def part_of(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: all of it, unless it is sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole_of(tensor: Tensor) -> Tensor:
    """All values of a tensor; of one that is sharded, every rank must ask for them."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


HELD = "_held_zeros"
"""Attribute of a module in which a permanent pruning keeps its masks, by tensor name,
as ``kept``."""


def pruned_so_far(module: nn.Module, name: str) -> Tensor | None:
    """Bool mask of a tensor that was pruned, made permanent or not, else ``None``."""
    mask = mask_of(module, name)
    mask = None if mask is None else mask.bool()
    parameter = module._parameters.get(parameter_key(module, name))
    held = vars(module).get(HELD, {}).get(name)
    # Another parameter may have come in its place.
    if parameter is None or held is None or held.kept.shape != parameter.shape:
        return mask
    kept: Tensor = held.kept.to(parameter.device).bool()
    return kept if mask is None else kept & mask


def parameter_key(module: nn.Module, name: str) -> str:
    """Key of the tensor ``name`` in ``module._parameters``, pruned or not."""
    return name if mask_of(module, name) is None else f"{name}_orig"


def find_weights(
    model: nn.Module, parameters: Iterable[tuple[nn.Module, str]] | None = None
) -> list[Weight]:
    """List the prunable weights of a model, in the order of its modules.

    Args:
        model: Any module, pruned before or not.
        parameters: ``(module, tensor name)`` pairs as
            :func:`torch.nn.utils.prune.global_unstructured` takes them. Default:
            the weight of every convolution and linear layer, and of what behaves as a
            linear layer, but none that is an embedding's too.

    Returns:
        The weights; one that several modules share is listed once, with all its
        owners.

    Raises:
        TypeError: ``model`` is no module, or ``parameters`` holds something else
            than pairs.
        NothingToPruneError: Nothing is left to prune.
        ValueError: A pair names no parameter of the model, or a weight has no values
            yet (lazy modules).
    """
    known = _parameters(model)
    for weight in known.values():
        if is_lazy(weight.dense):
            raise ValueError(
                f"{weight.name} has no shape yet (a lazy module): run one batch "
                "through the model before pruning it"
            )
    if parameters is None:
        # A parametrised weight (weight_norm, spectral_norm) is computed, not stored:
        # there is no parameter that a mask could be put on, and none is listed here.
        chosen = [weight for weight in known.values() if weight.prunable]
    else:
        if not isinstance(parameters, Iterable):
            raise TypeError(
                'parameters: expected pairs [(module, "weight"), ...], got '
                f"{type(parameters).__name__}"
            )
        chosen = [_chosen(pair, known) for pair in parameters]
    for weight in chosen:
        _check(weight)
    weights = {weight.name: weight for weight in chosen if weight.dense.numel()}
    if not weights:
        problem = "parameters= is empty"
        advice = 'name what to prune with parameters=[(module, "weight"), ...]'
        if chosen:
            empty = name_some([weight.name for weight in chosen])
            problem = f"the weights ({empty}) have no elements"
        elif parameters is None:
            problem = "the model has no convolution or linear weight"
            usual = (m for m in model.modules() if isinstance(m, PRUNABLE_MODULES))
            computed = [m for m in usual if computed_from(m, "weight")]
            if computed:
                problem, advice = no_parameter(computed[0], "weight"), ""
            elif any(map(is_scripted, model.modules())):
                problem += " outside of its TorchScript parts"
            elif any(".quantized." in type(m).__module__ for m in model.modules()):
                problem += ", and its quantised layers have no parameters"
                advice = "prune the model before it is quantised"
            if advice and (passed := passed_over(model, ())):
                advice += f" among what was passed over: {_listed(passed)}"
        raise NothingToPruneError(f"nothing to prune: {problem}", advice)
    return list(weights.values())


@dataclass(frozen=True)
class Coverage:
    """How much of a model's matrices and kernels some of its weights are.

    Attributes:
        covered: Number of values of these weights.
        passed_over: Number of values of the others, by the type of their module.
    """

    covered: int
    passed_over: Mapping[str, int]

    @property
    def total(self) -> int:
        """Number of values of all of them."""
        return self.covered + sum(self.passed_over.values())

    @property
    def share(self) -> float:
        """The covered part of them, in [0, 1]."""
        return self.covered / self.total

    def __str__(self) -> str:
        """How much is covered, and what was passed over."""
        return (
            f"{100 * self.share:.1f} % of the model's matrix and kernel weights "
            f"({self.covered:,} of {self.total:,})"
        ) + (f"; passed over: {_listed(self.passed_over)}" if self.passed_over else "")

    def doubts(self) -> list[Remark]:
        """What a user has to know who has not chosen the weights."""
        if self.share >= 0.5:
            return []
        return [
            Remark(
                f"the sparsity is that of only {self}",
                'to prune more, name all of it with parameters=[(module, "weight"), '
                "...]",
            )
        ]


def passed_over(model: nn.Module, names: Collection[str]) -> dict[str, int]:
    """Count the matrices and kernels of a model that have none of these names.

    Args:
        model: Any module.
        names: Names of parameters.

    Returns:
        Number of values by type of module, the largest first; with the name of the
        parameter where that is not ``weight`` and the only one.
    """
    passed: dict[str, dict[str, int]] = {}
    modules = dict(named_modules(model))
    for name, weight in named_parameters(model).items():
        if name not in names and weight.weighs:
            kinds, tensor = _kind_of(weight, modules)
            counts = passed.setdefault(kinds, {})
            counts[tensor] = counts.get(tensor, 0) + weight.dense.numel()
    labels = {}
    for kind, counts in passed.items():
        first, *others = counts
        alone = not others and first != "weight"
        labels[f"{kind}.{first}" if alone else kind] = sum(counts.values())
    return dict(sorted(labels.items(), key=lambda item: -item[1]))


def _kind_of(weight: Weight, modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    """The types of the modules that have a weight, and its name in the first."""
    path, _, computed = weight.name.partition(".parametrizations.")
    if computed:
        return type(modules[path]).__name__, "weight"
    kinds = dict.fromkeys(type(module).__name__ for module, _ in weight.owners)
    return " tied to ".join(kinds), weight.owners[0][1]


def _listed(counts: Mapping[str, int]) -> str:
    """The largest of some counts, and how many more there are."""
    said = [f"{name} {count:,}" for name, count in counts.items()]
    more = f" and {len(said) - 5} more types" if len(said) > 5 else ""
    return ", ".join(said[:5]) + more


def named_parameters(model: nn.Module) -> dict[str, Weight]:
    """Every parameter of a model by its name, shared ones once, pruned or not.

    Raises:
        TypeError: ``model`` is no module.
    """
    return {weight.name: weight for weight in _parameters(model).values()}


def _parameters(model: nn.Module) -> dict[int, Weight]:
    """Every parameter of a model by its identity, in the order of the modules."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}"
        )
    model = unwrapped(model)
    if is_scripted(model):
        raise TypeError(
            "model: expected a torch.nn.Module in Python, got a TorchScript module; "
            "prune it before torch.jit.script or torch.jit.trace"
        )
    found: dict[int, Weight] = {}
    for prefix, module in named_modules(model):
        if is_scripted(module):
            continue  # its parameters are TorchScript's, and stay as they are
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            tensor = key.removesuffix("_orig")
            if mask_of(module, tensor) is None:
                tensor = key
            mask = pruned_so_far(module, tensor)
            weight = found.setdefault(
                id(parameter),
                Weight(
                    name=f"{prefix}.{tensor}" if prefix else tensor, dense=parameter
                ),
            )
            weight.owners.append((module, tensor))
            if mask is not None and weight.mask is None:
                weight.mask = mask
    return found


def _chosen(pair: object, known: dict[int, Weight]) -> Weight:
    if not (
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and isinstance(pair[0], nn.Module)
        and isinstance(pair[1], str)
    ):
        raise TypeError(
            'parameters: expected pairs (module, "weight") as torch.nn.utils.prune '
            f"takes them, got {type(pair).__name__}: {str(pair)[:60]}"
        )
    module, name = pair
    parameter = find_parameter(module, name)
    if parameter is None:
        raise ValueError(f"parameters: {no_parameter(module, name)}")
    if id(parameter) not in known:
        raise ValueError(
            f"parameters: a {type(module).__name__} given with {name!r} is not part "
            "of the model; take the pair from model.named_modules()"
        )
    return known[id(parameter)]


def find_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """A parameter of a module, pruned or not; ``None`` if it has none of that name."""
    if is_scripted(module):
        return None
    return module._parameters.get(parameter_key(module, name))


def no_parameter(module: nn.Module, name: str) -> str:
    """Say that a module has no parameter of a name, and what it has instead."""
    if is_scripted(module):
        return (
            f"{name!r} belongs to a {module.original_name} that is TorchScript, whose "
            "weights cannot be replaced; leave it out, or prune the model before "
            "torch.jit.script or torch.jit.trace"
        )
    missing = f"{type(module).__name__} has no parameter {name!r}"
    if source := computed_from(module, name):
        holder, key = source
        where = "" if holder is module else f".parametrizations.{name}"
        return (
            f"{missing}: it is computed from others whenever the module is called; "
            f'name what it is computed from, as a rule (module{where}, "{key}")'
        )
    own = ", ".join(key for key, p in module._parameters.items() if p is not None)
    what = f", and {name!r} is a buffer" if name in module._buffers else ""
    return f"{missing}; it has {own or 'none'}{what}"


def computed_from(module: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """Where the values of a tensor lie that its module computes, if it does.

    That is weight normalisation, spectral normalisation and their like, as
    parametrisations or as the forward pre-hooks of old.

    Returns:
        The module that holds the parameter, and its key there.
    """
    if parametrize.is_parametrized(module, name):
        holder: nn.Module = module.parametrizations[name]  # type: ignore[index, assignment]
        # Of a weight normalisation the first are the lengths, the second the weight.
        return holder, max(holder._parameters, default="original")
    for key in (f"{name}_v", f"{name}_orig"):
        if mask_of(module, name) is None and module._parameters.get(key) is not None:
            return module, key
    return None


def _check(weight: Weight) -> None:
    name, parameter = weight.name, weight.dense
    if not parameter.is_floating_point():
        raise ValueError(
            f"{name} has dtype {parameter.dtype}; only floating-point weights can be "
            "scored: prune before quantising"
        )
    if parameter.layout != torch.strided:
        raise ValueError(
            f"{name} is sparse ({parameter.layout}): make it dense with .to_dense(); "
            "its mask will hold the zeros"
        )
    if parameter.device == torch.device("meta"):
        raise ValueError(
            f"{name} is on the meta device and has no values: materialise and "
            "initialise the model before pruning it"
        )
    check_names(weight)


def check_names(weight: Weight) -> None:
    """Make sure that a pruning takes no name that a module uses for itself.

    Raises:
        ValueError: It would.
    """
    for owner in weight.owners:
        require_free(*owner, weight.name)


def name_some(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are, for a message."""
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")


def name_layers(names: Sequence[str], total: int) -> str:
    """The first names of some layers, and how many of all they are."""
    return f"{len(names)} of {total} layers ({name_some(names)})"
