"""What every test runs under."""

from __future__ import annotations

import gc

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # For tensors this small threads only wait for each other, and with more test runs
    # than cores they wait for a hundred times the work.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _modules_are_no_garbage() -> None:
    # Some millions of objects that were imported stay to the end. A collection that
    # looks at them all takes half a second, and tests ask for many.
    gc.collect()
    gc.freeze()
