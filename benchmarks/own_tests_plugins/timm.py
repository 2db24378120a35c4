"""Run timm's ``tests/test_models.py`` on permanently pruned models."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import timm
import torch
from torch import nn

from force_plugin import force_prune, make_permanent

SPARSITY = 0.5

_create_model = timm.create_model


def create_model(*args: object, **options: object) -> nn.Module:
    """Return a model of ``timm.create_model`` with half of its weights kept at 0."""
    model: nn.Module = _create_model(*args, **options)
    with torch.random.fork_rng(devices=[]):
        force_prune(model, [], SPARSITY, method="random", progress=False)
    make_permanent(model)
    return model


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--models", action="append", help="pattern of their names")


def pytest_configure() -> None:
    timm.create_model = create_model


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Leave out tests of models that match no ``--models`` pattern."""
    patterns = config.getoption("--models")
    kept = []
    for item in items:
        of_one = getattr(item, "callspec", None)
        name = of_one and of_one.params.get("model_name")
        if not name or any(fnmatchcase(name, pattern) for pattern in patterns):
            kept.append(item)
    items[:] = kept
