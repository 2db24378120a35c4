"""A sample of the sweep over timm's families."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from interpreter import python

SWEEP = Path(__file__).parents[2] / "benchmarks" / "families.py"
SAMPLE = ["test_resnet", "test_convnext", "test_vit", "test_nfnet", "test_byobnet"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "families.jsonl"
    sweep(out)
    return out


def sweep(out: Path, *options: str) -> str:
    command = [SWEEP, "--models", *SAMPLE, "--threads", 1, "--runs", "0.9:3"]
    done = python(*command, "--size", 32, "--out", out, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_model_is_pruned_trained_and_made_permanent(results: Path) -> None:
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert {line["model"]: line.get("error") for line in lines} == dict.fromkeys(SAMPLE)
    assert [line["family"] for line in lines[:2]] == ["resnet", "convnext"]
    assert all(line["force"]["0.9"]["kept"] > 0 for line in lines)


def test_open_gates_leave_fewer_layers_without_weights(results: Path) -> None:
    for line in map(json.loads, results.read_text().splitlines()):
        if line["model"] in ("test_resnet", "test_convnext", "test_nfnet"):
            closed, opened = line["snip_closed"], line["force"]["0.9"]
            assert len(opened["empty"]) < len(closed["empty"]) / 2


def test_what_was_run_is_not_run_again(results: Path) -> None:
    before = results.read_text()
    assert sweep(results) == ""
    assert results.read_text() == before


def test_the_table_has_a_row_a_model(results: Path, tmp_path: Path) -> None:
    sweep(results, "--table", str(tmp_path / "table.md"))
    rows = (tmp_path / "table.md").read_text().splitlines()
    assert [row.split("`")[1] for row in rows if row.startswith("| `")] == [
        *["test_byobnet", "test_convnext", "test_nfnet", "test_resnet", "test_vit"]
    ]


def test_the_table_in_the_docs_is_that_of_the_stored_results(tmp_path: Path) -> None:
    stored, docs = SWEEP.with_suffix(".jsonl"), SWEEP.parents[1] / "docs"
    sweep(stored, "--table", str(tmp_path / "table.md"))
    ours = (tmp_path / "table.md").read_text()
    assert ours == (docs / "families-table.md").read_text()


def test_what_is_compacted_computes_the_same_and_stands_in_the_docs(
    tmp_path: Path,
) -> None:
    script, docs = SWEEP.with_name("compact_families.py"), SWEEP.parents[1] / "docs"
    lines = script.with_suffix(".jsonl").read_text().splitlines()
    compacted = [
        one
        for line in map(json.loads, lines)
        for one in line.get("force", {}).values()
        if "distance" in one
    ]
    assert len(compacted) > 250
    for one in compacted:
        for distance in ("distance", "distance_opened", "distance_loaded"):
            assert one[distance] <= 1e-10
    done = python(script, "--table", tmp_path / "table.md")
    assert done.returncode == 0, done.stderr
    ours = (tmp_path / "table.md").read_text()
    assert ours == (docs / "compact-table.md").read_text()
