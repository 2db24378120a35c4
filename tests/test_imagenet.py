"""The scripts for ImageNet, on a small tree of real pictures, in two processes."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from force_plugin import load_masks

SCRIPTS = Path(__file__).parents[1] / "examples" / "imagenet"
SMALL = ["--model=test_resnet", "--image-size=64", "--workers=0"]


def run(script: str, *words: str, processes: int = 2) -> str:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}"]
    command += [str(SCRIPTS / f"{script}.py"), *SMALL, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of the two photographs that come with scikit-learn."""
    folder = tmp_path_factory.mktemp("imagenet")
    random = np.random.default_rng(0)
    for label, pixels in enumerate(load_sample_images().images):
        for split, count in (("train", 32), ("val", 12)):
            for number in range(count):
                top, left = (random.integers(0, n - 96) for n in pixels.shape[:2])
                path = folder / split / f"class{label}" / f"{number}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels[top : top + 96, left : left + 96]).save(path)
    return folder


def test_masks_are_found_trained_from_continued_and_evaluated(
    tree: Path, tmp_path: Path
) -> None:
    data = f"--data={tree}"
    find = ["--methods", "force", "random", "--sparsities", "0.9", "--steps=3"]
    find += ["--batches=2", "--batch-size=8", f"--out={tmp_path}"]
    run("find_masks", data, *find)
    force = tmp_path / "force-0.9"
    masks = load_masks(force / "masks.safetensors")
    kept = sum(int(mask.sum()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    assert kept == total // 10
    before = (force / "report.json").stat().st_mtime_ns
    run("find_masks", data, *find)
    assert (force / "report.json").stat().st_mtime_ns == before  # there already

    train = [data, f"--pruned={force / 'pruned.safetensors'}", "--batch-size=16"]
    run("train", *train, "--epochs=1")
    first = torch.load(force / "last.pt")
    run("train", *train, "--epochs=3")
    last = torch.load(force / "last.pt")
    assert (first["epoch"], last["epoch"]) == (1, 3)
    for name, mask in masks.items():
        for state in (last["model"], last["average"]):
            assert not state[name][~mask].any() and state[name][mask].any()
    with (force / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert all(0 <= float(row["top1_average"]) <= 1 for row in rows)

    run("train", data, f"--out={tmp_path / 'dense'}", "--batch-size=16", "--epochs=1")
    folders = [str(force), str(tmp_path / "dense")]
    table = f"--out={tmp_path / 'results.csv'}"
    said = run("evaluate", data, *folders, table, processes=1)
    assert "90.00%" in said and "0.00%" in said and "layer1.0.conv1.weight" in said
    assert (tmp_path / "results.csv").read_text().startswith("run,epochs,top1 model")
