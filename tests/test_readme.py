"""The code in the README runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_of_the_readme_runs(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    loader = [(torch.randn(4, 3, 64, 64), torch.arange(4))]
    scope = {
        "torch": torch,
        "model": timm.create_model("test_resnet", num_classes=10),
        "loader": loader,
        "train_loader": loader,
        "example_inputs": loader[0][0],
    }
    if "import force_prune" not in BLOCKS[number]:
        exec("from force_plugin import *", scope)
    # Small enough for a test: the sentences around the code are about the real thing.
    code = BLOCKS[number].replace("resnet50", "test_resnet").replace("40,", "1,")
    exec(code, scope)


def test_the_methods_table_names_every_method() -> None:
    from force_plugin import METHODS

    assert re.findall(r'^\| `"(\w+)"` \|', README, flags=re.MULTILINE) == list(METHODS)
