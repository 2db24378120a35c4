"""Names of modules as they are in a model that nothing is wrapped around."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence

from torch import nn

from force_plugin.model.registered import own_buffers

CHECKPOINTED = "_checkpoint_wrapped_module"
"""The name that activation checkpointing gives to a module that it wraps."""

WRAPPERS = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": (
        CHECKPOINTED
    ),
    "timm.utils.model_ema.ModelEmaV2": "module",
    "timm.utils.model_ema.ModelEmaV3": "module",
    "lightning.fabric.wrappers._FabricModule": "_forward_module",
    "lightning_fabric.wrappers._FabricModule": "_forward_module",
}
"""Classes that are put around a model, and what they call it. They are looked up by
their names: to import them all takes seconds."""

_SEGMENTS = frozenset(WRAPPERS.values())


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that others are wrapped around; itself where there is none."""
    while (key := _key(type(module))) is not None:
        module = getattr(module, key)
    return module


def _key(kind: type) -> str | None:
    for one in kind.__mro__:
        if key := WRAPPERS.get(f"{one.__module__}.{one.__qualname__}"):
            return key
    return None


def named_modules(
    model: nn.Module, prefix: str = "", seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """A model's modules by name, as :meth:`torch.nn.Module.named_modules` lists them.

    Wrappers (``torch.compile``, ``DataParallel``, ...) around the model or a part of it
    are left out, with what they add to the names.

    Args:
        model: Any module.
        prefix: Its own name.
        seen: Modules that are not listed again.
    """
    seen = set() if seen is None else seen
    model = unwrapped(model)
    if model in seen:
        return
    seen.add(model)
    yield prefix, model
    for key, child in nn.Module.named_children(model):
        yield from named_modules(child, f"{prefix}.{key}".lstrip("."), seen)


def named_buffers(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Where each buffer of a model is, a shared one once: its module, and its key.

    The names are those of a model without wrappers, as of :func:`named_modules`.
    """
    found: dict[str, tuple[nn.Module, str]] = {}
    seen = set()
    for path, module in named_modules(model):
        for key, buffer in own_buffers(module).items():
            if id(buffer) not in seen:
                seen.add(id(buffer))
                found[f"{path}.{key}".lstrip(".")] = module, key
    return found


def plain(name: str) -> str:
    """A name without all that wrappers may have added to it."""
    return ".".join(part for part in name.split(".") if part not in _SEGMENTS)


def fitted(names: Iterable[str], own: Collection[str]) -> dict[str, str]:
    """What a model calls what has been named in the model with or without wrappers.

    A model's own names come first: some call a part ``module`` without any wrapper.

    Args:
        names: Names that may have other wrappers in them than the model has.
        own: The model's names.

    Returns:
        The model's name by given name; the given one where none fits, or several do.
    """
    names = list(names)
    taken, alike = set(own).intersection(names), defaultdict(list)
    for name in own:
        if name not in taken:
            alike[plain(name)].append(name)
    found = {}
    for name in names:
        if name not in taken:
            ones = alike[plain(name)]
            inner = [one for one in ones if name.endswith(f".{one}")]
            if inner or len(ones) == 1:
                found[name] = max(inner or ones, key=len)
    counts = Counter(found.values())
    return {
        name: found[name] if counts[found.get(name, "")] == 1 else name
        for name in names
    }


def name_some(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are, for a message."""
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")


def name_layers(names: Sequence[str], total: int) -> str:
    """The first names of some layers, and how many of all they are."""
    return f"{len(names)} of {total} layers ({name_some(names)})"
