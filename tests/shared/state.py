"""What a model and the process around it are, to compare before and after."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune


@dataclass(frozen=True, eq=False)
class Identical:
    """An object that equals itself only, kept alive so that its id stays its own."""

    it: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identical) and self.it is other.it


def frozen(value: object) -> object:
    """A value that tells whether an object was replaced or overwritten."""
    if isinstance(value, Tensor):
        return (
            Identical(value),
            value.requires_grad,
            tuple(value.shape),
            value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
            frozen(value.grad) if value.is_leaf else None,
        )
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    if isinstance(value, prune.PruningContainer):
        return (Identical(value), [Identical(part) for part in value])
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return Identical(value)


def state_of(model: nn.Module) -> dict[str, object]:
    """Every attribute of every module, entries of dictionaries one by one."""
    state: dict[str, object] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if not isinstance(value, dict):
                state[f"{name}/{key}"] = frozen(value)
                continue
            # A handle finds its hook by the dictionary's identity and the key.
            state[f"{name}/{key}"] = Identical(value)
            if "hooks" in key:
                state[f"{name}/{key}/order"] = list(value)
            for item, content in value.items():
                state[f"{name}/{key}/{item}"] = frozen(content)
    return state


def process_state(generators: Sequence[torch.Generator] = ()) -> dict[str, object]:
    """Random states and global modes."""
    numpy: Any = np.random.get_state()
    kind, keys, *rest = numpy
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "python": random.getstate(),
        "numpy": (kind, keys.tobytes(), *rest),
        "generators": [g.get_state().numpy().tobytes() for g in generators],
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "attention": torch.backends.cuda.flash_sdp_enabled(),
        "hooks": list(torch.nn.modules.module._global_forward_pre_hooks),
    }


def differences(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """What was added, removed or changed."""
    missing = object()
    return [
        key
        for key in {**before, **after}
        if before.get(key, missing) != after.get(key, missing)
    ]


@contextmanager
def unchanged(model: nn.Module, *generators: torch.Generator) -> Iterator[None]:
    """Assert that a model and the random states are bit for bit what they were."""
    before, around = state_of(model), process_state(generators)
    yield
    assert differences(before, state_of(model)) == []
    assert differences(around, process_state(generators)) == []


def failed(run: Callable[[], object], model: nn.Module | None = None) -> str:
    """The error of a call that leaves the model as it was."""
    with unchanged(model) if model is not None else nullcontext():
        try:
            run()
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
    return "no error"


def same(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], tolerance: float = 0.0
) -> bool:
    """Whether tensors are equal: bit by bit, or up to rounding."""
    return list(a) == list(b) and all(
        torch.allclose(a[name], b[name], rtol=tolerance, atol=tolerance * 1e-3)
        if tolerance
        else torch.equal(a[name], b[name])
        for name in a
    )


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Assert that tensors are equal bit for bit, and in the same order."""
    assert list(found) == list(expected)
    assert [n for n in expected if not torch.equal(found[n], expected[n])] == []
