"""Errors have kinds: to catch one is to catch what went wrong, and nothing else."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import perceptron as network
from networks import waves
from state import unchanged
from torch import Tensor, nn

import force_plugin
from force_plugin import (
    BatchError,
    CollapseError,
    CompactionError,
    FileFormatError,
    MaskMismatchError,
    MethodError,
    NoGradientError,
    NotFiniteError,
    NothingToPruneError,
    NotPrunedError,
    PruningError,
    RankError,
    Remark,
    apply_masks,
    compact,
    diagnose,
    force_prune,
    get_masks,
    load_compact,
    load_masks,
    load_pruned_state_dict,
    reinitialise,
    saliency,
    save_masks,
    shuffle_masks,
    snap_prune,
    sparsity_report,
)
from force_plugin.hold import save_pruned
from force_plugin.trainers.initial_weights import InitialWeights
from force_plugin.zoo import count_classes, load_dataset

KINDS: dict[type[PruningError], type[Exception]] = {
    BatchError: ValueError,
    CollapseError: RuntimeError,
    CompactionError: RuntimeError,
    FileFormatError: ValueError,
    MaskMismatchError: ValueError,
    MethodError: ValueError,
    NoGradientError: RuntimeError,
    NotFiniteError: RuntimeError,
    NotPrunedError: ValueError,
    NothingToPruneError: ValueError,
    RankError: RuntimeError,
}


def test_every_kind_is_a_public_name() -> None:
    assert set(PruningError.__subclasses__()) == set(KINDS)
    assert {kind.__name__ for kind in KINDS} <= set(force_plugin.__all__)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("advice", ["", "do this"])
def test_a_kind_is_the_built_in_error_too(
    kind: type[PruningError], advice: str
) -> None:
    error = kind("it was so", advice)
    assert isinstance(error, KINDS[kind])
    assert isinstance(error, PruningError)
    assert str(error) == ("it was so; do this" if advice else "it was so")
    for twin in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(twin) is kind
        assert str(twin) == str(error)
        assert (twin.problem, twin.advice) == ("it was so", advice)


def test_the_names_of_weights_without_a_gradient_are_pickled_too() -> None:
    error = NoGradientError("it was so", "do this", ["a.weight", "b.weight"])
    twin = pickle.loads(pickle.dumps(error))
    assert twin.names == error.names == ("a.weight", "b.weight")
    assert str(twin) == "it was so; do this"


@pytest.mark.parametrize("advice", ["", "do this"])
def test_a_remark_is_a_sentence(advice: str) -> None:
    remark = Remark("it is so", advice)
    assert remark == ("it is so; do this" if advice else "it is so")
    for twin in (pickle.loads(pickle.dumps(remark)), copy.deepcopy(remark)):
        assert (twin, twin.problem, twin.advice) == (remark, "it is so", advice)


# Who raises what.


def pruned() -> nn.Sequential:
    model = network()
    force_prune(model, [], 0.5, method="random", progress=False)
    return model


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def prune(model: nn.Module, sparsity: float = 0.5, **options: Any) -> None:
    batch = waves()
    force_prune(model, [batch], sparsity, **{"progress": False, "steps": 2, **options})


def dead() -> nn.Sequential:
    """Nothing passes its activation."""
    model: Any = network()
    nn.init.constant_(model[0].bias, -100.0)
    return model


def file(path: Path, content: bytes = b"none") -> Path:
    path.write_bytes(content)
    return path


Case = tuple[type[PruningError], Callable[[], nn.Module], Callable[[Any, Path], object]]


def written(save: Callable[[Any, Path], None], what: Any, path: Path) -> Path:
    save(what, path)
    return path


CASES: dict[str, Case] = {
    "nothing": (NothingToPruneError, lambda: nn.Embedding(4, 4), lambda m, _: prune(m)),
    "nothing_named": (
        NothingToPruneError,
        network,
        lambda m, _: prune(m, parameters=[]),
    ),
    "nothing_to_report": (
        NothingToPruneError,
        nn.ReLU,
        lambda m, _: sparsity_report(m),
    ),
    "nothing_to_score": (
        NothingToPruneError,
        nn.ReLU,
        lambda m, _: saliency(m, []),
    ),
    "nothing_to_diagnose": (
        NothingToPruneError,
        nn.ReLU,
        lambda m, _: diagnose(m, []),
    ),
    "no_gradient": (NoGradientError, Unused, lambda m, _: prune(m)),
    "collapse": (CollapseError, dead, lambda m, _: prune(m, 0.9)),
    "unknown_masks": (
        MaskMismatchError,
        network,
        lambda m, _: apply_masks(m, {"1.weight": torch.ones(1)}),
    ),
    "shape_of_masks": (
        MaskMismatchError,
        network,
        lambda m, _: apply_masks(m, {"0.weight": torch.ones(1)}),
    ),
    "values_of_masks": (
        MaskMismatchError,
        network,
        lambda m, _: apply_masks(m, {"0.weight": torch.full((8, 6), 0.5)}),
    ),
    "no_masks": (MaskMismatchError, network, lambda m, _: apply_masks(m, {})),
    "no_masks_to_shuffle": (
        MaskMismatchError,
        network,
        lambda m, _: shuffle_masks({}),
    ),
    "no_masks_to_save": (
        MaskMismatchError,
        network,
        lambda m, path: save_masks(get_masks(m), path),
    ),
    "state_of_a_dense_model": (
        NotPrunedError,
        network,
        lambda m, _: load_pruned_state_dict(m, network().state_dict()),
    ),
    "new_values_for_a_dense_model": (
        NotPrunedError,
        network,
        lambda m, _: reinitialise(m, network()),
    ),
    "other_file": (FileFormatError, network, lambda m, p: load_masks(file(p))),
    "empty_file": (FileFormatError, network, lambda m, p: load_masks(file(p, b""))),
    "weights_for_masks": (
        FileFormatError,
        pruned,
        lambda m, path: load_masks(written(save_pruned, m, path)),
    ),
    "initial_weights": (
        FileFormatError,
        network,
        lambda m, path: InitialWeights(str(file(path))),
    ),
    "dense_to_compact": (
        NotPrunedError,
        network,
        lambda m, _: compact(m, torch.ones(1, 6), progress=False),
    ),
    "compact_file": (
        FileFormatError,
        network,
        lambda m, p: load_compact(m, file(p)),
    ),
    "masks_for_a_compact_file": (
        FileFormatError,
        pruned,
        lambda m, p: load_compact(m, written(save_masks, get_masks(m), p)),
    ),
    "no_channels": (
        NothingToPruneError,
        nn.ReLU,
        lambda m, _: snap_prune(m, [], torch.ones(1, 6), 0.5, progress=False),
    ),
    "no_folder_of_classes": (
        BatchError,
        network,
        lambda m, path: load_dataset(path.parent),
    ),
    "no_classes": (BatchError, network, lambda m, _: count_classes([])),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", CASES)
def test_what_goes_wrong_has_its_kind(case: str, tmp_path: Path) -> None:
    kind, make, call = CASES[case]
    model = make()
    with unchanged(model), pytest.raises(kind) as info:
        call(model, tmp_path / "file")
    assert type(info.value) is kind
    assert isinstance(info.value, KINDS[kind])
