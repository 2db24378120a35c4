"""The table of what people do with a pruned model, and the script that makes it."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from interpreter import python

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "works_with.py"


def rows(table: str) -> dict[str, list[str]]:
    """What works and what breaks, by label, without the numbers of the errors."""
    lines = re.findall(r"^\| (.*\w.*) \|$", table, re.MULTILINE)[1:]
    return {
        label: [re.sub(r" \(\d+\)", "", cell) for cell in cells]
        for label, *cells in (line.split(" | ") for line in lines)
    }


def stored() -> dict[str, list[str]]:
    return rows((ROOT / "docs" / "works-with-table.md").read_text())


def run(*names: str, path: Path = ROOT) -> dict[str, list[str]]:
    done = python(SCRIPT, "--rows", *names, env={"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    return rows(done.stdout)


def test_the_table_of_the_docs_has_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    table = stored()
    counts = table.popitem()
    assert list(table) == list(runpy.run_path(str(SCRIPT))["ROWS"])
    works = [str(cells.count("works")) for cells in zip(*table.values(), strict=True)]
    assert counts == (f"**of {len(table)}, work**", works)
    text = (ROOT / "docs" / "training.md").read_text()
    assert f"Of {len(table)} things" in text
    assert re.findall(r"through\s(\d+)", text) == works


def test_rows_are_those_of_the_docs() -> None:
    table = run("keeps_order", "restarts_plain", "averages_buffers", "runs_distributed")
    del table["**of 4, work**"]
    assert len(table) == 4
    assert table == {label: stored()[label] for label in table}


def test_what_is_not_installed_is_not_tried(tmp_path: Path) -> None:
    (tmp_path / "lightning.py").write_text("raise ModuleNotFoundError(__name__)")
    table = run("fits_lightning", "copies", path=tmp_path)
    assert table["Lightning's `Trainer.fit`"] == 4 * ["not installed"]
    assert table["`copy.deepcopy`"] == ["works", "breaks", "works", "works"]
