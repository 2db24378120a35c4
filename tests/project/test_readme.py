"""The code in the README runs, and that of pages that are read from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

from force_plugin import METHODS, force_prune
from force_plugin.methods import criteria

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks_of(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


BLOCKS = blocks_of(README)


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
    code = BLOCKS[number].replace("resnet50", "test_resnet")
    exec(code, scope)


def test_checkpoints_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 64)
    model = timm.create_model("test_resnet", num_classes=10)
    force_prune(model, [(images, torch.arange(4))], 0.9, steps=3, progress=False)
    scope = {"model": model, "example_inputs": images}
    page = (ROOT / "docs" / "howto" / "checkpoints.md").read_text(encoding="utf-8")
    expected = model.eval()(images)
    for block in blocks_of(page):
        exec(block.replace("resnet50", "test_resnet"), scope)
        scope["model"].eval()
        torch.testing.assert_close(scope["model"](images), expected, rtol=0, atol=1e-5)
    assert len(blocks_of(page)) == 4


def test_the_page_on_steps_and_batches_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = ROOT / "docs" / "howto" / "steps-and-batches.md"
    blocks = blocks_of(page.read_text(encoding="utf-8"))
    assert len(blocks) == 5
    for block in blocks:
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=10)
        images = TensorDataset(torch.randn(32, 3, 64, 64), torch.arange(32) % 4)
        loader = DataLoader(images, batch_size=4, shuffle=True)
        scope = {"force_prune": force_prune, "model": model, "loader": loader}
        small = block.replace("=40", "=1").replace("=60", "=2").replace("0.99", "0.9")
        exec(small, scope)
    printed = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in printed]  # of the last block: pruned twice
    assert rows[0][0] == "conv1.0.weight"
    assert any(one != other for _, one, other in rows)  # by other batches


def test_the_method_that_contributing_adds_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scope = dict(vars(criteria))  # where the class is to stand
    known = set(scope)
    for block in blocks_of((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        exec(block, scope)
        if method := scope.get("GradientMagnitude"):
            monkeypatch.setitem(METHODS, "gradient", method)
    (test,) = (scope[name] for name in scope.keys() - known if name[:5] == "test_")
    test()


@pytest.mark.parametrize("file", ["README.md", "docs/methods.md"])
def test_the_methods_table_names_every_method(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    table = text[text.index("| `method=` |") :].split("\n\n")[0]
    assert re.findall(r'^\| `"(\w+)"` \|', table, flags=re.MULTILINE) == list(METHODS)
