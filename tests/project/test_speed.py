"""Benchmarks of speed and of training run, and the docs show what they stored."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from interpreter import python

import force_plugin

ROOT = Path(__file__).parents[2]


def run(script: str, *options: str) -> str:
    done = python(f"benchmarks/{script}.py", *options, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def run_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The same in this process, which has imported everything."""

    def run_it(script: str, *options: str) -> str:
        path = ROOT / "benchmarks" / f"{script}.py"
        monkeypatch.syspath_prepend(str(path.parent))
        monkeypatch.setattr(sys, "argv", [str(path), *options])
        capsys.readouterr()
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run_it


def tables(shown: str) -> str:
    """What comes after the machines and the commands."""
    return shown.split("\n\n", maxsplit=1)[1]


def check_stored(file: Path, shown: str, again: str) -> list[dict[str, Any]]:
    """What was stored, and that the table is of it and was not measured again."""
    assert again == shown
    assert max(map(len, tables(shown).splitlines())) <= 80
    rows: list[dict[str, Any]] = json.loads(file.read_text("utf-8"))
    for row in rows:
        assert str(file) in row["machine"]["command"]
        assert {"cpu", "threads", "torch", "date"} <= row["machine"].keys()
    return rows


def test_speed_of_every_side_is_measured_once_and_drawn(
    tmp_path: Path, run_here: Callable[..., str]
) -> None:
    file = tmp_path / "speed.json"
    snap = [] if hasattr(force_plugin, "snap_prune") else ["--no-snap"]
    quick = ("--quick", "--store", str(file))
    first = run("speed", *quick, *snap, "--threads", "1")
    stored = file.read_bytes()
    again = run_here("speed", *quick, "--plot", str(tmp_path))
    assert (tmp_path / "speed.png").stat().st_size
    assert file.read_bytes() == stored
    (row,) = check_stored(file, first, again)
    assert (row["model"], row["size"], row["sparsity"]) == ("test_resnet", 32, 0.9)
    sides = row["sides"]
    names = ["dense", "masked", "permanent", "compact", "compact 16"]
    assert list(sides) == names + ([] if snap else ["snap"])
    for seen in sides.values():
        assert len(seen["forward"]) == len(seen["step"]) == row["rounds"]
        assert min(seen["forward"] + seen["step"]) > 0
        assert seen["bytes"] >= 0
    dense, masked, compact = (sides[name] for name in ("dense", "masked", "compact"))
    assert masked["multiplications"] == dense["multiplications"]
    assert compact["multiplications"] <= dense["multiplications"]
    assert compact["parameters"] <= dense["parameters"]


def test_the_compacted_is_trained_beside_the_masked(
    tmp_path: Path, run_here: Callable[..., str]
) -> None:
    file = tmp_path / "training.json"
    quick = ("--quick", "--store", str(file))
    first = run("compact_training", *quick, "--threads", "1")
    stored = file.read_bytes()
    again = run_here("compact_training", *quick)
    assert file.read_bytes() == stored
    rows = check_stored(file, first, again)
    assert [row["run"]["seed"] for row in rows] == [0, 1]
    for row in rows:
        sides = row["sides"]
        assert list(sides) == ["dense", "masked", "compacted"]
        assert all(0 < seen["accuracy"] < 1 for seen in sides.values())
        assert all(seen["seconds"] > 0 for seen in sides.values())
        assert sides["compacted"]["parameters"] < sides["masked"]["parameters"]
        assert row["distance"] < 1e-4  # before training they are the same


def test_channels_go_by_their_sensitivity_and_at_random(
    tmp_path: Path, run_here: Callable[..., str]
) -> None:
    file = tmp_path / "snap.json"
    quick = ["--model", "test_resnet", "--data", "digits", "--images", "128"]
    quick += ["--sparsities", "0.5", "--seeds", "0", "--epochs", "2"]
    quick += ["--store", str(file)]
    first = run("snap", *quick, "--threads", "1")
    stored = file.read_bytes()
    again = run_here("snap", *quick, "--plot", str(tmp_path))
    assert (tmp_path / "snap.png").stat().st_size
    assert file.read_bytes() == stored
    one, other = check_stored(file, first, again)
    assert [one["method"], other["method"]] == ["snap", "random"]
    assert one["layers"] != other["layers"]
    for row in (one, other):
        before, after = row["channels"]
        assert 0.45 < after / before < 0.55
        assert len(row["accuracies"]) == 2


@pytest.mark.parametrize(
    ("script", "results"),
    [
        ("speed", "speed-results.txt"),
        ("compact_training", "compact-training-results.txt"),
        ("snap", "snap-results.txt"),
    ],
)
def test_the_docs_show_what_is_stored(
    script: str, results: str, run_here: Callable[..., str]
) -> None:
    stored = ROOT / "docs" / results
    shown = run_here(script, "--from", str(ROOT / "benchmarks" / f"{script}.json"))
    assert max(map(len, tables(shown).splitlines())) <= 80
    assert shown == stored.read_text("utf-8")
