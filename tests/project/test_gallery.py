"""What the gallery of the docs draws: masks of ten networks, each with exactly 1 %."""

from __future__ import annotations

import json
import math
from pathlib import Path

import timm
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "benchmarks" / "gallery.jsonl").read_text(encoding="utf-8")
ROWS = [json.loads(line) for line in LINES.splitlines()]


def test_the_page_shows_all_that_is_stored() -> None:
    page = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    models = list(dict.fromkeys(row["model"] for row in ROWS))
    assert len(models) == 10
    assert sorted((row["model"], row["method"]) for row in ROWS) == sorted(
        (model, method) for model in models for method in ("force", "snip")
    )
    assert all(page.count(f'\nprofile("{model}")\n') == 1 for model in models)


def test_each_row_has_the_layers_of_its_network_and_a_hundredth_of_their_weights() -> (
    None
):
    for row in ROWS:
        with torch.device("meta"):
            model = timm.create_model(row["model"], num_classes=10)
        modules = model.named_modules()
        shapes = {
            f"{name}.weight": list(module.weight.shape)
            for name, module in modules
            if isinstance(module, nn.Conv2d | nn.Linear)
        }
        assert {name: shape for name, shape, _ in row["layers"]} == shapes
        total = sum(map(math.prod, shapes.values()))
        assert sum(kept for *_, kept in row["layers"]) == total // 100
