"""Sanity checks of a mask: shuffle the mask, or draw new initial values.

These are the sanity checks of Frankle et al. 2021 (arXiv 2009.08576, section 5). A
pruned network may train as well with its mask shuffled within each layer, or with new
initial values. Then the method has only chosen how much to keep of each layer, and not
which weights to keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from force_plugin.errors import NotPrunedError
from force_plugin.masks.apply import checked_masks
from force_plugin.model.module_names import name_some, named_buffers
from force_plugin.model.reparametrisation import show
from force_plugin.model.restoring import snapshot
from force_plugin.model.weights import (
    is_scripted,
    is_sharded,
    mask_of,
    named_parameters,
    pruned_so_far,
)
from force_plugin.parallel.ranks import unwrap


def shuffle_masks(
    masks: Mapping[str, Tensor], generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Return masks with the weights of each layer shuffled at random.

    Each layer keeps as many weights as before.

    >>> fresh = timm.create_model("resnet50", num_classes=10)
    >>> apply_masks(fresh, shuffle_masks(get_masks(model)))

    Args:
        masks: Masks by parameter name: bool (True = kept) as
            :func:`force_plugin.get_masks` returns them, or another dtype with values 0
            and 1. They are not changed.
        generator: Generator of random numbers, on the CPU. Default: PyTorch's global
            generator, which :func:`torch.manual_seed` seeds. In a distributed job, seed
            all ranks alike.

    Returns:
        Bool tensors by parameter name, each a random permutation of the given mask, of
        its shape and on its device. This is "random shuffling" of Frankle et al. 2021
        (arXiv 2009.08576, section 5).

    Raises:
        TypeError: ``masks`` is no mapping of names to tensors, or ``generator`` is no
            generator.
        MaskMismatchError: ``masks`` is empty, or a mask is sparse, has no values, or
            has values other than 0 and 1.
        ValueError: The generator is not on the CPU.
    """
    if not isinstance(generator, torch.Generator | None):
        seed = generator if type(generator) is int else 0
        raise TypeError(
            f"generator: expected a torch.Generator, got {type(generator).__name__}; "
            f"pass torch.Generator().manual_seed({seed})"
        )
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(
            f"generator: expected one on the CPU, got one on {generator.device}"
        )
    shuffled = {}
    for name, mask in checked_masks(masks).items():
        order = torch.randperm(mask.numel(), generator=generator, device="cpu")
        shuffled[name] = mask.flatten()[order.to(mask.device)].view(mask.shape)
    return shuffled


@torch.no_grad()
def reinitialise(model: nn.Module, fresh: nn.Module) -> None:
    """Give a pruned model the initial values of another model, and keep the masks.

    >>> reinitialise(model, timm.create_model("resnet50", num_classes=10))

    The values come from a model that was made in the same way, as only the code that
    makes a model knows how to draw each weight. This is "reinitialization" of Frankle
    et al. 2021 (arXiv 2009.08576, section 5). Parameters and buffers stay the same
    objects, so that an existing optimizer goes on with them. In a distributed job every
    rank calls this function, with the same values in ``fresh``.

    Args:
        model: Model that :func:`force_plugin.force_prune` or any other method of
            :mod:`torch.nn.utils.prune` has pruned. The pruning may be permanent.
            ``DistributedDataParallel`` or ``torch.compile`` may be around the model. It
            is changed in place.
        fresh: The same network with other values, not pruned. It is not changed.

    Raises:
        TypeError: ``model`` or ``fresh`` is no module.
        NotPrunedError: Nothing is pruned in ``model``. The model is unchanged.
        ValueError: Something is pruned in ``fresh``, names or shapes of parameters or
            buffers differ, a tensor has no values yet (a lazy module, the meta device),
            or a tensor is sharded. The model is unchanged.
    """
    model, fresh = unwrap(model), unwrap(fresh)
    if not isinstance(fresh, nn.Module):
        raise TypeError(
            f"fresh: expected a torch.nn.Module, got {type(fresh).__name__}; pass "
            "another model, made as the first one was"
        )
    weights, new = named_parameters(model), named_parameters(fresh)
    kept = {
        (module, name): pruned_so_far(module, name)
        for weight in weights.values()
        for module, name in weight.owners
    }
    if all(mask is None for mask in kept.values()):
        raise NotPrunedError(
            "model: expected one that is pruned, got one without masks",
            "prune it first, with force_prune or apply_masks",
        )
    if any(
        pruned_so_far(*owner) is not None
        for weight in new.values()
        for owner in weight.owners
    ):
        raise ValueError(
            "fresh: expected a model that is not pruned, got one with masks; make "
            "another, as the model itself was made"
        )
    values = {name: weight.dense for name, weight in weights.items()}
    others = {name: weight.dense for name, weight in new.items()}
    pairs = _matched(values | _scripted(model), others | _scripted(fresh))
    pairs += _matched(_values_of_buffers(model), _values_of_buffers(fresh))
    with ExitStack() as undo:
        undo.callback(snapshot(model.modules()))
        for old, value in pairs:
            undo.callback(old.copy_, old.clone())
            old.copy_(value)
        for (module, name), mask in kept.items():
            if mask is None:
                continue
            shown = mask_of(module, name)
            if shown is None:
                getattr(module, name).masked_fill_(~mask, 0)
                continue
            # ``shown`` lacks the zeros that an earlier make_permanent holds.
            original = getattr(module, f"{name}_orig")
            original.masked_fill_(shown.bool() & ~mask, 0)
            show(module, name)
        undo.pop_all()


def _scripted(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a model's TorchScript parts, by name."""
    return {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if is_scripted(module)
        for key, parameter in module.named_parameters(recurse=False)
    }


def _values_of_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return all buffers of a model except masks, by name."""
    slots = named_buffers(model)
    masks = {
        id(mask_of(module, name))
        for weight in named_parameters(model).values()
        for module, name in weight.owners
    }
    found = {name: getattr(module, key) for name, (module, key) in slots.items()}
    return {name: buffer for name, buffer in found.items() if id(buffer) not in masks}


def _matched(
    old: Mapping[str, Tensor], new: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of the tensors with the same name.

    Expanded tensors with equal values are left out.

    Raises:
        ValueError: Names or shapes differ, or a tensor cannot be copied.
    """
    strange = [name for name in (*old, *new) if (name in old) != (name in new)]
    if strange:
        raise ValueError(
            "fresh: expected the same network as the model, but only one of the two "
            f"has {name_some(strange)}"
        )
    for name, tensor in old.items():
        for which, one in (("model", tensor), ("fresh", new[name])):
            if is_lazy(one) or one.is_meta:
                raise ValueError(f"{which}: {name} has no values yet")
            if is_sharded(one):
                raise ValueError(
                    f"{which}: expected one that is not sharded, but {name} is; give "
                    "it new values before fully_shard is called"
                )
        if tensor.shape != new[name].shape:
            raise ValueError(
                f"fresh: expected the same network as the model, but {name} is "
                f"{tuple(new[name].shape)} instead of {tuple(tensor.shape)}"
            )
    pairs = []
    for name, tensor in old.items():
        expanded = any(
            step == 0 and size > 1
            for step, size in zip(tensor.stride(), tensor.shape, strict=True)
        )
        if not expanded:
            pairs.append((tensor, new[name]))
        elif not torch.equal(tensor, new[name].to(tensor)):
            raise ValueError(
                f"model: {name} is expanded, one number in several places, and cannot "
                "be given other values; make it contiguous"
            )
    return pairs
