"""Which weights of a model can be pruned, and where each of them lives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from force_plugin.errors import NothingToPruneError
from force_plugin.reparametrisation import find_hook

PRUNABLE_MODULES: tuple[type[nn.Module], ...] = (_ConvNd, nn.Linear)
"""Modules whose ``weight`` is pruned unless the caller chooses: every
convolution, transposed ones too, and every linear layer, subclasses included."""


@dataclass(eq=False)
class Weight:
    """One prunable tensor of a model.

    Attributes:
        name: Name of the parameter as ``model.named_parameters()`` gives it before
            any pruning, e.g. ``"layer1.0.conv1.weight"``.
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
        """Whether it is pruned unless the caller chooses."""
        return any(
            isinstance(module, PRUNABLE_MODULES) and tensor == "weight"
            for module, tensor in self.owners
        )

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
            the weight of every convolution and linear layer.

    Returns:
        The weights; one that several modules share is listed once, with all its
        owners.

    Raises:
        TypeError: ``model`` is no module, or ``parameters`` holds something else
            than pairs.
        ValueError: Nothing is left to prune, a pair names no parameter of the
            model, or a weight has no values yet (lazy modules).
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
        raise NothingToPruneError(f"nothing to prune: {problem}", advice)
    return list(weights.values())


def named_parameters(model: nn.Module) -> dict[str, Weight]:
    """Every parameter of a model by its name, shared ones once, pruned or not.

    Raises:
        TypeError: ``model`` is no module.
    """
    return {weight.name: weight for weight in _parameters(model).values()}


def _parameters(model: nn.Module) -> dict[int, Weight]:
    """Every parameter of a model by its identity, in the order of the modules."""
    while isinstance(model, DistributedDataParallel):
        model = model.module  # names are those of the module inside
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}"
        )
    if is_scripted(model):
        raise TypeError(
            "model: expected a torch.nn.Module in Python, got a TorchScript module; "
            "prune it before torch.jit.script or torch.jit.trace"
        )
    found: dict[int, Weight] = {}
    for prefix, module in model.named_modules():
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


def name_some(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are, for a message."""
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")


def name_layers(names: Sequence[str], total: int) -> str:
    """The first names of some layers, and how many of all they are."""
    return f"{len(names)} of {total} layers ({name_some(names)})"
