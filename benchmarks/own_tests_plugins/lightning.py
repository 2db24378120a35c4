"""Replace ``ModelPruning`` in Lightning's ``callbacks/test_pruning.py`` with ours."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import callbacks

from force_plugin import Magnitude, Random
from force_plugin.lightning import SaliencyPruning


class L1Unstructured(Magnitude):
    """Magnitude pruning under the name that Lightning's tests expect in the log."""


class RandomUnstructured(Random):
    """Random pruning under the name that Lightning's tests expect in the log."""


NAMES = {"l1_unstructured": L1Unstructured, "random_unstructured": RandomUnstructured}


class InPlaceOfModelPruning(SaliencyPruning):
    """``SaliencyPruning`` that accepts ``ModelPruning``'s names of the two methods."""

    def __init__(self, pruning_fn: Any, **options: Any) -> None:
        if isinstance(pruning_fn, str):
            pruning_fn = NAMES.get(pruning_fn, pruning_fn)
        super().__init__(pruning_fn, **options)


def pytest_configure() -> None:
    theirs: Any = callbacks
    theirs.ModelPruning = InPlaceOfModelPruning
