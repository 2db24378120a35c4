"""The script for CIFAR, on real pictures in the format of CIFAR's own files."""

from __future__ import annotations

import csv
import json
import pickle
import runpy
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images
from torchvision import datasets

SCRIPT = Path(__file__).parents[2] / "examples" / "cifar" / "train.py"


@cache
def photographs() -> list[np.ndarray]:
    return load_sample_images().images


def write(path: Path, count: int, key: str, random: np.random.Generator) -> None:
    """Crops of the two photographs that come with scikit-learn, by class."""
    rows, labels = [], []
    for number in range(count):
        pixels = photographs()[number % 2]
        top, left = (random.integers(0, n - 32) for n in pixels.shape[:2])
        crop = pixels[top : top + 32, left : left + 32]
        rows.append(crop.transpose(2, 0, 1).reshape(-1))
        labels.append(number % 2)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps({"data": np.stack(rows), key: labels}))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of both data sets, whose files need not have the originals' hashes."""
    random = np.random.default_rng(0)
    for kind, key in ((datasets.CIFAR10, "labels"), (datasets.CIFAR100, "fine_labels")):
        folder = tmp_path / kind.base_folder
        for part, size in (("train_list", 10), ("test_list", 12)):
            names = [name for name, _ in getattr(kind, part)]
            monkeypatch.setattr(kind, part, [(name, None) for name in names])
            for name in names:
                write(folder / name, size * 5 // len(names), key, random)
        monkeypatch.setattr(kind, "meta", kind.meta | {"md5": None})
        classes = {kind.meta["key"]: ["china", "flower"]}
        (folder / kind.meta["filename"]).write_bytes(pickle.dumps(classes))
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    options = ["--workers=0", "--batch-size=8", "--steps=3", *words]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.parametrize(
    ("dataset", "model", "method"),
    [("cifar10", "resnet50", "force"), ("cifar100", "vgg19", "snip")],
)
def test_a_network_is_pruned_trained_continued_and_tested(
    dataset: str,
    model: str,
    method: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    words = [f"--data={data}", f"--dataset={dataset}", f"--model={model}"]
    words += [f"--method={method}", "--sparsity=0.9", f"--out={out}"]
    run(monkeypatch, *words, "--epochs=1")
    random = torch.load(out / "last.pt")["random"]
    table = capsys.readouterr().out
    assert "90.00 %" in table and "test accuracy" in table
    assert (out / "layers.png").stat().st_size > 0

    run(monkeypatch, *words, "--epochs=2")
    assert "90.00 %" not in capsys.readouterr().out  # not pruned once more
    assert not torch.equal(torch.load(out / "last.pt")["random"], random)
    rows = list(csv.DictReader((out / "log.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(float(row["sparsity"]) == pytest.approx(0.9, abs=1e-4) for row in rows)
    assert all(0 <= float(row["held_out"]) <= 1 for row in rows)
    result = json.loads((out / "result.json").read_text())
    assert 0 <= result["test"] <= 1 and result["epoch"] == 2
    assert json.loads((out / "report.json").read_text())["sparsity"] > 0.89
    # SNIP scores once and FORCE at each step: ten batches on CIFAR-100 are for those.
    assert (result["batches"], result["steps"]) == (1, 3)

    with pytest.raises(SystemExit, match="give the same options, or another --out"):
        run(monkeypatch, *words, "--batches=2")


def test_the_dense_network_trains_too(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = [f"--data={data}", "--model=vgg19", "--sparsity=0", f"--out={out}"]
    run(monkeypatch, *words, "--epochs=1")
    run(monkeypatch, *words, "--epochs=2")
    rows = list(csv.DictReader((out / "log.csv").open()))
    assert [float(row["sparsity"]) for row in rows] == [0, 0]
