"""Move, cut and describe the batches of a loader; containers keep their types.

A container is a tuple, list, set, deque, mapping or record (for example a dataclass).
Any other object is moved by its own method ``to``.
"""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy, deepcopy
from types import FunctionType, MemberDescriptorType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from force_plugin.errors import BatchError

# Channels-last formats, by the number of dimensions of a tensor.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_pair(batch: Any) -> bool:
    """Return whether a batch can be ``(inputs, targets)``."""
    return isinstance(batch, tuple | list) and len(batch) == 2


def to_device(
    batch: Any, device: torch.device, formats: Mapping[int, torch.memory_format]
) -> Any:
    """Return a batch with copies of its tensors on a device.

    The tensors are copied because a network may change its inputs in place.
    """

    def format_of(tensor: Tensor) -> torch.memory_format:
        known = formats if tensor.is_floating_point() else {}
        return known.get(tensor.dim(), torch.preserve_format)

    if isinstance(batch, Tensor):
        return batch.to(device, copy=True, memory_format=format_of(batch))
    if _moves_itself(batch):
        # The method knows which tensors must stay on the CPU, such as lengths.
        # BatchEncoding.to changes the object itself. Other such methods return None.
        own = _copied(batch)
        moved = own.to(device)
        return mapped(
            lambda t: t.to(memory_format=format_of(t)), own if moved is None else moved
        )
    return with_changed_items(batch, lambda value: to_device(value, device, formats))


def count_samples(batch: Any) -> int:
    """Return the number of samples in a batch, or 0 if no samples are found.

    The number is usually the first dimension of the first tensor. The first tensors may
    also be a list with an item for each sample, for example images of different sizes.
    The number is then the length of the list, which the targets have too.
    """
    if isinstance(batch, _ONE):
        return next(iter(_counts(batch)), 0)
    if isinstance(batch, list) and _are_records(batch):
        return len(batch)
    fields = [(_counts(item), _has_tensors([item])) for item in items(batch)]
    first = next((counts for counts, tensors in fields if counts and tensors), [])
    others = {n for counts, _ in fields if counts is not first for n in counts}
    return next(iter([n for n in first if n in others] or first), 0)


def _counts(value: Any) -> list[int]:
    """Return the possible numbers of samples in a part of a batch, likeliest first."""
    if isinstance(value, PackedSequence):
        return [int(value.batch_sizes[0])]
    if isinstance(value, Tensor):
        return [value.size(0)] if value.dim() and value.size(0) else []
    if isinstance(value, np.ndarray):
        return [*value.shape[:1]]
    inside = [counts for item in items(value) if (counts := _counts(item))]
    shared = [n for n in inside[0] if all(n in c for c in inside)] if inside else []
    if _is_sequence(value):
        return [*dict.fromkeys([*shared, len(value)])] if value else []
    return shared or (inside[0] if inside else [])


def cut(batch: Any, samples: int, part: slice) -> Any:
    """Return a part of a batch's samples, and all values that belong to no sample.

    Raises:
        BatchError: An object with this number of samples is no container. Or a list of
            tensors may hold a sample in each item, or in each row of its items.
    """
    if range(samples)[part] == range(samples):
        return batch
    if isinstance(batch, list) and _are_records(batch) and len(batch) == samples:
        return _cut_list(batch, part)
    # If a list has an item for each sample, other lists of equal length have so too.
    listed = any(
        _is_sequence(item) and len(item) == samples and not _can_hold(item, samples)
        for item in _each(batch)
    )
    return _cut_items(batch, samples, part, listed, outermost=True)


def _cut_items(
    batch: Any, samples: int, part: slice, listed: bool, outermost: bool = False
) -> Any:
    if isinstance(batch, _ONE):
        return _cut_item(batch, part) if samples in _counts(batch) else batch
    if _is_sequence(batch) and len(batch) == samples and not outermost:
        if listed:
            return _cut_list(batch, part)
        raise BatchError(
            f"microbatch: got {describe(batch)} in a batch of {samples} samples, with "
            f"{samples} tensors that have {samples} rows each; they can be a sample "
            "each, or have a row of each sample",
            "take another size of batch, stack what are samples, or leave microbatch "
            "out",
        )
    result = with_changed_items(
        batch, lambda value: _cut_items(value, samples, part, listed)
    )
    if result is batch and not isinstance(batch, nn.Module) and not _is_built_in(batch):
        hidden = [*attributes(batch).values()]
        if _holds(hidden, samples):
            raise BatchError(
                "microbatch: expected batches of tensors in tuples, lists, mappings or "
                f"dataclasses, got {describe(batch)} that holds {samples} samples and "
                "that nobody but its class can cut",
                "make it one of these, or leave microbatch out",
            )
    return result


def _is_sequence(value: Any) -> bool:
    """Return whether a value may have an item for each sample; strings do not."""
    return isinstance(value, list | tuple | deque) and not (
        isinstance(value, PackedSequence) or hasattr(type(value), "_fields")
    )


def _can_hold(sequence: Iterable[Any], samples: int) -> bool:
    """Return whether each item of a sequence can hold all samples."""
    return all(samples in _counts(item) for item in sequence)


def _are_records(value: Any) -> bool:
    """Return whether a list's items are records or mappings of one type: samples."""
    return len({type(item) for item in value}) == 1 and (
        isinstance(value[0], Mapping) or _is_record(value[0])
    )


def _is_built_in(value: Any) -> bool:
    """Return whether a value is a number, a string, a function or similar."""
    return isinstance(value, FunctionType) or type(value).__module__ == "builtins"


def _has_tensors(values: Iterable[Any]) -> bool:
    return any(isinstance(v, _ONE) or _has_tensors(items(v)) for v in values)


def _each(value: Any) -> Iterator[Any]:
    """Yield the items of a container, at any depth."""
    for item in () if isinstance(value, _ONE) else items(value):
        yield item
        yield from _each(item)


def _cut_list(batch: Any, part: slice) -> Any:
    """Return some items of a list, tuple or deque, in a new object of its type."""
    some = [*batch][part]
    if isinstance(batch, tuple):
        return tuple.__new__(type(batch), some)
    if isinstance(batch, deque):
        return _with_attributes(type(batch)(some, batch.maxlen), batch, lambda v: v)
    clone = list.__new__(type(batch))
    list.__init__(clone, some)
    return _with_attributes(clone, batch, lambda value: value)


def _cut_item(batch: Any, part: slice) -> Any:
    if isinstance(batch, PackedSequence):
        sequences = unpack_sequence(batch)[part]
        return pack_sequence(sequences, enforce_sorted=batch.sorted_indices is None)
    if isinstance(batch, Tensor) and batch.is_nested:
        sequences = [*batch.unbind()[part]]
        return torch.nested.as_nested_tensor(sequences, layout=batch.layout)
    return batch[part]


_ONE = (Tensor, PackedSequence, np.ndarray)
"""Types that hold a number of samples, and are not containers."""


def _holds(value: Any, samples: int) -> bool:
    if isinstance(value, _ONE):
        return samples in _counts(value)
    return any(_holds(item, samples) for item in items(value))


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return nested containers with the function's result for each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    return with_changed_items(value, lambda item: mapped(function, item))


def items(batch: Any) -> Iterable[Any]:
    """Return the items of a container in order; any other object has no items."""
    if isinstance(batch, PackedSequence):
        return (batch.data,)
    if isinstance(batch, Mapping):
        return batch.values()
    if isinstance(batch, _PLAIN):
        return batch
    return attributes(batch).values() if _is_record(batch) else ()


_PLAIN = (tuple, list, set, frozenset, deque)


def with_changed_items(batch: Any, change: Callable[[Any], Any]) -> Any:
    """Return a container with changed items, and any other value unchanged.

    The new container has the type of the old container. Its attributes are changed too,
    as some dictionaries keep their items in attributes as well. No method of the
    container's class is called, because a method may fail or have other effects.

    Args:
        batch: Any value. It is not changed.
        change: Gets each item, and returns the new item.

    Raises:
        BatchError: ``batch`` is a mapping that cannot be made with other items.
    """
    if isinstance(batch, PackedSequence):  # a tuple whose parts depend on each other
        return type(batch)(change(batch.data), *batch[1:])
    if _is_tensordict(batch):
        result = batch.apply(change, batch_size=[])
        return result.auto_batch_size_(len(batch.batch_size))
    if isinstance(batch, dict) and dict.__len__(batch) == len(batch):
        base = OrderedDict if isinstance(batch, OrderedDict) else dict
        known = {key: (item, change(item)) for key, item in base.items(batch)}
        clone = _bare(batch)
        for key, (_, item) in known.items():
            base.__setitem__(clone, key, item)
        return _with_attributes(clone, batch, change, known.values())
    if isinstance(batch, _PLAIN):
        return _sequence(batch, change)
    if _is_record(batch):
        return _with_attributes(_bare(batch), batch, change)
    if isinstance(batch, Mapping):
        return _mapping(batch, change)
    return batch


def _sequence(batch: Any, change: Callable[[Any], Any]) -> Any:
    base: Any = next(kind for kind in _PLAIN if isinstance(batch, kind))
    pairs = [(item, change(item)) for item in base.__iter__(batch)]
    changed = [new for _, new in pairs]
    if base not in (tuple, frozenset):
        clone = base.__new__(type(batch))
        rest = (batch.maxlen,) if isinstance(batch, deque) else ()
        base.__init__(clone, changed, *rest)
    elif all(new is old for old, new in pairs):
        return batch
    else:
        try:
            clone = base.__new__(type(batch), changed)
        except TypeError:  # torch.return_types are tuples made in C
            return type(batch)(changed)
    return _with_attributes(clone, batch, change, pairs)


def _mapping(batch: Mapping[Any, Any], change: Callable[[Any], Any]) -> Any:
    """Return a changed mapping that is no dict: it holds a mapping, or takes a dict."""
    own = dict(batch.items())
    for value in attributes(batch).values():
        if isinstance(value, Mapping) and _same(dict(value.items()), own):
            return _with_attributes(_bare(batch), batch, change)
    changed = {key: change(item) for key, item in own.items()}
    kind: Callable[..., Any] = type(batch)
    try:
        clone = kind(changed)
        if type(clone) is type(batch) and _same(dict(clone.items()), changed):
            return clone
        reason = "its class makes something else of a dictionary"
    except Exception as error:
        reason = f"its class takes no dictionary ({type(error).__name__}: {error})"
    raise BatchError(
        "batch: expected mappings that can be made again with other tensors, got "
        f"{describe(batch)}: {reason}",
        "put a dict or a dataclass in its place",
    )


def _bare(value: Any) -> Any:
    """Return a new, empty object of a value's type, without a call of its class."""
    base = next(b for b in (dict, SimpleNamespace, object) if isinstance(value, b))
    return base.__new__(type(value))


def _same(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    return one.keys() == other.keys() and all(one[k] is other[k] for k in one)


def _with_attributes(
    clone: Any,
    batch: Any,
    change: Callable[[Any], Any],
    known: Iterable[tuple[Any, Any]] = (),
) -> Any:
    """Give a new container the changed attributes of the old container."""
    done = {id(old): new for old, new in known}

    def changed(value: Any) -> Any:
        return done[id(value)] if id(value) in done else change(value)

    for member, value in _slots(batch):
        member.__set__(clone, changed(value))
    state = _state(batch)
    if state is batch:  # a dictionary that holds its own attributes
        object.__setattr__(clone, "__dict__", clone)
    else:
        values = {name: changed(value) for name, value in state.items()}
        _state(clone).update(values)
    return clone


def attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object by name, slots included."""
    return {slot.__name__: item for slot, item in _slots(value)} | _state(value)


def _slots(value: Any) -> Iterator[tuple[MemberDescriptorType, Any]]:
    """Yield the slots of an object that are set, with their values."""
    for kind in type(value).__mro__:
        for name, member in vars(kind).items():
            if isinstance(member, MemberDescriptorType) and name != "__dict__":
                try:
                    item = member.__get__(value)
                except AttributeError:
                    continue
                yield member, item


def _state(value: Any) -> dict[str, Any]:
    try:
        # The class may define a __getattr__ that raises anything.
        state: dict[str, Any] = object.__getattribute__(value, "__dict__")
    except AttributeError:
        state = {}
    return state


def _is_record(value: Any) -> bool:
    """Return whether a value's class declares attributes as its items."""
    # __pydantic_fields__ is missing before pydantic 2.10.
    declared = ("__dataclass_fields__", "__attrs_attrs__", "__pydantic_validator__")
    if isinstance(value, nn.Module):
        return False
    return isinstance(value, SimpleNamespace | Namespace | UserDict | UserList) or any(
        hasattr(type(value), name) for name in declared
    )


def _is_tensordict(value: Any) -> bool:
    """Return whether a value looks like a TensorDict; the package may be missing."""
    return all(
        hasattr(type(value), name) for name in ("batch_size", "auto_batch_size_")
    )


def _moves_itself(value: Any) -> bool:
    """Return whether a value's class has a method ``to``; a key ``to`` is no method."""
    own = callable(getattr(type(value), "to", None))
    return own and not isinstance(value, nn.Module)


def _copied(value: Any) -> Any:
    """Return a container with copies of its tensors, or a copy of a movable object."""
    if isinstance(value, Tensor):
        return value.clone()
    other = with_changed_items(value, _copied)
    if other is not value or not _moves_itself(value):
        return other
    try:
        return deepcopy(value)
    except Exception:  # e.g. the object holds a lock
        return copy(value)


def describe(value: Any) -> str:
    """Return a description of a value for messages; a tensor's type and shape."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    else:
        for item in items(value):
            yield from tensors(item)
