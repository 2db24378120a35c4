"""Choice of the weights to prune: the weights of layers, or the caller's choice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from force_plugin.errors import NothingToPruneError
from force_plugin.model.coverage import listed, passed_over
from force_plugin.model.module_names import name_some
from force_plugin.model.registered import own_buffers, own_parameters
from force_plugin.model.reparametrisation import require_free
from force_plugin.model.weights import (
    PRUNABLE_MODULES,
    Weight,
    is_scripted,
    mask_of,
    named_parameters,
    parameter_key,
)


def find_weights(
    model: nn.Module,
    parameters: Iterable[tuple[nn.Module, str]] | None = None,
    known: Mapping[str, Weight] | None = None,
) -> list[Weight]:
    """Return the weights to prune in a model.

    Args:
        model: Any module, pruned before or not.
        parameters: ``(module, tensor name)`` pairs as
            :func:`torch.nn.utils.prune.global_unstructured` takes them. Default:
            the weight of every convolution and linear layer, and of every module that
            behaves as a linear layer, unless an embedding shares the weight.
        known: Every parameter of the model by name, from :func:`named_parameters`.
            Default: the function looks them up.

    Returns:
        The weights, in the order of the modules or of ``parameters``. A weight that
        several modules share is listed once, with all its owners.

    Raises:
        TypeError: ``model`` is no module, or ``parameters`` does not hold pairs.
        NothingToPruneError: There is no weight to prune.
        ValueError: A pair names no parameter of the model, a weight has no values
            yet (lazy modules, the meta device), or a weight cannot be pruned: it is
            sparse, or no floating-point tensor, or its module uses the name of the
            mask for another attribute.
    """
    if known is None:
        known = named_parameters(model)
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
        by_identity = {id(weight.dense): weight for weight in known.values()}
        chosen = [_chosen(pair, by_identity) for pair in parameters]
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
            if advice and (passed := passed_over(model, known, ())):
                advice += f" among what was passed over: {listed(passed)}"
        raise NothingToPruneError(f"nothing to prune: {problem}", advice)
    return list(weights.values())


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
    """Return the parameter of a module by name, pruned or not, or ``None``."""
    if is_scripted(module):
        return None
    return own_parameters(module).get(parameter_key(module, name))


def no_parameter(module: nn.Module, name: str) -> str:
    """Return a message: a module has no parameter of a name, but others."""
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
    own = ", ".join(own_parameters(module))
    what = f", and {name!r} is a buffer" if name in own_buffers(module) else ""
    return f"{missing}; it has {own or 'none'}{what}"


def computed_from(module: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """Return the parameter from which a module computes a tensor, or ``None``.

    Weight normalisation and spectral normalisation compute tensors, for example. They
    are parametrisations or, in older code, forward pre-hooks.

    Returns:
        The module that holds the parameter, and the key of the parameter there.
    """
    if parametrize.is_parametrized(module, name):
        holder: nn.Module = module.parametrizations[name]  # type: ignore[index, assignment]
        # In a weight normalisation the first holds the lengths, the second the weight.
        return holder, max(own_parameters(holder), default="original")
    for key in (f"{name}_v", f"{name}_orig"):
        if mask_of(module, name) is None and key in own_parameters(module):
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
    """Raise ValueError if a pruning would take a name that an owner already uses.

    Raises:
        ValueError: An owner has its own attribute under the name of the parameter or
            of the mask.
    """
    for owner in weight.owners:
        require_free(*owner, weight.name)
