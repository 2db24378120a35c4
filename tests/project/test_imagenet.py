"""The scripts for ImageNet, on a small tree of real pictures, in two processes."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from interpreter import python, ranks
from PIL import Image
from sklearn.datasets import load_sample_images

from force_plugin import load_masks

SCRIPTS = Path(__file__).parents[2] / "examples" / "imagenet"
SMALL = ["--model=test_resnet", "--image-size=64", "--workers=0"]


def run(script: str, *words: str, processes: int = 2, fails: bool = False) -> str:
    command = [SCRIPTS / f"{script}.py", *SMALL, *words]
    all_done = ranks(*command) if processes > 1 else [python(*command)]
    said = "".join(done.stderr for done in all_done)
    for done in all_done:
        assert (done.returncode != 0) == fails, said[-3000:]
    return said if fails else "".join(done.stdout for done in all_done) + said


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of the two photographs that come with scikit-learn."""
    folder = tmp_path_factory.mktemp("imagenet")
    random = np.random.default_rng(0)
    for label, pixels in enumerate(load_sample_images().images):
        # 25 in val: two processes do not have as many each.
        for split, count in (("train", 32), ("val", 12 + label)):
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
    assert f"{force} is there already" in run("find_masks", data, *find)
    assert (force / "report.json").stat().st_mtime_ns == before

    train = [data, f"--pruned={force / 'pruned.safetensors'}", "--batch-size=16"]
    run("train", *train, "--epochs=1")
    assert len(torch.load(force / "last.pt")["log"]) == 1
    run("train", *train, "--epochs=6")
    last = torch.load(force / "last.pt")
    for name, mask in masks.items():
        for state in (last["model"], last["average"]):
            assert not state[name][~mask].any() and state[name][mask].any()
    with (force / "log.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    rates = [0.1 * 16 / 256 * 0.1**tenths for tenths in (0, 0, 1, 1, 2, 2)]
    assert [row["lr"] for row in rows] == pytest.approx(rates)  # not those of 1 epoch
    for row in rows:  # each image of val once
        assert 25 * row["top1"] == pytest.approx(round(25 * row["top1"]), abs=1e-4)
    assert sum(row["loss"] for row in rows[3:]) < sum(row["loss"] for row in rows[:3])

    run("train", data, f"--out={tmp_path / 'dense'}", "--batch-size=16", "--epochs=1")
    table = f"--out={tmp_path / 'results.csv'}"
    folders = sorted(map(str, tmp_path.glob("*/")))  # random-0.9 is not trained
    said = run("evaluate", data, *folders, table, processes=1)
    assert "90.00%" in said and "0.00%" in said and "layer1.0.conv1.weight" in said
    assert f"{tmp_path / 'random-0.9'}: not trained yet" in said
    assert (tmp_path / "results.csv").read_text().startswith("run,epochs,top1 model")

    said = run("find_masks", data, *find, "--seed=1", fails=True)
    assert f"{force} was made with --seed 0, not 1" in said
    said = run("train", *train, "--seed=1", "--epochs=7", fails=True)
    assert "--seed: " in said and "was made with 0, not 1" in said
    dense = [data, f"--out={force}", "--batch-size=16", "--epochs=7"]
    assert "--pruned: " in run("train", *dense, fails=True)


def test_a_network_that_cannot_be_pruned_does_not_keep_the_others(
    tree: Path, tmp_path: Path
) -> None:
    words = ["--methods", "snip", "--sparsities", "0.9999", "0.8", "--batches=2"]
    words += [f"--data={tree}", "--batch-size=8", f"--out={tmp_path}"]
    said = run("find_masks", *words, fails=True)
    assert "the pruned network is disconnected" in said
    assert "not pruned, for the reasons above: snip-0.9999" in said
    assert (tmp_path / "snip-0.8" / "report.json").exists()
    run("find_masks", *words, "--on-collapse=warn")
    assert (tmp_path / "snip-0.9999" / "report.json").exists()
