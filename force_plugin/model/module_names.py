"""Names of modules in a model, without the names that wrappers add."""

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
"""Classes that wrap a model, each with the attribute that holds the model. They are
looked up by name, as importing all of them takes seconds."""

_SEGMENTS = frozenset(WRAPPERS.values())


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside all wrappers, or the module itself if it has none."""
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
    """Yield a model's modules by name, as :meth:`torch.nn.Module.named_modules` does.

    Wrappers (``torch.compile``, ``DataParallel``, ...) around the model or a part of it
    are left out, and their names too.

    Args:
        model: Any module.
        prefix: Name of the model.
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
    """Return the module and the key of each buffer of a model, by name.

    A buffer that several modules share is listed once. Names are without wrappers, as
    in :func:`named_modules`.
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
    """Return a name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _SEGMENTS)


def fitted(names: Iterable[str], own: Collection[str]) -> dict[str, str]:
    """Return the model's own name for each given name, which may be from a wrapper.

    A given name that the model has itself is not changed, as a model may call a part
    ``module`` without any wrapper.

    Args:
        names: Names from this model, with other wrappers than it has now.
        own: The names in the model.

    Returns:
        The model's name by given name. If no name fits, or several names fit, it is the
        given name.
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
    """Return the first three names, and the number of further names, for a message."""
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")


def name_layers(names: Sequence[str], total: int) -> str:
    """Return the first names of some layers and their number, for a message."""
    return f"{len(names)} of {total} layers ({name_some(names)})"
